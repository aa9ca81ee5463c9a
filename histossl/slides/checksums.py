"""Checksums of an archive's files, so that what a failing disk changes later is found.

    histossl scan DIR --verify      reads every file once and keeps its checksum
    histossl scan DIR --check       reads them again: who changed, while size and time did not?

They lie in WORKSPACE/checksums.csv. Both commands go on where they were stopped.
"""

from __future__ import annotations

import csv
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from pathlib import Path

from histossl.core import console
from histossl.core.anonymous import names_above
from histossl.core.errors import HistosslError, StoreError
from histossl.core.text import CsvReader, write_csv
from histossl.core.workspace import Workspace
from histossl.runtime.locks import alone_in_workspace
from histossl.runtime.process_pool import Report, num_cores, run_jobs
from histossl.slides.archive import SlideFile, relative, walk

DIGEST_BYTES = 8 << 20  # read between two signs of life
WRITE_EVERY_S = 10.0


@dataclass(frozen=True)
class Checksum:
    """One file as it was when it was read. `seen` is empty but while a check is under way: then what it has found."""

    archive: str
    file: str
    bytes: int
    modified_ns: int
    sha256: str
    seen: str = ""


SAME, CHANGED = "same", "changed"
SHOWN = 20


@dataclass
class Checked:
    """What --verify or --check found; files relative to the archive."""

    same: int = 0  # read, and as it was
    taken: int = 0  # read for the first time, or anew as its size or time differ
    changed: list[str] = field(default_factory=list)  # other content, though size and time are as they were
    replaced: list[str] = field(default_factory=list)  # other size or time
    unknown: list[str] = field(default_factory=list)  # without a checksum
    gone: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # file: why it cannot be read
    total: int = 0

    def described(self) -> list[str]:
        """Lines for a person."""
        lists = {
            "other content, though size and time are the same (a failing disk?); restore from a copy": self.changed,
            "another size or time than then, so not compared (scan --verify reads them again)": self.replaced,
            "their slide not in the folder any more": self.gone,
            "without a checksum yet (scan --verify)": self.unknown,
        }
        lines = [
            f"{console.count(len(files), 'file')} with {what}: {_some(files)}" for what, files in lists.items() if files
        ]
        lines += [f"{file}: {reason}" for file, reason in list(self.failed.items())[:SHOWN]]
        lines += [f"and {len(self.failed) - SHOWN:,} more that cannot be read"] if len(self.failed) > SHOWN else []
        now = (
            f"{self.taken:,} read now, {self.same:,} known from before" if self.taken else f"{self.same:,} as they were"
        )
        return [*lines, f"checksums of {console.count(self.total, 'file')}: {now}"]


def verify(
    directory: Path, workspace: Workspace, num_workers: int | None, time_limit_s: float, again: bool = False
) -> Checked:
    """Read every file that has no checksum yet, or has changed since, and keep it; `again`: every file."""
    directory = Path(directory)
    files = files_of(directory)
    with alone_in_workspace(workspace, "scan"):
        book = _Book(workspace.checksums, directory)
        todo = [file for file, path in files.items() if again or not book.holds(file, path)]
        outcome = Checked(same=len(files) - len(todo), total=len(files))

        def take(file: str, before: tuple[int, int], digest: str) -> None:
            book.put(Checksum(book.archive, file, *before, digest))
            outcome.taken += 1

        _read_all("reading", {file: files[file] for file in todo}, num_workers, time_limit_s, take, outcome, book)
    return outcome


def check(directory: Path, workspace: Workspace, num_workers: int | None, time_limit_s: float) -> Checked:
    """Read again every file whose size and time are those of its checksum."""
    directory = Path(directory)
    files = files_of(directory)
    with alone_in_workspace(workspace, "scan"):
        book = _Book(workspace.checksums, directory)
        if not book.mine:
            raise HistosslError(f"{workspace.checksums}: no checksums of {directory}; run histossl scan --verify first")
        outcome = Checked(total=len(files), gone=[file for file in book.mine if file not in files])
        todo: dict[str, Path] = {}
        for file, path in files.items():
            known = book.mine.get(file)
            if known is None:
                outcome.unknown.append(file)
            elif not book.holds(file, path):
                outcome.replaced.append(file)
            elif known.seen == SAME:
                outcome.same += 1
            elif known.seen == CHANGED:
                outcome.changed.append(file)
            else:
                todo[file] = path

        def compare(file: str, before: tuple[int, int], digest: str) -> None:
            known = book.mine[file]
            if (known.bytes, known.modified_ns) != before:
                outcome.replaced.append(file)
            elif digest == known.sha256:
                outcome.same += 1
                book.put(replace(known, seen=SAME))
            else:
                outcome.changed.append(file)
                book.put(replace(known, seen=CHANGED))

        _read_all("checking", todo, num_workers, time_limit_s, compare, outcome, book)
        book.forget_seen()
    return outcome


