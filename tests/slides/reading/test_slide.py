"""Any format, the same pixels in the same place; a scale is read or asked for, never guessed."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from histossl.core.errors import SlideError
from histossl.demo.paint import PaintedSlide
from histossl.slides.reading import pillow_backend
from histossl.slides.reading import slide as reader
from histossl.slides.reading import tifffile_backend as tiff_module
from histossl.slides.reading.slide import Slide, open_slide
from histossl.slides.reading.tiff import samples
from histossl.slides.reading.tifffile_backend import TiffLevels

CM = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}  # 0.5 microns per pixel


def picture(width: int = 700, height: int = 500, seed: int = 0) -> np.ndarray:
    """Smooth colours with an edge or two: what JPEG keeps and a wrong offset shows."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(60, 256, (height // 20 + 2, width // 20 + 2, 3), dtype=np.uint8)
    image = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    image[height // 3 : height // 2, width // 4 : width // 2] = (150, 60, 140)
    return image


def write(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    tifffile.imwrite(path, pixels, **{"photometric": "rgb", "metadata": None, **CM, **options})
    return path


def write_pyramid(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    """Three levels, as generic pyramidal TIFF."""
    options = {"photometric": "rgb", "tile": (128, 128), "metadata": None, **options}
    with tifffile.TiffWriter(path) as tiff:
        for level, shrink in enumerate((1, 2, 4)):
            height, width = pixels.shape[0] // shrink, pixels.shape[1] // shrink
            small = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX))
            unit = {"resolution": (20000 / shrink, 20000 / shrink), "resolutionunit": "CENTIMETER"}
            tiff.write(small, subfiletype=1 if level else 0, **unit, **options)
    return path


def through_tifffile(path: Path) -> Slide:
    return reader._through_tifffile(path)


def boxes(size_l0: tuple[int, int], seed: int = 0) -> Iterator[tuple[float, float, float, float, int, int]]:
    """Regions all over a slide: inside, over each edge, quite outside, shrunk by all sorts of factors."""
    width, height = size_l0
    rng = np.random.default_rng(seed)
    for shrink in (1.0, 1.0, 1.3, 2.0, 3.7, 8.0):
        for _ in range(4):
            out_width, out_height = (int(side) for side in rng.integers(20, 90, 2))
            x, y = rng.integers(-60, width), rng.integers(-60, height)
            yield float(x), float(y), out_width * shrink, out_height * shrink, out_width, out_height
    yield -40.0, -40.0, 80.0, 80.0, 80, 80
    yield width - 40.0, height - 40.0, 80.0, 80.0, 80, 80
    yield width + 10.0, 0.0, 64.0, 64.0, 64, 64


def assert_same(one: Slide, other: Slide) -> None:
    assert one.size_l0 == other.size_l0
    assert one.level_sizes == other.level_sizes
    assert one.level_downsamples == other.level_downsamples
    for box in boxes(one.size_l0):
        ours, theirs = one.read_region_l0(*box), other.read_region_l0(*box)
        assert ours.shape == theirs.shape == (box[5], box[4], 3)
        assert np.abs(ours.astype(int) - theirs.astype(int)).mean() < 2, box


# ---- one frame for all libraries


def test_both_libraries_show_the_same_pixels(painted_slide: PaintedSlide) -> None:
    with open_slide(painted_slide.path) as one, through_tifffile(painted_slide.path) as other:
        assert one.vendor == "generic-tiff"
        assert_same(one, other)


@pytest.mark.data
@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs", "test_orient6.tif"])
def test_both_libraries_show_the_same_pixels_of_real_slides(real_data: Path, name: str) -> None:
    with open_slide(real_data / "slides" / name, 0.5) as one, through_tifffile(real_data / "slides" / name) as other:
        assert_same(one, other)


@pytest.mark.parametrize("open_it", [open_slide, through_tifffile])
def test_region_is_the_picture_at_that_place(tmp_path: Path, open_it: Callable[[Path], Slide]) -> None:
    image = picture()
    with open_it(write_pyramid(tmp_path / "a.tif", image, compression="deflate")) as slide:
        assert slide.size_l0 == (700, 500)
        np.testing.assert_array_equal(slide.read_region_l0(130, 77, 200, 150, 200, 150), image[77:227, 130:330])
        over = slide.read_region_l0(600, 450, 200, 100, 200, 100)
        np.testing.assert_array_equal(over[:50, :100], image[450:, 600:])
        assert (over[50:] == 255).all()
        assert (over[:, 100:] == 255).all()


def test_level_is_chosen_by_scale_and_never_coarser(tmp_path: Path) -> None:
    with open_slide(write_pyramid(tmp_path / "a.tif", picture(), compression="deflate")) as slide:
        assert slide.level_downsamples == (1.0, 2.0, 4.0)
        assert [slide.level_for(shrink) for shrink in (0.5, 1, 1.9, 2, 3.99, 4, 50)] == [0, 0, 0, 1, 1, 2, 2]


def test_shrinking_averages_and_keeps_its_place(tmp_path: Path) -> None:
    """A fine chessboard becomes even grey, not stripes; a coarse one stays where it was."""
    fine = np.indices((512, 512)).sum(axis=0) % 2 * 200
    fine_path = write(tmp_path / "fine.tif", np.repeat(fine[..., None], 3, axis=2).astype(np.uint8), tile=(128, 128))
    with open_slide(fine_path) as slide:
        small = slide.read_region_l0(64, 64, 300, 300, 100, 100)
        assert abs(small.mean() - 100) < 2
        assert small.std() < 4
    image = picture(512, 512)
    with open_slide(write(tmp_path / "coarse.tif", image, tile=(128, 128))) as slide:
        small = slide.read_region_l0(128, 64, 256, 256, 64, 64).astype(float)
        means = image[64:320, 128:384].reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
        assert np.abs(small - means).mean() < 1.5


def test_a_large_read_in_pieces_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_slide(write_pyramid(tmp_path / "a.tif", picture(), compression="deflate")) as slide:
        whole = slide.read_region_l0(-5.3, 10.2, 690, 480, 313, 217)
        monkeypatch.setattr(reader, "MAX_READ_PX", 5000)
        pieces = slide.read_region_l0(-5.3, 10.2, 690, 480, 313, 217)
    assert np.abs(whole.astype(int) - pieces.astype(int)).max() <= 1


def test_downsample_is_whole_where_rounding_made_it_odd(tmp_path: Path) -> None:
    with open_slide(write_pyramid(tmp_path / "a.tif", picture(703, 501), compression="deflate")) as slide:
        assert slide.level_sizes[2] == (175, 125)
        assert slide.level_downsamples == (1.0, 2.0, 4.0)


def test_a_region_in_microns_is_the_same_region_in_level_0_pixels(tmp_path: Path) -> None:
    """0.5 microns per pixel: 100 x 60 um are 200 x 120 level-0 pixels."""
    pixels = picture()
    with open_slide(write_pyramid(tmp_path / "a.tif", pixels), 0.5) as slide:
        found = slide.read_region_um(20, 30, 100, 60, 0.5)
        np.testing.assert_array_equal(found, slide.read_region_l0(40, 60, 200, 120, 200, 120))
        np.testing.assert_allclose(found.astype(int), pixels[60:180, 40:240], atol=1)
        coarse = slide.read_region_um(20, 30, 100, 60, 2)
        assert coarse.shape == (30, 50, 3)
        np.testing.assert_array_equal(coarse, slide.read_region_l0(40, 60, 200, 120, 50, 30))
        # 10.1 um are 20.2 pixels of 0.5 um: whole pixels of exactly that width are read
        np.testing.assert_array_equal(
            slide.read_region_um(0, 0, 10.1, 9.9, 0.5), slide.read_region_l0(0, 0, 20, 20, 20, 20)
        )
        assert (slide.read_region_um(-50, -50, 20, 20, 1) == 255).all()  # outside the slide


def test_a_micron_is_as_long_on_slides_of_any_scale(tmp_path: Path) -> None:
    """The same 40 x 30 um hold the same colours scanned at 0.25 and, by half as many pixels, at 0.5."""
    fine = picture(640, 480)
    coarse = np.asarray(Image.fromarray(fine).reduce(2))
    regions = []
    for name, pixels, mpp in (("fine", fine, 0.25), ("coarse", coarse, 0.5)):
        with open_slide(write_pyramid(tmp_path / f"{name}.tif", pixels), mpp) as slide:
            regions.append(slide.read_region_um(50, 40, 40, 30, 0.5).astype(int))
    assert regions[0].shape == regions[1].shape == (60, 80, 3)
    assert abs(regions[0] - regions[1]).mean() < 1


@pytest.mark.parametrize("box", [(0, 0, 0, 5, 1), (0, 0, 5, -1, 1), (0, 0, 5, 5, 0), (0, 0, 5, 5, math.nan)])
def test_a_region_without_a_size_is_a_value_error_that_names_it(painted_slide: PaintedSlide, box: Any) -> None:
    with open_slide(painted_slide.path) as slide, pytest.raises(ValueError, match=r"width_um|height_um|mpp"):
        slide.read_region_um(*box)


def test_without_a_scale_no_region_in_microns_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(picture()).save(path)
    with open_slide(path, need_mpp=False) as slide, pytest.raises(SlideError, match="slide-mpp"):
        slide.read_region_um(0, 0, 10, 10, 1)


def test_thumbnail_has_the_slide_s_proportions(painted_slide: PaintedSlide) -> None:
    with open_slide(painted_slide.path) as slide:
        assert slide.thumbnail(200).shape == (200, 200, 3)
        assert slide.thumbnail(5000).shape == (1024, 1024, 3)


# ---- what tifffile has to read


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("tiles", {"tile": (128, 128)}),
        ("strips", {"rowsperstrip": 7}),
        ("one piece", {}),
        ("deflate strips", {"rowsperstrip": 16, "compression": "deflate"}),
        ("LZW tiles", {"tile": (64, 64), "compression": "lzw", "predictor": True}),
        ("zstd tiles", {"tile": (64, 64), "compression": "zstd"}),
        ("JPEG 2000 tiles", {"tile": (128, 128), "compression": "jpeg2000"}),
        ("planes", {"planarconfig": "separate", "tile": (64, 64)}),
        ("big-endian BigTIFF", {"bigtiff": True, "byteorder": ">", "tile": (64, 64)}),
    ],
)
def test_tifffile_reads_every_layout_exactly(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    image = picture(300, 200)
    stored = np.moveaxis(image, 2, 0) if "planarconfig" in options else image
    with through_tifffile(write(tmp_path / "a.tif", stored, **options)) as slide:
        assert slide.size_l0 == (300, 200)
        np.testing.assert_array_equal(slide.read_region_l0(0, 0, 300, 200, 300, 200), image)
        np.testing.assert_array_equal(slide.read_region_l0(110, 70, 150, 90, 150, 90), image[70:160, 110:260])


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"photometric": "minisblack"}, lambda grey: grey),
        ({"photometric": "miniswhite"}, lambda grey: 255 - grey),
        ({"photometric": "minisblack", "dtype": np.uint16}, lambda grey: grey),
    ],
)
def test_grey_becomes_rgb(tmp_path: Path, options: dict[str, Any], wanted: Callable[[Any], Any]) -> None:
    grey = picture(300, 200)[..., 0]
    dtype = options.pop("dtype", np.uint8)
    stored = grey if dtype == np.uint8 else grey.astype(np.uint16) * 257
    with through_tifffile(write(tmp_path / "a.tif", stored, tile=(64, 64), **options)) as slide:
        seen = slide.read_region_l0(0, 0, 300, 200, 300, 200)
    np.testing.assert_array_equal(seen, np.repeat(wanted(grey)[..., None], 3, axis=2))


