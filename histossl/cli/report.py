"""`histossl report`: make a curve's report again from its files."""

from __future__ import annotations

from dataclasses import dataclass

import typer

from histossl.cli.from_config import EVALUATE, command
from histossl.core import console
from histossl.core.errors import UsageError
from histossl.core.options import Checked, nearest, one_of, option
from histossl.core.workspace import Workspace


@dataclass(frozen=True)
class What(Checked):
    name: str = option("default", "Name of the curve: its files lie in WORKSPACE/finetune/NAME.")
    map: str = option(
        "pca",
        "The map of features: principal components, or a UMAP next to them (pip install 'histossl\\[umap]').",
        metavar="pca|umap",
        check=one_of("pca", "umap"),
    )


def register(app: typer.Typer) -> None:
    command(
        app,
        group=EVALUATE,
        epilog="Example: histossl report --name default\n\n(then open the report.html that it names)",
    )(report)


def report(workspace: Workspace, what: What) -> None:
    """Make report.html and the curve's pictures again from the files of a finetuning, without computing anything."""
    from histossl.report.html import write_report

    run = workspace.finetune(what.name)
    if not run.root.is_dir():
        known = sorted(path.name for path in workspace.finetune_root.glob("*") if path.is_dir())
        there = f"; there are: {', '.join(known)}" if known else "; run histossl finetune --labels labels.csv first"
        raise UsageError(
            f"--name {what.name}: no such curve in {workspace.finetune_root}{nearest(what.name, known)}{there}"
        )
    console.say(str(write_report(run, workspace, with_umap=what.map == "umap")), to=console.answer)
