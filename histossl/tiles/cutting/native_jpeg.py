"""Take tiles from a slide's own JPEG tiles: as bytes where the grids coincide, decoded once where they do not.

A JPEG tile of a TIFF is an abbreviated file: its tables stand once per level, and what its three components mean
(RGB or YCbCr) stands in a TIFF tag. `Splicer` makes it whole, so that any JPEG decoder gives the scanner's pixels,
and leaves out whatever else a scanner wrote into it (EXIF, comments, ICC): that may name a patient.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from histossl.core.errors import SlideError
from histossl.slides.grid import decodable
from histossl.slides.reading.tiff.codestream import YCBCR, read_jpeg
from histossl.slides.reading.tifffile_backend import NativeLevel

Pixels = NDArray[np.uint8]

SHRINKS = (8, 4, 2, 1)  # what a JPEG decoder can do on the way, nearly for free
# Decoded at 1/2, a slide of 0.2527 mpp is at 0.5054: for tiles at 0.5 that is enough, one hundredth is interpolated.
ENOUGH = 1.05
CACHE_BYTES = 96 << 20  # of decoded native tiles, at most
GLASS = 255

_SOI, _EOI, _SOS, _APP0, _APP15, _COM = 0xD8, 0xD9, 0xDA, 0xE0, 0xEF, 0xFE
_DHT = 0xC4
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive: what every decoder reads
_NOT_FRAMES = (0xC4, 0xC8, 0xCC)  # of C0-CF: Huffman tables, reserved, arithmetic conditioning
_BETWEEN_SCANS = (_SOS, 0xC4, 0xDB, 0xDD)  # with Huffman tables, quantisation tables, restart intervals
_STRAY_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")
_LOST_SECTOR = bytes(64)  # a run of zeros that no JPEG has, unless its tables write flat blocks as zeros


class DamagedTile(ValueError):
    pass


class Splicer:
    """Whole JPEG files from the abbreviated ones of one level."""

    def __init__(self, level: NativeLevel) -> None:
        self._size = (level.tile_height_px, level.tile_width_px)
        tables = level.jpeg_tables or b""
        self._tables = b"".join(_kept_segments(tables, 2)[0]) if tables else b""
        self._tag, self._by_pixels = level.photometric, level.by_pixels
        self._heads: dict[bytes, bytes] = {}

    def whole(self, tile: bytes) -> bytes:
        """The tile as a JPEG file. DamagedTile if it cannot be one; its compressed pixels are only glanced at."""
        head, scan_start, end = self._parts(tile)
        start = scan_start + 2 + int.from_bytes(tile[scan_start + 2 : scan_start + 4], "big")
        # Between pixels only an escaped 0xFF or a restart may stand; else it is progressive, or has a second end.
        strays = _STRAY_MARKER.search(tile, start, end - 2) is not None
        jpeg = head + (_scans(tile, scan_start) if strays else tile[scan_start:end])
        if strays:
            decoded(jpeg, self._size)
        return jpeg

    def to_decode(self, tile: bytes) -> bytes:
        """The same for a tile that is decoded at once and not kept: the decoder will tell what is wrong with it."""
        head, scan_start, end = self._parts(tile)
        return head + tile[scan_start:end]

    def _parts(self, tile: bytes) -> tuple[bytes, int, int]:
        """A whole header, and where in the tile the scans start and end."""
        scan_start = tile.find(b"\xff\xda")
        head = self._heads.get(tile[:scan_start]) if scan_start > 0 else None
        if head is None:
            segments, scan_start = _kept_segments(tile, 2)
            self._check_frame(segments)
            head = b"".join([b"\xff\xd8", self._adobe(tile), self._tables, *segments])
            if len(self._heads) < 64 and tile.find(b"\xff\xda") == scan_start:
                self._heads[tile[:scan_start]] = head
        end = tile.rfind(b"\xff\xd9") + 2
        if end < scan_start + 4:
            raise DamagedTile("it has no end")
        if tile.find(_LOST_SECTOR, scan_start, end) >= 0 and not _writes_zeros(head):
            raise DamagedTile("some of it is zeros")
        return head, scan_start, end

    def _adobe(self, tile: bytes) -> bytes:
        """Adobe's marker is the one way to say "RGB, not YCbCr" that every decoder knows."""
        stream = read_jpeg(tile)
        colours = stream.colours(self._tag, self._by_pixels) if stream is not None else self._tag
        return b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([colours == YCBCR])

    def _check_frame(self, segments: list[bytes]) -> None:
        frames = [one for one in segments if 0xC0 <= one[1] <= 0xCF and one[1] not in _NOT_FRAMES]
        if len(frames) != 1 or frames[0][1] not in _FRAMES or len(frames[0]) < 10:
            raise DamagedTile("not one JPEG frame")
        frame = frames[0]
        size = (int.from_bytes(frame[5:7], "big"), int.from_bytes(frame[7:9], "big"))
        if frame[4] != 8 or frame[9] != 3 or size != self._size:
            raise DamagedTile(f"{size[1]} x {size[0]} px, {frame[9]} colours of {frame[4]} bits")


