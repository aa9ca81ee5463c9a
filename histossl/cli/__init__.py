"""The commands: options become a config, a config goes to its stage, an error becomes one red line.

Heavy imports (torch, timm, sklearn) happen inside the commands, so that `histossl --help` answers at once.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Annotated, Any

import typer

from histossl import __version__
from histossl.cli import (
    bench,
    curate,
    demo,
    distill,
    embed,
    finetune,
    methods,
    names,
    predict,
    pretrain,
    report,
    scan,
    suggest,
    tile,
    views,
)
from histossl.core import console
from histossl.core.errors import HistosslError, UsageError
from histossl.core.text import shown
from histossl.runtime.launcher_messages import end_with_launcher, is_launched, tell_launcher

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


for room in (
    *(scan, views, tile, curate, pretrain, distill, finetune, suggest, report),
    *(predict, embed, names, methods, bench, demo),
):
    room.register(app)


INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
GOES_ON = "what is finished is kept, the same command goes on from there"


def _refuse_two_scales(arguments: list[str]) -> None:
    """Of an option given twice click takes the last. Of --mpp both are meant, and one would be lost without a word."""
    if sum(one == "--mpp" or one.startswith("--mpp=") for one in arguments) > 1:
        raise UsageError("--mpp is given twice; give it once (several scales, where a command takes them: --mpp 0.5,1)")


@contextmanager
def _terminated_as_interrupted() -> Iterator[list[int]]:
    """`kill` (SIGTERM) ends a command as Ctrl-C does: what it began is tidied away, and one line says what to do.

    Yields a list that holds the signal once it came; a second one ends at once. A process beside others ends at once
    in any case: it may wait for another in an exchange, which no handler could break off.
    """
    came: list[int] = []
    if "RANK" in os.environ or threading.current_thread() is not threading.main_thread():
        yield came
        return

    def ask(number: int, _: FrameType | None) -> None:
        came.append(number)
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 killed.

    `pretrain` and `distill` save when they are killed while they train, and are then done for this time: 0.
    """
    end_with_launcher()
    with _terminated_as_interrupted() as came:
        code = _run(arguments)
    if came and code == INTERRUPTED:
        code = TERMINATED
    if code > 128 and not is_launched() and os.environ.get("RANK", "0") == "0":  # else another process says it
        how = "interrupted" if code == INTERRUPTED else f"stopped by {signal.Signals(code - 128).name}"
        console.say(f"{how}; {GOES_ON}")
    return code


def _told(error: Any) -> str:
    """What click says of a command line that it cannot read; of a second folder, that a command takes one."""
    message = str(error.format_message())
    context = getattr(error, "ctx", None)
    extra = re.fullmatch(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", message)
    if extra and context and any(parameter.name == "directory" for parameter in context.command.params):
        return f"{context.info_name} takes one folder, and searches its subfolders too; not also {extra[1]}"
    return message


def _run(arguments: list[str] | None) -> int:
    try:
        _refuse_two_scales(sys.argv[1:] if arguments is None else arguments)
        code = app(arguments, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.Exit as stop:
        return int(stop.exit_code)
    except CommandLineError as error:
        if message := _told(error):  # none where the help alone is the answer
            console.fail(message)
        return int(error.exit_code)
    except HistosslError as error:
        if not tell_launcher(error):
            console.fail(str(error))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED


def entry() -> None:
    _show_names_as_data()
    sys.exit(main())


def _show_names_as_data() -> None:
    """Python's own words too (a traceback, a warning, a library's log) hold names of files."""

    def traceback_shown(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(shown("".join(traceback.format_exception(kind, error, trace)), lines=True))

    class Plain(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return shown(super().format(record), lines=True)

    as_ever = warnings.formatwarning
    warnings.formatwarning = lambda *told, **more: shown(as_ever(*told, **more), lines=True)
    sys.excepthook = traceback_shown
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(Plain())
