"""A TIFF as any program may have written it, tag for tag and byte for byte, right or wrong; and the tiles to put in."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[Any]
Tags = dict[int, tuple[int, Any] | None]

_TYPES = {1: "B", 2: "B", 3: "H", 4: "I", 5: "I", 12: "d", 16: "Q"}
_START_OF_SCAN = 0xDA


def tags(
    size: tuple[int, int],
    bits: Sequence[int] = (8, 8, 8),
    photometric: int = 2,
    compression: int = 1,
    tile: int | None = None,
    rows: int | None = None,
    mpp: float = 0.5,
    **more: tuple[int, Any],
) -> Tags:
    """Of an image of `size` (width, height). Further tags as t530=(3, [2, 2]): type and values."""
    per_cm = (5, [round(1e4 / mpp), 1])
    found: Tags = {256: (4, size[0]), 257: (4, size[1]), 258: (3, list(bits)), 259: (3, compression)}
    found |= {262: (3, photometric), 277: (3, len(bits)), 282: per_cm, 283: per_cm, 284: (3, 1), 296: (3, 3)}
    found |= {322: (4, tile), 323: (4, tile)} if tile else {278: (4, rows or size[1])}
    return found | {int(name[1:]): value for name, value in more.items()}


def write_raw(
    path: Path,
    *pages: tuple[Tags, Sequence[bytes | tuple[bytes, int]]],
    order: str = "<",
    big: bool = False,
    gap: int = 0,
    round_up: int = 1,
) -> Path:
    """Each page of its tags and its tiles or strips, in order.

    A tile comes with its byte count, or has that of its bytes, rounded up to `round_up` and really followed by so many
    bytes of padding. `gap` bytes lie before each. Tags of value None are left out.
    """
    word = "Q" if big else "I"
    room = struct.calcsize(word)
    out = bytearray(b"II" if order == "<" else b"MM")
    out += struct.pack(f"{order}3HQ", 43, 8, 0, 0) if big else struct.pack(f"{order}HI", 42, 0)
    link = room
    for given, segments in pages:
        offsets, counts = [], []
        for each in segments:
            data, count = each if isinstance(each, tuple) else (each, -(-len(each) // round_up) * round_up)
            out += b"\xa5" * gap
            offsets.append(len(out) if data else 0)
            counts.append(count)
            out += data + b"\xa5" * (count - len(data))
        places = (324, 325) if 322 in given else (273, 279)
        kind = 16 if big else 4
        found = {places[0]: (kind, offsets), places[1]: (kind, counts), **given}
        entries = b""
        for code, entry in sorted((code, entry) for code, entry in found.items() if entry is not None):
            kind, value = entry
            value = list(value.encode() + b"\0") if isinstance(value, str) else value
            values = value if isinstance(value, list) else [value]
            data = struct.pack(f"{order}{len(values)}{_TYPES[kind]}", *values)
            if len(data) > room:
                out += bytes(len(out) % 2)
                at, data = data, struct.pack(order + word, len(out))
                out += at
            entries += struct.pack(f"{order}2H{word}", code, kind, len(values) // (2 if kind == 5 else 1))
            entries += data.ljust(room, b"\0")
        out += bytes(len(out) % 2)
        struct.pack_into(order + word, out, link, len(out))
        out += struct.pack(order + ("Q" if big else "H"), len(entries) // (20 if big else 12)) + entries
        link = len(out)
        out += bytes(room)
    path.write_bytes(bytes(out))
    return path


def tiles(pixels: Pixels, side: int) -> list[Pixels]:
    """Whole tiles, row by row; those at the edge filled up with what is last."""
    height, width = (-(-length // side) * side for length in pixels.shape[:2])
    padded = np.pad(pixels, ((0, height - len(pixels)), (0, width - pixels.shape[1]), (0, 0)), mode="edge")
    return [padded[y : y + side, x : x + side] for y in range(0, height, side) for x in range(0, width, side)]


def strips(pixels: Pixels, rows: int) -> list[bytes]:
    return [pixels[top : top + rows].tobytes() for top in range(0, len(pixels), rows)]


# ---- JPEG


def jfif(pixels: Pixels, sampling: str = "4:4:4") -> bytes:
    """YCbCr, and a JFIF marker that says so."""
    return _pillow(pixels, subsampling=sampling)


def adobe_rgb(pixels: Pixels) -> bytes:
    """RGB, and Adobe's marker that says so."""
    return _pillow(pixels, keep_rgb=True)


def bare(jpeg: bytes, ids: bytes = b"\1\2\3") -> bytes:
    """Without any marker of an application, its components numbered by `ids`."""
    kept = [jpeg[:2]]
    for marker, segment, rest in _segments(jpeg):
        changed = bytearray(segment)
        if marker in (0xC0, 0xC1, 0xC2):
            changed[10::3] = ids
        elif marker == _START_OF_SCAN:
            changed[5 : 5 + 2 * len(ids) : 2] = ids
        kept += [bytes(changed) + rest] if not 0xE0 <= marker <= 0xEF else []
    return b"".join(kept)


def with_adobe(jpeg: bytes, transform: int) -> bytes:
    """With Adobe's marker in front, after whatever else is there."""
    return jpeg[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform]) + jpeg[2:]


def _pillow(pixels: Pixels, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def _segments(jpeg: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Marker, segment, and what follows the last of them."""
    position, marker = 2, 0
    while marker != _START_OF_SCAN:
        marker = jpeg[position + 1]
        end = position + 2 + int.from_bytes(jpeg[position + 2 : position + 4], "big")
        yield marker, jpeg[position:end], jpeg[end:] if marker == _START_OF_SCAN else b""
        position = end


# ---- JPEG 2000


def ycc(pixels: Pixels) -> Pixels:
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("YCbCr"))


def jpeg_2000(pixels: Pixels, mct: bool = False, boxed: bool = False, **options: Any) -> bytes:
    kind = "jp2" if boxed else "j2k"
    return imagecodecs.jpeg2k_encode(
        np.ascontiguousarray(pixels), level=0, codecformat=kind, mct=mct, reversible=True, **options
    )


def jpeg_2000_subsampled(pixels: Pixels) -> bytes:
    """YCbCr with chroma at half the width and height; of three codestreams, since no encoder at hand does it."""
    stored = ycc(pixels)
    half = np.asarray(Image.fromarray(stored).reduce(2))
    parts = [jpeg_2000(each, resolutions=1) for each in (stored[..., 0], half[..., 1], half[..., 2])]
    places = [(part.find(b"\xff\x90"), part.find(b"\xff\x93")) for part in parts]
    packets = b"".join(part[data + 2 : -2] for part, (_, data) in zip(parts, places, strict=True))
    start, data = places[0]
    head, tile = parts[0][:start], parts[0][start:data]
    size = struct.pack(">H", int.from_bytes(head[4:6], "big") + 6)
    components = struct.pack(">H", 3) + bytes([7, 1, 1, 7, 2, 2, 7, 2, 2])
    length = struct.pack(">I", len(tile) + 2 + len(packets))
    return b"".join(
        [
            head[:4],
            size,
            head[6:40],
            components,
            head[45:],
            tile[:6],
            length,
            tile[10:],
            b"\xff\x93",
            packets,
            b"\xff\xd9",
        ]
    )
