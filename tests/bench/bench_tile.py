"""Tiling against the usual loop, as ratios of CPU time per tile on one core; floors with room for a busy machine.

    pytest tests/bench/bench_tile.py -s -m ""

About two minutes. `histossl bench tile SLIDE` prints the same table for any slide.
"""

from __future__ import annotations

import statistics

import pytest
from svs_like import write_svs_like

from histossl.config import TileConfig
from histossl.demo.paint import paint_slide
from histossl.tiles.measure import measure_tiling

pytestmark = pytest.mark.slow


def told(what, figures):
    for one in figures:
        spread = ", ".join(f"{ratio:.1f}" for ratio in one.ratios)
        print(
            f"{what}, {one.way}: {one.num_tiles} tiles of {one.tile_px} px at {one.mpp:.3g} mpp, "
            f"{one.own_ms:.3f} ms against {one.loop_ms:.2f} ms a tile, {one.ratio:.1f}x ({spread})"
        )
    return {one.way: statistics.median(one.ratios) for one in figures}


def test_copied_40_times_stitched_8_times_as_fast_as_the_usual_loop(tmp_path):
    slide = write_svs_like(tmp_path / "svs-like.tif")
    ratios = told("SVS-like, JPEG, 0.25 mpp", measure_tiling(slide, TileConfig(), repeats=5))
    assert ratios["copied"] >= 40
    assert ratios["stitched"] >= 8
    # OpenSlide alone takes 60 % of the usual loop's time here, so that reading through it cannot be much faster.
    assert ratios["read"] >= 1.25


@pytest.mark.parametrize("compression", ["deflate", "jp2k"])
def test_what_is_not_jpeg_is_half_as_fast_again(tmp_path, compression):
    slide = tmp_path / "A1.tif"
    paint_slide(slide, width_px=4096, height_px=4096, mpp=0.25, compression=compression, pyramid=False)
    ratios = told(f"{compression}, 0.25 mpp", measure_tiling(slide, TileConfig()))
    assert ratios["stitched"] >= 1.5


def test_real_slides(real_data):
    slides = real_data / "slides"
    told("CMU-1-Small-Region.svs", measure_tiling(slides / "CMU-1-Small-Region.svs", TileConfig()))
    tcga = slides / "TCGA-CR-7395-01A-01-TS1.svs"
    ratios = told("TCGA JPEG 2000", measure_tiling(tcga, TileConfig(), slide_mpp=0.25))
    assert max(ratios.values()) >= 1.5
