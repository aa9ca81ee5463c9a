"""What heads have predicted so far, one line per head: a run that was killed goes on where it was."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import MismatchError
from histossl.labels.splits import Part
from histossl.stats.tables import Budget

DIGITS = 9  # of a probability

Key = tuple[str, int, int | None]  # budget, draw, fold
BELONGS_TO = ("weights", "labels", "head", "tiles")


def key_of(part: Part, budget: Budget) -> Key:
    return str(budget), part.draw, part.fold


class Journal:
    """Predictions of one start, one line per head, flushed as they come. A line cut off by a kill is dropped.

    `belongs_to` (BELONGS_TO) is its first line; a journal of anything else is refused.
    """

    def __init__(self, path: Path, belongs_to: Sequence[str]) -> None:
        self.path, self.belongs_to = path, list(belongs_to)
        self.done: dict[Key, NDArray[np.float64]] = {}
        self._whole_bytes = 0
        if path.exists():
            self._read()

    @classmethod
    def of(cls, path: Path) -> Journal:
        """A journal that is there, whatever it belongs to."""
        with path.open(encoding="utf-8") as file:
            return cls(path, json.loads(file.readline() or "[]"))

    def _read(self) -> None:
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                try:
                    entry = json.loads(line)
                except ValueError:
                    entry = None
                if entry is None or not line.endswith(b"\n"):
                    break  # what was being written when the process died
                if number == 0:
                    if entry != self.belongs_to:
                        pairs = zip_longest(BELONGS_TO, entry, self.belongs_to)
                        other = " and ".join(str(what) for what, was, now in pairs if was != now)
                        raise MismatchError(
                            f"{self.path} holds predictions made with other {other}; use another --name"
                        )
                else:
                    budget, draw, fold, shares = entry
                    self.done[(budget, draw, fold)] = np.array(shares, dtype=np.float64)
                self._whole_bytes += len(line)

    def __enter__(self) -> Journal:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("r+b" if self.path.exists() else "w+b")
        self._file.truncate(self._whole_bytes)
        self._file.seek(self._whole_bytes)
        if not self._whole_bytes:
            self._line(self.belongs_to)
        return self

    def write(self, key: Key, shares: NDArray[np.float64]) -> None:
        shares = np.round(shares, DIGITS)
        self._line([*key, shares.tolist()])
        self.done[key] = shares

    def _line(self, entry: Any) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()

    def __exit__(self, *_: object) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


def part_of(journal: Path, rank: int) -> Path:
    return journal.with_name(f"{journal.stem}@{rank}.part")


def join_parts(path: Path, belongs_to: Sequence[str]) -> None:
    """What several processes have written, of this run or of one that was killed, goes into the journal."""
    parts = sorted(path.parent.glob(f"{glob.escape(path.stem)}@*.part"))
    if not parts:
        return
    with Journal(path, belongs_to) as journal:
        for part in parts:
            for key, shares in Journal(part, belongs_to).done.items():
                if key not in journal.done:
                    journal.write(key, shares)
    for part in parts:
        part.unlink()
