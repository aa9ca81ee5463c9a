"""Compare tiles with the next coarser level of their slide: what no decoder notices shows as blocks of other colours.

A flipped bit in a JPEG shifts all that follows by tens of grey levels, a byte put into uncompressed pixels turns their
colours, and neither gives an error. Two levels of a healthy slide differ by a few grey levels, block by block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from histossl.core.errors import SlideError
from histossl.slides.grid import Grid
from histossl.slides.reading.slide import Slide
from histossl.tiles.cutting.cutter import STRIP_TILES, Cutter, Pixels, cutter_of_level, picture, rgb
from histossl.tiles.cutting.native_jpeg import DamagedTile

Ints = npt.NDArray[np.int64]

BLOCKS = (8, 7, 6, 5, 4, 3, 2, 1)  # along a tile's side: the first that divides it
FINER = 4  # pixels along a block of the coarser level: fewer, and its edges would blur into the next block
COARSER = (1.2, 64.0)  # times as coarse is the level that tiles are compared with, and no coarser: it shows too little
DIFFERENT = 16.0  # grey levels between two levels' mean colours of a block, at least: less is resampling and JPEG noise
THROUGHOUT = 4.0  # of a whole tile a quarter of that is as telling
TIMES_USUAL = 3.0  # and so many times the slide's usual difference
CHECKSUMMED = ("deflate", "LZMA")  # their decoders know whether what comes out is what went in
MANY_ROWS = 16
UNLIKE = 40.0  # a slide whose levels usually differ by so much is not compared: they are not made of one another
SAMPLE = 16  # tiles that say what is usual
STRIPS_KEPT = 512  # of blocks: a row of the largest slides


def blocks_along(tile_px: int, coarse_px: float) -> int:
    """How many blocks along a tile's side that is `coarse_px` on the coarser level: whole pixels, at 1/8, too."""
    counts = [count for count in BLOCKS if count * FINER <= coarse_px] or [1]
    whole = [count for unit in (8, 1) for count in counts if tile_px % (count * unit) == 0]
    return max(whole[0], counts[0] // 2)


def block_means(pixels: Pixels, count: int) -> npt.NDArray[np.int16]:
    """(count, n * count, 3): mean colours of n squares side by side, RGB or as OpenSlide paints them."""
    side, width = pixels.shape[:2]
    block = side // count if side % count == 0 else 0
    every = 2 if block >= MANY_ROWS and block % 2 == 0 else 1  # half of so many rows has the mean of all
    pixels = np.ascontiguousarray(pixels[::every])
    image = picture(pixels) or Image.fromarray(pixels)
    size = (width // side * count, count)
    small = image.reduce((block, block // every)) if block else image.resize(size, Image.Resampling.BOX)
    return rgb(np.asarray(small)).astype(np.int16)


@dataclass
class _Level:
    """Mean colours of a grid's tiles on one level, strip by strip as they are asked for; None where it is damaged."""

    cutter: Cutter
    places: Ints  # that will be asked for, sorted
    count: int
    strips: OrderedDict[int, dict[int, npt.NDArray[np.int16]]] = field(default_factory=OrderedDict)

    def blocks(self, place: int) -> npt.NDArray[np.int16] | None:
        row, column = divmod(place, self.cutter.grid.columns)
        first = place - column % STRIP_TILES
        if first not in self.strips:
            last = min(first + STRIP_TILES, (row + 1) * self.cutter.grid.columns)
            start, end = np.searchsorted(self.places, (first, last))
            self.strips[first] = self._cut(self.places[start:end])
            if len(self.strips) > STRIPS_KEPT:
                self.strips.popitem(last=False)
        return self.strips[first].get(place)

    def _cut(self, run: Ints) -> dict[int, npt.NDArray[np.int16]]:
        whole = [(tile.place, tile.pixels) for tile in self.cutter.tiles(run) if tile.pixels is not None]
        if not whole:
            return {}
        # All at once: one tile's few blocks take less time than making a picture of them.
        blocks = block_means(np.concatenate([pixels for _, pixels in whole], axis=1), self.count)
        return {place: blocks[:, n * self.count : (n + 1) * self.count] for n, (place, _) in enumerate(whole)}


class Comparison:
    """Whether tiles show what a coarser level shows. `level` is its number, None if there is none to compare with."""

    def __init__(
        self, slide: Slide, cutter: Cutter, open_again: Callable[[], Slide], places: Ints, wanted: bool = True
    ) -> None:
        self._slide, self._cutter, self._open_again, self._places = slide, cutter, open_again, places
        coarser = _coarser(slide, cutter) if wanted else []
        self.level = coarser[0] if coarser else None
        downsample = slide.level_downsamples[coarser[0]] if coarser else 1.0
        self.count = blocks_along(cutter.grid.tile_px, cutter.grid.side_l0 / downsample)
        self._others = coarser[1:] or _finer(slide, cutter)
        self._levels: dict[int, _Level] = {}
        self._limit = DIFFERENT
        self._usual_known = False
        self.compared = 0

    def close(self) -> None:
        for one in self._levels.values():
            one.cutter.source.close()

    def differs(self, place: int, pixels: Pixels) -> bool:
        """Whether a tile (h, w, 3 or 4; at any scale) is not what the coarser level shows there.

        If there is a third level, two of the three decide: the coarser one may be the damaged one.
        """
        if self.level is None:
            return False
        mine = block_means(pixels, self.count)
        apart = self._apart(self.level, place, mine)
        if apart is None:
            return False
        self.compared += 1
        if apart <= self._limit:
            return False
        self._learn_usual()
        if self.level is None or apart <= self._limit:
            return False
        third = next((found for one in self._others if (found := self._apart(one, place, mine)) is not None), None)
        return third is None or third > self._limit

    def _apart(self, level: int, place: int, mine: npt.NDArray[np.int16]) -> float | None:
        """How far a tile is from a level, in grey levels, by its worst block or all of it; None if not readable."""
        theirs = self._of_level(level).blocks(place)
        if theirs is None:
            return None
        apart = np.abs(mine - theirs)
        return max(float(apart.max()), THROUGHOUT * float(apart.sum()) / float(apart.size))

    def _of_level(self, level: int) -> _Level:
        if level not in self._levels:
            grid = self._cutter.grid
            px = self.count * FINER
            finer = Grid(px, grid.side_l0, grid.columns, grid.rows, grid.mpp * grid.tile_px / px)
            theirs = cutter_of_level(self._slide, finer, level, self._open_again)
            self._levels[level] = _Level(theirs, self._places, self.count)
        return self._levels[level]

    def _learn_usual(self) -> None:
        """By how much this slide's levels differ where nothing is wrong. Most slides never ask."""
        if self._usual_known:
            return
        self._usual_known = True
        assert self.level is not None
        chosen = np.unique(self._places[np.linspace(0, len(self._places) - 1, SAMPLE).astype(int)])
        found: list[float] = []
        for place in chosen.tolist():
            try:
                mine = block_means(self._cutter.pixels(place), self.count)
            except (DamagedTile, SlideError):
                continue
            apart = self._apart(self.level, place, mine)
            found += [] if apart is None else [apart]
        usual = float(np.median(found)) if found else 0.0
        self._limit = max(DIFFERENT, TIMES_USUAL * usual)
        if usual > UNLIKE:
            self.level = None


def verified(slide: Slide, comparison: Comparison, decoded: bool) -> list[str]:
    """How far the pixels of a scale's tiles are known to be the slide's."""
    if not decoded:
        return ["sample"]
    known = ["checksums" if slide.compression in CHECKSUMMED else "decoded"]
    return known + ([f"against level {comparison.level}"] if comparison.compared else [])


def _coarser(slide: Slide, cutter: Cutter) -> list[int]:
    own = cutter.own_downsample
    times = sorted((down / own, number) for number, down in enumerate(slide.level_downsamples))
    return [number for ratio, number in times if COARSER[0] <= ratio <= COARSER[1]]


def _finer(slide: Slide, cutter: Cutter) -> list[int]:
    own = cutter.own_downsample
    times = sorted((down / own, number) for number, down in enumerate(slide.level_downsamples))
    return [number for ratio, number in times if ratio < 1 / COARSER[0]][::-1]
