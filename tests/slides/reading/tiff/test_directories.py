"""Directories of a TIFF that go round in a circle: one line at once, in every layout, before a library hangs."""

import struct

import numpy as np
import pytest
import tifffile

from histossl.core.errors import SlideError
from histossl.slides.reading.slide import open_slide
from histossl.slides.reading.tiff import directories
from histossl.slides.reading.tiff.directories import directory_damage

PIXELS = np.full((64, 64, 3), 200, np.uint8)


def written(path, bigtiff, byteorder, pages=3, sub=0):
    with tifffile.TiffWriter(path, bigtiff=bigtiff, byteorder=byteorder) as tiff:
        for number in range(pages):
            tiff.write(PIXELS, photometric="rgb", tile=(32, 32), metadata=None, subifds=sub if not number else 0)
            for _ in range(sub if not number else 0):
                tiff.write(PIXELS[::2, ::2], photometric="rgb", tile=(32, 32), metadata=None, subfiletype=1)
    return path


def places(path):
    """Of each directory (main ones, then those below the first): where it lies, and where its link to the next lies."""
    found = []
    with tifffile.TiffFile(path) as tiff:
        links = (8, "Q", 8) if tiff.is_bigtiff else (2, "H", 4)
        tag = 20 if tiff.is_bigtiff else 12
        data = path.read_bytes()
        for page in [*tiff.pages, *(tiff.pages[0].pages or ())]:
            (count,) = struct.unpack_from(tiff.byteorder + links[1], data, page.offset)
            found.append((page.offset, page.offset + links[0] + count * tag))
        return found, tiff.byteorder + ("Q" if tiff.is_bigtiff else "I")


def link(path, at, to, code):
    with path.open("r+b") as file:
        file.seek(at)
        file.write(struct.pack(code, to))


LAYOUTS = pytest.mark.parametrize(("bigtiff", "byteorder"), [(False, "<"), (False, ">"), (True, "<"), (True, ">")])


@LAYOUTS
@pytest.mark.parametrize(("behind", "back_to"), [(2, 0), (2, 1), (0, 0), (2, 2)])
def test_a_circle_of_directories_is_refused_in_one_line(tmp_path, bigtiff, byteorder, behind, back_to):
    path = written(tmp_path / "A1.tif", bigtiff, byteorder)
    found, code = places(path)
    assert directory_damage(path) == ""
    link(path, found[behind][1], found[back_to][0], code)
    with pytest.raises(SlideError, match=r"A1.tif: damaged.*circle"):
        open_slide(path, 0.5)


@LAYOUTS
@pytest.mark.parametrize(("behind", "back_to"), [(4, 3), (3, 3), (4, 0), (3, 0)])
def test_a_circle_of_sub_directories_is_refused_too(tmp_path, bigtiff, byteorder, behind, back_to):
    """Main ones are 0 to 2, and 3 and 4 lie below the first."""
    path = written(tmp_path / "A1.tif", bigtiff, byteorder, sub=2)
    found, code = places(path)
    assert len(found) == 5
    assert directory_damage(path) == ""
    link(path, found[behind][1], found[back_to][0], code)
    assert "circle" in directory_damage(path)


def test_a_directory_that_two_lead_to_is_no_circle(tmp_path):
    path = written(tmp_path / "A1.tif", False, "<", sub=2)
    found, code = places(path)
    link(path, found[3][1], found[4][0], code)
    assert directory_damage(path) == ""


def test_a_chain_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(directories, "MAX_DIRECTORIES", 5)
    assert directory_damage(written(tmp_path / "A1.tif", False, "<", pages=5)) == ""
    assert "more than 5 directories" in directory_damage(written(tmp_path / "A1.tif", False, "<", pages=6))


@pytest.mark.parametrize(
    "content", [b"", b"II*\0", b"II*\0" + bytes(4), b"MM\0*\xff\xff\xff\xff" + bytes(20), b"x" * 40]
)
def test_what_is_no_tiff_or_points_nowhere_is_left_to_the_libraries(tmp_path, content):
    path = tmp_path / "A1.tif"
    path.write_bytes(content)
    assert directory_damage(path) == ""


@pytest.mark.data
def test_real_slides_go_round_in_no_circle(real_data):
    for path in [*real_data.glob("slides/*.*"), *real_data.glob("damaged/*.*"), *real_data.glob("colon/slides/*.tif")]:
        assert directory_damage(path) == "", path
