"""All tiles of all zips as one memory-mapped table, so that any tile of an archive is one read away.

`workspace/tiles/index.npy` is a NumPy file of 32-byte rows, sorted by slide, with a JSON footer that NumPy ignores:
the slides, their scales, and size and time of every zip. It is rebuilt whenever a zip disagrees with the footer, is
replaced in one rename (processes that have the old one open keep it), and costs memory only for the pages in use.
Where it cannot be written (a copy that may only be read), it is built in a temporary file for as long as it is in use.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import struct
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from histossl.core import console
from histossl.core.errors import HistosslError, MismatchError, StoreError
from histossl.core.workspace import Workspace, file_stem, written_aside
from histossl.tiles.store.zip_store import Store, read_store, slide_of

ROW = np.dtype(
    {
        "names": ["offset", "length", "slide", "x_l0", "y_l0", "tissue", "region", "scale"],
        "formats": ["<u8", "<u4", "<u4", "<i4", "<i4", "<f2", "<u2", "u1"],
        "offsets": [0, 8, 12, 16, 20, 24, 26, 28],
        "itemsize": 32,
    }
)
Rows = npt.NDArray[np.void]
Numbers = Sequence[int] | npt.NDArray[np.integer[Any]]

MAX_OPEN_ZIPS = 64  # per process; the usual limit is 1024 handles, shared with everything else
_PAGES_KEPT = 512  # rows looked up before their pages are given back to the kernel (which keeps them cached)
MAY_NOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS)
_FOOTER = struct.Struct("<Q8s")
_MAGIC = b"HSTLIDX1"


class TileIndex:
    """Tile numbers 0 .. len-1 over all slides of a workspace. Threads may share one; workers may pickle or fork it."""

    def __init__(self, path: Path, expected_digest: str | None = None, built: Path | None = None) -> None:
        """`built` holds what could not be written to `path`."""
        self.path, self._built = path, built
        self.table: Rows = np.zeros(0, ROW)
        with (built or path).open("rb") as file:  # once: another process may rename a new index over it at any moment
            self._info, count, table_start = _read_footer(file)
            if count:
                self.table = np.memmap(file, ROW, "r", table_start, (count,))
        self.digest: str = self._info["digest"]
        if expected_digest not in (None, self.digest):
            raise StoreError(f"{path}: the tiles changed while they were in use; start the command again")
        self._stamps = [_stamp_of(entry) for entry in self._info["zips"]]
        # A slide that gave no tile keeps its zip (it says why), and is none to train on.
        self._zips: list[dict[str, Any]] = [entry for entry in self._info["zips"] if entry["tiles"]]
        self.slides: list[str] = [entry["slide"] for entry in self._zips]
        self.regions: list[str] = self._info["regions"]
        self.config: dict[str, Any] = self._info["config"]
        self.tile_px: int = self._info["tile_px"]
        self.mpps: list[float] = self._info["mpps"]
        self._starts = np.array([entry["start"] for entry in self._zips] + [count], np.int64)
        self._number_of = {slide: number for number, slide in enumerate(self.slides)}
        self._looked_up = 0
        self._fresh_handles()

    @classmethod
    def open(cls, workspace: Workspace) -> TileIndex:
        """The index of a workspace's tiles, built or rebuilt where it disagrees with the zips."""
        zips = find_zips(workspace.tiles)
        if not zips:
            raise StoreError(f"{workspace.tiles}: no tiles yet; make them with `histossl tile --slides DIR`")
        stamps = [_stamp(workspace.tiles, path) for path in zips]
        index = None
        try:
            index = cls(workspace.index)
            if index._stamps == stamps:
                return index._or_none()
        except (StoreError, OSError, ValueError, KeyError, struct.error):
            pass  # absent, damaged or of an older version: built anew from the zips
        try:
            _build(workspace.index, zips, stamps, index)
        except HistosslError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in MAY_NOT_WRITE:
                raise
            console.say(f"{error}; built in a temporary file, for this time alone")
            return cls._temporary(workspace.index, zips, stamps, index)._or_none()
        return cls(workspace.index)._or_none()

    @classmethod
    def _temporary(
        cls, path: Path, zips: list[Path], stamps: list[tuple[str, int, int]], before: TileIndex | None
    ) -> TileIndex:
        descriptor, name = tempfile.mkstemp(".npy", "histossl-index-")
        os.close(descriptor)
        built = Path(name)
        try:
            _build_into(built, path.parent, zips, stamps, before)
            index = cls(path, built=built)
        except BaseException:
            built.unlink(missing_ok=True)
            raise
        weakref.finalize(index, _discard, built, os.getpid())
        return index

    def _or_none(self) -> TileIndex:
        if not len(self):
            raise StoreError(f"{self.path.parent}: none of its slides gave a tile; archive.csv beside it says why")
        return self

    # ---- whole index

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def mpp(self) -> float:
        """Microns per pixel asked for; the finest where there are several scales."""
        return self.mpps[0]

    def tiles_of(self, slide: str) -> range:
        """Numbers of one slide's tiles."""
        number = self.slide_number(slide)
        return range(int(self._starts[number]), int(self._starts[number + 1]))

    def slide_number(self, slide: str) -> int:
        if slide not in self._number_of:
            raise StoreError(f"slide {slide!r} has no tiles in {self.path.parent}; run `histossl tile` for it")
        return self._number_of[slide]

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Tiles per slide, in the order of `slides`."""
        return np.diff(self._starts)

    def facts(self, slide: str) -> dict[str, Any]:
        """What tiling.json says of the slide (`mpp_l0`, `file`, ...), with `scales`: real mpp and size per scale."""
        facts: dict[str, Any] = self._zips[self.slide_number(slide)]["facts"]
        return facts

    # ---- some tiles

    def rows(self, numbers: Numbers) -> Rows:
        """Rows of the table, copied. Unlike indexing `table`, it gives the pages back, so memory stays flat."""
        wanted = np.asarray(numbers, np.int64)
        found: Rows = np.array(self.table[wanted])
        self._looked_up += len(wanted)
        if self._looked_up >= _PAGES_KEPT:
            self.release()
        return found

    def release(self) -> None:
        """Give the table's pages back to the kernel. Their content stays cached as long as memory allows."""
        self._looked_up = 0
        mapped = getattr(self.table, "_mmap", None)
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)

    def slide_of(self, numbers: Numbers) -> npt.NDArray[np.int64]:
        """Slide number (place in `slides`) of each tile."""
        found: npt.NDArray[np.int64] = np.searchsorted(self._starts, np.asarray(numbers), side="right") - 1
        return found

    def coords_l0(self, numbers: Numbers) -> npt.NDArray[np.int64]:
        """(n, 2): x and y of each tile's upper left corner in level-0 pixels."""
        rows = self.rows(numbers)
        return np.stack([rows["x_l0"], rows["y_l0"]], axis=1).astype(np.int64)

    def read(self, number: int) -> bytes:
        """One tile's JPEG."""
        return self.read_many([number])[0]

    def read_many(self, numbers: Numbers) -> list[bytes]:
        """JPEGs of some tiles, in the order asked for."""
        rows = self.rows(numbers)
        places = zip(*(rows[name].tolist() for name in ("slide", "offset", "length")), strict=True)
        return [self._jpeg(slide, offset, length) for slide, offset, length in places]

    def _jpeg(self, slide: int, offset: int, length: int) -> bytes:
        handle = self._handle(slide)
        try:
            jpeg = os.pread(handle.descriptor, length, offset)
        except OSError as error:
            raise StoreError(f"{handle.path}: cannot be read ({error.strerror})") from error
        if len(jpeg) != length or jpeg[:2] != b"\xff\xd8" or jpeg[-2:] != b"\xff\xd9":
            raise StoreError(
                f"{handle.path}: the tile at byte {offset} is damaged; delete the zip and run `histossl tile` again"
            )
        return jpeg

    # ---- open zips: a few at a time, each process its own

    def _fresh_handles(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._handles: OrderedDict[int, _Handle] = OrderedDict()

    def _handle(self, slide: int) -> _Handle:
        if self._process != os.getpid():  # after a fork the lock may be held by a thread that is not here
            self._fresh_handles()
        with self._lock:
            handle = self._handles.get(slide)
            if handle is None:
                handle = self._handles[slide] = _Handle(self.path.parent, self._zips[slide])
                if len(self._handles) > MAX_OPEN_ZIPS:
                    self._handles.popitem(last=False)  # closes when its last reader lets go
            self._handles.move_to_end(slide)
            return handle

    def __reduce__(self) -> tuple[type[TileIndex], tuple[Path, str, Path | None]]:
        return TileIndex, (self.path, self.digest, self._built)


class _Handle:
    """One open zip. It closes itself, so that no thread reads from a handle that another has closed."""

    def __init__(self, tiles: Path, entry: dict[str, Any]) -> None:
        self.path = tiles / f"{file_stem(entry['slide'])}.zip"
        try:
            self.descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be opened ({error.strerror}); was it moved or deleted?") from error
        status = os.fstat(self.descriptor)
        if (status.st_size, status.st_mtime_ns) != (entry["bytes"], entry["mtime_ns"]):
            raise StoreError(f"{self.path}: changed while its tiles were in use; start the command again")
        if hasattr(os, "posix_fadvise"):  # tiles are drawn at random: reading ahead would fetch what nobody wants
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


# ---- building


def find_zips(tiles: Path) -> list[Path]:
    """Every slide's zip under `tiles`, by slide name. Unfinished ones are hidden files and are left out."""
    found = [
        Path(folder, name)
        for folder, _, names in os.walk(tiles)
        for name in names
        if name.endswith(".zip") and not name.startswith(".")
    ]
    return sorted(found, key=lambda path: _stem_of(tiles, path))


def _stem_of(tiles: Path, path: Path) -> str:
    return path.relative_to(tiles).as_posix().removesuffix(".zip")


def _stamp(tiles: Path, path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return _stem_of(tiles, path), status.st_size, status.st_mtime_ns


def _stamp_of(entry: dict[str, Any]) -> tuple[str, int, int]:
    return file_stem(entry["slide"]), entry["bytes"], entry["mtime_ns"]


def _discard(built: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked process lets go of its copy, too
        built.unlink(missing_ok=True)


def _build(path: Path, zips: list[Path], stamps: list[tuple[str, int, int]], before: TileIndex | None) -> None:
    with written_aside(path) as aside:
        _build_into(aside, path.parent, zips, stamps, before)


def _build_into(
    path: Path, tiles: Path, zips: list[Path], stamps: list[tuple[str, int, int]], before: TileIndex | None
) -> None:
    """Write the index of `zips`. Rows of zips that did not change come from the index `before`."""
    known = {_stamp_of(entry): entry for entry in before._info["zips"]} if before else {}
    entries: list[dict[str, Any]] = []
    regions: list[str] = [""]
    start = number = 0
    with path.open("wb", buffering=1 << 20) as file:
        _write_header(file, 0)
        for zip_path, stamp in zip(zips, stamps, strict=True):
            old = known.get(stamp)
            if old is not None and before is not None:
                rows = before.rows(range(old["start"], old["start"] + old["tiles"]))
                entry, names = dict(old), before.regions
            else:
                store = read_store(zip_path)
                rows, entry, names = _rows_of(store), _entry_of(store, stamp), ["", *store.tiling["regions"]]
            regions += [name for name in names if name not in regions]
            rows["region"] = np.array([regions.index(name) for name in names], np.uint16)[rows["region"]]
            rows["slide"] = number
            entry |= {"start": start, "tiles": len(rows)}
            entries.append(entry)
            start += len(rows)
            number += len(rows) > 0
            file.write(rows.tobytes())
        _refuse_mixed(tiles, entries)
        footer = json.dumps({**_footer(entries), "regions": regions, "zips": entries}).encode()
        file.write(footer)
        file.write(_FOOTER.pack(len(footer), _MAGIC))
        file.seek(0)
        _write_header(file, start)


def _rows_of(store: Store) -> Rows:
    rows = np.zeros(len(store.table), ROW)
    for name in ("offset", "length", "x_l0", "y_l0", "tissue", "region", "scale"):
        rows[name] = store.table[name]
    return rows


def _entry_of(store: Store, stamp: tuple[str, int, int]) -> dict[str, Any]:
    tiling = store.tiling
    return {
        "slide": slide_of(stamp[0], tiling["slide"]),
        "bytes": stamp[1],
        "mtime_ns": stamp[2],
        "digest": store.digest,
        "config": tiling["config"],
        "tile_px": tiling["tile_px"],
        "facts": {**tiling["slide"], "scales": tiling["scales"]},
    }


def _refuse_mixed(tiles: Path, entries: list[dict[str, Any]]) -> None:
    first = entries[0]
    for entry in entries:
        mine, other = ({**each["config"], "tile_px": each["tile_px"]} for each in (entry, first))
        differ = [
            f"{name} {mine.get(name)!r} and {other.get(name)!r}" for name in other if mine.get(name) != other[name]
        ]
        if differ:
            raise MismatchError(
                f"{tiles}: {entry['slide']}.zip and {first['slide']}.zip were made with different settings "
                f"({'; '.join(differ)}); move one kind away, or tile into another --workspace"
            )


def _footer(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """What all zips share, said once; and the identity of the tile set."""
    digest = hashlib.sha256(json.dumps([[entry["slide"], entry["digest"]] for entry in entries]).encode())
    config = entries[0]["config"]
    return {
        "digest": digest.hexdigest()[:32],
        "config": config,
        "tile_px": entries[0]["tile_px"],
        "mpps": [config["mpp"], *config.get("coarser_mpp", ())],
    }


def _write_header(file: BinaryIO, count: int) -> None:
    """NumPy pads the header for growing counts, so writing it again with the real count does not change its length."""
    description = {"descr": np.lib.format.dtype_to_descr(ROW), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, description)


def _read_footer(file: BinaryIO) -> tuple[dict[str, Any], int, int]:
    """The footer, the number of rows, and the byte where they start."""
    np.lib.format.read_magic(file)
    (count,), _, dtype = np.lib.format.read_array_header_1_0(file)
    start = file.tell()
    end = file.seek(-_FOOTER.size, os.SEEK_END)
    length, magic = _FOOTER.unpack(file.read())
    if dtype != ROW or magic != _MAGIC or start + count * ROW.itemsize + length != end:
        raise StoreError("not a whole index")
    file.seek(end - length)
    info: dict[str, Any] = json.loads(file.read(length))
    return info, count, start
