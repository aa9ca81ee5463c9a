"""report.html: one file that opens offline and prints, made from the files of a finetuning alone.

    histossl report                 remakes it, and the curve as PNG and SVG
    histossl report --map umap      the same with a UMAP beside the map of principal components

The verdict first, then the evidence, then what it was measured on and with. A section without data is left out, and
where a reader would miss it the page says why. Every name is escaped (jinja2's autoescape); there is no script in it.
"""

from __future__ import annotations

import datetime
import itertools
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from histossl import __version__
from histossl.core import text
from histossl.core.anonymous import HERE, is_anonymous
from histossl.core.config import noted_commands, read_run
from histossl.core.workspace import FinetuneDir, Workspace, written_aside
from histossl.report import content as contents
from histossl.report import plots
from histossl.report.content import Content, read_content
from histossl.report.features import Features, look_at_features
from histossl.stats import verdict as curves
from histossl.stats.bootstrap import beside
from histossl.stats.verdict import PLAIN_NAME, VERDICT_P, Comparison, in_budget_order

METRIC = "auroc"  # what the verdict and the first curve are about
BESIDE = ("balanced_accuracy", "log_loss")
MOST_LEDGER_ROWS = 200
SIMULATED_HEADS = ("mean", "simpleshot")  # logistic regression and the nearest mean
PLANNED = ("batch_size", "warmup_steps", "optimizer", "lr", "final_lr", "weight_decay", "layer_decay")
WORKED_OUT_AT_ZERO = ("input_px", "folds")


def write_report(run: FinetuneDir, workspace: Workspace, with_umap: bool = False) -> Path:
    """report.html, curve.svg and curve.png in the finetuning's directory. StoreError if there is nothing to report."""
    content = read_content(run, workspace)
    figure = _curve(content, METRIC)
    with written_aside(run.curve_svg) as aside:
        aside.write_text(_standalone(plots.svg(figure, "curve")), encoding="utf-8")
    with written_aside(run.curve_png) as aside:
        aside.write_bytes(plots.png(figure))
    page = render(content, look_at_features(content, workspace, with_umap))
    with written_aside(run.report) as aside:
        aside.write_text(page, encoding="utf-8")
    return run.report


def render(content: Content, features: Features | None = None) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("histossl.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_seen,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        score=_score,
        signed=curves.signed,
        named=curves.named,
        count=_count,
        percent=_percent,
        slides=_slides,
        shown=plots.shown,
    )
    environment.globals.update(plain_name=PLAIN_NAME, look=plots.look_of(content.starts), isnan=math.isnan)
    return environment.get_template("report.html.j2").render(
        **sections(content), features=features, feature_maps=_feature_maps(features)
    )


def sections(content: Content) -> dict[str, Any]:
    """Everything that the template shows, by name."""
    found = content.measured
    facts = content.facts
    verdict, saved, comparison = _verdict(content)
    tables, rocs = contents.confusion_tables(content), contents.roc_curves(content)
    return {
        "content": content,
        "facts": facts,
        "measured": found,
        "metric": METRIC,
        "verdict": verdict,
        "key_figures": key_figures(content, verdict, saved),
        "curve": _drawn(_curve(content, METRIC), "curve", "Label-efficiency curve"),
        "curves_beside": [
            (metric, _drawn(_curve(content, metric, (4.3, 3.2)), f"curve-{metric}", PLAIN_NAME[metric]))
            for metric in BESIDE
            if contents.lines(content, metric)
        ],
        "saved": saved,
        "saved_figures": _saved_figures(content),
        "seeds": _seeds(content),
        "comparison": comparison,
        "several_items": found.several_items,
        "simulated": simulated(content),
        "testable": not curves.too_few(found),
        "other_comparisons": _other_comparisons(content),
        "other_verdicts": _other_verdicts(content),
        "scores": _scores(content),
        "all_metrics": _all_metrics(content),
        "areas": {start: curves.area(found, METRIC, start, content.head) for start in content.starts},
        "confusion": _confusion_figure(content, tables),
        "roc": _drawn(plots.roc(rocs, content.unit), "roc", "ROC curves") if rocs else None,
        "calibration": _calibration_figure(content),
        "class_rows": contents.class_rows(content, tables, rocs),
        "pretraining": _pretraining_figure(content),
        "ledger": _ledger(content),
        "sources": _sources(content),
        "settings": _settings(facts.get("config", {})),
        "versions": {"histossl": facts.get("histossl", __version__), **facts.get("versions", {})},
        "commands": _commands(content),
        "remake": _remake(content),
        "measured_on": datetime.date.fromtimestamp(content.run.predictions.stat().st_mtime).isoformat(),
        "verdict_p": VERDICT_P,
        "level": f"{100 * curves.LEVEL:.0f} %",
    }


