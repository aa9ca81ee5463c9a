"""labels.csv is read as written, finds its slides, and refuses what would make a curve lie."""

import csv
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from synthetic_store import write_synthetic_store

from histossl.core.config import FinetuneConfig
from histossl.core.errors import LabelsError
from histossl.core.workspace import Workspace
from histossl.labels.label_csv import Box, read_labels, read_rows
from histossl.labels.label_table import (
    Item,
    LabelTable,
    match_labels,
    natural,
    one_item_per_tile,
    overview,
    tiles_in_boxes,
)
from histossl.labels.load_labels import labelled_items, show_missing
from histossl.labels.slide_lookup import SlideNames
from histossl.slides.ledger import LedgerRow, write_ledger
from histossl.tiles.store.index import TileIndex

SLIDES = ["A1", "A2", "case1/B1", "case2/B1", "S1.2", "twin.svs", "twin.tif"]


def rows_of(tmp_path: Path, text: str, encoding: str = "utf-8"):
    path = tmp_path / "labels.csv"
    path.write_bytes(text.encode(encoding))
    return read_rows(path)


def table_of(tmp_path: Path, text: str, slides=SLIDES, **options):
    return match_labels(rows_of(tmp_path, text), slides, **options)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("A1", ("A1",)),
        ("A1.svs", ("A1",)),
        ("A1.ome.tiff", ("A1",)),
        ("A1.IHC", ()),  # another stain of the same block is another slide, not a file type
        ("A1.v2", ()),
        ("A1.isyntax", ("A1",)),  # what it was converted from
        ("S1.2.svs", ("S1.2",)),
        ("./A1.svs", ("A1",)),
        ("a1.SVS", ("A1",)),
        ("case1/B1.svs", ("case1/B1",)),
        ("case1\\B1.svs", ("case1/B1",)),
        ("/mnt/slides/case2/B1.ndpi", ("case2/B1",)),
        ("B1.svs", ("case1/B1", "case2/B1")),
        ("S1.2", ("S1.2",)),
        ("S1.2.mrxs", ("S1.2",)),
        ("S1", ()),
        ("twin.tif", ("twin.tif",)),
        ("twin", ("twin.svs", "twin.tif")),
        ("A", ()),
        ("elsewhere/B1", ()),
    ],
)
def test_a_slide_is_found_by_any_of_its_names_and_by_no_other(name, found):
    assert SlideNames(SLIDES).find(name) == found


def test_barcodes_find_slides_and_give_patients(tmp_path):
    slides = ["TCGA-CR-7395-01A-01-TS1.0a1b", "TCGA-CR-7395-01Z-00-DX1", "TCGA-AA-0001-01Z-00-DX1.ffff"]
    table = table_of(tmp_path, "slide,label\nTCGA-CR-7395,yes\nTCGA-AA-0001-01Z-00-DX1,no\n", slides)
    assert {item.slide: (item.label, item.patient) for item in table.items} == {
        slides[0]: ("yes", "TCGA-CR-7395"),
        slides[1]: ("yes", "TCGA-CR-7395"),
        slides[2]: ("no", "TCGA-AA-0001"),
    }
    assert table.patients_from == "TCGA barcodes"


def test_the_label_of_a_case_is_its_tumours_unless_there_is_normal_tissue_only(tmp_path):
    tumour, normal, other = "TCGA-AA-0001-01A-01-TS1", "a/TCGA-AA-0001-11A-01-TS1", "TCGA-AA-0002-11A-01-TS1"
    table = table_of(tmp_path, "slide,label\nTCGA-AA-0001,x\nTCGA-AA-0002,y\n", [tumour, normal, other])
    assert [(item.slide, item.label) for item in table.items] == [(tumour, "x"), (other, "y")]
    assert table.unlabelled == (normal,)
    assert SlideNames([tumour, normal]).find("TCGA-AA-0001") == (tumour, normal)  # to be left out, all of the case is
    assert SlideNames([tumour, normal]).labelled_by("TCGA-AA-0001-11A") == (normal,)


def test_a_barcode_is_not_the_beginning_of_a_longer_one(tmp_path):
    assert SlideNames(["TCGA-AA-00012-X"]).find("TCGA-AA-0001") == ()


