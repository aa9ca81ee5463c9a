"""A method's values that change over a run, as functions of the share of it that is done."""

from __future__ import annotations

import math


def half_cosine(share: float, first: float, last: float) -> float:
    """From `first` at share 0 of a run to `last` at share 1 along half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * min(1.0, max(0.0, share)))) / 2


def ramp(share: float, length: float, first: float, last: float) -> float:
    """Linear from `first` at share 0 to `last` at share `length`, and `last` from there on."""
    return last if share >= length else first + (last - first) * share / length
