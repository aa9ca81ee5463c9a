"""What a process that was started beside others and its launcher tell each other.

Our launcher starts all its processes again when one dies, which is right for a crash and useless for a mistake: the
mistake would be made again. So a process that fails tells its error, and the launcher shows it, once. It is told
through a pipe: a file would be gone where something cleans the temporary folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from histossl.core.errors import HistosslError

LAUNCHER = "HISTOSSL_LAUNCHER"  # its process number
PIPE = "HISTOSSL_PIPE"  # the file descriptor of the pipe to it
MEETING = "HISTOSSL_MEETING"  # the file through which its processes find each other
SAVING, SAVED, FAILED = "saving", "saved", "failed"
# What processes have to end their step, look and save in when they are asked to stop.
STOP_S = 600.0
WATCH_S = 0.5


def is_launched() -> bool:
    """Whether our own launcher has started this process, and not torchrun or SLURM."""
    return LAUNCHER in os.environ


def end_with_launcher() -> None:
    """From now on: a process whose launcher is killed, ours or torchrun, is asked to stop, as nobody else could.

    It would hold its GPU and its run's lock. Where it trains it saves; elsewhere it ends at once.
    """
    if is_launched():  # by its number: it may be gone already
        launcher = int(os.environ[LAUNCHER])
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = os.getppid()
    else:
        return
    threading.Thread(target=_watch, args=(launcher,), daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(WATCH_S)
    with suppress(OSError, ValueError):  # nobody may read it any more
        sys.stderr.write(f"process {os.environ.get('RANK', '?')}: its launcher is gone; this one ends too\n")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_S)
    os.kill(os.getpid(), signal.SIGKILL)


def tell_launcher(error: HistosslError) -> bool:
    """Tell the error where there is a launcher to show it; whether there is."""
    return _tell(FAILED, str(error))


@contextmanager
def saving() -> Iterator[None]:
    """Within it this process writes what must not be lost: the launcher lets it, even if another process has died."""
    _tell(SAVING)
    try:
        yield
    finally:
        _tell(SAVED)


def _tell(kind: str, text: str = "") -> bool:
    pipe = os.environ.get(PIPE)
    if not pipe:
        return False
    try:
        with open(int(pipe), "wb", closefd=False) as to_launcher:
            to_launcher.write(json.dumps([kind, text]).encode() + b"\n")
    except OSError:  # it is gone
        return False
    return True
