"""`histossl pretrain` and `histossl plan`."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from histossl.cli.from_config import PRETRAIN, command
from histossl.cli.tile import tell_tiled
from histossl.core import console
from histossl.core.anonymous import is_anonymous, settle
from histossl.core.config import LaunchConfig, PretrainConfig, PretrainData, RuntimeConfig, TileConfig
from histossl.core.errors import StoreError, UsageError
from histossl.core.options import option
from histossl.core.workspace import Workspace
from histossl.methods import self_supervised

if TYPE_CHECKING:
    from histossl.tiles.store.index import TileIndex
    from histossl.training.pretrain import Result


@dataclass(frozen=True)
class OnlyPlan:
    only_plan: bool = option(False, "Print what would be done, time a few steps, and stop.", flag="--plan")


def register(app: typer.Typer) -> None:
    command(
        app,
        group=PRETRAIN,
        epilog="Example: histossl pretrain --slides /data/slides --backbone resnet50 --epochs 20\n\n"
        "Offline: histossl pretrain --slides /data/slides --weights resnet50.safetensors",
    )(pretrain)
    command(
        app,
        group=PRETRAIN,
        epilog="Example: histossl plan --backbone vit_small_patch16_224 --gpus 4 --epochs 20",
    )(plan)


def pretrain(
    workspace: Workspace,
    data: PretrainData,
    config: PretrainConfig,
    runtime: RuntimeConfig,
    launching: LaunchConfig,
    only: OnlyPlan,
) -> int:
    """Continue self-supervised pretraining on slides (or on a workspace that is tiled already)."""
    from histossl.evaluation.probe import probe_of
    from histossl.labels.exclusions import excluded_slides, labelled_slides, slides_of_test_patients, without
    from histossl.runtime.distributed import is_worker, num_processes_for
    from histossl.runtime.launcher import launch
    from histossl.runtime.launcher_messages import is_launched
    from histossl.runtime.locks import refuse_while_tiling
    from histossl.tiles.store.index import TileIndex
    from histossl.training.plan import check, show_plan
    from histossl.training.pretrain import pretrain as run_pretrain

    if data.anonymize and data.slides is None and not is_anonymous(workspace):
        raise UsageError("--anonymize: names are hidden from when slides are tiled on; add --slides DIR, or drop it")
    if not data.anonymize or is_anonymous(workspace):
        settle(workspace, given=data.names)
    self_supervised(config.method)
    num_processes = 1 if is_worker() else num_processes_for(launching.gpus)
    told_already = is_launched() or os.environ.get("RANK", "0") != "0"  # by the launcher, or by the first process
    if data.slides is not None and not data.slides.exists():
        raise UsageError(f"--slides {data.slides}: no such folder")
    if data.slides is not None and only.only_plan and not workspace.tiles.exists():
        raise StoreError(
            f"no tiles in {workspace.root} to plan with; cut them first with histossl tile --slides {data.slides} "
            f"(histossl scan {data.slides} says how many there will be)"
        )
    run = workspace.pretrain(data.name or config.method)
    if data.slides is not None and not only.only_plan and not is_worker():
        if not run.run_json.exists():  # tiling takes hours
            _refuse_beforehand(config, runtime, workspace, data.labels, data.exclude)
        tile_for(workspace, data)
    refuse_while_tiling(workspace)
    index = TileIndex.open(workspace)
    if data.slides is None:
        refuse_other_scale(index, data)
    elif only.only_plan or (is_worker() and not is_launched()):
        by = "histossl plan" if only.only_plan else "a process of torchrun or SLURM"
        console.warn(
            f"--slides {data.slides}: {by} cuts no tiles; with the {len(index):,} that are in {workspace.root}"
        )
    with console.muted(told_already):
        table = labelled_slides(data.labels, index) if data.labels else None
        left_out = excluded_slides(data.exclude, index)
        allowed = data.allow_missing_test_slides
        left_out |= slides_of_test_patients(data.labels, index, allowed) if data.labels else set()
    config = replace(config, excluded_slides=tuple(left_out))
    with console.muted(told_already):
        judge = probe_of(index, without(table, left_out), config.view_px) if table else None
    if only.only_plan:
        show_plan(index, run, config, runtime, num_processes, judge)
        return 0
    if num_processes > 1:
        check(index, run, config, runtime, num_processes)
        return launch(num_processes, sys.argv[1:], launching.max_restarts)
    result = run_pretrain(index, run, config, runtime, judge)
    if int(os.environ.get("RANK", "0")) == 0:
        console.panel("finished" if result.finished else "stopped", result.text.split("\n"))
        if result.finished:
            said = ["histossl", "finetune", "--labels", str(data.labels or "labels.csv")]
            said += [*(["--adapted", data.name] if data.name else []), *named(workspace)]
            console.say(f"next: {shlex.join(said)}")
    return exit_code_of(result)


def plan(
    workspace: Workspace, data: PretrainData, config: PretrainConfig, runtime: RuntimeConfig, launching: LaunchConfig
) -> int:
    """Print what `histossl pretrain` with the same options would do, how long it would take, and why."""
    return pretrain(workspace, data, config, runtime, launching, OnlyPlan(True))


def named(workspace: Workspace) -> list[str]:
    """The words of a next command that say which workspace, where it is not the usual one."""
    usual = Workspace.at(None).root
    return [] if workspace.root == usual else ["-w", str(workspace.root)]


def exit_code_of(result: Result) -> int:
    """A cluster that stops a run has been obeyed: 0. After Ctrl-C nothing that a person chained to it is to follow."""
    return 128 + signal.SIGINT if result.stopped_by == signal.SIGINT and not result.finished else 0


# ---- what the options say


def _refuse_beforehand(
    settings: PretrainConfig, operation: RuntimeConfig, at: Workspace, labels: Path | None, exclude: Path | None
) -> None:
    """Mistakes that no tile is needed to see."""
    from histossl.labels.exclusions import read_exclusions
    from histossl.labels.label_csv import read_rows
    from histossl.training.setup.run import refuse_unknown

    refuse_unknown(settings, operation)
    with console.muted(True):  # it is read again, when its slides are known
        if labels:
            read_rows(labels, needs_label=False)
        read_exclusions(exclude)
    if settings.subset and not at.subset(settings.subset).tiles.exists():
        raise UsageError(f"--subset {settings.subset}: {at.subsets_root} holds no finished one of that name")


def tile_for(at: Workspace, data: PretrainData) -> None:
    """Tile what is not tiled yet: with the settings given, else those of the tiles that are there, else defaults."""
    from histossl.tiles.tiling import stored_config, tile_archive

    assert data.slides is not None
    config = stored_config(at) or TileConfig()
    config = config if data.tile_px is None else replace(config, tile_px=data.tile_px)
    config = config if data.mpp is None else replace(config, mpp=data.mpp)
    config = replace(config, anonymize=config.anonymize or data.anonymize)
    rows = tile_archive(data.slides, at, config, slide_mpp=data.slide_mpp, mpp_csv=data.mpp_csv, names_file=data.names)
    tell_tiled(rows, at, config.mpps)


def refuse_other_scale(index: TileIndex, data: PretrainData) -> None:
    """Without --slides nothing is cut, so tiles cannot become what these options ask for."""
    for name, asked, stored in (("--tile-px", data.tile_px, index.tile_px), ("--mpp", data.mpp, index.mpp)):
        if asked is not None and asked != stored:
            raise UsageError(
                f"{name} {asked:g}: the tiles of this workspace have {stored:g}; others are cut with --slides DIR in "
                "another --workspace"
            )
    if data.slide_mpp is not None:
        raise UsageError(f"--slide-mpp {data.slide_mpp:g}: is for reading slides, and without --slides none is read")
    if data.mpp_csv is not None:
        raise UsageError(f"--mpp-csv {data.mpp_csv}: is for reading slides, and without --slides none is read")
