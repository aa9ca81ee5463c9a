"""Tiling against the usual loop, as ratios of CPU time per tile on one core: of each side's quickest repeat.

    pytest tests/bench/bench_tile.py -s -m ""

About ten minutes, most of them for a slide of 100,000 px a side (3 GB of disk). `histossl bench tile SLIDE` prints
the same table for any slide.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import vendor_files
from bench.svs_like import write_svs_like

from histossl.bench.tiling_rates import measure_tiling
from histossl.core.config import TileConfig
from histossl.demo.huge import paint_huge_slide
from histossl.demo.paint import paint_slide
from histossl.slides.reading.slide import open_slide

pytestmark = pytest.mark.slow


def told(what, figures):
    for one in figures:
        spread = ", ".join(f"{ratio:.1f}" for ratio in one.ratios)
        way = one.way if one.filters else f"{one.way}, no filters"
        print(
            f"{what}, {way}: {one.num_tiles} tiles of {one.tile_px} px at {one.mpp:.3g} mpp, "
            f"{one.own_ms:.3f} ms against {one.loop_ms:.2f} ms a tile, {one.ratio:.1f}x ({spread}), "
            f"best {one.best_ratio:.2f}x"
        )
    return {(one.way, one.filters): one.best_ratio for one in figures}


def test_with_its_filters_copied_40_times_stitched_8_times_as_fast_as_the_usual_loop(tmp_path):
    slide = write_svs_like(tmp_path / "svs-like.tif")
    # Enough tiles that opening and the comparison with OpenSlide, once per slide, do not decide.
    ratios = told("SVS-like, JPEG, 0.25 mpp", measure_tiling(slide, TileConfig(), max_tiles=2464, repeats=3))
    assert ratios["copied", True] >= 40
    assert ratios["stitched", True] >= 8
    # OpenSlide alone takes 58 % of the usual loop's time here: reading through it cannot be 1.7 times as fast.
    assert ratios["read", True] >= 1.4


@pytest.mark.parametrize("compression", ["deflate", "jp2k"])
def test_what_is_not_jpeg_is_half_as_fast_again(tmp_path, compression):
    slide = tmp_path / "A1.tif"
    paint_slide(slide, width_px=4096, height_px=4096, mpp=0.25, compression=compression, pyramid=False)
    ratios = told(f"{compression}, 0.25 mpp", measure_tiling(slide, TileConfig()))
    assert ratios["stitched", False] >= 1.5


def test_real_slides(real_data):
    slides = real_data / "slides"
    told("CMU-1-Small-Region.svs", measure_tiling(slides / "CMU-1-Small-Region.svs", TileConfig()))
    tcga = slides / "TCGA-CR-7395-01A-01-TS1.svs"
    ratios = told("TCGA JPEG 2000", measure_tiling(tcga, TileConfig(), slide_mpp=0.25))
    assert max(ratios.values()) >= 1.5


@pytest.mark.parametrize("vendor", ["leica", "mirax", "ventana", "hamamatsu"])
def test_other_scanners(tmp_path, monkeypatch, vendor):
    """Painted in their layouts. OpenSlide blends each pixel it shows in floats, which no way of asking avoids."""
    monkeypatch.setattr(vendor_files, "TILE_PX", 256)
    monkeypatch.setattr(vendor_files, "QUALITY", 80)
    name, write = vendor_files.WRITERS[vendor]
    painted = paint_slide(tmp_path / "A.tif", width_px=4096, height_px=4096, mpp=0.25, compression="deflate").path
    with open_slide(painted) as slide:
        write(tmp_path / name, slide.read_level(0, 0, 0, 4096, 4096), 0.25)
    for mpp in (0.25, 0.4):  # as it is stored, and between two levels
        ratios = told(f"{vendor} at {mpp}", measure_tiling(tmp_path / name, TileConfig(mpp=mpp), slide_mpp=0.25))
        assert ratios["read", False] >= 1
        if vendor == "leica":
            assert ratios["stitched", True] >= 2


TILE_ONE = """
import json, sys, time
from pathlib import Path
from histossl.core.config import TileConfig
from histossl.tiles.cutting.tile_slide import TileJob, tile_slide
slide, out, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
started_s = time.process_time()
made = tile_slide(TileJob(slide, "A1", "A1", out, TileConfig(**settings)), lambda count: None)
# Not getrusage: its peak would count what pytest held when it started this process.
status = Path("/proc/self/status").read_text()
peak_mb = int(status.split("VmHWM:")[1].split()[0]) / 1024
cpu_s, told = time.process_time() - started_s, made.tiling
print(json.dumps([told["counts"]["tiles"], told["scales"][0]["way"], cpu_s, peak_mb]))
"""


@pytest.mark.timeout(3600)  # two minutes of CPU, which on a busy machine are more than the usual ten
def test_a_slide_of_100_000_px_a_side_takes_less_than_600_mb(tmp_path):
    slide = paint_huge_slide(tmp_path / "huge.tif")
    for settings in ({}, {"mpp": 0.25}, {"mpp": 0.45}):
        command = [sys.executable, "-c", TILE_ONE, str(slide), str(tmp_path / "A1.zip"), json.dumps(settings)]
        tiles, way, cpu_s, peak_mb = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        print(f"100,000 x 100,000 px, {settings}: {tiles:,} tiles {way}, {cpu_s:.0f} s of CPU, peak {peak_mb:.0f} MB")
        assert peak_mb < 600
