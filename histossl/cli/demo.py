"""`histossl demo`: the full pipeline on painted slides, in a few minutes and without a download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import typer

from histossl.cli.from_config import OTHER, command
from histossl.core.config import DemoConfig
from histossl.core.errors import UsageError
from histossl.core.options import Checked, option


@dataclass(frozen=True)
class Where(Checked):
    output: Path = option(
        Path("histossl-demo"), "Where slides, tiles, runs and the report go.", metavar="DIR", flag="-o/--output"
    )
    only_paint: Path | None = option(None, "Only paint slides and labels.csv into DIR.", metavar="DIR")


def register(app: typer.Typer) -> None:
    command(
        app,
        group=OTHER,
        epilog="Example: histossl demo\n\n"
        "Only an archive to try things on: histossl demo --only-paint my-archive --slides 24",
    )(demo)


def demo(where: Where, config: DemoConfig) -> int:
    """Paint a small archive and run the full pipeline on it: scan, tile, pretrain, finetune, report.

    Needs no data, no internet and no GPU. The same command goes on where it was interrupted.
    """
    from histossl.demo.run import paint_into, run_demo

    if where.only_paint is None:
        came_of_it = run_demo(where.output, config)
        return 128 + came_of_it if isinstance(came_of_it, int) else 0
    if where.only_paint.is_file():
        raise UsageError(f"--only-paint {where.only_paint}: is a file; name a folder")
    paint_into(where.only_paint, config.slides, config.seed)
    return 0
