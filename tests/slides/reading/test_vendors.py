"""Each scanner's format is named, scaled and read as its maker meant, on files painted in its layout."""

import numpy as np
import openslide
import pytest
import tifffile
from vendor_files import LEICA_GAP_PX, SECRET, WRITERS, leica

from histossl.core.config import ScanConfig, TileConfig, TissueConfig
from histossl.core.errors import SlideError
from histossl.demo.paint import paint_slide
from histossl.demo.pyramid import halved
from histossl.slides.grid import copyable, native_side_px
from histossl.slides.reading.slide import open_slide
from histossl.slides.scan import scan
from histossl.tiles.cutting.native_jpeg import NativeTiles, best_shrink
from histossl.tiles.cutting.tile_slide import TileJob, tile_slide
from histossl.tiles.store.zip_store import read_store

MPP = 0.5
FORMATS = {
    "philips": "Philips TIFF",
    "trestle": "Trestle TIFF",
    "leica": "Leica SCN",
    "ventana": "Ventana BIF",
    "perkinelmer": "QPTIFF",
    "hamamatsu": "Hamamatsu NDPI/VMS",
    "mirax": "MIRAX MRXS",
}
WAYS = {"leica": "stitched", "hamamatsu": "read", "ventana": "read", "mirax": "read"}  # others are copied


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    path = tmp_path_factory.mktemp("pixels") / "A1.tif"
    paint_slide(path, width_px=768, height_px=512, mpp=MPP, seed=3, compression="deflate")
    with open_slide(path) as slide:
        return slide.read_level(0, 0, 0, 768, 512)


@pytest.fixture(scope="module")
def archive(tmp_path_factory, pixels):
    folder = tmp_path_factory.mktemp("vendors")
    for vendor, (name, write) in WRITERS.items():
        (folder / vendor).mkdir()
        write(folder / vendor / name, pixels, MPP)
    return folder


@pytest.fixture(scope="module")
def rows(archive, tmp_path_factory):
    from histossl.core.workspace import Workspace

    found = scan(archive, Workspace.at(tmp_path_factory.mktemp("scan")), ScanConfig(tile_px=128), 1)
    return {row.file.split("/")[0]: row for row in found.rows}


def path_of(archive, vendor):
    return archive / vendor / WRITERS[vendor][0]


def corner(vendor):
    return LEICA_GAP_PX if vendor == "leica" else 0


@pytest.mark.parametrize("vendor", WRITERS)
def test_scan_names_the_vendor_and_its_scale(rows, vendor):
    row = rows[vendor]
    assert (row.vendor, row.format) == (vendor, FORMATS[vendor])
    assert row.mpp == pytest.approx(MPP, rel=1e-3)
    assert row.status == "ok", row.reason
    assert row.slide == f"{vendor}/A1"
    assert row.expected_tiles > 0
    assert row.compression in ("JPEG", ""), row  # OpenSlide does not tell it of MIRAX


@pytest.mark.parametrize("vendor", WRITERS)
def test_regions_are_the_painted_pixels_and_openslides(archive, pixels, vendor):
    path, gap = path_of(archive, vendor), corner(vendor)
    with open_slide(path) as slide, openslide.OpenSlide(str(path)) as referee:
        for level, painted in enumerate((pixels, halved(pixels))):
            x, y, side = (gap >> level) + 100, (gap >> level) + 60, 150
            mine = slide.read_level(level, x, y, side, side)
            wanted = painted[60 : 60 + side, 100 : 100 + side].astype(int)
            assert np.abs(mine - wanted).mean() < 3, level  # JPEG
            theirs = np.asarray(referee.read_region((x << level, y << level), level, (side, side)))[..., :3]
            assert np.abs(mine.astype(int) - theirs).mean() < 0.5, level
        shrunk = slide.read_region_l0(gap + 64, gap + 64, 256, 256, 128, 128).astype(int)
        assert np.abs(shrunk - halved(pixels)[32:160, 32:160]).mean() < 3


@pytest.mark.parametrize("vendor", WRITERS)
def test_what_lies_outside_the_slide_is_white(archive, vendor):
    with open_slide(path_of(archive, vendor)) as slide:
        assert (slide.read_level(0, -40, -40, 30, 30) == 255).all()
        assert (slide.read_level(0, slide.size_l0[0] + 3, 0, 30, 30) == 255).all()


@pytest.mark.parametrize("vendor", WRITERS)
def test_what_openslide_paints_is_what_it_reads_white_where_it_paints_nothing(archive, vendor):
    with open_slide(path_of(archive, vendor)) as slide:
        for level, (width, height) in enumerate(slide.level_sizes[:2]):
            box = (level, -30, -20, width + 60, height + 50)
            painted = slide.read_bgrx(*box)[..., 2::-1].astype(int)
            assert np.abs(painted - slide.read_level(*box)).max() <= 1  # the one rounds half-transparent colours
            assert (painted[:20] == 255).all()


