"""Stage `finetune`: labelled slides and several starts in, a label-efficiency curve out.

    labels -> splits -> for each start: embed, train a head at every budget of every draw -> predictions -> curve

Each piece of work (a start, a draw, a fold, a budget) has its own seed and is written to a journal when it is done, so
a run that was killed goes on where it was, and one more start changes nothing about the others. Several processes share
the pieces (team.py), each with a part of the journal that the first one puts together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from histossl.core import console
from histossl.core.config import (
    EmbedConfig,
    FinetuneConfig,
    commands_with,
    plain,
    read_run,
    refuse_other_config,
    write_run,
)
from histossl.core.errors import LabelsError
from histossl.core.workspace import FinetuneDir, Workspace
from histossl.evaluation.journal import Journal, join_parts, key_of, part_of
from histossl.evaluation.label_efficiency import predictions_of, seed_of_fit, sites_of, split_facts
from histossl.evaluation.model_selection import comes_before, for_use, other_model, scored_higher
from histossl.evaluation.run_identity import (
    labelled_digest,
    refuse_other_architecture,
    refuse_other_runs,
    refuse_other_tiles,
    refuse_other_weights,
    rename_lone_run,
    take_up_lone_run,
)
from histossl.evaluation.site_confounding import check_site, warn_of_sites
from histossl.evaluation.work_sharing import Team, held_by, team_on
from histossl.features.extraction import COLOUR, Bags, Embedder, device_of, embed_slides, slide_tiles
from histossl.features.initialisations import Start, Starts, refuse_unloadable, resolve_starts, scale_notes, with_floor
from histossl.heads.learners import EndToEnd, Frozen, Learner, head_label, head_of
from histossl.heads.model_folder import ModelInfo, is_model_of, start_of_model
from histossl.labels import label_table as labelling
from histossl.labels.label_csv import read_rows
from histossl.labels.label_table import LabelTable
from histossl.labels.leakage import leak_statement, leaks_together
from histossl.labels.load_labels import labelled_items, show_labels, show_missing
from histossl.labels.slide_lookup import SlideNames
from histossl.labels.splits import Splits, make_splits, read_splits, seed_of, site_names, write_splits
from histossl.labels.training_slides import contents_of
from histossl.runtime.locks import refuse_while_tiling
from histossl.slides.ledger import read_ledger
from histossl.stats import tables
from histossl.stats import verdict as curves
from histossl.stats.curve import CurveResult, curve_of
from histossl.stats.tables import Prediction
from histossl.tiles.store.index import TileIndex

MAY_CHANGE = ("labels", "starts", "adapted", "weights", "backbone")  # labels and starts are held by their digests


@dataclass(frozen=True)
class Result:
    run: FinetuneDir
    table: LabelTable
    finished: bool  # False after a dry run, and of a process that only helps another


def finetune(
    workspace: Workspace,
    name: str,
    config: FinetuneConfig,
    embed: EmbedConfig = EmbedConfig(),
    dry_run: bool = False,
) -> Result:
    """The whole curve. Whatever can be wrong with the labels or the starts ends before the first tile is read."""
    with team_on(embed.device) as (team, device):
        refuse_while_tiling(workspace)
        index = TileIndex.open(workspace)
        table = labelled_items(workspace, index, config)
        show_labels(table, config.labels, every_missing=dry_run)
        run = workspace.finetune(name)
        if dry_run:  # which looks at these labels, whatever was done under this name before
            _show_splits(_splits(run, table, config, anew=True), table)
            asked_for = config.starts or config.adapted or config.weights or config.backbone
            if asked_for:  # by name; what there is to compare else may only be pretrained after this look
                resolve_starts(workspace, config)
            console.say(f"dry run: the labels{' and the starts' * bool(asked_for)} are in order, nothing was computed")
            return Result(run, table, False)
        with held_by(team, run):
            return _finetune(workspace, run, index, table, config, embed, team, device)


def _finetune(
    workspace: Workspace,
    run: FinetuneDir,
    index: TileIndex,
    table: LabelTable,
    config: FinetuneConfig,
    embed: EmbedConfig,
    team: Team,
    device: torch.device,
) -> Result:
    refuse_other_config(run.run_json, config, MAY_CHANGE)
    splits = _splits(run, table, config)
    _show_splits(splits, table)
    before = read_run(run.run_json) if run.run_json.exists() else {}
    starts = with_floor(resolve_starts(workspace, config))
    if not config.input_px and before.get("input_px"):  # a start that is added is shown what the others were
        starts = replace(starts, input_px=before["input_px"])
    starts = replace(starts, notes=(*starts.notes, *scale_notes(starts, index.mpp)))
    for skipped, why in starts.skipped.items():
        console.warn(f"start {skipped!r} is left out: {why}")
    for note in starts.notes:
        console.warn(note)
    refuse_unloadable(starts, config.seed)

    def embedder_of(start: Start) -> Embedder:
        return start.embedder(seed=config.seed, input_px=starts.input_px, tile_px=index.tile_px, device=device)

    measured_before = take_up_lone_run(run, before.get("starts", {}), starts, lambda start: embedder_of(start).digest)

    # ---- what the directory now belongs to
    facts = _facts(workspace, index, table, splits, starts, config)
    refuse_other_architecture(run, measured_before, starts)
    refuse_other_runs(run, measured_before, starts)
    refuse_other_tiles(run, before.get("tiles", {}), facts["tiles"])
    team.wait()  # all have read what was there
    if team.leads and not run.splits.exists():
        write_splits(run.splits, splits, table)
    if team.leads:
        rename_lone_run(run, before.get("starts", {}), measured_before)
    facts["starts"] = dict(measured_before)
    facts["pool_notes"] = list(dict.fromkeys([*before.get("pool_notes", []), *starts.notes]))
    facts["leak"] = leaks_together(before.get("leak", {}), facts["leak"])
    facts |= {what: before[what] for what in ("site", "site_statement") if what in before}
    facts["commands"] = commands_with(before)
    if team.leads:
        write_run(run.run_json, config, **facts)
    console.say(f"pretraining pool: {facts['leak']['statement']}")

    # ---- every start, one after the other
    learners: dict[str, Learner] = {}  # of a pooled start, its first run stands for it where one is needed
    asked_for: dict[str, list[dict[str, Any]]] = {}
    for start in starts.chosen:
        embedder = embedder_of(start)
        refuse_other_weights(run, start, embedder, measured_before)
        learner = _learner(workspace, index, start, embedder, table, splits, config, embed, starts.input_px, team)
        asked_for.setdefault(start.name, []).append(_start_facts(start, embedder))
        facts["starts"][start.name] = {**asked_for[start.name][0], "seeds": asked_for[start.name]}
        if team.leads:
            write_run(run.run_json, config, **facts)
        belongs_to = [embedder.digest, table.digest, head_label(config), facts["tiles"]["labelled_digest"]]
        _compute(run, start, belongs_to, learner, splits, config, team, table)
        learners.setdefault(start.name, learner)

    if not team.leads:
        return Result(run, table, False)

    # ---- from the journals to the tables and the curve
    predictions = list(_predictions(_complete(run, facts["starts"], splits), table, splits, config))
    tables.write_predictions(run.predictions, predictions, table.classes)
    in_order = for_use(facts["starts"])
    facts |= _site_facts(learners, table, in_order, before)
    leak = facts["leak"]
    curve = curve_of(
        predictions,
        table.classes,
        curves.pool_of(facts["split"]),
        unit=table.unit,
        seen=leak["seen"],
        seen_beside=leak.get("only_beside", {}),
        site_statement=facts["site_statement"],
    )
    curves.write_points(run.points, curve.points)
    curves.write_summary(run.summary, curve.summary)
    facts["verdict"] = _verdict_facts(curve)
    write_run(run.run_json, config, **facts)
    _save_model(run, learners, index, table, splits, starts, config, facts, in_order, curve.summary)
    _show_curve(curve.summary, facts["verdict"], table, splits.group)
    return Result(run, table, True)


def _learner(
    workspace: Workspace,
    index: TileIndex,
    start: Start,
    embedder: Embedder,
    table: LabelTable,
    splits: Splits,
    config: FinetuneConfig,
    embed: EmbedConfig,
    input_px: int,
    team: Team,
) -> Learner:
    if config.train == "head" or start.name == COLOUR:
        embed_slides(workspace, index, team.share(table.slides), embedder, embed)
        team.wait()
        files = embed_slides(workspace, index, table.slides, embedder, embed)
        bags = Bags([(files[item.slide], item.tiles) for item in table.items])
        return Frozen(start, bags, table, splits, config)
    return EndToEnd(start, index, table, splits, config, input_px, embedder.device)


def _save_model(
    run: FinetuneDir,
    learners: Mapping[str, Learner],
    index: TileIndex,
    table: LabelTable,
    splits: Splits,
    starts: Starts,
    config: FinetuneConfig,
    facts: Mapping[str, Any],
    in_order: Sequence[str],
    summary: Sequence[curves.SummaryRow],
) -> None:
    """One more fit, on everything labelled (a fixed test set stays out), of the start that is for use.

    The model of an earlier command's start stays where that comes first `in_order`.
    """
    name = next((name for name in in_order if name in learners), None)
    if name is None or comes_before(in_order, start_of_model(run.model), name):
        return
    items = np.arange(len(table.items)) if splits.num_folds else splits.parts[0].pool
    used = [table.items[item] for item in items]
    belongs_to = {
        "labels_digest": table.digest,
        "config": plain(asdict(config)),
        "slides": sorted({item.slide for item in used}),
        "contents": contents_of(index, sorted({item.slide for item in used})),
        "tested_slides": [] if splits.num_folds else sorted({table.items[item].slide for item in splits.tested}),
        "tiling": index.config,
        "start": facts["starts"][name],
    }
    info = ModelInfo(
        classes=table.classes,
        head="abmil" if config.train != "head" else config.head,
        unit=table.unit,
        start=name,
        mpp=index.mpp,
        tile_px=index.tile_px,
        input_px=starts.input_px,
        num_items=len(used),
        num_patients=len({item.patient for item in used}),
        provenance=belongs_to,
    )
    if is_model_of(run.model, info):
        return
    learners[name].fit(items, items, seed_of(config.seed, "model"))
    learners[name].save(run.model, items, info)
    of_run = facts["starts"][name].get("backbone")
    which = f"{name}, of its runs {of_run}" if of_run else name
    console.say(f"model for use: {run.model} ({which}, trained on {console.count(len(used), table.unit)})")
    better, how = scored_higher(summary, name)
    if better:
        console.warn(f"{how}; {other_model(better, config.starts)}")


def embed_start(workspace: Workspace, config: FinetuneConfig, embed: EmbedConfig = EmbedConfig()) -> Path:
    """Stage `embed`: one start's features of the labelled slides, or without labels of all; where they lie."""
    refuse_while_tiling(workspace)
    index = TileIndex.open(workspace)
    slides = list(index.slides)
    if config.labels:
        rows = read_rows(Path(config.labels))
        names = SlideNames.of(index)
        show_missing([(row.slide, names.hint(row.slide)) for row in rows if not names.find(row.slide)])
        slides = sorted({slide for row in rows for slide in names.find(row.slide)})
        if not slides:
            raise LabelsError(f"--labels {config.labels}: none of its slides has tiles in {workspace.tiles}")
    else:
        slides = [slide for slide in slides if len(slide_tiles(index, slide))]
    starts = resolve_starts(workspace, config)
    for start in starts.chosen:  # several, where pretraining seeds are pooled
        embedder = start.embedder(
            seed=config.seed, input_px=starts.input_px, tile_px=index.tile_px, device=device_of(embed.device)
        )
        embed_slides(workspace, index, slides, embedder, embed)
        folder = workspace.embeddings(embedder.folder)
        console.say(f"{console.count(len(slides), 'slide')}, {embedder.feature_dim} features a tile: {folder}")
    return folder


