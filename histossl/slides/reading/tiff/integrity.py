"""What a TIFF can know of its own damage: sizes that do not add up, places that overlap, warnings of its decoders.

What it cannot know is a change that keeps all sizes, in pixels stored without a checksum (uncompressed, LZW, PackBits,
JPEG 2000): there only another level of the slide tells.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import simplejpeg
from numpy.typing import NDArray

HEADER_BYTES = 8
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
GLANCE = 8  # a JPEG decoder reads all of its bytes for a picture at 1/8
SLACK_BYTES = 64  # that a writer may count too many for a tile
HABIT = 0.1  # share of the tiles that overlap from which on it is the writer's habit, and no damage
LENGTHS = {5: imagecodecs.lzw_decode, 32773: imagecodecs.packbits_decode}  # without a checksum, and of any length


def layout_damage(pages: Sequence[tuple[Any, Any]], segment_sizes: Sequence[tuple[int, int]], end: int) -> str:
    """What the directories tell of damage before any pixel is read: a copy that stopped, a size gone wild.

    `pages` are (first of its level, page); a further colour plane is laid out as the first, and tifffile keeps no
    second copy of that. `segment_sizes` are width and height of their tiles or strips, `end` is the file's size.
    """
    total = beyond = 0
    for (first, page), (width, height) in zip(pages, segment_sizes, strict=True):
        offsets, counts = _places(page)
        planes = int(first.samplesperpixel) if int(first.planarconfig) == 2 else 1
        due = -(-int(first.imagewidth) // width) * -(-int(first.imagelength) // height) * planes
        if not len(offsets) == len(counts) == due:
            size = f"{first.imagewidth} x {first.imagelength} px"
            return f"damaged: {size} take {due} tiles, it lists {len(offsets)}"
        total += len(offsets)
        beyond += int(np.sum((offsets + counts > end) & (counts > 0)))
    if beyond:
        return f"truncated: {beyond} of {total} tiles lie beyond the end of the file; copy or download it again"
    return ""


def overlapping(pages: Sequence[Any]) -> list[frozenset[int]]:
    """Per page the tiles (or strips) that lie in another one, in a directory or in the header: an offset went wild.

    Tiles that share all their bytes do so on purpose: blank ones.
    """
    starts, ends, owners, numbers = [np.zeros(1, np.int64)], [np.full(1, HEADER_BYTES)], [[-1]], [[-1]]
    for owner, page in enumerate(pages):
        offsets, counts = _places(page)
        kept = np.flatnonzero(counts)
        starts += [offsets[kept], np.array([page.offset])]
        ends += [offsets[kept] + np.maximum(counts[kept] - SLACK_BYTES, 1), np.array([page.offset + HEADER_BYTES])]
        owners += [[owner] * len(kept), [-1]]
        numbers += [kept.tolist(), [-1]]
    start, end, owner_of, number_of = (np.concatenate(each) for each in (starts, ends, owners, numbers))
    order = np.argsort(start, kind="stable")
    start, end, owner_of, number_of = start[order], end[order], owner_of[order], number_of[order]
    inside = np.flatnonzero((start[1:] < np.maximum.accumulate(end)[:-1]) & (start[1:] != start[:-1]))
    hit = np.unique(np.concatenate([inside, inside + 1]))
    if len(hit) > max(2, HABIT * len(start)):
        return [frozenset() for _ in pages]
    return [frozenset(number_of[hit[owner_of[hit] == owner]].tolist()) for owner in range(len(pages))]


def left_over(path: Path, levels: Sequence[Any], series: Sequence[Any]) -> int:
    """Bytes behind the last of all images of an uncompressed slide that belong to nothing: something was put in.

    Of other slides (pages of `levels`) 0: their writers leave gaps, and their decoders know better. `series` are all
    images of the file: of a stack ImageJ lists the first plane alone, and the others follow it.
    """
    if any(int(page.keyframe.compression) != 1 for page in levels):
        return 0
    held = [one for each in series for one in each.levels]
    pages = [page for one in held for page in one.pages if page is not None]
    last = max(int((offsets + counts).max()) for offsets, counts in map(_places, pages) if len(offsets))
    last = max(last, *(one.dataoffset + one.nbytes for one in held if one.dataoffset is not None), 0)
    if any(page.offset >= last for page in pages):
        return 0
    # Some programs write a long description last.
    tags = [tag for page in pages for tag in getattr(page, "tags", ())]
    last = max(last, *(tag.valueoffset + tag.valuebytecount for tag in tags))
    size = path.stat().st_size
    if size <= last:
        return 0
    with path.open("rb") as file:
        file.seek(last)
        tail = file.read(4096)
    return size - last if any(tail) else 0  # zeros are padding


def segment_damage(page: Any, data: bytes, shape: Sequence[int]) -> str:
    """What is wrong with one tile or strip of `shape` (height, width, samples) before it is decoded to pixels."""
    compression, bits = int(page.compression), page.bitspersample
    size = int(np.prod(shape)) * bits // 8 if isinstance(bits, int) and bits % 8 == 0 else 0
    if compression == 1 and len(data) < size:
        return f"holds {len(data):,} of its {size:,} bytes"
    if compression in LENGTHS and size:
        whole = size if page.is_tiled else int(page.rowsperstrip) * size // max(1, shape[0])
        length = len(LENGTHS[compression](data, out=max(size, whole) + 1))
        if length not in (size, whole):
            return f"unpacks to {length:,} bytes, not {size:,}"
    if compression == 7 and bits == 8:
        tables = getattr(page, "jpegtables", None)
        return jpeg_warning(bytes(tables[:-2]) + data[2:] if tables else data)
    return ""


def image_damage(path: Path, kind: str, mode: str) -> str:
    """What is wrong with a plain PNG or JPEG (`kind`, of Pillow's `mode`) that Pillow would decode without a word."""
    data = path.read_bytes()
    if kind == "JPEG":
        return jpeg_warning(data) if mode in ("L", "RGB") else ""
    position = len(PNG_MAGIC)
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        if zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return f"the checksum at byte {end:,} is not that of its content"
        if data[position + 4 : position + 8] == b"IEND":
            return ""
        position = end + 4
    return "it ends in the middle"


def jpeg_warning(data: bytes) -> str:
    """A decoder's warning that would else be lost: bytes left over or missing, a restart marker out of turn."""
    try:
        simplejpeg.decode_jpeg(data, "GRAY", min_factor=GLANCE, min_height=1, min_width=1)
    except ValueError as error:
        return str(error)
    return ""


def _places(page: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.asarray(page.dataoffsets, dtype=np.int64), np.asarray(page.databytecounts, dtype=np.int64)