def _kept_segments(data: bytes, start: int) -> tuple[list[bytes], int]:
    """The marker segments from `start` on, without APPn and comments; and where the scan starts (or the data end)."""
    if data[:2] != b"\xff\xd8":
        raise DamagedTile("not a JPEG")
    kept: list[bytes] = []
    position = start
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            raise DamagedTile("its header is garbled")
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == _SOS:
            return kept, position
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if not (_APP0 <= marker <= _APP15 or marker == _COM):
            kept.append(data[position:end])
        position = end
    if data[-2:] != b"\xff\xd9":
        raise DamagedTile("its header is cut short")
    return kept, len(data)


def _writes_zeros(head: bytes) -> bool:
    """Whether a run of zeros may be flat blocks: in all Huffman tables of AC coefficients, 0 says "no more of them"."""
    position, first_symbols = 2, list[int]()
    while position + 4 <= len(head):
        end = position + 2 + int.from_bytes(head[position + 2 : position + 4], "big")
        if head[position + 1] == _DHT:
            at = position + 4
            while at + 17 < end:
                first_symbols += [head[at + 17]] if head[at] >> 4 else []
                at += 17 + sum(head[at + 1 : at + 17])
        position = end
    return not any(first_symbols)


def _scans(tile: bytes, position: int) -> bytes:
    """All scans from the first on, with the tables between them, up to the first end; APPn and comments left out."""
    kept: list[bytes] = []
    while position + 4 <= len(tile) or tile[position : position + 2] == b"\xff\xd9":
        if tile[position : position + 2] == b"\xff\xff":  # fill byte
            position += 1
            continue
        marker = tile[position + 1]
        if marker == _EOI:
            return b"".join([*kept, b"\xff\xd9"])
        end = position + 2 + int.from_bytes(tile[position + 2 : position + 4], "big")
        if marker == _SOS:
            found = _STRAY_MARKER.search(tile, end)
            if found is None:
                break
            end = found.start()
        if marker in _BETWEEN_SCANS:
            kept.append(tile[position:end])
        elif not (_APP0 <= marker <= _APP15 or marker == _COM):
            raise DamagedTile("its pixels are garbled")
        if tile[end : end + 1] != b"\xff":
            raise DamagedTile("its pixels are garbled")
        position = end
    raise DamagedTile("it has no end")


def decoded(jpeg: bytes, size: tuple[int, int], shrink: int = 1, grey: bool = False) -> Pixels:
    """RGB (h, w, 3), or grey (h, w), of a JPEG of `size` (height, width) in pixels; DamagedTile if it is not whole.

    Grey takes two thirds of the time of colour.
    """
    height, width = size[0] // shrink, size[1] // shrink
    colours = "GRAY" if grey else "RGB"
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(jpeg, colours, min_height=height, min_width=width, min_factor=shrink)
    except ValueError as error:
        raise DamagedTile(str(error)) from error
    if pixels.shape[:2] != (height, width):
        raise DamagedTile(f"decodes to {pixels.shape[1]} x {pixels.shape[0]} px")
    return pixels[..., 0] if grey else pixels


