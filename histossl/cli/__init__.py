"""The commands: options become a config, a config goes to its stage, an error becomes one red line.

Heavy imports (torch, timm, sklearn) happen inside the commands, so that `histossl --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from histossl import __version__, console
from histossl.cli import bench, curate, demo, distill, evaluate, methods, pretrain, report, slides, tiles, views
from histossl.errors import HistosslError, UsageError
from histossl.launched import failed_before, tell_end, tell_launcher

# Read by torch's threads when they start. They spin while they wait for each other, unless told to sleep; beside our
# own loader's threads, or anybody else on the machine, spinning costs several times what it saves (examples/LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    name="histossl",
    help="Continue self-supervised pretraining on your own slides, then see how many labels that saved.",
    epilog="First time: histossl demo. On your own slides: histossl pretrain --slides DIR, "
    "then histossl finetune --labels labels.csv.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Typer brings its own copy of click in some versions and imports it in others: ask its exceptions for their base.
CommandLineError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"histossl {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for room in (demo, bench, slides, curate, methods, pretrain, distill, evaluate, report, tiles, views):
    room.register(app)


INTERRUPTED = 130
GOES_ON = "interrupted; what is finished is kept, the same command goes on from there"


def _refuse_two_scales(arguments: list[str]) -> None:
    """Of an option given twice click takes the last. Of --mpp both are meant, and one would be lost without a word."""
    if sum(one == "--mpp" or one.startswith("--mpp=") for one in arguments) > 1:
        raise UsageError("--mpp is given twice; give it once (several scales, where a command takes them: --mpp 0.5,1)")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    if failed_before():
        return 0
    try:
        _refuse_two_scales(sys.argv[1:] if arguments is None else arguments)
        code = app(arguments, standalone_mode=False)
        if code == INTERRUPTED:  # how typer says Ctrl-C
            console.say(GOES_ON)
        elif os.environ.get("RANK", "0") == "0" and not code:
            tell_end()
        return code if isinstance(code, int) else 0
    except typer.Exit as stop:
        return int(stop.exit_code)
    except CommandLineError as error:
        if message := error.format_message():  # none where the help alone is the answer
            console.fail(message)
        return int(error.exit_code)
    except HistosslError as error:
        if not tell_launcher(error):
            console.fail(str(error))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        console.say(GOES_ON)
        return INTERRUPTED


def entry() -> None:
    sys.exit(main())
