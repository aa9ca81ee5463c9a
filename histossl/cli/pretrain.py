"""`histossl pretrain` and `histossl plan`."""

from __future__ import annotations

import functools
import math
import os
import re
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histossl.cli.options import (
    ANONYMIZE_HELP,
    MPP_CSV_HELP,
    NAMES_HELP,
    ON_OFF,
    SLIDE_MPP_HELP,
    ConfigOption,
    SlidesOption,
    WorkspaceOption,
    above_0,
)
from histossl.cli.tile import tell_tiled
from histossl.core import console
from histossl.core.anonymous import is_anonymous, settle
from histossl.core.config import PretrainConfig, TileConfig
from histossl.core.errors import StoreError, UsageError
from histossl.methods import self_supervised

if TYPE_CHECKING:
    from histossl.core.workspace import Workspace
    from histossl.tiles.store.index import TileIndex
    from histossl.training.pretrain import Result
    from histossl.training.setup.run_options import Operation

DEFAULTS = PretrainConfig()
# Where the help lists an option. Those that a first run needs have no panel and come first.
DATA, METHOD, LENGTH, MACHINE, WATCHING = "Data", "Method", "Length and batch", "Machine", "Watching"


def register(app: typer.Typer) -> None:
    app.command(
        epilog="Example: histossl pretrain --slides /data/slides --backbone resnet50 --epochs 20\n\n"
        "Offline: histossl pretrain --slides /data/slides --weights resnet50.safetensors"
    )(pretrain)
    app.command("plan", epilog="Example: histossl plan --backbone vit_small_patch16_224 --gpus 4 --epochs 20")(plan)


