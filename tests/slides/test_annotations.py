"""Hand-drawn areas: what is inside is inside, holes are holes, and a file that is no GeoJSON says so."""

from __future__ import annotations

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
from histossl.slides.annotations import find_regions, match_regions, rasterised, read_regions
from histossl.slides.archive import SlideFile
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
    assert find_regions(slide, "case1/A1") is None
    beside = write(slide.parent / "A1.geojson", feature([square(0, 0, 9)]))
    assert find_regions(slide, "case1/A1") == beside
    folder = tmp_path / "regions"
    folder.mkdir()
    assert find_regions(slide, "case1/A1", folder) is None
    flat = write(folder / "A1.geojson", feature([square(0, 0, 9)]))
    assert find_regions(slide, "case1/A1", folder) == flat
    (folder / "case1").mkdir()
    nested = write(folder / "case1" / "A1.geojson", feature([square(0, 0, 9)]))
    assert find_regions(slide, "case1/A1", folder) == nested


def archive(root: Path, *names: str) -> list[SlideFile]:
    return [SlideFile(root / name, name.rpartition(".")[0]) for name in names]


def geojson(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def matches(slides: list[SlideFile], folder: Path) -> dict[str, str]:
    found = match_regions(slides, folder)
    return {one.slide: str(found[one.path].relative_to(folder)) for one in slides if found[one.path]}


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
    assert set(match_regions(slides).values()) == {None}, "beside the slides nothing was asked for"


def test_a_file_beside_two_slides_of_its_name_is_refused(tmp_path: Path) -> None:
    slides = [SlideFile(tmp_path / name, name) for name in ("A1.svs", "A1.tif")]
    beside = write(tmp_path / "A1.geojson", feature([square(0, 0, 100)]))
    with pytest.raises(UsageError, match=r"could be of A1\.svs or A1\.tif .*like A1\.svs\.geojson"):
        match_regions(slides)
    own = write(tmp_path / "A1.svs.geojson", feature([square(0, 0, 100)]))
    assert match_regions(slides) == {slides[0].path: own, slides[1].path: beside}


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
