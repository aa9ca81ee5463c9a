"""Hand-drawn areas: what is inside is inside, holes are holes, and a file that is no GeoJSON says so."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vendor_files import LEICA_GAP_PX, leica

from histossl.core.config import TileConfig, TissueConfig
from histossl.core.errors import SlideError, UsageError
from histossl.core.workspace import Workspace
from histossl.evaluation.heatmap import qupath_corners
from histossl.labels.annotation_labels import drawn_items
from histossl.slides import annotations as regions_module
from histossl.slides.annotation_files import Annotations, match_regions, regions_in
from histossl.slides.annotations import rasterised, read_regions
from histossl.slides.archive import SlideFile
from histossl.slides.ledger import read_ledger
from histossl.tiles.store.index import TileIndex
from histossl.tiles.tiling import tile_archive

SIZE = (1000, 800)


def square(x: float, y: float, side: float) -> list[list[float]]:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


def feature(coordinates: Any, name: str | None = None, kind: str = "Polygon", **properties: Any) -> dict[str, Any]:
    if name is not None:
        properties["classification"] = {"name": name, "color": [1, 2, 3]}
    geometry = {"type": kind, "coordinates": coordinates}
    return {"type": "Feature", "geometry": geometry, "properties": {"objectType": "annotation", **properties}}


def write(path: Path, *features: Any) -> Path:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}))
    return path


def test_area_of_a_polygon_is_exact_for_whole_pixels(tmp_path: Path) -> None:
    regions = read_regions(write(tmp_path / "A1.geojson", feature([square(100, 200, 300)])), SIZE)
    mask = regions.mask((80, 100), 10)
    assert mask.sum() == 30 * 30
    assert mask[20:50, 10:40].all()


def test_coordinates_count_from_the_corner_of_the_bounds_as_in_qupath(tmp_path: Path, workspace: Workspace) -> None:
    (tmp_path / "slides").mkdir()
    leica(tmp_path / "slides" / "A1.scn", np.full((256, 256, 3), 200, np.uint8), 0.5)
    drawn = feature([square(0, 0, 128)], "tumour"), feature([square(128, 0, 128)], "stroma")
    write(tmp_path / "slides" / "A1.geojson", *drawn)
    keep = TissueConfig(min_tissue=0, min_sharpness=0, min_saturation=0, max_fold=1, max_ink=1)
    tile_archive(tmp_path / "slides", workspace, TileConfig(tile_px=32, tissue=keep, grid="physical"), 0)
    index = TileIndex.open(workspace)
    corners = index.coords_l0(range(len(index)))
    assert LEICA_GAP_PX == 32
    assert (corners.min(0).tolist(), corners.max(0).tolist()) == ([32, 32], [256, 128])
    items = drawn_items(index, tmp_path / "slides").items
    assert {item.label: len(item.tiles) for item in items} == {"tumour": 16, "stroma": 16}
    assert qupath_corners(index, "A1", [0]).tolist() == [[0, 0]]


def test_triangle_has_half_the_area() -> None:
    triangle = np.array([[0, 0], [1000, 0], [0, 1000]], float)
    assert rasterised((triangle,), (100, 100), 10).sum() == pytest.approx(5000, rel=0.02)


def test_holes_and_parts(tmp_path: Path) -> None:
    holed = feature([square(0, 0, 400), square(100, 100, 200)], "tumour")
    parts = feature([[square(500, 0, 100)], [square(700, 0, 100)]], "tumour", "MultiPolygon")
    mask = read_regions(write(tmp_path / "A1.geojson", holed, parts), SIZE).mask((80, 100), 10)
    assert mask.sum() == 40 * 40 - 20 * 20 + 2 * 10 * 10
    assert not mask[15, 15]
    assert mask[5, 55]
    assert not mask[5, 65]


def test_classes_are_kept_and_the_last_drawn_wins(tmp_path: Path) -> None:
    path = write(
        tmp_path / "A1.geojson",
        feature([square(0, 0, 400)], "tumour"),
        feature([square(200, 0, 400)], "stroma"),
        feature([square(600, 0, 100)]),
        feature([square(0, 0, 100)], "Ignore*"),
    )
    regions = read_regions(path, SIZE)
    assert regions.classes == ("tumour", "stroma", "")
    masks = regions.masks((80, 100), 10)
    assert masks["tumour"].sum() == 20 * 40 - 10 * 10
    assert masks["stroma"].sum() == 40 * 40
    assert masks[""].sum() == 10 * 10
    assert not regions.mask((80, 100), 10)[5, 5]


def test_a_single_feature_a_list_and_a_bare_geometry_are_read_too(tmp_path: Path) -> None:
    one = feature([square(0, 0, 100)])
    collection = {
        "type": "GeometryCollection",
        "geometries": [one["geometry"], {"type": "Point", "coordinates": [1, 1]}],
    }
    for content in (one, [one], one["geometry"], {"type": "Feature", "geometry": collection, "properties": None}):
        (tmp_path / "A1.geojson").write_text(json.dumps(content))
        assert read_regions(tmp_path / "A1.geojson", SIZE).mask((80, 100), 10).sum() == 100


def test_polygon_partly_outside_is_cut_at_the_edge(tmp_path: Path) -> None:
    regions = read_regions(write(tmp_path / "A1.geojson", feature([square(900, 700, 500)])), SIZE)
    assert regions.mask((80, 100), 10).sum() == 10 * 10


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("no json", "not a GeoJSON"),
        ('{"a": 1}', "no features"),
        ("[1, 2]", "no features"),
        ('"text"', "no features"),
        (json.dumps([feature([1, 1], kind="Point")]), "holds no polygon"),
        (json.dumps([feature([square(0, 0, 9)], "cell", objectType="detection")] * 2), "2 of kind 'detection'"),
        (json.dumps([feature([square(5000, 5000, 100)])]), "lie outside the slide of 1000 x 800 px"),
        (json.dumps([feature([[[0, 0], [1, 1]]])]), "2 corners"),
        (json.dumps([feature([[["a", 0], [1, 1], [2, 2]]])]), "not pairs of numbers"),
        (json.dumps([feature([])]), "without corners"),
        (json.dumps([feature([[[0, 0], [1, 1e999], [2, 2]]])]), "not finite"),
        (json.dumps([{"type": "Feature", "geometry": None}]), "holds no polygon"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "A1.geojson").write_text(content)
    with pytest.raises(SlideError, match=rf"^A1\.geojson: .*{told}") as caught:
        read_regions(tmp_path / "A1.geojson", SIZE)
    assert "\n" not in str(caught.value)


def test_found_beside_the_slide_or_in_a_folder(tmp_path: Path) -> None:
    slide = tmp_path / "case1" / "A1.svs"
    slide.parent.mkdir()
    one = SlideFile(slide, "case1/A1")
    assert match_regions([one]) == {slide: Annotations()}
    beside = write(slide.parent / "A1.geojson", feature([square(0, 0, 9)]))
    assert match_regions([one])[slide].path == beside
    folder = tmp_path / "regions"
    folder.mkdir()
    assert regions_in(folder, [one])[slide].path is None
    flat = write(folder / "A1.geojson", feature([square(0, 0, 9)]))
    assert regions_in(folder, [one])[slide].path == flat
    (folder / "case1").mkdir()
    nested = write(folder / "case1" / "A1.geojson", feature([square(0, 0, 9)]))
    assert regions_in(folder, [one])[slide].path == nested


SQUARE = json.dumps([{"type": "Polygon", "coordinates": [square(0, 0, 100)]}])


@pytest.mark.parametrize(
    "name",
    [
        "A\u00f61.GEOJSON", "A\u00f61.GeoJSON", "A\u00f61.geojson.gz", "a\u00f61.GeoJSON.GZ", "A\u00f61.json",
        "A\u00f61.JSON", "A\u00f61.svs.json", "A\u00f61.SVS.geojson", "Ao\u03081.geojson", "A\u00f61.json.gz",
    ],
)  # fmt: skip
@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
def test_annotations_are_read_however_the_file_is_named_packed_and_coded(
    tmp_path: Path, name: str, coding: str
) -> None:
    slide = SlideFile(tmp_path / "slides" / "A\u00f61.svs", "A\u00f61")
    for folder in ("slides", "regions"):
        (tmp_path / folder).mkdir()
        raw = SQUARE.encode(coding)
        (tmp_path / folder / name).write_bytes(gzip.compress(raw) if name.lower().endswith("gz") else raw)
    for directory in (None, tmp_path / "regions"):
        found = match_regions([slide], directory)[slide.path]
        assert (found.path, found.note) == ((directory or slide.path.parent) / name, "")
        assert read_regions(found.path, SIZE).mask((80, 100), 10).sum() == 100


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("A1.xml", '<?xml version="1.0"?><Annotations MicronsPerPixel="0.5"/>', "Aperio's or ASAP's XML"),
        ("A1.svs.XML", "<ASAP_Annotations/>", "Aperio's or ASAP's XML"),
        ("A1.svs.ndpa", "<annotations/>", "NDP.view's XML"),
        ("A1.qpdata", "", "QuPath's own data"),
        ("A1.json", '{"scanner": "x"}', "JSON, but not a GeoJSON"),
        ("A1.json", "no json", "JSON, but not a GeoJSON"),
    ],
)
def test_annotations_that_are_not_read_are_noted(tmp_path: Path, name: str, content: str, said: str) -> None:
    slide = SlideFile(tmp_path / "A1.svs", "A1")
    (tmp_path / name).write_text(content)
    found = match_regions([slide])[slide.path]
    assert found.path is None
    assert f"{name} is {said}" in found.note
    assert "else all of the slide is tiled" in found.note
    with pytest.raises(UsageError, match=f"holds nothing that can be read .*{said}"):
        match_regions([slide], tmp_path)


def test_of_two_files_for_one_slide_it_is_said_which_one_is_read(tmp_path: Path) -> None:
    slides = [SlideFile(tmp_path / name, name) for name in ("A1.svs", "B1.svs")]
    geojson(tmp_path, "A1.geojson.gz", "A1.GEOJSON", "A1.qpdata", "B1.geojson", "B1.svs.geojson")
    found = match_regions(slides)
    assert [found[one.path].path.name for one in slides] == ["A1.GEOJSON", "B1.svs.geojson"]
    told = "annotations are read from A1.GEOJSON alone, not from A1.geojson.gz, A1.qpdata (QuPath's own data)"
    assert found[slides[0].path].note == told
    assert "B1.svs.geojson alone, not from B1.geojson" in found[slides[1].path].note


def test_xml_that_has_nothing_to_do_with_annotations_is_none(tmp_path: Path) -> None:
    (tmp_path / "A1.xml").write_text("<Scanner/>")
    assert match_regions([SlideFile(tmp_path / "A1.svs", "A1")]) == {tmp_path / "A1.svs": Annotations()}


def test_case_alone_tells_two_slides_and_their_annotations_apart(tmp_path: Path) -> None:
    slides = [SlideFile(tmp_path / name, name) for name in ("A1.svs", "a1.svs")]
    geojson(tmp_path, "A1.geojson", "a1.geojson")
    for directory in (None, tmp_path):
        found = match_regions(slides, directory)
        assert [found[one.path].path.name for one in slides] == ["A1.geojson", "a1.geojson"]
        assert not any(one.note for one in found.values())


def test_a_packed_file_is_not_unpacked_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions_module, "MAX_BYTES", 10_000)
    (tmp_path / "A1.geojson.gz").write_bytes(gzip.compress(SQUARE.encode() + b" " * 100_000))
    with pytest.raises(SlideError, match=r"A1\.geojson\.gz: 0 MB or more, when it is unpacked; export the annot"):
        read_regions(tmp_path / "A1.geojson.gz", SIZE)
    (tmp_path / "A1.geojson.gz").write_bytes(gzip.compress(SQUARE.encode())[:-20])
    with pytest.raises(SlideError, match=r"A1\.geojson\.gz: damaged"):
        read_regions(tmp_path / "A1.geojson.gz", SIZE)


def test_an_annotation_is_one_region_of_however_many_parts(tmp_path: Path) -> None:
    """Parts that overlap are no hole, holes stay, and what QuPath exports in two features of one id is one, too."""
    parts = [[square(0, 0, 200), square(50, 50, 100)], [square(150, 0, 200)], [square(500, 0, 100)]]
    multi = feature(parts, "tumour", "MultiPolygon")
    polygons = [{"type": "Polygon", "coordinates": one} for one in parts]
    collection = {**multi, "geometry": {"type": "GeometryCollection", "geometries": polygons}}
    own = "c0ffee00-0000-4000-8000-00000000000{}"
    split = [{**feature(one, "tumour"), "id": own.format(1)} for one in parts]
    area = (20 * 20 - 10 * 10) + (20 * 20 - 5 * 20) + 10 * 10
    nested = {"type": "FeatureCollection", "features": [multi]}
    for features in ([multi], [collection], split, [nested], [{"type": "FeatureCollection", "features": [nested]}]):
        (region,) = read_regions(write(tmp_path / "A1.geojson", *features), SIZE).regions
        assert region.name == "tumour"
        assert region.mask((80, 100), 10).sum() == area
    others = [split[0], {**feature(parts[1], "stroma"), "id": split[0]["id"]}, feature(parts[2])]
    assert len(read_regions(write(tmp_path / "A1.geojson", *others, others[2]), SIZE).regions) == 4


def archive(root: Path, *names: str) -> list[SlideFile]:
    return [SlideFile(root / name, name.rpartition(".")[0]) for name in names]


def geojson(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def matches(slides: list[SlideFile], folder: Path) -> dict[str, str]:
    found = match_regions(slides, folder)
    paths = {one.slide: found[one.path].path for one in slides}
    return {slide: str(path.relative_to(folder)) for slide, path in paths.items() if path}


def test_a_name_without_folder_goes_to_one_slide_or_is_refused(tmp_path: Path) -> None:
    """Regions of one slide laid over another of the same name would be wrong labels without a word."""
    slides = archive(tmp_path, "c1/A1.svs", "c2/A1.svs", "c2/B1.svs")
    folder = tmp_path / "regions"
    geojson(folder, "A1.geojson", "B1.geojson")
    with pytest.raises(UsageError, match=r"A1\.geojson could be of c1/A1 or c2/A1; name it .*c1/A1\.geojson"):
        match_regions(slides, folder)
    (folder / "A1.geojson").unlink()
    geojson(folder, "c2/A1.geojson")
    assert matches(slides, folder) == {"c2/A1": "c2/A1.geojson", "c2/B1": "B1.geojson"}
    geojson(folder, "c2/B1.qpdata")
    assert matches(slides, folder) == {"c2/A1": "c2/A1.geojson", "c2/B1": "B1.geojson"}


def test_a_slide_of_that_very_id_goes_before_one_in_a_folder(tmp_path: Path) -> None:
    geojson(tmp_path / "regions", "A1.geojson")
    assert matches(archive(tmp_path, "A1.svs", "c1/A1.svs"), tmp_path / "regions") == {"A1": "A1.geojson"}


def test_regions_and_slides_that_do_not_meet_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slides, folder = archive(tmp_path, "A1.svs", "B1.svs"), tmp_path / "regions"
    geojson(folder, "A1.geojson", "deep/C1.geojson")
    assert matches(slides, folder) == {"A1": "A1.geojson"}
    told = " ".join(capsys.readouterr().err.split())
    assert "no slide here answers to deep/C1.geojson" in told
    assert "no file there for 1 slide, taken whole: B1" in told
    (folder / "A1.geojson").rename(folder / "a-1.geojson")
    with pytest.raises(UsageError, match=r"none of it is named after a slide here \(its a-1\.geojson, deep/C1"):
        match_regions(slides, folder)
    assert set(match_regions(slides).values()) == {Annotations()}, "next to the slides nothing was asked for"


def test_a_file_beside_two_slides_of_its_name_is_refused(tmp_path: Path) -> None:
    slides = [SlideFile(tmp_path / name, name) for name in ("A1.svs", "A1.tif")]
    beside = write(tmp_path / "A1.geojson", feature([square(0, 0, 100)]))
    with pytest.raises(UsageError, match=r"could be of A1\.svs or A1\.tif .*like A1\.svs\.geojson"):
        match_regions(slides)
    own = write(tmp_path / "A1.svs.geojson", feature([square(0, 0, 100)]))
    assert match_regions(slides) == {slides[0].path: Annotations(own), slides[1].path: Annotations(beside)}


def test_what_qupath_finds_by_itself_is_no_region_in_any_version(tmp_path: Path) -> None:
    cores = [feature([square(0, 0, 100)], objectType=kind, isMissing=True) for kind in ("tmaCore", "TMACore")]
    old = {**feature([square(0, 0, 100)]), "id": "PathDetectionObject", "properties": {}}
    kept = {**feature([square(0, 0, 200)]), "id": "PathAnnotationObject", "properties": {}}
    assert len(read_regions(write(tmp_path / "A1.geojson", *cores, old, kept), SIZE).regions) == 1


def test_derived_classes_keep_their_name_and_may_be_ignored(tmp_path: Path) -> None:
    derived = [
        feature([square(0, 0, 100)], classification={"names": ["Tumor", "Positive"]}),
        feature([square(0, 0, 50)], classification={"names": ["Ignore*", "Blood"]}),
    ]
    regions = read_regions(write(tmp_path / "A1.geojson", *derived), SIZE)
    assert regions.classes == ("Tumor: Positive",)
    assert regions.mask((80, 100), 10).sum() == 10 * 10 - 5 * 5


@pytest.mark.parametrize("inside", ["feature", "properties"])
def test_annotations_within_others_are_read_too(tmp_path: Path, inside: str) -> None:
    child, core = feature([square(0, 0, 100)], "tumour"), feature([square(0, 0, 300)], objectType="tmaCore")
    (core if inside == "feature" else core["properties"])["childObjects"] = [child]
    assert read_regions(write(tmp_path / "A1.geojson", core), SIZE).mask((80, 100), 10).sum() == 10 * 10


def test_scan_and_tile_account_for_every_file_of_annotations(paint, cli, workspace: Workspace) -> None:
    """A slide whose annotations are not read is tiled whole, and its row says so; one file in capitals counts."""
    slides = [paint(f"{name}.tif", width_px=512, height_px=512, seed=seed).path for seed, name in enumerate("AB")]
    write(slides[0].with_suffix(".GEOJSON"), feature([square(0, 0, 256)]))
    slides[1].with_suffix(".xml").write_text("<Annotations/>")
    loose = ("--min-tissue", 0, "--min-sharpness", 0, "--min-saturation", 0, "--max-fold", 1, "--max-ink", 1)
    told = cli("scan", slides[0].parent, "-w", workspace.root)
    assert "B.xml is Aperio's or ASAP's XML, not read" in told.err
    told = cli("tile", slides[0].parent, "-w", workspace.root, "--tile-px", 128, "--mpp", 0.5, *loose)
    assert "B.xml is Aperio's or ASAP's XML, not read" in told.err
    rows = {row.slide: row for row in read_ledger(workspace.archive_csv)}
    assert {slide: (row.status, row.num_tiles) for slide, row in rows.items()} == {"A": ("ok", 4), "B": ("warning", 16)}
