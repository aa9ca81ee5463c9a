"""A slide's own JPEG tiles, made whole: any decoder gives the scanner's pixels, and nothing else travels along."""

import io
import struct

import imagecodecs
import numpy as np
import openslide
import pytest
import simplejpeg
import tifffile
from PIL import Image

from histossl.core.config import TileConfig, TissueConfig
from histossl.core.errors import SlideError
from histossl.slides.grid import native_side_px
from histossl.slides.reading.slide import open_slide
from histossl.slides.reading.tifffile_backend import NativeLevel
from histossl.tiles.cutting.cutter import agrees, cutter_for
from histossl.tiles.cutting.native_jpeg import DamagedTile, NativeTiles, Splicer, best_shrink
from histossl.tiles.tiling import common_native_px

ALL = TissueConfig(min_tissue=0, min_sharpness=0, min_saturation=0, max_fold=1, max_ink=1)


def write_tiff(path, pixels, photometric="ycbcr", subsampling=(2, 2), tile=256, mpp=0.5, level=90, **more):
    """A tiled JPEG TIFF as libtiff writes it, with RGB or YCbCr inside the JPEGs."""
    arguments = {"level": level}
    if photometric == "rgb":
        arguments["outcolorspace"] = "RGB"  # else tifffile turns RGB into YCbCr on the way in
    tifffile.imwrite(
        path,
        pixels,
        tile=(tile, tile),
        photometric="rgb",
        compression="jpeg",
        compressionargs=arguments,
        subsampling=(1, 1) if photometric == "rgb" else subsampling,
        resolution=(1e4 / mpp, 1e4 / mpp),
        resolutionunit="CENTIMETER",
        metadata=None,
        **more,
    )
    return path


@pytest.fixture(scope="session")
def tissue(painted_slide):
    with open_slide(painted_slide.path) as slide:
        return slide.read_region_l0(256, 256, 512, 512, 512, 512)


def decoders(jpeg):
    yield "simplejpeg", simplejpeg.decode_jpeg(jpeg)
    yield "pillow", np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    yield "imagecodecs", imagecodecs.jpeg8_decode(jpeg)


def compare_with_openslide(path, exact=True):
    """Every native tile, copied and decoded, against OpenSlide's pixels of the same place. Returns their number."""
    count = 0
    with open_slide(path, 0.5) as slide, openslide.OpenSlide(str(path)) as referee:
        assert slide.native is not None
        for number, level in enumerate(slide.native):
            if level is None:
                continue
            with NativeTiles(path, level) as tiles:
                for row in range(level.height_px // level.tile_height_px):
                    for column in range(level.width_px // level.tile_width_px):
                        down = referee.level_downsamples[number]
                        x, y = column * level.tile_width_px, row * level.tile_height_px
                        at = (round(x * down), round(y * down))
                        size = (level.tile_width_px, level.tile_height_px)
                        theirs = np.asarray(referee.read_region(at, number, size))[..., :3]
                        jpeg = tiles.jpeg(column, row)
                        for name, mine in decoders(jpeg):
                            assert np.array_equal(mine, theirs), (name, number, column, row)
                        count += 1
    return count


@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
@pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (2, 2)])
def test_copied_tiles_are_openslides_pixels_in_every_decoder(tmp_path, tissue, photometric, subsampling):
    path = write_tiff(tmp_path / "A1.tif", tissue, photometric, subsampling)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.pages[0].photometric.name.lower() == photometric
    assert compare_with_openslide(path) == 4


def test_copied_tiles_of_the_painter_are_openslides_pixels(painted_slide):
    assert compare_with_openslide(painted_slide.path) >= 16


def test_copied_tiles_of_a_real_aperio_slide_are_openslides_pixels(real_data):
    assert compare_with_openslide(real_data / "slides" / "CMU-1-Small-Region.svs") == 9 * 12


def test_copied_tiles_of_a_real_colon_slide_are_openslides_pixels(real_data):
    assert compare_with_openslide(real_data / "colon" / "slides" / "AC-0a.tif") == 100 + 4


def test_colours_are_right_whatever_the_decoder_would_guess(tmp_path, tissue):
    # Without Adobe's marker a decoder takes three components for YCbCr: RGB tiles would turn green and magenta.
    path = write_tiff(tmp_path / "A1.tif", tissue, "rgb", level=95)
    with open_slide(path) as slide, NativeTiles(path, slide.native[0]) as tiles:
        for _, pixels in decoders(tiles.jpeg(0, 0)):
            assert np.abs(pixels.astype(int) - tissue[:256, :256]).mean() < 3


