"""Read tiled and stripped TIFFs segment by segment with tifffile: what OpenSlide refuses, and native tiles as bytes.

A level is never read whole: only the tiles (or strips) under the wanted box are decoded, and the last ones kept.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile
from numpy.typing import NDArray

from histossl.core.errors import SlideError
from histossl.slides.reading.integrity import layout_damage, left_over, overlapping, segment_damage
from histossl.slides.reading.levels import not_levels
from histossl.slides.reading.mpp import (
    Scale,
    ome_pixels,
    scale_from,
    scale_from_imagej,
    scale_from_ome,
    scale_from_resolution,
)
from histossl.slides.reading.samples import Samples, check_samples
from histossl.slides.reading.segments import has_plain_rows, read_plain_rows, segment_size, settle_byte_counts
from histossl.slides.reading.series import SCANNERS, TiffImage, channel_names, choose, rgb_order

# tifffile reports oddities through logging; without a handler they would land in the middle of a progress bar.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

CACHE_BYTES = 64 << 20
MAX_SEGMENT_BYTES = 400 << 20  # a tile or strip while it is decoded: twice as stored (the decoder copies), once as RGB
RGB_ORDER = (0, 1, 2)
BAND = 256  # rows of it turned into RGB at a time

COMPRESSIONS = {
    1: "none",
    5: "LZW",
    6: "JPEG (old)",
    7: "JPEG",
    8: "deflate",
    32773: "PackBits",
    32946: "deflate",
    33003: "JPEG 2000",
    33005: "JPEG 2000",
    33004: "JPEG 2000",
    34712: "JPEG 2000",
    34887: "LERC",
    34925: "LZMA",
    34933: "PNG",
    34934: "JPEG XR",
    22610: "JPEG XR",
    50000: "Zstandard",
    50001: "WebP",
    50002: "JPEG XL",
    52546: "JPEG XL",
}
JPEG = "JPEG"


@contextmanager
def blaming(path: Path, doing: str) -> Iterator[None]:
    """Whatever a library raises over a damaged file becomes this slide's own error; the run goes on without it."""
    try:
        yield
    except SlideError:
        raise
    except MemoryError as error:
        raise SlideError(
            f"{path.name}: {doing} needs more memory than there is; the file is damaged or huge"
        ) from error
    except Exception as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise SlideError(f"{path.name}: {doing} failed ({said}); the file is damaged or of a kind not known") from error


