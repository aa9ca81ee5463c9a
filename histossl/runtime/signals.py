"""Being asked to stop: by Ctrl-C, by a cluster that wants the machine back, or by `kill`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from histossl.core import console


class Stop(threading.Event):
    """Set when somebody asks; then `number` is the signal that asked."""

    number = 0

    def ask(self, number: int) -> None:
        self.number = number
        self.set()

    @property
    def interrupted(self) -> bool:
        """Whether a person pressed Ctrl-C: what they chained after this command is not to follow."""
        return self.number == signal.SIGINT


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """SIGTERM, SIGINT and SIGUSR1 (SLURM's warning) set the event; a second SIGINT interrupts at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.ask(number)
        console.say("saving before stopping ...")

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
