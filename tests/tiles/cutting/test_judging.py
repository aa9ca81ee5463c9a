"""Tiles judged by their bytes and by half of their lines get the verdict that the whole measure gives."""

import numpy as np
import pytest
import simplejpeg
import tifffile
from scipy import ndimage

from histossl.core.config import TileConfig, TissueConfig
from histossl.demo.paint import paint_slide
from histossl.slides.quality import places
from histossl.slides.quality.focus import saturation, sharpness
from histossl.slides.reading.slide import open_slide
from histossl.tiles.cutting import tile_slide as one_slide
from histossl.tiles.cutting.tile_slide import TileJob, tile_slide
from histossl.tiles.store.zip_store import read_store

EXTRA_PER_MILLE = 5  # tiles that the whole measure would have turned down


def kept(path, out, config, slide_mpp=None):
    made = tile_slide(TileJob(path, "A1", "A1", out, config, slide_mpp), lambda _: None)
    table = read_store(out).table
    return set(zip(table["x_l0"].tolist(), table["y_l0"].tolist(), strict=True)), made.tiling


def kept_by_the_whole_measure(path, out, config, monkeypatch, slide_mpp=None):
    with monkeypatch.context() as patch:
        real = one_slide.Making._doubts

        def all_doubted(self, cutter, wanted, tissue):
            doubts = real(self, cutter, wanted, tissue)
            return doubts and one_slide._Doubts(colour=frozenset(wanted.tolist()))

        patch.setattr(one_slide.Making, "_doubts", all_doubted)
        patch.setattr(places, "out_of_focus", lambda tile, limit: sharpness(tile[None])[0] < limit)
        patch.setattr(places, "without_colour", lambda tile, limit: saturation(tile[None])[0] < limit)
        return kept(path, out, config, slide_mpp)


def agreed(paths, tmp_path, monkeypatch, config_of, slide_mpp=None):
    """(places judged, kept too many) over slides; none may be lost."""
    judged = extra = 0
    for number, path in enumerate(paths):
        config = config_of(path)
        quick, told = kept(path, tmp_path / f"{number}.zip", config, slide_mpp)
        whole, _ = kept_by_the_whole_measure(path, tmp_path / f"{number}-whole.zip", config, monkeypatch, slide_mpp)
        assert whole <= quick, f"{path.name}: {len(whole - quick)} sharp tiles lost"
        counts = told["counts"]
        judged += counts["tiles"] + counts["blur"] + counts["saturation"]
        extra += len(quick - whole)
    return judged, extra


def out_of_focus_copy(path, source, sigma_px):
    with open_slide(source) as slide:
        pixels, mpp = slide.read_level(0, 0, 0, *slide.size_l0), slide.mpp_l0
    soft = ndimage.gaussian_filter(pixels, (sigma_px, sigma_px, 0))
    noise = np.random.default_rng(0).normal(0, 1, soft.shape)
    soft = np.clip(soft + noise, 0, 255).astype(np.uint8)
    tifffile.imwrite(
        path,
        soft,
        tile=(256, 256),
        photometric="rgb",
        compression="jpeg",
        resolution=(1e4 / mpp, 1e4 / mpp),
        resolutionunit="CENTIMETER",
        metadata=None,
    )
    return path


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """In focus, mixed, and out of focus throughout; at 0.25 microns per pixel."""
    folder = tmp_path_factory.mktemp("focus")
    side = {"width_px": 2304, "height_px": 2304, "mpp": 0.25}
    sharp = paint_slide(folder / "sharp.tif", seed=1, **side).path
    return [
        sharp,
        paint_slide(folder / "mixed.tif", seed=2, num_blurs=2, look="pale", **side).path,
        paint_slide(folder / "mostly-blurred.tif", seed=4, num_blurs=6, look="fat", **side).path,
        out_of_focus_copy(folder / "blurred.tif", sharp, 8),
    ]


@pytest.mark.parametrize(("way", "mpp", "tile_px"), [("copied", 0.25, 256), ("stitched", 0.5, 128)])
def test_no_sharp_tile_is_lost_and_hardly_a_blurred_one_kept(slides, tmp_path, monkeypatch, way, mpp, tile_px):
    config = TileConfig(tile_px=tile_px, mpp=mpp)
    judged, extra = agreed(slides, tmp_path, monkeypatch, lambda _: config)
    print(f"{way}: {judged} places judged, {extra} kept that the whole measure turns down")
    assert judged > 100
    assert extra <= judged * EXTRA_PER_MILLE / 1000


