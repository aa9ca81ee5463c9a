"""A level is believed only if it looks like level 0: a macro picture in its place is never tiled; its row says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import tifffile
import vendor_files
from PIL import Image
from scipy import ndimage

from histossl.demo.paint import paint_slide
from histossl.demo.pyramid import halved
from histossl.slides.ledger import read_ledger
from histossl.slides.reading import levels
from histossl.slides.reading.slide import open_slide
from histossl.tiles.store.zip_store import read_store

WIDTH, HEIGHT, MPP = 2048, 1024, 0.5
GLASS = 244
APERIO = "Aperio Image Library v1\n{}x{{}} (256x256) Q=90|AppMag = 20|MPP = 0.5"


def painted(folder: Path, seed: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    path = folder / f"{seed}.tif"
    paint_slide(path, width_px=width, height_px=height, mpp=MPP, seed=seed, compression="deflate", pyramid=False)
    with open_slide(path) as slide:
        return slide.read_level(0, 0, 0, width, height)


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Tissue in the left half, glass in the right."""
    pixels = np.full((HEIGHT, WIDTH, 3), GLASS, np.uint8)
    pixels[:, : WIDTH // 2] = painted(tmp_path_factory.mktemp("tissue"), 3, WIDTH // 2)
    return pixels


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Another slide's tissue, a quarter of the size."""
    return painted(tmp_path_factory.mktemp("other"), 4, WIDTH // 4, HEIGHT // 4)


def shrunk(pixels: np.ndarray, by: int, how: Any = Image.Resampling.BOX) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((pixels.shape[1] // by, pixels.shape[0] // by), how))


def write(path: Path, *pages: np.ndarray, layout: str = "flag", **more: Any) -> Path:
    """A pyramid as generic TIFF (levels flagged as reduced, or not), as SubIFDs, as OME-TIFF, as Aperio's."""
    options: dict[str, Any] = {"photometric": "rgb", "tile": (256, 256), "compression": "deflate", **more}
    order = {name: options.pop(name) for name in ("bigtiff", "byteorder") if name in options}
    subifds = len(pages) - 1 if layout in ("subifd", "ome") else None
    with tifffile.TiffWriter(path, ome=layout == "ome", **order) as tiff:
        for number, pixels in enumerate(pages):
            width, height = pixels.shape[1::-1]
            per_cm = 1e4 / MPP * width / pages[0].shape[1]
            told: dict[str, Any] = {"metadata": None, "resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"}
            if layout == "ome":
                told = {"metadata": {"axes": "YXS", "PhysicalSizeX": MPP, "PhysicalSizeY": MPP} if not number else None}
            if layout == "aperio":
                told["description"] = APERIO.format(width).format(height)
            first = {"subifds": subifds} if not number else {"subfiletype": 0 if layout == "no flag" else 1}
            tiff.write(pixels, **options, **told, **first)
    return path


LAYOUTS = ["flag", "no flag", "subifd", "ome", "aperio"]


def macro(other: np.ndarray, kind: str) -> np.ndarray:
    if kind == "tissue elsewhere":
        pixels = np.full_like(other, GLASS)
        pixels[:, other.shape[1] // 2 :] = other[:, other.shape[1] // 2 :]
        return pixels
    blank = {"nearly white": GLASS, "white": 255, "black": 0}
    return np.full_like(other, blank[kind]) if kind in blank else other


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["another slide", "tissue elsewhere", "nearly white", "white", "black"])
def test_a_picture_of_something_else_is_no_level(
    tmp_path: Path, tissue: np.ndarray, other: np.ndarray, layout: str, kind: str
) -> None:
    with open_slide(write(tmp_path / "A1.tif", tissue, macro(other, kind), layout=layout)) as slide:
        assert slide.level_sizes == ((WIDTH, HEIGHT),)
        assert slide.level_downsamples == (1.0,)
        assert any("512 x 256 px" in warning for warning in slide.warnings)
        assert len(slide.native or (None,)) == 1
        truth = shrunk(tissue, 4)
        assert np.abs(slide.thumbnail(WIDTH // 4).astype(int) - truth).mean() < 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_level_of_other_colours_is_no_level(tmp_path: Path, tissue: np.ndarray, layout: str) -> None:
    """Red and blue exchanged: the same structures, and of eosin no colour is off by much."""
    swapped = np.ascontiguousarray(shrunk(tissue, 4)[..., ::-1])
    with open_slide(write(tmp_path / "A1.tif", tissue, shrunk(tissue, 2), swapped, layout=layout)) as slide:
        assert slide.level_sizes == ((WIDTH, HEIGHT), (WIDTH // 2, HEIGHT // 2))
        assert any("512 x 256 px" in warning for warning in slide.warnings)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_picture_between_true_levels_is_left_out(
    tmp_path: Path, tissue: np.ndarray, other: np.ndarray, layout: str
) -> None:
    """Of the same size as a true level, too: the copied tiles are the true one's."""
    half, quarter, eighth = shrunk(tissue, 2), shrunk(tissue, 4), shrunk(tissue, 8)
    path = write(tmp_path / "A1.tif", tissue, half, other, quarter, eighth, layout=layout)
    with open_slide(path) as slide:
        assert slide.level_sizes == tuple((WIDTH // by, HEIGHT // by) for by in (1, 2, 4, 8))
        assert slide.level_downsamples == (1.0, 2.0, 4.0, 8.0)
        for level, truth in enumerate((tissue, half, quarter, eighth)):
            np.testing.assert_array_equal(slide.read_level(level, 0, 0, *slide.level_sizes[level]), truth)
        assert any("512 x 256 px" in warning for warning in slide.warnings)


def test_copied_tiles_are_of_the_level_that_is_believed(tmp_path: Path, tissue: np.ndarray, other: np.ndarray) -> None:
    """Two pages of one size and scale, the wrong one first or last."""
    quarter = shrunk(tissue, 4)
    for number, pages in enumerate([(other, quarter), (quarter, other)]):
        path = write(tmp_path / f"{number}.tif", tissue, *pages, compression="jpeg", compressionargs={"level": 95})
        with open_slide(path) as slide:
            assert slide.native is not None
            level = slide.native[1]
            assert level is not None
            with tifffile.TiffFile(path) as tiff:
                right = tiff.pages[2 if number == 0 else 1]
                assert level.offsets == right.dataoffsets


@pytest.mark.parametrize(
    ("width", "height"), [(512, 512), (512, 240), (1900, 1024)], ids=["square", "another shape", "nearly as large"]
)
def test_an_image_of_another_shape_is_never_decoded(
    tmp_path: Path, tissue: np.ndarray, width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from histossl.slides.reading.tifffile_backend import TiffLevels

    decoded: list[int] = []
    decode = TiffLevels._decoded
    monkeypatch.setattr(
        TiffLevels, "_decoded", lambda self, page, index: (decoded.append(page.index), decode(self, page, index))[1]
    )
    pixels = np.asarray(Image.fromarray(tissue).resize((width, height)))
    with open_slide(write(tmp_path / "A1.tif", tissue, pixels)) as slide:
        slide.thumbnail(300)
        assert slide.level_sizes == ((WIDTH, HEIGHT),)
        assert any(f"{width} x {height} px" in warning for warning in slide.warnings)
    assert set(decoded) <= {0}


def sharpened(pixels: np.ndarray) -> np.ndarray:
    small = shrunk(pixels, 4).astype(float)
    return np.clip(2 * small - ndimage.gaussian_filter(small, (2, 2, 0)), 0, 255).astype(np.uint8)


def without_a_tile(pixels: np.ndarray) -> np.ndarray:
    small = shrunk(pixels, 4).copy()
    small[:, :96] = 255
    return small


MADE = {
    "averaged": lambda pixels: shrunk(pixels, 4),
    "pixels left out": lambda pixels: pixels[::4, ::4],
    "other pixels left out": lambda pixels: pixels[2::4, 2::4],
    "Lanczos": lambda pixels: shrunk(pixels, 4, Image.Resampling.LANCZOS),
    "sharpened": sharpened,
    "blurred": lambda pixels: ndimage.gaussian_filter(shrunk(pixels, 4), (2, 2, 0)),
    "a darker lamp": lambda pixels: (shrunk(pixels, 4) * 0.9).astype(np.uint8),
    "missing tiles": without_a_tile,
    "far smaller": lambda pixels: shrunk(pixels, 32),
}


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("layout", ["flag", "ome"])
def test_a_level_is_believed_however_it_was_made(tmp_path: Path, tissue: np.ndarray, made: str, layout: str) -> None:
    small = np.ascontiguousarray(MADE[made](tissue))
    with open_slide(write(tmp_path / "A1.tif", tissue, small, layout=layout)) as slide:
        assert slide.level_sizes == ((WIDTH, HEIGHT), (small.shape[1], small.shape[0]))
        assert slide.warnings == []


@pytest.mark.parametrize("size", [(2047, 1023), (2041, 1019), (1999, 33)])
def test_rounded_sides_are_no_reason_to_doubt(tmp_path: Path, tissue: np.ndarray, size: tuple[int, int]) -> None:
    """Each level half of the one before, rounded down or up: jpeg makes them noisy besides."""
    for up in (0, 1):
        pages = [tissue[: size[1], : size[0]]]
        while max(pages[-1].shape[:2]) > 100:
            width, height = ((side + up) // 2 for side in pages[-1].shape[1::-1])
            pages.append(np.asarray(Image.fromarray(pages[-1]).resize((width, max(1, height)), Image.Resampling.BOX)))
        path = write(tmp_path / f"{up}.tif", *pages, compression="jpeg", compressionargs={"level": 70})
        with open_slide(path) as slide:
            assert slide.level_sizes == tuple(page.shape[1::-1] for page in pages)
            assert slide.warnings == []


def test_blank_levels_of_a_blank_slide_are_levels(tmp_path: Path) -> None:
    blank = np.full((HEIGHT, WIDTH, 3), GLASS, np.uint8)
    with open_slide(write(tmp_path / "A1.tif", blank, shrunk(blank, 4))) as slide:
        assert slide.level_sizes == ((WIDTH, HEIGHT), (WIDTH // 4, HEIGHT // 4))
        assert slide.warnings == []


def test_a_blank_picture_is_no_level_of_a_slide_with_a_speck_of_tissue(tmp_path: Path, tissue: np.ndarray) -> None:
    """The speck takes the most bytes: there the two are compared."""
    speck = np.full((HEIGHT, WIDTH, 3), GLASS, np.uint8)
    speck[560:640, 900:1000] = tissue[560:640, 500:600]
    with open_slide(write(tmp_path / "A1.tif", speck, np.full((256, 512, 3), GLASS, np.uint8))) as slide:
        assert slide.level_sizes == ((WIDTH, HEIGHT),)


def test_damage_in_either_level_is_no_reason_to_leave_one_out(tmp_path: Path, tissue: np.ndarray) -> None:
    for damaged in (0, 1):
        path = write(tmp_path / f"{damaged}.tif", tissue, shrunk(tissue, 2), compression="jpeg")
        content = bytearray(path.read_bytes())
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[damaged]
            for offset, count in list(zip(page.dataoffsets, page.databytecounts, strict=True))[::3]:
                content[offset : offset + count] = bytes(count)
        path.write_bytes(content)
        with open_slide(path) as slide:
            assert slide.level_sizes == ((WIDTH, HEIGHT), (WIDTH // 2, HEIGHT // 2))
            whole = slide.read_level(1 - damaged, 0, 0, 64, 64)  # the library's handle still reads
            assert np.abs(whole - (tissue, shrunk(tissue, 2))[1 - damaged][:64, :64].astype(int)).mean() < 8


@pytest.mark.parametrize("vendor", vendor_files.WRITERS)
@pytest.mark.parametrize("true", [True, False])
def test_levels_of_every_vendor_are_compared(
    tmp_path: Path, tissue: np.ndarray, other: np.ndarray, vendor: str, true: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = tissue[:512, :1024]
    monkeypatch.setattr(vendor_files, "halved", halved if true else lambda pixels: other)
    name, writer = vendor_files.WRITERS[vendor]
    writer(tmp_path / name, pixels, MPP)
    with open_slide(tmp_path / name) as slide:
        assert (len(slide.level_sizes) > 1) == true
        assert len(slide.level_downsamples) == len(slide.level_sizes)
        assert bool(slide.warnings) != true
        assert slide.native is None or len(slide.native) == len(slide.level_sizes)


def test_scan_and_tile_make_the_tiles_of_the_slide_and_none_of_the_macro(
    tmp_path: Path, tissue: np.ndarray, other: np.ndarray, cli: Any
) -> None:
    (tmp_path / "slides").mkdir()
    for name, layout in (("A1.tif", "flag"), ("A2.ome.tif", "ome"), ("A3.svs", "aperio")):
        write(tmp_path / "slides" / name, tissue, macro(other, "tissue elsewhere"), layout=layout)
    options = (tmp_path / "slides", "-w", tmp_path / "ws", "--mpp", "2", "--tile-px", "64", "--workers", "1")
    assert cli("scan", *options).code == 0
    assert cli("tile", *options).code == 0
    truth = shrunk(tissue, 4).astype(int)
    for row in read_ledger(tmp_path / "ws" / "archive.csv"):
        assert (row.status, row.levels) == ("warning", f"{WIDTH}x{HEIGHT}")
        assert "512 x 256 px" in row.reason
        assert row.expected_tiles
        assert row.num_tiles == row.expected_tiles
        zip_path = tmp_path / "ws" / "tiles" / f"{row.slide}.zip"
        content = zip_path.read_bytes()
        for tile in read_store(zip_path).table:
            pixels = simplejpeg.decode_jpeg(content[tile["offset"] : tile["offset"] + tile["length"]]).astype(int)
            x, y = int(tile["x_l0"]) // 4, int(tile["y_l0"]) // 4
            assert np.abs(pixels - truth[y : y + 64, x : x + 64]).mean() < 6


def test_a_file_is_compared_once_and_again_when_it_changed(
    tmp_path: Path, tissue: np.ndarray, other: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    shows = levels._shows
    monkeypatch.setattr(levels, "_shows", lambda *args: (compared.append(1), shows(*args))[1])
    path = write(tmp_path / "A1.tif", tissue, shrunk(tissue, 4))
    for _ in range(3):
        open_slide(path).close()
    assert len(compared) == 1
    write(path, tissue, other)
    with open_slide(path) as slide:
        assert len(slide.level_sizes) == 1
    assert len(compared) == 2
