"""Processes: the pool, several processes of one run, collectives, signals, locks, launcher messages."""