def _site_facts(
    learners: Mapping[str, Learner], table: LabelTable, in_order: Sequence[str], before: Mapping[str, Any]
) -> dict[str, Any]:
    """Whether site and label are entangled, by the frozen features of the start that is for use; {}: as told before."""
    name = next((name for name in in_order if isinstance(learners.get(name), Frozen)), None)
    if name is None or comes_before(in_order, before.get("site", {}).get("start", ""), name):
        return {}
    learner = learners[name]
    found = check_site(learner.bags.pooled, table) if isinstance(learner, Frozen) else None
    if found is None:
        return {"site_statement": ""}
    return {"site": {"start": name, **found.facts()}, "site_statement": found.statement}


def _verdict_facts(curve: CurveResult) -> dict[str, Any]:
    """The verdict on adapted (or whatever was pretrained) against what it started from, where both were measured."""
    if curve.verdict is None:
        return {"outcome": "none", "headline": curve.headline, "sentences": [], "limits": [], "reference": None}
    adapted, *others = curve.verdicts
    return {
        "outcome": curve.verdict.outcome,
        "headline": curve.headline,
        "sentences": curve.verdict.sentences,
        "limits": curve.verdict.limits,
        "adapted": adapted,
        "reference": curve.reference,
        "others": {name: curve.verdicts[name].headline for name in others},
    }


