"""Where tiles lie on a slide, so that scan counts the places that tile cuts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from histossl.core.errors import SlideError
from histossl.core.units import l0_from_px
from histossl.slides.reading.slide import Slide
from histossl.slides.reading.tifffile_backend import JPEG, NativeLevel

Ints = npt.NDArray[np.int64]

NATIVE_TOLERANCE = 0.05  # a native tile may be this far from the wanted scale; its real one is recorded
SAME_SCALE = 0.005
TOO_COARSE = 2.0  # enlarging a slide more than this invents most of its pixels: no tiles
COARSE = 1.1  # enlarging it more than this is told


@dataclass(frozen=True)
class Grid:
    """Squares of `side_l0` level-0 pixels from the slide's upper left corner on; only those wholly on the slide."""

    tile_px: int
    side_l0: float
    columns: int
    rows: int
    mpp: float  # real microns per pixel of its tiles

    @property
    def num_places(self) -> int:
        return self.columns * self.rows

    def corners_l0(self, places: Ints) -> tuple[Ints, Ints]:
        """x and y of places (numbered row by row), to the nearest pixel."""
        x, y = (np.rint(places % self.columns * self.side_l0), np.rint(places // self.columns * self.side_l0))
        return x.astype(np.int64), y.astype(np.int64)


def physical_grid(slide: Slide, tile_px: int, mpp: float, exact: bool = True) -> Grid:
    """Tiles of `mpp`; unless `exact`, of the slide's own scale (or a whole multiple) where 0.5 % is all that differs.

    A scanner states its scale no better than that, and pixels that need no resampling stay as sharp as they are.
    """
    whole = max(1, round(mpp / slide.mpp_l0))
    if not exact and abs(slide.mpp_l0 * whole / mpp - 1) <= SAME_SCALE:
        mpp = slide.mpp_l0 * whole
    side_l0 = l0_from_px(tile_px, mpp, slide.mpp_l0)
    # Half a pixel of grace: rounded corners keep every tile within it, and 2048.0001 still holds four of 512.
    columns, rows = (max(0, math.floor((length + 0.5) / side_l0)) for length in slide.size_l0)
    return Grid(tile_px, side_l0, columns, rows, mpp)


def decodable(level: NativeLevel | None) -> bool:
    """Whether a level is made of JPEG tiles whose colours we can vouch for."""
    return level is not None and level.compression == JPEG and level.photometric in ("RGB", "YCBCR")


def copyable(level: NativeLevel | None) -> bool:
    """The same, and its tiles lie on a grid that begins in the slide's corner."""
    return level is not None and decodable(level) and not any(level.corner_px)


def native_level(slide: Slide, mpp: float) -> int | None:
    """The level whose JPEG tiles are within the tolerance of `mpp`, the nearest if there are several."""
    near = []
    for number, level in enumerate(slide.native or ()):
        if copyable(level):
            off = abs(slide.mpp_l0 * slide.level_downsamples[number] / mpp - 1)
            near.append((off, number))
    off, number = min(near, default=(math.inf, 0))
    return number if off <= NATIVE_TOLERANCE else None


def native_side_px(slide: Slide, mpp: float) -> int | None:
    """Side of the slide's own JPEG tiles at `mpp` (within 5 %); None if it has none there, or they are not square."""
    level = native_level(slide, mpp)
    if level is None or slide.native is None:
        return None
    found = slide.native[level]
    assert found is not None
    return found.tile_width_px if found.tile_width_px == found.tile_height_px else None


def native_grid(slide: Slide, tile_px: int, mpp: float) -> tuple[int, Grid] | None:
    """The grid of the slide's own JPEG tiles, and their level, where they are of this size and scale."""
    number = native_level(slide, mpp)
    if number is None or native_side_px(slide, mpp) != tile_px or slide.native is None:
        return None
    level = slide.native[number]
    assert level is not None
    down = slide.level_downsamples[number]
    # Tiles at the right and lower edge are padded by the scanner: those are left out.
    columns, rows = level.width_px // tile_px, level.height_px // tile_px
    return number, Grid(tile_px, tile_px * down, columns, rows, slide.mpp_l0 * down)


def grid_of(slide: Slide, tile_px: int, mpp: float, grid: str) -> Grid:
    """The places that `tile --grid` cuts. SlideError where native tiles are asked for that the slide does not have."""
    native = None if grid == "physical" else native_grid(slide, tile_px, mpp)
    if native is not None:
        return native[1]
    if grid == "native":
        raise SlideError(_why_not_native(slide, mpp, tile_px))
    return physical_grid(slide, tile_px, mpp, exact=grid == "physical")


def _why_not_native(slide: Slide, mpp: float, tile_px: int) -> str:
    side = native_side_px(slide, mpp)
    if side is not None:
        return f"{slide.path.name}: its own tiles are {side} px wide, the store's {tile_px}; use --grid physical"
    return (
        f"{slide.path.name}: has no square JPEG tiles of its own within {NATIVE_TOLERANCE:.0%} of {mpp:g} "
        f"microns per pixel (level 0 is at {slide.mpp_l0:.4g}); use --grid physical"
    )


def enlargement(mpp_l0: float, mpp: float) -> tuple[str, bool]:
    """What is to be said of a slide coarser than its tiles, and whether it is too coarse for any."""
    if mpp_l0 / mpp > TOO_COARSE:
        said = f"scanned at {mpp_l0:.4g} microns per pixel, too coarse for tiles at {mpp:g}"
        return f"{said}; tile this archive with --mpp {mpp_l0:.2g} or coarser", True
    if mpp_l0 / mpp > COARSE:
        return f"scanned at {mpp_l0:.4g} microns per pixel: its tiles at {mpp:g} are enlarged", False
    return "", False
