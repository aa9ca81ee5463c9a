"""Annotations become items: tiles by their centre, holes and Ignore* cut out, patients from wherever they are known."""

import gzip
import json

import numpy as np
import pytest
from matplotlib.path import Path as Outline
from synthetic_store import write_synthetic_store

from histossl.core.anonymous import settle
from histossl.core.config import FinetuneConfig
from histossl.core.errors import LabelsError
from histossl.labels.annotation_labels import drawn_items, surrounded
from histossl.labels.label_csv import read_rows
from histossl.labels.load_labels import labelled_items
from histossl.slides.ledger import LedgerRow, write_ledger

SIDE = 64  # 32 px at 0.5 microns per pixel, of a slide at 0.25


def box(name, x, y, width, height, hole=None):
    rings = [[[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]]
    if hole:
        (hx, hy, hw, hh) = hole
        rings.append([[hx, hy], [hx + hw, hy], [hx + hw, hy + hh], [hx, hy + hh], [hx, hy]])
    properties = {"objectType": "annotation"} | ({"classification": {"name": name}} if name else {})
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": rings}, "properties": properties}


@pytest.fixture
def drawn(tmp_path, workspace):
    """Two slides of 12 tiles, ten in the first row; annotations for both, and for one slide that is not there."""
    index = write_synthetic_store(workspace, ("A1", "B1"), tiles_per_slide=12, tile_px=32)
    folder = tmp_path / "annotations"
    folder.mkdir()
    one = [
        box("tumour", 0, 0, 4 * SIDE, SIDE, hole=(SIDE, 0, SIDE, SIDE)),
        box("stroma", 5 * SIDE, 0, 3 * SIDE, SIDE),
        box("Ignore*", 6 * SIDE, 0, SIDE, SIDE),
        box("", 0, 0, 999, 999),
        box("tumour", 3, 3, 9, 9),
    ]
    (folder / "A1.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": one}))
    (folder / "B1.geojson").write_text(json.dumps([box("stroma", 0, 0, 2 * SIDE, 2 * SIDE)]))
    (folder / "C1.geojson").write_text(json.dumps([box("stroma", 0, 0, 9, 9)]))
    return index, folder


def test_tiles_belong_to_the_annotation_around_their_centre(drawn):
    table = drawn_items(*drawn)
    assert [(i.slide, i.label, i.tiles.tolist()) for i in table.items] == [
        ("A1", "tumour", [0, 2, 3]),
        ("A1", "stroma", [5, 7]),
        ("B1", "stroma", [0, 1, 10, 11]),
    ]
    assert table.missing == (("C1.geojson", "no tiled slide of this name"),)
    assert any("1 annotations have no class" in note for note in table.notes)
    assert any("1 annotations hold no tile's centre" in note for note in table.notes)


def test_an_annotation_in_two_parts_is_one_item_with_the_tiles_of_both(drawn):
    index, folder = drawn
    parts = [box("tumour", n * SIDE, 0, SIDE, SIDE)["geometry"]["coordinates"] for n in (0, 2)]
    multi = box("tumour", 0, 0, 1, 1) | {"geometry": {"type": "MultiPolygon", "coordinates": parts}}
    content = json.dumps({"type": "FeatureCollection", "features": [multi, box("stroma", 5 * SIDE, 0, SIDE, SIDE)]})
    (folder / "A1.geojson").unlink()
    (folder / "a1.GeoJSON.gz").write_bytes(gzip.compress(content.encode("utf-16")))
    found = [(i.name, i.label, i.tiles.tolist()) for i in drawn_items(index, folder).items if i.slide == "A1"]
    assert found == [("A1#1", "tumour", [0, 2]), ("A1#2", "stroma", [5])]


def test_classes_that_read_the_same_are_refused_and_chosen_in_any_spelling(drawn):
    index, folder = drawn
    assert {item.label for item in drawn_items(index, folder, classes=("TUMOUR", "Stroma")).items} == {
        "tumour",
        "stroma",
    }
    (folder / "B1.geojson").write_text(json.dumps([box("Tumour ", 0, 0, 2 * SIDE, 2 * SIDE)]))
    with pytest.raises(LabelsError, match=r"class 'tumour' \(A1\) and 'Tumour' \(B1\) differ only in case"):
        drawn_items(index, folder)