def _show_curve(
    summary: Sequence[curves.SummaryRow],
    verdict: Mapping[str, Any],
    table: LabelTable,
    group: str,
    metric: str = "auroc",
) -> None:
    """The curve as a table: one line per budget, one column per start, and what may be said of it."""
    rows = [row for row in summary if row.metric == metric]
    starts = list(dict.fromkeys(row.start for row in rows))
    cells = {(row.start, row.budget): f"{row.mean:.3f} ({row.low:.2f}-{row.high:.2f})" for row in rows}
    budgets = sorted({row.budget for row in rows}, key=tables.in_budget_order)
    console.table(
        f"{curves.PLAIN_NAME[metric]} on {group}s never trained on, by labelled {table.unit}s per class",
        [f"{table.unit}s", *starts],
        [[budget, *(cells.get((start, budget), "") for start in starts)] for budget in budgets],
        right=[f"{table.unit}s", *starts],
    )
    others = [f"{start}: {headline}" for start, headline in verdict.get("others", {}).items()]
    console.panel("verdict", [verdict["headline"], *verdict["sentences"], *others, *verdict["limits"]])


# ---- splits


def _splits(run: FinetuneDir, table: LabelTable, config: FinetuneConfig, anew: bool = False) -> Splits:
    if run.splits.exists() and not anew:
        return read_splits(run.splits, table)
    return make_splits(
        table,
        group="site" if config.group == "site" else "patient",
        budgets=config.budgets,
        num_draws=config.draws,
        num_folds=config.folds,
        seed=config.seed,
    )


