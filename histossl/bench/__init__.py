"""What this machine does per second: views, tiling, steps.

For `histossl bench`; comparisons with other code are in tests/bench.
"""
