"""Predictions become metrics, intervals, labels saved, a verdict. NumPy and SciPy only: no torch, no slides."""