def ycc(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).convert("YCbCr"))


def write_aperio_ycc(path: Path, image: np.ndarray) -> Path:
    """As Aperio writes JPEG 2000 33003: luma and chroma, which nothing in the codestream tells. Levels 1 and 4.0008."""
    told = "Aperio Image Library v10.2.24\r\n{0}x{1} [0,0 {0}x{1}] (256x256) J2K/YUV16 Q=30|AppMag = 20|MPP = 0.5"
    height, width = image.shape[:2]
    thumbnail = np.asarray(Image.fromarray(image).resize((60, 60)))
    small = np.asarray(Image.fromarray(image).resize((width // 4, height // 4), Image.Resampling.BOX))

    def tiles(level: np.ndarray) -> Iterator[bytes]:
        for y in range(0, level.shape[0], 256):
            for x in range(0, level.shape[1], 256):
                tile = np.full((256, 256, 3), 255, np.uint8)
                part = level[y : y + 256, x : x + 256]
                tile[: part.shape[0], : part.shape[1]] = part
                yield imagecodecs.jpeg2k_encode(ycc(tile), level=0, codecformat="j2k", mct=False, reversible=True)

    options: dict[str, Any] = {"photometric": "rgb", "metadata": None, "description": told.format(width, height)}
    with tifffile.TiffWriter(path) as tiff:
        for number, level in enumerate((image, thumbnail, small)):
            if number == 1:
                tiff.write(level, rowsperstrip=16, compression="jpeg", **options)
            else:
                layout = {"shape": level.shape, "dtype": np.uint8, "tile": (256, 256), "compression": 33003}
                tiff.write(tiles(level), **layout, **options)
    return path


def test_aperio_s_jpeg_2000_of_luma_and_chroma_has_its_colours(tmp_path: Path) -> None:
    image = picture(1030, 1030)
    path = write_aperio_ycc(tmp_path / "A1.svs", image)
    small = np.asarray(Image.fromarray(image).resize((257, 257), Image.Resampling.BOX))
    with open_slide(path) as slide, through_tifffile(path) as other:
        assert slide.vendor == "aperio"
        for one in (slide, other):
            assert np.abs(one.read_level(0, 0, 0, 1030, 1030).astype(int) - image).mean() < 2
            assert np.abs(one.read_level(1, 0, 0, 257, 257).astype(int) - small).mean() < 2


def test_a_level_that_tifffile_shows_otherwise_is_read_through_openslide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture(1030, 1030)
    path = write_aperio_ycc(tmp_path / "A1.svs", image)
    small = np.asarray(Image.fromarray(image).resize((257, 257), Image.Resampling.BOX))
    monkeypatch.setattr(samples, "_rgb_from_ycc", lambda pixels: pixels)
    with open_slide(path) as slide:
        assert np.abs(slide.read_level(1, 0, 0, 257, 257).astype(int) - small).mean() < 8


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_ycbcr_without_jpeg_becomes_rgb_or_is_refused(tmp_path: Path, compression: str | None) -> None:
    image = picture()
    path = write(tmp_path / "a.tif", ycc(image), compression=compression, extratags=[(530, "H", 2, (1, 1), True)])
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags[262].overwrite(6)
    with open_slide(path) as slide:
        assert np.abs(slide.read_level(0, 0, 0, 700, 500).astype(int) - image).mean() < 2
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags[530].overwrite((2, 2))
    with pytest.raises(SlideError, match="convert it to RGB"):
        open_slide(path)


def test_transparency_is_shown_on_white(tmp_path: Path) -> None:
    rgba = np.dstack([picture(300, 200), np.full((200, 300), 255, np.uint8)])
    rgba[50:100, :, 3] = 0
    path = write(tmp_path / "a.tif", rgba, tile=(64, 64), extrasamples=["unassalpha"])
    with through_tifffile(path) as slide:
        seen = slide.read_region_l0(0, 0, 300, 200, 300, 200)
    assert (seen[50:100] == 255).all()
    np.testing.assert_array_equal(seen[100:], rgba[100:, :, :3])


def write_ome(path: Path, image: np.ndarray, **metadata: Any) -> Path:
    with tifffile.TiffWriter(path, ome=True) as tiff:
        options = {"photometric": "rgb", "tile": (128, 128), "compression": "deflate"}
        tiff.write(image, subifds=1, metadata={"axes": "YXS", **metadata}, **options)
        tiff.write(image[::2, ::2], subfiletype=1, **options)
    return path


def test_ome_tiff_has_its_levels_and_its_scale(tmp_path: Path) -> None:
    image = picture()
    scale = {"PhysicalSizeX": 250, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.25, "PhysicalSizeYUnit": "µm"}
    with open_slide(write_ome(tmp_path / "a.ome.tif", image, **scale)) as slide:
        assert (slide.format, slide.mpp_l0, slide.mpp_source) == ("OME-TIFF", 0.25, "OME-XML")
        assert slide.level_sizes == ((700, 500), (350, 250))
        np.testing.assert_array_equal(slide.read_region_l0(5, 7, 100, 90, 100, 90), image[7:97, 5:105])


def test_ome_tiff_with_a_plane_per_colour(tmp_path: Path) -> None:
    image = picture(300, 200)
    tifffile.imwrite(tmp_path / "a.ome.tif", np.moveaxis(image, 2, 0), metadata={"axes": "CYX", "PhysicalSizeX": 0.5})
    with open_slide(tmp_path / "a.ome.tif") as slide:
        np.testing.assert_array_equal(slide.read_region_l0(0, 0, 300, 200, 300, 200), image)


def test_many_channels_are_refused(tmp_path: Path) -> None:
    stack = np.zeros((5, 200, 300), np.uint8)
    tifffile.imwrite(tmp_path / "a.ome.tif", stack, metadata={"axes": "CYX", "PhysicalSizeX": 0.5})
    with pytest.raises(SlideError, match="5 channels"):
        open_slide(tmp_path / "a.ome.tif")


def test_png_and_jpeg_need_a_scale_and_are_read_whole(tmp_path: Path) -> None:
    image = picture(300, 200)
    Image.fromarray(image).save(tmp_path / "a.png", dpi=(300, 300))
    Image.fromarray(image).save(tmp_path / "a.jpg", quality=95)
    with pytest.raises(SlideError, match=r"--slide-mpp.*its dots per inch are not read"):
        open_slide(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png", 0.5) as slide:
        np.testing.assert_array_equal(slide.read_region_l0(10, 20, 100, 50, 100, 50), image[20:70, 10:110])
        assert (slide.read_region_l0(-50, -50, 40, 40, 40, 40) == 255).all()
    with open_slide(tmp_path / "a.jpg", 0.5) as slide:
        assert np.abs(slide.thumbnail(300).astype(int) - image).mean() < 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "I;16"])
def test_plain_images_of_any_mode_are_decoded_in_bands(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pillow_backend, "BAND", 37)
    alpha = Image.fromarray(picture(300, 200, seed=1)).convert("L")
    image = Image.fromarray(picture(300, 200))
    image.putalpha(alpha)
    if mode == "I;16":
        stored = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        wanted = image.convert("L").convert("RGB")
    else:
        stored = image.quantize(64) if mode == "P" else image.convert(mode)
        clear = stored.convert("RGBA") if mode in ("RGBA", "LA", "P") else stored.convert("RGB").convert("RGBA")
        wanted = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    stored.save(path, **({"quality": 95} if mode == "CMYK" else {}))
    with open_slide(path, 0.5) as slide:
        found = slide.read_region_l0(0, 0, 300, 200, 300, 200)
    off = np.abs(found.astype(int) - np.asarray(wanted))
    assert off.max() == 0 if mode != "CMYK" else off.mean() < 3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_plain_images_take_little_memory_or_are_refused(tmp_path: Path) -> None:
    """In a process of its own: the largest image that is taken, decoded, with all of Pillow's copies."""
    side = 5120
    Image.new("RGBA", (side, side), (200, 120, 160, 200)).save(tmp_path / "a.png", compress_level=1)
    Image.new("L", (side, side + 1), 200).save(tmp_path / "b.png", compress_level=1)
    with pytest.raises(SlideError, match=r"b\.png: 5120 x 5121 px are too many .* vips tiffsave b\.png b\.tif --tile"):
        open_slide(tmp_path / "b.png", 0.5)
    code = (
        "import sys; from histossl.slides.reading.slide import open_slide\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "slide = open_slide(sys.argv[1], 0.5); before = peak(); slide.thumbnail(500); print(peak() - before)"
    )
    told = subprocess.run([sys.executable, "-c", code, tmp_path / "a.png"], capture_output=True, check=True, text=True)
    assert int(told.stdout) * 1024 < 10 * side * side, "4 bytes per pixel decoded and 3 kept, not 16 and more"


def test_memory_stays_flat_on_an_image_without_levels(tmp_path: Path) -> None:
    """12,000 px of uncompressed rows are 432 MB; the thumbnail needs a fraction of it."""
    with tifffile.TiffWriter(tmp_path / "flat.tif") as tiff:
        tiff.write(shape=(12000, 12000, 3), dtype=np.uint8, data=None, photometric="rgb", metadata=None, **CM)
    with open_slide(tmp_path / "flat.tif") as slide:
        tracemalloc.start()
        thumbnail = slide.thumbnail(500)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert thumbnail.shape == (500, 500, 3)
    assert peak < 200e6


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_a_tiff_in_one_compressed_piece_takes_little_memory_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = 3000
    path = write(
        tmp_path / "a.tif",
        np.full((side, side, 4), 200, np.uint8),
        compression="zlib",
        rowsperstrip=side,
        extrasamples=["unassalpha"],
    )
    code = (
        "import sys; from histossl.slides.reading.slide import open_slide\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "slide = open_slide(sys.argv[1]); before = peak(); slide.read_level(0, 0, 0, 9, 9); print(peak() - before)"
    )
    told = subprocess.run([sys.executable, "-c", code, path], capture_output=True, check=True, text=True)
    assert int(told.stdout) * 1024 < 13 * side * side, "4 bytes per pixel twice and 3 kept, not 25"
    monkeypatch.setattr(tiff_module, "MAX_SEGMENT_BYTES", 11 * side * side - 1)
    with pytest.raises(SlideError, match="stored in pieces of 36 MB, too large"):
        open_slide(path)


# ---- scale


def test_scale_comes_from_the_file_and_says_where(tmp_path: Path, painted_slide: PaintedSlide) -> None:
    with open_slide(painted_slide.path) as slide:
        assert slide.mpp_l0 == pytest.approx(0.5)
        assert slide.mpp_source == "TIFF resolution tag"
    inches = write(tmp_path / "a.tif", picture(), tile=(128, 128), resolution=(101600, 101600), resolutionunit="INCH")
    with open_slide(inches) as slide:
        assert slide.mpp_l0 == pytest.approx(0.25)


def test_given_scale_goes_before_the_file_s(painted_slide: PaintedSlide) -> None:
    with open_slide(painted_slide.path, 0.3) as slide:
        assert (slide.mpp_l0, slide.mpp_source) == (0.3, "--slide-mpp")
        assert slide.warnings == [
            "its TIFF resolution tag says 0.5 microns per pixel, --slide-mpp says 0.3, which is used"
        ]
    with open_slide(painted_slide.path, 0.505) as slide:
        assert not slide.warnings


@pytest.mark.parametrize("resolution", [(1, 1), (0, 0), None])
def test_missing_scale_is_asked_for(tmp_path: Path, resolution: tuple[int, int] | None) -> None:
    options = {} if resolution is None else {"resolution": resolution, "resolutionunit": "INCH"}
    tifffile.imwrite(tmp_path / "A1.tif", picture(), photometric="rgb", tile=(128, 128), metadata=None, **options)
    with pytest.raises(SlideError, match=r"A1\.tif: no microns-per-pixel .*--mpp-csv.*--slide-mpp"):
        open_slide(tmp_path / "A1.tif")
    with open_slide(tmp_path / "A1.tif", need_mpp=False) as slide:
        assert math.isnan(slide.mpp_l0)
        assert "no microns-per-pixel" in slide.mpp_problem


@pytest.mark.parametrize("dots", [72, 300])
def test_screen_resolution_is_no_scale(tmp_path: Path, dots: int) -> None:
    path = write(tmp_path / "a.tif", picture(), tile=(128, 128), resolution=(dots, dots), resolutionunit="INCH")
    with pytest.raises(
        SlideError, match=rf"says {25400 / dots:.4g} microns per pixel, which is implausible.*--slide-mpp"
    ):
        open_slide(path)


def test_unequal_sides_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", picture(), tile=(128, 128), resolution=(20000, 19000))
    with open_slide(path) as slide:
        assert slide.mpp_l0 == pytest.approx((0.5 + 10000 / 19000) / 2)
        assert any("differ between x" in warning for warning in slide.warnings)
    with open_slide(path, 0.5) as slide:
        assert not slide.warnings


@pytest.mark.data
def test_real_files_without_a_believable_scale(real_data: Path) -> None:
    with pytest.raises(SlideError, match=r"352\.8 microns per pixel, which is implausible"):
        open_slide(real_data / "damaged" / "absurd_mpp_boxes.tiff")
    with pytest.raises(SlideError, match="no microns-per-pixel"):
        open_slide(real_data / "slides" / "TCGA-CR-7395-01A-01-TS1.svs")
    with open_slide(real_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        assert (slide.mpp_l0, slide.mpp_source) == (0.499, "metadata (aperio)")


# ---- what must not be read, and what cannot be


@pytest.mark.data
def test_label_and_macro_are_never_opened(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(
        openslide.OpenSlide, "associated_images", property(lambda self: opened.append("associated")), raising=True
    )
    path = real_data / "slides" / "CMU-1-Small-Region.svs"
    with open_slide(path) as slide:
        slide.thumbnail(100)
        assert slide.native is not None
    decoded: list[int] = []
    decode = TiffLevels._decoded
    monkeypatch.setattr(
        TiffLevels, "_decoded", lambda self, page, index: (decoded.append(page.index), decode(self, page, index))[1]
    )
    with through_tifffile(path) as slide:
        slide.thumbnail(100)
    assert not opened
    assert set(decoded) == {0}, "page 0 is the tissue; thumbnail, label and macro come after it"


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation_is_told(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture()).save(tmp_path / f"a.{suffix}", exif=exif)
    with open_slide(tmp_path / f"a.{suffix}", 0.5) as slide:
        assert slide.size_l0 == (700, 500)
        assert slide.warnings == ["EXIF Orientation tag 6 is not applied: pixels are read as stored"]


def test_orientation_tag_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", picture(), tile=(128, 128), extratags=[(274, "H", 1, 6, True)])
    with open_slide(path) as slide:
        assert slide.size_l0 == (700, 500)
        assert any("Orientation tag 6 is not applied" in warning for warning in slide.warnings)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "empty"),
        (bytes(100_000), "zeros"),
        (b"no slide at all" * 100, "not a slide"),
        (b"II*\0" + b"\xff" * 3000, "damaged|not a slide|without an image"),
        (b"\x89PNG\r\n\x1a\n" + b"\x07" * 300, "failed"),
    ],
)
def test_hollow_files_are_told_plainly(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "A1.svs").write_bytes(content)
    with pytest.raises(SlideError, match=rf"^A1\.svs: .*({told})"):
        open_slide(tmp_path / "A1.svs")


def test_folder_link_and_permission_are_told(tmp_path: Path) -> None:
    (tmp_path / "A1.svs").mkdir()
    with pytest.raises(SlideError, match="a folder"):
        open_slide(tmp_path / "A1.svs")
    (tmp_path / "A2.svs").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SlideError, match="link to nothing"):
        open_slide(tmp_path / "A2.svs")
    if os.geteuid() != 0:  # root may read anything
        (tmp_path / "A3.svs").write_bytes(b"x")
        (tmp_path / "A3.svs").chmod(0)
        with pytest.raises(SlideError, match="no permission"):
            open_slide(tmp_path / "A3.svs")


