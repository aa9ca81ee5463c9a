"""One file with everything needed to go on, and the one before it in case the newest is damaged."""

from __future__ import annotations

import errno
import pickle
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from histossl.core import console
from histossl.core.errors import TrainingError
from histossl.core.workspace import PretrainDir, written_aside

DAMAGED = (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile)


def save_checkpoint(run: PretrainDir, state: Mapping[str, Any]) -> None:
    """Whole or absent at any instant: written aside, the present one becomes the previous one, then renamed."""
    with written_aside(run.checkpoint) as aside:
        _write(state, aside)
        if run.checkpoint.exists():
            run.checkpoint.replace(run.previous_checkpoint)


def _write(state: Mapping[str, Any], path: Path) -> None:
    """torch says in a RuntimeError of its own that the disk is full."""
    try:
        torch.save(dict(state), path)
    except RuntimeError as error:
        if "PytorchStreamWriter" in str(error) or "inline_container" in str(error) or "unexpected pos" in str(error):
            raise OSError(errno.ENOSPC, "is the disk full?") from error
        raise


def load_checkpoint(run: PretrainDir) -> dict[str, Any] | None:
    """The newest whole checkpoint, or None when there is none. A damaged one is passed over, named, and put aside.

    Aside, or the next save would make it the previous one, in the place of the only whole one.
    """
    broken: list[str] = []
    for path in (run.checkpoint, run.previous_checkpoint):
        if not path.exists():
            continue
        try:
            with zipfile.ZipFile(path) as archive:  # torch does not verify the checksums it writes
                damaged = archive.testzip()
            if damaged:
                raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except DAMAGED as error:
            broken.append(f"{path.name} ({error})")
            if path == run.checkpoint and run.previous_checkpoint.exists():
                console.warn(f"{path}: damaged ({error}); falling back to the checkpoint before it")
            continue
        if broken:
            with suppress(OSError):  # another process of the run was first
                run.checkpoint.replace(run.damaged_checkpoint)
        return state
    if broken:
        raise TrainingError(
            f"{run.root}: no whole checkpoint to go on from: {', '.join(broken)}. Restore one from a backup, or "
            "delete them to begin this run again from step 0"
        )
    return None


def remove_checkpoints(run: PretrainDir) -> None:
    for path in (run.checkpoint, run.previous_checkpoint, run.damaged_checkpoint):
        path.unlink(missing_ok=True)
