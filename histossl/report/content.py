"""What a report is about, read from the files of a finetuning alone, and the figures' numbers worked out from it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix, roc_curve

from histossl.core.config import read_run
from histossl.core.errors import StoreError
from histossl.core.workspace import FinetuneDir, PretrainDir, Workspace
from histossl.evaluation.model_selection import scored_higher
from histossl.report import plots
from histossl.slides.ledger import LedgerRow, read_ledger
from histossl.stats import verdict
from histossl.stats.bootstrap import Measured, beside, measure
from histossl.stats.metrics import auroc, confidence_bins, unit_rows
from histossl.stats.verdict import Budget, Prediction, SummaryRow, in_budget_order
from histossl.training.monitoring.periodic_checks import Best, probe_verdict

Floats = NDArray[np.float64]
IN_THIS_ORDER = ("adapted", "imagenet", "random", "colour")


@dataclass(frozen=True)
class Content:
    run: FinetuneDir
    facts: dict[str, Any]  # run.json
    predictions: list[Prediction]
    classes: list[str]
    measured: Measured
    summary: list[SummaryRow]
    ledger: list[LedgerRow]
    pretrain_runs: list[PretrainDir]  # of every adapted start, that of the verdict first

    @property
    def pretrain(self) -> PretrainDir | None:
        return next(iter(self.pretrain_runs), None)

    @property
    def unit(self) -> str:
        return str(self.facts.get("unit", "slide"))

    @property
    def head(self) -> str:
        """Of the starts that have a network; the colour floor may have a simpler one."""
        heads = [head for start, head in self.measured.series if start != "colour"]
        return heads[0] if heads else self.measured.series[0][1]

    @property
    def starts(self) -> list[str]:
        """With the report's head; what was adapted first, the colour floor last."""
        names = [series[0] for series in self.measured.series if beside(series, self.head)]
        others = [name for name in names if name not in IN_THIS_ORDER]
        known = [name for name in IN_THIS_ORDER if name in names]
        return known[:1] + others + known[1:] if "adapted" in names else others + known

    @property
    def adapted(self) -> str | None:
        """The start that the report is about: `adapted`, else the first that is none of the known three."""
        return next(iter(verdict.adapted_starts(self.starts)), None)

    @property
    def all_adapted(self) -> list[str]:
        """Every start that somebody pretrained, the one of the verdict first."""
        return verdict.adapted_starts(self.starts)

    @property
    def reference(self) -> str | None:
        return next((name for name in ("imagenet", "random") if name in self.starts), None)

    @property
    def compared(self) -> list[str]:
        """The two starts that the detailed figures set side by side: before, after."""
        pair = [name for name in (self.reference, self.adapted) if name]
        return pair or self.starts[:1]

    @property
    def largest(self) -> Budget:
        return max(self.measured.budgets, key=in_budget_order)

    def higher_than(self, start: str) -> str:
        """Whether another start scored higher than the one of the saved model, in words; empty if none did."""
        return scored_higher(self.summary, start)[1]

    def at_largest(self, start: str) -> list[list[Prediction]]:
        """A start's predictions at the largest budget, a list per draw (and pretraining seed)."""
        by_draw: dict[tuple[int, str], list[Prediction]] = {}
        for one in self.predictions:
            if one.start == start and beside((start, one.head), self.head) and one.budget == self.largest:
                by_draw.setdefault((one.draw, one.backbone), []).append(one)
        return list(by_draw.values())


def read_content(run: FinetuneDir, workspace: Workspace) -> Content:
    if not run.predictions.exists():
        raise StoreError(f"{run.root} holds no predictions.csv: nothing to report yet; run histossl finetune first")
    facts = read_run(run.run_json, with_names=False) if run.run_json.exists() else {}
    predictions, classes = verdict.read_predictions(run.predictions)
    split = facts.get("split", {})
    measured = measure(predictions, classes, **verdict.pool_of(split))
    return Content(
        run=run,
        facts=facts,
        predictions=predictions,
        classes=classes,
        measured=measured,
        summary=verdict.summarise(measured),
        ledger=read_ledger(workspace.archive_csv, with_names=False),
        pretrain_runs=_pretraining_of(facts, workspace),
    )