# ---- the verdict and what stands beside it


def _verdict(content: Content) -> tuple[curves.Verdict | None, list[curves.Saved], Comparison | None]:
    adapted, reference = content.adapted, content.reference
    if adapted is None or reference is None:
        return None, [], None
    leak = content.facts.get("leak", {})
    verdict = curves.verdict(
        content.measured,
        adapted,
        reference,
        METRIC,
        content.head,
        content.unit,
        leak.get("seen", {}).get(adapted, 0),
        str(content.facts.get("site_statement", "")),
        leak.get("only_beside", {}).get(adapted, 0),
    )
    if verdict.comparison is None:
        return verdict, [], None
    saved = curves.labels_saved(content.measured, METRIC, adapted, reference, content.head)
    return verdict, saved, verdict.comparison


def _other_verdicts(content: Content) -> dict[str, str]:
    """The headline of every further start that somebody pretrained."""
    if content.reference is None:
        return {}
    return {
        start: curves.verdict(content.measured, start, content.reference, METRIC, content.head, content.unit).headline
        for start in content.all_adapted[1:]
    }


def key_figures(
    content: Content, verdict: curves.Verdict | None, saved: Sequence[curves.Saved]
) -> list[tuple[str, str, str]]:
    """(what, figure, beneath it): the four numbers a reader takes away."""
    found = content.measured
    figures = []
    if verdict and verdict.comparison:
        whole = verdict.comparison.area
        figures.append(
            (
                f"difference in {PLAIN_NAME[METRIC]}",
                curves.signed(whole.value),
                f"95 % interval {curves.signed(whole.low)} to {curves.signed(whole.high)}",
            )
        )
        told = curves.where_saved(saved)
        if told and verdict.outcome == "helped":
            row = curves.most_telling(told)
            figures.append(
                (
                    f"labelled {content.unit}s per class needed",
                    f"{'≤ ' if row.at_most else ''}{_slides(row.slides)} instead of {_slides(row.reference_slides)}",
                    f"95 % interval {_slides(row.low)} to {_slides(row.high)}",
                )
            )
        elif not curves.too_few(found):
            figures.append(
                (
                    "smallest difference that would show",
                    f"{verdict.comparison.detectable:.2f}",
                    "found four times in five",
                )
            )
    rarest = f"rarest class: {curves.fewest_drawn(found)}"
    if found.drawn == "site":
        rarest = f"{found.num_patients} patients; {rarest} sites"
    figures.append((f"{found.drawn}s tested", str(curves.num_drawn(found)), rarest))
    folds = found.pool.num_folds
    figures.append(
        (
            f"draws of the labelled {content.unit}s",
            str(len(found.draws)),
            f"each tested in {folds} folds by {content.facts.get('split', {}).get('group', 'patient')}"
            if folds
            else "on a fixed test set",
        )
    )
    return figures


