"""One content, one zip: files that are the same slide under two names, or a tiled one under a new name."""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from histossl.core.anonymous import Names
from histossl.core.errors import StoreError
from histossl.core.workspace import Workspace
from histossl.slides.content import Files, contents, files_of, samples_are_all
from histossl.slides.ledger import LedgerRow
from histossl.slides.scan import stamp
from histossl.tiles.cutting.tile_slide import (
    Claim,
    SlideOutcome,
    TileJob,
    identity_of,
    prints_of,
    size_mark,
    stamp_of,
    whole_name,
    written_stamp,
)
from histossl.tiles.store.zip_store import new_store, read_store, slide_of


@dataclass(frozen=True)
class Twin:
    of: str  # what has the same content, in words
    holder: str  # the slide that has, or gets, the tiles
    settings: str  # of both files


@dataclass
class Twins:
    """Of files without a zip: those of a content that has one, or gets one with another file."""

    of: dict[str, Twin] = field(default_factory=dict)
    renamed: dict[str, Path] = field(default_factory=dict)  # the same file, whose slide has another name now
    claims: dict[str, tuple[Claim, Twin]] = field(default_factory=dict)  # what only the tiles will show


@dataclass(frozen=True)
class _Holder:
    """A zip, or a file that gets one, of a content of which samples are known."""

    spots: str | None
    path: Path  # of the zip
    owner: str  # file of this archive; empty if it is of none
    files: Files | None  # what it was made of, where that can be read
    mark: str  # changes when these change
    tiles: str = ""  # digest of its tiles


def find_twins(
    archive: str,
    tiles: Path,
    known: Mapping[str, LedgerRow],
    jobs: Mapping[str, TileJob],
    new: Sequence[str],
    replaced: Container[str],
    stored: Mapping[Path, SlideOutcome | StoreError],
    files_of_zip: Mapping[Path, str],
    pool: ThreadPoolExecutor,
    num_workers: int,
    silence_s: float,
) -> Twins:
    """Of the `new` files, which have no zip, those whose content has one under another name, or is there twice.

    Size and samples find candidates. That it is the same content is said once all bytes were compared, of links to one
    file, or where both files are as they were when they were compared last; never of empty files. Where the other file
    cannot be read any more, cutting the tiles decides (`Claim`).
    """
    owners = {job.zip_path: file for file, job in jobs.items()}
    holders: dict[str, list[_Holder]] = {}  # by fingerprint
    sizes: Counter[int | str | None] = Counter()
    for path, outcome in stored.items():
        owner = owners.get(path, "")
        if isinstance(outcome, SlideOutcome) and owner not in replaced:
            facts = outcome.tiling["slide"]
            files = _files(jobs[owner]) if owner else _outside(known.get(files_of_zip[path]))
            digest = str(outcome.tiling.get("digest", ""))
            mark = identity_of(jobs[owner]) if owner else digest
            here = _Holder(facts.get("spots"), path, owner, files, mark, digest)
            holders.setdefault(facts["fingerprint"], []).append(here)
            sizes[facts["bytes"]] += 1
    # Links last: of a file and a link to it, the file is tiled.
    new = sorted(new, key=lambda file: jobs[file].path.is_symlink())
    size_of = dict(zip(new, pool.map(lambda file: _size(jobs[file]), new), strict=True))
    sizes.update(size for size in size_of.values() if size is not None)
    alike = [file for file in new if sizes[size_of[file]] > 1]
    prints = dict(zip(alike, pool.map(lambda file: _prints(jobs[file]), alike), strict=True))
    for file, (few, many) in ((file, both) for file, both in prints.items() if both is not None):
        job = jobs[file]
        holders.setdefault(few, []).append(_Holder(many, job.zip_path, file, _files(job), identity_of(job)))
    same = {file: _candidates(file, prints[file], holders) for file in alike}
    settled = {file: _as_before(known.get(file), jobs[file], same[file]) for file in alike}
    groups = [
        [_files(jobs[file]), *(each.files for each in same[file] if each.files)]
        for file in alike
        if prints[file] is not None and not settled[file] and not samples_are_all(jobs[file].path, jobs[file].parts)
    ]
    whole = contents([group for group in groups if len(group) > 1], num_workers, silence_s)
    twins, taken = Twins(), set[Path]()  # zips that go over to a file of now
    for file in alike:
        job, row = jobs[file], known.get(file)
        for one in same[file]:
            if one.owner in twins.of or (not one.owner and one.path in taken):
                continue  # another of these holds its tiles, and stands in this list too
            before = files_of_zip.get(one.path, "")
            renamed = not one.owner and _named_anew(row, before, archive)
            gone = renamed or (not one.owner and _is_gone(known.get(before)))
            # Its file of now is no witness of what the zip was made of then, if that is this very file.
            proven = _proven(one, job, settled[file], {} if renamed else whole)
            untouched = renamed and row is not None and row.tile_stamp == stamp_of(job)
            said = one.owner or f"{before}, which is tiled as {one.path.name}"
            holder = jobs[one.owner].slide if one.owner else _holder(one.path, tiles, stored[one.path])
            twin = Twin(said, holder, _settings(job, one))
            if gone and (proven or untouched):
                twins.renamed[file] = one.path
                taken.add(one.path)
            elif proven:
                twins.of[file] = twin
            elif not one.owner and (one.files is None or renamed):
                twins.claims[file] = Claim(one.path, one.tiles, "replaced" if gone else "kept"), twin
                taken |= {one.path} if gone else set()
            else:
                continue
            break
    return twins


