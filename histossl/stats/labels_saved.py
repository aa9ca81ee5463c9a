"""Labels saved: how many labelled slides a start needs to score what another scores with more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import isotonic_regression

from histossl.stats.bootstrap import Floats, Measured, estimate
from histossl.stats.confidence_intervals import chance_level, contrast, half_width, has_budget, interval, one_cell
from histossl.stats.tables import Budget


@dataclass(frozen=True)
class Saved:
    """At `reference_slides` per class the reference scores `score`; the start needs `slides` for the same.

    `slides` None: it does not get there with all there are. `at_most`: its curve begins above, so fewer may do.
    An interval's end is None where "not reached" is among the possibilities. `reason`: why there is nothing to compare.
    """

    budget: Budget
    reference_slides: float
    score: float
    slides: float | None
    low: float | None
    high: float | None
    at_most: bool
    reason: str = ""

    @property
    def factor(self) -> float | None:
        """How many times fewer labelled slides (below 1: more)."""
        return self.reference_slides / self.slides if self.slides else None


def labels_saved(
    measured: Measured,
    metric: str,
    start: str,
    reference: str,
    head: str | None = None,
    reference_head: str | None = None,
) -> list[Saved]:
    """At each budget of the reference, the slides per class with which `start` reaches the same score.

    Both mean curves are first made to rise (isotonic regression: more labels cannot hurt in truth, only by luck), then
    the start's is read off between budgets, straight in log2(slides). The interval holds every number of slides at
    which the two scores are not told apart (Fieller 1954): where the start's curve less `score` may be 0, by the 95 %
    interval that `compare` gives a difference. So labels saved are no surer than the scores, and where these tell
    nothing the interval runs from the first budget to "not reached". (Middle quantiles of resampled curves shrink to a
    point where few patients are all right, and held the truth in 85 of 100 with two tested patients a class.) Where the
    reference itself is not above chance there is nothing to save, and the row says so.
    """
    a, b = measured.number(start, head), measured.number(reference, reference_head or head)
    there = np.flatnonzero(has_budget(measured, metric, a) & has_budget(measured, metric, b))
    x_B = np.log2(measured.slides[there])
    ours_B = rising(measured.mean_B(metric, a)[there])
    theirs_B = rising(measured.mean_B(metric, b)[there])
    chance = chance_level(metric, sum(count > 0 for count in measured.patients_per_class.values()))
    rows = []
    for number, column in enumerate(there):
        cell = one_cell(measured, b, int(column))
        # Between budgets a half width, too, is read off straight: there it is no less than it ought to be.
        half_B = np.array([half_width(contrast(measured, metric, one_cell(measured, a, int(c)) - cell)) for c in there])
        x, low, high = (
            first_crossing(x_B, rising(curve_B), theirs_B[number])
            for curve_B in (ours_B, ours_B + half_B, ours_B - half_B)
        )
        found = estimate(measured, metric, cell)
        reason = ""
        at_chance = chance is not None and interval(measured, metric, replace(found, df=math.inf), 0.9)[0] <= chance
        if at_chance:
            reason = "the reference is not clearly above chance here"
        rows.append(
            Saved(
                measured.budgets[column],
                float(measured.slides[column]),
                float(theirs_B[number]),
                _slides(x),
                _slides(low),
                _slides(high),
                at_most=bool(ours_B[0] >= theirs_B[number]),
                reason=reason,
            )
        )
    return rows


def rising(curve_B: Floats) -> Floats:
    """The nearest curve that never falls."""
    return np.asarray(isotonic_regression(curve_B).x)


def first_crossing(x_B: Floats, curve_B: Floats, target: float) -> float:
    """The smallest x where a rising curve reaches its target: the first x if it starts above, inf if it never does."""
    above = np.flatnonzero(curve_B >= target - 1e-12)
    if not len(above):
        return math.inf
    first = int(above[0])
    return float(np.interp(target, curve_B[first - 1 : first + 1], x_B[first - 1 : first + 1]) if first else x_B[0])


def _slides(x: float) -> float | None:
    return float(2**x) if math.isfinite(x) else None


def where_saved(rows: Sequence[Saved]) -> list[Saved]:
    return [row for row in rows if not row.reason and row.slides is not None and row.slides < row.reference_slides]


def most_telling(rows: Sequence[Saved]) -> Saved:
    """The row to quote: the reference's largest budget whose score the start reaches inside its own curve."""
    return max(rows, key=lambda one: (not one.at_most, one.reference_slides))