@pytest.mark.parametrize("vendor", ["philips", "trestle", "perkinelmer"])
def test_copied_tiles_are_openslides_pixels(archive, vendor):
    import simplejpeg

    path = path_of(archive, vendor)
    with open_slide(path) as slide, openslide.OpenSlide(str(path)) as referee:
        assert slide.native is not None
        assert all(slide.native)
        for number, level in enumerate(slide.native):
            with NativeTiles(path, level) as tiles:
                for row in range(level.tiles_down):
                    for column in range(level.tiles_across):
                        x, y = column * level.tile_width_px << number, row * level.tile_height_px << number
                        size = (level.tile_width_px, level.tile_height_px)
                        theirs = np.asarray(referee.read_region((x, y), number, size))[..., :3]
                        assert np.array_equal(simplejpeg.decode_jpeg(tiles.jpeg(column, row)), theirs)


def agreement(path, level, shrink):
    """Mean difference of each 64 x 64 box of a decoded level from what the slide's library shows at that scale."""
    with open_slide(path) as slide:
        native = slide.native[level]
        with NativeTiles(path, native, shrink) as tiles:
            width, height = (side // shrink for side in slide.level_sizes[level])
            mine = tiles.read(-8, -8, width + 16, height + 16).astype(int)
        theirs = slide.read_level(level, 0, 0, width * shrink, height * shrink).astype(float)
    theirs = np.pad(theirs, [(8 * shrink, 8 * shrink)] * 2 + [(0, 0)], constant_values=255)
    theirs = theirs.reshape(height + 16, shrink, width + 16, shrink, 3).mean(axis=(1, 3))
    off = np.abs(mine - theirs).mean(axis=2)
    return max(off[y : y + 64, x : x + 64].mean() for y in range(0, height, 64) for x in range(0, width, 64))


@pytest.mark.parametrize("shrink", [1, 2, 4])
@pytest.mark.parametrize("gap_px", [0, 8, 32, 104])
def test_leicas_tiles_lie_where_openslide_shows_them(tmp_path, pixels, gap_px, shrink):
    leica(tmp_path / "A1.scn", pixels, MPP, gap_px)
    assert agreement(tmp_path / "A1.scn", 0, shrink) <= (0 if shrink == 1 else 2.5)


@pytest.mark.parametrize("gap_px", [7, 10])
def test_an_odd_corner_is_not_moved_by_shrinking(tmp_path, pixels, gap_px):
    leica(tmp_path / "A1.scn", pixels, MPP, gap_px)
    with open_slide(tmp_path / "A1.scn") as slide:
        level = slide.native[0]
        assert level.corner_px == (gap_px, gap_px)
        assert best_shrink(level, 4) == (1 if gap_px == 7 else 2)


def test_an_image_off_the_corner_is_never_copied(archive):
    with open_slide(path_of(archive, "leica")) as slide:
        assert all(slide.native)
        assert not any(copyable(level) for level in slide.native)
        assert native_side_px(slide, MPP) is None


@pytest.mark.parametrize("vendor", WRITERS)
def test_tiles_of_every_vendor_are_the_painted_pixels(archive, pixels, tmp_path, vendor):
    import simplejpeg

    everything = TissueConfig(min_tissue=0, min_sharpness=0, min_saturation=0, max_fold=1, max_ink=1)
    job = TileJob(path_of(archive, vendor), "A1", "A1", tmp_path / "A1.zip", TileConfig(tile_px=128, tissue=everything))
    made = tile_slide(job, lambda _: None).tiling
    assert made["scales"][0]["way"] == WAYS.get(vendor, "copied")
    content, gap = job.zip_path.read_bytes(), corner(vendor)
    canvas = np.full((pixels.shape[0] + gap + 128, pixels.shape[1] + gap + 128, 3), 255, np.uint8)
    canvas[gap : gap + pixels.shape[0], gap : gap + pixels.shape[1]] = pixels
    table = read_store(job.zip_path).table
    assert len(table) >= 24
    for row in table:
        tile = simplejpeg.decode_jpeg(content[row["offset"] : row["offset"] + row["length"]]).astype(int)
        x, y = int(row["x_l0"]), int(row["y_l0"])
        assert np.abs(tile - canvas[y : y + 128, x : x + 128]).mean() < 4  # twice JPEG
        assert not (np.abs(tile - SECRET).max(axis=2) <= 2).mean() > 0.5  # no label, no macro


@pytest.mark.parametrize("vendor", ["philips", "trestle", "leica", "ventana", "perkinelmer"])
def test_tiles_in_ycbcr_under_an_rgb_tag_are_the_painted_pixels_or_refused(tmp_path, pixels, vendor):
    name, writer = WRITERS[vendor]
    writer(tmp_path / name, pixels, MPP)
    with tifffile.TiffFile(tmp_path / name, mode="r+b") as tiff:
        for page in tiff.pages:
            page.tags[262].overwrite(2)
    if vendor == "ventana":  # its tiles lie in an order that OpenSlide alone knows
        with pytest.raises(SlideError, match="OpenSlide would show other colours"):
            open_slide(tmp_path / name)
        return
    with open_slide(tmp_path / name) as slide:
        height, width = pixels.shape[:2]
        seen = slide.read_region_l0(0, 0, width, height, width, height)
        assert slide.mpp_l0 == pytest.approx(MPP, rel=1e-3)
        assert any("read as YCbCr" in one for one in slide.warnings)
    assert np.abs(seen.astype(int) - pixels).mean() < 3
