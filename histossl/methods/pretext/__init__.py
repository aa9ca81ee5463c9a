"""Pretext tasks: one view and a question whose answer is known."""
