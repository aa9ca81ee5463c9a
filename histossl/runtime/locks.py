"""Locks: one `scan` or `tile` at a time per workspace, one run at a time in its directory.

Two would rename each other's files and write one ledger or log between them. The kernel lets go of a lock however its
process ends, so a lock file that is left behind says nothing: what counts is who holds the lock.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from histossl.core.errors import HistosslError, StoreError, TrainingError
from histossl.core.workspace import FinetuneDir, PretrainDir, Workspace, locked
from histossl.runtime.launcher_messages import is_launched

# ---- a workspace


@contextmanager
def alone_in_workspace(workspace: Workspace, command: str) -> Iterator[None]:
    """One `scan` or `tile` at a time per workspace: both write the ledger. The kernel lets go however a process ends.

    Shows before any work that the workspace can be written to. One that this run made and left empty (its settings
    were refused, say) goes with it.
    """
    new = not workspace.root.exists()
    workspace.make()
    path = workspace.root / ".lock"
    told = f"workspace {workspace.root}: cannot be written"
    remedy = "make room, mend its permissions, or pass --workspace DIR"
    try:
        lock = path.open("a+b", buffering=0)  # buffered, a full disk would complain once more when it is closed
    except OSError as error:
        raise HistosslError(f"{told} ({error.strerror}); {remedy}") from error
    with lock:
        if not locked(lock.fileno()) and not _in_a_moment(lock.fileno()):
            lock.seek(0)
            raise StoreError(f"{workspace.root}: another {lock.read().decode().strip()} is at work in it")
        try:
            lock.truncate(0)
            lock.write(f"`histossl {command}` (process {os.getpid()})\n".encode())
        except OSError as error:
            raise HistosslError(f"{told} ({error.strerror}); {remedy}") from error
        try:
            yield
        finally:
            if new and {*workspace.root.iterdir()} <= {path, workspace.tiles}:
                with suppress(OSError):  # there are tiles
                    if workspace.tiles.exists():
                        workspace.tiles.rmdir()
                    path.unlink(missing_ok=True)
                    workspace.root.rmdir()


def refuse_while_tiling(workspace: Workspace) -> None:
    """Part of an archive looks like a whole one: what reads all tiles waits until `tile` has made them.

    Processes that a launcher of ours starts, or starts again in the middle of a run, do not ask: it has.
    """
    if is_launched():
        return
    try:
        lock = (workspace.root / ".lock").open("rb")
    except OSError:
        return  # nobody has tiled here, or it is not ours to see
    with lock:
        if locked(lock.fileno(), shared=True):
            return
        holder = lock.read().decode(errors="replace").strip()
    if holder.startswith("`histossl tile`"):
        raise StoreError(
            f"{workspace.root}: {holder} is at work in it, and has not tiled every slide yet; wait until it is done, "
            "or stop it to go on with the tiles that there are"
        )


def _in_a_moment(descriptor: int) -> bool:
    """Whether the lock is free again after a blink: `refuse_while_tiling` holds it for so long, and is no work."""
    time.sleep(0.1)
    return locked(descriptor)


# ---- a run


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
def alone_in_run(run: PretrainDir | FinetuneDir) -> Iterator[None]:
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
