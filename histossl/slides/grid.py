"""Where tiles lie on a slide, so that scan counts the places that tile cuts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from histossl.core.units import l0_from_px
from histossl.slides.reading.slide import Slide

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


def enlargement(mpp_l0: float, mpp: float) -> tuple[str, bool]:
    """What is to be said of a slide coarser than its tiles, and whether it is too coarse for any."""
    if mpp_l0 / mpp > TOO_COARSE:
        said = f"scanned at {mpp_l0:.4g} microns per pixel, too coarse for tiles at {mpp:g}"
        return f"{said}; tile this archive with --mpp {mpp_l0:.2g} or coarser", True
    if mpp_l0 / mpp > COARSE:
        return f"scanned at {mpp_l0:.4g} microns per pixel: its tiles at {mpp:g} are enlarged", False
    return "", False