def _show_splits(splits: Splits, table: LabelTable) -> None:
    num_draws = len({part.draw for part in splits.parts})
    how = f"{splits.num_folds} folds by {splits.group}" if splits.num_folds else "fixed test set of the split column"
    tested = f"{len({table.items[item].patient for item in splits.tested})} patients"
    if splits.group == "site":
        names = site_names(table)
        tested += f" of {len({names[item] for item in splits.tested})} sites"
    console.say(
        f"{num_draws} draws, {how}, {tested} tested; labelled {table.unit}s per class: "
        f"{', '.join(str(budget) for budget in splits.budgets)}"
    )
    for note in filter(None, [*splits.notes, warn_of_sites(table)]):
        console.warn(note)


# ---- one start


def _compute(
    run: FinetuneDir,
    start: Start,
    belongs_to: Sequence[str],
    learner: Learner,
    splits: Splits,
    config: FinetuneConfig,
    team: Team,
    table: LabelTable,
) -> None:
    """Train and test every head that the journal does not hold yet: this process its share of them."""
    path = run.journal(start.key)
    if team.leads:
        join_parts(path, belongs_to)
    team.wait()
    journal = Journal(path, belongs_to)
    work = [(part, budget) for part in splits.parts for budget in splits.budgets]
    todo = [(part, budget) for part, budget in work if key_of(part, budget) not in journal.done]
    if todo:
        own = journal if team.count == 1 else Journal(part_of(path, team.rank), belongs_to)
        with own, console.progress(f"heads on {start.key}", len(work), "heads") as bar:
            bar.advance(len(work) - len(todo))
            for part, budget in team.share(todo):
                learner.fit(part.taken(budget), part.pool, seed_of_fit(config.seed, config.head, table, part, budget))
                own.write(key_of(part, budget), learner.predict(np.array(part.test, dtype=np.int64)))
                bar.advance(min(team.count, bar.total - bar.done))  # the others are about as far
    team.wait()
    if team.leads:
        join_parts(path, belongs_to)


