"""What stored samples mean: the painted pixels come out, whatever the tags say, in every codec and range of bits."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from histossl.core.errors import SlideError
from histossl.slides.reading.dicom import check_frame_colours
from histossl.slides.reading.slide import open_slide
from histossl.slides.reading.tiff.codestream import colours_by_pixels
from tests.raw_tiff import (
    adobe_rgb,
    bare,
    jfif,
    jpeg_2000,
    jpeg_2000_subsampled,
    strips,
    tags,
    tiles,
    with_adobe,
    write_raw,
    ycc,
)

SIZE = (320, 256)
APERIO = "Aperio Image Library v10.2.24\r\n{0}x{1} [0,0 {0}x{1}] (128x128) Q=30|AppMag = 20|MPP = 0.5"
MIDDLE = 2.5  # grey levels that JPEG and the rounding of YCbCr take on average
OME = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}


def stained(size: tuple[int, int] = SIZE) -> np.ndarray:
    """Pink tissue with purple discs on white glass, smooth enough for subsampled chroma."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    waves = np.sin(x / 17) * np.cos(y / 23)
    image = np.array([226, 160, 190]) + waves[..., None] * np.array([16, 28, 14])
    image[np.hypot(x % 64 - 32, y % 64 - 32) < 14] = (98, 58, 140)
    image[:, -40:] = (244, 243, 245)
    image[:40] = (255, 255, 255)
    return image.round().astype(np.uint8)


def off(slide_path: Path, truth: np.ndarray) -> float:
    """Mean difference between a slide's level 0 and the truth, in grey levels, by box, whole and as a thumbnail."""
    height, width = truth.shape[:2]
    with open_slide(slide_path, 0.5) as slide:
        assert slide.size_l0 == (width, height)
        seen = slide.read_level(0, 0, 0, width, height).astype(int)
        part = slide.read_region_l0(37, 21, 150, 110, 150, 110)
        thumbnail = slide.thumbnail(width)
    np.testing.assert_array_equal(part, seen[21:131, 37:187])
    np.testing.assert_array_equal(thumbnail, seen)
    return float(np.abs(seen - truth).mean())


def notes(path: Path) -> str:
    with open_slide(path, 0.5) as slide:
        return "; ".join(slide.warnings)


# ---- colours

JPEGS: dict[str, Callable[[np.ndarray], bytes]] = {
    "JFIF 4:4:4": jfif,
    "JFIF 4:2:2": lambda tile: jfif(tile, "4:2:2"),
    "JFIF 4:2:0": lambda tile: jfif(tile, "4:2:0"),
    "bare YCbCr 4:4:4": lambda tile: bare(jfif(tile)),
    "bare YCbCr 4:2:0": lambda tile: bare(jfif(tile, "4:2:0")),
    "YCbCr numbered from 0": lambda tile: bare(jfif(tile), b"\0\1\2"),
    "Adobe YCbCr": lambda tile: with_adobe(bare(jfif(tile)), 1),
    "Adobe RGB": adobe_rgb,
    "RGB by component names": lambda tile: bare(adobe_rgb(tile), b"RGB"),
    "RGB, subsampled": lambda tile: imagecodecs.jpeg8_encode(
        np.ascontiguousarray(tile), 95, outcolorspace="RGB", subsampling=(2, 1)
    ),
    "bare RGB": lambda tile: bare(adobe_rgb(tile)),
    "RGB numbered from 0": lambda tile: bare(adobe_rgb(tile), b"\0\1\2"),
}


@pytest.mark.parametrize("photometric", [2, 6])
@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("layout", ["TIFF", "big-endian BigTIFF", "Aperio", "strips"])
def test_a_jpegs_colours_are_its_own_whatever_the_tag_says(
    tmp_path: Path, layout: str, kind: str, photometric: int
) -> None:
    image = stained()
    more: dict[str, Any] = {"t530": (3, [2, 2] if "4:2:0" in kind else [1, 1])} if photometric == 6 else {}
    more |= {"t270": (2, APERIO.format(*SIZE))} if layout == "Aperio" else {}
    if layout == "strips":
        pieces = [image[top : top + 64] for top in range(0, SIZE[1], 64)]
        more["rows"] = 64
    else:
        pieces, more["tile"] = tiles(image, 128), 128
    page = (tags(SIZE, compression=7, photometric=photometric, **more), [JPEGS[kind](each) for each in pieces])
    big = layout == "big-endian BigTIFF"
    path = write_raw(tmp_path / "A1.svs", page, big=big, order=">" if big else "<")
    assert off(path, image) < MIDDLE
    contradicted = ("RGB" in kind) == (photometric == 6)
    assert ("read as" in notes(path)) == contradicted


