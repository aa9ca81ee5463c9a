"""The painter is what other tests trust, so its truth is checked against the pixels and against OpenSlide."""

import csv
import hashlib
from collections import defaultdict

import numpy as np
import openslide
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict

from histossl.core.errors import UsageError
from histossl.demo.huge import paint_huge_slide
from histossl.demo.paint import CLASSES, PENS, paint_archive, paint_slide


def pixels(slide):
    """Level 0 as an array, shrunk to the masks' grid."""
    with openslide.OpenSlide(slide.path) as opened:
        image = opened.read_region((0, 0), 0, opened.dimensions).convert("RGB")
    rows, columns = slide.tissue_mask.shape
    return np.asarray(image.resize((columns, rows), Image.Resampling.BOX), float)


def test_openslide_finds_levels_and_scale(painted_slide):
    with openslide.OpenSlide(painted_slide.path) as opened:
        assert opened.properties["openslide.vendor"] == "generic-tiff"
        assert float(opened.properties["openslide.mpp-x"]) == pytest.approx(0.5, rel=1e-4)
        assert opened.level_dimensions == ((1024, 1024), (512, 512), (256, 256))


def test_scale_is_absent_when_not_written(paint):
    slide = paint(write_mpp=False, width_px=256, height_px=256)
    with openslide.OpenSlide(slide.path) as opened:
        assert "openslide.mpp-x" not in opened.properties


def test_same_arguments_give_the_same_bytes_and_another_seed_others(tmp_path):
    def digest(name, seed):
        options = {"width_px": 300, "height_px": 200, "pens": ("red",), "num_blurs": 1, "num_folds": 1}
        path = paint_slide(tmp_path / name, seed=seed, **options).path
        return hashlib.sha256(path.read_bytes()).hexdigest()

    assert digest("a.tif", 1) == digest("b.tif", 1) != digest("c.tif", 2)


def test_masks_agree_with_the_pixels(painted_archive):
    """Tissue is pink to purple, glass is near white, ink is not tissue."""
    for slide in painted_archive.slides:
        seen = pixels(slide)
        saturation = seen.max(-1) - seen.min(-1)
        glass = ~(slide.tissue_mask | slide.pen_mask | slide.fat_mask)
        assert 0.25 < slide.tissue_mask.mean() < 0.85
        assert not (slide.tissue_mask & slide.pen_mask).any()
        assert not (slide.tissue_mask & slide.fat_mask).any()
        assert np.mean(saturation[slide.tissue_mask] > 15) > 0.93
        assert np.mean(seen.min(-1)[glass] > 225) > 0.93
        if slide.fat_mask.sum() > 50:
            assert seen.min(-1)[slide.fat_mask].mean() > 205 > 195 > seen.min(-1)[slide.tissue_mask].mean()


@pytest.mark.parametrize("pen", PENS)
def test_ink_has_its_colour_where_the_pen_mask_says(paint, pen):
    slide = paint(f"{pen}.tif", pens=(pen,), seed=4, label="adenoma")
    seen = pixels(slide)[slide.pen_mask]
    assert len(seen) > 30
    strongest = {"red": 0, "green": 1, "blue": 2}
    if pen == "black":
        assert seen.max(-1).mean() < 70
    else:
        assert np.mean(seen.argmax(-1) == strongest[pen]) > 0.9


def test_a_pen_moves_no_tissue(paint):
    without, with_pen = paint("a.tif", seed=9), paint("b.tif", seed=9, pens=("green",))
    near_ink = binary_dilation(with_pen.pen_mask, iterations=2)
    assert with_pen.pen_mask.any()
    assert np.array_equal(without.tissue_mask[~near_ink], with_pen.tissue_mask[~near_ink])
    assert np.abs(pixels(without) - pixels(with_pen))[~near_ink].max() < 3


def test_another_resolution_shows_the_same_tissue(paint):
    coarse = paint("coarse.tif", width_px=512, height_px=512, mpp=1.0, seed=3, mask_downsample=8)
    fine = paint("fine.tif", width_px=2048, height_px=2048, mpp=0.25, seed=3, mask_downsample=32)
    assert np.array_equal(coarse.tissue_mask, fine.tissue_mask)
    a, b = pixels(coarse), pixels(fine)
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.97


