"""Which image of a file is the slide: not the first, not by a part of its name; and what else is there is said."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import tifffile
from PIL import Image

from histossl.core.errors import SlideError
from histossl.slides.ledger import read_ledger
from histossl.slides.reading.slide import open_slide
from histossl.tiles.store.zip_store import read_store

SIDE, MPP = 1024, 0.5
TILED: dict[str, Any] = {"photometric": "rgb", "tile": (128, 128), "compression": "deflate"}
OME = {"axes": "YXS", "PhysicalSizeX": MPP, "PhysicalSizeY": MPP}
APERIO = "Aperio Image Library v1\n{0}x{0} (128x128) Q=90|AppMag = 20|MPP = {1}"


def picture(seed: int = 0, side: int = SIDE) -> np.ndarray:
    """Stained blotches, grainy: what a shifted or another image shows."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(90, 235, (side // 32, side // 32, 3), dtype=np.uint8)
    pixels = np.array(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
    return np.clip(pixels + rng.integers(-9, 10, (side, side, 1)), 0, 255).astype(np.uint8)


def shrunk(pixels: np.ndarray, by: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((pixels.shape[1] // by,) * 2, Image.Resampling.BOX))


def per_cm(mpp: float) -> dict[str, Any]:
    return {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER", "metadata": None}


IMAGE = picture()
PYRAMID = {by: shrunk(IMAGE, by) if by > 1 else IMAGE for by in (1, 4, 8)}


# ---- pages in any order


def write_in_order(path: Path, order: tuple[int, ...], kind: str, **file: Any) -> None:
    with tifffile.TiffWriter(path, ome=kind.startswith("OME"), **file) as tiff:
        for number, by in enumerate(order):
            options = dict(TILED)
            if kind == "strips":
                options.update(tile=None, rowsperstrip=32)
            if kind == "OME":
                sizes = {"PhysicalSizeX": MPP * by, "PhysicalSizeY": MPP * by}
                options.update(metadata={"axes": "YXS", "Name": f"image {number}", **sizes})
            elif kind == "OME SubIFDs":
                sizes = {"PhysicalSizeX": MPP * by, "PhysicalSizeY": MPP * by}
                options.update(subifds=2, metadata={"axes": "YXS", **sizes}) if not number else None
            else:
                options.update(per_cm(MPP * by))
            if kind == "Aperio":
                options.update(description=APERIO.format(SIDE // by, MPP * by))
            if kind == "flags":
                options.update(subfiletype=int(by > 1))
            if kind == "wrong flags":
                options.update(subfiletype=int(number > 0))
            tiff.write(PYRAMID[by], **options)


@pytest.mark.parametrize("order", [*permutations((1, 4, 8)), (4, 1)])
@pytest.mark.parametrize("kind", ["no flags", "flags", "wrong flags", "strips", "Aperio", "OME", "OME SubIFDs"])
def test_pixels_size_and_scale_are_of_the_largest_page_wherever_it_stands(
    tmp_path: Path, kind: str, order: tuple[int, ...]
) -> None:
    for name, file in (("little.tif", {}), ("big.tif", {"bigtiff": True, "byteorder": ">"})):
        if kind == "OME SubIFDs" and len(order) != 3:
            return
        write_in_order(tmp_path / name, order, kind, **file)
        with open_slide(tmp_path / name) as slide:
            assert slide.level_sizes == tuple((SIDE // by,) * 2 for by in sorted(order))
            assert slide.level_downsamples == tuple(float(by) for by in sorted(order))
            assert slide.mpp_l0 == pytest.approx(MPP)
            for level, by in enumerate(sorted(order)):
                np.testing.assert_array_equal(slide.read_level(level, 5, 7, 100, 90), PYRAMID[by][7:97, 5:105])
            assert slide.warnings == []


def test_a_scale_told_of_the_overview_alone_is_not_the_slides(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "A1.tif") as tiff:
        tiff.write(PYRAMID[4], **TILED, **per_cm(MPP))
        tiff.write(IMAGE, **TILED, metadata=None)
    with pytest.raises(SlideError, match="no microns-per-pixel"):
        open_slide(tmp_path / "A1.tif")


# ---- names


def write_ome(path: Path, **images: np.ndarray) -> Path:
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for name, pixels in images.items():
            tiff.write(pixels, **TILED, metadata={**OME, "Name": name})
    return path


SMALL = picture(7, 512)
SLIDES = ["unlabelled_12.svs", "CD68 macrophages", "overviews of 3", "barcoded", "relabel", "macro 12", "thumbnails"]


@pytest.mark.parametrize("name", [*SLIDES, "Overview", "thumbnail"])
def test_a_slide_is_a_slide_whatever_its_name_contains(tmp_path: Path, name: str) -> None:
    for number, images in enumerate([{name: IMAGE}, {name: IMAGE, "detail": SMALL}, {"detail": SMALL, name: IMAGE}]):
        with open_slide(write_ome(tmp_path / f"{number}.ome.tif", **images)) as slide:
            assert (slide.size_l0, slide.mpp_l0) == ((SIDE, SIDE), MPP)
            np.testing.assert_array_equal(slide.read_level(0, 9, 9, 200, 200), IMAGE[9:209, 9:209])
            said = " ".join(slide.warnings)
            assert ("'detail' 512 x 512 px" in said) == ("detail" in images), "what is not used is said"


@pytest.mark.parametrize("name", ["label", "Macro", "label image", "macro image", "Label_Image", "thumbnail image"])
def test_label_macro_and_thumbnail_beside_the_slide_are_no_matter(tmp_path: Path, name: str) -> None:
    for number, images in enumerate([{name: SMALL, "slide": IMAGE}, {"slide": IMAGE, name: SMALL}]):
        with open_slide(write_ome(tmp_path / f"{number}.ome.tif", **images)) as slide:
            assert slide.size_l0 == (SIDE, SIDE)
            assert slide.warnings == []


def test_a_label_is_never_the_slide_even_if_it_is_the_largest_or_all_there_is(tmp_path: Path) -> None:
    with open_slide(write_ome(tmp_path / "larger.ome.tif", **{"macro image": IMAGE, "slide": SMALL})) as slide:
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, 512, 512), SMALL)
        assert any("'macro image' 1024 x 1024 px" in warning for warning in slide.warnings)
    write_ome(tmp_path / "A1.ome.tif", **{"label image": SMALL, "macro image": IMAGE})
    with pytest.raises(SlideError, match=r"no slide, only label or macro images \('label image' 512 x 512 px"):
        open_slide(tmp_path / "A1.ome.tif")


@pytest.mark.parametrize(
    "description", ["Aperio Image Library v11.2.1 \r\nlabel 1024x1024", "Aperio v1\nmacro 1024x1024", "Label", "Macro"]
)
def test_a_page_that_its_format_calls_a_label_is_never_read(tmp_path: Path, description: str) -> None:
    """Larger than the slide, and in tiles: only what the page says makes the difference."""
    with tifffile.TiffWriter(tmp_path / "A1.tif") as tiff:
        tiff.write(SMALL, **TILED, **per_cm(MPP))
        tiff.write(IMAGE, **TILED, description=description, **per_cm(MPP))
    with open_slide(tmp_path / "A1.tif") as slide:
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, 512, 512), SMALL)


def test_a_page_whose_description_mentions_a_label_is_read(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "A1.tif", IMAGE, **TILED, description="Aperio\nstained, label 12|MPP = 0.5", **per_cm(MPP)
    )
    with open_slide(tmp_path / "A1.tif") as slide:
        assert slide.size_l0 == (SIDE, SIDE)


def test_a_large_picture_in_strips_is_not_the_slide_in_tiles(tmp_path: Path) -> None:
    """A camera's picture of the whole glass may have more pixels than a small region."""
    with tifffile.TiffWriter(tmp_path / "A1.tif") as tiff:
        tiff.write(SMALL, **TILED, **per_cm(MPP))
        tiff.write(IMAGE[:400], photometric="rgb", rowsperstrip=16, **per_cm(8))
    with open_slide(tmp_path / "A1.tif") as slide:
        assert (slide.size_l0, slide.mpp_l0) == ((512, 512), pytest.approx(MPP))
        assert any("1024 x 400 px" in warning for warning in slide.warnings)


def test_scenes_of_equal_size_have_their_own_scale(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "A1.ome.tif", ome=True) as tiff:
        for number, mpp in enumerate((0.25, 1.0)):
            told = {"axes": "YXS", "Name": f"scene {number}", "PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
            tiff.write(picture(number), **TILED, metadata=told)
    with open_slide(tmp_path / "A1.ome.tif") as slide:
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, 300, 300), picture(0)[:300, :300])
        assert slide.mpp_l0 == 0.25
        assert slide.warnings == ["of its images 'scene 0' 1024 x 1024 px is used, not 'scene 1' 1024 x 1024 px"]


def test_levels_of_another_scene_are_not_the_slides(tmp_path: Path) -> None:
    other = picture(5, 512)
    with tifffile.TiffWriter(tmp_path / "A1.ome.tif", ome=True) as tiff:
        for name, pixels in (("scene 1", other), ("scene 2", IMAGE)):
            tiff.write(pixels, **TILED, subifds=1, metadata={**OME, "Name": name})
            tiff.write(shrunk(pixels, 2), **TILED, subfiletype=1)
    with open_slide(tmp_path / "A1.ome.tif") as slide:
        assert slide.level_sizes == ((SIDE, SIDE), (SIDE // 2, SIDE // 2))
        np.testing.assert_array_equal(slide.read_level(1, 0, 0, 512, 512), shrunk(IMAGE, 2))
        assert slide.warnings == ["of its images 'scene 2' 1024 x 1024 px is used, not 'scene 1' 512 x 512 px"]


# ---- stacks

STACK = np.stack([picture(seed, 512) for seed in range(3)])
IMAGEJ: dict[str, Any] = {"imagej": True, "photometric": "rgb", "resolution": (2, 2)}


def stacked(axes: str) -> dict[str, Any]:
    return {"metadata": {**OME, "axes": axes}}


STACKS: dict[str, tuple[np.ndarray, dict[str, Any], str]] = {
    "z.ome.tif": (STACK, {**TILED, **stacked("ZYXS")}, "z-stack of 3 planes: plane 1 is used"),
    "strips.ome.tif": (STACK, {"photometric": "rgb", **stacked("ZYXS")}, "z-stack of 3 planes"),
    "t.ome.tif": (STACK, {**TILED, **stacked("TYXS")}, "time series of 3"),
    "c.ome.tif": (STACK, {**TILED, **stacked("CYXS")}, "3 channels: channel 1 is used"),
    "tz.ome.tif": (np.stack([STACK, STACK[::-1]]), {**TILED, **stacked("TZYXS")}, "z-stack of 3 planes"),
    "zc.ome.tif": (np.moveaxis(STACK, 3, 1), {"photometric": "minisblack", **stacked("ZCYX")}, "z-stack of 3 planes"),
    "cz.ome.tif": (np.moveaxis(STACK, 3, 0), {"photometric": "minisblack", **stacked("CZYX")}, "z-stack of 3 planes"),
    "planar.ome.tif": (
        np.moveaxis(STACK, 3, 1),
        {**TILED, "planarconfig": "separate", **stacked("ZSYX")},
        "z-stack of 3 planes",
    ),
    "imagej.tif": (STACK, {**IMAGEJ, "metadata": {"axes": "ZYXS", "unit": "um"}}, "z-stack of 3 planes"),
    "time.tif": (STACK, {**IMAGEJ, "metadata": {"axes": "TYXS", "unit": "micron"}}, "time series of 3"),
    "pages.tif": (STACK, {**TILED, **per_cm(MPP)}, "stack of 3 images: image 1 is used"),
    "strips.tif": (STACK, {"photometric": "rgb", **per_cm(MPP)}, "stack of 3 images: image 1 is used"),
    "shaped.tif": (STACK, {**TILED, **per_cm(MPP), "metadata": {"axes": "ZYXS"}}, "z-stack of 3 planes"),
    "big.tif": (STACK, {**TILED, **per_cm(MPP), "bigtiff": True, "byteorder": ">"}, "stack of 3 images"),
}


@pytest.mark.parametrize("name", STACKS)
def test_of_a_stack_the_first_plane_is_used_with_its_scale_and_the_others_are_said(tmp_path: Path, name: str) -> None:
    pixels, options, said = STACKS[name]
    tifffile.imwrite(tmp_path / name, pixels, **options)
    with open_slide(tmp_path / name) as slide:
        assert (slide.size_l0, slide.mpp_l0) == ((512, 512), pytest.approx(MPP))
        np.testing.assert_array_equal(slide.read_level(0, 3, 4, 300, 200), STACK[0][4:204, 3:303])
        assert said in " ".join(slide.warnings)
        assert "belong to nothing" not in " ".join(slide.warnings), "they are the other planes"


@pytest.mark.parametrize("kind", ["page", "OME"])
def test_what_the_file_tells_of_is_not_taken_for_bytes_put_in(tmp_path: Path, kind: str) -> None:
    """Another image, or a description, behind the last pixels of an uncompressed slide."""
    path = tmp_path / ("A1.ome.tif" if kind == "OME" else "A1.tif")
    with tifffile.TiffWriter(path, ome=kind == "OME") as tiff:
        options = {"photometric": "rgb", "tile": (128, 128)}
        tiff.write(IMAGE, **options, **({"metadata": OME} if kind == "OME" else per_cm(MPP)))
        if kind == "page":
            tiff.write(picture(1, 256), **options, **per_cm(4 * MPP))
    with open_slide(path) as slide:
        assert slide.level_sizes == ((SIDE, SIDE),)
        assert "belong to nothing" not in " ".join(slide.warnings)


# ---- grey channels that may be colours


def write_channels(path: Path, names: list[str] | None) -> None:
    told = {"Channel": {"Name": names}} if names else {}
    places = [
        "rgb".index(name[0].lower()) if name[0].lower() in "rgb" else at for at, name in enumerate(names or "rgb")
    ]
    channels = np.stack([IMAGE[..., place] for place in places])
    tifffile.imwrite(path, channels, photometric="minisblack", tile=(128, 128), metadata={**OME, "axes": "CYX", **told})


@pytest.mark.parametrize(
    "names", [["Red", "Green", "Blue"], ["Blue", "Green", "Red"], ["g", "b", "r"], None, ["0"] * 3]
)
def test_channels_are_the_colours_that_they_are_called(tmp_path: Path, names: list[str] | None) -> None:
    write_channels(tmp_path / "A1.ome.tif", names)
    with open_slide(tmp_path / "A1.ome.tif") as slide:
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, SIDE, SIDE), IMAGE)
        unnamed = names is None or names[0] == "0"
        assert ("three grey channels have no names" in " ".join(slide.warnings)) == unnamed


@pytest.mark.parametrize(
    "names", [["DAPI", "FITC", "Cy3"], ["Hematoxylin", "Eosin", "Residual"], ["Red", "Green", "Cy5"]]
)
def test_channels_called_otherwise_are_no_colours(tmp_path: Path, names: list[str]) -> None:
    write_channels(tmp_path / "A1.ome.tif", names)
    with pytest.raises(SlideError, match=f"channels are '{names[0]}'.*RGB or grey brightfield"):
        open_slide(tmp_path / "A1.ome.tif", MPP)


def test_levels_of_a_stack_are_of_the_plane_that_is_used(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "A1.ome.tif", ome=True) as tiff:
        tiff.write(STACK, **TILED, subifds=1, metadata={**OME, "axes": "ZYXS"})
        for plane in STACK:
            tiff.write(shrunk(plane, 2), **TILED, subfiletype=1)
    with open_slide(tmp_path / "A1.ome.tif") as slide:
        np.testing.assert_array_equal(slide.read_level(1, 0, 0, 256, 256), shrunk(STACK[0], 2))


@pytest.mark.parametrize("thumbnail", [True, False])
def test_focal_planes_of_aperio_are_said(tmp_path: Path, thumbnail: bool) -> None:
    """Without the thumbnail that tifffile expects second, too. Of each level there is a plane as well."""
    planes = [IMAGE, np.roll(IMAGE, 1, axis=0)]
    with tifffile.TiffWriter(tmp_path / "A1.svs") as tiff:
        for number, pixels in enumerate([*planes, *(shrunk(plane, 4) for plane in planes)]):
            tiff.write(pixels, **TILED, metadata=None, description=APERIO.format(pixels.shape[1], MPP))
            if thumbnail and number == 0:
                told = APERIO.format(128, MPP)
                tiff.write(shrunk(IMAGE, 8), photometric="rgb", rowsperstrip=16, metadata=None, description=told)
    with open_slide(tmp_path / "A1.svs") as slide:
        assert slide.level_sizes == ((SIDE, SIDE), (SIDE // 4, SIDE // 4))
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, 200, 200), IMAGE[:200, :200])
        (said,) = slide.warnings
        assert ("plane 1 is used" if thumbnail else "1024 x 1024 px is used, not 1024 x 1024 px") in said


@pytest.mark.parametrize(
    ("pixels", "options", "said"),
    [
        (np.stack([STACK[0][..., 0]] * 5), {"metadata": {**OME, "axes": "CYX"}}, "5 channels"),
        (STACK[..., 0], per_cm(MPP), "stack of 3 images; export one plane as RGB"),
    ],
)
def test_grey_channels_keep_their_own_refusal(
    tmp_path: Path, pixels: np.ndarray, options: dict[str, Any], said: str, cli: Any
) -> None:
    """In tiles too, where OpenSlide would show the first page: with --slide-mpp as without."""
    suffix = ".ome.tif" if "axes" in (options.get("metadata") or {}) else ".tif"
    (tmp_path / "slides").mkdir()
    path = tmp_path / "slides" / f"A1{suffix}"
    tifffile.imwrite(path, pixels, photometric="minisblack", tile=(128, 128), **options)
    for mpp in (None, MPP):
        with pytest.raises(SlideError, match=said):
            open_slide(path, mpp)
    cli("scan", tmp_path / "slides", "-w", tmp_path / "ws", "--slide-mpp", "0.5", "--workers", "1")
    (row,) = read_ledger(tmp_path / "ws" / "archive.csv")
    assert row.status == "unreadable"
    assert said in row.reason


def test_planes_in_another_file_are_not_looked_for_in_this_one(tmp_path: Path) -> None:
    """OME-TIFF may place its planes in several files: their offsets mean nothing here."""
    for name, pixels in (("A1", STACK[0]), ("A2", STACK[1])):
        tifffile.imwrite(tmp_path / f"{name}.ome.tif", pixels, **TILED, metadata=OME)
    with tifffile.TiffFile(tmp_path / "A2.ome.tif") as tiff:
        own = tiff.ome_metadata
    uuid = own.split('UUID="')[1].split('"')[0]
    with tifffile.TiffFile(tmp_path / "A1.ome.tif", mode="r+b") as tiff:
        place = f'<UUID FileName="A2.ome.tif">{uuid}</UUID></TiffData>'
        text = tiff.ome_metadata.split("<TiffData")[0] + '<TiffData IFD="0" PlaneCount="1">' + place
        tiff.pages[0].tags[270].overwrite(text + "</Pixels></Image></OME>")
    with pytest.raises(SlideError, match=r"pixels lie in A2\.ome\.tif"):
        open_slide(tmp_path / "A1.ome.tif")


def test_tiles_are_of_the_plane_and_page_that_their_row_names(tmp_path: Path, cli: Any) -> None:
    (tmp_path / "slides").mkdir()
    tifffile.imwrite(tmp_path / "slides" / "stack.ome.tif", STACK, **TILED, **stacked("ZYXS"))
    with tifffile.TiffWriter(tmp_path / "slides" / "order.tif") as tiff:
        tiff.write(shrunk(STACK[0], 4), **TILED, **per_cm(4 * MPP))
        tiff.write(STACK[0], **TILED, **per_cm(MPP))
    everything = ("--min-tissue", "0", "--min-sharpness", "0", "--min-saturation", "0", "--no-reject-pen")
    common = ("-w", tmp_path / "ws", "--tile-px", "128", "--mpp", "0.5", "--workers", "1")
    assert cli("scan", tmp_path / "slides", *common).code == 0
    assert cli("tile", tmp_path / "slides", *common, *everything).code == 0
    rows = {row.file: row for row in read_ledger(tmp_path / "ws" / "archive.csv")}
    assert "plane 1 is used" in rows["stack.ome.tif"].reason
    assert rows["order.tif"].status == "ok"
    for row in rows.values():
        zip_path = tmp_path / "ws" / "tiles" / f"{row.slide}.zip"
        content, table = zip_path.read_bytes(), read_store(zip_path).table
        assert len(table) == 16
        for tile in table:
            pixels = simplejpeg.decode_jpeg(content[tile["offset"] : tile["offset"] + tile["length"]]).astype(int)
            x, y = int(tile["x_l0"]), int(tile["y_l0"])
            assert np.abs(pixels - STACK[0][y : y + 128, x : x + 128]).mean() < 8