def test_a_name_whose_tiles_another_slide_holds_finds_that_one(tmp_path):
    names = SlideNames(["A1", "A2", "x1"], {"case9/B1": "A1", "TCGA-AA-0001-01Z": "x1", "TCGA-AA-0001-11A": "A2"})
    assert names.find("B1.svs") == ("A1",)
    assert names.find("TCGA-AA-0001") == ("A2", "x1")
    assert names.labelled_by("TCGA-AA-0001") == ("x1",)
    assert names.cases("x1") == {"TCGA-AA-0001"}
    table = match_labels(rows_of(tmp_path, "slide,label,patient\nB1,x,P1\nA1,x,P1\nA2,y,P2\n"), names)
    assert {item.slide: item.label for item in table.items} == {"A1": "x", "A2": "y"}
    with pytest.raises(LabelsError, match=r"B1 is listed twice with different patient: .*line 3: A1, the same slide"):
        match_labels(rows_of(tmp_path, "slide,label,patient\nB1,x,P1\nA1,x,P2\nA2,y,P3\n"), names)


def test_one_content_under_the_barcodes_of_two_patients_is_refused(tmp_path):
    names = SlideNames(["TCGA-AA-0001-01Z", "A2"], {"TCGA-AA-0002-01Z": "TCGA-AA-0001-01Z"})
    with pytest.raises(LabelsError, match=r"several patients \(TCGA-AA-0001, TCGA-AA-0002\)"):
        match_labels(rows_of(tmp_path, "slide,label\nTCGA-AA-0001,x\nA2,y\n"), names)


def test_labels_stay_text(tmp_path):
    table = table_of(tmp_path, "slide,label\nA1,01\nA2,2.0\ncase1/B1,1e1\n")
    assert [item.label for item in table.items] == ["01", "2.0", "1e1"]


def test_a_byte_order_mark_and_spaces_do_not_matter(tmp_path):
    rows = rows_of(tmp_path, "Slide , LABEL\r\n A1.svs , x \r\nA2,y\r\n\r\n", encoding="utf-8-sig")
    table = match_labels(rows, SLIDES)
    assert [(item.slide, item.label) for item in table.items] == [("A1", "x"), ("A2", "y")]


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("first", ["", "sep=;\r\n", '"sep=;"\r\n', "SEP=;\n"])
def test_what_a_spreadsheet_says_of_its_own_file_is_believed(tmp_path, coding, first):
    rows = rows_of(tmp_path, f"{first}slide;label\r\nA1;x, y\r\n\ufeffA2;K\u00f6ln\r\n", coding)
    below = len(first.splitlines())
    assert [(row.line - below, row.slide, row.label) for row in rows] == [(2, "A1", "x, y"), (3, "A2", "K\u00f6ln")]


@pytest.mark.parametrize("closes", ['A4,"x"\n', "A4,x\n", ""])
def test_a_quote_that_is_not_closed_is_blamed_on_the_line_where_it_opens(tmp_path, closes):
    for text in (
        f'slide,label\nA1,x\nA2,"y\nA3,y\n{closes}',
        'slide,label\nA1,x\nA2,"y',
        'sep=,\nslide,label\nA2,"y\n\n',
    ):
        with pytest.raises(LabelsError, match="line 3: a quote opens here and is not closed"):
            rows_of(tmp_path, text)
    with pytest.raises(LabelsError, match="line 2: a quote opens here"):
        rows_of(tmp_path, 'slide,label\nA1,"' + "A2,x\n" * 40_000)
    assert rows_of(tmp_path, 'slide,label\nA1,5" margin\nA2,"a ""b"""\n')[1].label == 'a "b"'


def test_without_patients_each_slide_is_its_own_and_it_is_said(tmp_path):
    table = table_of(tmp_path, "slide,label\nA1,x\nA2,y\n")
    assert {item.patient for item in table.items} == {"A1", "A2"}
    assert any("no patient column" in note for note in table.notes)