@dataclass(frozen=True)
class NativeLevel:
    """One level as the file stores it: enough to copy its tiles as bytes. Offsets are row-major over the tile grid."""

    downsample: float
    width_px: int
    height_px: int
    tile_width_px: int
    tile_height_px: int
    compression: str
    photometric: str  # "RGB", "YCBCR", "MINISBLACK", ...: what the tag says; the JPEGs themselves may know better
    subsampling: tuple[int, int]
    jpeg_tables: bytes | None  # shared Huffman and quantisation tables, to be spliced into each tile
    offsets: tuple[int, ...]
    byte_counts: tuple[int, ...]
    by_pixels: str = ""  # RGB or YCBCR: what the pixels say where the JPEGs leave doubt
    corner_px: tuple[int, int] = (0, 0)  # where it lies on the slide's level: Leica's on a larger plane

    @property
    def tiles_across(self) -> int:
        return -(-self.width_px // self.tile_width_px)

    @property
    def tiles_down(self) -> int:
        return -(-self.height_px // self.tile_height_px)


class TiffLevels:
    """The levels of the slide's image in a TIFF; label and macro images are never decoded.

    `sizes` holds all that may be a level, until `levels.believe` has compared their pixels.
    """

    shape_slack = 0.0

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cache: OrderedDict[tuple[int, int, int], NDArray[np.uint8]] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()
        with blaming(path, "opening it as a TIFF"):
            self._tiff = tifffile.TiffFile(path)
            try:
                self._choose_series()
            except BaseException:
                self._tiff.close()
                raise

    def close(self) -> None:
        self._tiff.close()
        self._cache.clear()

    def _choose_series(self) -> None:
        chosen = choose(self.path, self._tiff)
        if chosen is None and self._cut_off():
            raise SlideError(
                f"{self.path.name}: truncated or damaged: what its header points to lies beyond the end of the file; "
                "copy or download it again"
            )
        if chosen is None and self._tiff.is_ome:
            raise SlideError(
                f"{self.path.name}: its OME-XML says that its pixels lie in other files, which are missing"
            )
        if chosen is None:
            raise SlideError(f"{self.path.name}: a TIFF without an image")
        names = self._channel_names(chosen.slide)
        order = rgb_order(names) if names else RGB_ORDER
        if order is None:
            told = ", ".join(map(repr, names))
            raise SlideError(f"{self.path.name}: its channels are {told}; histossl reads RGB or grey brightfield")
        self._unnamed = len(chosen.slide.pages) == 3 and not names
        self._levels = [_pages(self.path, chosen.slide, order)]
        self._images = [chosen.slide]
        full = chosen.slide.size  # of that size a scanner keeps focal planes alone
        self._others = [image for image in chosen.others if image.kind not in SCANNERS or image.size == full]
        for image in chosen.candidates:
            try:
                self._levels.append(_pages(self.path, image, order))
                self._images.append(image)
            except SlideError:  # what cannot be read as a slide is no level of one
                self._others.append(image)
        self._private = [image for image in chosen.private if image.kind not in SCANNERS]
        self.keep(range(len(self._levels)))
        page = self.pages[0]
        self.is_ome = bool(self._tiff.is_ome)
        self.is_qpi = bool(self._tiff.is_qpi)
        self.is_big = bool(self._tiff.is_bigtiff)
        self.compression = COMPRESSIONS.get(
            int(page.compression), str(getattr(page.compression, "name", page.compression))
        )
        self.tile_size = (int(page.tilewidth), int(page.tilelength)) if page.is_tiled else None
        self.in_strips = not page.is_tiled
        self.orientation = int(page.tags[274].value) if 274 in page.tags else 1

    def _channel_names(self, image: TiffImage) -> list[str]:
        """Of an image whose colours lie in three grey planes; empty if it says none, or is another one."""
        if len(image.pages) != 3 or not self._tiff.ome_metadata:
            return []
        return channel_names(ome_pixels(self._tiff.ome_metadata, *image.size, int(image.page.treeindex[0])))

    def _cut_off(self) -> bool:
        """Whether the first directory is missing. Aperio writes it behind the first image's tiles."""
        with self.path.open("rb") as file:
            head = file.read(16)
        start, length = (8, 8) if self._tiff.is_bigtiff else (4, 4)
        order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
        return int.from_bytes(head[start : start + length], order) >= self.path.stat().st_size

    def downsamples(self) -> tuple[float, ...]:
        return tuple(snapped_downsample(self.sizes[0], size) for size in self.sizes)

    def keep(self, levels: Sequence[int], strange: Sequence[int] = ()) -> None:
        """Leave out all other levels; the `strange` ones, since they show something else."""
        self._others += [self._images[level] for level in strange]
        self._levels = [self._levels[level] for level in levels]
        self._images = [self._images[level] for level in levels]
        self.sizes = tuple(image.size for image in self._images)
        self.pages = [pages[0] for pages in self._levels]
        self.samples = Samples(self.path, self._levels, self._tiff.ome_metadata or "", self._stored_bytes)
        self._cache.clear()
        self._cached_bytes = 0

    def warnings(self) -> list[str]:
        """What the file holds besides the slide, as far as that is not what each scanner writes."""
        slide = self._images[0]
        claims = [image.told for image in self._others if image.claims]
        rest = [image.told for image in self._others if not image.claims]
        more = " and others" if len(rest) > 3 else ""
        warnings = {
            slide.stack: bool(slide.stack),
            "its three grey channels have no names: read as red, green and blue": self._unnamed,
            not_levels(claims): bool(claims),
            f"of its images {slide.told} is used, not {', '.join(rest[:3])}{more}": bool(rest),
            "taken for label or macro images by their names, and not read: "
            + ", ".join(image.told for image in self._private): bool(self._private),
        }
        return [said for said, applies in warnings.items() if applies]

    def recover(self) -> None:
        """Nothing to do after a tile that cannot be read."""

    def busy_places(self) -> list[tuple[float, float]]:
        """Middles of tiles of level 0 that take many bytes, in shares of its sides: there is something to see."""
        page = self.pages[0]
        if not page.is_tiled or int(page.compression) == 1:
            return []
        width, height = self.sizes[0]
        across = -(-width // int(page.tilewidth))
        order = np.argsort(np.asarray(page.databytecounts, np.int64))[::-1]
        places = []
        for number in order[[0, len(order) // 20, len(order) // 8]].tolist():
            row, column = divmod(number, across)
            x, y = (column + 0.5) * int(page.tilewidth) / width, (row + 0.5) * int(page.tilelength) / height
            places.append((min(x, 1.0), min(y, 1.0)))
        return places

    def scale(self) -> Scale | None:
        """OME-XML first, then Aperio's header, then the resolution tags, which many programs fill with defaults."""
        with blaming(self.path, "reading its scale"):
            return self._scale()

    def _scale(self) -> Scale | None:
        page = self.pages[0]
        if self.is_ome and self._tiff.ome_metadata:
            scale = scale_from_ome(self._tiff.ome_metadata, *self.sizes[0], int(page.treeindex[0]))
            if scale is not None:
                return scale
        description = page.description or ""
        if description.startswith("Aperio"):
            for part in description.split("|"):
                key, _, value = part.partition("=")
                if key.strip() == "MPP":
                    scale = scale_from(value, value, "metadata (aperio)")
                    if scale is not None:
                        return scale
        if 282 in page.tags and 283 in page.tags:
            unit = int(page.tags[296].value) if 296 in page.tags else 2
            x, y = page.tags[282].value, page.tags[283].value
            named = str((self._tiff.imagej_metadata or {}).get("unit", "")) if unit == 1 else ""
            return scale_from_imagej(x, y, named) if named else scale_from_resolution(x, y, unit)
        return None

    def damage(self) -> str:
        """What the directories tell of damage before any pixel is read."""
        with blaming(self.path, "reading where its tiles lie"):
            pages = [(level[0], page) for level in self._levels for page in level]
            return layout_damage(pages, [segment_size(first) for first, _ in pages], self.path.stat().st_size)

    def doubt(self) -> str:
        """What looks wrong and can yet be read."""
        with blaming(self.path, "reading where its tiles lie"):
            extra = left_over(self.path, [page for level in self._levels for page in level], self._tiff.series)
        if not extra:
            return ""
        return (
            f"{extra:,} bytes at its end belong to nothing: something may have been put into its uncompressed pixels; "
            "compare it with another copy"
        )

    @cached_property
    def _overlapping(self) -> dict[int, frozenset[int]]:
        """Of each page (by where its directory lies) the tiles that lie in another one."""
        pages = [page for level in self._levels for page in level]
        return dict(zip((page.offset for page in pages), overlapping(pages), strict=True))

    # ---- pixels

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """(height, width, 3); white outside the level. x, y in the level's own pixels."""
        out = np.full((height, width, 3), 255, dtype=np.uint8)
        level_width, level_height = self.sizes[level]
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, level_width), min(y + height, level_height)
        if left >= right or top >= bottom:
            return out
        with self._lock, blaming(self.path, f"reading level {level} at {x}, {y}"):
            box = out[top - y : bottom - y, left - x : right - x]
            self._fill(level, left, top, right, bottom, box)
        return out

    def _fill(self, level: int, left: int, top: int, right: int, bottom: int, box: NDArray[np.uint8]) -> None:
        pages = self._levels[level]
        page = pages[0]
        width, height = segment_size(page)
        if len(pages) == 1 and has_plain_rows(page):
            for strip in range(top // height, -(-bottom // height)):
                y0, y1 = max(top, strip * height), min(bottom, (strip + 1) * height)
                stored = read_plain_rows(page, left, y0, right, y1)
                if stored is not None:  # else it is left out, and white
                    box[y0 - top : y1 - top] = self.samples.as_rgb(page, stored)
            return
        across = -(-int(page.imagewidth) // width)
        for row in range(top // height, -(-bottom // height)):
            for column in range(left // width, -(-right // width)):
                segment = self._segment(level, row * across + column)
                x, y = column * width, row * height
                x0, x1 = max(left, x), min(right, x + segment.shape[1])
                y0, y1 = max(top, y), min(bottom, y + segment.shape[0])
                if x0 < x1 and y0 < y1:
                    box[y0 - top : y1 - top, x0 - left : x1 - left] = segment[y0 - y : y1 - y, x0 - x : x1 - x]

    def _segment(self, level: int, index: int) -> NDArray[np.uint8]:
        """One tile or strip as RGB, decoded or from the cache. A tile that the file leaves out is white."""
        key = (level, index, 0)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        pages = self._levels[level]
        page = pages[0]
        planes = int(page.samplesperpixel) if int(page.planarconfig) == 2 else 1
        if planes > 1:
            step = len(page.dataoffsets) // planes
            parts = [self._decoded(page, plane * step + index) for plane in range(planes)]
        else:
            parts = [self._decoded(one, index) for one in pages]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            width, height = segment_size(page)
            rgb = np.full((height, width, 3), 255, dtype=np.uint8)
        else:
            height, width = known[0].shape[:2]
            rgb = np.empty((height, width, 3), dtype=np.uint8)
            for top in range(0, height, BAND):  # a copy on the way to RGB is as large as what it is made of
                band = [part[top : top + BAND] for part in known]
                rgb[top : top + BAND] = self.samples.as_rgb(
                    page, np.concatenate(band, axis=2) if len(band) > 1 else band[0]
                )
        self._cache[key] = rgb
        self._cached_bytes += rgb.nbytes
        while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return rgb

    def _decoded(self, page: Any, index: int) -> NDArray[Any] | None:
        data = self._stored_bytes(page, index)
        if data is None:
            return None
        damage = segment_damage(page.keyframe, data, self._shape_of(page.keyframe, index))
        if damage:
            raise SlideError(f"{self.path.name}: a tile {damage}; copy or download it again")
        return self.samples.decode(page, index, data)

    def _stored_bytes(self, page: Any, index: int) -> bytes | None:
        """A tile or strip as the file holds it; None if it is left out."""
        if not page.databytecounts[index]:
            return None
        if index in self._overlapping[page.offset]:
            raise SlideError(f"{self.path.name}: a tile lies in another one; copy or download it again")
        self._tiff.filehandle.seek(int(page.dataoffsets[index]))
        data: bytes = self._tiff.filehandle.read(int(page.databytecounts[index]))
        if len(data) != page.databytecounts[index]:
            raise SlideError(f"{self.path.name}: ends in the middle of a tile; copy or download it again")
        return data

    def _shape_of(self, page: Any, index: int) -> tuple[int, int, int]:
        """(height, width, samples) of what one tile or strip unpacks to."""
        width, height = segment_size(page)
        samples = 1 if int(page.planarconfig) == 2 else int(page.samplesperpixel)
        if not page.is_tiled:
            height = min(height, int(page.imagelength) - index % -(-int(page.imagelength) // height) * height)
        return height, width, samples

    # ---- native tiles

    def native_level(self, level: int) -> NativeLevel | None:
        """None if this level is not one plane of tiles."""
        if len(self._levels[level]) != 1:
            return None
        page = self.pages[level]
        if not page.is_tiled or int(page.planarconfig) != 1:
            return None
        return NativeLevel(
            downsample=snapped_downsample(self.sizes[0], self.sizes[level]),
            width_px=int(page.imagewidth),
            height_px=int(page.imagelength),
            tile_width_px=int(page.tilewidth),
            tile_height_px=int(page.tilelength),
            compression=COMPRESSIONS.get(int(page.compression), str(page.compression)),
            photometric=str(getattr(page.photometric, "name", page.photometric)),
            by_pixels=self.samples.by_pixels(page),
            subsampling=_subsampling(page),
            jpeg_tables=bytes(page.jpegtables) if page.jpegtables else None,
            offsets=tuple(int(one) for one in page.dataoffsets),
            byte_counts=tuple(int(one) for one in page.databytecounts),
        )

    @cached_property
    def native(self) -> tuple[NativeLevel | None, ...]:
        with blaming(self.path, "reading where its tiles lie"):
            return tuple(self.native_level(level) for level in range(len(self.sizes)))


def snapped_downsample(size_l0: tuple[int, int], size: tuple[int, int]) -> float:
    """Level 0 pixels per pixel of a level. Levels are rounded to whole pixels: 4.0007 means 4."""
    across, down = size_l0[0] / size[0], size_l0[1] / size[1]
    whole = round(across if size_l0[0] >= size_l0[1] else down)  # of a long side rounding changes little
    if whole >= 1 and all(abs(l0 / whole - px) < 1.0 for l0, px in zip(size_l0, size, strict=True)):
        return float(whole)
    return (across + down) / 2


def _pages(path: Path, level: TiffImage, order: Sequence[int]) -> list[Any]:
    """The one page of a level, or its three colour channels in this order; anything else is no brightfield slide."""
    page = level.page
    sizes = dict(zip(level.axes, level.shape, strict=True))
    depth = {axis: count for axis, count in sizes.items() if axis not in "XYSC" and count > 1}
    if depth:
        raise SlideError(
            f"{path.name}: a stack of {'x'.join(map(str, depth.values()))} images; export one plane as RGB"
        )
    check_samples(path, page)
    if int(page.compression) not in COMPRESSIONS:
        raise SlideError(f"{path.name}: TIFF compression {int(page.compression)} is not known; convert it")
    samples, channels = int(sizes.get("S", 1)), int(sizes.get("C", 1))
    if channels not in (1, 3) or (channels == 3 and samples != 1) or samples > 4:
        raise SlideError(
            f"{path.name}: {max(channels, samples)} channels (fluorescence?); histossl reads RGB or grey brightfield"
        )
    width, height = segment_size(page)
    segment_bytes = width * height * max(samples, channels) * page.dtype.itemsize
    if not has_plain_rows(page) and 2 * segment_bytes + 3 * width * height > MAX_SEGMENT_BYTES:
        raise SlideError(
            f"{path.name}: stored in pieces of {segment_bytes / 1e6:,.0f} MB, too large to read one by one; "
            "convert it: vips tiffsave in.tif out.tif --tile --pyramid --compression jpeg --Q 90"
        )
    if channels == 3 and len(level.pages) != channels:
        raise SlideError(f"{path.name}: says {channels} channels and holds {len(level.pages)}")
    pages = [level.pages[at] for at in order] if channels == 3 else [page]
    for each in pages:
        settle_byte_counts(each)
    return pages


def _subsampling(page: Any) -> tuple[int, int]:
    if page.photometric.name != "YCBCR":
        return 1, 1
    value = page.tags[530].value if 530 in page.tags else (2, 2)
    return int(value[0]), int(value[1])
