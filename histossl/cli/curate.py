"""`histossl curate`: a subset of the tiles without copies, balanced, or like given examples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import typer

from histossl.cli.from_config import TILES, command
from histossl.core import console
from histossl.core.config import ALLOW_MISSING_HELP, CurateConfig, EmbedConfig
from histossl.core.options import Checked, between, option
from histossl.core.workspace import Workspace
from histossl.runtime.locks import refuse_while_tiling

RANDOM_COSINE = 0.94  # at which random weights find 99.4 % of copies; 1.4 % of others have a neighbour (LOG.md)


@dataclass(frozen=True)
class What(Checked):
    name: str = option("curated", "Name of the subset: its directory under WORKSPACE/subsets.")
    labels: Path | None = option(
        None,
        "labels.csv: patients marked `test` are left out of everything; with --like-..., nothing is retrieved from "
        "slides that have a label.",
        metavar="FILE.csv",
    )
    allow_missing_test_slides: bool = option(False, ALLOW_MISSING_HELP)
    exclude: Path | None = option(None, "Slides to leave out: one name a line.", metavar="FILE")


@dataclass(frozen=True)
class EmbedWith(Checked):
    backbone: str = option("", "Embed with this timm model; with --weights.", "Backbone")
    weights: str = option("", "Its weights: a file, imagenet or random.", "Backbone", metavar="FILE")
    adapted: str = option(
        "",
        "Embed with this pretraining run.",
        "Backbone",
        metavar="RUN|FILE",
        unset="the workspace's finished run",
    )
    input_px: int = option(
        0,
        "Side at which tiles are embedded.",
        "Backbone",
        check=between(16, 1024, "a side of 16 to 1024 pixels"),
        unset="the backbone's own",
    )


def register(app: typer.Typer) -> None:
    command(
        app,
        group=TILES,
        epilog="Example: histossl curate --tiles 200000 --labels labels.csv\n\n"
        "Before any pretraining: histossl curate --backbone vit_small_patch16_224 --weights imagenet",
    )(curate)


def curate(workspace: Workspace, what: What, config: CurateConfig, embed_with: EmbedWith, how: EmbedConfig) -> None:
    """Choose tiles to pretrain on: no near-duplicates, balanced over kinds of tissue, or most like given slides.

    Leaves a named subset (tile numbers, no pixels) for `pretrain --subset NAME`, and a sheet of examples to look at.
    """
    from histossl.curation.curate import curate as stage
    from histossl.curation.curate import embedder_for, example_slides
    from histossl.labels.exclusions import excluded_slides, slides_of_test_patients
    from histossl.tiles.store.index import TileIndex

    if embed_with.weights == "random" and config.duplicate_cosine < RANDOM_COSINE:
        console.warn(
            f"--weights random: tell tiles apart less well than trained ones, and --duplicate-cosine "
            f"{config.duplicate_cosine:g} drops others with the copies; {RANDOM_COSINE:g} was right for them"
        )
    workspace.subset(what.name)  # refuses what is no name, before any work
    refuse_while_tiling(workspace)
    index = TileIndex.open(workspace)
    left_out = excluded_slides(what.exclude, index)
    left_out |= slides_of_test_patients(what.labels, index, what.allow_missing_test_slides) if what.labels else set()
    queries, labelled = example_slides(index, config.like_slides, config.like_classes, what.labels, left_out)
    config = config.with_slides(queries, labelled, left_out)
    of = embed_with
    embedder = embedder_for(workspace, of.backbone, of.weights, of.adapted, of.input_px, config.seed, how.device)
    stage(workspace, index, what.name, config, embedder, how)