class NativeTiles:
    """The JPEG tiles of one level of a slide, by column and row. Close it, or use it in a `with`.

    `keep` decoded tiles are remembered: as many as will be asked for again, since a small cache is a fast one.
    """

    def __init__(self, path: Path, level: NativeLevel, shrink: int = 1, keep: int = 16) -> None:
        assert decodable(level)
        self.path, self.level, self.shrink = path, level, shrink
        self.tile_width_px, self.tile_height_px = level.tile_width_px // shrink, level.tile_height_px // shrink
        self.downsample = level.downsample * shrink  # of the pixels that `read` gives
        self._splicer = Splicer(level)
        self.byte_counts = np.array(level.byte_counts, np.int64)
        self._cache: OrderedDict[int, Pixels | None] = OrderedDict()
        self._cache_size = max(1, min(keep, CACHE_BYTES // (3 * self.tile_width_px * self.tile_height_px)))
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise SlideError(f"{path.name}: cannot be opened ({error.strerror})") from error

    def __enter__(self) -> NativeTiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._cache.clear()

    def jpeg(self, column: int, row: int) -> bytes | None:
        """One tile as a JPEG file; None if the slide leaves it out (glass). DamagedTile if it is not one."""
        tile = self._bytes(row * self.level.tiles_across + column)
        return None if tile is None else self._splicer.whole(tile)

    def grey(self, column: int, row: int) -> Pixels | None:
        """One tile in grey (h, w), at the scale that `read` gives; None if the slide leaves it out."""
        tile = self._bytes(row * self.level.tiles_across + column)
        size = (self.level.tile_height_px, self.level.tile_width_px)
        return None if tile is None else decoded(self._splicer.to_decode(tile), size, self.shrink, grey=True)

    def _bytes(self, number: int) -> bytes | None:
        length = self.level.byte_counts[number]
        if length == 0:
            return None
        try:
            tile = os.pread(self._descriptor, length, self.level.offsets[number])
        except OSError as error:
            raise DamagedTile(f"cannot be read ({error.strerror})") from error
        if len(tile) != length:
            raise DamagedTile("lies beyond the end of the file")
        return tile

    def read(self, left: int, top: int, width: int, height: int) -> Pixels:
        """A box of decoded pixels (in pixels of `downsample`), white outside the level. DamagedTile if one is."""
        left, top = left - self.level.corner_px[0] // self.shrink, top - self.level.corner_px[1] // self.shrink
        canvas = np.empty((height, width, 3), np.uint8)
        across, down = self.level.tiles_across, self.level.tiles_down
        tile_width, tile_height = self.tile_width_px, self.tile_height_px
        if left < 0 or top < 0 or left + width > self._width or top + height > self._height:
            canvas[:] = GLASS
        for row in range(max(0, top // tile_height), min(down, -(-(top + height) // tile_height))):
            y = row * tile_height
            y0, y1 = max(top, y), min(top + height, y + tile_height, self._height)
            for column in range(max(0, left // tile_width), min(across, -(-(left + width) // tile_width))):
                x = column * tile_width
                x0, x1 = max(left, x), min(left + width, x + tile_width, self._width)
                tile = self._tile(column, row)
                here = canvas[y0 - top : y1 - top, x0 - left : x1 - left]
                here[:] = GLASS if tile is None else tile[y0 - y : y1 - y, x0 - x : x1 - x]
        return canvas

    @property
    def _width(self) -> int:
        return -(-self.level.width_px // self.shrink)

    @property
    def _height(self) -> int:
        return -(-self.level.height_px // self.shrink)

    def _tile(self, column: int, row: int) -> Pixels | None:
        number = row * self.level.tiles_across + column
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        tile = self._bytes(number)
        size = (self.level.tile_height_px, self.level.tile_width_px)
        pixels = None if tile is None else decoded(self._splicer.to_decode(tile), size, self.shrink)
        self._cache[number] = pixels
        if len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return pixels


def best_shrink(level: NativeLevel, downsample: float) -> int:
    """How far the decoder may shrink a level's tiles for pixels of `downsample`: 1, 2, 4 or 8."""
    for shrink in SHRINKS:
        sides = (level.tile_width_px, level.tile_height_px, *level.corner_px)
        if not any(side % shrink for side in sides) and level.downsample * shrink <= downsample * ENOUGH:
            return shrink
    return 1
