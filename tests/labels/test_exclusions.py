"""Which slides a run may not see, and which do not judge it."""

from pathlib import Path

import pytest
from synthetic_store import write_synthetic_store

from histossl.core.anonymous import settle
from histossl.core.errors import LabelsError, UsageError
from histossl.core.workspace import Workspace
from histossl.labels.exclusions import excluded_slides, labelled_slides, slides_of_test_patients, without
from histossl.labels.label_table import Item, LabelTable
from histossl.slides.ledger import LedgerRow, write_ledger


def test_every_slide_of_a_test_patient_stays_out(tmp_path: Path) -> None:
    names = ("A1", "A2", "B1", "TCGA-AA-0001-01Z-00-DX1", "TCGA-AA-0001-01Z-00-DX2", "C1")
    index = write_synthetic_store(Workspace(tmp_path), slides=names, tiles_per_slide=4, tile_px=16)
    labels = tmp_path / "labels.csv"
    labels.write_text(
        "slide,label,patient,split\nA1,x,P1,test\nA2,,P1,\nB1,y,P2,train\nC1,x,P3,train\nTCGA-AA-0001-01Z-00-DX1,,,test\n"
    )
    assert slides_of_test_patients(labels, index) == {"A1", "A2", "TCGA-AA-0001-01Z-00-DX1", "TCGA-AA-0001-01Z-00-DX2"}


def test_a_test_slide_that_is_tiled_under_another_name_stays_out(tmp_path: Path) -> None:
    at = Workspace(tmp_path)
    doe = settle(at, anonymize=True).slide("Doe", "Doe.svs")
    index = write_synthetic_store(at, slides=("A1", "A2", doe), tiles_per_slide=4, tile_px=16)
    write_ledger(at.archive_csv, [LedgerRow("case7/B1.svs", slide="case7/B1", tile_twin="A1")])
    labels = tmp_path / "labels.csv"
    labels.write_text("slide,label,patient,split\nB1,x,P1,test\nDoe,y,P2,test\nA2,x,P3,train\n")
    assert slides_of_test_patients(labels, index) == {"A1", doe}
    (tmp_path / "out.txt").write_text("B1\nDoe.svs\n")
    assert excluded_slides(tmp_path / "out.txt", index) == {"A1", doe}
    labels.write_text("slide,label,patient,split\nB1,x,P1,test\nA1,y,P1,train\n")
    with pytest.raises(
        LabelsError, match=r"B1 \(line 2\) and A1 \(line 3\) name one slide, with split 'test' and 'train'"
    ):
        slides_of_test_patients(labels, index)


def test_a_file_that_gives_patients_and_sides_for_drawn_labels_leaves_its_test_patients_out(tmp_path, capsys) -> None:
    """The file that `finetune --regions` takes beside annotations has no labels: no probe, and the same slides out."""
    index = write_synthetic_store(Workspace(tmp_path), slides=("A1", "A2", "B1"), tiles_per_slide=4, tile_px=16)
    patients = tmp_path / "patients.csv"
    patients.write_text("slide,patient,split\nA1,P1,test\nA2,P1,test\nB1,P2,train\n")
    assert slides_of_test_patients(patients, index) == {"A1", "A2"}
    assert labelled_slides(patients, index) is None
    assert "no probe during the run" in capsys.readouterr().err


def test_test_slides_without_tiles_are_counted_in_the_singular_too(tmp_path: Path, capsys) -> None:
    index = write_synthetic_store(Workspace(tmp_path), slides=("A1", "A2"), tiles_per_slide=4, tile_px=16)
    labels = tmp_path / "labels.csv"
    for missing, said in (
        (1, "1 test slide has no tiles here (Z0)"),
        (4, "4 test slides have no tiles here (Z0, Z1, Z2"),
    ):
        lines = "".join(f"Z{number},x,Q{number},test\n" for number in range(missing))
        labels.write_text("slide,label,patient,split\nA1,x,P1,test\nA2,y,P2,train\n" + lines)
        slides_of_test_patients(labels, index)
        assert said in " ".join(capsys.readouterr().err.split())


def test_an_excluded_slide_without_tiles_is_no_spelling_mistake(tmp_path: Path) -> None:
    at = Workspace(tmp_path)
    index = write_synthetic_store(at, slides=("V-1a", "V-1b"), tiles_per_slide=4, tile_px=16)
    write_ledger(at.archive_csv, [LedgerRow("V-2a.tif", slide="V-2a", tile_status="failed", tile_reason="torn")])
    (tmp_path / "out.txt").write_text("V-2a.tif\n")
    with pytest.raises(UsageError, match=r"'V-2a.tif' is none of the tiled slides \(no tiles: torn\)"):
        excluded_slides(tmp_path / "out.txt", index)


def test_slides_left_out_do_not_judge_the_run() -> None:
    items = tuple(Item(name, name, "ill", name) for name in "AB")
    assert without(LabelTable(items, ("ill",)), {"A"}).slides == ("B",)