def test_tiles_of_one_level_may_differ(tmp_path: Path) -> None:
    image = stained()
    made = [(jfif, adobe_rgb)[number % 2](tile) for number, tile in enumerate(tiles(image, 128))]
    path = write_raw(tmp_path / "A1.tif", (tags(SIZE, compression=7, tile=128), made))
    assert off(path, image) < MIDDLE


def test_a_grey_tile_among_coloured_ones_is_grey(tmp_path: Path) -> None:
    image = stained()
    made = [jfif(tile) for tile in tiles(image, 128)]
    made[0] = imagecodecs.jpeg_encode(np.ascontiguousarray(image[:128, :128, 1]), 95)
    path = write_raw(tmp_path / "A1.tif", (tags(SIZE, compression=7, photometric=6, tile=128), made))
    image[:128, :128] = image[:128, :128, 1:2]
    assert off(path, image) < MIDDLE


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("sampling", [(1, 1), (2, 2)])
def test_jpeg_of_12_bits_is_as_bright_as_painted(tmp_path: Path, sampling: tuple[int, int], bits: int) -> None:
    image = stained()
    made = [
        imagecodecs.jpeg8_encode(np.ascontiguousarray(tile), 95, bitspersample=12, subsampling=sampling)
        for tile in tiles(scaled(image, 12), 128)
    ]
    page = tags(SIZE, bits=(bits,) * 3, compression=7, photometric=6, tile=128, t530=(3, list(sampling)))
    assert off(write_raw(tmp_path / "A1.tif", (page, made)), image) < MIDDLE


def test_a_row_says_where_colours_cannot_be_known(tmp_path: Path) -> None:
    # Of this grey nothing tells whether it is RGB or luma with faint chroma.
    grey = np.full((256, 320, 3), 120, np.uint8)
    page = (tags(SIZE, compression=7, tile=128), [bare(adobe_rgb(tile)) for tile in tiles(grey, 128)])
    path = write_raw(tmp_path / "A1.tif", page)
    assert off(path, grey) < MIDDLE
    assert "nothing tells for sure whether its tiles hold RGB or YCbCr: read as RGB" in notes(path)


JPEGS_2000: dict[str, Callable[[np.ndarray], bytes]] = {
    "RGB, transformed": lambda tile: jpeg_2000(tile, mct=True),
    "RGB": jpeg_2000,
    "RGB in a box": lambda tile: jpeg_2000(tile, boxed=True),
    "YCbCr": lambda tile: jpeg_2000(ycc(tile)),
    "YCbCr in a box": lambda tile: jpeg_2000(ycc(tile), boxed=True, colorspace="SYCC"),
    "YCbCr, subsampled": jpeg_2000_subsampled,
}


@pytest.mark.parametrize("described", [None, APERIO])
@pytest.mark.parametrize("compression", [33003, 33004, 33005, 34712])
@pytest.mark.parametrize("kind", JPEGS_2000)
def test_a_jpeg_2000s_colours_are_its_own(tmp_path: Path, kind: str, compression: int, described: str | None) -> None:
    image = stained()
    more: dict[str, Any] = {"t270": (2, described.format(*SIZE))} if described else {}
    page = (tags(SIZE, compression=compression, tile=128, **more), [JPEGS_2000[kind](t) for t in tiles(image, 128)])
    assert off(write_raw(tmp_path / "A1.svs", page), image) < MIDDLE


@pytest.mark.parametrize(("compression", "photometric"), [(33003, 2), (33005, 6), (34712, 6)])
def test_transformed_ycbcr_is_found_where_a_tag_says_so(tmp_path: Path, compression: int, photometric: int) -> None:
    image = stained()
    described = {"t270": (2, APERIO.format(*SIZE))} if compression == 33003 else {}
    page = tags(SIZE, compression=compression, photometric=photometric, tile=128, **described)
    stored = [jpeg_2000(ycc(tile), mct=True) for tile in tiles(image, 128)]
    assert off(write_raw(tmp_path / "A1.svs", (page, stored)), image) < MIDDLE


@pytest.mark.parametrize("kind", ["RGB", "YCbCr"])
def test_aperios_jpeg_2000_without_a_sign_is_what_aperio_writes(tmp_path: Path, kind: str) -> None:
    grey = np.full((256, 320, 3), 120, np.uint8)
    compression = {"RGB": 33005, "YCbCr": 33003}[kind]
    stored = [jpeg_2000(ycc(tile) if kind == "YCbCr" else tile) for tile in tiles(grey, 128)]
    page = (tags(SIZE, compression=compression, tile=128, t270=(2, APERIO.format(*SIZE))), stored)
    path = write_raw(tmp_path / "A1.svs", page)
    assert off(path, grey) < MIDDLE
    assert f"read as {kind}" in notes(path)