def _other_comparisons(content: Content) -> list[Comparison]:
    """Every other start against the reference, and the adapted one against the colour floor; p by Holm over these."""
    if content.reference is None:
        return []
    others = [name for name in content.starts if name not in (content.reference, content.adapted)]
    pairs = [(name, content.reference) for name in others]
    if content.adapted and "colour" in content.starts:
        pairs.append((content.adapted, "colour"))
    found = [curves.compare(content.measured, METRIC, start, other, content.head) for start, other in pairs]
    adjusted = curves.holm([one.area.p for one in found])
    return [replace(one, area=replace(one.area, p_adjusted=p)) for one, p in zip(found, adjusted, strict=True)]


def simulated(content: Content) -> list[str]:
    """In which cases the intervals were held against known truths (test_curves.py), and whether this is one of them."""
    found = content.measured
    said = [
        "In simulated archives, whose true values are known, 95 % intervals held them in 95 to 98 of 100, and where "
        "nothing differed the verdict said so in at least 95 of 100. Simulated were, in 200 archives of each kind, "
        "with patients of one class each: folds with one item per patient (2, 3 and 5 classes of 6 to 20 patients), a "
        "start of four pretraining runs, a fixed test set with one item per patient, and one with 20 items per "
        "patient, alike or not (with alike ones, wider than they need be); by nearest-mean heads, and by logistic "
        "regression with one item per patient."
    ]
    if found.pool.num_folds and found.several_items:
        said.append(f"Folds with several {content.unit}s per patient, as here, were simulated with 8 per patient only.")
    if found.drawn == "site":
        said.append(
            "Whole sites left out, as here, were simulated with 8 to 20 sites that differ in stain and in how far "
            "apart their classes lie, of one size and of unequal ones, with folds and with a fixed test set. Sites "
            "that send one class and not the others were not."
        )
    elif content.facts.get("split", {}).get("group") == "site":
        said.append(
            "Whole sites were left out here, but these predictions were made before they named the site: the intervals "
            "take patients for independent, and patients of one site share what makes it different, so the intervals "
            "are too narrow. The same `histossl finetune` again names the sites and computes nothing anew."
        )
    if sum(found.patients_per_class.values()) > found.num_patients:
        said.append("Patients who are in several classes, as here, were not simulated.")
    if content.head not in SIMULATED_HEADS:
        said.append(f"Heads like the one here ({content.head}) were not simulated.")
    return said


# ---- tables


def _scores(content: Content, metric: str = METRIC) -> list[tuple[str, list[curves.SummaryRow | None]]]:
    """Per budget a row of summaries, in the order of the starts."""
    by_cell = {
        (row.start, row.budget): row
        for row in content.summary
        if beside((row.start, row.head), content.head) and row.metric == metric and not math.isnan(row.mean)
    }
    names = contents.ticks(content.measured)
    return [
        (names[float(slides)], [by_cell.get((start, budget)) for start in content.starts])
        for budget, slides in zip(content.measured.budgets, content.measured.slides, strict=True)
    ]


def _all_metrics(content: Content) -> list[tuple[str, list[curves.SummaryRow | None]]]:
    """Per metric a row of summaries at the largest budget."""
    by_cell = {
        (row.metric, row.start): row
        for row in content.summary
        if beside((row.start, row.head), content.head) and row.budget == content.largest and not math.isnan(row.mean)
    }
    return [
        (PLAIN_NAME[metric], [by_cell.get((metric, start)) for start in content.starts])
        for metric in content.measured.values_SBD
    ]


def _ledger(content: Content) -> dict[str, Any] | None:
    if not content.ledger:
        return None
    skipped = [row for row in content.ledger if not row.readable or row.tile_status in ("no tiles", "failed")]
    warned = [row for row in content.ledger if row not in skipped and row.reason]
    rows = [(row.file, "not used", row.tile_reason or row.reason) for row in skipped]
    rows += [(row.file, "used, with a remark", row.reason) for row in warned]
    return {
        "num_files": len(content.ledger),
        "num_skipped": len(skipped),
        "num_tiles": sum(row.num_tiles or 0 for row in content.ledger),
        "rows": rows[:MOST_LEDGER_ROWS],
        "num_more": max(0, len(rows) - MOST_LEDGER_ROWS),
    }