def pretrain(
    slides: SlidesOption = None,
    workspace: WorkspaceOption = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv",
            help="labels.csv: patients marked `test` are left out, and the rest judge the run as it goes.",
        ),
    ] = None,
    backbone: Annotated[str, typer.Option(help="Any timm model.")] = DEFAULTS.backbone,
    weights: Annotated[
        str, typer.Option(help="Where to start: imagenet (timm's cache or the hub), random, or a weights file.")
    ] = DEFAULTS.weights,
    name: Annotated[
        str, typer.Option(help="Name of the run: its directory under WORKSPACE/pretrain. Default: the method.")
    ] = "",
    only_plan: Annotated[
        bool, typer.Option("--plan", help="Print what would be done, time a few steps, and stop.")
    ] = False,
    config: ConfigOption = None,
    exclude: Annotated[
        Path | None, typer.Option(metavar="FILE", rich_help_panel=DATA, help="Slides to leave out: one name a line.")
    ] = None,
    subset: Annotated[
        str,
        typer.Option(
            metavar="NAME", rich_help_panel=DATA, help="Only the tiles of this subset; `histossl curate` makes them."
        ),
    ] = DEFAULTS.subset,
    slide_balance: Annotated[
        float, typer.Option(rich_help_panel=DATA, help="0: every tile equally often; 1: every slide.")
    ] = DEFAULTS.slide_balance,
    tile_px: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=DATA, help="Side of the tiles in pixels. Default: as tiled, else 256.", show_default=False
        ),
    ] = None,
    mpp: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=DATA,
            help="Microns per pixel of the tiles. Default: as tiled, else 0.5.",
            show_default=False,
        ),
    ] = None,
    slide_mpp: Annotated[
        float | None,
        typer.Option(rich_help_panel=DATA, help=SLIDE_MPP_HELP, show_default=False),
    ] = None,
    mpp_csv: Annotated[
        Path | None,
        typer.Option(metavar="FILE.csv", rich_help_panel=DATA, help=MPP_CSV_HELP, show_default=False),
    ] = None,
    anonymize: Annotated[bool, typer.Option("--anonymize", rich_help_panel=DATA, help=ANONYMIZE_HELP)] = False,
    names: Annotated[
        Path | None,
        typer.Option("--names", metavar="FILE.csv", rich_help_panel=DATA, help=NAMES_HELP, show_default=False),
    ] = None,
    method: Annotated[
        str, typer.Option(rich_help_panel=METHOD, help="What the backbone learns from; see `histossl methods`.")
    ] = DEFAULTS.method,
    recipe: Annotated[
        str,
        typer.Option(
            rich_help_panel=METHOD, help="Augmentation recipe; see `histossl views`. Default: the method's, for tissue."
        ),
    ] = "",
    view_px: Annotated[
        int, typer.Option(rich_help_panel=METHOD, help="Side of the views in pixels.")
    ] = DEFAULTS.view_px,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", rich_help_panel=METHOD, help="A knob of the method; repeat as needed."
        ),
    ] = None,
    view_set: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            rich_help_panel=METHOD,
            help="A setting of every view, over the recipe's: jpeg_p=0.5, rotation_deg=20, scale=0.4,1.",
        ),
    ] = None,
    optimizer: Annotated[
        str,
        typer.Option(
            rich_help_panel=METHOD,
            help="sgd, adamw or lars. Default: the method's; mostly sgd with BatchNorm, else adamw.",
        ),
    ] = "",
    lr: Annotated[
        float,
        typer.Option(
            rich_help_panel=METHOD,
            help="Peak learning rate. Default: worked out from the batch.",
            show_default=False,
            callback=above_0,
        ),
    ] = 0.0,
    weight_decay: Annotated[
        float,
        typer.Option(rich_help_panel=METHOD, help="Default: the method's (histossl methods NAME).", show_default=False),
    ] = -1.0,
    layer_decay: Annotated[
        float,
        typer.Option(
            rich_help_panel=METHOD,
            help="Factor on the learning rate from block to block. Default: the method's with adamw, else 1.",
            show_default=False,
            callback=above_0,
        ),
    ] = 0.0,
    warmup: Annotated[
        float,
        typer.Option(
            rich_help_panel=METHOD,
            help="Share of the steps in which the learning rate rises. Default: the method's.",
            show_default=False,
        ),
    ] = DEFAULTS.warmup,
    final_lr: Annotated[
        float,
        typer.Option(
            rich_help_panel=METHOD,
            help="Share of the peak learning rate at the last step. Default: the method's.",
            show_default=False,
        ),
    ] = DEFAULTS.final_lr,
    clip_norm: Annotated[
        float, typer.Option(rich_help_panel=METHOD, help="Gradients longer than this are shortened to it.")
    ] = DEFAULTS.clip_norm,
    seed: Annotated[int, typer.Option(rich_help_panel=METHOD, help="Of tile order, views and heads.")] = DEFAULTS.seed,
    steps: Annotated[
        int,
        typer.Option(
            rich_help_panel=LENGTH,
            help="Length in optimizer steps. Default: worked out from the tiles.",
            show_default=False,
            callback=above_0,
        ),
    ] = 0,
    epochs: Annotated[
        float,
        typer.Option(
            rich_help_panel=LENGTH,
            help="Length in passes over the tiles, instead of --steps.",
            show_default=False,
            callback=above_0,
        ),
    ] = 0.0,
    hours: Annotated[
        float,
        typer.Option(
            rich_help_panel=LENGTH, help="Length in hours, instead of --steps.", show_default=False, callback=above_0
        ),
    ] = 0.0,
    batch_size: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            rich_help_panel=LENGTH,
            help="Tiles per optimizer step, over all GPUs. auto: by tiles and GPU memory.",
        ),
    ] = str(DEFAULTS.batch_size),
    gpus: Annotated[
        str,
        typer.Option(
            rich_help_panel=MACHINE, help="auto, or how many; on a machine without GPUs that many CPU processes."
        ),
    ] = "auto",
    accumulate: Annotated[
        int,
        typer.Option(
            rich_help_panel=MACHINE,
            help="Micro-batches per step. Default: as few as GPU memory allows.",
            show_default=False,
            callback=above_0,
        ),
    ] = 0,
    workers: Annotated[
        int,
        typer.Option(
            rich_help_panel=MACHINE,
            help="Threads that read and decode tiles, per GPU. 0: none.",
            min=-1,
            show_default=False,
        ),
    ] = -1,
    precision: Annotated[
        str,
        typer.Option(
            rich_help_panel=MACHINE, help="auto, fp32, bf16 or fp16. auto: bf16 or fp16 on a GPU, fp32 on a CPU."
        ),
    ] = "auto",
    decode_on_gpu: Annotated[
        bool,
        typer.Option(
            "--decode-on-gpu",
            rich_help_panel=MACHINE,
            help="Decode tiles on the GPU; `histossl bench views` says when it pays.",
        ),
    ] = False,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", rich_help_panel=MACHINE, help="Compile the networks: minutes at first, faster after."
        ),
    ] = False,
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute",
            rich_help_panel=MACHINE,
            help="Norms and GELU of a ViT twice, for less memory. By itself where a pass would not fit.",
        ),
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", rich_help_panel=MACHINE, help="The same bits every time; slower on GPUs.")
    ] = False,
    max_restarts: Annotated[
        int, typer.Option(min=0, rich_help_panel=MACHINE, help="How often a dead GPU process is replaced.")
    ] = 3,
    checkpoint_every: Annotated[
        str, typer.Option(rich_help_panel=WATCHING, help="Minutes (10m), hours (1h), seconds (90s), or steps (500).")
    ] = "10m",
    log_every: Annotated[
        int, typer.Option(min=1, rich_help_panel=WATCHING, help="Steps between two lines of log.jsonl.")
    ] = 10,
    monitor_every: Annotated[
        int, typer.Option(min=1, rich_help_panel=WATCHING, help="Steps between two looks at the features.")
    ] = 100,
    stop_on_collapse: Annotated[
        bool,
        typer.Option(
            rich_help_panel=ON_OFF, help="Stop when the features collapse, keeping the last healthy backbone."
        ),
    ] = True,
) -> int:
    """Continue self-supervised pretraining on slides (or on a workspace that is tiled already)."""
    from histossl.core.workspace import Workspace, refuse_while_tiling
    from histossl.evaluation.probe import probe_of
    from histossl.labels.exclusions import excluded_slides, labelled_slides, slides_of_test_patients, without
    from histossl.runtime.distributed import is_worker, launch, num_processes_for
    from histossl.runtime.launcher_messages import is_launched
    from histossl.tiles.store.index import TileIndex
    from histossl.training.plan import check, show_plan
    from histossl.training.pretrain import pretrain as run_pretrain
    from histossl.training.setup.run_options import Operation

    del config  # read before any other option, by its callback
    every_s, every_steps = _every(checkpoint_every)
    at = Workspace.at(workspace)  # made where tiles are cut into it: a mistyped name makes no folder
    if anonymize and slides is None and not is_anonymous(at):
        raise UsageError("--anonymize: names are hidden from when slides are tiled on; add --slides DIR, or drop it")
    if not anonymize or is_anonymous(at):
        settle(at, given=names)
    settings = PretrainConfig(
        method=method,
        backbone=backbone,
        weights=weights,
        steps=steps,
        epochs=epochs,
        hours=hours,
        batch_size=_batch(batch_size),
        view_px=view_px,
        recipe=recipe,
        optimizer=optimizer,
        lr=lr,
        weight_decay=weight_decay,
        layer_decay=layer_decay,
        warmup=warmup,
        final_lr=final_lr,
        clip_norm=clip_norm,
        slide_balance=slide_balance,
        seed=seed,
        set=tuple(set_ or ()),
        view_set=tuple(view_set or ()),
        subset=subset,
    )
    self_supervised(method)
    num_processes = 1 if is_worker() else num_processes_for(gpus)
    told_already = is_launched() or os.environ.get("RANK", "0") != "0"  # by the launcher, or by the first process
    if slides is not None and not slides.exists():
        raise UsageError(f"--slides {slides}: no such folder")
    if slides is not None and only_plan and not at.tiles.exists():
        raise StoreError(
            f"no tiles in {at.root} to plan with; cut them first with histossl tile --slides {slides} "
            f"(histossl scan {slides} says how many there will be)"
        )
    operation = Operation(
        num_workers=workers if workers >= 0 else _loader_threads(num_processes),
        precision=precision,
        micro_batches=accumulate,
        decode_on_gpu=decode_on_gpu,
        compiled=compiled,
        recompute=recompute,
        deterministic=deterministic,
        log_every=log_every,
        monitor_every=monitor_every,
        checkpoint_every_s=every_s,
        checkpoint_every_steps=every_steps,
        stop_on_collapse=stop_on_collapse,
    )
    run = at.pretrain(name or method)
    if slides is not None and not only_plan and not is_worker():
        if not run.run_json.exists():  # tiling takes hours
            _refuse_beforehand(settings, operation, at, labels, exclude)
        tile_for(at, slides, tile_px, mpp, slide_mpp, mpp_csv, anonymize, names)
    refuse_while_tiling(at)
    index = TileIndex.open(at)
    if slides is None:
        refuse_other_scale(index, tile_px, mpp, slide_mpp, mpp_csv)
    elif only_plan or (is_worker() and not is_launched()):
        by = "histossl plan" if only_plan else "a process of torchrun or SLURM"
        console.warn(f"--slides {slides}: {by} cuts no tiles; with the {len(index):,} that are in {at.root}")
    with console.muted(told_already):
        table = labelled_slides(labels, index) if labels else None
        left_out = excluded_slides(exclude, index) | (slides_of_test_patients(labels, index) if labels else set())
    settings = replace(settings, excluded_slides=tuple(left_out))
    with console.muted(told_already):
        judge = probe_of(index, without(table, left_out), view_px) if table else None
    if only_plan:
        show_plan(index, run, settings, operation, num_processes, judge)
        return 0
    if num_processes > 1:
        check(index, run, settings, operation, num_processes)
        return launch(num_processes, sys.argv[1:], max_restarts)
    result = run_pretrain(index, run, settings, operation, judge)
    if int(os.environ.get("RANK", "0")) == 0:
        console.panel("finished" if result.finished else "stopped", result.text.split("\n"))
        if result.finished:
            said = ["histossl", "finetune", "--labels", str(labels or "labels.csv")]
            said += [*(["--adapted", name] if name else []), *(["-w", str(workspace)] if workspace else [])]
            console.say(f"next: {shlex.join(said)}")
    return exit_code_of(result)


