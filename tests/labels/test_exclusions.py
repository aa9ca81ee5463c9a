"""Which slides a run may not see, and which do not judge it."""

import re
import unicodedata
from pathlib import Path

import pytest
import typer
from synthetic_store import write_synthetic_store

from histossl.cli import app
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
        (1, "1 test slide has no tiles here (Z0 in line 4: no slide has this name)"),
        (4, "4 test slides have no tiles here (Z0 in line 4"),
    ):
        lines = "".join(f"Z{number},x,Q{number},test\n" for number in range(missing))
        labels.write_text("slide,label,patient,split\nA1,x,P1,test\nA2,y,P2,train\n" + lines)
        with pytest.raises(LabelsError, match=rf"{re.escape(said)}.*--allow-missing-test-slides") as caught:
            slides_of_test_patients(labels, index)
        assert "\n" not in str(caught.value)
        assert slides_of_test_patients(labels, index, allow_missing=True) == {"A1"}
        assert said in " ".join(capsys.readouterr().err.split())


def test_a_slide_of_a_test_patient_that_is_not_found_ends_the_run_too(tmp_path: Path) -> None:
    index = write_synthetic_store(Workspace(tmp_path), slides=("A1", "A2"), tiles_per_slide=4, tile_px=16)
    labels = tmp_path / "labels.csv"
    labels.write_text("slide,label,patient,split\nA1,x,P1,test\nA-2,,P1,\n")
    with pytest.raises(LabelsError, match=r"1 test slide has no tiles here \(A-2 in line 3: did you mean 'A2'\?\)"):
        slides_of_test_patients(labels, index)


def test_a_test_slide_that_the_archive_has_without_tiles_is_no_reason_to_stop(tmp_path: Path, capsys) -> None:
    at = Workspace(tmp_path)
    index = write_synthetic_store(at, slides=("A1", "A2"), tiles_per_slide=4, tile_px=16)
    write_ledger(
        at.archive_csv, [LedgerRow("Ko\u0308ln.tif", slide="Ko\u0308ln", tile_status="failed", tile_reason="torn")]
    )
    labels = tmp_path / "labels.csv"
    labels.write_text("slide,label,patient,split\nA1,x,P1,test\nK\u00f6ln.svs,x,P2,test\n", encoding="utf-8")
    assert slides_of_test_patients(labels, index) == {"A1"}
    assert "no tiles: torn" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKD"])
@pytest.mark.parametrize("written", ["{}", "{}.svs ", "CASE\\{}.SVS", "\ufeff/data/case/{}.ndpi"])
@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
def test_test_and_excluded_slides_stay_out_however_their_names_are_coded(tmp_path: Path, form, written, coding) -> None:
    own = unicodedata.normalize("NFD", "case/K\u00f6ln-0")
    index = write_synthetic_store(Workspace(tmp_path), slides=(own, "case/A2"), tiles_per_slide=4, tile_px=16)
    name = written.format(unicodedata.normalize(form, "K\u00f6ln-0"))
    labels, out = tmp_path / "labels.csv", tmp_path / "out.txt"
    labels.write_text(f"slide,label,patient,split\n{name},x,P1,test\nA2,y,P2,train\n", encoding=coding)
    out.write_text(f"\n{name}\n", encoding=coding)
    assert slides_of_test_patients(labels, index) == {own}
    assert excluded_slides(out, index) == {own}


def test_an_excluded_slide_without_tiles_is_no_spelling_mistake(tmp_path: Path) -> None:
    at = Workspace(tmp_path)
    index = write_synthetic_store(at, slides=("V-1a", "V-1b"), tiles_per_slide=4, tile_px=16)
    write_ledger(at.archive_csv, [LedgerRow("V-2a.tif", slide="V-2a", tile_status="failed", tile_reason="torn")])
    (tmp_path / "out.txt").write_text("V-2a.tif\n")
    with pytest.raises(UsageError, match=r"out.txt, line 1: 'V-2a.tif' is none of the tiled slides \(no tiles: torn\)"):
        excluded_slides(tmp_path / "out.txt", index)


def test_slides_left_out_do_not_judge_the_run() -> None:
    items = tuple(Item(name, name, "ill", name) for name in "AB")
    assert without(LabelTable(items, ("ill",)), {"A"}).slides == ("B",)


@pytest.mark.parametrize("command", ["pretrain", "plan", "curate"])
def test_a_test_slide_that_is_not_found_ends_every_command_that_trains_or_chooses(tmp_path: Path, cli, command) -> None:
    at = Workspace(tmp_path / "lab")
    write_synthetic_store(at, slides=("A1", "A2", "A3"), tiles_per_slide=4, tile_px=32)
    labels = tmp_path / "labels.csv"
    labels.write_text("slide,label,patient,split\nA1,x,P1,train\nA2,y,P2,train\nA-9,x,P3,test\n")
    small = ("--backbone", "resnet10t", "--weights", "random")
    told = cli(command, "-w", at.root, "--labels", labels, *small)
    assert told.code == 2
    assert "A-9 in line 4: no slide has this name" in told.err
    assert "--allow-missing-test-slides" in told.err
    assert not at.pretrain_root.exists()
    if command == "plan":
        more = ("--steps", 1, "--batch-size", 2, "--view-px", 32, "--allow-missing-test-slides")
        told = cli(command, "-w", at.root, "--labels", labels, *small, *more)
        assert told.code == 0
        assert "12 tiles of 3 slides" in told.out + told.err


def test_distill_ends_there_too() -> None:
    options = {name for one in typer.main.get_command(app).commands["distill"].params for name in one.opts}
    assert "--allow-missing-test-slides" in options
