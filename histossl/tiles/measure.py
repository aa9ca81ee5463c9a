"""How much faster than the usual loop a slide is tiled, in CPU time per tile, on the user's own slide.

    histossl bench tile A1.svs

The usual loop is what most tilers do: openslide-python reads a region, Pillow resizes and encodes it. Both sides cut
the same places of the same slide in one process, turn about, and write every tile; finding tissue is left out on both.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import openslide

from histossl.config import TileConfig
from histossl.errors import SlideError
from histossl.slides.reader import Slide, open_slide
from histossl.slides.tissue import find_tissue
from histossl.tiles.cutting import Cutter, Grid, Ints, cutter_for, encode, native_side_px
from histossl.tiles.store import new_store


@dataclass(frozen=True)
class WayFigures:
    """One way of cutting against the usual loop: CPU milliseconds per tile, each the median of the repeats."""

    way: str
    tile_px: int
    mpp: float
    num_tiles: int
    loop_ms: float
    own_ms: float
    ratios: list[float]  # one per repeat

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def measure_tiling(
    path: Path, config: TileConfig, slide_mpp: float | None = None, max_tiles: int = 400, repeats: int = 3
) -> list[WayFigures]:
    """Figures of each way that the slide allows: copied, stitched, read. SlideError if OpenSlide cannot read it."""
    figures = []
    with open_slide(path, slide_mpp) as slide:
        for way in ("copied", "stitched", "read"):
            try:
                cutter, settings = _cutter(slide, way, config)
            except SlideError:
                continue
            if cutter.way != way:
                cutter.source.close()
                continue
            try:
                figures.append(_figures(slide, cutter, settings, max_tiles, repeats))
            finally:
                cutter.source.close()
    return figures


def _cutter(slide: Slide, way: str, config: TileConfig) -> tuple[Cutter, TileConfig]:
    if way == "copied":
        side = native_side_px(slide, config.mpp) or native_side_px(slide, slide.mpp_l0)
        if side is None:
            raise SlideError(f"{slide.path.name}: no JPEG tiles to copy")
        mpp = config.mpp if native_side_px(slide, config.mpp) else slide.mpp_l0
        config = replace(config, grid="native", tile_px=side, mpp=mpp, coarser_mpp=())
    else:
        config = replace(config, grid="physical", coarser_mpp=())
    return cutter_for(slide, config.mpp, config, lambda: slide, way), config


def _figures(slide: Slide, cutter: Cutter, config: TileConfig, max_tiles: int, repeats: int) -> WayFigures:
    places = np.arange(cutter.grid.num_places)
    tissue = find_tissue(slide, config.tissue)
    places = places[tissue.share(*cutter.grid.corners_l0(places), cutter.grid.side_l0) >= config.tissue.min_tissue]
    if not len(places):
        raise SlideError(f"{slide.path.name}: no tile with enough tissue to measure on")
    # Neighbours, as tiling meets them: a block from the middle of the list, not a scatter.
    start = max(0, (len(places) - max_tiles) // 2)
    places = places[start : start + max_tiles]
    loop_ms, own_ms = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            loop_ms.append(_cpu_ms(lambda: _usual_loop(slide.path, cutter.grid, places, slide, config, Path(folder))))
            own_ms.append(_cpu_ms(lambda: _own(slide, cutter, places, config, Path(folder))))
    ratios = [loop / own for loop, own in zip(loop_ms, own_ms, strict=True)]
    loop, own = (statistics.median(each) / len(places) for each in (loop_ms, own_ms))
    return WayFigures(cutter.way, config.tile_px, cutter.grid.mpp, len(places), loop, own, ratios)


def _cpu_ms(work: Callable[[], None]) -> float:
    started_s = time.process_time()
    work()
    return (time.process_time() - started_s) * 1000


def _own(slide: Slide, warm: Cutter, places: Ints, config: TileConfig, folder: Path) -> None:
    """As `tile` does it, from opening the slide to the finished zip."""
    with open_slide(slide.path, slide.mpp_l0) as mine, new_store(folder / "own.zip", [config.mpp]) as store:
        cutter = cutter_for(mine, config.mpp, config, lambda: mine, warm.way)
        try:
            xs, ys = (each.tolist() for each in cutter.grid.corners_l0(places))
            corners = dict(zip(places.tolist(), zip(xs, ys, strict=True), strict=True))
            for tile in cutter.tiles(places):
                jpeg = tile.jpeg
                if jpeg is None and tile.pixels is not None:
                    jpeg = encode(tile.pixels, config.jpeg_quality)
                if jpeg is not None:
                    x_l0, y_l0 = corners[tile.place]
                    store.add(x_l0, y_l0, jpeg)
        finally:
            cutter.source.close()
        store.finish({"scales": []})


def _usual_loop(path: Path, grid: Grid, places: Ints, slide: Slide, config: TileConfig, folder: Path) -> None:
    """openslide-python and Pillow, one tile after the other, each into a file."""
    xs, ys = grid.corners_l0(places)
    with openslide.OpenSlide(str(path)) as source:
        level = source.get_best_level_for_downsample(grid.mpp / slide.mpp_l0 * 1.001)
        side = round(grid.side_l0 / source.level_downsamples[level])
        for x_l0, y_l0 in zip(xs.tolist(), ys.tolist(), strict=True):
            tile = source.read_region((x_l0, y_l0), level, (side, side)).convert("RGB")
            if side != config.tile_px:
                tile = tile.resize((config.tile_px, config.tile_px))
            tile.save(folder / f"{x_l0}_{y_l0}.jpg", quality=config.jpeg_quality)