def test_a_blur_takes_the_detail_away_where_its_mask_says(paint):
    sharp, blurred = paint("a.tif", seed=6), paint("b.tif", seed=6, num_blurs=1)
    assert blurred.blur_mask.any()
    change = np.abs(pixels(sharp) - pixels(blurred)).mean(-1)
    assert change[blurred.blur_mask].mean() > 20 * change[~blurred.blur_mask & sharp.tissue_mask].mean()


def test_looks_differ_as_named(paint):
    plain, pale, dark, fat = (paint(f"{look}.tif", look=look, seed=2) for look in ("plain", "pale", "dark", "fat"))
    grey = [pixels(slide)[slide.tissue_mask].mean() for slide in (dark, plain, pale)]
    assert grey[0] + 20 < grey[1] < grey[2] - 20
    assert fat.fat_mask.mean() > 4 * plain.fat_mask.mean()


@pytest.mark.parametrize("compression", ["deflate", "jp2k"])
def test_other_codecs_hold_the_same_picture(paint, compression):
    size = {"width_px": 512, "height_px": 384, "seed": 1}
    jpeg, other = paint("a.tif", **size), paint("b.tif", compression=compression, **size)
    assert np.abs(pixels(jpeg) - pixels(other)).mean() < 2
    with openslide.OpenSlide(other.path) as opened:
        assert float(opened.properties["openslide.mpp-x"]) == pytest.approx(0.5, rel=1e-4)


def test_a_patient_has_one_class_and_labels_name_every_slide(painted_archive):
    with painted_archive.labels_csv.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["slide"] for row in rows} == {path.stem for path in painted_archive.directory.glob("*.tif")}
    classes_of = defaultdict(set)
    for row in rows:
        classes_of[row["patient"]].add(row["label"])
        assert painted_archive[row["slide"]].label == row["label"]
    assert len(classes_of) == 6
    assert all(len(labels) == 1 for labels in classes_of.values())
    assert {row["label"] for row in rows} == set(CLASSES)


def test_mean_colour_does_not_tell_the_class(tmp_path):
    """A linear model on mean colour stays near chance on unseen patients; so does any ranking by one channel."""
    slides = paint_archive(tmp_path, num_slides=36, seed=8, side_px=256, mpp=2.0, num_workers=1)
    colours = np.stack([pixels(slide)[slide.tissue_mask].mean(0) for slide in slides])
    labels = np.array([slide.label for slide in slides])
    patients = np.array([slide.path.stem.split("-")[0] for slide in slides])
    standard = (colours - colours.mean(0)) / colours.std(0)
    guessed = cross_val_predict(LogisticRegression(), standard, labels, groups=patients, cv=GroupKFold(6))
    assert np.mean(guessed == labels) < 0.5
    between = np.stack([colours[labels == name].mean(0) for name in CLASSES]).std(0)
    within = np.stack([colours[labels == name].std(0) for name in CLASSES]).mean(0)
    assert (within > 1.5 * between).all()


def test_a_huge_slide_repeats_its_tissue_on_every_level(tmp_path):
    path = paint_huge_slide(tmp_path / "huge.tif", width_px=6000, height_px=5000, block_px=512, tile_px=256, mpp=0.5)
    with openslide.OpenSlide(path) as opened:
        assert opened.dimensions == (6000, 5000)
        assert float(opened.properties["openslide.mpp-x"]) == pytest.approx(0.5, rel=1e-4)
        middle = [np.asarray(opened.read_region((x, 2560), 0, (512, 512)).convert("RGB")) for x in (2560, 3072)]
        corner = np.asarray(opened.read_region((0, 0), 0, (512, 512)).convert("RGB"))
        assert np.array_equal(*middle)
        assert middle[0].std() > 20 > 1 > corner.std()
        for level in range(opened.level_count):
            side = int(2048 / opened.level_downsamples[level])
            shrunk = opened.read_region((2048, 2048), level, (side, side)).convert("RGB").resize((16, 16))
            whole = opened.read_region((2048, 2048), 0, (2048, 2048)).convert("RGB").resize((16, 16))
            assert np.abs(np.asarray(shrunk, float) - np.asarray(whole, float)).mean() < 6


def test_what_cannot_be_painted_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match="label 'lymphoma': can be painted only as normal, adenoma, carcinoma"):
        paint_slide(tmp_path / "a.tif", label="lymphoma")
    with pytest.raises(UsageError, match="pen 'pink'"):
        paint_slide(tmp_path / "a.tif", pens=("pink",))
    with pytest.raises(UsageError, match="multiple of 16"):
        paint_slide(tmp_path / "a.tif", tile_px=100)
    assert not list(tmp_path.iterdir())
