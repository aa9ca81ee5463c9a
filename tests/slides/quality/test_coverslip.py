"""The edge of a cover slip is not tissue, whatever its colours; a thin piece of tissue is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from slides.quality.test_tissue import DAB, EOSIN, HAEMATOXYLIN, blob, drawn, iou, stained

from histossl.demo.flaws import EDGE_OD
from histossl.demo.paint import PaintedSlide
from histossl.slides.quality.coverslip import edge_mask
from histossl.slides.quality.tissue import optical_density, tissue_mask, tissue_thumbnail
from histossl.slides.reading.slide import open_slide

UM = 8.0
BLUISH, YELLOWISH = np.array(EDGE_OD[0]) / 2, np.array(EDGE_OD[2]) / 2


def line(slant: float, bow: float, width_px: float, at: float = 40) -> np.ndarray:
    """Opacity of a line across a thumbnail of 300 x 400 px."""
    y, x = np.mgrid[:300, :400]
    middle = at + slant * x + bow * (x / 200 - 1) ** 2
    return np.exp(-(((y - middle) / width_px) ** 2))


@pytest.mark.parametrize(
    ("look", "seed", "num_edges", "label"),
    [("plain", 8, 1, "carcinoma"), ("pale", 5, 2, "carcinoma"), ("dark", 2, 1, "carcinoma"), ("fat", 11, 2, "adenoma")],
)
def test_painted_edges_are_left_out_and_the_tissue_is_not(
    paint: Callable[..., PaintedSlide], look: str, seed: int, num_edges: int, label: str
) -> None:
    slide = paint(look=look, seed=seed, num_edges=num_edges, label=label, mpp=2.0, width_px=1280, height_px=1280)
    with open_slide(slide.path) as opened:
        thumbnail, downsample = tissue_thumbnail(opened, 8.0)
    found = tissue_mask(thumbnail, downsample * slide.mpp)

    def on_thumbnail(mask: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(mask).resize(found.shape[::-1]))

    edge, fat, tissue = (on_thumbnail(mask) for mask in (slide.edge_mask, slide.fat_mask, slide.tissue_mask))
    assert edge.sum() > 5000
    assert (found & edge).sum() <= 0.1 * edge.sum()
    assert iou(found & ~fat, tissue & ~fat) >= 0.9


@pytest.mark.parametrize(
    ("look", "seed", "label"), [("plain", 8, "carcinoma"), ("fat", 8, "adenoma"), ("pale", 8, "normal")]
)
def test_on_a_slide_of_0_64_mm_the_edge_s_colours_tell_it(
    paint: Callable[..., PaintedSlide], look: str, seed: int, label: str
) -> None:
    """Tissue leaves stretches of it that are shorter than 0.3 mm."""
    slide = paint(look=look, seed=seed, num_edges=1, label=label, mpp=2.0, width_px=320, height_px=320)
    with open_slide(slide.path) as opened:
        thumbnail, _ = tissue_thumbnail(opened, 8.0)
    found = tissue_mask(thumbnail, 2.0)
    edge, fat, tissue = (
        np.asarray(Image.fromarray(mask).resize(found.shape[::-1]))
        for mask in (slide.edge_mask, slide.fat_mask, slide.tissue_mask)
    )
    assert (found & edge).sum() <= 0.1 * edge.sum()
    assert (found & tissue & ~edge).sum() >= 0.92 * (tissue & ~edge).sum()
    assert iou(found & ~fat, tissue & ~fat) >= 0.9


def test_a_strip_brown_along_one_side_and_blue_along_the_other_is_kept() -> None:
    """DAB beside its counterstain is red absorbed here and blue there, as behind a prism; but as much green as red."""
    strip = np.zeros((300, 400), bool)
    strip[150:158, 150:186] = True
    density = strip[..., None] * np.where(np.mgrid[:300, :400][0][..., None] < 154, DAB, np.array([0.30, 0.28, 0.10]))
    assert not edge_mask(strip, optical_density(drawn(density)), UM).any()
    density = strip[..., None] * np.where(np.mgrid[:300, :400][0][..., None] < 154, YELLOWISH, BLUISH) * 2
    assert edge_mask(strip, optical_density(drawn(density)), UM)[strip].mean() > 0.9


@pytest.mark.parametrize("colour", [BLUISH, YELLOWISH, BLUISH + YELLOWISH * 0.3])
@pytest.mark.parametrize(("slant", "bow", "at"), [(0, 0, 40), (0.1, 0, 20), (-0.06, 9, 40), (0, 0, 1)])
def test_a_line_of_one_colour_is_left_out(colour: np.ndarray, slant: float, bow: float, at: float) -> None:
    inside = blob()
    edge = line(slant, bow, 3, at)
    for turned in (False, True):
        density = stained(inside) + edge[..., None] * colour
        thumbnail = drawn(np.swapaxes(density, 0, 1) if turned else density)
        mask = tissue_mask(thumbnail, UM)
        mask = mask.T if turned else mask
        off = ~ndimage.binary_dilation(inside, iterations=20)
        assert not mask[off & (edge > 0.2)].any()
        assert iou(mask, inside) > 0.95


@pytest.mark.parametrize("stain", ["H&E", "IHC"])
def test_a_needle_s_core_is_kept(stain: str) -> None:
    """Straight, and 25 times as long as wide; but half a millimetre wide."""
    core = np.zeros((300, 1600), bool)
    core[140:204, 20:1580] = True
    stroma, nuclei = (EOSIN, HAEMATOXYLIN) if stain == "H&E" else (np.array([0.30, 0.28, 0.10]), DAB)
    assert iou(tissue_mask(drawn(stained(core, stroma, nuclei)), UM), core) > 0.95


@pytest.mark.parametrize("stain", ["H&E", "IHC"])
def test_a_ragged_thin_strip_of_tissue_is_kept(stain: str) -> None:
    rng = np.random.default_rng(1)
    wander = ndimage.gaussian_filter1d(rng.normal(size=400), 8)
    width = 7 + 4 * ndimage.gaussian_filter1d(rng.normal(size=400), 4) / 0.25
    y, x = np.mgrid[:300, :400]
    strip = (np.abs(y - 150 - 25 * wander[x]) < width[x]) & (x > 30) & (x < 370)
    stroma, nuclei = (EOSIN, HAEMATOXYLIN) if stain == "H&E" else (np.array([0.30, 0.28, 0.10]), DAB)
    density = stained(strip, stroma, nuclei)
    assert not edge_mask(strip, optical_density(drawn(density)), UM).any()


def test_a_straight_strip_of_eosin_and_haematoxylin_is_kept() -> None:
    strip = np.zeros((300, 400), bool)
    strip[150:157, 20:380] = True
    assert tissue_mask(drawn(stained(strip)), UM)[strip].mean() > 0.95


@pytest.mark.data
@pytest.mark.parametrize("mpp", [0.25, 0.5, 2.0, 8.0])
def test_real_tissue_has_no_edge_at_any_scale(real_data: Path, mpp: float) -> None:
    """At eight microns a pixel, which it is not, a strip of keratin is a millimetre long."""
    for name in ("CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs", "kidney-48-5.tif"):
        with open_slide(real_data / "slides" / name, mpp) as slide:
            thumbnail, downsample = tissue_thumbnail(slide, 8.0)
        density = optical_density(thumbnail)
        absorbs = density.max(axis=2) > 0.05
        assert edge_mask(absorbs, density, downsample * mpp).mean() < 0.001, name
