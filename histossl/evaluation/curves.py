"""From predictions to the label-efficiency curve, and to what may be said from it.

Everything here is a function of `Measured` (resampling.py, which states how variances are estimated):

    summarise      mean over draws of each metric, start and budget, with 95 % intervals
    area           the mean height of a curve over log2(labelled slides per class)
    compare        two starts, paired by draw and by patient: difference and p at each budget (Holm) and of the area
    labels_saved   how many slides the adapted start needs to reach the reference's score
    verdict        all that in words, and what limits it

Intervals of scores between 0 and 1 are Wilson's, with the number of patients that the estimated variance stands for:
they stay inside [0, 1] and do not shrink to a point when every patient happens to be right. Differences have Student's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from histossl.evaluation.resampling import (
    Estimate,
    Floats,
    Measured,
    Series,
    estimate,
    measure,
    resampled_curves,
    worth_of_sizes,
)
from histossl.evaluation.tables import (
    ALL,
    Budget,
    Point,
    Prediction,
    SummaryRow,
    budget_of,
    in_budget_order,
    read_points,
    read_predictions,
    read_summary,
    write_points,
    write_predictions,
    write_summary,
)

__all__ = [
    "ALL",
    "Budget",
    "Comparison",
    "Difference",
    "Measured",
    "Point",
    "Prediction",
    "Saved",
    "SummaryRow",
    "Verdict",
    "adapted_starts",
    "area",
    "area_per_seed",
    "budget_of",
    "chance_level",
    "compare",
    "in_budget_order",
    "in_slides",
    "labels_saved",
    "measure",
    "most_telling",
    "points_from",
    "pool_of",
    "read_points",
    "read_predictions",
    "read_summary",
    "signed",
    "summarise",
    "too_few",
    "verdict",
    "where_saved",
    "worth_of_sizes",
    "write_points",
    "write_predictions",
    "write_summary",
]

LEVEL = 0.95
BOUNDED = ("auroc", "balanced_accuracy", "f1")
# A verdict is given at 1 in 50, not 1 in 20: where nothing changed it must say so in at least 95 of 100 archives.
VERDICT_P = 0.02
POWER = 0.8
FEWEST_DRAWN = 8  # patients, or sites where whole sites are left out, in all; and two in each class
ENOUGH_SEEDS = 4
PLAIN_NAME = {
    "auroc": "AUROC",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1",
    "log_loss": "log-loss",
    "calibration_error": "calibration error",
}


def pool_of(split: Mapping[str, Any]) -> dict[str, Any]:
    """What `measure` is told of the pool, as run.json remembers it under `split`."""
    return {name: split.get(name) for name in ("pool_per_class", "pool_patients_per_class", "pool_sites")}


# ---- means and intervals


def points_from(measured: Measured) -> list[Point]:
    """points.csv: every metric of every start, pretraining seed, budget and draw, over all tested patients."""
    return [
        Point(start, head, budget, draw, None, metric, float(value), backbone)
        for s, (start, head) in enumerate(measured.series)
        for m, backbone in enumerate(measured.backbones[s])
        for b, budget in enumerate(measured.budgets)
        for d, draw in enumerate(measured.draws)
        for metric, seeds_SMBD in measured.seeds_SMBD.items()
        if not math.isnan(value := seeds_SMBD[s][m, b, d])
    ]


def summarise(measured: Measured) -> list[SummaryRow]:
    rows = []
    for s, (start, head) in enumerate(measured.series):
        for b, budget in enumerate(measured.budgets):
            for metric, values_SBD in measured.values_SBD.items():
                num_draws = int(np.isfinite(values_SBD[s, b]).sum())
                if not num_draws:
                    continue
                found = estimate(measured, metric, _one(measured, s, b))
                low, high = interval(measured, metric, found)
                counts = num_draws, measured.num_patients, len(measured.backbones[s])
                rows.append(SummaryRow(start, head, budget, metric, found.value, low, high, *counts))
    return rows


def area(measured: Measured, metric: str, start: str, head: str | None = None) -> tuple[float, float, float]:
    """Mean height of the curve over log2 of the budget (trapezoids), with its interval."""
    weights_SB = np.zeros((len(measured.series), len(measured.budgets)))
    s = measured.number(start, head)
    weights_SB[s] = area_weights(measured.slides, _has_budget(measured, metric, s))
    found = estimate(measured, metric, weights_SB)
    return found.value, *interval(measured, metric, found)


def area_per_seed(measured: Measured, metric: str, start: str, head: str | None = None) -> dict[str, float]:
    """The same height for each of a start's pretraining seeds."""
    s = measured.number(start, head)
    weights_B = area_weights(measured.slides, _has_budget(measured, metric, s))
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