def _settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was set; what was left to be worked out stands elsewhere on the page, as it came out."""
    shown = {name: value for name, value in config.items() if value not in (None, "", [], ())}
    if shown.get("train") == "head":
        shown.pop("tune", None)
    for name in WORKED_OUT_AT_ZERO:
        if shown.get(name) == 0:
            shown.pop(name)
    return [(name.replace("_", "-"), _plainly(value)) for name, value in shown.items()]


def _as_planned(run: Mapping[str, Any]) -> dict[str, Any]:
    """A pretraining run's settings, with what the planner made of those that were left to it."""
    asked, plan = dict(run.get("config", {})), run.get("plan", {})
    if plan:
        for name in ("epochs", "hours", "warmup", "final_lr", "set"):  # told by steps, warm-up steps, rates, knobs
            asked.pop(name, None)
        asked |= {name: plan[name] for name in PLANNED if name in plan}
        asked |= {"steps": plan.get("num_steps"), "knobs": run.get("knobs", {}) | plan.get("knobs", {})}
    return asked


def _plainly(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', '-')} {_plainly(one)}" for name, one in value.items())
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(_plainly, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _commands(content: Content) -> list[str]:
    """How each stage was called (every finetuning of this name, every run of a pooled start), and the page's own."""
    calls = noted_commands(_workspace_of(content).tile_commands)
    calls += [
        read_run(run.run_json, with_names=False).get("command", [])
        for run in content.pretrain_runs
        if run.run_json.exists()
    ]
    calls += _finetunings(content)
    commands = [*map(_command, calls), _remake(content)]
    return [command for command in dict.fromkeys(commands) if command]


def _finetunings(content: Content) -> list[list[str]]:
    """Every command that added to this curve: a start asked for later was measured by a command of its own."""
    return list(content.facts.get("commands") or [content.facts.get("command", [])])


def _remake(content: Content) -> str:
    given = next(filter(None, map(_workspace_given, reversed(_finetunings(content)))), None)
    workspace = _workspace_of(content)
    where = HERE if is_anonymous(workspace) else given or str(workspace.root)
    return shlex.join(["histossl", "report", "--name", content.run.root.name, "-w", where])


def _workspace_given(command: Sequence[str]) -> str | None:
    for word, following in itertools.pairwise([*command, ""]):
        if word in ("-w", "--workspace"):
            return following
        if word.startswith("--workspace="):
            return word.partition("=")[2]
    return None


def _workspace_of(content: Content) -> Workspace:
    return Workspace(content.run.root.parent.parent)


def _sources(content: Content) -> dict[str, list[str]]:
    """Where each start's weights came from; files of this workspace by their place in it."""
    workspace = _workspace_of(content).root.resolve()

    def place(source: str) -> str:
        path = Path(source)
        inside = path.is_absolute() and path.resolve().is_relative_to(workspace)
        return str(path.resolve().relative_to(workspace)) if inside else source

    return {
        start: [place(str(one.get("source") or "")) for one in facts.get("seeds") or [facts]]
        for start, facts in content.facts.get("starts", {}).items()
    }


def _command(arguments: Sequence[str]) -> str:
    if not arguments:
        return ""
    program = Path(arguments[0]).name
    called = ["histossl"] if program.startswith(("histossl", "__main__", "-")) else [program]
    return shlex.join([*called, *arguments[1:]])


# ---- figures


def _curve(content: Content, metric: str, size: tuple[float, float] = (7.4, 4.3)) -> Figure:
    classes = sum(count > 0 for count in content.measured.patients_per_class.values())
    return plots.curve(
        contents.lines(content, metric),
        contents.ticks(content.measured),
        PLAIN_NAME[metric] + (" (lower is better)" if metric == "log_loss" else ""),
        content.unit,
        curves.chance_level(metric, classes),
        size,
    )


def _saved_figures(content: Content) -> list[tuple[str, list[curves.Saved], Markup]]:
    """(start, rows, figure) of every start that somebody pretrained."""
    found = []
    for number, start in enumerate(content.all_adapted):
        if content.reference is None:
            continue
        saved = curves.labels_saved(content.measured, METRIC, start, content.reference, content.head)
        rows = contents.saved_rows(saved)
        if rows:
            figure = plots.saved(rows, contents.ticks(content.measured), start, content.reference, content.unit)
            name = "saved" if number == 0 else f"saved-{number}"
            found.append((start, saved, _drawn(figure, name, f"Labels saved by {plots.shown(start)}")))
    return found


def _seeds(content: Content) -> list[tuple[str, list[tuple[str, float, float | None]]]]:
    """Per pooled start: (run, height of its curve, difference from the reference's) of each pretraining run."""
    found = []
    for start in content.starts:
        heights = curves.area_per_seed(content.measured, METRIC, start, content.head)
        if len(heights) > 1:
            reference = content.reference
            beside = curves.area(content.measured, METRIC, reference, content.head)[0] if reference else None
            rows = [(run, height, None if beside is None else height - beside) for run, height in heights.items()]
            found.append((start, rows))
    return found


def _confusion_figure(content: Content, tables: Mapping[str, contents.Floats]) -> Markup | None:
    if not tables or len(content.classes) > 20:
        return None
    return _drawn(plots.confusion(tables, content.classes), "confusion", "Confusion matrices")


def _calibration_figure(content: Content) -> Markup | None:
    bins = contents.calibration_bins(content)
    return _drawn(plots.calibration(bins), "calibration", "Calibration") if bins else None


def _feature_maps(features: Features | None) -> dict[str, Markup]:
    if features is None or not features.starts:
        return {}
    found = {"": _drawn(plots.feature_map(features.places, features.colourings), "features", "Map of features")}
    if features.umap_places:
        figure = plots.feature_map(features.umap_places, features.colourings)
        found["-umap"] = _drawn(figure, "features-umap", "UMAP of features")
    return found


def _pretraining_figure(content: Content) -> dict[str, Any] | None:
    if content.pretrain is None:
        return None
    log = contents.pretraining_log(content.pretrain)
    shown = {
        key: title for key, title in contents.MONITORS.items() if key in log and np.isfinite(log[key][1]).sum() > 1
    }
    if not shown:
        return None
    run = read_run(content.pretrain.run_json, with_names=False) if content.pretrain.run_json.exists() else {}
    return {
        "name": content.pretrain.root.name,
        "others": [run.root.name for run in content.pretrain_runs if run.root != content.pretrain.root],
        "figure": _drawn(plots.pretraining(log, shown), "pretraining", "Pretraining"),
        "told": [(run.root.name, contents.pretraining_told(run)) for run in content.pretrain_runs],
        "config": _settings(_as_planned(run)),
        "steps": int(max(steps[-1] for steps, _ in log.values() if len(steps))),
    }


def _seen(value: object) -> object:
    """Whatever the page shows: names with characters that are not seen, or that turn the text about them."""
    return text.shown(value, lines=True) if isinstance(value, str) and not isinstance(value, Markup) else value


def _drawn(figure: Figure, name: str, title: str) -> Markup:
    # matplotlib escapes the names that it writes as text; test_names_are_escaped holds it to that.
    return Markup(plots.svg(figure, name, title))


def _standalone(svg: str) -> str:
    return '<?xml version="1.0" encoding="utf-8"?>\n' + svg + "\n"


# ---- numbers as they are read


def _score(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"  # noqa: RUF001


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.0f}"  # noqa: RUF001


def _count(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _slides(value: float | None) -> str:
    return "not reached" if value is None or math.isinf(value) else curves.in_slides(value)


__all__ = ["in_budget_order", "read_content", "render", "write_report"]
