"""Cut a slide into JPEG tiles at one physical scale, in the cheapest way that is true to it.

    copied    the slide's own JPEG tiles lie on the wanted grid at the wanted scale: their bytes, no decoding
    stitched  they do not, but they are JPEG: each decoded once (at 1/2, 1/4, 1/8 where that is enough), cut, encoded
    read      anything else, in wide reads through OpenSlide or tifffile

OpenSlide is the referee: if a slide's own tiles do not decode to what OpenSlide shows, the slide is read instead. Where
OpenSlide would mistake the colours, `slides/reading/slide.py` has tifffile read the slide, which is the referee then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from histossl.core.config import TileConfig
from histossl.core.errors import SlideError
from histossl.slides.grid import Grid, decodable, grid_of, native_grid, physical_grid
from histossl.slides.reading.levels import believe
from histossl.slides.reading.slide import Slide
from histossl.slides.reading.tifffile_backend import NativeLevel, TiffLevels
from histossl.tiles.cutting.native_jpeg import DamagedTile, NativeTiles, best_shrink

Pixels = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

STRIP_TILES = 16  # tiles across a strip: what one row has decoded is still cached when the next row needs it
OWN_READ_PX = 64  # so small a tile is read with its neighbours: a read takes longer than its copy
MAX_RUN_PX = 4 << 20  # of one read
ALIGNED = 1 / 64  # a shift below this many pixels is not worth a resampling
NEAR_1 = 1.1
MAX_ENLARGED = 2.0  # a coarser level stands in for a damaged one only up to here
SUBSAMPLING = "420"  # as nearly all scanners store their tiles
REFEREE_TILES = 3
REFEREE_LIMIT = 3.0  # mean difference in grey levels; decoders of the same JPEG differ by less than 1


class Source(Protocol):
    """Pixels of a slide at one downsample."""

    downsample: float

    def read(self, left: int, top: int, width: int, height: int) -> Pixels: ...
    def close(self) -> None: ...


class SlidePixels:
    """A level of a slide through its library. After an error OpenSlide refuses everything: then it is opened anew."""

    def __init__(self, slide: Slide, open_again: Callable[[], Slide], level: int) -> None:
        self._slide, self._open_again, self._level = slide, open_again, level
        self._opened: Slide | None = None
        self.downsample = slide.level_downsamples[level]

    def read(self, left: int, top: int, width: int, height: int) -> Pixels:
        """RGB, or where OpenSlide can be asked directly (height, width, 4): blue, green, red, nothing."""
        box = (self._level, left, top, width, height)
        try:
            painted = self._slide.read_bgrx(*box)
            return painted if painted is not None else self._slide.read_level(*box)
        except SlideError as error:
            self.close()
            self._slide = self._opened = self._open_again()
            raise DamagedTile(str(error)) from error

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None


class TiffPixels:
    """A level of a tiled TIFF that is not JPEG (JPEG 2000, deflate, LZW), tile by tile through tifffile's decoders."""

    def __init__(self, path: Path, size_px: tuple[int, int], downsample: float) -> None:
        self._tiff = TiffLevels(path)
        believe(self._tiff, self._tiff.busy_places())
        if size_px not in self._tiff.sizes:
            self._tiff.close()
            raise SlideError(f"{path.name}: tifffile finds no level of {size_px[0]} x {size_px[1]} px")
        self._level = self._tiff.sizes.index(size_px)
        self.downsample = downsample

    def read(self, left: int, top: int, width: int, height: int) -> Pixels:
        try:
            return self._tiff.read_level(self._level, left, top, width, height)
        except SlideError as error:
            raise DamagedTile(str(error)) from error

    def close(self) -> None:
        self._tiff.close()


@dataclass(frozen=True)
class CutTile:
    """Either its JPEG (copied) or its pixels, to be encoded; neither if it is damaged, or glass that was not stored.

    `pixels` are (h, w, 3) RGB, or (h, w, 4) as OpenSlide paints them; `rgb` makes the one of the other.
    """

    place: int
    jpeg: bytes | None = None
    pixels: Pixels | None = None
    glass: bool = False


