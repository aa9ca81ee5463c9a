"""Any name that a disk allows: its slide is tiled, embedded and found again under the whole of it."""

import os
import shutil

import pytest
import tifffile
import torch

from histossl.core.config import EmbedConfig, ScanConfig, TileConfig
from histossl.core.workspace import LONGEST_STEM, PredictionDir, file_stem
from histossl.features.extraction import colour_embedder, embed_slides
from histossl.slides.scan import scan
from histossl.tiles.store.index import TileIndex, find_zips
from histossl.tiles.store.zip_store import read_tiling
from histossl.tiles.tiling import tile_archive

IDS = {
    "one byte letters": "l" * 251,
    "two byte letters": "ä" * 125,
    "four byte letters": "🔬" * 62,
    "in long folders": "/".join(["f" * 255, "m" * 251]),
    "in many folders": "/".join([*["d" * 200] * 11, "B"]),
}


@pytest.fixture
def archive(tmp_path, painted_slide):
    """Each slide of its own content: one content is tiled once."""
    folder = tmp_path / "archive"
    for number, name in enumerate(["A1", *IDS.values()]):
        path = folder / f"{name}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(painted_slide.path, path)
        with path.open("ab") as file:
            file.write(bytes([number]) * 16)
    return folder


def test_slides_of_the_longest_names_are_scanned_tiled_and_embedded(archive, workspace):
    slides = {"A1", *IDS.values()}
    assert {row.status for row in scan(archive, workspace, ScanConfig(), 0).rows} == {"ok"}
    config = TileConfig(tile_px=128)
    rows = tile_archive(archive, workspace, config, 0)
    assert {row.slide: row.tile_status for row in rows} == dict.fromkeys(slides, "tiled")
    index = TileIndex.open(workspace)
    assert set(index.slides) == slides
    for slide in slides:
        assert index.read(index.tiles_of(slide)[0])[:2] == b"\xff\xd8"
    paths = embed_slides(workspace, index, sorted(slides), colour_embedder(32, torch.device("cpu")), EmbedConfig())
    assert all(path.exists() for path in paths.values())
    # The index, once written, knows the zips again; and so does the same command.
    assert TileIndex.open(workspace).slides == index.slides
    assert len(find_zips(workspace.tiles)) == len(slides)
    again = tile_archive(archive, workspace, config, 0)
    assert [row.num_tiles for row in again] == [row.num_tiles for row in rows]


def test_a_moved_slide_takes_its_tiles_along_under_a_long_name(tmp_path, workspace, painted_slide):
    folder = tmp_path / "archive"
    folder.mkdir()
    shutil.copy(painted_slide.path, folder / "A1.tif")
    tile_archive(folder, workspace, TileConfig(tile_px=128), 0)
    (folder / "A1.tif").rename(folder / f"{'l' * 251}.tif")
    tile_archive(folder, workspace, TileConfig(tile_px=128), 0)
    assert TileIndex.open(workspace).slides == ["l" * 251]
    (zip_path,) = find_zips(workspace.tiles)
    assert read_tiling(zip_path)["slide"]["name"] == "l" * 251


def test_two_long_names_that_begin_alike_stay_two(tmp_path, workspace, painted_slide):
    folder = tmp_path / "archive"
    folder.mkdir()
    shutil.copy(painted_slide.path, folder / f"{'l' * 251}.tif")
    tifffile.imwrite(
        folder / f"{'l' * 250}.tiff",
        tifffile.imread(painted_slide.path)[::-1],
        photometric="rgb",
        tile=(256, 256),
        resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
    )
    tile_archive(folder, workspace, TileConfig(tile_px=128), 0)
    assert TileIndex.open(workspace).slides == ["l" * 250, "l" * 251]


@pytest.mark.parametrize("slide", IDS.values(), ids=IDS)
def test_files_of_a_long_name_can_be_made(tmp_path, slide):
    stem = file_stem(slide)
    assert stem != slide
    assert stem == file_stem(slide)
    for path in (PredictionDir(tmp_path).qupath(slide), PredictionDir(tmp_path).heatmap(slide)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize("slide", ["A1", "case1/A1", "l" * LONGEST_STEM, "/".join(["d" * 255, "ä" * 123])])
def test_a_name_that_a_disk_allows_stays_as_it_is(slide):
    assert file_stem(slide) == slide
    assert max(len(os.fsencode(part)) for part in f"{slide}.geojson".split("/")) <= 255
