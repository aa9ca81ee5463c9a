"""What everything may know: configs and run.json, errors, the console, units, where things lie on disk.

Imports nothing of the other rooms, and no torch.
"""
