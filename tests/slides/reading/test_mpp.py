"""Microns per pixel: read from where they are said, disbelieved when impossible, supplied by a CSV."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from histossl.core.errors import UsageError
from histossl.slides.reading.mpp import Scale, read_mpp_csv, scale_from, scale_from_ome, scale_from_resolution


@pytest.mark.parametrize(
    ("x", "unit", "mpp"), [((20000, 1), 3, 0.5), ((40000, 1), 3, 0.25), ((50800, 1), 2, 0.5), (100000.0, 2, 0.254)]
)
def test_resolution_tags_become_microns(x: object, unit: int, mpp: float) -> None:
    scale = scale_from_resolution(x, x, unit)
    assert scale is not None
    assert scale.mpp == pytest.approx(mpp)


@pytest.mark.parametrize(("x", "unit"), [((1, 1), 2), ((0, 0), 2), ((20000, 1), 1), ((5, 0), 3), ("much", 3)])
def test_resolution_tags_that_say_nothing(x: object, unit: int) -> None:
    assert scale_from_resolution(x, x, unit) is None


@pytest.mark.parametrize(("value", "unit", "mpp"), [("0.5", "µm", 0.5), ("250", "nm", 0.25), ("0.0005", "mm", 0.5)])
def test_ome_units(value: str, unit: str, mpp: float) -> None:
    pixels = f'PhysicalSizeX="{value}" PhysicalSizeXUnit="{unit}" PhysicalSizeY="{value}" PhysicalSizeYUnit="{unit}"'
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image><Pixels SizeX="9" SizeY="9" '
        f'PhysicalSizeX="7" PhysicalSizeY="7"/></Image><Image><Pixels SizeX="700" SizeY="500" {pixels}/></Image></OME>'
    )
    scale = scale_from_ome(xml, 700, 500)
    assert scale is not None
    assert scale.mpp == pytest.approx(mpp)


@pytest.mark.parametrize("xml", ["", "<OME", "<OME><Image/></OME>", "<OME><Pixels PhysicalSizeX='?'/></OME>"])
def test_ome_without_a_size(xml: str) -> None:
    assert scale_from_ome(xml, 7, 5) is None


@pytest.mark.parametrize(("x", "y"), [("0", "0"), ("-0.5", "-0.5"), ("352.8", "352.8"), ("0.001", "0.001")])
def test_impossible_scales_are_refused(x: str, y: str) -> None:
    scale = scale_from(x, y, "metadata (aperio)")
    assert scale is not None
    assert "implausible" in scale.problem()
    assert "--slide-mpp" in scale.problem()


def test_text_is_no_scale() -> None:
    assert scale_from("unknown", None, "metadata") is None
    assert scale_from("nan", "inf", "metadata") is None


def test_two_per_cent_between_x_and_y_pass() -> None:
    assert not Scale(0.5, 0.509, "metadata").warning()
    assert "differ" in Scale(0.5, 0.511, "metadata").warning()


def test_csv_names_a_slide_in_any_usual_way(tmp_path: Path) -> None:
    (tmp_path / "mpp.csv").write_text("slide,mpp\ncase1/A1,0.25\nB2.svs,0.5\nC3, 0.4\nnobody,0.3\n")
    table = read_mpp_csv(tmp_path / "mpp.csv")
    slides = [("case1/A1.svs", "case1/A1"), ("case2/B2.svs", "case2/B2"), ("C3.tif", "C3"), ("D4.tif", "D4")]
    assert table.among(slides) == {"case1/A1.svs": 0.25, "case2/B2.svs": 0.5, "C3.tif": 0.4}
    assert table.unused([("case1/A1.svs", "case1/A1"), ("B2.svs", "B2"), ("C3.tif", "C3")]) == ["nobody"]


def test_a_name_that_may_be_of_two_slides_gives_neither_a_scale(tmp_path: Path) -> None:
    (tmp_path / "mpp.csv").write_text("slide,mpp\nA1,0.25\n")
    table = read_mpp_csv(tmp_path / "mpp.csv")
    with pytest.raises(UsageError, match=r"'A1' could be x/A1\.tif or y/A1\.tif; name each by its path"):
        table.among([("x/A1.tif", "x/A1"), ("y/A1.tif", "y/A1")])
    assert table.among([("A1.tif", "A1"), ("y/A1.tif", "y/A1")]) == {"A1.tif": 0.25}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("slide;mpp,x\nA1;0.5,x\n", r"mpp\.csv: columns are separated by semicolons; save it with commas"),
        ("slide|mpp\nA1|0.5\n", r"mpp\.csv: columns are separated by bars; save it with commas"),
        ("slide,scale\nA1,0.5\n", "needs the columns slide,mpp; it has slide,scale"),
        ("slide,mpp\nA1,0\n", r"line 2: slide 'A1', mpp '0'"),
        ("slide,mpp\nA1,-0.5\n", "line 2"),
        ("slide,mpp\nA1,40x\n", "line 2"),
        ("slide,mpp\nA1,0.5\n,0.5\n", "line 3"),
        ("slide,mpp\nA1,0.5\nA1,0.25\n", "listed twice"),
        ('slide,mpp\nA1,0.5\n"A2,0.5\nA3,0.5\nA4,0.5\n', "line 3: a quote opens here and is not closed"),
        ("slide,mpp\nA1,0,5\n", "line 2: 3 columns where the first line has 2"),
    ],
)
def test_csv_that_cannot_be_used(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "mpp.csv").write_text(content)
    with pytest.raises(UsageError, match=told):
        read_mpp_csv(tmp_path / "mpp.csv")


def test_csv_of_a_german_spreadsheet_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mpp.csv").write_bytes('\ufeffslide;mpp\r\n"A;1";0,25\r\nB2;0,5\r\n'.encode())
    assert read_mpp_csv(tmp_path / "mpp.csv").mpp == {"A;1": 0.25, "B2": 0.5}
    assert "mpp.csv: the columns are separated by semicolons, and read so" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("form", ["NFC", "NFKD"])
@pytest.mark.parametrize("written", ["{}", "{}.TIF ", "Stra\u00dfe\\{}.tif", "\ufeff/data/Stra\u00dfe/{}.ndpi"])
def test_csv_names_slides_in_any_unicode_form(tmp_path: Path, form: str, written: str) -> None:
    name = written.format(unicodedata.normalize(form, "K\u00f6ln-0"))
    (tmp_path / "mpp.csv").write_text(f"sep=;\nslide;mpp\n{name};0,25\n", encoding="utf-8-sig")
    table = read_mpp_csv(tmp_path / "mpp.csv")
    own, other = (unicodedata.normalize("NFD", f"Stra\u00dfe/K\u00f6ln-{number}") for number in (0, 7))
    slides = [(f"{own}.tif", own), (f"{other}.tif", other)]
    assert table.among(slides) == {f"{own}.tif": 0.25}
    assert table.unused(slides) == []


def test_two_names_of_one_slide_with_two_scales_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mpp.csv").write_text("slide,mpp\nA1,0.25\na1.tif,0.5\n")
    with pytest.raises(UsageError, match=r"'A1' and 'a1.tif' are one slide \(A1.tif\), with 0.25 and 0.5"):
        read_mpp_csv(tmp_path / "mpp.csv").among([("A1.tif", "A1")])


def test_csv_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--mpp-csv .*cannot be read"):
        read_mpp_csv(tmp_path / "none.csv")
