"""`histossl suggest`: which unlabelled slides to label next."""

from __future__ import annotations

from dataclasses import dataclass, replace

import typer

from histossl.cli.from_config import EVALUATE, command
from histossl.core.config import EmbedConfig, FinetuneConfig
from histossl.core.options import Checked, between, option
from histossl.core.workspace import Workspace


@dataclass(frozen=True)
class HowMany(Checked):
    number: int = option(10, "How many slides to suggest.", flag="-n/--number", check=between(1, 10**9, "1 or more"))


def register(app: typer.Typer) -> None:
    command(
        app,
        group=EVALUATE,
        epilog="Example: histossl suggest --labels labels.csv --number 10",
        without=(
            *("budgets", "head", "train", "unit", "regions", "tiles_per_slide", "draws", "folds", "group", "classes"),
            "mixed_patients",
        ),
        change={"seed": {"help": "Of the heads that are asked.", "panel": ""}},
    )(suggest)


def suggest(workspace: Workspace, config: FinetuneConfig, how_many: HowMany, embed: EmbedConfig) -> None:
    """Rank the slides without a label: which to label next, and why.

    A slide ranks high when it stands for many that nothing labelled resembles, and when heads trained on parts of the
    labels disagree about it. The list is also written to WORKSPACE/suggestions.csv.
    """
    from histossl.evaluation.suggest import suggest as stage

    stage(workspace, replace(config, mixed_patients=True), how_many.number, embed)
