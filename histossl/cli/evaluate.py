"""embed, finetune, predict, suggest: from a backbone and a few labelled slides to a curve, a model, and its use."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from histossl.cli.options import (
    ON_OFF,
    ConfigOption,
    MppCsvOption,
    NamesOption,
    SlidesOption,
    WorkspaceOption,
    above_0,
    workspace_of,
)
from histossl.core.config import EmbedConfig, FinetuneConfig, TuneConfig, nearest, with_overrides
from histossl.core.errors import UsageError

LabelsOption = Annotated[
    Path,
    typer.Option(
        "--labels",
        metavar="FILE.csv|DIR",
        help="Columns slide,label and, where known, patient, site, split (train or test); "
        "x,y,width,height (level-0 pixels) label regions instead of slides. Or a folder of QuPath GeoJSON files.",
        show_default=False,
    ),
]
StartsOption = Annotated[
    str,
    typer.Option(
        "--starts",
        metavar="A,B,...",
        help="What to compare: random, imagenet, adapted, colour (27 colour statistics, no network), a pretraining "
        "run, FILE or NAME=FILE (a backbone.safetensors), NAME=RUN+RUN+... (pretraining seeds as one start). "
        "Default: all of the first four that there are. finetune adds colour to any: it is the floor of every curve.",
        show_default=False,
    ),
]
BackboneOption = Annotated[
    str,
    typer.Option(
        "--backbone",
        metavar="NAME",
        help="timm name of the random and imagenet starts. Default: that of the adapted backbone.",
        show_default=False,
    ),
]
WeightsOption = Annotated[
    str,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="Weights of the imagenet start. Default: what the adapted backbone started from.",
        show_default=False,
    ),
]
AdaptedOption = Annotated[
    str,
    typer.Option(
        "--adapted",
        metavar="RUN|FILE,...",
        help="The adapted start: a pretraining run, or a backbone.safetensors; several, separated by commas, are seeds "
        "of one start: its curve is their mean, its band holds their spread. Default: the workspace's finished run.",
        show_default=False,
    ),
]
InputOption = Annotated[
    int,
    typer.Option(
        "--input-px",
        help="Side at which tiles are shown to every start. Default: the size that the adapted backbone learnt at.",
        show_default=False,
        callback=above_0,
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
EmbedBatchOption = Annotated[
    int,
    typer.Option(
        "--embed-batch-size",
        help="Tiles per forward pass. Default: 256 on a GPU, 64 without.",
        show_default=False,
        callback=above_0,
    ),
]
MAX_RESTARTS = 3  # of a process that dies: what is finished is in the journal

WorkersOption = Annotated[
    int,
    typer.Option(
        "--workers", help="Threads that read and decode tiles. Default: 2.", show_default=False, callback=above_0
    ),
]


def register(app: typer.Typer) -> None:
    app.command(
        epilog="Example: histossl finetune --labels labels.csv\n\n"
        "(check the labels only: histossl finetune --labels labels.csv --dry-run)"
    )(finetune)
    app.command(
        epilog="Example: histossl predict --model histossl-workspace/finetune/default/model --slides /data/new "
        "-w new-workspace"
    )(predict)
    app.command(epilog="Example: histossl suggest --labels labels.csv --number 10")(suggest)
    app.command(epilog="Example: histossl embed --start adapted\n\n(all slides: features and coords as HDF5)")(embed)


def predict(
    model: Annotated[
        Path,
        typer.Option(
            "--model", metavar="DIR", help="A model folder: WORKSPACE/finetune/NAME/model.", show_default=False
        ),
    ],
    slides: SlidesOption = None,
    name: Annotated[
        str, typer.Option("--name", help="Of these predictions: they go to WORKSPACE/predictions/NAME.")
    ] = "default",
    heatmaps: Annotated[
        bool,
        typer.Option(
            "--heatmaps/--no-heatmaps",
            rich_help_panel=ON_OFF,
            help="Draw a PNG and a GeoJSON for QuPath of each slide.",
        ),
    ] = True,
    slide_mpp: Annotated[
        float | None,
        typer.Option(
            "--slide-mpp", help="Microns per pixel of all slides here, over what they say.", show_default=False
        ),
    ] = None,
    mpp_csv: MppCsvOption = None,
    device: DeviceOption = "auto",
    embed_batch_size: EmbedBatchOption = 0,
    workers: WorkersOption = 0,
    workspace: WorkspaceOption = None,
    names: NamesOption = None,
    config: ConfigOption = None,
) -> None:
    """Use a finetuned model: class probabilities, heatmaps, and a warning where a slide looks like none known.

    A class that was never learnt may look like one that was: that cannot be noticed.

    Tiles what is not tiled yet, at the model's scale. Without --slides: every slide of the workspace.
    """
    from histossl.evaluation.predict import predict as stage

    del config
    if slides is not None and not slides.is_dir():
        raise UsageError(f"--slides {slides}: no such folder")
    if slide_mpp is not None and slides is None:
        raise UsageError(f"--slide-mpp {slide_mpp:g}: is of slides that are tiled here; add --slides DIR")
    if mpp_csv is not None and slides is None:
        raise UsageError(f"--mpp-csv {mpp_csv}: is of slides that are tiled here; add --slides DIR")
    settings = EmbedConfig(embed_batch_size, workers, device)
    stage(workspace_of(workspace, names), model, name, slides, settings, heatmaps, slide_mpp, mpp_csv)


def suggest(
    labels: LabelsOption,
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="How many slides to suggest.")] = 10,
    starts: StartsOption = "",
    backbone: BackboneOption = "",
    weights: WeightsOption = "",
    adapted: AdaptedOption = "",
    input_px: InputOption = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of the heads that are asked.")] = 0,
    device: DeviceOption = "auto",
    embed_batch_size: EmbedBatchOption = 0,
    workers: WorkersOption = 0,
    workspace: WorkspaceOption = None,
    names: NamesOption = None,
    config: ConfigOption = None,
) -> None:
    """Rank the slides without a label: which to label next, and why.

    A slide ranks high when it stands for many that nothing labelled resembles, and when heads trained on parts of the
    labels disagree about it. The list is also written to WORKSPACE/suggestions.csv.
    """
    from histossl.evaluation.suggest import suggest as stage

    del config
    settings = FinetuneConfig(
        labels=str(labels),
        starts=_listed(starts),
        backbone=backbone,
        weights=weights,
        adapted=adapted,
        input_px=input_px,
        mixed_patients=True,
        seed=seed,
    )
    stage(workspace_of(workspace, names), settings, number, EmbedConfig(embed_batch_size, workers, device))


def finetune(
    labels: LabelsOption,
    name: Annotated[
        str, typer.Option("--name", help="Name of this curve: its files go to WORKSPACE/finetune/NAME.")
    ] = "default",
    starts: StartsOption = "",
    backbone: BackboneOption = "",
    weights: WeightsOption = "",
    adapted: AdaptedOption = "",
    input_px: InputOption = 0,
    head: Annotated[
        str,
        typer.Option(
            "--head",
            help="mean (pooled features, logistic regression), knn, simpleshot (nearest class mean) "
            "or abmil (gated attention over tiles). Default: mean, and abmil with --train last or all.",
            show_default=False,
        ),
    ] = "",
    train: Annotated[
        str,
        typer.Option(
            "--train",
            help="What learns: head (on frozen features), last (with the last quarter of the backbone's blocks) "
            "or all (the whole backbone). The latter two take a GPU, or patience.",
        ),
    ] = "head",
    tune: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="With --train last or all: steps, lr, layer_decay, weight_decay, bags_per_step, tiles_per_bag, "
            "test_tiles. May be given several times.",
            show_default=False,
        ),
    ] = None,
    unit: Annotated[
        str,
        typer.Option(
            "--unit",
            help="What carries a label and is counted in budgets: slide, region or tile. "
            "Default: what the labels are of. tile: each tile of a labelled slide or region by itself.",
            show_default=False,
        ),
    ] = "",
    regions: Annotated[
        Path | None,
        typer.Option(
            "--regions",
            metavar="DIR",
            help="The labels are the annotations in this folder (QuPath GeoJSON); --labels gives patient, site, split.",
            show_default=False,
        ),
    ] = None,
    tiles_per_slide: Annotated[
        int | None,
        typer.Option(
            "--tiles-per-slide",
            help="With --unit tile: at most so many tiles of one slide and label. Default: 100.",
            show_default=False,
        ),
    ] = None,
    budgets: Annotated[
        str,
        typer.Option(
            "--budgets",
            metavar="1,2,4,...,all",
            help="Labelled slides per class. Default: doubling from 1 to what the smallest class has, and all.",
            show_default=False,
        ),
    ] = "",
    draws: Annotated[int, typer.Option("--draws", help="Random choices of the labelled slides at each budget.")] = 10,
    folds: Annotated[
        int,
        typer.Option(
            "--folds",
            help="Folds by patient where the labels have no split column. Default: up to 5, as patients allow.",
            show_default=False,
            callback=above_0,
        ),
    ] = 0,
    group: Annotated[
        str, typer.Option("--group", help="What must not be parted between training and test: patient or site.")
    ] = "patient",
    classes: Annotated[
        str,
        typer.Option("--classes", metavar="A,B,...", help="Only these labels. Default: all.", show_default=False),
    ] = "",
    mixed_patients: Annotated[
        bool, typer.Option("--mixed-patients", help="Allow patients with slides of several classes.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the splits, draws and heads.")] = 0,
    device: DeviceOption = "auto",
    embed_batch_size: EmbedBatchOption = 0,
    workers: WorkersOption = 0,
    gpus: Annotated[
        str,
        typer.Option(
            "--gpus",
            help="auto, or how many: embedding and the curve's trainings are shared out among them, with the same "
            "result. Without a GPU, so many CPU processes.",
        ),
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check labels and splits, then stop.")] = False,
    workspace: WorkspaceOption = None,
    names: NamesOption = None,
    config: ConfigOption = None,
) -> int:
    """Measure how many labelled slides each start needs: the label-efficiency curve, with its report.

    Patients never stand on both sides of a split. The same command goes on where it was interrupted.
    """
    from histossl.evaluation.finetune import finetune as stage
    from histossl.runtime.distributed import is_worker, launch, num_processes_for

    del config  # its values have become the defaults above
    if tune and train == "head":
        raise UsageError(f"--set {tune[0]}: is a setting of end-to-end training; add --train last or --train all")
    if tiles_per_slide is not None and unit != "tile":
        raise UsageError(f"--tiles-per-slide {tiles_per_slide}: counts tiles that carry labels; add --unit tile")
    for option, value in (("--embed-batch-size", embed_batch_size), ("--workers", workers)):
        if value and train != "head":
            raise UsageError(f"{option} {value}: is of embedding, which --train {train} does not do; leave it out")
    settings = FinetuneConfig(
        labels=str(labels),
        starts=_listed(starts),
        backbone=backbone,
        weights=weights,
        adapted=adapted,
        input_px=input_px,
        head=head,
        train=train,
        tune=with_overrides(TuneConfig(), tune or ()),
        unit=unit,
        regions=str(regions or ""),
        tiles_per_slide=100 if tiles_per_slide is None else tiles_per_slide,
        budgets=_budgets(budgets),
        draws=draws,
        folds=folds,
        group=group,
        classes=_listed(classes),
        mixed_patients=mixed_patients,
        seed=seed,
    )
    place = workspace_of(workspace, names)  # a mistyped name makes no folder
    num_processes = 1 if is_worker() or dry_run else num_processes_for(gpus if device == "auto" else "1")
    if device != "auto" and gpus not in ("auto", "1"):
        raise UsageError(f"--device {device} --gpus {gpus}: with several processes each takes its own GPU; drop one")
    if num_processes > 1:
        return launch(num_processes, sys.argv[1:], MAX_RESTARTS)
    stage(place, name, settings, EmbedConfig(embed_batch_size, workers, device), dry_run)
    return 0


def embed(
    start: Annotated[
        str,
        typer.Option(
            "--start", metavar="START", help="random, imagenet, adapted, colour, a pretraining run or a FILE."
        ),
    ] = "adapted",
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels", metavar="FILE.csv", help="Only the slides named here. Default: every slide.", show_default=False
        ),
    ] = None,
    backbone: BackboneOption = "",
    weights: WeightsOption = "",
    adapted: AdaptedOption = "",
    input_px: InputOption = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of the random start.")] = 0,
    device: DeviceOption = "auto",
    embed_batch_size: EmbedBatchOption = 0,
    workers: WorkersOption = 0,
    workspace: WorkspaceOption = None,
    names: NamesOption = None,
    config: ConfigOption = None,
) -> None:
    """Turn all tiles into features: WORKSPACE/embeddings/START-.../SLIDE.h5 with features (N, D) and coords (N, 2).

    Resumes slide by slide; files made from other weights or tiles are made anew.
    """
    from histossl.evaluation.finetune import embed_start

    del config
    settings = FinetuneConfig(
        labels=str(labels or ""),
        starts=(start,),
        backbone=backbone,
        weights=weights,
        adapted=adapted,
        input_px=input_px,
        seed=seed,
    )
    try:
        embed_start(workspace_of(workspace, names), settings, EmbedConfig(embed_batch_size, workers, device))
    except UsageError as error:  # of a curve's starts; here there is one
        raise UsageError(str(error).replace("--starts", "--start")) from error


def _listed(text: str) -> tuple[str, ...]:
    return tuple(piece.strip() for piece in text.split(",") if piece.strip())


def _budgets(text: str) -> tuple[int | str, ...]:
    found: list[int | str] = []
    for piece in _listed(text):
        if piece == "all":
            found.append(piece)
        elif piece.isdecimal() and int(piece) > 0:
            found.append(int(piece))
        else:
            raise UsageError(f"--budgets {piece}: must be numbers of 1 or more, or all{nearest(piece, ['all'])}")
    return tuple(found)
