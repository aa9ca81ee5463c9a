"""Tissue is found whatever its stain; ink, glass and dirt are not taken for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from histossl.core.config import TissueConfig
from histossl.demo.paint import PaintedSlide
from histossl.slides.quality.stain import stain_of
from histossl.slides.quality.tissue import (
    TissueMask,
    find_tissue,
    fold_mask,
    optical_density,
    otsu_within,
    pen_mask,
    thumbnail_um,
    tissue_mask,
    tissue_thumbnail,
)
from histossl.slides.reading.slide import open_slide

Paint = Callable[..., PaintedSlide]
GLASS = np.array([244.0, 243, 245])
# Optical density of a stain's usual amount
EOSIN, HAEMATOXYLIN, DAB = np.array([0.05, 0.30, 0.12]), np.array([0.45, 0.50, 0.20]), np.array([0.2, 0.42, 0.58])


def drawn(density: np.ndarray, noise: float = 1.5, seed: int = 0) -> np.ndarray:
    """A thumbnail (uint8) of optical densities (h, w, 3) on glass."""
    light = GLASS * 10**-density + np.random.default_rng(seed).normal(0, noise, density.shape)
    return np.clip(np.rint(light), 0, 255).astype(np.uint8)


def blob(height: int = 300, width: int = 400, radius: int = 100) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    inside: np.ndarray = (y - height // 2) ** 2 + (x - width // 2) ** 2 < radius**2
    return inside


def stained(inside: np.ndarray, stroma: np.ndarray = EOSIN, nuclei: np.ndarray = HAEMATOXYLIN) -> np.ndarray:
    """Stroma with nuclei in half of it."""
    textured = ndimage.gaussian_filter(np.random.default_rng(3).normal(size=inside.shape), 3) > 0.05
    textured[:, : inside.shape[1] // 2] = False
    density: np.ndarray = inside[..., None] * np.where(textured[..., None], nuclei, stroma)
    return density


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def found_in(slide: PaintedSlide) -> np.ndarray:
    """The mask of a painted slide, on the cells of its truth."""
    with open_slide(slide.path) as opened:
        tissue = find_tissue(opened, TissueConfig())
    rows, columns = slide.tissue_mask.shape
    y, x = np.mgrid[:rows, :columns] * slide.mask_downsample
    return tissue.share(x, y, slide.mask_downsample) > 0.5


# ---- against the painter's truth


@pytest.mark.parametrize(
    ("look", "pens", "seed"),
    [
        ("plain", ("blue",), 1),
        ("plain", ("red", "black"), 2),
        ("plain", ("blue", "green", "red", "black"), 3),
        ("pale", ("green",), 4),
        ("pale", ("red",), 5),
        ("dark", ("black",), 6),
        ("dark", ("red", "green"), 7),
        ("fat", ("blue",), 8),
        ("fat", (), 9),
    ],
)
def test_mask_agrees_with_the_painter_s_truth(paint: Paint, look: str, pens: tuple[str, ...], seed: int) -> None:
    label = ("normal", "adenoma", "carcinoma")[seed % 3]
    slide = paint(look=look, pens=pens, seed=seed, label=label, width_px=1280, height_px=1280, num_folds=seed % 2)
    found = found_in(slide)
    # A fat cell's vacuole is glass inside tissue: either answer is right there.
    judged = ~slide.fat_mask
    assert iou(found & judged, slide.tissue_mask & judged) >= 0.9
    if pens:
        assert (found & slide.pen_mask).sum() <= 0.01 * slide.pen_mask.sum()


@pytest.mark.parametrize("mpp", [0.25, 1.0])
def test_mask_is_the_same_tissue_under_any_scanner(paint: Paint, mpp: float) -> None:
    side = round(700 / mpp)
    slide = paint(f"{mpp}.tif", seed=12, mpp=mpp, width_px=side, height_px=side, mask_downsample=round(8 / mpp))
    assert iou(found_in(slide), slide.tissue_mask | slide.fat_mask) >= 0.9


# ---- what Otsu gets wrong when it is believed


@pytest.mark.parametrize("noise", [0.0, 1.5, 4.0])
def test_blank_glass_gives_an_empty_mask(noise: float) -> None:
    y, x = np.mgrid[:300, :400]
    shading = (0.02 * (x / 400) + 0.01 * (y / 300))[..., None] * np.ones(3)  # the lamp fades to one side by 7 %
    assert not tissue_mask(drawn(shading, noise), 8.0).any()
    assert not tissue_mask(np.full((300, 400, 3), 255, np.uint8), 8.0).any()


@pytest.mark.parametrize("strength", [0.3, 1.0, 2.0])
def test_slide_full_of_tissue_gives_a_full_mask(strength: float) -> None:
    full = stained(np.ones((300, 400), bool)) * strength
    assert tissue_mask(drawn(full), 8.0).mean() > 0.99


@pytest.mark.parametrize("strength", [0.15, 0.4, 1.0, 2.5])
def test_pale_and_dark_tissue_is_found_whole(strength: float) -> None:
    """Dense nuclei in half of it must not make Otsu take the pale half for glass."""
    inside = blob()
    assert iou(tissue_mask(drawn(stained(inside) * strength), 8.0), inside) > 0.95


def test_threshold_falls_between_glass_and_stroma() -> None:
    values = np.concatenate([np.full(1000, 0.004), np.full(500, 0.04), np.full(500, 0.4)]).astype(np.float32)
    assert 0.005 < otsu_within(values, 0.001, 0.2) < 0.04
    assert otsu_within(values[:1000], 0.012, 0.05) == pytest.approx(0.012)
    assert otsu_within(values[1000:], 0.012, 0.05) == pytest.approx(0.05)
    assert otsu_within(values[:0], 0.012, 0.05) == pytest.approx(0.012)


def test_given_threshold_is_used() -> None:
    thumbnail = drawn(stained(blob(), nuclei=EOSIN))
    assert tissue_mask(thumbnail, 8.0, TissueConfig(tissue_threshold=0.1)).any()
    assert not tissue_mask(thumbnail, 8.0, TissueConfig(tissue_threshold=0.5)).any()


# ---- holes, specks, grey things


def test_small_holes_are_filled_and_large_ones_kept() -> None:
    inside = blob()
    small, large = inside.copy(), inside.copy()
    small[140:150, 190:200] = False  # 80 microns
    large[120:180, 170:230] = False  # 480 microns
    assert tissue_mask(drawn(stained(small)), 8.0)[145, 195]
    assert not tissue_mask(drawn(stained(large)), 8.0)[150, 200]
    assert not tissue_mask(drawn(stained(small)), 8.0, TissueConfig(max_hole_um=40))[145, 195]


def test_specks_are_dropped() -> None:
    inside = blob()
    inside[20:25, 20:25] = True  # 40 microns
    mask = tissue_mask(drawn(stained(inside)), 8.0)
    assert not mask[22, 22]
    assert tissue_mask(drawn(stained(inside)), 8.0, TissueConfig(min_speck_um=0))[22, 22]


def test_grey_edges_and_dirt_are_not_tissue() -> None:
    """A cover slip's edge right across the slide, a hair, a shadow: dark enough, without a stain's colour."""
    inside = blob()
    density = stained(inside)
    density[40:46, :] = 0.25
    density[260:290, 30:90] = 0.12
    density[:, 385:390] = 0.6
    mask = tissue_mask(drawn(density), 8.0)
    assert iou(mask, inside) > 0.95


def test_grey_image_is_judged_by_density_alone() -> None:
    inside = blob()
    thumbnail = drawn(stained(inside), 0)
    grey = np.repeat(thumbnail.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)
    assert iou(tissue_mask(grey, 8.0), inside) > 0.95


def test_fluorescence_is_found_bright_on_black() -> None:
    inside = blob()
    thumbnail = (inside[..., None] * np.array([20, 60, 180]) + 4).astype(np.uint8)
    assert iou(tissue_mask(thumbnail, 8.0), inside) > 0.95


# ---- ink

INKS = {"blue": (1.3, 0.8, 0.2), "green": (1.2, 0.35, 0.75), "red": (0.1, 1.1, 0.95), "black": (1.4, 1.4, 1.35)}


@pytest.mark.parametrize("ink", INKS)
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_ink_on_glass_and_on_tissue_is_left_out(ink: str, strength: float) -> None:
    inside = blob()
    density = stained(inside)
    stroke = np.zeros(inside.shape)
    stroke[130:150, 60:340] = 1
    opacity = ndimage.gaussian_filter(stroke, 1.5)
    thumbnail = drawn(density + strength * opacity[..., None] * np.array(INKS[ink]))
    mask = tissue_mask(thumbnail, 8.0)
    inked = opacity > 0.5
    assert (mask & inked).sum() <= 0.01 * inked.sum()
    clean = inside & (opacity < 0.02)
    assert (mask & clean).sum() >= 0.93 * clean.sum()
    assert tissue_mask(thumbnail, 8.0, TissueConfig(reject_pen=False))[inked].mean() > 0.5


@pytest.mark.parametrize("stroma", [EOSIN, DAB, np.array([0.35, 0.33, 0.12]), np.array([0.1, 0.5, 0.35])])
def test_stains_are_not_taken_for_ink(stroma: np.ndarray) -> None:
    """H&E, DAB, a blue counterstain, salmon eosin."""
    density = optical_density(drawn(stained(blob(), stroma)))
    assert not pen_mask(density, 8.0).any()


def nearly_black(inside: np.ndarray, strength: float = 1.0) -> np.ndarray:
    """Folded, thick epithelium as scanned of the colon slide V-0b: grey values of 38, 20, 39."""
    uneven = ndimage.gaussian_filter(np.random.default_rng(5).normal(size=inside.shape), 6)
    amount = 1 + 0.05 * uneven / uneven.std()
    density: np.ndarray = strength * (inside * amount)[..., None] * np.array([0.78, 1.03, 0.77])
    return ndimage.gaussian_filter(density, (1, 1, 0))


@pytest.mark.parametrize("strength", [0.8, 1.0, 1.15])
def test_tissue_stained_nearly_black_is_not_black_ink(strength: float) -> None:
    inside = blob()
    patch = inside & (np.mgrid[:300, :400][1] > 200)
    density = np.where(patch[..., None], 0, stained(inside)) + nearly_black(patch, strength)
    assert not pen_mask(optical_density(drawn(density)), 8.0).any()
    assert iou(tissue_mask(drawn(density), 8.0), inside) > 0.95


def test_a_black_stroke_beside_nearly_black_tissue_and_over_dark_tissue_is_left_out() -> None:
    inside = blob()
    patch = inside & (np.mgrid[:300, :400][1] > 230)
    stroke = np.zeros(inside.shape)
    stroke[130:150, 40:200] = 1
    opacity = ndimage.gaussian_filter(stroke, 1.5)
    density = np.where(patch[..., None], 0, 1.5 * stained(inside)) + nearly_black(patch)
    mask = tissue_mask(drawn(density + opacity[..., None] * np.array(INKS["black"])), 8.0)
    assert (mask & (opacity > 0.5)).sum() <= 0.01 * (opacity > 0.5).sum()
    assert mask[patch].mean() > 0.95


@pytest.mark.data
@pytest.mark.parametrize("name", ["AC-0a", "H-2a", "S-2a", "T-3b", "V-0b"])
def test_real_tissue_is_kept_and_holds_no_ink(real_data: Path, name: str) -> None:
    with open_slide(real_data / "colon" / "slides" / f"{name}.tif") as slide:
        thumbnail, downsample = tissue_thumbnail(slide, 8.0)
        um_per_px = downsample * slide.mpp_l0
    assert tissue_mask(thumbnail, um_per_px).mean() > 0.98
    assert not pen_mask(optical_density(thumbnail), um_per_px).any()


# ---- folds


def test_doubled_tissue_is_a_fold() -> None:
    inside = blob()
    density = stained(inside)
    band = np.zeros(inside.shape, bool)
    band[140:160] = True
    density[band] *= 2
    folds = fold_mask(drawn(density), inside)
    assert folds[band & inside].mean() > 0.7
    assert folds[inside & ~band].mean() < 0.05
    assert not fold_mask(drawn(density), np.zeros(inside.shape, bool)).any()


@pytest.mark.data
def test_dense_epithelium_is_not_a_fold(real_data: Path) -> None:
    with open_slide(real_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        thumbnail, downsample = tissue_thumbnail(slide, 8.0)
        tissue = find_tissue(slide, TissueConfig())
    folds = TissueMask(fold_mask(thumbnail, tissue.mask), downsample)
    y, x = np.mgrid[:11, :8] * 256.0
    full = tissue.share(x, y, 256) > 0.5
    assert (folds.share(x, y, 256)[full] > TissueConfig().max_fold).mean() < 0.05


# ---- shares


def test_share_is_the_area_under_the_square() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((40, 60)) < 0.4
    tissue = TissueMask(mask, 10.0)
    fine = np.kron(mask, np.ones((10, 10)))
    x, y, side = rng.integers(0, 500, 50), rng.integers(0, 300, 50), rng.integers(5, 100, 50)
    truth = [fine[b : b + s, a : a + s].mean() for a, b, s in zip(x, y, side, strict=True)]
    np.testing.assert_allclose(tissue.share(x, y, side), truth, atol=1e-9)


def test_share_outside_the_slide_is_none() -> None:
    tissue = TissueMask(np.ones((10, 10), bool), 10.0)
    assert tissue.share(0, 0, 100) == pytest.approx(1)
    assert tissue.share(50, 0, 100) == pytest.approx(0.5)
    assert tissue.share(-50, -50, 100) == pytest.approx(0.25)
    assert tissue.share(500, 500, 100) == 0


def test_area_is_in_microns() -> None:
    assert TissueMask(np.ones((10, 20), bool), 16.0).area_um2(0.25) == pytest.approx(200 * 16)


def test_thumbnail_s_scale_suits_the_slide(painted_slide: PaintedSlide) -> None:
    with open_slide(painted_slide.path) as slide:
        assert thumbnail_um(slide, 8.0) == 2.0, "a small slide is looked at more closely"
        slide.size_l0 = (20_000, 10_000)
        assert thumbnail_um(slide, 8.0) == 8.0
        slide.size_l0 = (200_000, 100_000)
        assert thumbnail_um(slide, 8.0) == pytest.approx(100_000 / 2560), "a huge one is not looked at in full detail"


# ---- stain


@pytest.mark.parametrize(
    ("stroma", "nuclei", "family"),
    [
        (EOSIN, HAEMATOXYLIN, "H&E"),
        (np.array([0.30, 0.28, 0.10]), DAB, "IHC"),
        (np.array([0.30, 0.28, 0.10]), np.array([0.5, 0.46, 0.2]), "IHC"),
        (DAB, DAB, "IHC"),
    ],
)
def test_stain_family(stroma: Any, nuclei: Any, family: str) -> None:
    inside = blob()
    stain = stain_of(drawn(stained(inside, stroma, nuclei)), inside)
    assert stain.family == family, stain
    assert stain.figures.startswith("purple ")


def test_stain_of_the_unusual() -> None:
    inside = blob()
    assert (
        stain_of((inside[..., None] * np.array([20, 60, 180]) + 4).astype(np.uint8), inside).family
        == "fluorescence/other"
    )
    assert stain_of(drawn(stained(inside)), np.zeros(inside.shape, bool)).family == "unknown"
    assert stain_of(np.full((50, 50, 3), 120, np.uint8), np.ones((50, 50), bool)).family == "unknown"