# ---- what must not travel along


def segment(marker, data):
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


SECRETS = {
    0xE0: b"JFIF\0\1\1\0\0\1\0\1\0\0",
    0xE1: b"Exif\0\0Doe, John",
    0xE2: b"ICC_PROFILE\0\1\1Doe scanner",
    0xED: b"Photoshop Doe",
    0xFE: b"comment by Doe",
}


def level_like(width=256, height=256, photometric="YCBCR", tables=None, **changes):
    facts = {
        "downsample": 1.0,
        "width_px": width,
        "height_px": height,
        "tile_width_px": width,
        "tile_height_px": height,
        "compression": "JPEG",
        "photometric": photometric,
        "subsampling": (2, 2),
        "jpeg_tables": tables,
        "offsets": (0,),
        "byte_counts": (0,),
    }
    return NativeLevel(**{**facts, **changes})


@pytest.mark.parametrize("marker", sorted(SECRETS))
@pytest.mark.parametrize("place", ["tile", "tables"])
def test_nothing_that_may_name_a_patient_travels_along(tissue, marker, place):
    plain = simplejpeg.encode_jpeg(np.ascontiguousarray(tissue[:256, :256]), 90, "RGB", "420")
    secret = segment(marker, SECRETS[marker])
    if place == "tile":
        whole = Splicer(level_like()).whole(plain[:2] + secret + plain[2:])
    else:
        whole = Splicer(level_like(tables=b"\xff\xd8" + secret + b"\xff\xd9")).whole(plain)
    assert SECRETS[marker][-8:] not in whole
    image = Image.open(io.BytesIO(whole))
    assert not image.getexif()
    assert set(image.info) <= {"adobe", "adobe_transform"}
    assert np.array_equal(np.asarray(image), simplejpeg.decode_jpeg(plain))


def test_jfif_does_not_override_rgb(tmp_path, tissue):
    # libjpeg believes JFIF's marker over Adobe's; left in, it would make RGB tiles YCbCr.
    path = write_tiff(tmp_path / "A1.tif", tissue, "rgb")
    with open_slide(path) as slide, NativeTiles(path, slide.native[0]) as tiles:
        jpeg = tiles.jpeg(0, 0)
        spoilt = jpeg[:2] + segment(0xE0, SECRETS[0xE0]) + jpeg[2:]
        mended = Splicer(level_like(photometric="RGB")).whole(spoilt)
    assert np.array_equal(simplejpeg.decode_jpeg(mended), simplejpeg.decode_jpeg(jpeg))


def test_bytes_after_the_end_are_left_behind(tissue):
    plain = simplejpeg.encode_jpeg(np.ascontiguousarray(tissue[:256, :256]), 90, "RGB", "420")
    whole = Splicer(level_like()).whole(plain + b"\0\0Doe, John")
    assert whole.endswith(b"\xff\xd9")
    assert b"Doe" not in whole


def test_a_comment_between_scans_and_a_second_end_do_not_travel_along(tissue):
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(tissue[:256, :256])).save(buffer, "JPEG", quality=90, progressive=True)
    plain = buffer.getvalue()
    later = plain.rfind(b"\xff\xda")  # the last of several scans
    assert plain.count(b"\xff\xda") > 2
    spoilt = plain[:later] + segment(0xFE, b"by Doe") + segment(0xE1, b"Exif Doe") + plain[later:]
    for tile in (spoilt, spoilt + b"Doe, John\xff\xd9", plain + b"Doe\xff\xd9"):
        whole = Splicer(level_like()).whole(tile)
        assert b"Doe" not in whole
        assert np.array_equal(simplejpeg.decode_jpeg(whole), simplejpeg.decode_jpeg(plain))


def test_text_behind_the_first_end_of_a_baseline_tile_does_not_travel_along(tissue):
    plain = simplejpeg.encode_jpeg(np.ascontiguousarray(tissue[:256, :256]), 90, "RGB", "420")
    whole = Splicer(level_like()).whole(plain + b"Doe, John\xff\xd9")
    assert whole == Splicer(level_like()).whole(plain)


# ---- damage