@pytest.mark.parametrize("compression", [33003, 33005, 34712, "jpegxl", "webp", "png", "jpegxr", "lerc", "zstd"])
def test_ome_tiffs_of_every_codec_have_the_painted_colours(tmp_path: Path, compression: int | str) -> None:
    image = stained()
    options: dict[str, Any] = {"photometric": "rgb", "tile": (128, 128), "compression": compression}
    options |= {"compressionargs": {"lossless": True}} if compression == "webp" else {}
    tifffile.imwrite(tmp_path / "a.ome.tif", image, ome=True, metadata=OME, **options)
    assert off(tmp_path / "a.ome.tif", image) < MIDDLE


@pytest.mark.parametrize("colours", ["CMYK", "CIELab", "ICCLab", "CMYK in a JPEG", "YCbCr of a video", "RGB 5/6/5"])
@pytest.mark.parametrize("tile", [None, 64])
def test_colours_that_nobody_vouches_for_are_refused_in_one_line(
    tmp_path: Path, colours: str, tile: int | None
) -> None:
    four = np.dstack([stained((64, 64)), np.full((64, 64), 9, np.uint8)])
    cmyk = io.BytesIO()
    Image.fromarray(four[..., :3]).convert("CMYK").save(cmyk, "JPEG")
    made: dict[str, tuple[dict[str, Any], bytes]] = {
        "CMYK": ({"photometric": 5, "bits": (8,) * 4}, four.tobytes()),
        "CIELab": ({"photometric": 8}, four[..., :3].tobytes()),
        "ICCLab": ({"photometric": 9}, four[..., :3].tobytes()),
        "CMYK in a JPEG": ({"compression": 7}, cmyk.getvalue()),
        "YCbCr of a video": (
            {"photometric": 6, "t530": (3, [1, 1]), "t532": (5, [16, 1, 235, 1, 128, 1, 240, 1, 128, 1, 240, 1])},
            ycc(four[..., :3]).tobytes(),
        ),
        "RGB 5/6/5": ({"bits": (5, 6, 5)}, four[..., :2].tobytes()),
    }
    options, data = made[colours]
    path = write_raw(tmp_path / "A1.tif", (tags((64, 64), tile=tile, **options), [data]))
    with pytest.raises(SlideError, match=r"^A1\.tif: [^\n]*convert it to") as error:
        off(path, four[..., :3])
    assert "damaged" not in str(error.value)


@pytest.mark.parametrize("codec", ["jpeg", "jpeg2000", "lzw", "none", "16 bit"])
@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
def test_planes_of_every_codec_are_the_painted_pixels(tmp_path: Path, codec: str, photometric: str) -> None:
    image = stained()
    stored = np.moveaxis(ycc(image) if photometric == "ycbcr" else image, 2, 0)
    stored = stored.astype(np.uint16) * 257 if codec == "16 bit" else stored
    options: dict[str, Any] = {} if codec in ("none", "16 bit") else {"compression": codec}
    options |= {"compressionargs": {"level": 95}} if codec == "jpeg" else {}
    path = tmp_path / "a.tif"
    options |= {"photometric": "rgb", "planarconfig": "separate", "extratags": [(530, "H", 2, (1, 1), True)]}
    tifffile.imwrite(path, stored, tile=(64, 64), metadata=None, **options)
    if photometric == "ycbcr":
        with tifffile.TiffFile(path, mode="r+b") as tiff:
            tiff.pages[0].tags[262].overwrite(6)
    assert off(path, image) < MIDDLE


def test_grey_jpeg_and_old_jpeg_are_read(tmp_path: Path) -> None:
    image = stained()
    grey = np.asarray(Image.fromarray(image).convert("L"))
    made = [imagecodecs.jpeg_encode(np.ascontiguousarray(tile[..., 0]), 95) for tile in tiles(grey[..., None], 128)]
    path = write_raw(tmp_path / "A1.tif", (tags(SIZE, bits=(8,), photometric=1, compression=7, tile=128), made))
    assert off(path, np.repeat(grey[..., None], 3, axis=2)) < MIDDLE
    old = tags(SIZE, photometric=6, compression=6, rows=64)
    path = write_raw(tmp_path / "A2.tif", (old, [jfif(image[top : top + 64]) for top in range(0, 256, 64)]))
    assert off(path, image) < MIDDLE