@pytest.mark.parametrize("big", [False, True])
def test_a_file_that_ends_before_its_first_directory_is_told_as_truncated(tmp_path: Path, big: bool) -> None:
    """As Aperio writes it: the directory behind the tiles."""
    head = b"II+\0\x08\0\0\0" + (10**9).to_bytes(8, "little") if big else b"II*\0" + (10**9).to_bytes(4, "little")
    (tmp_path / "A1.svs").write_bytes(head + bytes(range(1, 200)) * 100)
    with pytest.raises(SlideError, match=r"^A1\.svs: truncated .*copy or download it again"):
        open_slide(tmp_path / "A1.svs")


def test_truncated_slide_is_found_without_reading_its_pixels(tmp_path: Path, painted_slide: PaintedSlide) -> None:
    whole = painted_slide.path.read_bytes()
    (tmp_path / "A1.tif").write_bytes(whole[: int(len(whole) * 0.7)])
    with pytest.raises(SlideError, match=r"truncated|damaged"):
        open_slide(tmp_path / "A1.tif")


@pytest.mark.data
@pytest.mark.parametrize("name", ["unopenable.tiff", "histolab_broken.svs", "unreadable.svs"])
def test_damaged_real_files_say_so(real_data: Path, name: str) -> None:
    with (
        pytest.raises(SlideError, match=rf"^{name}: .*(damaged|not a slide|not known)"),
        open_slide(real_data / "damaged" / name, 0.5) as slide,
    ):
        slide.thumbnail(100)


# ---- native tiles


def test_native_levels_tell_where_each_tile_lies(painted_slide: PaintedSlide) -> None:
    with open_slide(painted_slide.path) as slide:
        assert slide.native is not None
        level = slide.native[0]
        assert level is not None
        assert (level.tile_width_px, level.tile_height_px, level.compression) == (256, 256, "JPEG")
        assert len(level.offsets) == level.tiles_across * level.tiles_down == 16
        content = painted_slide.path.read_bytes()
        for offset, count in zip(level.offsets, level.byte_counts, strict=True):
            assert content[offset : offset + 2] == b"\xff\xd8"
            assert content[offset + count - 2 : offset + count] == b"\xff\xd9"