def files_of(directory: Path) -> dict[str, Path]:
    """Every file of every slide of an archive, by its path in it."""
    walked = walk(directory)
    if not walked.found:
        raise HistosslError(f"{directory}: no slides in it or its subfolders; give the folder that holds the slides")
    paths = {path for one in walked.found for path in _files_of(one)}
    return {relative(path, directory): path for path in sorted(paths)}


def _files_of(slide: SlideFile) -> Iterable[Path]:
    yield from slide.parts or [slide.path]
    if slide.path.suffix.lower() == ".mrxs":
        yield from (one for one in slide.path.with_suffix("").glob("*") if one.is_file())


# ---- the file of checksums


class _Book:
    """checksums.csv in memory, written now and then; of several archives, those of one."""

    def __init__(self, path: Path, directory: Path) -> None:
        self._path = path
        self.archive = str(directory.resolve()).encode("utf-8", "backslashreplace").decode()
        known = list(_rows(path))
        self._others = [one for one in known if one.archive != self.archive]
        self.mine = {one.file: one for one in known if one.archive == self.archive}
        self._written_s = time.monotonic()

    def holds(self, file: str, path: Path) -> bool:
        """Whether the file is by size and time the one whose checksum is known."""
        known = self.mine.get(file)
        return known is not None and (known.bytes, known.modified_ns) == _stamp(path)

    def put(self, checksum: Checksum) -> None:
        self.mine[checksum.file] = checksum
        if time.monotonic() - self._written_s > WRITE_EVERY_S:  # a killed process gets no chance to
            self.write()

    def forget_seen(self) -> None:
        """The check is complete: the next one begins from the start."""
        self.mine = {file: replace(one, seen="") for file, one in self.mine.items()}
        self.write()

    def write(self) -> None:
        rows = sorted([*self._others, *self.mine.values()], key=lambda one: (one.archive, one.file))
        names = names_above(self._path)
        rows = [replace(one, archive=names.place(one.archive), file=names.file(one.file)) for one in rows]
        names.write()
        write_csv(self._path, [one.name for one in fields(Checksum)], map(astuple, rows))
        self._written_s = time.monotonic()


def _rows(path: Path) -> Iterator[Checksum]:
    try:
        names = names_above(path)
        with path.open(encoding="utf-8", newline="") as file:
            for row in CsvReader(file):
                yield Checksum(
                    names.name_of(row["archive"]),
                    names.name_of(row["file"]),
                    int(row["bytes"]),
                    int(row["modified_ns"]),
                    row["sha256"],
                    row["seen"],
                )
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise StoreError(
            f"{path}: cannot be read ({error}); restore it, or move it aside and run histossl scan --verify again"
        ) from error


# ---- reading


def _read_all(
    what: str,
    files: dict[str, Path],
    num_workers: int | None,
    time_limit_s: float,
    heard: Callable[[str, tuple[int, int], str], None],
    outcome: Checked,
    book: _Book,
) -> None:
    """Digest all files in worker processes; whatever ends this early, what was read so far is kept."""
    names, paths = list(files), list(files.values())
    workers = max(1, min(len(paths), num_cores() if num_workers is None else num_workers))
    try:
        with console.progress(what, len(paths), "files") as bar:
            for event in run_jobs(digest_of, paths, workers, time_limit_s) if paths else ():
                if event.kind == "progress":
                    continue
                file = names[event.job]
                if event.kind == "failed":
                    slow = event.value.startswith("hung")
                    outcome.failed[file] = event.value + ("; --time-limit gives it longer" if slow else "")
                else:
                    before, digest = event.value
                    heard(file, before, digest)
                bar.advance()
    finally:
        book.write()


def digest_of(path: Path, report: Report) -> tuple[tuple[int, int], str]:
    """(size, time) and SHA-256 of a file. The time limit is for silence: a large file takes what it takes."""
    try:
        before = _stamp(path)
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(DIGEST_BYTES):
                digest.update(piece)
                report(0)
    except OSError as error:
        raise HistosslError(f"cannot be read ({error.strerror})") from error
    if before is None or _stamp(path) != before:
        raise HistosslError("changed while it was read, or vanished; run the command again")
    return before, digest.hexdigest()


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _some(files: Sequence[str]) -> str:
    more = f" and {len(files) - SHOWN:,} more" if len(files) > SHOWN else ""
    return ", ".join(files[:SHOWN]) + more
