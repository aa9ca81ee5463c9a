"""Where the rows of a TIFF's tiles and strips lie, proven by offsets and row bytes; byte counts alone are not enough.

Programs round byte counts up, leave them out, or set them to 0 where they wrote nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import SlideError

LIBTIFF_BYTES = 1024  # of which it asks whole multiples
HEADER_BYTES = 8  # no segment begins within a TIFF's header


def segment_size(page: Any) -> tuple[int, int]:
    """Width and height of a page's tiles or strips in pixels; the last strip may be lower."""
    if page.is_tiled:
        return int(page.tilewidth), int(page.tilelength)
    return int(page.imagewidth), max(1, min(int(page.rowsperstrip), int(page.imagelength)))


def segment_rows(page: Any, index: int) -> int:
    """Rows that one segment stores: all of a tile, what is left of the image in the last strip."""
    height = segment_size(page)[1]
    strips = max(1, -(-int(page.imagelength) // height))
    return height if page.is_tiled else min(height, int(page.imagelength) - index % strips * height)


def row_bytes(page: Any) -> int:
    """Bytes of one row of a segment, uncompressed."""
    samples = int(page.samplesperpixel) if int(page.planarconfig) == 1 else 1
    return -(-segment_size(page)[0] * samples * int(page.bitspersample) // 8)


def settle_byte_counts(page: Any) -> None:
    """Correct the byte counts of an uncompressed page: what follows its rows is padding; what is not told is computed.

    A count that is too small stays: that is damage.
    """
    facts = page.keyframe  # of which a further page of the same layout has no copy
    if int(facts.compression) != 1 or not isinstance(facts.bitspersample, int):
        return
    offsets, counts = page.dataoffsets, page.databytecounts
    due = [row_bytes(facts) * segment_rows(facts, index) for index in range(len(offsets))]
    untold = page is facts and 279 not in page.tags and 325 not in page.tags
    if untold or (not any(counts) and all(offset >= HEADER_BYTES for offset in offsets)):
        counts = due
    if len(counts) == len(due):
        page.databytecounts = tuple(min(int(count), one) for count, one in zip(counts, due, strict=True))


def refused_by_libtiff(page: Any) -> bool:
    """Whether libtiff, and with it OpenSlide, fails on the last uncompressed tile: one of odd size, or with padding."""
    if not page.is_tiled or int(page.compression) != 1:
        return False
    due = row_bytes(page) * int(page.tilelength)
    return due % LIBTIFF_BYTES != 0 or int(np.max(page.tags.valueof(325, 0))) > due


def has_plain_rows(page: Any) -> bool:
    """Whether its rows can be read where they lie, without a decoder."""
    storage = (int(page.compression), int(page.planarconfig), int(page.predictor), int(page.fillorder))
    return not page.is_tiled and storage == (1, 1, 1, 1) and page.bitspersample in (8, 16)


def read_plain_rows(page: Any, left: int, top: int, right: int, bottom: int) -> NDArray[Any] | None:
    """(h, w, samples) of a box within one strip of such a page; None if the file leaves the strip out."""
    samples, height = int(page.samplesperpixel), segment_size(page)[1]
    strip = top // height
    assert (bottom - 1) // height == strip, (top, bottom, height)
    offset, count = int(page.dataoffsets[strip]), int(page.databytecounts[strip])
    if not count:
        return None
    pixel, stride = samples * page.dtype.itemsize, row_bytes(page)
    check_place(page, strip)
    file, data = page.parent.filehandle, bytearray()
    for row in range(top - strip * height, bottom - strip * height):
        file.seek(offset + row * stride + left * pixel)
        data += file.read((right - left) * pixel)
    if len(data) != (bottom - top) * (right - left) * pixel:
        raise SlideError(f"{file.name}: ends in the middle of its image; copy or download it again")
    dtype = page.dtype.newbyteorder(page.parent.byteorder)
    return np.frombuffer(data, dtype).reshape(bottom - top, right - left, samples)


def check_place(page: Any, index: int) -> None:
    """SlideError if a segment cannot be where the directory says, or is too short for its rows."""
    wrong = _wrong_place(page, index)
    if wrong:
        raise SlideError(f"{page.parent.filehandle.name}: damaged: its piece {index} {wrong}")


def misplaced(page: Any) -> Iterator[str]:
    """Of each segment that cannot be right, what is wrong with it."""
    if int(page.keyframe.compression) == 1 or min(page.dataoffsets, default=HEADER_BYTES) < HEADER_BYTES:
        yield from filter(None, (_wrong_place(page, index) for index in range(len(page.dataoffsets))))


def _wrong_place(page: Any, index: int) -> str:
    facts, offset, count = page.keyframe, int(page.dataoffsets[index]), int(page.databytecounts[index])
    if count and offset < HEADER_BYTES:
        return "is said to lie in the file's header"
    if not count or int(facts.compression) != 1:
        return ""
    (width, _), rows, least = segment_size(facts), segment_rows(facts, index), row_bytes(facts)
    if facts.is_tiled:  # some programs cut the last tiles to the image
        across, down = -(-int(facts.imagewidth) // width), -(-int(facts.imagelength) // rows)
        row, column = divmod(index % (across * down), across)
        rows = min(rows, int(facts.imagelength) - row * rows)
        least = least * min(width, int(facts.imagewidth) - column * width) // width
    return f"holds {count} of {rows * least} bytes" if count < rows * least else ""