@functools.wraps(pretrain)
def plan(**options: Any) -> int:
    return pretrain(**{**options, "only_plan": True})


plan.__doc__ = "Print what `histossl pretrain` with the same options would do, how long it would take, and why."


def exit_code_of(result: Result) -> int:
    """A cluster that stops a run has been obeyed: 0. After Ctrl-C nothing that a person chained to it is to follow."""
    return 128 + signal.SIGINT if result.stopped_by == signal.SIGINT and not result.finished else 0


# ---- what the options say


def _refuse_beforehand(
    settings: PretrainConfig, operation: Operation, at: Workspace, labels: Path | None, exclude: Path | None
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


def tile_for(
    at: Workspace,
    slides: Path,
    tile_px: int | None,
    mpp: float | None,
    slide_mpp: float | None,
    mpp_csv: Path | None,
    anonymize: bool = False,
    names: Path | None = None,
) -> None:
    """Tile what is not tiled yet: with the settings given, else those of the tiles that are there, else defaults."""
    from histossl.tiles.tiling import stored_config, tile_archive

    config = stored_config(at) or TileConfig()
    config = config if tile_px is None else replace(config, tile_px=tile_px)
    config = config if mpp is None else replace(config, mpp=mpp)
    config = replace(config, anonymize=config.anonymize or anonymize)
    rows = tile_archive(slides, at, config, slide_mpp=slide_mpp, mpp_csv=mpp_csv, names_file=names)
    tell_tiled(rows, at, config.mpps)


def refuse_other_scale(
    index: TileIndex, tile_px: int | None, mpp: float | None, slide_mpp: float | None, mpp_csv: Path | None
) -> None:
    """Without --slides nothing is cut, so tiles cannot become what these options ask for."""
    for option, asked, stored in (("--tile-px", tile_px, index.tile_px), ("--mpp", mpp, index.mpp)):
        if asked is not None and asked != stored:
            raise UsageError(
                f"{option} {asked:g}: the tiles of this workspace have {stored:g}; others are cut with --slides DIR in "
                "another --workspace"
            )
    if slide_mpp is not None:
        raise UsageError(f"--slide-mpp {slide_mpp:g}: is for reading slides, and without --slides none is read")
    if mpp_csv is not None:
        raise UsageError(f"--mpp-csv {mpp_csv}: is for reading slides, and without --slides none is read")


def _loader_threads(num_processes: int) -> int:
    """Every core that this process may use, but one, shared among the processes of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    here = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
    # SLURM mostly binds each task to cores of its own, and a task that sees no others shares them with nobody.
    on_node = int(os.environ.get("SLURM_CPUS_ON_NODE", cores))
    return max(1, min(cores, on_node // here) - 1)


def _batch(text: str) -> int:
    """'auto' is 0: to be worked out."""
    if text == "auto":
        return 0
    if not text.isdigit() or int(text) < 2:
        raise UsageError(f"--batch-size {text}: must be auto, or 2 or more tiles")
    return int(text)


def _every(text: str) -> tuple[float, int]:
    """'10m', '1h', '90s' or a number of steps -> (seconds, steps)."""
    match = re.fullmatch(r"(\d+)\s*([smh]?)", text.strip())
    if not match or int(match[1]) == 0:
        raise UsageError(f"--checkpoint-every {text}: must be like 10m, 1h, 90s, or a number of steps")
    number, unit = int(match[1]), match[2]
    return (number * {"s": 1.0, "m": 60.0, "h": 3600.0}[unit], 0) if unit else (math.inf, number)