def test_annotations_of_other_programs_are_named_as_not_read(drawn):
    index, folder = drawn
    (folder / "B1.geojson").rename(folder / "B2.geojson")
    (folder / "B1.xml").write_text("<ASAP_Annotations/>")
    missing = dict(drawn_items(index, folder).missing)
    assert "B1.xml is Aperio's or ASAP's XML, not read" in missing["B1"]
    assert missing["B2.geojson"] == "no tiled slide of this name"


def test_annotations_find_a_slide_that_is_tiled_under_another_name(tmp_path, workspace):
    names = settle(workspace, anonymize=True)
    doe = names.slide("Doe", "Doe.svs")
    index = write_synthetic_store(workspace, ("A1", doe), tiles_per_slide=2, tile_px=32)
    write_ledger(workspace.archive_csv, [LedgerRow("B1.svs", slide="B1", tile_twin="A1")])
    for name, label in (("Doe", "x"), ("B1", "y")):
        (tmp_path / f"{name}.geojson").write_text(json.dumps([box(label, 0, 0, 2 * SIDE, SIDE)]))
    assert {item.slide: item.label for item in drawn_items(index, tmp_path).items} == {doe: "x", "A1": "y"}


def test_patients_and_split_come_from_the_csv(drawn, tmp_path):
    (tmp_path / "who.csv").write_text("slide,patient,split\nA1,P1,train\nB1.svs,P2,test\n")
    table = drawn_items(*drawn, rows=read_rows(tmp_path / "who.csv", needs_label=False))
    assert {(item.slide, item.patient, item.split) for item in table.items} == {
        ("A1", "P1", "train"),
        ("B1", "P2", "test"),
    }
    (tmp_path / "who.csv").write_text("slide,patient\nA1,P1\n")
    table = drawn_items(*drawn, rows=read_rows(tmp_path / "who.csv", needs_label=False))
    assert ("B1", "has annotations, but no line in the labels file") in table.missing


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("A1,P1,train\nB1,P2,test\nA1.svs,P3,train\n", "listed twice with different patient"),
        ("A1,P1,train\nB1,P2,test\nA1,P1,test\n", "listed twice with different split"),
        ("A1,P1,train\nB1,P1,test\n", "in both train and test"),
    ],
)
def test_contradicting_lines_about_a_slide_are_refused(drawn, tmp_path, lines, said):
    (tmp_path / "who.csv").write_text("slide,patient,split\n" + lines)
    with pytest.raises(LabelsError, match=said):
        drawn_items(*drawn, rows=read_rows(tmp_path / "who.csv", needs_label=False))


def test_without_patients_it_is_said_that_slides_count_as_patients(drawn):
    assert any("the figures are too good" in note for note in drawn_items(*drawn).notes)


def test_one_class_or_no_file_is_one_clear_line(drawn, tmp_path):
    index, folder = drawn
    with pytest.raises(LabelsError, match="only 'tumour'"):
        drawn_items(index, folder, classes=("tumour",))
    (tmp_path / "empty").mkdir()
    with pytest.raises(LabelsError, match=r"holds no \.geojson"):
        drawn_items(index, tmp_path / "empty")
    with pytest.raises(LabelsError, match="no such folder"):
        drawn_items(index, tmp_path / "nowhere")


def test_a_folder_given_as_labels_and_tiles_as_unit(drawn, workspace):
    index, folder = drawn
    table = labelled_items(workspace, index, FinetuneConfig(labels=str(folder), unit="tile"))
    assert sorted(item.name for item in table.items) == sorted(
        [f"A1@{t}" for t in (0, 2, 3, 5, 7)] + [f"B1@{t}" for t in (0, 1, 10, 11)]
    )
    with pytest.raises(LabelsError, match="annotations label regions"):
        labelled_items(workspace, index, FinetuneConfig(labels=str(folder), unit="slide"))


def test_inside_is_what_matplotlib_calls_inside():
    rng = np.random.default_rng(0)
    for _ in range(20):
        ring = rng.uniform(0, 100, (7, 2))[np.argsort(rng.uniform(size=7))]
        order = np.argsort(np.arctan2(*(ring - ring.mean(0)).T))  # a star: does not cross itself
        ring = ring[order]
        points = rng.uniform(0, 100, (200, 2))
        np.testing.assert_array_equal(surrounded([ring], points), Outline(ring).contains_points(points))