def test_a_slide_of_the_ledger_without_tiles_is_told_from_a_mistyped_one(tmp_path, capsys):
    at = Workspace(tmp_path)
    write_synthetic_store(at, slides=("V-1a", "V-1b"), tiles_per_slide=4, tile_px=16)
    none = "no tiles: of 16 places on the grid 16 have less than 50% tissue (--min-tissue)"
    write_ledger(
        at.archive_csv,
        [
            LedgerRow("V-2a.tif", slide="V-2a"),
            LedgerRow("V-2b.tif", slide="V-2b", tile_status="no tiles", tile_reason=none),
            LedgerRow("deep/V-2c.tif"),
        ],
    )
    lines = "V-1a,x\nV-1b,y\nV-2a.tif,x\nV-2b,y\nV-2c.tif,y\nV-1c,y\nV_1A.tif,x\n"
    (tmp_path / "labels.csv").write_text(f"slide,label\n{lines}")
    config = FinetuneConfig(labels=str(tmp_path / "labels.csv"))
    show_missing(labelled_items(at, TileIndex.open(at), config).missing)
    said = " ".join(capsys.readouterr().err.split())
    assert "V-2a.tif: in the archive, but it has no tiles: not tiled yet" in said
    assert "V-2b: in the archive, but it has no tiles: of 16 places" in said
    assert "V-2c.tif: in the archive, but it has no tiles: not tiled yet" in said
    assert "V-1c: not found (no slide has this name)" in said
    assert "V_1A.tif: not found (did you mean 'V-1a'?)" in said


def test_the_table_counts_matched_missing_and_unlabelled(tmp_path):
    text = "slide,label,patient,split\nA1,x,P1,train\nA2,y,P2,test\nA3,y,P3,test\ntwin.svs,,,\n"
    table = table_of(tmp_path, text, reasons={"A3": "no tissue"})
    assert table.num_named == 3
    assert table.missing == (("A3", "no tiles: no tissue"),)
    assert "twin.svs" in table.unlabelled
    assert "A1" not in table.unlabelled
    columns, rows = overview(table)
    assert columns == ["class", "slides", "patients", "train slides", "train patients", "test slides", "test patients"]
    assert rows == [["x", 1, 1, 1, 1, 0, 0], ["y", 1, 1, 0, 0, 1, 1], ["all", 2, 2, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Adenoma B1", "case3/adenoma-B1"),
        ("adenoma_b1.svs.h5", "case3/adenoma-B1"),
        ("CASE-3/adenomaB1.pt", "case3/adenoma-B1"),
        ("adenoma-B1x", ""),
        ("adenoma-B2", ""),
        ("case4/adenoma B1", ""),
        ("S000.h5", ""),
        ("S7", ""),
        ("S0071", ""),
        ("1-11", ""),
        ("K\u00f6ln-0", ""),
        ("Koln-7", ""),
    ],
)
def test_a_hint_never_names_a_slide_with_another_number_or_letter(name, meant):
    names = SlideNames([*SLIDES, "case3/adenoma-B1", "S005", "S007", "S00-71", "111", "Ko\u0308ln-7"])
    assert names.find(name) == ()
    assert names.hint(name) == (f"did you mean {meant!r}?" if meant else "no slide has this name")


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
@pytest.mark.parametrize(
    "written",
    [
        "{}", "{}.svs", "  {}.SVS\u00a0", "\ufeff{}", "{}\u200b.svs", "./Stra\u00dfe/{}", "D:\\Stra\u00dfe\\{}.svs",
        "stra\u00dfe/{}.ome.tif",
    ],
)  # fmt: skip
def test_a_name_is_found_in_every_unicode_form_and_as_every_system_writes_paths(form, written):
    plain = "K\u00f6ln\u20137 \u00b2"
    for stored in ("NFC", "NFD"):
        slides = [unicodedata.normalize(stored, f"Stra\u00dfe/{one}") for one in (plain, "K\u00f6ln-8")]
        assert SlideNames(slides).find(written.format(unicodedata.normalize(form, plain))) == (slides[0],)


