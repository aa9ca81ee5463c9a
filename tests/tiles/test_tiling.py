"""Stage `tile`: tiles lie where they say, cover what they should, and no slide is lost or doubled."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import openslide
import pytest
import simplejpeg
import tifffile
from PIL import Image

from histossl.bench import tiling_rates
from histossl.cli.tile import tell
from histossl.core.anonymous import names_of
from histossl.core.config import TileConfig, TissueConfig, noted_commands
from histossl.core.errors import HistosslError, MismatchError, StoreError
from histossl.core.workspace import Workspace
from histossl.demo.paint import paint_slide
from histossl.labels.slide_lookup import SlideNames
from histossl.runtime.locks import alone_in_workspace
from histossl.runtime.process_pool import Event
from histossl.slides import content
from histossl.slides.ledger import LedgerRow, read_ledger, write_ledger
from histossl.slides.quality import places
from histossl.slides.reading import slide as reader
from histossl.slides.reading.slide import open_slide
from histossl.tiles import tiling
from histossl.tiles.cutting import tile_slide as one_slide
from histossl.tiles.store import zip_store as store
from histossl.tiles.store.anonymisation import holders
from histossl.tiles.store.index import TileIndex, find_zips
from histossl.tiles.store.zip_store import StoreWriter, read_store
from histossl.tiles.tiling import stored_config, tile_archive

ALL = TissueConfig(min_tissue=0, min_sharpness=0, min_saturation=0, max_fold=1, max_ink=1)  # no filter takes anything


@pytest.fixture
def paint(paint):
    """Each name its own content, for one content is tiled once."""
    return lambda name="A1.tif", **options: paint(
        name, **{"seed": 0 if name == "A1.tif" else zlib.crc32(name.encode()) % 1000, **options}
    )


def everything(**settings):
    return TileConfig(**{"jpeg_quality": 98, "tissue": ALL, **settings})


def only_row(rows):
    assert len(rows) == 1
    return rows[0]


def pixels_of(index, number):
    return simplejpeg.decode_jpeg(index.read(number)).astype(int)


def force(monkeypatch, way):
    """Cut in this way, whatever would be chosen."""
    choose = one_slide.cutter_for
    monkeypatch.setattr(one_slide, "cutter_for", lambda *chosen: choose(*chosen[:4], way))


# ---- where tiles lie and what they cover


@pytest.mark.parametrize("mpp", [0.25, 0.2527, 0.5, 0.43])
@pytest.mark.parametrize(
    ("compression", "way"), [("jpeg", "stitched"), ("deflate", "stitched"), ("jpeg", "read"), ("jp2k", "stitched")]
)
def test_tile_covers_64_um_whatever_the_scanner_resolution(workspace, paint, monkeypatch, mpp, compression, way):
    force(monkeypatch, way)
    painted = paint("A1.tif", mpp=mpp, compression=compression, pyramid=False, width_px=800, height_px=700)
    row = only_row(tile_archive(painted.path.parent, workspace, everything(tile_px=128, grid="physical"), 0))
    index = TileIndex.open(workspace)
    assert row.tile_way == way
    side_l0 = 64 / mpp
    assert len(index) == row.num_tiles == int(800 / side_l0) * int(700 / side_l0)
    with open_slide(painted.path) as slide:
        for number, (x_l0, y_l0) in enumerate(index.coords_l0(range(len(index)))):
            assert abs(x_l0 - round(x_l0 / side_l0) * side_l0) <= 0.5
            seen = slide.read_region_l0(int(x_l0), int(y_l0), side_l0, side_l0, 128, 128)
            assert np.abs(pixels_of(index, number) - seen).mean() < 2


@pytest.mark.parametrize(("mpp", "own"), [(0.499, 0.499), (0.2512, 0.5024), (0.505, 0.5), (0.5, 0.5)])
def test_auto_does_not_resample_for_half_a_percent_and_says_so(workspace, paint, mpp, own):
    painted = paint("A1.tif", mpp=mpp, pyramid=False)
    tile_archive(painted.path.parent, workspace, everything(tile_px=128), 0)
    index = TileIndex.open(workspace)
    (scale,) = index.facts("A1")["scales"]
    assert scale["mpp"] == pytest.approx(own, rel=1e-4)
    assert scale["side_l0"] == pytest.approx(128 * own / mpp, rel=1e-4)
    if own == mpp:
        with open_slide(painted.path) as slide:
            for number, (x_l0, y_l0) in enumerate(index.coords_l0(range(len(index))).tolist()):
                seen = slide.read_level(0, x_l0, y_l0, 128, 128)
                assert np.abs(pixels_of(index, number) - seen).mean() < 1.5


def test_the_command_line_remembers_how_it_was_called(workspace, painted_slide, cli, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["histossl", "tile", "archive"])
    assert cli("tile", "--slides", painted_slide.path.parent, "-w", workspace.root, "--workers", 1).code == 0
    assert noted_commands(workspace.tile_commands) == [["histossl", "tile", "archive"]]


def test_coordinates_agree_with_openslide(workspace, painted_slide):
    tile_archive(painted_slide.path.parent, workspace, everything(tile_px=128, grid="physical"), 0)
    index = TileIndex.open(workspace)
    assert len(index) == 64
    with openslide.OpenSlide(str(painted_slide.path)) as slide:
        for number, (x_l0, y_l0) in enumerate(index.coords_l0(range(len(index))).tolist()):
            theirs = np.asarray(slide.read_region((x_l0, y_l0), 0, (128, 128)).convert("RGB")).astype(int)
            assert np.abs(pixels_of(index, number) - theirs).mean() < 1.5


@pytest.mark.parametrize("mpp", [0.5, 1.0, 0.7])
def test_pyramid_levels_do_not_move_tiles(workspace, painted_slide, mpp):
    # The painter's pyramid halves twice and more, so these come from different levels.
    config = everything(tile_px=64, mpp=mpp, grid="physical")
    tile_archive(painted_slide.path.parent, workspace, config, 0)
    index = TileIndex.open(workspace)
    side_l0 = 64 * mpp / 0.5
    with openslide.OpenSlide(str(painted_slide.path)) as slide:
        full = Image.fromarray(np.asarray(slide.read_region((0, 0), 0, (1024, 1024)).convert("RGB")))
    for number, (x, y) in enumerate(index.coords_l0(range(len(index)))):
        right, shifted = (
            np.asarray(full.resize((64, 64), Image.Resampling.HAMMING, box=(x + by, y, x + by + side_l0, y + side_l0)))
            for by in (0, 2 if x == 0 else -2)
        )
        off = np.abs(pixels_of(index, number) - right).mean()
        assert off < 8  # the pyramid was made with another filter
        assert off < 0.7 * np.abs(pixels_of(index, number) - shifted).mean() or right.std() < 20


def test_several_scales_share_a_zip_and_keep_apart(workspace, painted_slide):
    config = everything(tile_px=128, mpp=0.5, coarser_mpp=(1.0, 2.0), grid="physical")
    row = only_row(tile_archive(painted_slide.path.parent, workspace, config, 0))
    index = TileIndex.open(workspace)
    assert index.mpps == [0.5, 1.0, 2.0]
    assert np.bincount(index.table["scale"]).tolist() == [64, 16, 4]
    assert row.num_tiles == 84
    with open_slide(painted_slide.path) as slide:
        for number in range(len(index)):
            scale = int(index.table["scale"][number])
            (x_l0, y_l0), side_l0 = index.coords_l0([number])[0].tolist(), 128 * 2**scale
            seen = slide.read_region_l0(x_l0, y_l0, side_l0, side_l0, 128, 128)
            assert np.abs(pixels_of(index, number) - seen).mean() < 2
    with zipfile.ZipFile(workspace.zip_of("A1")) as archive:
        assert {"0.5/0_0.jpg", "1/0_0.jpg", "2/0_0.jpg"} <= set(archive.namelist())


def test_slides_of_two_resolutions_give_the_same_tiles_of_the_same_tissue(workspace, paint):
    paint("fine.tif", mpp=0.25, width_px=1024, height_px=1024, seed=4)
    paint("coarse.tif", mpp=0.5, width_px=512, height_px=512, seed=4)
    tile_archive(workspace.root.parent / "slides", workspace, everything(grid="physical", tile_px=128), 0)
    index = TileIndex.open(workspace)
    assert index.counts.tolist() == [16, 16]
    assert index.facts("fine")["scales"][0]["side_l0"] == 256
    assert index.facts("coarse")["scales"][0]["side_l0"] == 128


# ---- filters


def test_tiles_hold_tissue_and_the_ledger_counts_the_rest(workspace, painted_slide):
    config = TileConfig(tile_px=64, tissue=TissueConfig(min_sharpness=0, min_saturation=0, max_fold=1, max_ink=1))
    row = only_row(tile_archive(painted_slide.path.parent, workspace, config, 0))
    index = TileIndex.open(workspace)
    assert 0 < row.num_tiles < 256
    assert row.num_tiles + row.rejected_tissue == 256
    down = painted_slide.mask_downsample
    for x, y in index.coords_l0(range(len(index))):
        box = np.s_[y // down : (y + 64) // down, x // down : (x + 64) // down]
        assert (painted_slide.tissue_mask | painted_slide.fat_mask)[box].mean() > 0.2
        assert painted_slide.pen_mask[box].mean() < 0.3
    assert (index.table["tissue"] >= 0.5).all()


@pytest.fixture(scope="module")
def blurred_slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("blurred") / "A1.tif"
    return paint_slide(path, width_px=2048, height_px=2048, num_blurs=2, seed=3, pyramid=False)


@pytest.mark.parametrize("grid", ["physical", "auto"])
def test_tiles_out_of_focus_are_left_out_also_where_tiles_are_copied(workspace, blurred_slide, grid):
    painted = blurred_slide
    config = TileConfig(grid=grid, tissue=TissueConfig(min_sharpness=0.23, min_saturation=0, max_fold=1, max_ink=1))
    row = only_row(tile_archive(painted.path.parent, workspace, config, 0))
    assert row.tile_way == ("copied" if grid == "auto" else "stitched")
    index = TileIndex.open(workspace)
    down = painted.mask_downsample
    kept = {tuple(corner) for corner in index.coords_l0(range(len(index))).tolist()}
    blurred = {
        (x, y)
        for x in range(0, 2048, 256)
        for y in range(0, 2048, 256)
        if painted.blur_mask[y // down : (y + 256) // down, x // down : (x + 256) // down].mean() > 0.95
    }
    assert blurred
    assert row.rejected_blur >= len(blurred - kept) > 0
    assert not blurred & kept


def write_regions(path, **boxes):
    def feature(name, box):
        left, top, right, bottom = box
        ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
        properties = {"objectType": "annotation", "classification": {"name": name}}
        return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": properties}

    features = [feature(name, box) for name, box in boxes.items()]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def test_regions_restrict_tiling_and_name_the_tiles(workspace, paint):
    painted = paint("A1.tif")
    write_regions(painted.path.with_suffix(".geojson"), tumour=(0, 0, 512, 512), stroma=(512, 0, 1024, 256))
    row = only_row(tile_archive(painted.path.parent, workspace, everything(tile_px=128), 0))
    index = TileIndex.open(workspace)
    named = {
        (int(tile["x_l0"]), int(tile["y_l0"])): index.regions[tile["region"]] for tile in index.rows(range(len(index)))
    }
    assert set(named) == {
        (x, y) for x in range(0, 1024, 128) for y in range(0, 1024, 128) if (y < 512 and x < 512) or y < 256
    }
    assert all(name == ("tumour" if corner[0] < 512 else "stroma") for corner, name in named.items())
    assert row.rejected_region == 64 - len(named)
    write_regions(painted.path.with_suffix(".geojson"), tumour=(0, 0, 1024, 512))
    with pytest.raises(MismatchError, match="its regions changed"):
        tile_archive(painted.path.parent, workspace, everything(tile_px=128), 0)


def test_a_bad_geojson_costs_its_slide_only(workspace, paint):
    painted = paint("A1.tif", width_px=512, height_px=512)
    paint("B1.tif", width_px=512, height_px=512)
    folder = workspace.root / "regions"
    folder.mkdir()
    (folder / "A1.geojson").write_text("not json")
    rows = tile_archive(painted.path.parent, workspace, everything(), 0, regions=folder)
    assert [row.tile_status for row in rows] == ["failed", "tiled"]
    assert "A1.geojson" in rows[0].reason


def test_why_there_are_no_tiles(workspace, paint):
    paint("small.tif", width_px=200, height_px=200)
    blank = np.full((1024, 1024, 3), 243, np.uint8)
    tifffile.imwrite(
        workspace.root.parent / "slides" / "blank.tif",
        blank,
        tile=(256, 256),
        photometric="rgb",
        resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
    )
    rows = {row.slide: row for row in tile_archive(workspace.root.parent / "slides", workspace, TileConfig(), 0)}
    assert "smaller than one tile: 100 x 100 microns" in rows["small"].tile_reason
    assert rows["blank"].tile_reason == "no tiles: of 16 places on the grid 16 have less than 50% tissue (--min-tissue)"
    assert rows["blank"].tile_status == "no tiles"
    assert rows["blank"].status == "warning"
    with pytest.raises(StoreError, match="none of its slides gave a tile"):
        TileIndex.open(workspace)
    again = tile_archive(workspace.root.parent / "slides", workspace, TileConfig(), 0)
    assert {row.tile_reason for row in again} == {row.tile_reason for row in rows.values()}


# ---- going on


def stamps(workspace):
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in find_zips(workspace.tiles)}


def test_second_run_does_nothing_and_tells_the_same(workspace, painted_archive):
    first = tile_archive(painted_archive.directory, workspace, TileConfig(), 0)
    before, ledger = stamps(workspace), workspace.archive_csv.read_text()
    assert len(before) == 12
    assert tile_archive(painted_archive.directory, workspace, TileConfig(), 0) == first
    assert stamps(workspace) == before
    assert workspace.archive_csv.read_text() == ledger
    # The ledger is a copy of what the zips say: without it nothing is tiled again, and it is told anew.
    workspace.archive_csv.unlink()
    tile_archive(painted_archive.directory, workspace, TileConfig(), 0)
    assert stamps(workspace) == before
    assert workspace.archive_csv.read_text() == ledger


def test_only_a_new_slide_is_tiled(workspace, paint):
    directory = paint("A1.tif", width_px=512, height_px=512).path.parent
    tile_archive(directory, workspace, TileConfig(), 0)
    before = stamps(workspace)
    paint("sub/B1.tif", width_px=512, height_px=512)
    rows = tile_archive(directory, workspace, TileConfig(), 0)
    assert [row.slide for row in rows] == ["A1", "sub/B1"]
    assert stamps(workspace)["A1.zip"] == before["A1.zip"]
    assert TileIndex.open(workspace).slides == ["A1", "sub/B1"]


def test_other_settings_are_refused_and_named(workspace, painted_slide):
    directory = painted_slide.path.parent
    tile_archive(directory, workspace, TileConfig(), 0)
    before = stamps(workspace)
    other = TileConfig(tile_px=128, tissue=TissueConfig(min_tissue=0.3))
    with pytest.raises(MismatchError, match=r"tile-px was 256, now 128; min-tissue was 0.5, now 0.3.*--workspace"):
        tile_archive(directory, workspace, other, 0)
    assert stamps(workspace) == before
    assert stored_config(workspace) == TileConfig()


def test_a_replaced_slide_is_named_and_tiled_anew_on_request(workspace, paint):
    painted = paint("A1.tif", width_px=512, height_px=512, seed=1)
    directory = painted.path.parent
    tile_archive(directory, workspace, everything(), 0)
    digest = TileIndex.open(workspace).digest
    paint("A1.tif", width_px=512, height_px=512, seed=2)
    with pytest.raises(MismatchError, match=r"1 slide\(s\) are not what they were.*A1\.tif.*--retry"):
        tile_archive(directory, workspace, everything(), 0)
    assert TileIndex.open(workspace).digest == digest
    tile_archive(directory, workspace, everything(), 0, retry=True)
    assert TileIndex.open(workspace).digest != digest


def test_a_slide_that_was_only_copied_or_touched_is_the_same_slide(workspace, paint):
    painted = paint("A1.tif", width_px=512, height_px=512)
    tile_archive(painted.path.parent, workspace, TileConfig(), 0)
    before = stamps(workspace)
    os.utime(painted.path, (1, 1))
    tile_archive(painted.path.parent, workspace, TileConfig(), 0)
    assert stamps(workspace) == before


def test_other_scale_for_a_slide_is_noticed(workspace, paint):
    painted = paint("A1.tif", write_mpp=False, width_px=512, height_px=512)
    tile_archive(painted.path.parent, workspace, TileConfig(), 0, slide_mpp=0.5)
    tile_archive(painted.path.parent, workspace, TileConfig(), 0)  # without the option: as it was tiled
    with pytest.raises(MismatchError, match=r"0\.5 microns per pixel then, 0.25 now"):
        tile_archive(painted.path.parent, workspace, TileConfig(), 0, slide_mpp=0.25)


def test_a_damaged_zip_is_made_anew(workspace, paint):
    painted = paint("A1.tif", width_px=512, height_px=512)
    tile_archive(painted.path.parent, workspace, TileConfig(), 0)
    whole = workspace.zip_of("A1").read_bytes()
    workspace.zip_of("A1").write_bytes(whole[:1000])
    tile_archive(painted.path.parent, workspace, TileConfig(), 0)
    assert workspace.zip_of("A1").read_bytes() == whole


def test_two_runs_in_one_workspace_do_not_meet(workspace, painted_slide):
    told = r"another .histossl scan. \(process .* is at work"
    with alone_in_workspace(workspace, "scan"), pytest.raises(StoreError, match=told):
        tile_archive(painted_slide.path.parent, workspace, TileConfig(), 0)
    tile_archive(painted_slide.path.parent, workspace, TileConfig(), 0)


# ---- what goes wrong with one slide stays with it


def test_no_mpp_is_a_row_with_the_remedy_and_is_tried_again_when_given(workspace, paint):
    paint("bare.tif", write_mpp=False, width_px=512, height_px=512)
    directory = paint("good.tif", width_px=512, height_px=512).path.parent
    rows = {row.slide: row for row in tile_archive(directory, workspace, TileConfig(), 0)}
    assert rows["good"].num_tiles
    assert rows["bare"].tile_status == "failed"
    assert "--slide-mpp" in rows["bare"].reason
    table = workspace.root / "mpp.csv"
    table.write_text("slide,mpp\nbare,0.5\n")
    rows = {row.slide: row for row in tile_archive(directory, workspace, TileConfig(), 0, mpp_csv=table)}
    assert (rows["bare"].status, rows["bare"].reason, rows["bare"].mpp) == ("ok", "", 0.5)
    assert rows["bare"].num_tiles


def test_what_failed_is_left_alone_until_asked_or_changed(workspace, paint, monkeypatch):
    good = paint("good.tif", width_px=512, height_px=512).path
    bad = good.parent / "bad.tif"
    bad.write_bytes(bytes(5000))
    tile_archive(good.parent, workspace, TileConfig(), 0)
    tried = []
    real = tiling.tile_slide
    monkeypatch.setattr(tiling, "tile_slide", lambda job, report: tried.append(job.slide) or real(job, report))
    rows = tile_archive(good.parent, workspace, TileConfig(), 0)
    assert tried == []
    assert [row.tile_status for row in rows] == ["failed", "tiled"]
    tile_archive(good.parent, workspace, TileConfig(), 0, retry=True)
    assert tried == ["bad"]
    paint("bad.tif", width_px=512, height_px=512)
    tile_archive(good.parent, workspace, TileConfig(), 0)
    assert tried == ["bad", "bad"]
    assert len(TileIndex.open(workspace).slides) == 2


def damage_native_tiles(path, numbers, level=0):
    """Overwrite the middle of some native tiles with garbage, as a bad disk does."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.series[0].levels[level].pages[0]
        places = [(page.dataoffsets[number], page.databytecounts[number]) for number in numbers]
    with path.open("r+b") as file:
        for offset, length in places:
            file.seek(offset + length // 3)
            file.write(np.random.default_rng(0).bytes(length // 2))


@pytest.mark.parametrize(("way", "settings"), [("copied", {}), ("stitched", {"tile_px": 128})])
def test_damaged_tiles_are_left_out_and_counted_the_others_are_right(workspace, paint, way, settings):
    painted = paint("A1.tif", pyramid=False)
    with open_slide(painted.path) as slide:
        before = slide.read_region_l0(0, 0, 1024, 1024, 1024, 1024)
    damage_native_tiles(painted.path, [5, 10])  # at (256, 256) and (512, 512)
    row = only_row(tile_archive(painted.path.parent, workspace, everything(**settings), 0))
    assert row.tile_way == way
    per_native = (256 // settings.get("tile_px", 256)) ** 2
    assert row.rejected_damaged == 2 * per_native
    assert row.num_tiles == 14 * per_native
    assert (row.status, row.tile_status) == ("warning", "tiled")
    assert f"{2 * per_native} damaged tile(s) left out" in row.reason
    index = TileIndex.open(workspace)
    side = index.tile_px
    for number, (x, y) in enumerate(index.coords_l0(range(len(index)))):
        assert (x // 256, y // 256) not in [(1, 1), (2, 2)]
        assert np.abs(pixels_of(index, number) - before[y : y + side, x : x + side]).mean() < 2


@pytest.mark.parametrize("way", ["stitched", "read"])
def test_damage_under_other_compressions_costs_its_tiles_only(workspace, paint, monkeypatch, way):
    force(monkeypatch, way)
    painted = paint("A1.tif", compression="deflate", pyramid=False)
    damage_native_tiles(painted.path, [5])
    row = only_row(tile_archive(painted.path.parent, workspace, everything(tile_px=128), 0))
    assert row.tile_way == way
    assert (row.rejected_damaged, row.num_tiles) == (4, 60)


def test_a_slide_of_nothing_but_damage_fails(workspace, paint):
    painted = paint("A1.tif", pyramid=False)
    paint("B1.tif", width_px=512, height_px=512)
    damage_native_tiles(painted.path, range(16))
    rows = {row.slide: row for row in tile_archive(painted.path.parent, workspace, everything(), 0)}
    assert rows["A1"].tile_status == "failed"
    assert "damaged" in rows["A1"].reason
    assert not workspace.zip_of("A1").exists()
    assert rows["B1"].num_tiles == 4


def test_a_vanished_slide_costs_its_row(workspace, paint, monkeypatch):
    gone = paint("A1.tif", width_px=512, height_px=512).path
    paint("B1.tif", width_px=512, height_px=512)
    real = tiling.tile_slide

    def tile_slide(job, report):
        gone.unlink(missing_ok=True)
        return real(job, report)

    monkeypatch.setattr(tiling, "tile_slide", tile_slide)
    rows = {row.slide: row for row in tile_archive(gone.parent, workspace, everything(), 0)}
    assert rows["A1"].tile_status == "failed"
    assert rows["A1"].reason == "not there any more"
    assert rows["B1"].num_tiles == 4


def test_a_slide_that_is_still_being_copied_is_not_taken_for_whole(workspace, paint, monkeypatch):
    painted = paint("A1.tif", width_px=512, height_px=512)
    real = StoreWriter.add

    def add(self, *values):
        os.utime(painted.path)
        real(self, *values)

    monkeypatch.setattr(StoreWriter, "add", add)
    row = only_row(tile_archive(painted.path.parent, workspace, everything(), 0))
    assert "changed while it was tiled" in row.reason
    assert find_zips(workspace.tiles) == []


def test_full_disk_ends_the_run_in_one_line_and_keeps_what_is_finished(workspace, paint, monkeypatch):
    for name in ("A1.tif", "B1.tif", "C1.tif"):
        directory = paint(name, width_px=512, height_px=512).path.parent
    real = StoreWriter.add

    def add(self, *values):
        if (workspace.tiles / "A1.zip").exists():
            raise OSError(28, "No space left on device")
        real(self, *values)

    monkeypatch.setattr(StoreWriter, "add", add)
    with pytest.raises(HistosslError, match="No space left on device; slides finished so far are kept"):
        tile_archive(directory, workspace, everything(), 0)
    monkeypatch.undo()
    assert [path.name for path in find_zips(workspace.tiles)] == ["A1.zip"]
    # Of the others nobody knows yet whether they are ok.
    assert [(row.file, row.tile_status) for row in read_ledger(workspace.archive_csv)] == [("A1.tif", "tiled")]
    assert all(row.num_tiles == 4 for row in tile_archive(directory, workspace, everything(), 0))


def test_too_coarse_a_scan_is_an_error_and_a_little_coarse_a_warning(workspace, paint):
    paint("coarse.tif", mpp=1.2, width_px=512, height_px=512)
    directory = paint("little.tif", mpp=0.6, width_px=512, height_px=512).path.parent
    rows = {row.slide: row for row in tile_archive(directory, workspace, everything(), 0)}
    assert "too coarse for tiles at 0.5" in rows["coarse"].reason
    assert "enlarged" in rows["little"].reason
    assert rows["little"].num_tiles == 4


def test_real_slides_each_have_a_row_with_a_reason(workspace, real_data):
    rows = {row.file: row for row in tile_archive(real_data / "slides", workspace, TileConfig(), 0)}
    assert rows["CMU-1-Small-Region.svs"].num_tiles > 20
    assert "--slide-mpp" in rows["TCGA-CR-7395-01A-01-TS1.svs"].reason
    assert all(row.tile_reason for row in rows.values() if not row.num_tiles)


def test_damaged_real_slides_each_have_a_row_with_a_reason(workspace, real_data):
    rows = tile_archive(real_data / "damaged", workspace, TileConfig(), 0)
    assert len(rows) == 4
    assert all(row.tile_status == "failed" and row.tile_reason for row in rows)


def test_jpeg_2000_slide_is_read_and_labels_are_not(workspace, real_data):
    rows = {row.slide: row for row in tile_archive(real_data / "slides", workspace, TileConfig(), 0, slide_mpp=0.25)}
    assert rows["TCGA-CR-7395-01A-01-TS1"].tile_way == "stitched"
    assert rows["TCGA-CR-7395-01A-01-TS1"].num_tiles > 20


def test_a_mended_slide_is_tiled_anew(workspace, paint):
    painted = paint("A1.tif", pyramid=False)
    whole = painted.path.read_bytes()
    damage_native_tiles(painted.path, [5])
    assert only_row(tile_archive(painted.path.parent, workspace, everything(), 0)).rejected_damaged == 1
    before = stamps(workspace)
    tile_archive(painted.path.parent, workspace, everything(), 0)
    assert stamps(workspace) == before
    painted.path.write_bytes(whole)
    os.utime(painted.path, (2e9, 2e9))
    with pytest.raises(MismatchError, match="same size, other content"):
        tile_archive(painted.path.parent, workspace, everything(), 0)
    row = only_row(tile_archive(painted.path.parent, workspace, everything(), 0, retry=True))
    assert (row.num_tiles, row.status, row.reason) == (16, "ok", "")  # nor does the old warning stay


def test_retry_tries_damaged_tiles_again(workspace, paint):
    painted = paint("A1.tif", pyramid=False)
    damage_native_tiles(painted.path, [5])
    tile_archive(painted.path.parent, workspace, everything(), 0)
    before = stamps(workspace)
    tile_archive(painted.path.parent, workspace, everything(), 0, retry=True)
    assert stamps(workspace) != before


def test_scan_s_own_warning_outlives_tiling(workspace, paint):
    painted = paint("A1.tif", width_px=512, height_px=512)
    write_ledger(workspace.archive_csv, [LedgerRow("A1.tif", "warning", "pale", "A1")])
    row = only_row(tile_archive(painted.path.parent, workspace, everything(), 0))
    assert (row.status, row.reason, row.num_tiles) == ("warning", "pale", 4)


def test_a_scale_that_an_option_gave_must_be_given_again(workspace, paint):
    painted = paint("A1.tif")
    tile_archive(painted.path.parent, workspace, everything(), 0, slide_mpp=0.25)
    tile_archive(painted.path.parent, workspace, everything(), 0, slide_mpp=0.25)
    with pytest.raises(MismatchError, match=r"0\.25 microns per pixel by --slide-mpp then, 0\.5 by itself now"):
        tile_archive(painted.path.parent, workspace, everything(), 0)


def test_a_slide_of_several_files_changes_with_each(tmp_path):
    (tmp_path / "A1").mkdir()
    (tmp_path / "A1.mrxs").write_bytes(b"x")
    data = tmp_path / "A1" / "Data0001.dat"
    data.write_bytes(b"abc")
    job = one_slide.TileJob(tmp_path / "A1.mrxs", "A1", "A1.mrxs", tmp_path / "A1.zip", TileConfig())
    before = one_slide.identity_of(job)
    assert one_slide.identity_of(job) == before
    os.utime(data, (2e9, 2e9))
    assert one_slide.identity_of(job) != before


def test_what_changed_while_it_was_tiled_is_tried_again_by_the_same_command(workspace, paint, monkeypatch):
    painted = paint("A1.tif", width_px=512, height_px=512)
    real = StoreWriter.add

    def add(self, *values):
        os.utime(painted.path, (2e9, 2e9))
        real(self, *values)

    monkeypatch.setattr(StoreWriter, "add", add)
    row = only_row(tile_archive(painted.path.parent, workspace, everything(), 0))
    assert (row.status, row.tile_status) == ("warning", "failed")  # it could be opened
    assert "run the command again" in row.reason
    assert only_row(tile_archive(painted.path.parent, workspace, everything(), 0)).num_tiles == 4


@pytest.mark.parametrize("error", [RuntimeError("odd"), OSError(5, "Input/output error"), StoreError("other version")])
def test_what_is_not_the_slides_fault_is_tried_again_by_itself(workspace, paint, monkeypatch, error):
    painted = paint("A1.tif", width_px=512, height_px=512)
    monkeypatch.setattr(tiling, "tile_slide", lambda job, report: (_ for _ in ()).throw(error))
    assert only_row(tile_archive(painted.path.parent, workspace, everything(), 0)).tile_status == "failed"
    monkeypatch.undo()
    assert only_row(tile_archive(painted.path.parent, workspace, everything(), 0)).num_tiles == 4


def test_a_slide_that_vanishes_once_open_is_not_blamed_on_the_store(workspace, paint, monkeypatch):
    painted = paint("A1.tif", width_px=512, height_px=512)
    real = one_slide.cutter_for

    def cutter_for(*arguments):
        painted.path.unlink(missing_ok=True)
        return real(*arguments)

    def opened(path, *_, **__):
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(one_slide, "agrees", lambda cutter, slide, open_again, places: opened(painted.path))
    monkeypatch.setattr(one_slide, "cutter_for", cutter_for)
    force(monkeypatch, "read")
    row = only_row(tile_archive(painted.path.parent, workspace, everything(), 0))
    assert row.reason == "vanished while it was tiled"
    assert find_zips(workspace.tiles) == []


def test_a_link_to_nothing_is_told_as_such(workspace, paint):
    good = paint("A1.tif", width_px=512, height_px=512).path
    good.with_name("B1.svs").symlink_to(good.with_name("nowhere.svs"))
    rows = tile_archive(good.parent, workspace, everything(), 0)
    assert (rows[1].status, rows[1].reason) == ("unreadable", "a link to a file that is not there")


def test_a_full_disk_at_the_very_start_is_one_line(workspace):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(HistosslError, match="cannot be written"), alone_in_workspace(workspace, "tile"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_glass_that_the_scanner_left_out_is_no_damage(workspace, paint):
    painted = paint("A1.tif", pyramid=False)
    with tifffile.TiffFile(painted.path, mode="r+b") as tiff:
        counts = list(tiff.pages[0].databytecounts)
        offsets = list(tiff.pages[0].dataoffsets)
        counts[5] = offsets[5] = 0
        tiff.pages[0].tags["TileByteCounts"].overwrite(counts)
        tiff.pages[0].tags["TileOffsets"].overwrite(offsets)
    row = only_row(tile_archive(painted.path.parent, workspace, everything(), 0))
    assert (row.tile_way, row.num_tiles, row.rejected_damaged, row.rejected_tissue) == ("copied", 15, 0, 1)
    assert (row.status, row.reason) == ("ok", "")


def test_folds_and_grey_tiles_are_counted_and_left_out(workspace, paint):
    folded = paint("A1.tif", num_folds=3, width_px=2048, height_px=2048, pyramid=False).path
    limits = TissueConfig(min_tissue=0.1, min_sharpness=0, min_saturation=0, max_fold=0.05)
    row = only_row(tile_archive(folded.parent, workspace, TileConfig(tile_px=128, tissue=limits), 0))
    assert row.rejected_fold > 0
    pale = Workspace(workspace.root / "pale")
    for grid, settings in {"copied": {}, "stitched": {"tile_px": 128}}.items():
        at = Workspace(pale.root / grid)
        config = TileConfig(tissue=replace(ALL, min_saturation=0.99), **settings)
        row = only_row(tile_archive(folded.parent, at, config, 0))
        assert (row.rejected_saturation, row.num_tiles) == ((2048 // config.tile_px) ** 2, 0)


def test_mutants_of_a_slide_give_tiles_or_one_of_our_errors(workspace, paint):
    whole = paint("A1.tif", width_px=512, height_px=512).path.read_bytes()
    at = workspace.root / "mutant.tif"
    told, reasons = Counter(), []
    for seed in range(60):
        random = np.random.default_rng(seed)
        mutant = bytearray(whole)
        for _ in range(int(random.integers(1, 6))):
            # Half of them where the directories are, which is where a reader can be led astray.
            start = int(random.integers(0, 600 if random.random() < 0.5 else len(mutant)))
            length = int(random.integers(1, 40))
            mutant[start : start + length] = random.bytes(length)
        at.write_bytes(mutant[: int(random.integers(1, len(mutant)))] if seed % 6 == 0 else mutant)
        zip_path = workspace.zip_of(f"M{seed}")
        job = one_slide.TileJob(at, "M", "M.tif", zip_path, everything(), slide_mpp=0.5)
        try:
            outcome = one_slide.tile_slide(job, lambda count: None)
        except HistosslError as error:
            told["failed"] += 1
            reasons.append((str(error), zip_path.exists()))
            continue
        store = read_store(zip_path)
        assert len(store.table) == outcome.tiling["counts"]["tiles"]
        with zip_path.open("rb") as file:
            for row in store.table:
                file.seek(int(row["offset"]))
                jpeg = file.read(int(row["length"]))
                if store.tiling["scales"][0]["way"] != "copied":  # those are only glanced at
                    assert simplejpeg.decode_jpeg(jpeg).shape == (256, 256, 3)
                assert (jpeg[:2], jpeg[-2:]) == (b"\xff\xd8", b"\xff\xd9")
        told["tiled"] += 1
    assert all(reason and not left for reason, left in reasons)
    assert min(told["failed"], told["tiled"]) > 5
    assert hidden_parts(workspace.tiles) == []


# ---- one content, one zip


def test_a_file_beside_it_does_not_make_a_slide_another(workspace, paint):
    first = paint("P01-1.tif", width_px=512, height_px=512).path
    tile_archive(first.parent, workspace, everything(), 0)
    digest = TileIndex.open(workspace).digest
    shutil.copy(paint("other/P01-1.tif", width_px=512, height_px=512).path, first.with_suffix(".svs"))
    shutil.rmtree(first.parent / "other")
    tile_archive(first.parent, workspace, everything(), 0)
    assert [path.name for path in find_zips(workspace.tiles)] == ["P01-1.svs.zip", "P01-1.tif.zip"]
    index = TileIndex.open(workspace)
    assert index.facts("P01-1.tif")["file"] == "P01-1.tif"
    assert len(index) == 8
    first.with_suffix(".svs").unlink()
    tile_archive(first.parent, workspace, everything(), 0)
    assert TileIndex.open(workspace).facts("P01-1")["file"] == "P01-1.tif"
    workspace.zip_of("P01-1.svs").unlink()
    assert TileIndex.open(workspace).digest == digest


@pytest.mark.parametrize("anonymize", [False, True])
def test_a_renamed_slide_takes_its_tiles_along(workspace, paint, cli, anonymize):
    old = paint("A.tif", width_px=512, height_px=512).path
    config = everything(anonymize=anonymize)
    tile_archive(old.parent, workspace, config, 0)
    before = read_store(find_zips(workspace.tiles)[0])
    old.rename(old.with_name("B.tif"))
    row = only_row(tile_archive(old.parent, workspace, config, 0))
    assert (row.file, row.tile_status, row.num_tiles) == ("B.tif", "tiled", 4)
    (now,) = find_zips(workspace.tiles)
    assert (now.name == "B.zip") == (not anonymize)
    moved = read_store(now)
    assert (moved.digest, moved.table.tolist()) == (before.digest, before.table.tolist())
    assert moved.tiling["slide"] == {**before.tiling["slide"], "file": None if anonymize else "B.tif"}
    assert zipfile.ZipFile(now).testzip() is None
    gone = next(row for row in read_ledger(workspace.archive_csv) if row.file == "A.tif")
    assert (gone.num_tiles, gone.tile_status) == (None, "")
    assert "B.tif" in gone.reason
    if not anonymize:
        assert holders(workspace, ["B"]) == {"A": "B"}
    again = only_row(tile_archive(old.parent, workspace, config, 0))
    assert again == row


def test_a_subfolder_of_a_tiled_archive_is_not_tiled_again(workspace, paint, capsys):
    inner = paint("c1/A.tif", width_px=512, height_px=512).path.parent
    tile_archive(inner.parent, workspace, everything(), 0)
    before = stamps(workspace)
    row = only_row(tile_archive(inner, workspace, everything(), 0))
    assert row.tile_reason == "same content as c1/A.tif, which is tiled as A.zip"
    assert stamps(workspace) == before
    assert "of no file in" in capsys.readouterr().err
    assert only_row(tile_archive(inner.parent, workspace, everything(), 0)).num_tiles == 4


@pytest.mark.parametrize("anonymize", [False, True])
def test_a_copy_elsewhere_leaves_the_tiles_their_name_while_the_first_file_may_be_there(
    workspace, paint, tmp_path, cli, anonymize
):
    """A finished curve names its slides: tiles that went over to the copy's name would end it."""
    first = paint("A.tif", width_px=512, height_px=512).path
    paint("other.tif", width_px=512, height_px=512)
    tile_archive(first.parent, workspace, everything(anonymize=anonymize), 0)
    before, digest = stamps(workspace), TileIndex.open(workspace).digest
    new = tmp_path / "elsewhere"
    new.mkdir()
    shutil.copy(first, new / "neu.tif")
    away = tmp_path / "away"

    def tiled():
        return only_row(tile_archive(new, workspace, everything(anonymize=anonymize), 0))

    row = tiled()
    assert row.tile_reason.startswith("same content as A.tif, which is tiled as ")
    holder = next(path.stem for path in find_zips(workspace.tiles) if row.tile_twin == path.stem)
    assert SlideNames.of(TileIndex.open(workspace)).find("neu.tif") == (holder,)
    first.parent.rename(away)  # a disk that is not connected
    assert tiled() == row
    first.parent.mkdir()  # and where it would be, an empty folder
    assert tiled() == row
    assert (stamps(workspace), TileIndex.open(workspace).digest) == (before, digest)
    assert {row.file: row.num_tiles for row in read_ledger(workspace.archive_csv)}["A.tif"] == 4
    first.parent.rmdir()
    away.rename(first.parent)
    first.unlink()
    assert (tiled().num_tiles, workspace.zip_of("neu").exists()) == (4, not anonymize)


def test_an_archive_of_copies_is_not_one_without_tiles(workspace, paint, tmp_path, cli):
    first = paint("A.tif", width_px=512, height_px=512, mpp=0.5).path
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(first, tmp_path / "elsewhere" / "neu.tif")
    assert cli("tile", "--slides", first.parent, "-w", workspace.root).code == 0
    told = cli("tile", "--slides", tmp_path / "elsewhere", "-w", workspace.root)
    assert told.code == 0, told.err
    assert "neu.tif: same content as A.tif, which is tiled as A.zip" in " ".join(told.err.split())


@pytest.mark.parametrize("anonymize", [False, True])
def test_copies_and_links_are_tiled_once(workspace, paint, anonymize):
    config = everything(anonymize=anonymize)
    first = paint("B.tif", width_px=512, height_px=512).path
    shutil.copy(first, first.with_name("C.tif"))
    first.with_name("A.tif").symlink_to(first)
    for _ in range(2):
        rows = {row.file: row for row in tile_archive(first.parent, workspace, config, 0)}
        assert {file: row.num_tiles for file, row in rows.items()} == {"A.tif": 0, "B.tif": 4, "C.tif": 0}
        assert {rows[file].reason for file in ("A.tif", "C.tif")} == {"same content as B.tif"}
        assert len(find_zips(workspace.tiles)) == 1
        if not anonymize:
            assert holders(workspace, ["B"]) == {"A": "B", "C": "B"}
            assert workspace.zip_of("B").exists()


def test_slides_that_differ_in_one_place_only_are_two(workspace, paint):
    first = paint("A1.tif", pyramid=False).path
    shutil.copy(first, first.with_name("B1.tif"))
    damage_native_tiles(first.with_name("B1.tif"), [5])
    assert content.fingerprint(first) != content.fingerprint(first.with_name("B1.tif"), spots=content.SPOTS)
    rows = tile_archive(first.parent, workspace, everything(), 0)
    assert [row.num_tiles for row in rows] == [16, 15]


def test_a_large_thumbnail_gives_signs_of_life(tmp_path, paint, monkeypatch):
    painted = paint("A1.tif", pyramid=False)
    monkeypatch.setattr(reader, "MAX_READ_PX", 256 * 256)
    job = one_slide.TileJob(painted.path, "A1", "A1.tif", tmp_path / "A1.zip", everything())
    seen = []
    real = places.readable_thumbnail

    def readable_thumbnail(*arguments):
        before = len(reports)
        found = real(*arguments)
        seen.append(len(reports) - before)
        return found

    reports = []
    monkeypatch.setattr(places, "readable_thumbnail", readable_thumbnail)
    one_slide.tile_slide(job, reports.append)
    assert seen[0] >= 16


def test_a_slide_that_hung_is_told_how_to_get_more_time(workspace, paint, monkeypatch):
    painted = paint("A1.tif", width_px=512, height_px=512)
    hung = Event(0, "failed", "hung: nothing came of it for 300 s, so it was stopped")
    monkeypatch.setattr(tiling, "run_jobs", lambda *_: iter([hung]))
    assert "--time-limit" in only_row(tile_archive(painted.path.parent, workspace, everything(), 0)).reason


def test_a_zip_of_another_format_is_refused_and_kept(workspace, paint, monkeypatch):
    painted = paint("A1.tif", width_px=512, height_px=512)
    monkeypatch.setattr(store, "FORMAT", 2)
    tile_archive(painted.path.parent, workspace, everything(), 0)
    monkeypatch.undo()
    before = stamps(workspace)
    with pytest.raises(MismatchError, match="format 2"):
        tile_archive(painted.path.parent, workspace, everything(), 0)
    assert stamps(workspace) == before


def test_a_damaged_zip_is_told_and_made_anew(workspace, paint, capsys):
    painted = paint("A1.tif", width_px=512, height_px=512)
    tile_archive(painted.path.parent, workspace, everything(), 0)
    workspace.zip_of("A1").write_bytes(b"PK")
    assert only_row(tile_archive(painted.path.parent, workspace, everything(), 0)).num_tiles == 4
    assert "which makes it anew. Doing so now" in " ".join(capsys.readouterr().err.split())


def test_an_index_in_the_making_is_left_alone(workspace, paint):
    painted = paint("A1.tif", width_px=512, height_px=512)
    young, old, zipped = (
        workspace.tiles / name for name in (".index.npy.1-a.part", ".index.npy.2-b.part", ".A1.zip.3-c.part")
    )
    workspace.tiles.mkdir(parents=True)
    for path in (young, old, zipped):
        path.touch()
    os.utime(old, (1e9, 1e9))
    tile_archive(painted.path.parent, workspace, everything(), 0)
    assert [path.exists() for path in (young, old, zipped)] == [True, False, False]


# ---- anonymous stores


def test_an_anonymous_store_names_nobody(workspace, paint):
    for name in ("Doe-John/Doe-John-A1.tif", "Doe-John/Doe-John-A2.tif"):
        directory = paint(name, width_px=512, height_px=512).path.parent.parent
    config = everything(anonymize=True)
    tile_archive(directory, workspace, config, 0)
    index = TileIndex.open(workspace)
    assert len(index.slides) == 2
    for path in workspace.tiles.rglob("*"):
        assert "Doe" not in path.name
        assert path.is_dir() or b"Doe" not in path.read_bytes()
    for path in find_zips(workspace.tiles):
        assert read_store(path).tiling["slide"]["bytes"] not in {
            each.stat().st_size for each in directory.rglob("*.tif")
        }
    names = names_of(workspace)
    assert names.path.parent == workspace.root.parent
    assert names.path.stat().st_mode & 0o077 == 0
    assert sorted(names.name_of(slide) for slide in index.slides) == ["Doe-John/Doe-John-A1", "Doe-John/Doe-John-A2"]
    assert holders(workspace, index.slides) == {names.name_of(slide): slide for slide in index.slides}
    assert SlideNames.of(index).find("Doe-John-A2.svs") == (holders(workspace, index.slides)["Doe-John/Doe-John-A2"],)
    before = stamps(workspace)
    tile_archive(directory, workspace, config, 0)
    assert stamps(workspace) == before
    names.path.unlink()
    with pytest.raises(StoreError, match="key to the names"):
        tile_archive(directory, workspace, config, 0)


def test_the_same_slide_has_another_name_in_another_anonymous_store(tmp_path, painted_slide):
    names = []
    for place in ("one", "two"):
        at = Workspace(tmp_path / place)
        tile_archive(painted_slide.path.parent, at, everything(anonymize=True), 0)
        names += TileIndex.open(at).slides
    assert names[0] != names[1]


# ---- the command


def test_command_tiles_in_processes_and_tells_why_not(cli, workspace, paint):
    paint("bare.tif", write_mpp=False, width_px=512, height_px=512)
    directory = paint("good.tif", width_px=1024, height_px=1024).path.parent
    told = cli("tile", "--slides", directory, "-w", workspace.root, "--workers", 2)
    assert told.code == 0
    assert "tiles of 1 of 2 slides" in told.err
    assert "bare.tif: no microns-per-pixel" in told.err
    assert "--retry tries the failed ones again" in told.err
    assert TileIndex.open(workspace).slides == ["good"]


def test_command_tells_the_scale_of_copied_tiles_and_a_run_without_work(cli, workspace, paint):
    directory = paint("A1.tif", mpp=0.5, pyramid=False).path.parent
    told = " ".join(cli("tile", directory, "-w", workspace.root, "--mpp", 0.49, "--workers", 1).err.split())
    assert "own tiles are at 0.5 microns per pixel, where 0.49 was asked" in told
    assert "of 1 of 1 slide (1 copied)" in told
    assert "nothing new to tile" not in told
    assert "nothing new to tile" in cli("tile", directory, "-w", workspace.root, "--mpp", 0.49).err
    told = " ".join(cli("tile", directory, "-w", workspace.root, "--mpp", "0.49,1").err.split())
    assert "mpp was '0.49', now '0.49,1'" in told
    assert "coarser" not in told


def test_command_tells_what_it_warns_of_slides_that_were_tiled(capsys):
    told = "scanned at 0.5 microns per pixel: its tiles at 0.25 are enlarged"
    tell([LedgerRow(f"{name}.svs", num_tiles=2, tile_reason=told) for name in "ABCDE"])
    assert f"warning: A.svs, B.svs, C.svs and 2 more: {told}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--slides DIR"),
        (["--slides", "nowhere"], "no such folder"),
        (["--slides", ".", "--mpp", "fine"], "--mpp fine"),
        (["--slides", ".", "--mpp", "1,0.5"], "finest first"),
        (["--slides", ".", "--mpp", "0"], "--mpp 0"),
        (["--slides", ".", "--mpp", "0.5", "--mpp=1"], "--mpp 0.5,1"),
        (["--slides", ".", "--mpp", "-1"], "--mpp -1"),
        (["--slides", ".", "--tile-px", "3"], "--tile-px 3"),
        (["--slides", ".", "--grid", "nativ"], "did you mean 'native'"),
        (["--slides", ".", "--workers", "0"], "--workers 0"),
        (["--slides", ".", "--slide-mpp", "0"], "--slide-mpp 0"),
        (["--slides", ".", "--mpp-csv", "nowhere.csv"], "nowhere.csv"),
        (["--slides", ".", "--dask", "tcp://127.0.0.1:1", "--workers", "2"], "--workers"),
        (["--slides", ".", "--dask", "tcp://127.0.0.1:1", "--time-limit", "60"], "--time-limit"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(cli, workspace, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slide.tif").write_bytes(b"II*\0" + bytes(100))
    told = cli("tile", "-w", workspace.root, *arguments)
    assert told.code == 2
    assert words in told.err
    assert told.err.count("error:") == 1


def test_no_slides_and_no_tiles_are_exit_1(cli, workspace, tmp_path):
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "notes.txt").write_text("none yet")
    told = cli("tile", "--slides", tmp_path / "slides", "-w", workspace.root)
    assert (told.code, "no slides in it" in told.err) == (1, True)
    (tmp_path / "slides" / "broken.svs").write_bytes(b"garbage" * 100)
    told = cli("tile", "--slides", tmp_path / "slides", "-w", workspace.root, "--workers", 1)
    assert told.code == 1
    assert "broken.svs: not a slide" in told.err


def test_bench_tile_refuses_in_one_line(cli, tmp_path):
    path = tmp_path / "region.png"
    Image.new("RGB", (600, 600), (200, 120, 170)).save(path)
    told = cli("bench", "tile", path, "--slide-mpp", 0.5)
    assert told.code == 1
    assert "OpenSlide cannot read it" in told.err
    for wrong in ("0", "-1"):
        told = cli("bench", "tile", path, "--slide-mpp", wrong)
        assert told.code == 2
        assert f"--slide-mpp {wrong}: must be" in told.err


def test_bench_tile_prints_each_way(cli, painted_slide):
    told = cli("bench", "tile", painted_slide.path, "--tiles", 4, "--repeats", 1)
    assert told.code == 0
    assert all(way in told.out + told.err for way in ("copied", "stitched", "read, no filters", "times faster"))


def test_bench_tile_cuts_from_handles_that_have_read_nothing(painted_slide, monkeypatch):
    """OpenSlide's cache holds a small slide whole, once the thumbnail has been read of it."""
    cut, looked_at = [], []
    cutter_for, making = tiling_rates.cutter_for, tiling_rates.Making
    monkeypatch.setattr(
        tiling_rates, "cutter_for", lambda slide, *rest: (cut.append(slide), cutter_for(slide, *rest))[1]
    )
    monkeypatch.setattr(tiling_rates, "Making", lambda job, *rest: (looked_at.append(rest[0]), making(job, *rest))[1])
    figures = tiling_rates.measure_tiling(painted_slide.path, TileConfig(), max_tiles=4, repeats=2)
    fresh = [slide for slide in cut if slide is not cut[0]]
    assert len(fresh) == len(looked_at) == 2 * len(figures)
    assert len({id(slide) for slide in (*fresh, *looked_at)}) == 4 * len(figures)


def test_native_grid_takes_the_scale_from_the_table(cli, workspace, paint):
    painted = paint("A1.tif", write_mpp=False)
    table = workspace.root / "mpp.csv"
    table.write_text("slide,mpp\nA1,0.5\n")
    arguments = ("tile", "--slides", painted.path.parent, "-w", workspace.root, "--grid", "native", "--workers", 1)
    assert cli(*arguments).code == 2
    told = cli(*arguments, "--mpp-csv", table)
    assert told.code == 0, told.err
    assert TileIndex.open(workspace).tile_px == 256


def test_settings_may_come_from_a_file(cli, workspace, painted_slide, tmp_path):
    (tmp_path / "tile.toml").write_text('tile-px = 128\nmpp = "0.5,1"\nmin_tissue = 0.25\n')
    told = cli("tile", "--slides", painted_slide.path.parent, "-w", workspace.root, "--config", tmp_path / "tile.toml")
    assert told.code == 0
    config = stored_config(workspace)
    assert (config.tile_px, config.mpps, config.tissue.min_tissue) == (128, (0.5, 1.0), 0.25)


def test_what_is_not_given_is_as_the_workspace_was_tiled(cli, workspace, paint, tmp_path):
    """As pretrain --slides does; what is given, in a file too, and differs is refused by itself."""
    first = paint("A1.tif", width_px=512, height_px=512, mpp=0.5).path

    def tile(*options):
        return cli("tile", "--slides", first.parent, "-w", workspace.root, "--workers", 1, *options)

    scales = ("--mpp", "0.5,1")
    settings = ("--tile-px", 128, "--grid", "physical", "--jpeg-quality", 80, "--min-tissue", 0.2, "--no-reject-pen")
    assert tile(*scales, *settings, "--anonymize").code == 0
    before = stored_config(workspace)
    paint("B1.tif", width_px=512, height_px=512, mpp=0.5)
    assert tile().code == 0
    assert len(find_zips(workspace.tiles)) == 2
    for options in (("--tile-px", 128), ("--mpp", "0.5,1"), ("--no-reject-pen", "--anonymize")):
        assert tile(*options).code == 0
    (tmp_path / "tile.toml").write_text("tile-px = 256\n")
    for options, differ in (
        (("--tile-px", 256), "tile-px was 128, now 256."),
        (("--config", tmp_path / "tile.toml"), "tile-px was 128, now 256."),
        (("--mpp", 0.5, "--grid", "native"), "mpp was '0.5,1', now '0.5'; grid was 'physical', now 'native'."),
        (("--min-tissue", 0.5), "min-tissue was 0.2, now 0.5."),
        (("--reject-pen",), "reject-pen was False, now True."),
    ):
        told = tile(*options)
        assert told.code == 2
        said = " ".join(told.err.split()).split("with other settings: ")[1].split(" Use the same")[0]
        assert sorted(said.strip(".").split("; ")) == sorted(differ.strip(".").split("; "))
    assert stored_config(workspace) == before


# ---- killed


def start(directory, root, *more):
    command = [sys.executable, "-m", "histossl", "tile", "--slides", str(directory), "-w", str(root), "--workers", "2"]
    # A job in a shell's background is told to ignore Ctrl-C, and so would its children be: as in a terminal, then.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([*command, *more], preexec_fn=heed, stderr=subprocess.PIPE, start_new_session=True)


def wait_for(condition, process, limit_s=60):
    until_s = time.monotonic() + limit_s
    while not condition() and process.poll() is None:
        assert time.monotonic() < until_s
        time.sleep(0.002)


def hidden_parts(root):
    return list(root.rglob("*.part"))


def test_killed_at_any_moment_nothing_is_lost_or_doubled(tmp_path, painted_archive):
    whole = Workspace(tmp_path / "whole")
    tile_archive(painted_archive.directory, whole, TileConfig(), 0)
    wanted = {path.name: path.read_bytes() for path in find_zips(whole.tiles)}
    broken = Workspace(tmp_path / "broken")
    moments = [
        lambda: hidden_parts(broken.tiles),  # while the first zip is written
        lambda: len(find_zips(broken.tiles)) >= 3,
        lambda: len(find_zips(broken.tiles)) >= 7,
    ]
    for moment in moments:
        process = start(painted_archive.directory, broken.root)
        wait_for(moment, process)
        process.kill()  # the parent alone: its workers must notice
        process.wait()
        process.stderr.close()
        for path in find_zips(broken.tiles):
            assert path.read_bytes() == wanted[path.name]
    process = start(painted_archive.directory, broken.root)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert {path.name: path.read_bytes() for path in find_zips(broken.tiles)} == wanted
    assert hidden_parts(broken.tiles) == []
    assert broken.archive_csv.read_text() == whole.archive_csv.read_text()
    assert TileIndex.open(broken).digest == TileIndex.open(whole).digest


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_kill_are_clean_and_the_same_command_goes_on(tmp_path, painted_archive, how, code):
    at = Workspace(tmp_path / "workspace")
    process = start(
        painted_archive.directory, at.root, "--mpp", "0.25", "--tile-px", "64", "--grid", "physical"
    )  # slowly
    wait_for(lambda: len(find_zips(at.tiles)) >= 2, process)
    os.killpg(process.pid, how)  # as a terminal does: to all of them
    _, told = process.communicate(timeout=30)
    assert process.returncode == code
    assert b"goes on from there" in told
    assert b"Traceback" not in told
    assert hidden_parts(at.tiles) == []
    assert 2 <= len(find_zips(at.tiles)) < 12
    rows = tile_archive(painted_archive.directory, at, TileConfig(mpp=0.25, tile_px=64, grid="physical"), 0)
    assert sum(row.num_tiles or 0 for row in rows) == len(TileIndex.open(at))


# ---- no patient data


def test_no_label_no_description_no_name_reaches_a_tile(workspace, real_data, tmp_path):
    shutil.copy(real_data / "slides" / "CMU-1-Small-Region.svs", tmp_path)
    for grid, settings in {"native": {"tile_px": 240}, "physical": {}}.items():
        at = Workspace(tmp_path / grid)
        tile_archive(tmp_path, at, replace(everything(**settings), grid=grid), 0)
        index = TileIndex.open(at)
        for number in range(len(index)):
            jpeg = index.read(number)
            image = Image.open(io.BytesIO(jpeg))
            assert not image.getexif()
            assert not {"icc_profile", "comment", "exif", "xmp"} & set(image.info)
            assert b"Aperio" not in jpeg
        for row in read_store(at.zip_of("CMU-1-Small-Region")).table:
            assert row["x_l0"] + 240 <= 2220
            assert row["y_l0"] + 240 <= 2967


@pytest.mark.parametrize("command", ["scan", "tile"])
def test_the_folder_is_taken_with_or_without_its_option(cli, tmp_path, command):
    (tmp_path / "slides").mkdir()
    for folder in ([tmp_path / "slides"], ["--slides", tmp_path / "slides"]):
        told = cli(command, *folder, "-w", tmp_path / "ws")
        assert (told.code, "no slides in it" in told.err) == (1, True)
    assert "name the folder" in cli(command, "-w", tmp_path / "ws").err
    assert "two folders" in cli(command, tmp_path, "--slides", tmp_path / "slides", "-w", tmp_path / "ws").err


def test_a_workspace_that_may_not_be_made_is_a_failure_and_a_file_in_its_place_a_wrong_name(
    cli, painted_archive, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    for command in ("scan", "tile"):
        assert cli(command, painted_archive.directory, "-w", tmp_path / "file").code == 2

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", denied)
    for command in ("scan", "tile"):
        told = cli(command, painted_archive.directory, "-w", tmp_path / "new")
        assert (told.code, "cannot be made (Permission denied)" in told.err) == (1, True)


def test_a_command_that_fails_at_once_leaves_no_workspace(cli, painted_archive, tmp_path):
    slides, bad = painted_archive.directory, tmp_path / "bad.csv"
    bad.write_text("slide,mpp\nA,none\n")
    for arguments in (
        ["tile", "nowhere"],
        ["tile", slides, "--mpp", "0"],
        ["tile", slides, "--mpp-csv", bad],
        ["tile", slides, "--grid", "nativ"],
        ["scan", "nowhere"],
        ["scan", slides, "--mpp-csv", bad],
        ["scan", slides, "--mpp", "text"],
    ):
        told = cli(*arguments, "-w", tmp_path / "ws")
        assert told.code in (1, 2)
        assert told.err.count("error:") == 1
        assert not (tmp_path / "ws").exists(), arguments