@pytest.mark.parametrize(
    ("colours", "wanted"),
    [
        ("glass", "RGB"),
        ("tissue", "RGB"),
        ("black", "RGB"),
        ("glass in YCbCr", "YCBCR"),
        ("tissue in YCbCr", "YCBCR"),
        ("middle grey", ""),
    ],
)
def test_pixels_tell_rgb_from_ycbcr_where_they_can(colours: str, wanted: str) -> None:
    image = {"glass": np.full((8, 8, 3), 243), "black": np.zeros((8, 8, 3)), "middle grey": np.full((8, 8, 3), 128)}
    pixels = image.get(colours.removesuffix(" in YCbCr"), stained()).astype(np.uint8)
    assert colours_by_pixels(ycc(pixels) if "YCbCr" in colours else pixels) == wanted


# ---- DICOM, which OpenSlide alone reads

JPEG_SYNTAX, JPEG_2000_SYNTAX = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90"


def encapsulated(frames: list[bytes]) -> bytes:
    """The pixel data of a DICOM file, with an empty table of offsets."""
    items = [frame + bytes(len(frame) % 2) for frame in frames]
    parts = [b"\xfe\xff\x00\xe0" + len(item).to_bytes(4, "little") + item for item in (b"", *items)]
    return b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff" + b"".join(parts) + b"\xfe\xff\xdd\xe0" + bytes(4)


@pytest.mark.parametrize("named", ["RGB", "YBR_FULL_422"])
@pytest.mark.parametrize("kind", [*JPEGS, "JPEG 2000 RGB", "JPEG 2000 YCbCr"])
def test_dicom_frames_whose_colours_openslide_would_mistake_are_refused(tmp_path: Path, kind: str, named: str) -> None:
    makers = {**JPEGS, "JPEG 2000 RGB": jpeg_2000, "JPEG 2000 YCbCr": lambda tile: jpeg_2000(ycc(tile))}
    frames = [makers[kind](tile) for tile in tiles(stained(), 128)]
    path = tmp_path / "a.dcm"
    path.write_bytes(bytes(200) + encapsulated(frames))
    syntax = JPEG_2000_SYNTAX if "2000" in kind else JPEG_SYNTAX
    properties = {"dicom.TransferSyntaxUID": syntax, "dicom.PhotometricInterpretation": named}
    if ("RGB" in kind) == (named == "RGB"):
        assert check_frame_colours(path, properties) == ""
    else:
        with pytest.raises(SlideError, match="dcmodify -m PhotometricInterpretation="):
            check_frame_colours(path, properties)


def test_dicom_frames_that_say_nothing_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(encapsulated([bare(adobe_rgb(np.full((64, 64, 3), 120, np.uint8)))]))
    properties = {"dicom.TransferSyntaxUID": JPEG_SYNTAX, "dicom.PhotometricInterpretation": "RGB"}
    assert "nothing tells for sure" in check_frame_colours(tmp_path / "a.dcm", properties)


@pytest.mark.data
def test_a_real_dicom_slide_is_refused_once_its_frames_hold_other_colours(tmp_path: Path, real_data: Path) -> None:
    real = (real_data / "slides" / "boxes_dicom" / "boxes_0.dcm").read_bytes()
    head = real[: real.find(b"\xe0\x7f\x10\x00OB")]
    image = stained((64, 64))  # a frame, of which the slide is the corner
    path = tmp_path / "a.dcm"
    path.write_bytes(head + encapsulated([adobe_rgb(image)]))
    assert off_small(path, image[:16, :16]) < 3
    path.write_bytes(head + encapsulated([jfif(image)]))
    with pytest.raises(SlideError, match="its frames hold YCbCr, its PhotometricInterpretation says RGB"):
        open_slide(path, 0.5)


# ---- range


def scaled(image: np.ndarray, bits: int, dtype: Any = np.uint16) -> np.ndarray:
    return (image.astype(np.uint32) * (2**bits - 1) / 255).round().astype(dtype)


@pytest.mark.parametrize("bits", [8, 9, 10, 12, 14, 15, 16])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("strips", {}),
        ("tiles", {"tile": (64, 64)}),
        ("deflate", {"tile": (64, 64), "compression": "deflate", "predictor": True}),
        ("JPEG 2000", {"tile": (64, 64), "compression": "jpeg2000"}),
        ("JPEG XL", {"tile": (64, 64), "compression": "jpegxl"}),
        ("PNG", {"tile": (64, 64), "compression": "png"}),
        ("big-endian", {"byteorder": ">", "bigtiff": True, "rowsperstrip": 32}),
        ("planes", {"planarconfig": "separate", "rowsperstrip": 32}),
        ("OME", {"ome": True}),
    ],
)
def test_samples_of_16_bits_are_as_bright_as_painted(
    tmp_path: Path, kind: str, options: dict[str, Any], bits: int
) -> None:
    image = stained()
    stored = scaled(image, bits)
    stored = np.moveaxis(stored, 2, 0) if kind == "planes" else stored
    path = tmp_path / ("a.ome.tif" if kind == "OME" else "a.tif")
    tifffile.imwrite(path, stored, photometric="rgb", metadata=OME if kind == "OME" else None, **options)
    assert off(path, image) < 0.6
    assert (f"16-bit samples hold {bits} bits by their brightest pixels" in notes(path)) == (bits < 16)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