def _pretraining_of(facts: Mapping[str, Any], workspace: Workspace) -> list[PretrainDir]:
    """The runs that made the adapted backbones, where their directories are to be found (workspaces get moved)."""
    starts = facts.get("starts", {})
    found: dict[Path, PretrainDir] = {}
    for name in verdict.adapted_starts(list(starts)):
        for one in starts[name].get("seeds") or [starts[name]]:
            source = Path(str(one.get("source", "")))
            if source.name != "backbone.safetensors":
                continue
            folder = source.parent.parent if source.parent.name in ("best", "healthy") else source.parent
            for run in (PretrainDir(folder), PretrainDir(workspace.pretrain_root / folder.name)):
                if run.log.exists():
                    found.setdefault(run.root, run)
                    break
    return list(found.values())


# ---- curves


def ticks(measured: Measured) -> dict[float, str]:
    """Places and names on the axis of budgets; "all" says how many that is."""
    named = {}
    for budget, slides in zip(measured.budgets, measured.slides, strict=True):
        known = measured.pool.slides is not None
        named[float(slides)] = (f"all ({slides:.0f})" if known else "all") if isinstance(budget, str) else str(budget)
    return named


def lines(content: Content, metric: str) -> list[plots.Line]:
    found = []
    for start in content.starts:
        rows = sorted(
            (
                row
                for row in content.summary
                if (row.start, row.metric) == (start, metric)
                and beside((start, row.head), content.head)
                and not math.isnan(row.mean)
            ),
            key=lambda row: in_budget_order(row.budget),
        )
        if rows:
            places = [float(content.measured.slides[content.measured.budgets.index(row.budget)]) for row in rows]
            table = np.array([[row.mean, row.low, row.high] for row in rows])
            there = [content.measured.budgets.index(row.budget) for row in rows]
            seeds = content.measured.seed_curves_MB(metric, content.measured.number(start, content.head))[:, there]
            drawn = list(seeds) if len(seeds) > 1 else []
            found.append(plots.Line(start, np.array(places), table[:, 0], table[:, 1], table[:, 2], drawn))
    return found


def saved_rows(saved: Sequence[verdict.Saved]) -> list[plots.SavedRow]:
    def place(slides: float | None) -> float:
        return math.inf if slides is None else slides

    return [
        plots.SavedRow(row.reference_slides, place(row.slides), place(row.low), place(row.high), row.at_most)
        for row in saved
        if not row.reason
    ]


# ---- errors at the largest budget


def confusion_tables(content: Content) -> dict[str, Floats]:
    """Counts (true, predicted), summed over draws."""
    tables = {}
    for start in content.compared:
        total = np.zeros((len(content.classes), len(content.classes)))
        for rows in content.at_largest(start):
            total += confusion_matrix(
                [row.label for row in rows], [row.predicted for row in rows], labels=content.classes
            )
        tables[start] = total
    return tables


def roc_curves(content: Content) -> dict[str, dict[str, tuple[Floats, Floats, float]]]:
    """Per class and start: the draws' curves averaged at equal false positive rates, and their mean area."""
    grid = np.linspace(0, 1, 201)
    found: dict[str, dict[str, tuple[Floats, Floats, float]]] = {}
    shown = content.classes[1:] if len(content.classes) == 2 else content.classes
    for number, label in enumerate(content.classes):
        if label not in shown:
            continue
        for start in content.compared:
            heights, areas = [], []
            for rows in content.at_largest(start):
                positive = np.array([row.label == label for row in rows])
                if not 0 < positive.sum() < len(positive):
                    continue
                shares = np.array([row.probabilities[number] for row in rows])
                false_rate, true_rate, _ = roc_curve(positive, shares)
                heights.append(np.interp(grid, false_rate, true_rate))
                both = np.stack([1 - shares, shares], 1)
                areas.append(auroc(positive.astype(np.int64), both))
            if heights:
                x, y = np.concatenate([[0.0], grid]), np.concatenate([[0.0], np.mean(heights, 0)])
                found.setdefault(label, {})[start] = (x, y, float(np.mean(areas)))
    return found


