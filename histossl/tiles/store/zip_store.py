"""One zip of JPEG tiles per slide: written whole or not at all, opened by any file manager, read by byte offset.

The tiles are stored (not deflated) under names that are their place: `x_y.jpg`, the upper left corner in level-0
pixels; a store of several scales has one folder per scale (`0.5/x_y.jpg`). Two more members come last:

    tiles.npy      the same places with byte offset, length, tissue share and region class, for the index
    tiling.json    the whole tiling config, the slide's facts and fingerprint, and how many tiles each filter took

The zip's comment says where these two lie, so that a zip of 100,000 tiles is indexed by two reads instead of by
parsing its directory. Nothing in a zip depends on the clock: the same slide and settings give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from histossl.core.errors import MismatchError, StoreError
from histossl.core.workspace import file_stem, written_aside

# One tile of one zip. `scale` counts through the store's scales, `region` through its region classes (0: none).
TILE = np.dtype(
    [
        ("offset", "<u8"),
        ("length", "<u4"),
        ("x_l0", "<i4"),
        ("y_l0", "<i4"),
        ("crc", "<u4"),
        ("tissue", "<f2"),
        ("region", "<u2"),
        ("scale", "u1"),
    ]
)
TileTable = npt.NDArray[np.void]

TABLE_NAME = "tiles.npy"
TILING_NAME = "tiling.json"
FORMAT = 1  # of the zip; a store of another format is refused, never guessed at

# ---- the zip format (APPNOTE 6.3): local header, central directory, end of directory, and their 64-bit forms
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<4sIQI")
_MIDNIGHT_1980 = 0x21  # the earliest date that a zip can hold: no tile remembers when it was made
_MAX_32, _MAX_16 = 0xFFFFFFFF, 0xFFFF


@dataclass(frozen=True)
class Store:
    """What a zip says about itself. `table` is sorted by scale, then y, then x."""

    path: Path
    tiling: dict[str, Any]
    table: TileTable
    digest: str


class StoreWriter:
    """Adds tiles to one new zip. Use through `new_store`."""

    def __init__(self, file: BinaryIO, scales: Sequence[float]) -> None:
        self._file = file
        self._prefixes = [f"{scale_name(mpp)}/" for mpp in scales] if len(scales) > 1 else [""]
        self._position = 0
        self._directory = bytearray()
        self._members = 0
        self._tiles = bytearray()
        self._finished = False
        self._crc32 = _fast_crc32()

    @property
    def num_tiles(self) -> int:
        return len(self._tiles) // TILE.itemsize

    @property
    def num_bytes(self) -> int:
        return self._position

    def digest(self) -> str:
        """Identity of the tiles added so far."""
        return digest_of(self._table())

    def _table(self) -> TileTable:
        return in_order(np.frombuffer(bytes(self._tiles), TILE))

    def add(self, x_l0: int, y_l0: int, jpeg: bytes, tissue: float = 1.0, scale: int = 0, region: int = 0) -> None:
        name = f"{self._prefixes[scale]}{x_l0}_{y_l0}.jpg"
        offset, crc = self._member(name, jpeg)
        self._tiles += _row(offset, len(jpeg), x_l0, y_l0, crc, tissue, region, scale)

    def finish(self, tiling: Mapping[str, Any]) -> None:
        """Write tiles.npy, tiling.json and the directory. After this the zip is complete.

        `tiling` needs `tile_px`, `scales` (a list of {"name", "mpp", ...}), `config`, `slide` and `regions`.
        """
        table = self._table()
        places = [self._member(TABLE_NAME, _npy(table)) + (self._last_length,)]
        text = json.dumps({"format": FORMAT, **tiling, "digest": digest_of(table)}, indent=1, sort_keys=False)
        places.append(self._member(TILING_NAME, text.encode()) + (self._last_length,))
        directory_start = self._position
        comment = json.dumps({"histossl": FORMAT, "directory": directory_start, "members": places}).encode()
        self._file.write(self._directory)
        self._file.write(_end_of_directory(self._members, len(self._directory), directory_start, comment))
        self._finished = True

    def _member(self, name: str, data: bytes) -> tuple[int, int]:
        """Append one stored member; returns where its bytes start, and their checksum."""
        raw, crc, size = name.encode("ascii"), self._crc32(data), len(data)
        start = self._position
        sizes = (0, 0, 0, _MIDNIGHT_1980, crc, size, size, len(raw))
        self._file.write(_LOCAL.pack(b"PK\x03\x04", 20, *sizes, 0) + raw)
        self._file.write(data)
        extra, start_32 = b"", start
        if start >= _MAX_32:
            extra, start_32 = struct.pack("<2HQ", 1, 8, start), _MAX_32
        self._directory += _CENTRAL.pack(
            b"PK\x01\x02", 45 if extra else 20, 45 if extra else 20, *sizes, len(extra), 0, 0, 0, 0, start_32
        )
        self._directory += raw + extra
        self._members += 1
        offset = start + _LOCAL.size + len(raw)
        self._position = offset + size
        self._last_length = size
        return offset, crc


@contextmanager
def new_store(path: Path, scales: Sequence[float]) -> Iterator[StoreWriter]:
    """A zip in the making. It appears at `path` only if the block ends well and called `finish`."""
    with written_aside(path) as aside:
        with aside.open("wb", buffering=1 << 20) as file:
            writer = StoreWriter(file, scales)
            yield writer
        assert writer._finished, "new_store left without finish()"


def read_store(path: Path) -> Store:
    """Table and tiling.json of a zip. StoreError says what is wrong with it and how to get it back."""
    try:
        with path.open("rb") as file:
            places = _own_places(file)
            if places is None:
                return _read_by_directory(path)
            members = [_checked(file, place) for place in places]
            tiling = json.loads(members[1])
            _refuse_other_format(path, tiling.get("format"))
            table = in_order(np.load(io.BytesIO(members[0]), allow_pickle=False))
    except MismatchError:
        raise  # a ValueError, too
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise _damaged(path, str(error)) from error
    if table.dtype != TILE or tiling.get("format") != FORMAT:
        raise _damaged(path, "its table is not one of tiles")
    return Store(path, tiling, table, tiling["digest"])


def read_tiling(path: Path) -> dict[str, Any]:
    """tiling.json alone: a few kB of a zip whose table of tiles may be megabytes, which `read_store` checks."""
    try:
        with path.open("rb") as file:
            places = _own_places(file)
            if places is None:
                return _read_by_directory(path).tiling
            tiling: dict[str, Any] = json.loads(_checked(file, places[1]))
            _refuse_other_format(path, tiling.get("format"))
    except MismatchError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise _damaged(path, str(error)) from error
    if tiling.get("format") != FORMAT:
        raise _damaged(path, "it does not say its format")
    return tiling


def slide_of(stem: str, facts: Mapping[str, Any]) -> str:
    """The slide's id that a zip named `stem` is of, by its tiling.json: whole, where a disk allows no name so long."""
    name = facts.get("name")
    return name if isinstance(name, str) and file_stem(name) == stem else stem


