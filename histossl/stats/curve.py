"""One finished curve: all that follows from its predictions, worked out once and kept together.

curve = curve_of(predictions, classes, pool)
print(curve)                    scores by budget, and the verdict
curve.to_csv("my-curve")        the tables that `histossl finetune` writes, and two more
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from histossl.core.text import write_csv
from histossl.stats import tables
from histossl.stats.bootstrap import Measured, Series, measure
from histossl.stats.confidence_intervals import Comparison, compare, summarise
from histossl.stats.labels_saved import Saved, labels_saved
from histossl.stats.tables import Point, Prediction, SummaryRow, in_budget_order
from histossl.stats.verdict import PLAIN_NAME, Verdict, adapted_starts, named, points_from, verdict

METRIC = "auroc"  # of the comparisons and the verdict
COMPARISON_COLUMNS = (
    *("start", "head", "reference", "reference_head", "metric", "budget"),
    *("difference", "low", "high", "p", "p_adjusted"),
)
SAVED_COLUMNS = (
    *("start", "head", "reference", "metric", "budget"),
    *("reference_slides", "score", "slides", "low", "high", "at_most", "reason"),
)


@dataclass(frozen=True)
class CurveResult:
    """Scores of every start, head and budget, and what they say of the starts. All rows are plain dataclasses."""

    classes: tuple[str, ...]
    predictions: tuple[Prediction, ...] = field(repr=False)
    points: tuple[Point, ...] = field(repr=False)  # a metric of one start, head, budget and draw
    summary: tuple[SummaryRow, ...] = field(repr=False)  # means over draws, with 95 % intervals
    reference: str | None  # the start that the others are compared with; None where there is none
    comparisons: tuple[Comparison, ...] = field(repr=False)  # AUROC of each other start and head, less the reference's
    saved: Mapping[Series, tuple[Saved, ...]] = field(repr=False)  # (start, head) -> labels saved, by budget
    verdicts: Mapping[str, Verdict] = field(repr=False)  # start -> verdict, by the first head; the main one first
    measured: Measured = field(repr=False, compare=False)  # for `compare`, `labels_saved` and the like in stats
    unit: str = "slide"  # what carries a label
    notes: tuple[str, ...] = ()  # what a person should know before trusting the curve

    @property
    def verdict(self) -> Verdict | None:
        return next(iter(self.verdicts.values()), None)

    @property
    def headline(self) -> str:
        """The verdict in a sentence, or why there is none."""
        if self.verdict is not None:
            return self.verdict.headline
        pretrained = adapted_starts([start for start, _ in self.measured.series])
        missing = f"nothing to compare {named(pretrained[0])} with" if pretrained else "no adapted start"
        return f"No verdict: {missing} was measured."

    def to_csv(self, folder: Path | str) -> Path:
        """points.csv, summary.csv, predictions.csv, comparisons.csv, labels_saved.csv; the folder is made."""
        folder = Path(folder)
        tables.write_points(folder / "points.csv", self.points)
        tables.write_summary(folder / "summary.csv", self.summary)
        tables.write_predictions(folder / "predictions.csv", self.predictions, self.classes)
        write_csv(folder / "comparisons.csv", COMPARISON_COLUMNS, self._comparison_rows())
        write_csv(folder / "labels_saved.csv", SAVED_COLUMNS, self._saved_rows())
        return folder

    def _comparison_rows(self) -> Iterable[Sequence[object]]:
        for one in self.comparisons:
            for row in (*one.budgets, one.area):
                budget = "area" if row.budget is None else row.budget
                values = (repr(value) for value in (row.value, row.low, row.high, row.p, row.p_adjusted))
                yield *one.start, *one.reference, one.metric, budget, *values

    def _saved_rows(self) -> Iterable[Sequence[object]]:
        for (start, head), rows in self.saved.items():
            for row in rows:
                found = ("" if value is None else repr(value) for value in (row.slides, row.low, row.high))
                reached = (row.reference_slides, row.score, *found, row.at_most, row.reason)
                yield start, head, self.reference, METRIC, row.budget, *reached

    def __str__(self) -> str:
        """Per head a table of AUROC with its interval, budgets down and starts across; the verdict below."""
        lines: list[str] = []
        for head in dict.fromkeys(head for _, head in self.measured.series):
            rows = [row for row in self.summary if (row.head, row.metric) == (head, METRIC)]
            starts = list(dict.fromkeys(row.start for row in rows))
            cells = {(row.start, row.budget): f"{row.mean:.3f} ({row.low:.2f}-{row.high:.2f})" for row in rows}
            width = max(19, *map(len, starts))
            lines.append(f"{PLAIN_NAME[METRIC]} by labelled {self.unit}s per class, head {head}")
            lines.append("  ".join([f"{self.unit + 's':>7}", *(f"{start:>{width}}" for start in starts)]))
            for budget in sorted({row.budget for row in rows}, key=in_budget_order):
                shown = (f"{cells.get((start, budget), ''):>{width}}" for start in starts)
                lines.append("  ".join([f"{budget!s:>7}", *shown]))
            lines.append("")
        found = [self.headline, *(self.verdict.sentences + self.verdict.limits if self.verdict else [])]
        return "\n".join([*lines, *(line for text in found for line in textwrap.wrap(text, 110))])


def curve_of(
    predictions: Sequence[Prediction],
    classes: Sequence[str],
    pool: Mapping[str, Any],
    *,
    unit: str = "slide",
    reference: str | None = None,
    seen: Mapping[str, int] | None = None,
    seen_beside: Mapping[str, int] | None = None,
    site_statement: str = "",
    notes: Sequence[str] = (),
) -> CurveResult:
    """`pool` is what `measure` asks of the labelled items that draws choose from (`pool_of`).

    `reference`: what other starts are compared with; None: imagenet or random, where measured. A verdict is given on
    each start that was pretrained for the purpose; where a reference is named, on each other start. `seen`: per start
    how many tested items its pretraining was shown, 0 where it is not named; None: not known. `seen_beside`: those of
    them of which it was shown other items of the patient only.
    """
    measured = measure(predictions, classes, **pool)
    starts = list(dict.fromkeys(start for start, _ in measured.series))
    judged = adapted_starts(starts)
    if reference is not None:  # of any models, but the colour floor is none
        judged = [name for name in starts if name not in (reference, "colour")]
    reference = reference or next((name for name in ("imagenet", "random") if measured.has(name)), None)
    others = [(start, head) for start, head in measured.series if reference is not None and start != reference]
    pairs = {(start, head): _reference_head(measured, str(reference), head) for start, head in others}
    return CurveResult(
        classes=tuple(classes),
        predictions=tuple(predictions),
        points=tuple(points_from(measured)),
        summary=tuple(summarise(measured)),
        reference=reference,
        comparisons=tuple(
            compare(measured, METRIC, start, str(reference), head, its_head)
            for (start, head), its_head in pairs.items()
        ),
        saved={
            (start, head): tuple(labels_saved(measured, METRIC, start, str(reference), head, its_head))
            for (start, head), its_head in pairs.items()
        },
        verdicts={
            name: verdict(
                measured,
                name,
                reference,
                METRIC,
                unit=unit,
                seen_in_pretraining=None if seen is None else seen.get(name, 0),
                site_statement=site_statement,
                seen_beside=(seen_beside or {}).get(name, 0),
            )
            for name in judged
            if reference is not None
        },
        measured=measured,
        unit=unit,
        notes=tuple(notes),
    )


def _reference_head(measured: Measured, reference: str, head: str) -> str:
    """The same head; of a start that was measured with another one alone, that."""
    heads = [one for start, one in measured.series if start == reference]
    return head if head in heads else heads[0]
