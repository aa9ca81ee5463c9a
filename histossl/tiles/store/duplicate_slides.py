"""One content, one zip: files that are the same slide under two names, or a tiled one under a new name."""

from __future__ import annotations

import contextlib
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
from histossl.slides.ledger import LedgerRow
from histossl.tiles.cutting.tile_slide import SlideOutcome, TileJob, prints_of, size_mark
from histossl.tiles.store.zip_store import new_store, read_store


@dataclass
class Twins:
    # file: what has the same content, in words, and the slide that has or gets the tiles
    of: dict[str, tuple[str, str]] = field(default_factory=dict)
    moved: dict[str, Path] = field(default_factory=dict)  # file: the zip of its content, under the name of a gone file


def find_twins(
    archive: str,
    tiles: Path,
    known: Mapping[str, LedgerRow],
    jobs: Mapping[str, TileJob],
    new: Sequence[str],
    replaced: Container[str],
    stored: Mapping[Path, SlideOutcome | StoreError],
    files_of: Mapping[Path, str],
    pool: ThreadPoolExecutor,
) -> Twins:
    """Of the `new` files, which have no zip, those whose content has one under another name, or is there twice."""
    owners = {job.zip_path: file for file, job in jobs.items()}
    holders: dict[str, list[tuple[str | None, Path, str]]] = {}  # fingerprint: spots, zip, file of this archive
    sizes: Counter[int | str | None] = Counter()
    for path, outcome in stored.items():
        owner = owners.get(path, "")
        if isinstance(outcome, SlideOutcome) and owner not in replaced:
            facts = outcome.tiling["slide"]
            holders.setdefault(facts["fingerprint"], []).append((facts.get("spots"), path, owner))
            sizes[facts["bytes"]] += 1
    # Links last: of a file and a link to it, the file is tiled.
    new = sorted(new, key=lambda file: jobs[file].path.is_symlink())
    size_of = dict(zip(new, pool.map(lambda file: _size(jobs[file]), new), strict=True))
    sizes.update(size for size in size_of.values() if size is not None)
    alike = [file for file in new if sizes[size_of[file]] > 1]
    twins, taken = Twins(), dict[Path, str]()
    for file, prints in zip(alike, pool.map(lambda file: _prints(jobs[file]), alike), strict=True):
        if prints is None:
            continue
        sampled, spots = prints
        for known_spots, path, owner in holders.get(sampled, ()):
            if known_spots not in (None, spots):
                continue
            owner = owner or taken.get(path, "")
            if owner:
                twins.of[file] = owner, jobs[owner].slide
            elif _named_anew(known.get(file), files_of[path], archive) or _is_gone(known.get(files_of[path])):
                taken[path] = file
                twins.moved[file] = path
            else:
                twins.of[file] = f"{files_of[path]}, which is tiled as {path.name}", _name_of(path, tiles)
            break
        else:
            holders.setdefault(sampled, []).append((spots, jobs[file].zip_path, file))
    return twins


def _size(job: TileJob) -> int | str | None:
    try:
        return size_mark(job.path.stat().st_size, job.key)
    except OSError:
        return None


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
        tiling["slide"] = {**tiling["slide"], "file": job.file}
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
