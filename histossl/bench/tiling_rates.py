"""How much faster than the usual loop a slide is tiled, in CPU time per tile, on the user's own slide.

    histossl bench tile A1.svs

The usual loop is what most tilers do: openslide-python reads a region, Pillow resizes and encodes it. Both sides cut
the same places of the same slide in one process, turn about; finding tissue is left out on both. Both open the slide
anew each time, so that neither finds it in OpenSlide's cache, where a small one stays once it has been read. Ours is
timed twice: as `tile` does it (a few tiles compared with OpenSlide's, each with the next coarser level, each judged for
focus, colour and ink), and without these filters, which the usual loop does not have.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import openslide
from numpy.typing import NDArray

from histossl.core.config import TileConfig
from histossl.core.errors import SlideError
from histossl.slides.grid import Grid, native_side_px
from histossl.slides.quality.places import Wanted
from histossl.slides.quality.tissue import find_tissue
from histossl.slides.reading.slide import Slide, open_slide
from histossl.tiles.cutting.cutter import Cutter, Ints, agrees, cutter_for
from histossl.tiles.cutting.tile_slide import Making, TileJob
from histossl.tiles.store.zip_store import new_store

Shares = NDArray[np.float64]


@dataclass(frozen=True)
class WayFigures:
    """One way of cutting against the usual loop: CPU milliseconds per tile, each the median of the repeats."""

    way: str
    filters: bool  # of pixels: focus, colour, ink, damage
    tile_px: int
    mpp: float
    num_tiles: int
    loop_ms: float
    own_ms: float
    ratios: list[float]  # one per repeat
    best_ratio: float  # of the quickest repeat of either side: what other programs disturbed least

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def measure_tiling(
    path: Path, config: TileConfig, slide_mpp: float | None = None, max_tiles: int = 400, repeats: int = 3
) -> list[WayFigures]:
    """Figures of each way that the slide allows: copied, stitched, read. SlideError if OpenSlide cannot read it."""
    figures = []
    with open_slide(path, slide_mpp) as slide:
        _refuse_without_openslide(path)
        for way in ("copied", "stitched", "read"):
            try:
                cutter, settings = _cutter(slide, way, config)
            except SlideError:
                continue
            if cutter.way != way:
                cutter.source.close()
                continue
            try:
                figures.extend(_figures(slide, cutter, settings, max_tiles, repeats))
            finally:
                cutter.source.close()
    return figures


def _refuse_without_openslide(path: Path) -> None:
    try:
        openslide.OpenSlide(str(path)).close()
    except openslide.OpenSlideError as error:
        raise SlideError(f"{path.name}: OpenSlide cannot read it ({error}), so there is no usual loop") from error


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


def _figures(slide: Slide, cutter: Cutter, config: TileConfig, max_tiles: int, repeats: int) -> list[WayFigures]:
    places = np.arange(cutter.grid.num_places)
    tissue = find_tissue(slide, config.tissue)
    shares = tissue.share(*cutter.grid.corners_l0(places), cutter.grid.side_l0)
    enough = shares >= config.tissue.min_tissue
    places, shares = places[enough], shares[enough]
    if not len(places):
        raise SlideError(f"{slide.path.name}: no tile with enough tissue to measure on")
    # Neighbours, as tiling meets them: a block from the middle of the list, not a scatter.
    start = max(0, (len(places) - max_tiles) // 2)
    places, shares = places[start : start + max_tiles], shares[start : start + max_tiles]
    unfiltered = replace(config, tissue=replace(config.tissue, min_sharpness=0, min_saturation=0, max_ink=1))
    loop_ms: list[float] = []
    own_ms: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            loop_ms.append(_cpu_ms(lambda: _usual_loop(slide.path, cutter.grid, places, slide, config, Path(folder))))
            for filters, settings in ((True, config), (False, unfiltered)):
                own_ms[filters].append(_own(slide, cutter.way, places, shares, settings, Path(folder), filters))
    figures = []
    for filters, times in own_ms.items():
        ratios = [loop / own for loop, own in zip(loop_ms, times, strict=True)]
        loop, own = (statistics.median(each) / len(places) for each in (loop_ms, times))
        best = min(loop_ms) / min(times)
        size = (config.tile_px, cutter.grid.mpp, len(places))
        figures.append(WayFigures(cutter.way, filters, *size, loop, own, ratios, best))
    return figures


def _cpu_ms(work: Callable[[], None]) -> float:
    started_s = time.process_time()
    work()
    return (time.process_time() - started_s) * 1000


def _own(slide: Slide, way: str, places: Ints, shares: Shares, config: TileConfig, folder: Path, verify: bool) -> float:
    """CPU milliseconds of what `tile` does with these places, from opening the slide to the finished zip."""
    job = TileJob(slide.path, "own", None, folder / "own.zip", config, slide.mpp_l0, verify=verify)

    def open_again() -> Slide:
        return open_slide(slide.path, slide.mpp_l0)

    # `Making` makes thumbnail and masks, unmeasured: the usual loop is given its places too. What that leaves in
    # OpenSlide's cache must not help: the tiles are cut from another handle.
    with (
        open_again() as looked_at,
        new_store(job.zip_path, [config.mpp]) as store,
        closing(Making(job, looked_at, open_again, store, lambda _: None)) as making,
    ):

        def work() -> None:
            with open_again() as mine:
                cutter = cutter_for(mine, config.mpp, config, open_again, way)
                try:
                    agrees(cutter, mine, open_again, places)
                    making.fill(0, cutter, _all_wanted(cutter, places, shares))
                finally:
                    cutter.source.close()
            store.finish({"scales": []})

        return _cpu_ms(work)


def _all_wanted(cutter: Cutter, places: Ints, shares: Shares) -> Wanted:
    x_l0, y_l0 = cutter.grid.corners_l0(places)
    rejected = {"region": 0, "tissue": 0, "fold": 0, "ink": 0}
    return Wanted(places, x_l0, y_l0, shares, np.zeros(len(places), np.uint16), rejected)


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