def test_a_slide_out_of_focus_throughout_is_looked_at_throughout(slides, tmp_path):
    for mpp, tile_px in ((0.25, 256), (0.5, 128)):
        _, told = kept(slides[-1], tmp_path / "A1.zip", TileConfig(tile_px=tile_px, mpp=mpp))
        assert told["counts"]["blur"] > 2 * told["counts"]["tiles"]


@pytest.mark.data
def test_real_slides_get_the_verdicts_of_the_whole_measure(real_data, tmp_path, monkeypatch):
    paths = [real_data / "slides" / "CMU-1-Small-Region.svs"]
    paths += sorted((real_data / "colon" / "slides").glob("*.tif"))[::9]

    def native(path):
        with open_slide(path) as slide:
            return TileConfig(tile_px=slide.native_tile[0], grid="native")

    judged, extra = agreed(paths, tmp_path, monkeypatch, native)
    print(f"real: {judged} places judged, {extra} kept that the whole measure turns down")
    assert judged > 700
    assert extra <= judged * EXTRA_PER_MILLE / 1000


# ---- flipped bits


def flipped(path, source, tiles, seed=0):
    """A copy in which one bit of the pixels of some level-0 tiles is flipped."""
    content = bytearray(source.read_bytes())
    rng = np.random.default_rng(seed)
    with tifffile.TiffFile(source) as tiff:
        page = tiff.pages[0]
        for tile in tiles:
            start, length = page.dataoffsets[tile], page.databytecounts[tile]
            content[start + length // 3 + int(rng.integers(length // 3))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    return path


def decodes(jpeg):
    try:
        simplejpeg.decode_jpeg(jpeg)
        return True
    except ValueError:
        return False


OPEN = TissueConfig(min_tissue=0, min_sharpness=0, min_saturation=0, max_fold=1, max_ink=1)


def all_decode(out):
    content = out.read_bytes()
    return all(decodes(content[row["offset"] : row["offset"] + row["length"]]) for row in read_store(out).table)


def test_flipped_bits_in_copied_tiles_are_found_when_all_are_verified(slides, tmp_path):
    hurt = flipped(tmp_path / "hurt.tif", slides[0], range(10, 60))
    config = TileConfig(mpp=0.25, tissue=OPEN)
    job = TileJob(hurt, "A1", "A1", tmp_path / "A1.zip", config, verify=True)
    counts = tile_slide(job, lambda _: None).tiling["counts"]
    assert all_decode(job.zip_path)
    # Of single flipped bits a decoder notices one in five or so: a code read wrongly is a code, too.
    assert counts["rescued"] + counts["damaged"] >= 4


def test_one_damaged_tile_in_the_sample_has_all_of_the_slide_decoded(slides, tmp_path):
    # Half of the tiles: the sample of 32 cannot miss them all.
    hurt = flipped(tmp_path / "hurt.tif", slides[0], range(0, 81, 2), seed=1)
    job = TileJob(hurt, "A1", "A1", tmp_path / "A1.zip", TileConfig(mpp=0.25, tissue=OPEN))
    counts = tile_slide(job, lambda _: None).tiling["counts"]
    assert all_decode(job.zip_path)
    assert counts["rescued"] + counts["damaged"] >= 4


def test_a_tile_damaged_on_its_level_is_read_from_another(slides, tmp_path):
    """At 0.5 microns per pixel the second level is due; where it is damaged the first shows the same."""
    content = bytearray(slides[0].read_bytes())
    with tifffile.TiffFile(slides[0]) as tiff:
        page = tiff.series[0].levels[1].pages[0]
        for tile in (6, 7, 12):
            start, length = page.dataoffsets[tile], page.databytecounts[tile]
            content[start : start + length] = bytes(length)
    hurt = tmp_path / "hurt.tif"
    hurt.write_bytes(content)
    config = TileConfig(tile_px=256, mpp=0.5, tissue=OPEN)
    whole, _ = kept(slides[0], tmp_path / "whole.zip", config)
    mended, told = kept(hurt, tmp_path / "hurt.zip", config)
    assert mended == whole
    assert told["counts"]["rescued"] == 3
    assert any("3 tile(s) read from another level" in each for each in told["warnings"])
    stores = [read_store(tmp_path / name) for name in ("whole.zip", "hurt.zip")]
    pixels = [
        [
            simplejpeg.decode_jpeg(store.path.read_bytes()[row["offset"] : row["offset"] + row["length"]]).astype(int)
            for row in store.table
        ]
        for store in stores
    ]
    assert max(np.abs(one - other).mean() for one, other in zip(*pixels, strict=True)) < 3
