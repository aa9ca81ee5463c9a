"""`histossl embed`: all tiles of slides through a backbone, as HDF5 files that MIL tools read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import typer

from histossl.cli.from_config import USE, command
from histossl.core.config import EmbedConfig, FinetuneConfig
from histossl.core.errors import UsageError
from histossl.core.options import Checked, option
from histossl.core.workspace import Workspace


@dataclass(frozen=True)
class What(Checked):
    start: str = option("adapted", "random, imagenet, adapted, colour, a pretraining run or a FILE.", metavar="START")
    labels: str = option("", "Only the slides named here.", metavar="FILE.csv", unset="every slide")


def register(app: typer.Typer) -> None:
    command(
        app,
        group=USE,
        epilog="Example: histossl embed --start adapted\n\n(all slides: features and coords as HDF5)",
        without=(
            *("starts", "budgets", "head", "train", "unit", "regions", "tiles_per_slide", "draws", "folds", "group"),
            *("classes", "mixed_patients"),
        ),
        change={"seed": {"help": "Of the random start.", "panel": ""}},
    )(embed)


def embed(workspace: Workspace, what: What, config: FinetuneConfig, how: EmbedConfig) -> None:
    """Turn all tiles into features: WORKSPACE/embeddings/START-.../SLIDE.h5 with features (N, D) and coords (N, 2).

    Resumes slide by slide; files made from other weights or tiles are made again.
    """
    from histossl.evaluation.finetune import embed_start

    try:
        embed_start(workspace, replace(config, labels=what.labels, starts=(what.start,)), how)
    except UsageError as error:  # of a curve's starts; here there is one
        raise UsageError(str(error).replace("--starts", "--start")) from error
