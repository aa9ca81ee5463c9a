"""A tile out of focus is told from one in focus, whatever its stain and contrast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from histossl.core.config import TissueConfig
from histossl.demo.paint import PaintedSlide
from histossl.slides.quality.focus import saturation, sharpness
from histossl.slides.reading.slide import open_slide

LIMITS = TissueConfig()


def blurred(tiles: np.ndarray, sigma_px: float) -> np.ndarray:
    soft = ndimage.gaussian_filter(tiles.astype(float), (0, sigma_px, sigma_px, 0))
    noisy = soft + np.random.default_rng(0).normal(0, 1, tiles.shape)  # the camera's noise is not out of focus
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def tiles_of(path: Path, mpp: float = 0.5) -> np.ndarray:
    with open_slide(path) as slide:
        side = 256 * mpp / slide.mpp_l0
        width, height = slide.size_l0
        tiles = [
            slide.read_region_l0(x, y, side, side, 256, 256)
            for y in np.arange(0, height - side, side)
            for x in np.arange(0, width - side, side)
        ]
    return np.array([tile for tile in tiles if (tile.mean(axis=2) < 225).mean() > 0.6])


@pytest.mark.parametrize("look", ["plain", "pale", "dark"])
def test_painted_tiles_in_focus_pass_and_blurred_ones_do_not(paint: Callable[..., PaintedSlide], look: str) -> None:
    tiles = tiles_of(paint(look=look, seed=4, width_px=1280, height_px=1280).path)
    assert len(tiles) >= 3
    assert (sharpness(tiles) > LIMITS.min_sharpness).all()
    assert (sharpness(blurred(tiles, 4)) < LIMITS.min_sharpness).mean() > 0.8


@pytest.mark.data
@pytest.mark.parametrize("name", ["colon/slides/AC-0a.tif", "colon/slides/V-0b.tif", "slides/CMU-1-Small-Region.svs"])
def test_real_tiles_in_focus_pass_and_blurred_ones_do_not(real_data: Path, name: str) -> None:
    tiles = tiles_of(real_data / name)
    assert (sharpness(tiles) > 1.5 * LIMITS.min_sharpness).all()
    assert (sharpness(blurred(tiles, 3)) < LIMITS.min_sharpness).mean() > 0.95


def test_sharpness_does_not_depend_on_contrast_or_brightness() -> None:
    tile = ndimage.gaussian_filter(np.random.default_rng(0).normal(0, 1, (256, 256)), 2)
    tile = tile / tile.std()
    strong = np.clip(128 + 40 * tile, 0, 255).astype(np.uint8)
    faint = np.clip(200 + 10 * tile, 0, 255).astype(np.uint8)
    one, other = sharpness(np.stack([strong, faint]))
    assert one == pytest.approx(other, rel=0.05)


def test_empty_tile_has_no_sharpness() -> None:
    assert sharpness(np.full((2, 256, 256, 3), 240, np.uint8)).tolist() == [0, 0]
    assert sharpness(np.zeros((0, 256, 256, 3), np.uint8)).shape == (0,)


def test_small_tiles_are_judged_too() -> None:
    assert sharpness(np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)).shape == (2,)


def test_saturation_is_zero_for_grey_and_one_for_pure_colour() -> None:
    tiles = np.zeros((3, 64, 64, 3), np.uint8)
    tiles[0] = 120
    tiles[1] = (200, 0, 0)
    tiles[2] = (200, 100, 200)
    np.testing.assert_allclose(saturation(tiles), [0, 1, 0.5], atol=1e-6)