@dataclass(frozen=True)
class Cutter:
    """How one scale of one slide is cut."""

    grid: Grid
    way: str  # copied, stitched, read
    source: Source

    def tiles(self, places: Ints) -> Iterator[CutTile]:
        """The tiles of these places, in the order that is cheapest to read."""
        if self.way == "copied":
            yield from self._copied(places)
            return
        for run in _runs(self.grid, places, self.source.downsample):
            yield from self._cut(run)

    @property
    def own_downsample(self) -> float:
        """Of the level that tiles are cut from, whatever the decoder shrinks on the way."""
        return self.source.level.downsample if isinstance(self.source, NativeTiles) else self.source.downsample

    def pixels(self, place: int) -> Pixels:
        """One tile decoded, as it would be before encoding. DamagedTile if it cannot be."""
        if self.way == "copied":
            assert isinstance(self.source, NativeTiles)
            row, column = divmod(place, self.grid.columns)
            size = self.grid.tile_px
            return self.source.read(column * size, row * size, size, size)
        return rgb(self._cut_run(np.array([place]))[0])

    def jpeg(self, place: int) -> bytes | None:
        """Of copied tiles: one as a JPEG file; None if the slide leaves it out. DamagedTile if it is not one."""
        assert isinstance(self.source, NativeTiles)
        row, column = divmod(place, self.grid.columns)
        return self.source.jpeg(column, row)

    def native_bytes(self, places: Ints) -> npt.NDArray[np.float64]:
        """Mean bytes of the slide's own tiles under each place; of a copied tile its own."""
        assert isinstance(self.source, NativeTiles)
        level, (first, last) = self.source.level, self._native_under(places)
        table = np.zeros((level.tiles_down + 1, level.tiles_across + 1), np.int64)
        table[1:, 1:] = self.source.byte_counts.reshape(level.tiles_down, level.tiles_across).cumsum(0).cumsum(1)
        (left, top), (right, bottom) = first, last
        total = table[bottom, right] - table[top, right] - table[bottom, left] + table[top, left]
        mean: npt.NDArray[np.float64] = total / ((right - left) * (bottom - top))
        return mean

    def native_middle(self, place: int) -> tuple[int, int]:
        """Column and row of the slide's own tile in the middle of a place."""
        first, last = self._native_under(np.array([place]))
        column, row = (int(low[0] + high[0] - 1) // 2 for low, high in zip(first, last, strict=True))
        return column, row

    def _native_under(self, places: Ints) -> tuple[tuple[Ints, Ints], tuple[Ints, Ints]]:
        """First (column, row) of the slide's own tiles under places, and those after the last."""
        assert isinstance(self.source, NativeTiles)
        level, down = self.source.level, self.source.downsample / self.source.shrink
        sides = (level.tile_width_px * down, level.tile_height_px * down)
        counts = (level.tiles_across, level.tiles_down)
        first, last = [], []
        for corner, start, side, count in zip(
            self.grid.corners_l0(places), level.corner_px, sides, counts, strict=True
        ):
            near = corner - start * down
            first.append(np.clip(np.floor((near + ALIGNED) / side).astype(np.int64), 0, count - 1))
            last.append(np.clip(np.ceil((near + self.grid.side_l0 - ALIGNED) / side).astype(np.int64), 1, count))
        return (first[0], first[1]), (last[0], last[1])

    def _copied(self, places: Ints) -> Iterator[CutTile]:
        for place in places.tolist():
            try:
                jpeg = self.jpeg(place)
                yield CutTile(place, jpeg=jpeg, glass=jpeg is None)
            except DamagedTile:
                yield CutTile(place)

    def _cut(self, run: Ints) -> Iterator[CutTile]:
        try:
            tiles = self._cut_run(run)
        except DamagedTile:
            if len(run) == 1:
                yield CutTile(int(run[0]))
                return
            for place in run:  # the damage is one tile's: the others are read without it
                yield from self._cut(np.array([place]))
            return
        for place, pixels in zip(run.tolist(), tiles, strict=True):
            yield CutTile(place, pixels=pixels)

    def _cut_run(self, run: Ints) -> list[Pixels]:
        """Neighbouring tiles of a row, from one read."""
        down = self.source.downsample
        side = self.grid.side_l0 / down
        xs_l0, ys_l0 = self.grid.corners_l0(run)
        xs, y = xs_l0 / down, float(ys_l0[0]) / down
        aligned = _aligned(side, self.grid.tile_px, xs, y)
        px = self.grid.tile_px
        if aligned and isinstance(self.source, NativeTiles) and round(side) == px >= OWN_READ_PX:
            # already what is wanted: one copy less than out of a wide canvas
            return [self.source.read(round(x), round(y), px, px) for x in xs.tolist()]
        margin = 0 if aligned else math.ceil(2 * max(1, side / self.grid.tile_px)) + 1
        left, top = math.floor(xs[0] + ALIGNED) - margin, math.floor(y + ALIGNED) - margin
        right, bottom = math.ceil(xs[-1] + side - ALIGNED) + margin, math.ceil(y + side - ALIGNED) + margin
        canvas = self.source.read(left, top, right - left, bottom - top)
        image = picture(canvas)
        return [cut(canvas, image, x - left, y - top, side, self.grid.tile_px) for x in xs.tolist()]


def encode(pixels: Pixels, quality: int) -> bytes:
    order = "RGB" if pixels.shape[2] == 3 else "BGRX"
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, order, SUBSAMPLING))


