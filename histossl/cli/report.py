"""report: remake a curve's report from its files."""

from __future__ import annotations

from typing import Annotated

import typer

from histossl.cli.options import ConfigOption, NamesOption, WorkspaceOption, workspace_of
from histossl.core import console
from histossl.core.config import nearest
from histossl.core.errors import UsageError

MAPS = ("pca", "umap")


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: histossl report --name default\n\n(then open the report.html that it names)")(report)


def report(
    name: Annotated[
        str, typer.Option("--name", help="Name of the curve: its files lie in WORKSPACE/finetune/NAME.")
    ] = "default",
    map_: Annotated[
        str,
        typer.Option(
            "--map",
            metavar="pca|umap",
            help="The map of features: principal components, or a UMAP beside them (pip install 'histossl\\[umap]').",
        ),
    ] = "pca",
    workspace: WorkspaceOption = None,
    names: NamesOption = None,
    config: ConfigOption = None,
) -> None:
    """Remake report.html and the curve's pictures from the files of a finetuning, without computing anything anew."""
    from histossl.report.html import write_report

    del config  # its values have become the defaults above
    if map_ not in MAPS:
        raise UsageError(f"--map {map_}: must be one of {', '.join(MAPS)}{nearest(map_, MAPS)}")
    place = workspace_of(workspace, names)
    run = place.finetune(name)
    if not run.root.is_dir():
        known = sorted(path.name for path in place.finetune_root.glob("*") if path.is_dir())
        there = f"; there are: {', '.join(known)}" if known else "; run histossl finetune --labels labels.csv first"
        raise UsageError(f"--name {name}: no such curve in {place.finetune_root}{nearest(name, known)}{there}")
    console.say(str(write_report(run, place, with_umap=map_ == "umap")), to=console.answer)