def test_of_names_that_one_loose_spelling_could_mean_the_one_as_written_is_found(tmp_path):
    names = SlideNames(["A2", "A\u00b2", "B-1", "B\u20131", "Ko\u0308ln", "K\u00f6ln"])
    assert [names.find(one) for one in ("A2", "A\u00b2", "b-1", "B\u20131")] == [
        ("A2",), ("A\u00b2",), ("B-1",), ("B\u20131",),
    ]  # fmt: skip
    with pytest.raises(LabelsError, match="they differ only in how letters are coded, so rename one file"):
        match_labels(rows_of(tmp_path, "slide,label\nK\u00f6ln,x\nA2,y\n"), names)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("slide,label\n", "no slides below"),
        ("slide|label\nA1|x\n", "separated by bars"),
        ("slide;lable\nA1;x\n", "separated by semicolons"),
        ("slide;label;x\tlabel\nA1;x;y\n", "separated by semicolons"),
        ("slide;label\nA1;x;y\n", "line 2: 3 columns .* put text that holds a semicolon in double quotes"),
        ("slide;label,x\nA1;x,y\n", "separated by semicolons"),
        ("slide\tlable\nA1\tx\n", "separated by tabs"),
        ("slide,lable\nA1,x\n", "no column 'label' among 'slide', 'lable'; rename 'lable' to 'label'$"),
        (
            "Slide_ID,Diagnosis,patient\nA1,x,P\n",
            "no column 'slide' and none 'label' among 'Slide_ID', 'Diagnosis', 'patient'; "
            "rename 'Slide_ID' to 'slide' and 'Diagnosis' to 'label'$",
        ),
        ("File,outcome\nA1,x\n", "rename 'File' to 'slide'; the first line must name the columns, like: slide,label"),
        ("site,split\nA1,x\n", "no column 'slide' and none 'label' among 'site', 'split'; the first line must name"),
        ("slide,label,label\nA1,x,x\n", "stands twice"),
        ("slide,time,event\nA1,31.5,1\n", "looks like survival times .* learns classes only"),
        ("slide,label\n" + "".join(f"A{n},{n * 7.5}\n" for n in range(12)), "12 different numbers, which looks like"),
        ("slide,label\nA1,x,y\n", "line 2: 3 columns"),
        ("slide,label\n,x\n", "line 2: the slide's name is empty"),
        ("slide,label,split\nA1,x,train\nA2,y,val\n", "line 3: split 'val' must be"),
        ("slide,label,split\nA1,x,train\nA2,,tset\n", "line 3: split 'tset' must be"),
        ("slide,label,patient\nA1,x,\n", "has no patient"),
        ("slide,label,patient\nA1,x,NA\n", "line 2: A1 has the patient 'NA'"),
        ("slide,label\nA1,AC\nA2,ac\n", r"label 'AC' \(line 2\) and 'ac' \(line 3\) differ only in case"),
        ("slide,label,patient\nA1,x,P 1\nA2,y,p_1\n", "patient 'P 1' .* and 'p_1' .* would count as two"),
        ("slide,label,site\nA1,x,K\u00f6ln\nA2,y,Ko\u0308ln\n", "site 'K\u00f6ln' .* spell them alike"),
        *(
            (f"slide,label\nA1,{one}\nA2,{other}\n", rf"label {one!r} \(line 2\) and {other!r} \(line 3\) differ")
            for one, other in (
                ("0", "0.0"),
                ("0", "00"),
                ("1", "1e0"),
                ("1", "01"),
                ("1.50", "1.5"),
                ("0.5", ".5"),
                ("G1", "G01"),
                ("G 1", "g-1"),
                ("grade 2", "grade 2.0"),
                ("MSI\u2013H", "MSI-H"),
                ("non-tumour", "non tumour"),
                ("AC", "\uff21\uff23"),
                ("AC", "\u0410\u0421"),
                ("AC", "AC."),
                ("Stra\u00dfe", "STRASSE"),
                ("\u2161", "II"),
            )
        ),
        ('slide;label\nA1;"0,5"\nA2;0.5\n', "label '0,5' .* '0.5' .* would count as two"),
        *(
            (f"slide,label\nA1,{one}\nA2,{other}\n", "coded differently, which a screen does not show")
            for one, other in (
                ("AC", "A\u200bC"),
                ("AC", "\u0410\u0421"),
                ("K\u00f6ln", "Ko\u0308ln"),
                ("a-b", "a\u2010b"),
            )
        ),
        ("slide,label,site\nA1,x,1\nA2,y,01\n", "site '1' .* '01' .* would count as two"),
        ("slide,label\nA1,x\nA2,x\nZ1,y\n", r"is 'x'; two classes .* 1 of its 3 slides has no tiles in this workspace"),
        ("slide,label\nA1,x\nA1.svs,y\nA2,y\n", "A1 is listed twice with different label"),
        ("slide,label\nA1,x\nA2,x\n", "two classes at least"),
        ("slide,label\nB1,x\nA1,y\n", "'B1' may be 'case1/B1', 'case2/B1'"),
        ("slide,label\nZ1,x\nZ2,y\n", "none of its 2 slides has tiles"),
        ("slide,label,patient,split\nA1,x,P,train\nA2,y,P,test\n", "'P' .* on one side only"),
        ("slide,label,patient\nA1,x,P\nA2,y,P\n", "several classes.*--mixed-patients"),
        ("slide,label,x,y,width\nA1,x,0,0,9\n", "without height"),
        ("slide,label,x,y,width,height\nA1,x,0,0,9,nine\n", "must be numbers"),
        ("slide,label,x,y,width,height\nA1,x,0,0,0,9\n", "holds nothing"),
        ("slide,label,x,y,width,height\nA1,x,nan,0,9,9\n", "line 2: x,y,width,height must be finite"),
    ],
)
def test_each_mistake_is_one_clear_line(tmp_path, text, said):
    with pytest.raises(LabelsError, match=said) as caught:
        table_of(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_what_is_not_read_as_it_may_be_meant_is_told(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("slide,label,patients,Center\nA1,x,P,K\nA2,unknown,P,K\nA3,,P,K\n", encoding="utf-8")
    assert read_labels(path).notes == [
        "the column 'patients' is not read; if it holds the patients, call it 'patient'",
        "the column 'Center' is not read; if it holds the sites, call it 'site'",
        "1 line without a label: it counts as unlabelled",
        "the label 'unknown' (1 line) is a class like any other; where it means that nobody knows, leave the cell "
        "empty",
    ]
    path.write_text("slide,label,site,age,set\nA1,x,NA,31,a\nA2,y,K,40,a\nA3,y,NA,50,a\n", encoding="utf-8")
    file = read_labels(path)
    assert [row.site for row in file.rows] == ["", "K", ""]
    assert file.notes == [
        "the column 'set' is not read; if it holds train and test, call it 'split'",
        "not read: the column 'age'",
        "the site 'NA' (2 lines) is read as not known",
    ]
    path.write_text("slide,label,patient,Patient_ID,notes,\nA1,x,P,7,good,\n", encoding="utf-8")
    assert read_labels(path).notes == ["not read: the columns 'Patient_ID', 'notes'"]
    path.write_text(f"slide,label,pateint,{','.join('abcdefg')}\nA1,x,P{',1' * 7}\n", encoding="utf-8")
    assert read_labels(path).notes == [
        "the column 'pateint' is not read; if it holds the patients, call it 'patient'",
        "not read: the columns 'a', 'b', 'c', 'd', 'e' and 2 more",
    ]
    path.write_text("slide,label,patient,site,split,x,y,width,height\nA1,x,P,K,train,0,0,9,9\n", encoding="utf-8")
    assert read_labels(path).notes == []


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_a_table_as_german_spreadsheets_save_it_is_read_and_told(tmp_path, mark, name):
    path = tmp_path / "labels.csv"
    lines = ["\ufeffSlide,label,patient", f'A1,"grade 1{mark} mild",P1', '"A, 2",y,P2']
    parted = "\r\n".join(mark.join(next(csv.reader([line]))) for line in lines)
    parted = parted.replace(f"grade 1{mark} mild", f'"grade 1{mark} mild"')
    path.write_text(parted + "\r\n", encoding="utf-8", newline="")
    file = read_labels(path)
    assert [(row.slide, row.label, row.patient) for row in file.rows] == [
        ("A1", f"grade 1{mark} mild", "P1"),
        ("A, 2", "y", "P2"),
    ]
    assert file.notes == [f"the columns are separated by {name}, and read so"]
    assert [row.slide for row in read_rows(path, needs_label=False)] == ["A1", "A, 2"]
    path.write_text("slide;label\rA1;x\rA2;y\r", encoding="utf-8", newline="")  # an old Mac's line ends
    assert [row.label for row in read_rows(path)] == ["x", "y"]
    path.write_text("slide,label,a;b\nA1,x,1;2\nA2,y,\n", encoding="utf-8")  # commas part what is needed
    assert [row.label for row in read_rows(path)] == ["x", "y"]


def test_slides_whose_names_end_alike_are_told_apart():
    names = SlideNames(["A1", "A1.v2", "S7.HE", "B1.ome"])
    meant = {
        "A1.svs": ("A1",), "A1.v2.svs": ("A1.v2",), "S7": (), "S7.IHC.svs": (), "S7.HE.ndpi": ("S7.HE",),
        "B1": ("B1.ome",), "B1.tif": ("B1.ome",),
    }  # fmt: skip
    assert {name: names.find(name) for name in meant} == meant


def test_sample_barcodes_leave_out_the_vial_and_hints_stay_with_the_case():
    names = SlideNames(["TCGA-AA-0001-01Z-00-DX1.X", "TCGA-AA-0002-01Z-00-DX1.Y"])
    assert names.find("TCGA-AA-0001-01") == ("TCGA-AA-0001-01Z-00-DX1.X",)
    assert names.find("TCGA-AA-0001-0") == ()
    assert names.hint("TCGA-AA-0003-01Z") == "no slide of the case TCGA-AA-0003"
    assert "TCGA-AA-0001-01Z-00-DX1" in names.hint("TCGA-AA-0001-01Z-00-DX2")


TCGA_TWICE = ["TCGA-AA-0001-01Z-00-DX1", "TCGA-AA-0001-01Z-00-DX2", "A1"]


def test_a_tcga_case_is_one_patient_whatever_the_column_says(tmp_path):
    """Slide barcodes in the patient column would part the slides of one case."""
    rows = "\n".join(f"{name},{'xyx'[n]},{name},{'train' if n else 'test'}" for n, name in enumerate(TCGA_TWICE))
    with pytest.raises(LabelsError, match=r"slides of TCGA-AA-0001, which is one patient, have the patients"):
        table_of(tmp_path, f"slide,label,patient,split\n{rows}\n", TCGA_TWICE, mixed_patients=True)
    same = rows.replace(f",{TCGA_TWICE[1]},train", f",{TCGA_TWICE[0]},test")
    table = table_of(tmp_path, f"slide,label,patient,split\n{same}\n", TCGA_TWICE, mixed_patients=True)
    assert len(table.patients) == 2


@pytest.mark.parametrize("pair", [("P-1", "P_1"), ("P 1", "P1"), ("01", "1"), ("1.0", "1"), ("p-007", "P7")])
def test_one_patient_in_two_spellings_that_read_the_same_is_refused(tmp_path, pair):
    with pytest.raises(
        LabelsError, match=rf"patient '{pair[0]}' \(line 2\) and '{pair[1]}' \(line 3\) .* count as two"
    ):
        table_of(tmp_path, f"slide,label,patient\nA1,x,{pair[0]}\nA2,y,{pair[1]}\n")


@pytest.mark.parametrize("pair", [("P.1", "P1"), ("#7", "7"), ("P/1", "P#01"), ("(12)", "12")])
def test_one_patient_spelt_as_spreadsheets_do_is_refused_on_two_sides_and_else_told(tmp_path, pair):
    text = f"slide,label,patient,split\nA1,x,{pair[0]},train\nA2,y,{pair[1]},test\n"
    with pytest.raises(LabelsError, match="in train and test and may be one, spelt twice"):
        table_of(tmp_path, text)
    folds = text.replace(",split", "").replace(",train", "").replace(",test", "")
    assert any("may be one, spelt twice" in note for note in table_of(tmp_path, folds).notes)


def test_numbers_that_are_two_patients_are_two(tmp_path):
    text = "slide,label,patient,split\nA1,x,1-11,train\nA2,y,11-1,test\ncase1/B1,x,111,train\nS1.2,y,10,test\n"
    assert table_of(tmp_path, text).notes == ()
    text = "slide,label,patient,split\nA1,x,1.1,train\nA2,y,1.10,test\ncase1/B1,x,1e1,train\nS1.2,y,10,test\n"
    assert table_of(tmp_path, text).notes == ()


def test_classes_that_are_written_alike_and_read_as_two_are_two(tmp_path):
    labels = ("T1", "T1a", "T10", "ER+", "ER-", "-1", "1", "3+4", "3+3", "HER2 0", "HER20", "0.5", "0.05")
    slides = [f"s{number}" for number in range(len(labels))]
    lines = "".join(f"{slide},{label}\n" for slide, label in zip(slides, labels, strict=True))
    assert {*table_of(tmp_path, f"slide,label\n{lines}", slides).classes} == {*labels}


def test_names_that_only_look_a_little_alike_are_two(tmp_path):
    table = table_of(tmp_path, "slide,label,patient\nA1,grade 1,1-1\nA2,grade 1+,11\ncase1/B1,grade 10,1 1\n")
    assert len(table.classes) == 3
    assert len(table.patients) == 3


def test_the_table_counts_sites_where_the_labels_name_any(tmp_path):
    columns, rows = overview(table_of(tmp_path, "slide,label,site\nA1,x,K\nA2,y,K\ncase1/B1,y,L\nS1.2,y,?\n"))
    assert columns == ["class", "slides", "patients", "sites"]
    assert rows == [["x", 1, 1, 1], ["y", 3, 3, 2], ["all", 4, 4, 2]]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("slide,label\nA1,x".encode("utf-16-le"), "UTF-16 text without a byte order mark"),
        (b"\xd0\xcf\x11\xe0\0", "old Excel"),
        (b"PK\x03\x04", "spreadsheet"),
        (b"II*\0\0", "no text file"),
        (b"slide,label\r\nK\xf6ln,x", "line 2: is not UTF-8 text; save it as 'CSV UTF-8'"),
    ],
)
def test_what_a_spreadsheet_saves_otherwise_is_named(tmp_path, raw, said):
    path = tmp_path / "labels.csv"
    path.write_bytes(raw)
    with pytest.raises(LabelsError, match=said):
        read_rows(path)


