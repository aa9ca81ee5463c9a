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
