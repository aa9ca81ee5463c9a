"""No pen ink in kept tiles: neither beside tissue nor in strokes too thin for the thumbnail."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from histossl.core.config import TileConfig, TissueConfig
from histossl.core.workspace import Workspace
from histossl.demo.flaws import PEN_OD
from histossl.demo.paint import PENS, PaintedSlide
from histossl.slides.quality.tissue import InkFinder
from histossl.tiles.cutting.tile_slide import TileJob, tile_slide
from histossl.tiles.store.zip_store import read_store
from histossl.tiles.tiling import tile_archive

GLASS = np.array([243.0, 242, 244])
OPEN = TissueConfig(min_tissue=0.25, min_sharpness=0, min_saturation=0, max_fold=1)


def ink_in_tiles(slide: PaintedSlide, workspace: Workspace) -> tuple[int, int]:
    """Cells of the truth with ink that lie in kept tiles, and all of them."""
    store = read_store(workspace.zip_of("A1"))
    side = store.tiling["scales"][0]["side_l0"]
    kept = np.zeros_like(slide.pen_mask)
    for row in store.table:
        x0, y0 = (round(int(row[name]) / slide.mask_downsample) for name in ("x_l0", "y_l0"))
        kept[y0 : y0 + round(side / slide.mask_downsample), x0 : x0 + round(side / slide.mask_downsample)] = True
    return int((kept & slide.pen_mask).sum()), int(slide.pen_mask.sum())


@pytest.mark.parametrize("grid", ["physical", "native"])
@pytest.mark.parametrize(("pens", "look"), [(PENS, "plain"), (("red", "blue"), "pale"), (("green", "black"), "dark")])
def test_at_most_one_percent_of_the_ink_is_in_kept_tiles(
    paint: Callable[..., PaintedSlide], workspace: Workspace, pens: tuple[str, ...], look: str, grid: str
) -> None:
    slide = paint(pens=pens, look=look, seed=3, width_px=2048, height_px=2048, mask_downsample=4)
    config = TileConfig(tile_px=256, grid=grid, tissue=OPEN)
    (row,) = tile_archive(slide.path.parent, workspace, config, 0)
    kept, all_ink = ink_in_tiles(slide, workspace)
    assert (row.num_tiles or 0) >= 8
    assert row.rejected_ink
    assert kept <= 0.01 * all_ink
    counts = read_store(workspace.zip_of("A1")).tiling["counts"]
    assert counts["places"] == counts["tiles"] + sum(counts[name] for name in ("tissue", "ink"))


def test_without_the_filter_ink_beside_tissue_is_kept(paint: Callable[..., PaintedSlide], workspace: Workspace) -> None:
    slide = paint(pens=PENS, seed=3, width_px=2048, height_px=2048, mask_downsample=4)
    (row,) = tile_archive(slide.path.parent, workspace, TileConfig(tissue=replace(OPEN, max_ink=1)), 0)
    kept, all_ink = ink_in_tiles(slide, workspace)
    assert row.rejected_ink == 0
    assert kept > 0.1 * all_ink


@pytest.mark.parametrize("pen", PENS)
@pytest.mark.parametrize("width_um", [10, 15, 30])
@pytest.mark.parametrize("slant", [0.0, 0.7])
def test_a_thin_stroke_over_tissue_is_seen_on_its_tile(
    paint: Callable[..., PaintedSlide], pen: str, width_um: float, slant: float
) -> None:
    tile = np.asarray(Image.open(paint(seed=6, mpp=0.5, pyramid=False).path))[384:640, 384:640]
    y, x = np.mgrid[:256, :256]
    across_um = np.abs(y - 60 - slant * x) / np.hypot(1, slant) * 0.5
    opacity = np.clip(width_um / 2 - across_um + 0.5, 0, 1)
    inked = np.rint(tile * np.exp(-opacity[..., None] * np.array(PEN_OD[pen]))).astype(np.uint8)
    finder = InkFinder(GLASS)
    assert finder.share(tile, 0.5) <= 0.01
    assert finder.share(inked, 0.5) > 0.01


@pytest.mark.data
@pytest.mark.parametrize("grid", ["physical", "native"])
def test_a_real_piece_stained_nearly_black_is_kept(real_data: Path, tmp_path: Path, grid: str) -> None:
    """V-0b: four of its tiles were taken for black ink."""
    config = TileConfig(tile_px=224 if grid == "native" else 256, grid=grid)
    slide = real_data / "colon" / "slides" / "V-0b.tif"
    counts = tile_slide(TileJob(slide, "A1", "A1", tmp_path / "A1.zip", config), lambda _: None).tiling["counts"]
    assert counts["tiles"] >= 60
    assert counts["ink"] == 0


def test_where_every_tile_has_ink_the_reason_says_so(
    paint: Callable[..., PaintedSlide], workspace: Workspace, cli: Callable[..., tuple[int, str, str]]
) -> None:
    slide = paint(pens=("blue", "black"), seed=3, look="plain")
    code, out, err = cli("tile", slide.path.parent, "-w", workspace.root, "--tile-px", 1000, "--min-tissue", 0.1)
    assert code == 1
    assert "have more than 1% pen ink" in out + err
    tiling = read_store(workspace.zip_of("A1")).tiling
    assert tiling["counts"]["ink"] == 1
    assert json.loads(json.dumps(tiling["config"]))["tissue"]["max_ink"] == 0.01