def test_only_line_ends_end_a_line(tmp_path):
    (tmp_path / "labels.csv").write_text("slide,label\nA1,lo\u2028w\r\nA2,high\r\n", encoding="utf-8", newline="")
    assert [row.label for row in read_rows(tmp_path / "labels.csv")] == ["lo\u2028w", "high"]


def test_mixed_patients_and_fewer_classes_when_asked(tmp_path):
    text = "slide,label,patient\nA1,x,P\nA2,y,P\ncase1/B1,z,Q\n"
    assert table_of(tmp_path, text, mixed_patients=True).classes == ("x", "y", "z")
    assert table_of(tmp_path, text, classes=("x", "Z")).classes == ("x", "z")
    with pytest.raises(LabelsError, match="--classes zz"):
        table_of(tmp_path, text, classes=("x", "zz"))


def test_a_case_with_the_same_label_twice_counts_once(tmp_path):
    table = table_of(tmp_path, "slide,label\nA1,x\nA1.svs,x\nA2,y\n")
    assert len(table.items) == 2
    assert any("counts once" in note for note in table.notes)


def test_ordinal_labels_stand_in_their_order():
    assert sorted(["grade 10", "grade 2", "benign", "3"], key=natural) == ["benign", "grade 2", "grade 10", "3"]