@pytest.mark.parametrize("bits", [12, 14])
def test_grey_and_signed_samples_have_their_range_too(tmp_path: Path, bits: int, dtype: Any) -> None:
    image = stained()
    for name, photometric in (("a.tif", "minisblack"), ("b.tif", "miniswhite")):
        grey = image[..., 1] if photometric == "minisblack" else 255 - image[..., 1]
        tifffile.imwrite(tmp_path / name, scaled(grey, bits, dtype), photometric=photometric, metadata=None)
        assert off(tmp_path / name, np.repeat(image[..., 1:2], 3, axis=2)) < 0.6


def test_one_range_for_all_levels_and_tiles(tmp_path: Path) -> None:
    image = stained()
    image[:128, :128] = image[:128, :128] // 8  # a dark tile must stay dark
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        for number in range(3):
            level = scaled(image[:: 2**number, :: 2**number], 14)
            tiff.write(level, photometric="rgb", tile=(64, 64), subfiletype=min(number, 1), metadata=None)
    with open_slide(path, 0.5) as slide:
        for number in range(3):
            wanted = image[:: 2**number, :: 2**number]
            seen = slide.read_level(number, 0, 0, *wanted.shape[1::-1])
            assert np.abs(seen.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("source", ["OME SignificantBits", "MaxSampleValue", "SMaxSampleValue", "codestream"])
def test_a_stated_range_goes_before_the_brightest_pixels(tmp_path: Path, source: str) -> None:
    image = stained() // 5  # at most 51 of 255: by its pixels it would be of 10 bits
    stored, path = scaled(image, 12), tmp_path / "a.ome.tif"
    options: dict[str, Any] = {"photometric": "rgb", "tile": (64, 64), "metadata": None}
    if source == "OME SignificantBits":
        tifffile.imwrite(path, stored, ome=True, **{**options, "metadata": {**OME, "SignificantBits": 12}})
    elif source == "codestream":
        made = [jpeg_2000(tile, bitspersample=12) for tile in tiles(stored, 64)]
        write_raw(path, (tags(SIZE, bits=(16,) * 3, compression=34712, tile=64), made))
    else:
        code = {"MaxSampleValue": 281, "SMaxSampleValue": 341}[source]
        tifffile.imwrite(path, stored, extratags=[(code, "H", 3, (4095,) * 3, True)], **options)
    assert off(path, image) < 0.6
    assert f"hold 12 bits by their {source}" in notes(path)


def test_a_stated_range_that_the_pixels_exceed_is_not_believed(tmp_path: Path) -> None:
    metadata = {**OME, "SignificantBits": 12}
    tifffile.imwrite(tmp_path / "a.ome.tif", scaled(stained(), 16), ome=True, photometric="rgb", metadata=metadata)
    assert off(tmp_path / "a.ome.tif", stained()) < 0.6


def test_a_few_broken_pixels_and_overshoot_leave_the_range_alone(tmp_path: Path) -> None:
    image = stained()
    stored = scaled(image, 14)
    stored[10, 10], stored[20] = 65535, 16500
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", metadata=None)
    image[10, 10] = image[20] = 255
    assert off(tmp_path / "a.tif", image) < 0.6


def test_a_tile_beyond_the_range_is_an_error_and_not_white(tmp_path: Path) -> None:
    stored = scaled(np.tile(stained(), (8, 8, 1)), 12)
    # Where no sample was taken: in one row of tiles of 64.
    stored[1023 : 1024 + 8, 64:128] = 60000
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", tile=(16, 16), metadata=None)
    with open_slide(tmp_path / "a.tif", 0.5) as slide, pytest.raises(SlideError, match=r"of up to 60000, where 4095"):
        slide.read_level(0, 64, 1023, 64, 8)


@pytest.mark.parametrize("bits", [1, 2, 4, 10, 12, 14])
@pytest.mark.parametrize("tile", [None, 64])
@pytest.mark.parametrize("fill_order", [1, 2])
def test_packed_samples_are_read(tmp_path: Path, bits: int, tile: int | None, fill_order: int) -> None:
    image = stained((64, 64))
    stored = scaled(image[..., 1], bits)
    data = imagecodecs.packints_encode(stored.astype(np.uint16 if bits > 8 else np.uint8), bits)
    data = imagecodecs.bitorder_encode(data) if fill_order == 2 else data
    more: dict[str, Any] = {"t266": (3, fill_order)}
    path = write_raw(tmp_path / "a.tif", (tags((64, 64), bits=(bits,), photometric=1, tile=tile, **more), [data]))
    wanted = (stored * (255 / (2**bits - 1))).round().astype(np.uint8)
    with open_slide(path, 0.5) as slide:
        seen = slide.read_level(0, 0, 0, 64, 64)
    np.testing.assert_array_equal(seen, np.repeat(wanted[..., None], 3, axis=2))


@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.uint32, np.int32, np.float16])
@pytest.mark.parametrize("tile", [None, (64, 64)])
def test_other_types_are_refused_in_one_line(tmp_path: Path, dtype: Any, tile: tuple[int, int] | None) -> None:
    stored = (stained() // 3).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", tile=tile, metadata=None)
    with pytest.raises(SlideError, match="pixels; histossl reads 8 or 16 bit brightfield images"):
        open_slide(tmp_path / "a.tif", 0.5)


def test_signed_samples_below_zero_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", scaled(stained(), 12, np.int16) - 2000, photometric="rgb", metadata=None)
    with open_slide(tmp_path / "a.tif", 0.5) as slide, pytest.raises(SlideError, match="samples below 0"):
        slide.read_level(0, 0, 0, *SIZE)


@pytest.mark.parametrize("full", [255, 65535])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tile", [None, 64])
def test_palettes_of_8_and_of_16_bits_are_read(tmp_path: Path, full: int, bits: int, tile: int | None) -> None:
    index = (np.arange(64 * 64).reshape(64, 64) // 64 % 2**bits).astype(np.uint8)
    table = np.random.default_rng(0).integers(0, 256, (3, 2**bits))
    table[0, 0] = 255
    data = imagecodecs.packints_encode(index, bits) if bits == 4 else index.tobytes()
    colours = (3, (table * (full // 255)).ravel().tolist())
    page = (tags((64, 64), bits=(bits,), photometric=3, tile=tile, t320=colours), [data])
    path = write_raw(tmp_path / "a.tif", page)
    with open_slide(path, 0.5) as slide:
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, 64, 64), table.T[index])


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("extra", ["unassalpha", "assocalpha"])
@pytest.mark.parametrize("opaque_bits", [12, 16])
def test_transparency_is_over_white_in_every_range(tmp_path: Path, bits: int, extra: str, opaque_bits: int) -> None:
    image = stained()
    alpha = np.full(image.shape[:2], 255, np.uint8)
    alpha[60:120, 40:200] = 51
    weight = alpha[..., None] / 255
    wanted = (image * weight + 255 * (1 - weight)).round()
    colour = image * weight if extra == "assocalpha" else image.astype(float)
    depth, opaque = (bits, opaque_bits) if bits > 8 else (8, 8)
    stored = [colour * (2**depth - 1) / 255, alpha[..., None] * ((2**opaque - 1) / 255)]
    dtype = np.uint16 if bits > 8 else np.uint8
    both = np.concatenate(stored, axis=2).round().astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", both, photometric="rgb", extrasamples=[extra], metadata=None)
    assert off(tmp_path / "a.tif", wanted.astype(np.uint8)) < 1


@pytest.mark.parametrize("bits", [8, 12, 14, 16])
@pytest.mark.parametrize("mode", ["RGB", "grey", "RGBA"])
def test_png_of_16_bits_is_as_bright_as_painted(tmp_path: Path, mode: str, bits: int) -> None:
    image = stained()
    stored = scaled(image, bits)
    stored = stored[..., 1] if mode == "grey" else stored
    wanted = np.repeat(image[..., 1:2], 3, axis=2) if mode == "grey" else image
    if mode == "RGBA":
        alpha = np.full(image.shape[:2], 65535, np.uint16)
        alpha[100:] = 0
        stored, wanted = np.dstack([stored, alpha]), np.where(alpha[..., None] > 0, image, 255).astype(np.uint8)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(np.ascontiguousarray(stored)))
    assert off(tmp_path / "a.png", wanted) < 0.6
    assert (f"16-bit samples hold {bits} bits" in notes(tmp_path / "a.png")) == (bits < 16)


def test_a_level_deeper_than_the_slide_has_its_own_range(tmp_path: Path) -> None:
    image = stained((512, 512))
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for pixels in (image, scaled(image[::2, ::2], 16)):
            tiff.write(pixels, photometric="rgb", tile=(64, 64), metadata=None, compression="deflate")
    with open_slide(tmp_path / "a.tif", 0.5) as slide:
        assert slide.level_sizes == ((512, 512), (256, 256))
        np.testing.assert_array_equal(slide.read_level(1, 0, 0, 256, 256), image[::2, ::2])


# ---- plain JPEG


@pytest.mark.parametrize("colours", ["RGB", "YCbCr"])
def test_a_jpeg_without_a_mark_has_the_colours_that_its_pixels_tell(tmp_path: Path, colours: str) -> None:
    image = stained()
    (tmp_path / "a.jpg").write_bytes(bare(adobe_rgb(image) if colours == "RGB" else jfif(image)))
    assert off(tmp_path / "a.jpg", image) < MIDDLE
    assert ("read as RGB" in notes(tmp_path / "a.jpg")) == (colours == "RGB")


@pytest.mark.parametrize(("said", "options"), [("12 bits", {"bitspersample": 12}), ("lossless", {"lossless": True})])
def test_a_jpeg_of_a_rare_kind_is_refused_for_what_it_is(tmp_path: Path, said: str, options: dict[str, Any]) -> None:
    pixels = scaled(stained(), 12) if said == "12 bits" else stained()
    (tmp_path / "a.jpg").write_bytes(imagecodecs.jpeg_encode(pixels, **options))
    with pytest.raises(SlideError, match=f"{said}.*convert it to PNG"):
        open_slide(tmp_path / "a.jpg", 0.5)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_of_several_pictures_the_first_is_read_and_the_others_are_said(tmp_path: Path, suffix: str) -> None:
    """As cameras and phones store a preview behind the photo."""
    image, kind = stained(), "MPO" if suffix == "jpg" else "PNG"
    others = [Image.fromarray(255 - image)]
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(image).save(path, kind, save_all=True, append_images=others)
    assert off(path, image) < 4  # Pillow's usual quality
    assert notes(path) == "holds 2 pictures: the first is read"


# ---- tags that contradict each other


@pytest.mark.parametrize("tile", [None, 64])
@pytest.mark.parametrize(
    ("missing", "said"), [(258, "bits of 0 of them"), (277, "bits of 3 of them"), (262, "PhotometricInterpretation")]
)
def test_colours_whose_tags_are_missing_are_refused(tmp_path: Path, missing: int, said: str, tile: int | None) -> None:
    image = stained()
    data = [each.tobytes() for each in tiles(image, tile)] if tile else strips(image, 64)
    write_raw(tmp_path / "a.tif", ({**tags(SIZE, tile=tile, rows=64), missing: None}, data))
    with pytest.raises(SlideError, match=said):
        open_slide(tmp_path / "a.tif", 0.5)


# ---- rows of strips


@pytest.mark.parametrize("side", [80, 96, 128, 240])
@pytest.mark.parametrize("described", [None, APERIO])
@pytest.mark.parametrize(("order", "big", "round_up"), [("<", False, 1), (">", True, 1), ("<", False, 4096)])
def test_uncompressed_tiles_of_any_size_are_read(
    tmp_path: Path, order: str, big: bool, round_up: int, described: str | None, side: int
) -> None:
    """With padding behind them, too. Where their bytes are no multiple of 1,024, OpenSlide fails on the last."""
    image = stained()
    more = {"t270": (2, described.format(*SIZE))} if described else {}
    data = [each.tobytes() for each in tiles(image, side)]
    path = tmp_path / "a.tif"
    write_raw(path, (tags(SIZE, tile=side, **more), data), round_up=round_up, order=order, big=big)
    assert off(path, image) == 0


@pytest.mark.parametrize("round_up", [1, 16, 1000])
@pytest.mark.parametrize("gap", [0, 7])
@pytest.mark.parametrize("rows", [1, 3, 100, 1000])
@pytest.mark.parametrize(("order", "big"), [("<", False), (">", True)])
def test_strips_are_read_where_they_lie(
    tmp_path: Path, rows: int, gap: int, round_up: int, order: str, big: bool
) -> None:
    image = stained((127, 200))
    path = tmp_path / "a.tif"
    write_raw(
        path, (tags((127, 200), rows=rows), strips(image, rows)), gap=gap, round_up=round_up, order=order, big=big
    )
    assert off_small(path, image) == 0
    wide = image.astype(f"{order}u2") * 257
    write_raw(
        path,
        (tags((127, 200), bits=(16,) * 3, rows=rows), strips(wide, rows)),
        gap=gap,
        round_up=round_up,
        order=order,
        big=big,
    )
    assert off_small(path, image) == 0


def off_small(path: Path, truth: np.ndarray) -> float:
    with open_slide(path, 0.5) as slide:
        seen = slide.read_level(0, 0, 0, *truth.shape[1::-1]).astype(int)
        if len(truth) > 110:
            np.testing.assert_array_equal(slide.read_level(0, 11, 90, 50, 20), seen[90:110, 11:61])
    return float(np.abs(seen - truth).mean())


def test_padding_that_the_file_does_not_hold_is_no_damage(tmp_path: Path) -> None:
    image = stained((127, 200))
    data = strips(image, 100)
    rounded = [(data[0], len(data[0])), (data[1], len(data[1]))]
    path = write_raw(tmp_path / "a.tif", (tags((127, 200), rows=100), rounded))
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags[279].overwrite((len(data[0]) + 4, 1 << 30))
    assert off_small(path, image) == 0


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_strip_without_bytes_is_white(tmp_path: Path, bits: int, planes: bool) -> None:
    image = stained((127, 200))
    stored = image if bits == 8 else image.astype(np.uint16) * 257
    data: list[Any] = [each for plane in np.moveaxis(stored, 2, 0) for each in strips(plane, 20)] if planes else []
    data = data or strips(stored, 20)
    for number in range(3, len(data), 10):
        data[number] = (data[number], 0)
    options: dict[str, Any] = {"t284": (3, 2)} if planes else {}
    path = write_raw(tmp_path / "a.tif", (tags((127, 200), bits=(bits,) * 3, rows=20, **options), data))
    image[60:80] = 255
    assert off_small(path, image) == 0
    assert f"{'3 of 30' if planes else '1 of 10'} strips hold nothing" in notes(path)


@pytest.mark.parametrize("counts", ["missing", "zero"])
def test_byte_counts_that_nobody_wrote_are_computed(tmp_path: Path, counts: str) -> None:
    image = stained((127, 200))
    data = [(each, len(each) if counts == "missing" else 0) for each in strips(image, 20)]
    page = tags((127, 200), rows=20) | ({279: None} if counts == "missing" else {})
    assert off_small(write_raw(tmp_path / "a.tif", (page, data)), image) == 0


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("tile", [None, 64])
def test_a_piece_that_is_short_is_an_error(tmp_path: Path, compression: int, tile: int | None) -> None:
    image = stained((128, 128))
    pieces = [each.tobytes() for each in tiles(image, 64)] if tile else strips(image, 32)
    pieces = pieces if compression == 1 else [imagecodecs.zlib_encode(each) for each in pieces]
    short = pieces[1][:-6] if compression == 1 else imagecodecs.zlib_encode(imagecodecs.zlib_decode(pieces[1])[:-6])
    pieces[1] = short
    path = write_raw(tmp_path / "a.tif", (tags((128, 128), compression=compression, tile=tile, rows=32), pieces), gap=9)
    with pytest.raises(SlideError), open_slide(path, 0.5) as slide:
        slide.read_level(0, 0, 0, 128, 128)


@pytest.mark.parametrize("tile", [None, 64])
def test_a_piece_within_the_header_is_an_error(tmp_path: Path, tile: int | None) -> None:
    image = stained((128, 128))
    pieces = [each.tobytes() for each in tiles(image, 64)] if tile else strips(image, 32)
    path = write_raw(tmp_path / "a.tif", (tags((128, 128), tile=tile, rows=32), pieces))
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        page = tiff.pages[0]
        page.tags[324 if tile else 273].overwrite((0, *page.dataoffsets[1:]))
    with pytest.raises(SlideError), open_slide(path, 0.5) as slide:
        slide.read_level(0, 0, 0, 128, 128)


@pytest.mark.parametrize("round_up", [1, 4096])
def test_uncompressed_tiles_may_be_padded(tmp_path: Path, round_up: int) -> None:
    image = stained()
    page = (tags(SIZE, tile=64), [each.tobytes() for each in tiles(image, 64)])
    assert off(write_raw(tmp_path / "a.tif", page, round_up=round_up, gap=3), image) == 0


@pytest.mark.parametrize("kind", ["predictor", "fill order 2"])
def test_strips_that_need_a_decoder_get_one(tmp_path: Path, kind: str) -> None:
    image = stained((127, 200))
    if kind == "predictor":
        stored = imagecodecs.delta_encode(image, axis=1)
        page = (tags((127, 200), rows=20, t317=(3, 2)), strips(stored, 20))
    else:
        page = (tags((127, 200), rows=20, t266=(3, 2)), [imagecodecs.bitorder_encode(s) for s in strips(image, 20)])
    assert off_small(write_raw(tmp_path / "a.tif", page), image) == 0
