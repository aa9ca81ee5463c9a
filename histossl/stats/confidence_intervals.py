"""Mean scores over draws with their intervals, and two starts held against each other.

    summarise      mean over draws of each metric, start and budget, with 95 % intervals
    area           the mean height of a curve over log2(labelled slides per class)
    compare        two starts, paired by draw and by patient: difference and p at each budget (Holm) and of the area

Intervals of scores between 0 and 1 are Wilson's, with the number of patients that the estimated variance stands for:
they stay inside [0, 1] and do not shrink to a point when every patient happens to be right. Differences have Student's.
Variances are estimated in resampling.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from histossl.stats.bootstrap import Estimate, Floats, Measured, Series, estimate
from histossl.stats.tables import Budget, SummaryRow

LEVEL = 0.95
BOUNDED = ("auroc", "balanced_accuracy", "f1")
# A verdict is given at 1 in 50, not 1 in 20: where nothing changed it must say so in at least 95 of 100 archives.
VERDICT_P = 0.02
POWER = 0.8


# ---- means and intervals


def summarise(measured: Measured) -> list[SummaryRow]:
    rows = []
    for s, (start, head) in enumerate(measured.series):
        for b, budget in enumerate(measured.budgets):
            for metric, values_SBD in measured.values_SBD.items():
                num_draws = int(np.isfinite(values_SBD[s, b]).sum())
                if not num_draws:
                    continue
                found = estimate(measured, metric, one_cell(measured, s, b))
                low, high = interval(measured, metric, found)
                counts = num_draws, measured.num_patients, len(measured.backbones[s])
                rows.append(SummaryRow(start, head, budget, metric, found.value, low, high, *counts))
    return rows


def area(measured: Measured, metric: str, start: str, head: str | None = None) -> tuple[float, float, float]:
    """Mean height of the curve over log2 of the budget (trapezoids), with its interval."""
    weights_SB = np.zeros((len(measured.series), len(measured.budgets)))
    s = measured.number(start, head)
    weights_SB[s] = area_weights(measured.slides, has_budget(measured, metric, s))
    found = estimate(measured, metric, weights_SB)
    return found.value, *interval(measured, metric, found)


def area_per_seed(measured: Measured, metric: str, start: str, head: str | None = None) -> dict[str, float]:
    """The same height for each of a start's pretraining seeds."""
    s = measured.number(start, head)
    weights_B = area_weights(measured.slides, has_budget(measured, metric, s))
    curves_MB = np.nan_to_num(measured.seed_curves_MB(metric, s))
    return dict(zip(measured.backbones[s], (curves_MB @ weights_B).tolist(), strict=True))


def area_weights(slides: Floats, there: NDArray[np.bool_]) -> Floats:
    """Weights of the budgets in the mean height over log2(slides); they sum to one."""
    weights = np.zeros(len(slides))
    used = np.flatnonzero(there)
    x = np.log2(slides[used])
    if len(used) == 1 or np.ptp(x) == 0:
        weights[used] = 1 / len(used)
        return weights
    width = np.diff(x)
    weights[used[:-1]] += width / 2
    weights[used[1:]] += width / 2
    whole: Floats = weights / weights.sum()
    return whole


def interval(measured: Measured, metric: str, found: Estimate, level: float = LEVEL) -> tuple[float, float]:
    if math.isnan(found.value):
        return math.nan, math.nan
    t = float(stats.t.ppf(0.5 + level / 2, found.df))
    if metric not in BOUNDED:
        half = t * math.sqrt(found.variance)
        most = 1.0 if metric == "calibration_error" else math.inf  # a difference of shares; log-loss has no end
        return float(max(0.0, found.value - half)), float(min(most, found.value + half))
    n = full_patients(measured, metric) * found.worth
    # How many right-or-wrongs the estimate is worth: n divided by (its variance / that of n independent ones).
    # Half of one keeps the ratio defined, and at 1, where everybody is right and both variances are 0.
    half_item = 0.5 / n**2
    ratio = (found.variance + half_item) / (found.value * (1 - found.value) / n + half_item)
    return wilson(found.value, n / ratio, t)


def wilson(share: float, n: float, t: float) -> tuple[float, float]:
    middle = (share + t * t / (2 * n)) / (1 + t * t / n)
    half = t / (1 + t * t / n) * math.sqrt(max(0.0, share * (1 - share) / n + t * t / (4 * n * n)))
    return float(max(0.0, min(share, middle - half))), float(min(1.0, max(share, middle + half)))


def full_patients(measured: Measured, metric: str) -> float:
    """How many patients of evenly filled classes would know the metric as well: rare classes set the limit.

    Never more than there are: a patient with regions of three classes is one patient.
    """
    counts = np.array([count for count in measured.patients_per_class.values() if count])
    worth = len(counts) * counts.min() if metric == "auroc" else len(counts) ** 2 / (1 / counts).sum()
    return float(min(worth, measured.num_patients))


