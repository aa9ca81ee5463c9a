"""`--gpus N`: this command in N processes of this machine, and all of them again when one dies.

They find each other through a file below a directory that nobody else may enter, and speak over the loopback interface.
(torch's own launcher opens a port for that, to the network, and unpickles what anybody writes there.)
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from histossl.core import console
from histossl.core.errors import HistosslError, TrainingError
from histossl.runtime import launcher_messages
from histossl.runtime.distributed import RESTART

COMMAND = (sys.executable, "-u", "-m", "histossl")
POLL_S = 0.1
# What the others have when one has died: on CPUs they notice by themselves, on GPUs they wait for it in an exchange
# that no signal ends. Only who is writing a checkpoint is waited for.
GRACE_S = 5.0
INTERRUPTED = 128 + signal.SIGINT
ENDED_WELL = (0, INTERRUPTED)


def launch(count: int, arguments: Sequence[str], max_restarts: int) -> int:
    """Run `histossl ARGUMENTS` in `count` processes; when one dies, all are started again. The exit code.

    Signals are handed on to them. Raises TrainingError when processes die and no restart is left.
    """
    with _signals_noted() as asked:
        for restart in range(max_restarts + 1):
            workers = _carry_out(count, arguments, asked)
            code = _exit_code(workers, asked)
            if code is not None:
                return code
            died = min((one for one in workers if one.died), key=lambda one: one.code == RESTART)
            if died.code != RESTART and restart < max_restarts:  # else it has said why
                console.warn(
                    f"process {died.rank} ended with {died.how}; all start again and go on from what is saved "
                    f"(restart {restart + 1} of {max_restarts})"
                )
    raise TrainingError(
        f"process {died.rank} ended with {died.how} and {max_restarts} restarts did not help; its own words are "
        "above. The same command goes on from what is saved"
    )


class _Worker:
    """One of the processes, and what it tells."""

    def __init__(self, rank: int, count: int, arguments: Sequence[str], meeting: str) -> None:
        self.rank = rank
        self.error: str | None = None
        self.saving = False
        self.killed = False  # here, because another had died
        self._words = b""
        self._hears, tells = os.pipe()
        os.set_blocking(self._hears, False)
        variables = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            launcher_messages.LAUNCHER: os.getpid(),
            launcher_messages.PIPE: tells,
            launcher_messages.MEETING: meeting,
        }
        environment = {**os.environ, **_on_loopback(), **{name: str(value) for name, value in variables.items()}}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        try:
            # In a session of its own: of Ctrl-C it hears from its launcher alone, once.
            self._process = subprocess.Popen(
                [*COMMAND, *arguments], env=environment, pass_fds=(tells,), start_new_session=True
            )
        except OSError as error:
            os.close(self._hears)
            raise HistosslError(f"process {rank} of {count} cannot be started ({error.strerror})") from error
        finally:
            os.close(tells)

    @property
    def code(self) -> int | None:
        """As of `Popen`: None while it runs, below 0 where a signal ended it."""
        return self._process.poll()

    @property
    def died(self) -> bool:
        return self.code not in (None, *ENDED_WELL) and not self.killed

    @property
    def how(self) -> str:
        if self.code is None or self.code >= 0:
            return f"exit code {self.code}"
        name = signal.Signals(-self.code).name
        return f"signal {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"

    def hand_on(self, number: int) -> None:
        """What only ends a process, as a closed terminal does, becomes the signal at which it saves."""
        self._process.send_signal(number if number in (signal.SIGINT, signal.SIGUSR1) else signal.SIGTERM)

    def hear(self) -> bool:
        """Take in what it has told since; whether it was anything."""
        try:
            heard = os.read(self._hears, 1 << 16)
        except BlockingIOError:
            return False
        *lines, self._words = (self._words + heard).split(b"\n")
        for line in lines:
            kind, text = json.loads(line)
            self.saving = kind == launcher_messages.SAVING
            if kind == launcher_messages.FAILED:
                self.error = text
        return bool(heard)

    def end(self) -> None:
        """Kill it where it still runs, with what it has started, and hear its last words."""
        if self.code is None:
            self.killed = True
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        while self.hear():
            pass
        os.close(self._hears)


def _carry_out(count: int, arguments: Sequence[str], asked: list[int]) -> list[_Worker]:
    """Start the processes, and wait until all have ended."""
    try:
        meeting = tempfile.TemporaryDirectory(prefix="histossl-", ignore_cleanup_errors=True)
    except OSError as error:
        raise HistosslError(
            f"no temporary folder can be made, where {count} processes would meet ({error.strerror or error}); "
            "set TMPDIR to a folder that can be written"
        ) from error
    workers: list[_Worker] = []
    with meeting as folder:  # mode 0700, and new each time: what a killed process left there would mislead the next
        try:
            for rank in range(count):
                workers.append(_Worker(rank, count, arguments, str(Path(folder) / "meeting")))
            _wait(workers, asked)
        finally:
            for worker in workers:
                worker.end()
    return workers


def _wait(workers: Sequence[_Worker], asked: list[int]) -> None:
    """Until all have ended. Signals are handed on; who takes too long, once one has died or all were asked, is left."""
    handed_on, since_s = 0, time.monotonic()
    num_died = 0
    while running := [worker for worker in workers if worker.code is None]:
        told = [worker.hear() for worker in running]
        died = sum(worker.died for worker in workers)
        if any(told) or died > num_died or handed_on < len(asked):
            num_died, since_s = died, time.monotonic()
        while handed_on < len(asked):
            for worker in running:
                worker.hand_on(asked[handed_on])
            handed_on += 1
        hurry = died and not any(worker.saving for worker in running)
        patience_s = GRACE_S if hurry else launcher_messages.STOP_S
        late = (died or asked) and time.monotonic() - since_s > patience_s
        if late or asked.count(signal.SIGINT) > 2:  # who presses it a third time does not want to wait
            return
        time.sleep(POLL_S)


def _exit_code(workers: Sequence[_Worker], asked: Sequence[int]) -> int | None:
    """What the launcher ends with; None where the processes are to be started again."""
    for worker in workers:
        if worker.error is not None:
            console.fail(worker.error)
            return max(1, worker.code or 1)
    codes = [worker.code for worker in workers]
    if INTERRUPTED in codes:
        return INTERRUPTED
    if codes[0] == 0:  # it writes what all have done, and is the last to need the others
        return 0
    return 128 + asked[0] if asked else None  # as of one process that could not save any more


def _on_loopback() -> dict[str, str]:
    """Which interface gloo and nccl use: left alone they may listen to the network."""
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    return {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": f"={loopback}"} if loopback else {}


@contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """The signals that come meanwhile, instead of what they would do. A hangup that `nohup` turned off stays off."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, _: FrameType | None) -> None:
        asked.append(number)

    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