def scale_name(mpp: float) -> str:
    """0.5 -> "0.5", 2.0 -> "2": the folder of a scale in a zip of several."""
    return f"{mpp:g}"


def digest_of(table: TileTable) -> str:
    """Identity of the tiles themselves: their places and bytes, whatever the zip's name or layout."""
    kept = ["scale", "x_l0", "y_l0", "length", "crc"]
    columns = b"".join(np.ascontiguousarray(table[name]).tobytes() for name in kept)
    return hashlib.sha256(columns).hexdigest()[:32]


def in_order(table: TileTable) -> TileTable:
    return table[np.lexsort((table["x_l0"], table["y_l0"], table["scale"]))]


# ---- details

_row_struct = struct.Struct("<QIiiIeHB")
assert _row_struct.size == TILE.itemsize


def _fast_crc32() -> Callable[[bytes], int]:
    """zlib-ng's checksum takes a tenth of zlib's time, which is a third of the time that copying a tile takes."""
    try:
        import imagecodecs

        if imagecodecs.zlibng_crc32(b"histossl") == zlib.crc32(b"histossl"):
            fast: Callable[[bytes], int] = imagecodecs.zlibng_crc32
            return fast
    except (ImportError, AttributeError):  # left out of this build of imagecodecs
        pass
    return zlib.crc32


def _row(*values: float) -> bytes:
    return _row_struct.pack(*values)