def chance_level(metric: str, num_classes: int) -> float | None:
    """What guessing scores; None where it depends on the class sizes."""
    return {"auroc": 0.5, "balanced_accuracy": 1 / num_classes, "log_loss": math.log(num_classes)}.get(metric)


# ---- two starts


@dataclass(frozen=True)
class Difference:
    """start - reference, with a 95 % interval; `p` two-sided, `p_adjusted` by Holm over the budgets (the area: p)."""

    budget: Budget | None  # None: the area
    value: float
    low: float
    high: float
    p: float
    p_adjusted: float


@dataclass(frozen=True)
class Comparison:
    start: Series
    reference: Series
    metric: str
    budgets: list[Difference]
    area: Difference
    detectable: float  # the smallest difference of areas that would be found four times in five
    errors: dict[str, float]  # standard errors of the area's difference, by where they come from
    df: float  # Student's, of the area's difference

    @property
    def standard_errors(self) -> float:
        """How many the interval of the area's difference goes to either side."""
        return student(self.df)


def compare(
    measured: Measured,
    metric: str,
    start: str,
    reference: str,
    head: str | None = None,
    reference_head: str | None = None,
) -> Comparison:
    """Paired by draw (same labelled slides) and by patient (same resamples): the variance is the difference's own."""
    a, b = measured.number(start, head), measured.number(reference, reference_head or head)
    both = has_budget(measured, metric, a) & has_budget(measured, metric, b)

    def paired(weights_B: Floats) -> Estimate:
        weights_SB = np.zeros((len(measured.series), len(measured.budgets)))
        weights_SB[a] += weights_B
        weights_SB[b] -= weights_B
        return contrast(measured, metric, weights_SB)

    def tested(budget: Budget | None, found: Estimate) -> tuple[Difference, float]:
        se, half = math.sqrt(found.variance), half_width(found)
        p = float(2 * stats.t.sf(abs(found.value) / se, found.df)) if se > 0 else float(found.value == 0)
        needed = float(stats.t.ppf(1 - VERDICT_P / 2, found.df) + stats.t.ppf(POWER, found.df)) * se
        most = 1.0 if metric in (*BOUNDED, "calibration_error") else math.inf  # two scores are no further apart
        low, high = max(-most, found.value - half), min(most, found.value + half)
        return Difference(budget, found.value, low, high, p, p), needed

    rows = []
    for number in np.flatnonzero(both):
        weights_B = np.zeros(len(measured.budgets))
        weights_B[number] = 1
        rows.append(tested(measured.budgets[number], paired(weights_B))[0])
    adjusted = holm([row.p for row in rows])
    rows = [
        Difference(row.budget, row.value, row.low, row.high, row.p, p) for row, p in zip(rows, adjusted, strict=True)
    ]
    of_area = paired(area_weights(measured.slides, both))
    whole, detectable = tested(None, of_area)
    parts = {
        f"which {measured.drawn}s were tested": of_area.patients_variance,
        "which items were labelled": of_area.labelling_variance,
        "which seeds pretraining had": of_area.seeds_variance,
        "how coarsely so few can be scored": of_area.least_variance,
    }
    errors = {name: math.sqrt(variance) for name, variance in parts.items() if variance > 0}
    return Comparison(measured.series[a], measured.series[b], metric, rows, whole, detectable, errors, of_area.df)


def contrast(measured: Measured, metric: str, weights_SB: Floats) -> Estimate:
    """A difference of scores. Scores move in steps of about one slide: half a step is never called a difference,
    however alike the draws."""
    slides = full_patients(measured, metric) * measured.num_tested / measured.num_patients
    return estimate(measured, metric, weights_SB, (0.5 / slides) ** 2 if metric in BOUNDED else 0.0)


def student(df: float) -> float:
    """How many standard errors a 95 % interval goes to either side: 1.96 for many patients, 4.3 for 2 degrees."""
    return float(stats.t.ppf(0.5 + LEVEL / 2, df))


def half_width(found: Estimate) -> float:
    return student(found.df) * math.sqrt(found.variance)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values: below 0.05 for any of them by chance alone in at most one table in twenty (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    largest = 0.0
    for rank, number in enumerate(order):
        largest = max(largest, min(1.0, p_values[number] * (len(p_values) - rank)))
        adjusted[number] = largest
    return [float(p) for p in adjusted]


# ---- small helpers


def one_cell(measured: Measured, s: int, b: int) -> Floats:
    weights_SB = np.zeros((len(measured.series), len(measured.budgets)))
    weights_SB[s, b] = 1
    return weights_SB


def has_budget(measured: Measured, metric: str, s: int) -> NDArray[np.bool_]:
    there: NDArray[np.bool_] = np.isfinite(measured.values_SBD[metric][s]).any(-1)
    return there
