"""`histossl finetune`: from a few labelled slides and several starts to a label-efficiency curve."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import typer

from histossl.cli.from_config import EVALUATE, Given, command
from histossl.core import console
from histossl.core.config import EmbedConfig, FinetuneConfig, LaunchConfig, TuneConfig, with_overrides
from histossl.core.errors import UsageError
from histossl.core.options import Checked, option
from histossl.core.workspace import Workspace

MAX_RESTARTS = 3  # of a process that dies: what is finished is in the journal


@dataclass(frozen=True)
class Curve(Checked):
    name: str = option("default", "Name of this curve: its files go to WORKSPACE/finetune/NAME.")
    dry_run: bool = option(False, "Check labels and splits, then stop.")
    set: tuple[str, ...] = option(
        (),
        "With --train last or all: steps, lr, layer_decay, weight_decay, bags_per_step, tiles_per_bag, test_tiles. May "
        "be given several times.",
        "Heads",
        metavar="KEY=VALUE",
    )


def register(app: typer.Typer) -> None:
    command(
        app,
        group=EVALUATE,
        epilog="Example: histossl finetune --labels labels.csv\n\n"
        "(check the labels only: histossl finetune --labels labels.csv --dry-run)",
        without=("max_restarts",),
        change={
            "gpus": {
                "help": "auto, or how many: embedding and the curve's trainings are shared out among them, with the "
                "same result. Without a GPU, so many CPU processes."
            }
        },
    )(finetune)


def finetune(
    workspace: Workspace,
    config: FinetuneConfig,
    curve: Curve,
    embed: EmbedConfig,
    launching: LaunchConfig,
    given: Given,
) -> int:
    """Measure how many labelled slides each start needs: the label-efficiency curve, with its report.

    Patients never stand on both sides of a split. The same command goes on where it was interrupted.
    """
    from histossl.evaluation.finetune import finetune as stage
    from histossl.report.html import write_report
    from histossl.runtime.distributed import is_worker, num_processes_for
    from histossl.runtime.launcher import launch

    if curve.set and config.train == "head":
        raise UsageError(f"--set {curve.set[0]}: is a setting of end-to-end training; add --train last or --train all")
    if "tiles_per_slide" in given and config.unit != "tile":
        raise UsageError(f"--tiles-per-slide {config.tiles_per_slide}: counts tiles that carry labels; add --unit tile")
    for option_name, value in (("--embed-batch-size", embed.batch_size), ("--workers", embed.num_workers)):
        if value and config.train != "head":
            raise UsageError(
                f"{option_name} {value}: is of embedding, which --train {config.train} does not do; leave it out"
            )
    config = replace(config, tune=with_overrides(TuneConfig(), curve.set))
    alone = is_worker() or curve.dry_run
    num_processes = 1 if alone else num_processes_for(launching.gpus if embed.device == "auto" else "1")
    if embed.device != "auto" and launching.gpus not in ("auto", "1"):
        raise UsageError(
            f"--device {embed.device} --gpus {launching.gpus}: with several processes each takes its own GPU; drop one"
        )
    if num_processes > 1:
        return launch(num_processes, sys.argv[1:], MAX_RESTARTS)
    result = stage(workspace, curve.name, config, embed, curve.dry_run)
    if result.finished:
        console.say(f"report: {write_report(result.run, workspace)}")
    return 0