def _npy(table: TileTable) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, table, allow_pickle=False)
    return buffer.getvalue()


def _end_of_directory(members: int, size: int, start: int, comment: bytes) -> bytes:
    long_form = b""
    if members >= _MAX_16 or start >= _MAX_32 or size >= _MAX_32:
        long_form = _END_64.pack(b"PK\x06\x06", 44, 45, 45, 0, 0, members, members, size, start)
        long_form += _LOCATOR_64.pack(b"PK\x06\x07", 0, start + size, 1)
    counts = (min(members, _MAX_16), min(members, _MAX_16), min(size, _MAX_32), min(start, _MAX_32))
    return long_form + _END.pack(b"PK\x05\x06", 0, 0, *counts, len(comment)) + comment


def _own_places(file: BinaryIO) -> list[list[int]] | None:
    """Where tiles.npy and tiling.json lie (offset, checksum, length), by the zip's comment.

    None where another program has rewritten the zip.
    """
    file.seek(0, io.SEEK_END)
    size = file.tell()
    file.seek(max(0, size - 4096))
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) < end + _END.size:
        raise ValueError("its end is missing")
    fields = _END.unpack_from(tail, end)
    text = tail[end + _END.size :]
    if len(text) != fields[7]:
        raise ValueError("its end is missing")
    try:
        comment = json.loads(text)
        directory, members = comment["directory"], comment["members"]
    except (ValueError, KeyError, TypeError):
        return None
    _refuse_other_format(Path(file.name), comment.get("histossl"))
    if fields[6] != min(directory, _MAX_32):
        return None
    if len(members) != 2 or any(offset + length > directory for offset, _, length in members):
        raise ValueError("its end is garbled")
    places: list[list[int]] = members
    return places


def _checked(file: BinaryIO, place: Sequence[int]) -> bytes:
    offset, crc, length = place
    file.seek(offset)
    data = file.read(length)
    if zlib.crc32(data) != crc:
        raise ValueError("its table of tiles does not match its checksum")
    return data


_TILE_NAME = re.compile(r"(?:(?P<mpp>[0-9.e+-]+)/)?(?P<x>-?\d+)_(?P<y>-?\d+)\.jpg")


def _read_by_directory(path: Path) -> Store:
    """A zip that someone repacked (deleted tiles by hand, say): places from the names, the rest from tiles.npy."""
    rows = []
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        names = set(archive.namelist())
        if not {TILING_NAME, TABLE_NAME} <= names:
            raise ValueError(f"holds no {TILING_NAME} and {TABLE_NAME}")
        tiling = json.loads(archive.read(TILING_NAME))
        _refuse_other_format(path, tiling.get("format"))
        before = np.load(io.BytesIO(archive.read(TABLE_NAME)), allow_pickle=False)
        known = {(int(row["scale"]), int(row["x_l0"]), int(row["y_l0"])): row for row in before}
        scales = {scale["name"]: number for number, scale in enumerate(tiling["scales"])}
        for member in archive.infolist():
            match = _TILE_NAME.fullmatch(member.filename)
            if match is None:
                continue
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is compressed; tiles must be stored")
            place = (scales[match["mpp"]] if match["mpp"] else 0, int(match["x"]), int(match["y"]))
            if place not in known:
                raise ValueError(f"{member.filename} was added from outside")
            file.seek(member.header_offset)
            local = _LOCAL.unpack(file.read(_LOCAL.size))
            offset = member.header_offset + _LOCAL.size + local[9] + local[10]
            row = known[place].copy()
            row["offset"], row["length"], row["crc"] = offset, member.file_size, member.CRC
            rows.append(row)
    table = in_order(np.array(rows, TILE))
    return Store(path, tiling, table, digest_of(table))


def _refuse_other_format(path: Path, told: object) -> None:
    """A zip of another histossl is whole, and hours of work: no damaged one, which `tile` would make anew."""
    if isinstance(told, int) and told != FORMAT:
        raise MismatchError(
            f"{path}: a tile zip of format {told}, and this histossl knows {FORMAT}; use the histossl that made it, or "
            "another --workspace"
        )


def _damaged(path: Path, reason: str) -> StoreError:
    return StoreError(
        f"{path}: damaged tile zip ({reason}); delete it and run `histossl tile` again, which makes it anew"
    )