# ---- from journals to predictions


def _complete(run: FinetuneDir, starts: Mapping[str, Any], splits: Splits) -> dict[str, dict[str, Path]]:
    """Per start the journals of its runs, where all their work is done.

    A start of an earlier, unfinished command waits until it is asked for again.
    """
    wanted = {key_of(part, budget) for part in splits.parts for budget in splits.budgets}
    found = {}
    for start, facts in starts.items():
        backbones = [one.get("backbone", "") for one in facts.get("seeds", [{}])]
        journals = {one: run.journal(f"{start}+{one}" if one else start) for one in backbones}
        if all(path.exists() and wanted <= set(Journal.of(path).done) for path in journals.values()):
            found[start] = journals
    return found


def _predictions(
    starts: Mapping[str, Mapping[str, Path]], table: LabelTable, splits: Splits, config: FinetuneConfig
) -> Iterator[Prediction]:
    sites = sites_of(table, splits)
    for start, journals in starts.items():
        head = head_of(start, config)
        for backbone, path in journals.items():
            done = Journal.of(path).done
            for part in splits.parts:
                for budget in splits.budgets:
                    shares = done[key_of(part, budget)]
                    yield from predictions_of(start, head, table, sites, part, budget, shares, backbone)


# ---- what run.json remembers


def _start_facts(start: Start, embedder: Embedder) -> dict[str, Any]:
    return {
        "backbone": start.backbone,
        "digest": embedder.digest,
        "input_px": embedder.input_px,
        "feature_dim": embedder.feature_dim,
        "timm_name": start.timm_name,
        "source": start.source,
        "embeddings": embedder.folder,
        "provenance": {
            key: value
            for key, value in start.provenance.items()
            if key not in ("pretraining_slides", "excluded_slides", "teacher")
        },
    }


def _facts(
    workspace: Workspace, index: TileIndex, table: LabelTable, splits: Splits, starts: Starts, config: FinetuneConfig
) -> dict[str, Any]:
    columns, rows = labelling.overview(table)
    ledger = read_ledger(workspace.archive_csv, with_names=False)
    return {
        "classes": list(table.classes),
        "unit": table.unit,
        "head": head_label(config),
        "labels": {
            "file": config.labels,
            "digest": table.digest,
            "num_named": table.num_named,
            "num_items": len(table.items),
            "num_patients": len(table.patients),
            "missing": [list(pair) for pair in table.missing],
            "num_unlabelled": len(table.unlabelled),
            "patients_from": table.patients_from,
            "notes": list(table.notes),
            "table": {"columns": columns, "rows": rows},
        },
        "split": split_facts(table, splits),
        "leak": leak_statement(table, splits, starts.chosen, SlideNames.of(index), index),
        "skipped_starts": starts.skipped,
        "pool_notes": list(starts.notes),
        "input_px": starts.input_px,
        "tiles": {
            "digest": index.digest,
            "labelled_digest": labelled_digest(index, table),
            "num_tiles": len(index),
            "num_slides": len(index.slides),
            "tile_px": index.tile_px,
            "mpp": index.mpp,
        },
        "ledger": {
            "num_files": len(ledger),
            "skipped": [
                [row.file, row.tile_reason or row.reason] for row in ledger if not row.readable or row.num_tiles == 0
            ],
        },
        "site_statement": "",
        "sites": {item.slide: item.site for item in table.items if item.site},
        "region_tiles": {item.name: item.tiles.tolist() for item in table.items if item.tiles is not None}
        if table.unit == "region"
        else {},
    }