def test_damage_is_noticed_without_decoding_and_never_crashes(tissue):
    plain = simplejpeg.encode_jpeg(np.ascontiguousarray(tissue[:256, :256]), 90, "RGB", "420")
    splicer = Splicer(level_like())
    wanted = simplejpeg.decode_jpeg(plain)
    random = np.random.default_rng(0)
    noticed = 0
    for _ in range(200):
        start, length = int(random.integers(0, len(plain))), int(random.integers(300, 3000))
        hurt = plain[:start] + random.bytes(length) + plain[start + length :]
        try:
            whole = splicer.whole(hurt)
        except DamagedTile:
            noticed += 1
            continue
        assert whole[:2] == b"\xff\xd8"
    assert noticed >= 150  # foreign bytes hold 0xFF followed by what may not stand there, with very high odds
    assert np.array_equal(simplejpeg.decode_jpeg(splicer.whole(plain)), wanted)


@pytest.mark.parametrize("cut", [0, 1, 2, 10, 100, 400, 1000, -1, -2, -100])
def test_a_tile_cut_short_is_damaged(tissue, cut):
    plain = simplejpeg.encode_jpeg(np.ascontiguousarray(tissue[:256, :256]), 90, "RGB", "420")
    with pytest.raises(DamagedTile):
        Splicer(level_like()).whole(plain[:cut])


def test_a_lost_sector_of_zeros_is_damage(tissue):
    plain = simplejpeg.encode_jpeg(np.ascontiguousarray(tissue[:256, :256]), 90, "RGB", "420")
    middle = len(plain) // 2
    with pytest.raises(DamagedTile):
        Splicer(level_like()).whole(plain[:middle] + bytes(512) + plain[middle + 512 :])


def test_blank_tiles_are_not_taken_for_lost_sectors():
    # Optimised tables code glass as runs of zero bits.
    buffer = io.BytesIO()
    Image.fromarray(np.full((512, 512, 3), 243, np.uint8)).save(buffer, "JPEG", optimize=True)
    assert bytes(64) in buffer.getvalue()
    Splicer(level_like(512, 512)).whole(buffer.getvalue())


def test_restart_markers_are_no_damage(tissue):
    buffer = io.BytesIO()
    Image.fromarray(tissue[:256, :256]).save(buffer, "JPEG", quality=90, restart_marker_blocks=8)
    assert b"\xff\xd3" in buffer.getvalue()
    whole = Splicer(level_like()).whole(buffer.getvalue())
    assert np.array_equal(simplejpeg.decode_jpeg(whole), simplejpeg.decode_jpeg(buffer.getvalue()))


@pytest.mark.parametrize("size", [(128, 256), (256, 128), (512, 512)])
def test_a_tile_of_another_size_is_damaged(tissue, size):
    wrong = np.ascontiguousarray(np.resize(tissue, (*size, 3)))
    with pytest.raises(DamagedTile, match=f"{size[1]} x {size[0]} px"):
        Splicer(level_like()).whole(simplejpeg.encode_jpeg(wrong, 90, "RGB", "420"))


# ---- stitching


@pytest.mark.parametrize("box", [(0, 0, 512, 512), (100, 37, 300, 256), (-20, -10, 100, 100), (400, 450, 300, 200)])
def test_stitched_boxes_are_openslides_pixels(tmp_path, tissue, box):
    path = write_tiff(tmp_path / "A1.tif", tissue, tile=128)
    with open_slide(path) as slide, NativeTiles(path, slide.native[0]) as tiles:
        assert np.array_equal(tiles.read(*box), slide.read_level(0, *box))


def test_each_native_tile_is_decoded_once(painted_slide, monkeypatch):
    from histossl.tiles.cutting import native_jpeg

    decoded = []
    real = native_jpeg.decoded
    monkeypatch.setattr(native_jpeg, "decoded", lambda *tile: decoded.append(1) or real(*tile))
    with open_slide(painted_slide.path, 0.5) as slide:
        config = TileConfig(tile_px=100, grid="physical", tissue=ALL)
        cutter = cutter_for(slide, 0.5, config, lambda: slide)
        places = np.arange(cutter.grid.num_places)
        assert sum(tile.pixels is not None for tile in cutter.tiles(places)) == 100
        cutter.source.close()
    assert len(decoded) == 16


