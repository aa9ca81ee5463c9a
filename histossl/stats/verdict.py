"""From predictions to the label-efficiency curve, and to what may be said from it.

Everything here is a function of `Measured` (resampling.py, which states how variances are estimated):

    summarise, area, compare   scores with their intervals, and two starts held against each other (intervals.py)
    labels_saved               how many slides the adapted start needs to reach the reference's score (saved.py)
    verdict                    all that in words, and what limits it
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from histossl.stats.bootstrap import Measured, estimate, measure, worth_of_sizes
from histossl.stats.confidence_intervals import (
    BOUNDED,
    LEVEL,
    VERDICT_P,
    Comparison,
    Difference,
    area,
    area_per_seed,
    area_weights,
    chance_level,
    compare,
    has_budget,
    holm,
    interval,
    one_cell,
    summarise,
    wilson,
)
from histossl.stats.labels_saved import Saved, labels_saved, most_telling, where_saved
from histossl.stats.tables import (
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
    "LEVEL",
    "VERDICT_P",
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
    "area_weights",
    "budget_of",
    "chance_level",
    "compare",
    "holm",
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
    "wilson",
    "worth_of_sizes",
    "write_points",
    "write_predictions",
    "write_summary",
]

ENOUGH_SEEDS = 4
FEWEST_DRAWN = 8  # patients, or sites where whole sites are left out, in all; and two in each class
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


NOT_ADAPTED = ("random", "imagenet", "colour")


def adapted_starts(names: Sequence[str]) -> list[str]:
    """Starts that somebody pretrained, the one called `adapted` first: what a verdict can be given on."""
    found = [name for name in dict.fromkeys(names) if name not in NOT_ADAPTED]
    return sorted(found, key=lambda name: name != "adapted")


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
    seen_beside: int = 0,
) -> Verdict:
    """Helped, hurt, or no measurable difference, with the evidence and its limits, for a reader who is no statistician.

    It rests on one test, of the area between the two curves over log2(budget), at p < 0.02; budgets are named only
    where they hold after Holm's correction. `seen_in_pretraining`: tested slides that the adapted backbone was shown,
    None where that is not known; `seen_beside`: those of them of which it was shown other slides of the patient only.
    """
    name = PLAIN_NAME.get(metric, metric)
    # Features of any two models may be compared; only what is held against one of these was adapted here.
    adaptation = reference in NOT_ADAPTED
    subject = "adaptation" if adaptation else f"{named(adapted)} in place of {named(reference)}"
    limits = _limits(measured, unit, seen_in_pretraining, site_statement, seen_beside)
    about_seeds = _about_seeds(measured, adapted, head) if adaptation else []
    limits[1:1] = _floors(measured, adapted, reference, metric, head) + about_seeds
    found = compare(measured, metric, adapted, reference, head)
    if lacking := too_few(measured):
        rare = _in_one(measured)
        why = f"{num_drawn(measured)} were tested"
        if rare:
            why += f", and {_classes(rare)} {'has one' if len(rare) == 1 else 'have one each'}"
        return Verdict(
            "too few sites" if lacking == "sites" else "too few patients",
            f"Too few {lacking} to say whether {subject} helped: {why}.",
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
    size = f"{signed(whole.value)} (95 % interval {signed(whole.low)} to {signed(whole.high)})"
    what = f"{name} {size} against {named(reference)}, {_span(measured, found, unit)}"
    sentences = []
    if decided:
        outcome: Outcome = "helped" if sign > 0 else "hurt"
        headline = f"{_first_upper(subject)} {outcome}: {what}."
    else:
        outcome = "no measurable difference"
        headline = f"{_first_upper(subject)} made no measurable difference: {what}."
        if whole.p < 1 - LEVEL:
            wished = "helped" if sign > 0 else "hurt"
            headline = f"A hint, but no proof, that {subject} {wished}: {what}."
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


def _span(measured: Measured, found: Comparison, unit: str) -> str:
    """The budgets that a difference of whole curves is about."""
    budgets = [row.budget for row in found.budgets if row.budget is not None]
    ends = [budgets[0], budgets[-1]]
    first, last = (
        f"all (about {in_slides(measured.slides[measured.budgets.index(end)])})"
        if end == ALL and measured.pool.slides
        else str(end)
        for end in ends
    )
    if len(budgets) == 1:
        return f"at a budget of {first} labelled {unit}{'' if first == '1' else 's'} per class"
    return f"on average over budgets from {first} to {last} labelled {unit}s per class"


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


def _clearly_above(found: Difference, metric: str) -> bool:
    better = found.value < 0 if metric in ("log_loss", "calibration_error") else found.value > 0
    return better and found.p < 1 - LEVEL


def _floors(measured: Measured, adapted: str, reference: str, metric: str, head: str | None) -> list[str]:
    """What the adapted start should clear, and does not: the colour floor, random weights, and guessing."""
    said = []
    if measured.has("colour", head):
        floor = compare(measured, metric, adapted, "colour", head).area
        higher = floor.value < 0 if metric in ("log_loss", "calibration_error") else floor.value > 0
        if not _clearly_above(floor, metric):
            level = signed(floor.value) == "0.00"
            ahead = "is level with" if level else "is not clearly above" if higher else "does not reach"
            said.append(
                f"{_first_upper(named(adapted))} {ahead} the colour floor ({signed(floor.value)}, 95 % interval "
                f"{signed(floor.low)} to {signed(floor.high)}): what it scores, staining alone may score too."
            )
    if reference != "random" and measured.has("random", head):
        floor = compare(measured, metric, adapted, "random", head).area
        if not _clearly_above(floor, metric):
            said.append(
                f"{_first_upper(named(adapted))} is not clearly above random weights ({signed(floor.value)}, 95 % "
                f"interval {signed(floor.low)} to {signed(floor.high)}), which have learnt nothing."
            )
    number = measured.number(adapted, head)
    last = int(np.flatnonzero(has_budget(measured, metric, number))[-1])
    found = estimate(measured, metric, one_cell(measured, number, last))
    score, (low, high) = found.value, interval(measured, metric, found)
    chance = chance_level(metric, sum(count > 0 for count in measured.patients_per_class.values()))
    if chance is not None and metric in BOUNDED and low <= chance:
        why = ""
        if too_few(measured):
            why = (
                f": {num_drawn(measured)} tested {measured.drawn}s say so little of others that its score of "
                f"{score:.2f} has a 95 % interval of {low:.2f} to {high:.2f}"
            )
        said.append(f"Even with the largest budget {named(adapted)} is not clearly better than guessing{why}.")
    return said


def fewest_drawn(measured: Measured) -> int:
    """Of the tested patients (or sites) of any class that is tested at all."""
    return min((count for count in drawn_per_class(measured).values() if count), default=0)


def _limits(
    measured: Measured,
    unit: str,
    seen_in_pretraining: int | None,
    site_statement: str,
    seen_beside: int,
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
            "nothing to tell it by, so an interval may be too narrow even where it looks wide."
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
        others = ", or others of their patients," if seen_beside else ""
        shown = f"{of_all}{others} were in the pretraining pool, without their labels"
        limits.append(f"{shown} (transductive). On slides from elsewhere the gain may be smaller.")
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