def calibration_bins(content: Content) -> dict[str, tuple[Floats, Floats]]:
    """Per start: mean confidence and share right in at most ten equally full bins, draws together."""
    found = {}
    for start in content.compared:
        rows = [row for draw in content.at_largest(start) for row in draw]
        if not rows:
            continue
        shares = unit_rows(np.array([row.probabilities for row in rows]))
        confidence = shares.max(1)
        right = np.array([row.label == content.classes[best] for row, best in zip(rows, shares.argmax(1), strict=True)])
        bins = confidence_bins(confidence)
        count = np.bincount(bins)
        found[start] = (np.bincount(bins, confidence) / count, np.bincount(bins, right) / count)
    return found


@dataclass(frozen=True)
class ClassRow:
    label: str
    slides: int
    patients: int
    found: dict[str, float]  # per start: share of this class's slides that were called so (recall)
    rightly: dict[str, float]  # per start: share of slides called so that are (precision); nan if none was
    area: dict[str, float]


RocCurves = dict[str, dict[str, tuple[Floats, Floats, float]]]


def class_rows(content: Content, tables: Mapping[str, Floats], areas: RocCurves) -> list[ClassRow]:
    one_draw = content.at_largest(content.compared[0])[0]
    rows = []
    for number, label in enumerate(content.classes):
        members = [row for row in one_draw if row.label == label]
        of_two = content.classes[1] if len(content.classes) == 2 else label  # both classes have one and the same area
        rows.append(
            ClassRow(
                label,
                len(members),
                len({row.patient for row in members}),
                {start: _share(table[number, number], table[number].sum()) for start, table in tables.items()},
                {start: _share(table[number, number], table[:, number].sum()) for start, table in tables.items()},
                {start: area for start, (_, _, area) in areas.get(of_two, {}).items()},
            )
        )
    return rows


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


# ---- pretraining

MONITORS = {
    "loss": "loss",
    "instance_accuracy": "instances told apart",
    "feature_std": "feature spread (0: collapse)",
    "effective_rank": "effective rank of features",
    "probe": "probe on labelled training slides",
    "moved": "distance from the first features",
    "lr": "learning rate",
    "teacher_entropy": "teacher entropy",
    "grad_norm": "gradient norm",
    "tiles_per_s": "tiles per second",
    "data_wait": "share of time spent waiting",
    "queue_slides": "slides in the queue",
}


def pretraining_log(run: PretrainDir) -> dict[str, tuple[Floats, Floats]]:
    """{key: (steps, values)} of log.jsonl. A step's last value counts."""
    found: dict[str, dict[int, float]] = {}
    for row in _log_rows(run):
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                found.setdefault(key, {})[row["step"]] = float(value)
    return {
        key: (np.array(sorted(values), dtype=np.float64), np.array([values[step] for step in sorted(values)]))
        for key, values in found.items()
    }


def pretraining_told(run: PretrainDir) -> list[str]:
    """What the run itself said of its backbone: whether the probe rose, and what its monitors warned of."""
    rows = list(_log_rows(run))
    best = Best()
    for row in rows:
        if isinstance(row.get("probe"), int | float):
            best = best.with_look(row["step"], row["probe"])
    last_step = max((row["step"] for row in rows), default=0)
    told = [f"{probe_verdict(best, last_step, run)}."] if best.num_looks else []
    warned: dict[str, list[int]] = {}
    for row in rows:
        if isinstance(row.get("warning"), str):
            warned.setdefault(row["warning"], []).append(row["step"])
    return told + [f"Step {', '.join(map(str, steps))}: {text}." for text, steps in warned.items()]


def _log_rows(run: PretrainDir) -> Iterator[dict[str, Any]]:
    """Lines cut off by a kill are passed over."""
    for line in run.log.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row
