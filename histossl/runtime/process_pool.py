"""A pool of processes in which one job's crash or hang costs that job and nothing else.

`concurrent.futures` loses every running job when one worker dies, and cannot stop one that hangs. Slide libraries do
both, now and then, on damaged files. Used by `scan` and by `tile`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from histossl.core.errors import HistosslError

START_S = 120.0  # a process on a busy machine takes a while to start and import

_NOT_BEGUN = "not begun"  # an Event's kind, within this module

Report = Callable[[int], None]
Job = Callable[[Any, Report], Any]


@dataclass(frozen=True)
class Event:
    """`kind` is progress (`value`: what the job reported), done (its result) or failed (why, in plain words)."""

    job: int
    kind: str
    value: Any
    error: HistosslError | None = None  # the error itself, if it was one of ours
    hung: bool = False  # it began, and then nothing came of it in time


def num_cores() -> int:
    """Of this process: a SLURM job or a container has fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loader_threads(num_processes: int) -> int:
    """Every core that this process may use, but one, shared among the processes of this machine."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
    # SLURM mostly binds each task to cores of its own, and a task that sees no others shares them with nobody.
    on_node = int(os.environ.get("SLURM_CPUS_ON_NODE", num_cores()))
    return max(1, min(num_cores(), on_node // here) - 1)


def run_jobs(function: Job, jobs: Sequence[Any], num_workers: int, silence_s: float) -> Iterator[Event]:
    """Run function(job, report) for all jobs in `num_workers` processes; 0: here, one after the other, unguarded.

    A job that reports nothing for `silence_s` is stopped; the start of its process does not count. Each job is heard of
    first as progress 0, when it begins. Closing the generator stops everything.
    """
    if num_workers == 0:
        yield from _here(function, jobs)
        return
    waiting = list(enumerate(jobs))[::-1]
    again: set[int] = set()  # jobs whose process died before they began: not their fault, the first time
    workers: list[_Worker] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < num_workers:
                workers.append(_Worker(function))
                workers[-1].give(*waiting.pop())
            ready = wait([each for worker in workers for each in worker.waitables], timeout=1.0)
            for worker in list(workers):
                event = worker.heard(bool(set(worker.waitables) & set(ready)), silence_s)
                while event is not None:
                    if event.kind == _NOT_BEGUN and event.job not in again:
                        again.add(event.job)
                        waiting.append((event.job, jobs[event.job]))
                    else:
                        yield replace(event, kind="failed") if event.kind == _NOT_BEGUN else event
                    event = worker.heard(True, silence_s) if event.kind == "progress" else None
                if worker.idle and worker.alive and waiting:
                    worker.give(*waiting.pop())
                elif worker.idle:
                    worker.stop()
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.kill()


def _here(function: Job, jobs: Sequence[Any]) -> Iterator[Event]:
    for number, job in enumerate(jobs):
        reports: list[int] = []
        yield Event(number, "progress", 0)
        try:
            result = function(job, reports.append)
        except HistosslError as error:
            yield Event(number, "failed", str(error), error)
        except Exception as error:
            yield Event(number, "failed", unexpected(error))
        else:
            yield Event(number, "progress", sum(reports))
            yield Event(number, "done", result)


def unexpected(error: Exception) -> str:
    return f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """A process begun in here starts with Ctrl-C held back: it would else end its imports with a traceback.

    Here it is only late: what came meanwhile is delivered at the end.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which would take the block away when it starts by itself
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    def __init__(self, function: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(function, theirs, os.getpid()), daemon=True)
        with _interrupts_held():
            self._process.start()
        theirs.close()
        self._job: int | None = None
        self._heard_s = time.monotonic()
        self._began = False
        self.alive = True

    @property
    def waitables(self) -> list[Any]:
        return [self._connection, self._process.sentinel]

    @property
    def idle(self) -> bool:
        return self._job is None

    def give(self, number: int, job: Any) -> None:
        self._job, self._heard_s, self._began = number, time.monotonic(), False
        with contextlib.suppress(OSError):  # it died between two jobs: `heard` finds out
            self._connection.send(job)

    def heard(self, ready: bool, silence_s: float) -> Event | None:
        """The worker's next word, or its death, or its silence."""
        if self._job is None:
            return None
        number = self._job
        if ready and self._connection.poll():
            try:
                kind, value, error = self._connection.recv()
            except (EOFError, OSError):
                return self._gone(number)
            self._heard_s, self._began = time.monotonic(), True
            if kind != "progress":
                self._job = None
            return Event(number, kind, value, error)
        if not self._process.is_alive() and not self._connection.poll():
            return self._gone(number)
        if time.monotonic() - self._heard_s > (silence_s if self._began else START_S):
            self.kill()
            self._job = None
            said = f"hung: nothing came of it for {silence_s:.0f} s, so it was stopped"
            return Event(number, "failed", said, hung=self._began)
        return None

    def _gone(self, number: int) -> Event:
        self._process.join(5)
        code = self._process.exitcode
        self.kill()
        self._job = None
        kind = "failed" if self._began else _NOT_BEGUN
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return Event(number, kind, f"crashed the library that read it ({name}){hint}")
        return Event(number, kind, f"ended the process that read it (exit code {code})")

    def stop(self) -> None:
        """Let an idle worker end."""
        self.alive = False
        self._connection.close()
        self._process.join(5)
        self.kill()

    def kill(self) -> None:
        self.alive = False
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._connection.close()


def _work(function: Job, connection: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()

    def report(count: int) -> None:
        connection.send(("progress", count, None))

    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            return
        answer: tuple[str, Any, HistosslError | None]
        try:
            report(0)
            answer = ("done", function(job, report), None)
        except HistosslError as error:
            answer = ("failed", str(error), error)
        except Exception as error:
            answer = ("failed", unexpected(error), None)
        try:
            connection.send(answer)
        except OSError:
            return


def _follow(parent: int) -> None:
    """End with the parent, however it ends: a worker that outlives it would write into somebody else's run."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