def rgb(pixels: Pixels) -> Pixels:
    """(h, w, 3) of what a source gives: RGB, or blue, green, red, nothing."""
    return pixels if pixels.shape[2] == 3 else pixels[..., 2::-1]


def cut(canvas: Pixels, image: Image.Image | None, x: float, y: float, side: float, tile_px: int) -> Pixels:
    """The square of `side` at (x, y) of the canvas, as tile_px x tile_px: sliced, averaged or resampled.

    `image` is the canvas as Pillow sees it without a copy, where it can.
    """
    whole = round(side / tile_px)
    aligned = whole >= 1 and abs(side - whole * tile_px) < ALIGNED and _whole(x) and _whole(y)
    if aligned and whole == 1:
        return canvas[round(y) : round(y) + tile_px, round(x) : round(x) + tile_px]
    # Pillow looks this far around a box: the filter is widened by the shrink factor, which is the antialiasing.
    margin = 0 if aligned else math.ceil(2 * max(1.0, side / tile_px)) + 1
    left, top = max(0, math.floor(x + ALIGNED) - margin), max(0, math.floor(y + ALIGNED) - margin)
    if image is None:
        right, bottom = math.ceil(x + side) + margin, math.ceil(y + side) + margin
        image = Image.fromarray(canvas[top:bottom, left:right])
        x, y = x - left, y - top
    if aligned:
        box = (round(x), round(y), round(x) + whole * tile_px, round(y) + whole * tile_px)
        return np.asarray(image.reduce(whole, box))
    # The slide reader's own choice of filters. Near 1:1, after the decoder has shrunk, Hamming would blur once more.
    method = Image.Resampling.HAMMING if side > NEAR_1 * tile_px else Image.Resampling.BICUBIC
    return np.asarray(image.resize((tile_px, tile_px), method, box=(x, y, x + side, y + side)))


def picture(canvas: Pixels) -> Image.Image | None:
    """Four channels are taken as they lie, without alpha's meaning; three would have to be copied."""
    if canvas.shape[2] == 3:
        return None
    return Image.frombuffer("RGBX", (canvas.shape[1], canvas.shape[0]), canvas, "raw", "RGBX", 0, 1)


def _aligned(side: float, tile_px: int, xs: npt.NDArray[np.float64], y: float) -> bool:
    whole = round(side / tile_px)
    return whole >= 1 and abs(side - whole * tile_px) < ALIGNED and _whole(y) and all(_whole(x) for x in xs.tolist())


def _whole(value: float) -> bool:
    return abs(value - round(value)) < ALIGNED


