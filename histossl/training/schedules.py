"""Values that change over a run, as functions of the step. The values at the end are the ones printed at the start."""

from __future__ import annotations

import math


def warmup_cosine(step: int, num_steps: int, warmup_steps: int, peak: float, final: float) -> float:
    """Linear from peak/warmup_steps up to `peak`, then half a cosine that reaches `final` at the last step."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if num_steps - warmup_steps <= 1:
        return peak
    share = (step - warmup_steps) / (num_steps - warmup_steps - 1)
    return final + (peak - final) * (1 + math.cos(math.pi * min(1.0, share))) / 2


def half_cosine(share: float, first: float, last: float) -> float:
    """From `first` at share 0 of a run to `last` at share 1 along half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * min(1.0, max(0.0, share)))) / 2


def ramp(share: float, length: float, first: float, last: float) -> float:
    """Linear from `first` at share 0 to `last` at share `length`, and `last` from there on."""
    return last if share >= length else first + (last - first) * share / length
