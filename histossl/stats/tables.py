"""The three small tables that a finetuning leaves, and how they are read and written.

    points.csv        one metric of one start, head, budget and draw
    predictions.csv   one slide never trained on, as predicted by one start, head, budget and draw
    summary.csv       a metric's mean over the draws, with its interval over patients

A budget counts labelled slides per class; "all" is everything the split leaves for training.
A draw is one random choice of the labelled slides, the same for every start. With folds, a draw's predictions
are pooled over its folds, so that every patient is tested once per draw, and `fold` says by which one;
with a fixed test set `fold` is None (an empty cell).

A start may be several pretraining runs with different seeds: `backbone` says which of them a row of points and
predictions is of (empty: the start has but one), and summary.csv counts them in `num_seeds`.

With whole sites left out (--group site), `site` names what stood on one side together; by patients it is empty.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from histossl.core.errors import StoreError
from histossl.core.text import CsvReader, write_csv
from histossl.core.text_files import separator_in

ALL = "all"
Budget = int | str  # labelled slides per class, or ALL
Row = dict[str, str]
T = TypeVar("T")
MEND = "run `histossl finetune` again"


# ---- what flows


@dataclass(frozen=True, slots=True)
class Point:
    start: str
    head: str
    budget: Budget
    draw: int
    fold: int | None
    metric: str
    value: float
    backbone: str = ""


@dataclass(frozen=True, slots=True)
class Prediction:
    """`probabilities` are in the order of the run's classes (the p_CLASS columns)."""

    start: str
    head: str
    budget: Budget
    draw: int
    fold: int | None
    slide: str
    patient: str
    label: str
    predicted: str
    probabilities: tuple[float, ...]
    backbone: str = ""
    site: str = ""


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """`low` and `high` bound the 95 % interval; both are nan where none can be given."""

    start: str
    head: str
    budget: Budget
    metric: str
    mean: float
    low: float
    high: float
    num_draws: int
    num_patients: int
    num_seeds: int = 1  # pretraining runs that the start is the mean of


# ---- the files

POINT_COLUMNS = ("start", "backbone", "head", "budget", "draw", "fold", "metric", "value")
PREDICTION_COLUMNS = (
    "start", "backbone", "head", "budget", "draw", "fold", "slide", "patient", "site", "label", "predicted"
)  # fmt: skip
SUMMARY_COLUMNS = ("start", "num_seeds", "head", "budget", "metric", "mean", "low", "high", "num_draws", "num_patients")
NOT_IN_OLD_FILES = ("backbone", "num_seeds", "site")  # curves of before there were these can still be reported


def write_points(path: Path, points: Iterable[Point]) -> None:
    rows = (
        (p.start, p.backbone, p.head, p.budget, p.draw, _cell(p.fold), p.metric, repr(float(p.value))) for p in points
    )
    write_csv(path, POINT_COLUMNS, rows)


def read_points(path: Path) -> list[Point]:
    def point(row: Row) -> Point:
        budget, fold = budget_of(row["budget"]), _fold_of(row["fold"])
        draw, value = int(row["draw"]), float(row["value"])
        return Point(row["start"], row["head"], budget, draw, fold, row["metric"], value, row.get("backbone", ""))

    return _read(path, POINT_COLUMNS, point)[0]


def write_predictions(path: Path, predictions: Iterable[Prediction], classes: Sequence[str]) -> None:
    rows = (
        (p.start, p.backbone, p.head, p.budget, p.draw, _cell(p.fold), p.slide, p.patient, p.site, p.label, p.predicted)
        + tuple(repr(float(share)) for share in p.probabilities)
        for p in predictions
    )
    write_csv(path, PREDICTION_COLUMNS + tuple(f"p_{name}" for name in classes), rows)


def read_predictions(path: Path) -> tuple[list[Prediction], list[str]]:
    """The rows, and the classes in the order of their probabilities."""

    def prediction(row: Row) -> Prediction:
        budget, fold = budget_of(row["budget"]), _fold_of(row["fold"])
        shares = tuple(float(value) for name, value in row.items() if name.startswith("p_"))
        return Prediction(
            row["start"],
            row["head"],
            budget,
            int(row["draw"]),
            fold,
            row["slide"],
            row["patient"],
            row["label"],
            row["predicted"],
            shares,
            row.get("backbone", ""),
            row.get("site", ""),
        )

    predictions, columns = _read(path, PREDICTION_COLUMNS, prediction)
    return predictions, [name[2:] for name in columns if name.startswith("p_")]


def write_summary(path: Path, summary: Iterable[SummaryRow]) -> None:
    rows = (
        (r.start, r.num_seeds, r.head, r.budget, r.metric)
        + (repr(float(r.mean)), repr(float(r.low)), repr(float(r.high)), r.num_draws, r.num_patients)
        for r in summary
    )
    write_csv(path, SUMMARY_COLUMNS, rows)


def read_summary(path: Path) -> list[SummaryRow]:
    def summary_row(row: Row) -> SummaryRow:
        mean, low, high = (float(row[name]) for name in ("mean", "low", "high"))
        counts = int(row["num_draws"]), int(row["num_patients"]), int(row.get("num_seeds", 1))
        return SummaryRow(row["start"], row["head"], budget_of(row["budget"]), row["metric"], mean, low, high, *counts)

    return _read(path, SUMMARY_COLUMNS, summary_row)[0]


def budget_of(text: str) -> Budget:
    return ALL if text == ALL else int(text)


def in_budget_order(budget: Budget) -> float:
    """A sort key: 1, 2, 4, ... and "all" last."""
    return float("inf") if isinstance(budget, str) else float(budget)


def _cell(fold: int | None) -> str:
    return "" if fold is None else str(fold)


def _fold_of(text: str) -> int | None:
    return int(text) if text else None


def _read(path: Path, columns: Sequence[str], make: Callable[[Row], T]) -> tuple[list[T], list[str]]:
    """The rows as `make` reads them, and the file's columns. Whatever is wrong names the file and its line."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = CsvReader(file, separator_in(file, ({*columns} - {*NOT_IN_OLD_FILES}).issubset))
            found = list(reader.fieldnames or [])
            missing = [name for name in columns if name not in found and name not in NOT_IN_OLD_FILES]
            if missing:
                raise StoreError(f"{path}: column {missing[0]!r} is missing; {MEND}")
            rows = []
            for row in reader:
                try:
                    if None in row or None in row.values():
                        raise ValueError(f"not {len(found)} cells")
                    rows.append(make(row))
                except ValueError as error:
                    raise StoreError(f"{path}, line {reader.line_num}: {error}; {MEND}") from error
            return rows, found
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise StoreError(f"{path}: cannot be read ({error}); {MEND}") from error
