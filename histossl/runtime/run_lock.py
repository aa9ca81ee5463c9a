"""One run at a time in its directory: two would rename each other's files and write one log between them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from histossl.core.errors import HistosslError, TrainingError
from histossl.core.workspace import FinetuneDir, PretrainDir, locked


def held(run: PretrainDir | FinetuneDir) -> bool:
    """Whether a process is at work in it."""
    try:
        with (run.root / ".lock").open("rb") as lock:
            return not locked(lock.fileno(), shared=True)
    except OSError:
        return False


def refuse_held(run: PretrainDir | FinetuneDir) -> None:
    if held(run):
        raise _at_work(run)


def _at_work(run: PretrainDir | FinetuneDir) -> TrainingError:
    who = (run.root / ".lock").read_text(encoding="utf-8").strip()
    return TrainingError(
        f"{run.root}: another process is at work on this run ({who}); wait for it, or use another --name"
    )


@contextmanager
def alone_in(run: PretrainDir | FinetuneDir) -> Iterator[None]:
    """Hold the run's directory, and remove what killed ones left half-written in it.

    The kernel lets go of the lock however the process ends. A directory that is made here and left empty (the settings
    were refused, say) goes again.
    """
    new = not run.root.exists()
    path = run.root / ".lock"
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        lock = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise HistosslError(f"{run.root}: cannot be written ({error.strerror}); use another --workspace") from error
    with lock:
        if not locked(lock.fileno()):
            raise _at_work(run)
        lock.truncate(0)
        lock.write(f"process {os.getpid()}\n")
        lock.flush()
        for left in run.root.rglob(".*.part"):
            left.unlink(missing_ok=True)
        try:
            yield
        finally:
            if new and {*run.root.iterdir()} <= {path}:
                path.unlink(missing_ok=True)
                run.root.rmdir()
                with suppress(OSError):  # others' runs lie beside it
                    run.root.parent.rmdir()
