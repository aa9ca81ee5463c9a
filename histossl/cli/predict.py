"""`histossl predict`: a saved model and slides in, one row per slide out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import typer

from histossl.cli.from_config import USE, command
from histossl.core.config import MPP_CSV_HELP, SLIDE_MPP_HELP, SLIDES_HELP, EmbedConfig
from histossl.core.errors import UsageError
from histossl.core.options import REQUIRED, Checked, between, option
from histossl.core.workspace import Workspace


@dataclass(frozen=True)
class What(Checked):
    model: Path = option(REQUIRED, "A model folder: WORKSPACE/finetune/NAME/model.", metavar="DIR")
    slides: Path | None = option(None, SLIDES_HELP, metavar="DIR")
    name: str = option("default", "Of these predictions: they go to WORKSPACE/predictions/NAME.")
    heatmaps: bool = option(True, "Draw a PNG and a GeoJSON for QuPath of each slide.")
    slide_mpp: float | None = option(None, SLIDE_MPP_HELP, check=between(0.05, 5, "0.05 to 5 microns per pixel"))
    mpp_csv: Path | None = option(None, MPP_CSV_HELP, metavar="FILE.csv")


def register(app: typer.Typer) -> None:
    command(
        app,
        group=USE,
        epilog="Example: histossl predict --model histossl-workspace/finetune/default/model --slides /data/new "
        "-w new-workspace",
    )(predict)


def predict(workspace: Workspace, what: What, embed: EmbedConfig) -> None:
    """Use a finetuned model: class probabilities, heatmaps, and a warning where a slide looks like none known.

    A class that was never in the labels may look like one that was: that cannot be noticed.

    Tiles what is not tiled yet, at the model's scale. Without --slides: every slide of the workspace.
    """
    from histossl.evaluation.predict import predict as stage

    if what.slides is not None and not what.slides.is_dir():
        raise UsageError(f"--slides {what.slides}: no such folder")
    if what.slide_mpp is not None and what.slides is None:
        raise UsageError(f"--slide-mpp {what.slide_mpp:g}: is of slides that are tiled here; add --slides DIR")
    if what.mpp_csv is not None and what.slides is None:
        raise UsageError(f"--mpp-csv {what.mpp_csv}: is of slides that are tiled here; add --slides DIR")
    stage(workspace, what.model, what.name, what.slides, embed, what.heatmaps, what.slide_mpp, what.mpp_csv)
