"""A slide's levels through OpenSlide; of those whose pixels it would shift, through tifffile."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import openslide
from numpy.typing import NDArray

from histossl.core.errors import SlideError
from histossl.slides.reading.levels import not_levels
from histossl.slides.reading.mpp import Scale, scale_from
from histossl.slides.reading.tifffile_backend import TiffLevels, blaming, snapped_downsample

CACHE_BYTES = 64 << 20  # of decoded native tiles: two rows of tiles under a wide read
PAGED_VENDORS = ("generic-tiff", "aperio")
VENDOR_SLACK = 0.05
CHECK_PX = 256  # side of the boxes that two libraries are compared on
MISREAD = "OpenSlide would show other colours than its tiles hold"
CHECK_LIMIT = 8.0  # grey levels between the mean colours of a box: the same pixels, shifted, differ by less than 1


class OpenSlideLevels:
    in_strips = False

    def __init__(self, path: Path, vendor: str) -> None:
        self.path, self.vendor = path, vendor
        self._closed = False
        self._strange: list[str] = []  # images in the place of levels that show something else
        self.tiff: TiffLevels | None = None  # the same file's pages, where they are OpenSlide's levels
        self._exact: dict[int, int] = {}  # levels that tifffile reads in OpenSlide's stead, and their number there
        self._checked: set[int] = set()  # of these levels, those that were compared
        # Levels that a scanner's own format lists are laid out by it; a plain TIFF's are but pages.
        self.shape_slack = 0.0 if vendor in PAGED_VENDORS else VENDOR_SLACK
        with blaming(path, "opening it with OpenSlide"):
            self._slide = self._opened()
            try:
                self.sizes = tuple((int(width), int(height)) for width, height in self._slide.level_dimensions)
                self._downsamples = tuple(float(one) for one in self._slide.level_downsamples)
                self.properties: dict[str, str] = dict(self._slide.properties)
            except BaseException:
                self._slide.close()
                raise
        self._numbers = list(range(len(self.sizes)))  # OpenSlide's own, of the levels that are kept
        if not self.sizes or min(map(min, self.sizes)) < 1:
            self._slide.close()
            raise SlideError(f"{path.name}: holds no pixels")
        tile = (self.properties.get(f"openslide.level[0].tile-{side}") for side in ("width", "height"))
        width, height = (int(one) if one else 0 for one in tile)
        self.tile_size = (width, height) if width and height else None

    def _opened(self) -> openslide.OpenSlide:
        slide = openslide.OpenSlide(str(self.path))
        slide.set_cache(openslide.OpenSlideCache(CACHE_BYTES))
        return slide

    def recover(self) -> None:
        """After damage OpenSlide reads nothing any more: open the file again."""
        self._slide.close()
        with blaming(self.path, "opening it with OpenSlide"):
            self._slide = self._opened()

    def keep(self, levels: Sequence[int], strange: Sequence[int]) -> None:
        """Leave out all other levels; the `strange` ones, since they show something else. Before `stand_by`."""
        self._strange = [f"{self.sizes[level][0]} x {self.sizes[level][1]} px" for level in strange]
        self._numbers = [self._numbers[level] for level in levels]
        self.sizes = tuple(self.sizes[level] for level in levels)
        self._downsamples = tuple(self._downsamples[level] for level in levels)

    def warnings(self) -> list[str]:
        return [not_levels(self._strange)] if self._strange else []

    def downsamples(self) -> tuple[float, ...]:
        """OpenSlide's own (Philips pads its levels), but 4 where rounding of the level's size made it 4.0007."""
        snapped = (snapped_downsample(self.sizes[0], size) for size in self.sizes)
        return tuple(one if one == int(one) else its for one, its in zip(snapped, self._downsamples, strict=True))

    def stand_by(self, tiff: TiffLevels, all_levels: bool = False) -> None:
        """Let tifffile read levels whose pixels OpenSlide would shift; or all, where it would show other colours.

        OpenSlide is asked in level-0 pixels. Where it takes a level's downsample for 4.0007 (rounded sides), a level's
        whole pixel falls between two of them, and what comes back is interpolated: blurred, up to 1/8 pixel off.
        """
        self.tiff = tiff
        for level, (snapped, its) in enumerate(zip(self.downsamples(), self._downsamples, strict=True)):
            if (all_levels or snapped != its) and self.sizes[level] in tiff.sizes:
                self._exact[level] = tiff.sizes.index(self.sizes[level])
        if all_levels:
            self._checked.update(self._exact)  # OpenSlide is no judge of them
            if len(self._exact) < len(self.sizes):
                raise SlideError(f"{self.path.name}: {MISREAD}")

    def _check(self, level: int) -> None:
        """Before tifffile's first read of a level: whether it shows what OpenSlide shows; else OpenSlide reads it."""
        if level not in self._exact or level in self._checked:
            return
        self._checked.add(level)
        assert self.tiff is not None
        width, height = (min(CHECK_PX, side) for side in self.sizes[level])
        for part in (0.5, 0.25, 0.75):
            x, y = (int((side - px) * part) for side, px in zip(self.sizes[level], (width, height), strict=True))
            try:
                # Through a handle of its own: after damage OpenSlide reads nothing any more.
                with closing(OpenSlideLevels(self.path, self.vendor)) as other:
                    theirs = other.read_level(self._numbers[level], x, y, width, height)
            except SlideError:
                continue
            try:
                ours = self.tiff.read_level(self._exact[level], x, y, width, height)
            except SlideError:
                del self._exact[level]
                return
            if np.abs(ours.mean(axis=(0, 1)) - theirs.mean(axis=(0, 1))).max() > CHECK_LIMIT:
                del self._exact[level]
                return

    def scale(self) -> Scale | None:
        if self.vendor == "generic-tiff" and self.tiff is not None:
            return self.tiff.scale()  # tells a measured resolution from 1 pixel per inch, which says nothing
        power = self.properties.get("openslide.objective-power")
        hint = f" (its header says {power}x)" if power else ""
        x_text, y_text = self.properties.get("openslide.mpp-x"), self.properties.get("openslide.mpp-y")
        return scale_from(x_text, y_text, f"metadata ({self.vendor})", hint)

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        self._check(level)
        if level in self._exact:
            assert self.tiff is not None
            return self.tiff.read_level(self._exact[level], x, y, width, height)
        downsample = self._downsamples[level]
        with blaming(self.path, f"reading level {level} at {x}, {y}"):
            at_l0 = (round(x * downsample), round(y * downsample))
            rgba = np.asarray(self._slide.read_region(at_l0, self._numbers[level], (width, height)))
        alpha = rgba[..., 3]
        if alpha.min() == 255:
            return np.ascontiguousarray(rgba[..., :3])
        # openslide-python has undone the premultiplication: colour over white is a plain blend.
        weight = alpha[..., None].astype(np.uint16)
        return ((rgba[..., :3] * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)

    def read_bgrx(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8] | None:
        paint = getattr(openslide.lowlevel, "_read_region", None)  # the C function under read_region, without copies
        self._check(level)
        if level in self._exact or paint is None or sys.byteorder != "little" or min(width, height) < 1:
            return None
        downsample = self._downsamples[level]
        pixels = np.empty((height, width, 4), np.uint8)
        buffer = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint32))
        with blaming(self.path, f"reading level {level} at {x}, {y}"):
            at_l0 = (round(x * downsample), round(y * downsample))
            paint(self._slide._osr, buffer, *at_l0, self._numbers[level], width, height)
        bgra = pixels.view(np.uint32)
        if bgra.min() < 0xFF000000:  # colours are multiplied by alpha already: over white, what is missing is added
            bgra += (0xFF - (bgra >> 24)) * 0x010101
        return pixels

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._slide.close()
        if self.tiff is not None:
            self.tiff.close()