def _candidates(file: str, prints: tuple[str, str] | None, holders: Mapping[str, Sequence[_Holder]]) -> list[_Holder]:
    """Of equal samples: zips, and those files without one that come before this one."""
    found: list[_Holder] = []
    for one in holders.get(prints[0], ()) if prints else ():
        if one.owner == file:
            break
        if prints and one.spots in (None, prints[1]):
            found.append(one)
    return found


def _as_before(row: LedgerRow | None, job: TileJob, same: Sequence[_Holder]) -> str:
    """The settings under which the row calls the slide a duplicate, where they are those of now, too; else empty."""
    held = row is not None and bool(row.tile_twin) and any(row.tile_settings == _settings(job, one) for one in same)
    return row.tile_settings if row is not None and held else ""


def _proven(one: _Holder, job: TileJob, settled: str, whole: Mapping[Files, object]) -> bool:
    """Whether all bytes are known to be equal."""
    if settled:
        return settled == _settings(job, one)
    if one.spots is not None and samples_are_all(job.path, job.parts):
        return True
    mine = whole.get(_files(job))
    return mine is not None and one.files is not None and whole.get(one.files) == mine


def _settings(job: TileJob, one: _Holder) -> str:
    return hashlib.sha256(f"{identity_of(job)} {one.mark}".encode()).hexdigest()[:16]


def _files(job: TileJob) -> Files:
    return files_of(job.path, job.parts)


def _outside(row: LedgerRow | None) -> Files | None:
    """The files of a slide of another folder, where they are as they were when it was tiled.

    Of a series in several files which are its own is not known.
    """
    if row is None or not row.archive:
        return None
    path = Path(row.archive) / row.file
    several = path.suffix.lower() in (".dcm", ".vms", ".vmu", "")
    as_then = not row.tile_stamp or row.tile_stamp == written_stamp(*stamp(path))
    try:
        return files_of(path) if not several and as_then and path.is_file() else None
    except OSError:
        return None


def _size(job: TileJob) -> int | str | None:
    try:
        size = job.path.stat().st_size
    except OSError:
        return None
    return size_mark(size, job.key) if size else None  # empty files are no slide's content


def _prints(job: TileJob) -> tuple[str, str] | None:
    try:
        return prints_of(job)
    except OSError:
        return None


def file_of(path: Path, outcome: SlideOutcome | StoreError, workspace: Workspace, names: Names) -> str:
    """The file that a zip was made of, relative to the archive of then."""
    name = _name_of(path, workspace.tiles)
    told = outcome.tiling["slide"]["file"] if isinstance(outcome, SlideOutcome) else None
    return str(told or names.file_of(name) or name)


def _name_of(path: Path, tiles: Path) -> str:
    return path.relative_to(tiles.absolute()).as_posix().removesuffix(".zip")


def _holder(path: Path, tiles: Path, outcome: SlideOutcome | StoreError) -> str:
    """The id of the slide that a zip is of."""
    facts = outcome.tiling["slide"] if isinstance(outcome, SlideOutcome) else {}
    return slide_of(_name_of(path, tiles), facts)


def _named_anew(row: LedgerRow | None, file: str, archive: str) -> bool:
    """The same file in its place, whose slide has another name because a file came beside it, or went."""
    return row is not None and (row.file, row.archive) == (file, archive)


def _is_gone(row: LedgerRow | None) -> bool:
    """Whether the file that a zip was made of lies no more where it lay.

    Not known without a record of where that was, and not where its folder is away or empty: a disk that is not
    connected. Tiles that took another name would end every curve that was measured on them.
    """
    if row is None or not row.archive:
        return False
    archive = Path(row.archive)
    try:
        archive.joinpath(row.file).lstat()
    except (FileNotFoundError, NotADirectoryError):
        with contextlib.suppress(OSError):
            return any(archive.iterdir())
    except OSError:
        pass
    return False


def moved_store(old: Path, job: TileJob) -> SlideOutcome | None:
    """Give a zip another name, inside too. None if it is damaged: then its slide is tiled."""
    try:
        store = read_store(old)
        tiling = {key: value for key, value in store.tiling.items() if key not in ("format", "digest")}
        facts = {key: value for key, value in tiling["slide"].items() if key != "name"}
        tiling["slide"] = {**facts, **whole_name(job.slide), "file": job.file}
        with old.open("rb") as source, new_store(job.zip_path, job.config.mpps) as writer:
            for row in np.sort(store.table, order="offset"):
                source.seek(int(row["offset"]))
                jpeg = source.read(int(row["length"]))
                if zlib.crc32(jpeg) != row["crc"]:
                    raise StoreError(f"{old}: damaged")
                place = (int(row["x_l0"]), int(row["y_l0"]))
                writer.add(*place, jpeg, float(row["tissue"]), int(row["scale"]), int(row["region"]))
            writer.finish(tiling)
        old.unlink()
    except (StoreError, OSError):
        return None
    return SlideOutcome(tiling, job.zip_path.stat().st_size)
