"""`histossl demo`: the whole road on painted slides, in a few minutes and without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from histossl.cli.options import ConfigOption
from histossl.core.errors import UsageError


def register(app: typer.Typer) -> None:
    app.command(
        epilog="Example: histossl demo\n\n"
        "Only an archive to try things on: histossl demo --only-paint my-archive --slides 24"
    )(demo)


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where slides, tiles, runs and the report go.")
    ] = Path("histossl-demo"),
    only_paint: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Only paint slides and labels.csv into DIR.", show_default=False),
    ] = None,
    slides: Annotated[int, typer.Option(help="How many slides: two a patient, three classes in turn.")] = 36,
    seed: Annotated[int, typer.Option(help="Of the slides, the training and the splits.")] = 0,
    steps: Annotated[int, typer.Option(help="Pretraining steps.")] = 800,
    weights: Annotated[
        str,
        typer.Option(help="Where pretraining starts: random (no download), imagenet (timm's cache or hub), or a file."),
    ] = "random",
    config: ConfigOption = None,
) -> int:
    """Paint a small archive and take it the whole road: scan, tile, pretrain, finetune, report.

    Needs no data, no internet and no GPU. The same command goes on where it was interrupted.
    """
    from histossl.demo.run import DemoConfig, paint_into, run_demo

    del config  # its values have become the defaults above
    if only_paint is None:
        came_of_it = run_demo(output, DemoConfig(slides, seed, steps, weights))
        return 128 + came_of_it if isinstance(came_of_it, int) else 0
    if only_paint.is_file():
        raise UsageError(f"--only-paint {only_paint}: is a file; name a folder")
    paint_into(only_paint, slides, seed)
    return 0