@pytest.mark.parametrize(("mpp", "shrink"), [(0.25, 1), (0.5, 2), (0.5054, 2), (0.47, 1), (1.0, 4), (2.0, 8), (5.0, 8)])
def test_the_decoder_shrinks_as_far_as_the_scale_allows(mpp, shrink):
    assert best_shrink(level_like(), mpp / 0.25) == shrink


def test_the_decoder_shrinks_only_to_whole_pixels():
    assert best_shrink(level_like(252, 252), 8) == 4


@pytest.mark.parametrize("mpp_l0", [0.25, 0.2527, 0.24])
def test_tiles_decoded_at_half_size_are_the_slides_pixels(tmp_path, tissue, mpp_l0):
    path = write_tiff(tmp_path / "A1.tif", np.tile(tissue, (2, 2, 1)), mpp=mpp_l0)
    config = TileConfig(tile_px=128, grid="physical")
    with open_slide(path) as slide:
        cutter = cutter_for(slide, 0.5, config, lambda: slide)
        assert (cutter.way, cutter.source.shrink) == ("stitched", 2)
        for tile in cutter.tiles(np.arange(cutter.grid.num_places)):
            (x_l0,), (y_l0,) = cutter.grid.corners_l0(np.array([tile.place]))
            side = cutter.grid.side_l0
            seen = slide.read_region_l0(int(x_l0), int(y_l0), side, side, 128, 128).astype(int)
            assert np.abs(tile.pixels - seen).mean() < 2
        cutter.source.close()


# ---- choosing


@pytest.mark.parametrize(
    ("tile_px", "mpp", "way", "real_mpp"),
    [
        (240, 0.5, "copied", 0.499),
        (240, 0.51, "copied", 0.499),
        (240, 0.53, "stitched", 0.53),
        (256, 0.5, "stitched", 0.499),
        (240, 1.0, "stitched", 0.998),
        (240, 1.02, "stitched", 1.02),
    ],
)
def test_auto_copies_only_where_side_and_scale_fit(tmp_path, tissue, tile_px, mpp, way, real_mpp):
    path = write_tiff(tmp_path / "A1.tif", np.tile(tissue, (2, 2, 1))[:960, :960], tile=240, mpp=0.499)
    with open_slide(path) as slide:
        assert native_side_px(slide, 0.5) == 240
        cutter = cutter_for(slide, mpp, TileConfig(tile_px=tile_px, mpp=mpp), lambda: slide)
        assert cutter.way == way
        assert cutter.grid.mpp == pytest.approx(real_mpp)
        cutter.source.close()


def test_native_refuses_what_it_cannot_copy_and_says_why(tmp_path, tissue):
    path = write_tiff(tmp_path / "A1.tif", tissue, mpp=0.5)
    other = tmp_path / "B1.tif"
    tifffile.imwrite(other, tissue, tile=(256, 256), compression="deflate", metadata=None)
    with open_slide(path) as slide, pytest.raises(SlideError, match="own tiles are 256 px wide, the store's 240"):
        cutter_for(slide, 0.5, TileConfig(tile_px=240, grid="native"), lambda: slide)
    with open_slide(path) as slide, pytest.raises(SlideError, match="no square JPEG tiles of its own within 5%"):
        cutter_for(slide, 1.0, TileConfig(grid="native", mpp=1.0), lambda: slide)
    with open_slide(other, 0.5) as slide, pytest.raises(SlideError, match="no square JPEG tiles"):
        cutter_for(slide, 0.5, TileConfig(grid="native"), lambda: slide)
    assert common_native_px(tmp_path, 0.5) == 256
    with pytest.raises(ValueError, match="no slide of"):
        common_native_px(tmp_path, 1.0)


def test_openslide_is_the_referee(tmp_path, tissue, monkeypatch):
    path = write_tiff(tmp_path / "A1.tif", tissue, "rgb")
    with open_slide(path) as slide:
        cutter = cutter_for(slide, 0.5, TileConfig(), lambda: slide)
        places = np.arange(cutter.grid.num_places)
        assert agrees(cutter, slide, lambda: open_slide(path), places) == (True, False)
        marker = cutter.source._splicer._adobe
        monkeypatch.setattr(cutter.source._splicer, "_adobe", lambda tile: marker(tile)[:-1] + b"\1")  # says YCbCr
        cutter.source._splicer._heads.clear()
        cutter.source._cache.clear()
        assert agrees(cutter, slide, lambda: open_slide(path), places) == (False, False)
        cutter.source.close()
