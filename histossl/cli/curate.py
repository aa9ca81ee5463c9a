"""`histossl curate`: a subset of the tiles without copies, balanced, or like given examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from histossl.cli.options import ConfigOption, NamesOption, WorkspaceOption, above_0, workspace_of
from histossl.core import console
from histossl.core.config import CurateConfig, EmbedConfig
from histossl.core.errors import UsageError
from histossl.core.workspace import refuse_while_tiling

DEFAULTS = CurateConfig()
RANDOM_COSINE = 0.94  # at which random weights find 99.4 % of copies; 1.4 % of others have a neighbour (LOG.md)


def register(app: typer.Typer) -> None:
    app.command(
        epilog="Example: histossl curate --tiles 200000 --labels labels.csv\n\n"
        "Before any pretraining: histossl curate --backbone vit_small_patch16_224 --weights imagenet"
    )(curate)


def curate(
    name: Annotated[str, typer.Option(help="Name of the subset: its directory under WORKSPACE/subsets.")] = "curated",
    tiles: Annotated[
        int,
        typer.Option(
            help="Keep so many, balanced over kinds of tissue. Default: all but copies.",
            show_default=False,
            callback=above_0,
        ),
    ] = DEFAULTS.tiles,
    duplicate_cosine: Annotated[
        float, typer.Option(help="Tiles more alike than this are copies; the sheet shows pairs. 1: keep copies.")
    ] = DEFAULTS.duplicate_cosine,
    like_slides: Annotated[
        str,
        typer.Option(
            metavar="A,B,...",
            help="Retrieve the tiles most like those of these slides, from the others; with --labels from slides "
            "without a label. Their own tiles are kept too.",
            show_default=False,
        ),
    ] = "",
    like_classes: Annotated[
        str,
        typer.Option(
            metavar="A,B,...",
            help="Retrieve the tiles most like those of the training slides of these classes, from slides without a "
            "label; needs --labels. Their own tiles are kept too.",
            show_default=False,
        ),
    ] = "",
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv",
            help="labels.csv: patients marked `test` are left out of everything; with --like-..., nothing is "
            "retrieved from slides that have a label.",
        ),
    ] = None,
    exclude: Annotated[Path | None, typer.Option(metavar="FILE", help="Slides to leave out: one name a line.")] = None,
    backbone: Annotated[str, typer.Option(help="Embed with this timm model; with --weights.", show_default=False)] = "",
    weights: Annotated[
        str, typer.Option(metavar="FILE", help="Its weights: a file, imagenet or random.", show_default=False)
    ] = "",
    adapted: Annotated[
        str,
        typer.Option(
            metavar="RUN|FILE",
            help="Embed with this pretraining run. Default: the workspace's finished run.",
            show_default=False,
        ),
    ] = "",
    input_px: Annotated[
        int,
        typer.Option(
            help="Side at which tiles are embedded. Default: the backbone's own.", show_default=False, callback=above_0
        ),
    ] = 0,
    clusters: Annotated[
        str,
        typer.Option(
            metavar="N,N,...",
            help="Clusters of each level, finest first. Default: 4 times the root of the tiles, then quarters of it.",
            show_default=False,
        ),
    ] = "",
    seed: Annotated[int, typer.Option(help="Of clusters and of chance.")] = DEFAULTS.seed,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    embed_batch_size: Annotated[
        int,
        typer.Option(
            help="Tiles per forward pass. Default: 256 on a GPU, 64 without.", show_default=False, callback=above_0
        ),
    ] = 0,
    workers: Annotated[
        int, typer.Option(help="Threads that read and decode tiles. Default: 2.", show_default=False, callback=above_0)
    ] = 0,
    workspace: WorkspaceOption = None,
    names: NamesOption = None,
    config: ConfigOption = None,
) -> None:
    """Choose tiles to pretrain on: no near-duplicates, balanced over kinds of tissue, or most like given slides.

    Leaves a named subset (tile numbers, no pixels) for `pretrain --subset NAME`, and a sheet of examples to look at.
    """
    from histossl.curation.curate import curate as stage
    from histossl.curation.curate import embedder_for, example_slides
    from histossl.labels.exclusions import excluded_slides, slides_of_test_patients
    from histossl.tiles.store.index import TileIndex

    del config
    settings = CurateConfig(
        duplicate_cosine=duplicate_cosine,
        tiles=tiles,
        clusters=_numbers(clusters),
        like_slides=_listed(like_slides),
        like_classes=_listed(like_classes),
        seed=seed,
    )
    if weights == "random" and duplicate_cosine < RANDOM_COSINE:
        console.warn(
            f"--weights random: tell tiles apart less well than trained ones, and --duplicate-cosine "
            f"{duplicate_cosine:g} drops others with the copies; {RANDOM_COSINE:g} was right for them"
        )
    at = workspace_of(workspace, names)
    at.subset(name)  # refuses what is no name, before any work
    refuse_while_tiling(at)
    index = TileIndex.open(at)
    left_out = excluded_slides(exclude, index) | (slides_of_test_patients(labels, index) if labels else set())
    queries, labelled = example_slides(index, settings.like_slides, settings.like_classes, labels, left_out)
    settings = settings.with_slides(queries, labelled, left_out)
    embedder = embedder_for(at, backbone, weights, adapted, input_px, seed, device)
    stage(at, index, name, settings, embedder, EmbedConfig(embed_batch_size, workers, device))


def _listed(text: str) -> tuple[str, ...]:
    return tuple(piece.strip() for piece in text.split(",") if piece.strip())


def _numbers(text: str) -> tuple[int, ...]:
    pieces = _listed(text)
    if not all(piece.isdecimal() for piece in pieces):
        raise UsageError(f"--clusters {text}: must be whole numbers, finest first, like 1000,100,10")
    return tuple(int(piece) for piece in pieces)