NOT_ADAPTED = ("random", "imagenet", "colour")


def adapted_starts(names: Sequence[str]) -> list[str]:
    """Starts that somebody pretrained, the one called `adapted` first: what a verdict can be given on."""
    found = [name for name in dict.fromkeys(names) if name not in NOT_ADAPTED]
    return sorted(found, key=lambda name: name != "adapted")


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
    both = _has_budget(measured, metric, a) & _has_budget(measured, metric, b)

    def contrast(weights_B: Floats) -> Estimate:
        weights_SB = np.zeros((len(measured.series), len(measured.budgets)))
        weights_SB[a] += weights_B
        weights_SB[b] -= weights_B
        # Scores move in steps of about one slide: half a step is never called a difference, however alike the draws.
        slides = full_patients(measured, metric) * measured.num_tested / measured.num_patients
        return estimate(measured, metric, weights_SB, (0.5 / slides) ** 2 if metric in BOUNDED else 0.0)

    def tested(budget: Budget | None, weights_B: Floats) -> tuple[Difference, float]:
        found = contrast(weights_B)
        se = math.sqrt(found.variance)
        t = float(stats.t.ppf(0.5 + LEVEL / 2, found.df))
        p = float(2 * stats.t.sf(abs(found.value) / se, found.df)) if se > 0 else float(found.value == 0)
        needed = float(stats.t.ppf(1 - VERDICT_P / 2, found.df) + stats.t.ppf(POWER, found.df)) * se
        return Difference(budget, found.value, found.value - t * se, found.value + t * se, p, p), needed

    rows = []
    for number in np.flatnonzero(both):
        weights_B = np.zeros(len(measured.budgets))
        weights_B[number] = 1
        rows.append(tested(measured.budgets[number], weights_B)[0])
    adjusted = holm([row.p for row in rows])
    rows = [
        Difference(row.budget, row.value, row.low, row.high, row.p, p) for row, p in zip(rows, adjusted, strict=True)
    ]
    whole, detectable = tested(None, area_weights(measured.slides, both))
    return Comparison(measured.series[a], measured.series[b], metric, rows, whole, detectable)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values: below 0.05 for any of them by chance alone in at most one table in twenty (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    largest = 0.0
    for rank, number in enumerate(order):
        largest = max(largest, min(1.0, p_values[number] * (len(p_values) - rank)))
        adjusted[number] = largest
    return [float(p) for p in adjusted]


# ---- labels saved


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
    the start's is read off between budgets, straight in log2(slides). The interval is the middle 95 % of resampled
    curves. Where the reference itself is not above chance there is nothing to save, and the row says so.
    """
    a, b = measured.number(start, head), measured.number(reference, reference_head or head)
    there = np.flatnonzero(_has_budget(measured, metric, a) & _has_budget(measured, metric, b))
    x_B = np.log2(measured.slides[there])
    curves_RSB = resampled_curves(measured, metric)[:, :, there]
    ours_B = rising(measured.mean_B(metric, a)[there])
    theirs_B = rising(measured.mean_B(metric, b)[there])
    ours_RB, theirs_RB = rising(curves_RSB[:, a]), rising(curves_RSB[:, b])
    chance = chance_level(metric, sum(count > 0 for count in measured.patients_per_class.values()))
    rows = []
    for number, column in enumerate(there):
        x = float(reached(x_B, ours_B[None], theirs_B[None, number])[0])
        x_R = reached(x_B, ours_RB, theirs_RB[:, number])
        low, high = np.quantile(x_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
        found = estimate(measured, metric, _one(measured, b, int(column)))
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
                _slides(float(low)),
                _slides(float(high)),
                at_most=bool(ours_B[0] >= theirs_B[number]),
                reason=reason,
            )
        )
    return rows


def rising(curves: Floats) -> Floats:
    """The nearest curve that never falls (isotonic regression, by its max-min formula), over the last axis."""
    num = curves.shape[-1]
    total = np.concatenate([np.zeros((*curves.shape[:-1], 1)), curves.cumsum(-1)], -1)
    best = np.full(curves.shape, -np.inf)
    for left in range(num):
        ahead = np.stack(
            [(total[..., right] - total[..., left]) / (right - left) for right in range(left + 1, num + 1)], -1
        )
        least = np.minimum.accumulate(ahead[..., ::-1], -1)[..., ::-1]
        best[..., left:] = np.maximum(best[..., left:], least)
    return best


def reached(x_B: Floats, curves_RB: Floats, targets_R: Floats) -> Floats:
    """The smallest x where each rising curve reaches its target, (R,): the first x if it starts above, inf if never."""
    above_RB = curves_RB >= targets_R[:, None] - 1e-12
    first_R = np.where(above_RB.any(1), above_RB.argmax(1), len(x_B))
    right = np.clip(first_R, 1, len(x_B) - 1) if len(x_B) > 1 else np.zeros_like(first_R)
    left = np.maximum(right - 1, 0)
    row = np.arange(len(curves_RB))
    rise = curves_RB[row, right] - curves_RB[row, left]
    share = np.clip(np.divide(targets_R - curves_RB[row, left], rise, out=np.ones_like(rise), where=rise > 0), 0, 1)
    between = x_B[left] + share * (x_B[right] - x_B[left])
    return np.where(first_R == 0, x_B[0], np.where(first_R == len(x_B), np.inf, between))


def _slides(x: float) -> float | None:
    return float(2**x) if math.isfinite(x) else None


# ---- in words

Outcome = Literal["helped", "no measurable difference", "hurt", "too few patients", "too few sites"]


@dataclass(frozen=True)
class Verdict:
    outcome: Outcome
    headline: str
    sentences: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    comparison: Comparison | None = None


def verdict(
    measured: Measured,
    adapted: str = "adapted",
    reference: str = "imagenet",
    metric: str = "auroc",
    head: str | None = None,
    unit: str = "slide",
    seen_in_pretraining: int | None = 0,
    site_statement: str = "",
) -> Verdict:
    """Helped, hurt, or no measurable difference, with the evidence and its limits, for a reader who is no statistician.

    It rests on one test, of the area between the two curves over log2(budget), at p < 0.02; budgets are named only
    where they hold after Holm's correction. `seen_in_pretraining`: tested slides that the adapted backbone was shown,
    None where that is not known.
    """
    name = PLAIN_NAME.get(metric, metric)
    limits = _limits(measured, unit, seen_in_pretraining, site_statement)
    limits[1:1] = _floors(measured, adapted, metric, head) + _about_seeds(measured, adapted, head)
    found = compare(measured, metric, adapted, reference, head)
    if lacking := too_few(measured):
        rare = _in_one(measured)
        why = f"{num_drawn(measured)} were tested"
        if rare:
            why += f", and {_classes(rare)} {'has one' if len(rare) == 1 else 'have one each'}"
        return Verdict(
            "too few sites" if lacking == "sites" else "too few patients",
            f"Too few {lacking} to say whether adaptation helped: {why}.",
            [
                f"At least {FEWEST_DRAWN} {lacking}, and two in each class, are needed to tell a difference from "
                "luck; with fewer no p is given."
            ],
            limits,
            found,
        )
    whole = found.area
    sign = 1 if whole.value > 0 else -1
    if metric in ("log_loss", "calibration_error"):
        sign = -sign
    decided = whole.p < VERDICT_P
    slides = measured.slides[[measured.budgets.index(row.budget) for row in found.budgets if row.budget is not None]]
    span = f"from {in_slides(slides.min())} to {in_slides(slides.max())} labelled {unit}s per class"
    size = f"{signed(whole.value)} (95 % interval {signed(whole.low)} to {signed(whole.high)})"
    sentences = []
    if decided:
        outcome: Outcome = "helped" if sign > 0 else "hurt"
        headline = f"Adaptation {outcome}: {name} {size}, on average over budgets {span}."
    else:
        outcome = "no measurable difference"
        headline = f"Adaptation made no measurable difference: {name} {size}, on average over budgets {span}."
        if whole.p < 1 - LEVEL:
            wished = "helped" if sign > 0 else "hurt"
            headline = f"A hint, but no proof, that adaptation {wished}: {name} {size}, on average over budgets {span}."
            sentences.append(
                f"Where nothing differs, about one archive in {round(1 / whole.p)} shows as much by chance; "
                f"a verdict asks for one in {round(1 / VERDICT_P)}."
            )
    clear = [row for row in found.budgets if row.p_adjusted < 1 - LEVEL and (row.value > 0) == (whole.value > 0)]
    if decided:
        sentences.append(_at_budgets(clear, len(found.budgets), unit, adapted, reference))
    else:
        equal = "" if whole.p < 1 - LEVEL else "This does not show that the two are equal: "
        sentences.append(
            f"{equal}with {num_drawn(measured)} {measured.drawn}s, a difference of about {found.detectable:.2f} is the "
            "smallest that would be found four times in five."
        )
        sentences[-1] = _first_upper(sentences[-1])
    if outcome == "helped":
        sentences += _saved_in_words(labels_saved(measured, metric, adapted, reference, head), unit, adapted, reference)
    return Verdict(outcome, headline, sentences, limits, found)


def too_few(measured: Measured) -> Literal["", "patients", "sites"]:
    """Of what there is too little to test anything: of a class with one patient (or site) no resample shows how another
    would have scored."""
    if num_drawn(measured) >= FEWEST_DRAWN and not _in_one(measured):
        return ""
    return "sites" if measured.drawn == "site" else "patients"


def num_drawn(measured: Measured) -> int:
    return measured.num_sites or measured.num_patients


def drawn_per_class(measured: Measured) -> dict[str, int]:
    return measured.sites_per_class or measured.patients_per_class


def _in_one(measured: Measured) -> list[str]:
    return [label for label, count in drawn_per_class(measured).items() if count == 1]


def _at_budgets(clear: Sequence[Difference], num_tests: int, unit: str, adapted: str, reference: str) -> str:
    if not clear:
        return "At no single budget is the difference clear by itself; it shows only over the whole curve."
    budgets = _listed([str(row.budget) for row in clear])
    sizes = sorted(abs(row.value) for row in clear)
    by = f"{sizes[0]:.2f}" if len(sizes) == 1 else f"{sizes[0]:.2f} to {sizes[-1]:.2f}"
    side = "above" if clear[0].value > 0 else "below"
    units = unit if str(clear[-1].budget) == "1" else f"{unit}s"
    return (
        f"At {budgets} {units} per class {named(adapted)} lies {side} {named(reference)} by {by}, "
        f"clear of chance after correction for {num_tests} comparisons."
    )


def _saved_in_words(rows: Sequence[Saved], unit: str, adapted: str, reference: str) -> list[str]:
    told = where_saved(rows)
    if not told:
        return []
    row = most_telling(told)
    assert row.slides is not None
    needs = f"{'at most ' if row.at_most else ''}{in_slides(row.slides)}"
    high = "not reached" if row.high is None else in_slides(row.high)
    low = "not reached" if row.low is None else in_slides(row.low)
    units = unit if in_slides(row.slides) == "1" else f"{unit}s"
    return [
        f"With {needs} labelled {units} per class {named(adapted)} reaches what {named(reference)} reaches with "
        f"{in_slides(row.reference_slides)} (95 % interval {low} to {high})."
    ]


def _floors(measured: Measured, adapted: str, metric: str, head: str | None) -> list[str]:
    """What the adapted start should clear, and does not: the colour floor, and guessing."""
    said = []
    if measured.has("colour", head):
        floor = compare(measured, metric, adapted, "colour", head).area
        higher = floor.value < 0 if metric in ("log_loss", "calibration_error") else floor.value > 0
        if not (higher and floor.p < 1 - LEVEL):
            ahead = "is not clearly above" if higher else "does not reach"
            said.append(
                f"{_first_upper(named(adapted))} {ahead} the colour floor ({signed(floor.value)}, 95 % interval "
                f"{signed(floor.low)} to {signed(floor.high)}): what it scores, staining alone may score too."
            )
    number = measured.number(adapted, head)
    last = int(np.flatnonzero(_has_budget(measured, metric, number))[-1])
    low, _ = interval(measured, metric, estimate(measured, metric, _one(measured, number, last)))
    chance = chance_level(metric, sum(count > 0 for count in measured.patients_per_class.values()))
    if chance is not None and metric in BOUNDED and low <= chance:
        said.append(f"Even with the largest budget {named(adapted)} is not clearly better than guessing.")
    return said


def where_saved(rows: Sequence[Saved]) -> list[Saved]:
    return [row for row in rows if not row.reason and row.slides is not None and row.slides < row.reference_slides]


def most_telling(rows: Sequence[Saved]) -> Saved:
    """The row to quote: the reference's largest budget whose score the start reaches inside its own curve."""
    return max(rows, key=lambda one: (not one.at_most, one.reference_slides))


def fewest_drawn(measured: Measured) -> int:
    """Of the tested patients (or sites) of any class that is tested at all."""
    return min((count for count in drawn_per_class(measured).values() if count), default=0)


def _limits(
    measured: Measured,
    unit: str,
    seen_in_pretraining: int | None,
    site_statement: str,
) -> list[str]:
    fewest = fewest_drawn(measured)
    per_class = drawn_per_class(measured)
    rare = [label for label, count in per_class.items() if count == fewest]
    if len(rare) == sum(count > 0 for count in per_class.values()):
        which = f"{fewest} of each class"
    else:
        which = f"{_classes(rare)} {'has' if len(rare) == 1 else 'have'} {fewest}{' each' * (len(rare) > 1)}"
    limits = [f"All of this rests on {measured.num_patients} tested patients; {which}."]
    if measured.drawn == "site":
        limits = [
            f"All of this rests on {measured.num_sites} tested sites with {measured.num_patients} patients; "
            f"{which.replace(' of each', ' with each')}. Intervals are about other sites, so more patients of these "
            "narrow them little."
        ]
        if measured.num_sites < FEWEST_DRAWN:
            limits.append(
                f"With fewer than {FEWEST_DRAWN} sites the intervals are too narrow: with 6 simulated ones they held "
                "the true value in 91 of 100."
            )
    if fewest == 1:
        others, each = (f"another {measured.drawn}", "") if len(rare) == 1 else (f"other {measured.drawn}s", "each ")
        limits.append(
            f"Every interval here leaves out how {_classes(rare)} would score with {others}: with one {each}there is "
            "nothing to tell it by, so the intervals are too narrow."
        )
    if len(measured.draws) == 1:
        limits.append(
            f"With one draw nothing shows how much hangs on which {unit}s were labelled: no interval here holds it. "
            "--draws 5 or more under another --name does."
        )
    if seen_in_pretraining is None:
        limits.append(
            "Whether tested slides were in the pretraining pool is not known. If they were, the gain on slides from "
            "elsewhere may be smaller."
        )
    elif seen_in_pretraining:
        of_all = f"{seen_in_pretraining} of {measured.num_tested} tested {unit}s"
        limits.append(
            f"{of_all} were in the pretraining pool, without their labels (transductive). "
            "On slides from elsewhere the gain may be smaller."
        )
    if site_statement:
        limits.append(site_statement)
    return limits


def _about_seeds(measured: Measured, adapted: str, head: str | None) -> list[str]:
    backbones = measured.backbones[measured.number(adapted, head)]
    if len(backbones) == 1:
        return [
            f"{_first_upper(named(adapted))} is one pretraining run: what is said is about this backbone. Another seed "
            "may come out differently; several runs can be pooled with --adapted RUN,RUN,RUN,RUN."
        ]
    few = "" if len(backbones) >= ENOUGH_SEEDS else f" That is few: {ENOUGH_SEEDS} or more tell a recipe from its luck."
    return [
        f"{_first_upper(named(adapted))} is the mean of {len(backbones)} pretraining seeds "
        f"({_listed(backbones)}); the spread between them is part of the intervals.{few}"
    ]


def named(start: str) -> str:
    """A start in a sentence."""
    words = {"imagenet": "the ImageNet start", "random": "the random start", "adapted": "the adapted start"}
    return words.get(start, start)


def _classes(labels: Sequence[str]) -> str:
    return f"class {labels[0]}" if len(labels) == 1 else f"classes {_listed(labels)}"


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def in_slides(value: float) -> str:
    """As words have it, 3, 3.5, 12: as exact as a count of slides can be meant."""
    return f"{value:.0f}" if value >= 10 or abs(value - round(value)) < 0.05 else f"{value:.1f}"


def signed(value: float) -> str:
    """+0.08, −0.03: a difference of scores."""
    text = f"{value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "−")  # noqa: RUF001


# ---- small helpers


def _one(measured: Measured, s: int, b: int) -> Floats:
    weights_SB = np.zeros((len(measured.series), len(measured.budgets)))
    weights_SB[s, b] = 1
    return weights_SB


def _has_budget(measured: Measured, metric: str, s: int) -> NDArray[np.bool_]:
    there: NDArray[np.bool_] = np.isfinite(measured.values_SBD[metric][s]).any(-1)
    return there