def _runs(grid: Grid, places: Ints, downsample: float) -> Iterator[Ints]:
    """Neighbouring places of a row, strip by strip from the left, each strip from the top."""
    side = math.ceil(grid.side_l0 / downsample)
    longest = max(1, min(STRIP_TILES, MAX_RUN_PX // (side * side)))
    columns, rows = places % grid.columns, places // grid.columns
    strips = columns // STRIP_TILES
    order = np.lexsort((columns, rows, strips))
    places, columns, rows, strips = places[order], columns[order], rows[order], strips[order]
    breaks = (np.diff(columns) != 1) | (np.diff(rows) != 0) | (np.diff(strips) != 0)
    for run in np.split(places, np.flatnonzero(breaks) + 1):
        yield from (run[start : start + longest] for start in range(0, len(run), longest) if len(run))


# ---- choosing the way


def cutter_for(
    slide: Slide, mpp: float, config: TileConfig, open_again: Callable[[], Slide], way: str | None = None
) -> Cutter:
    """How to cut `slide` at `mpp`. `way` forces copied, stitched or read; else the cheapest that the grid allows.

    SlideError where --grid native asks for tiles that the slide does not have.
    """
    native = native_grid(slide, config.tile_px, mpp) if config.grid != "physical" and slide.native else None
    if way in (None, "copied") and native is not None and slide.native is not None:
        level = slide.native[native[0]]
        assert level is not None
        return Cutter(native[1], "copied", NativeTiles(slide.path, level))
    if native is None:
        grid = grid_of(slide, config.tile_px, mpp, config.grid)
    else:  # another way than copying is asked for
        grid = physical_grid(slide, config.tile_px, mpp, exact=config.grid == "physical")
    number = slide.level_for(grid.mpp / slide.mpp_l0)
    return cutter_of_level(slide, grid, number, open_again, through_library=way not in (None, "stitched"))


def cutter_of_level(
    slide: Slide, grid: Grid, number: int, open_again: Callable[[], Slide], through_library: bool = False
) -> Cutter:
    """A grid cut from one level of the slide: by its own tiles where they are known, else through its library."""
    level = slide.native[number] if slide.native else None
    if level is not None and not through_library:
        if decodable(level):
            shrink = best_shrink(level, grid.mpp / slide.mpp_l0)
            tiles = NativeTiles(slide.path, level, shrink, _under_strip(grid, level))
            return Cutter(grid, "stitched", tiles)
        try:
            pixels = TiffPixels(slide.path, slide.level_sizes[number], slide.level_downsamples[number])
            return Cutter(grid, "stitched", pixels)
        except SlideError:
            pass  # then the slide's own library reads it
    return Cutter(grid, "read", SlidePixels(slide, open_again, number))


def other_levels(slide: Slide, grid: Grid) -> list[int]:
    """The levels that can stand in for a damaged one, best first: finer ones, then those that are not too coarse."""
    wanted = grid.mpp / slide.mpp_l0
    downs = slide.level_downsamples
    own = downs[slide.level_for(wanted)]
    by_scale = sorted(range(len(downs)), key=downs.__getitem__)
    finer = [level for level in by_scale if downs[level] < own]
    return finer[::-1] + [level for level in by_scale if own < downs[level] <= wanted * MAX_ENLARGED]


def _under_strip(grid: Grid, level: NativeLevel) -> int:
    """How many native tiles lie under one row of a strip: the next row may need any of them again."""
    side = grid.side_l0 / level.downsample
    across, down = (math.ceil(STRIP_TILES * side / level.tile_width_px), math.ceil(side / level.tile_height_px))
    return (across + 2) * (down + 2)


def agrees(cutter: Cutter, slide: Slide, open_again: Callable[[], Slide], places: Ints) -> tuple[bool, bool]:
    """Whether a few of the wanted tiles look as OpenSlide (or tifffile) shows them; and whether `slide` is spent.

    Opening takes longer than comparing, so the handle at hand is asked. After damage OpenSlide's reads nothing more.
    """
    if cutter.way == "read" or not len(places):
        return True, False
    chosen = np.unique(places[np.linspace(0, len(places) - 1, REFEREE_TILES).astype(int)])
    seen, spent = 0, False
    opened: Slide | None = None
    try:
        for place in chosen.tolist():
            try:
                difference = _difference(cutter, opened or slide, place)
            except DamagedTile:
                continue
            except SlideError:
                spent = True
                if opened is not None:
                    opened.close()
                opened = open_again()
                continue
            if difference > REFEREE_LIMIT:
                return False, spent
            seen += 1
    finally:
        if opened is not None:
            opened.close()
    return seen > 0, spent


def _difference(cutter: Cutter, slide: Slide, place: int) -> float:
    """Mean difference of the middle of one tile in grey levels: its rim would cost reading the tiles around it."""
    (x_l0,), (y_l0,) = (each.tolist() for each in cutter.grid.corners_l0(np.array([place])))
    rim, px, l0_per_px = cutter.grid.tile_px // 4, cutter.grid.tile_px, cutter.grid.side_l0 / cutter.grid.tile_px
    mine = cutter.pixels(place)[rim : px - rim, rim : px - rim]
    box = (x_l0 + rim * l0_per_px, y_l0 + rim * l0_per_px, len(mine) * l0_per_px, len(mine) * l0_per_px)
    theirs = slide.read_region_l0(*box, len(mine), len(mine))
    return float(np.abs(mine.astype(np.int16) - theirs).mean())