def test_regions_become_items_and_tiles_are_theirs_by_their_centre(tmp_path):
    table = table_of(tmp_path, "slide,label,patient,x,y,width,height\nA1,x,P,0,0,100,100\nA1,y,P,200,0,100,100\n")
    assert [(item.name, item.label) for item in table.items] == [("A1#1", "x"), ("A1#2", "y")]
    coords = np.array([[0, 0], [60, 0], [39, 0], [200, 0], [0, 90]])
    assert tiles_in_boxes(coords, 40, table.items[0].boxes).tolist() == [0, 1, 2]
    assert tiles_in_boxes(coords, 40, (Box(200, 0, 100, 100),)).tolist() == [3]
    assert tiles_in_boxes(coords, 40, (Box(0, 0, 80, 80),)).tolist() == [0, 2]


def test_tiles_as_items_leave_out_what_carries_two_labels(tmp_path):
    table = table_of(tmp_path, "slide,label,patient\nA1,x,P\nA2,y,Q\n")
    tiles = one_item_per_tile(table, {"A1": 5, "A2": 3}, at_most=4, seed=0)
    assert [item.label for item in tiles.items].count("x") == 4
    assert [item.label for item in tiles.items].count("y") == 3
    assert tiles.unit == "tile"
    assert one_item_per_tile(table, {"A1": 5, "A2": 3}, at_most=4, seed=0).digest == tiles.digest


def test_the_digest_follows_the_labels_and_not_the_order_of_lines(tmp_path):
    one = table_of(tmp_path, "slide,label\nA1,x\nA2,y\n").digest
    assert table_of(tmp_path, "slide,label\nA2,y\nA1,x\n").digest == one
    assert table_of(tmp_path, "slide,label\nA2,x\nA1,y\n").digest != one


def test_the_digest_follows_a_region_that_moved_or_was_redrawn():
    def digest(tiles, boxes=()):
        items = (Item("A1#1", "A1", "x", "P", tiles=np.array(tiles), boxes=boxes), Item("A2", "A2", "y", "Q"))
        return LabelTable(items, ("x", "y"), "region").digest

    one = digest([0, 1])
    assert digest([0, 1]) == one
    assert digest([0, 2]) != one
    assert digest([0, 1], (Box(0, 0, 9, 9),)) != digest([0, 1], (Box(1, 0, 9, 9),))
