"""One row per file with a reason in plain words; nothing a file does can stop the others."""

from __future__ import annotations

import csv
import errno
import os
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy import ndimage

from histossl.cli.scan import copies_at_other_size
from histossl.core.config import ScanConfig, TileConfig, TissueConfig
from histossl.core.errors import HistosslError, SlideError, StoreError
from histossl.core.workspace import Workspace
from histossl.demo.paint import PaintedSlide
from histossl.runtime.locks import alone_in_workspace
from histossl.runtime.process_pool import Event
from histossl.slides import scan as scanning
from histossl.slides.content import sampled
from histossl.slides.ledger import LedgerRow, read_ledger, write_ledger
from histossl.slides.scan import scan
from histossl.tiles import tiling
from histossl.tiles.tiling import tile_archive


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at files in this process: quick, and open to monkeypatching."""

    def run_jobs(function: Any, jobs: Any, num_workers: int, silence_s: float) -> Any:
        for number, job in enumerate(jobs):
            yield Event(number, "done", function(job, lambda count: None))

    monkeypatch.setattr(scanning, "run_jobs", run_jobs)


@pytest.fixture
def archive(tmp_path: Path, painted_slide: PaintedSlide) -> Path:
    """One good slide among all that can be wrong with a file."""
    folder = tmp_path / "archive"
    (folder / "case1").mkdir(parents=True)
    whole = painted_slide.path.read_bytes()
    shutil.copy(painted_slide.path, folder / "case1" / "A1.tif")
    (folder / "twin.tif").write_bytes(whole)
    (folder / "cut.tif").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.svs").touch()
    (folder / "zeros.ndpi").write_bytes(bytes(50_000))
    (folder / "garbage.scn").write_bytes(bytes(np.random.default_rng(0).integers(0, 256, 50_000, dtype=np.uint8)))
    (folder / "folder.svs").mkdir()
    (folder / "dangling.svs").symlink_to(folder / "nowhere.svs")
    (folder / "notes.txt").write_text("no slide")
    Image.new("RGB", (600, 600), "white").save(folder / "region.png")
    glass = np.full((1024, 1024, 3), 243, np.uint8)
    tifffile.imwrite(folder / "glass.tif", glass, tile=(256, 256), resolution=(20000, 20000), resolutionunit=3)
    tifffile.imwrite(folder / "screen.tif", glass, tile=(256, 256), resolution=(72, 72), resolutionunit=2)
    return folder


def reasons(rows: list[LedgerRow]) -> dict[str, tuple[str, str]]:
    return {row.file: (row.status, row.reason) for row in rows}


def test_each_file_has_one_row_that_says_what_is_wrong(archive: Path, workspace: Workspace) -> None:
    """The whole road, with worker processes."""
    rows = scan(archive, workspace, ScanConfig(), 2).rows
    found = reasons(rows)
    wanted = {
        "case1/A1.tif": ("ok", ""),
        "cut.tif": ("unreadable", "truncated"),
        "dangling.svs": ("unreadable", "link to nothing"),
        "empty.svs": ("unreadable", "0 bytes"),
        "folder.svs": ("unreadable", "a folder named like a slide"),
        "garbage.scn": ("unreadable", "not a slide"),
        "glass.tif": ("warning", "no tissue found"),
        "region.png": ("unreadable", "no microns-per-pixel in its metadata; list the slide"),
        "screen.tif": ("unreadable", "352.8 microns per pixel, which is implausible"),
        "twin.tif": ("warning", "same content as case1/A1.tif"),
        "zeros.ndpi": ("unreadable", "zeros"),
    }
    assert set(found) == set(wanted)
    for file, (status, reason) in wanted.items():
        assert found[file][0] == status, (file, found[file])
        assert reason in found[file][1]
    assert all(row.reason for row in rows if row.status != "ok")
    with workspace.archive_csv.open(newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == sorted(wanted)


@pytest.mark.usefixtures("here")
def test_row_tells_what_the_slide_is(painted_slide: PaintedSlide, workspace: Workspace) -> None:
    row = scan(painted_slide.path.parent, workspace, ScanConfig(tile_px=128)).rows[0]
    assert (row.file, row.slide, row.vendor, row.format) == ("A1.tif", "A1", "generic-tiff", "TIFF")
    assert (row.width_l0, row.height_l0, row.mpp, row.mpp_source) == (1024, 1024, 0.5, "TIFF resolution tag")
    assert (row.compression, row.native_tile, row.stain) == ("JPEG", "256x256", "H&E")
    assert row.levels.startswith("1024x1024 ")
    assert row.bytes == painted_slide.path.stat().st_size
    true_mm2 = painted_slide.tissue_mask.sum() * (painted_slide.mask_downsample * 0.5e-3) ** 2
    assert row.tissue_mm2 == pytest.approx(true_mm2, rel=0.1)
    # 64 places of 128 px; those with half tissue, by the painter's own mask (16 px a cell, 8 cells a tile)
    share = painted_slide.tissue_mask.reshape(8, 8, 8, 8).mean(axis=(1, 3))
    assert row.expected_tiles == pytest.approx((share >= 0.5).sum(), abs=4)
    assert row.expected_mb is not None
    assert 0.001 < row.expected_mb / row.expected_tiles < 0.05


@pytest.mark.usefixtures("here")
def test_expected_tiles_follow_the_scale(painted_slide: PaintedSlide, workspace: Workspace) -> None:
    def tiles(**options: Any) -> int:
        count = scan(painted_slide.path.parent, workspace, ScanConfig(**options)).rows[0].expected_tiles
        assert count is not None
        return count

    assert tiles(tile_px=64) > 3 * tiles(tile_px=128) > 0
    assert tiles(tile_px=64, coarser_mpp=(1.0,)) == tiles(tile_px=64) + tiles(tile_px=64, mpp=1.0)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("mpp", "count", "reason"), [(0.499, 4, ""), (1.1, 0, "too coarse for tiles at 0.5")])
def test_scan_expects_the_tiles_that_tile_cuts(
    paint: Callable[..., PaintedSlide], workspace: Workspace, mpp: float, count: int, reason: str
) -> None:
    directory = paint("A1.tif", mpp=mpp, width_px=512, height_px=512).path.parent
    scanned = scan(directory, workspace, ScanConfig(tissue=KEEP)).rows[0]
    tiled = tile_archive(directory, workspace, TileConfig(tissue=KEEP), 0)[0]
    assert (scanned.expected_tiles, tiled.num_tiles or 0) == (count, count)
    assert reason in scanned.reason
    assert reason in tiled.reason


KEEP = TissueConfig(min_tissue=0, min_sharpness=0, min_saturation=0, max_fold=1, max_ink=1)
GREY = {"photometric": "minisblack"}


def painted(paint: Callable[..., PaintedSlide], **options: Any) -> np.ndarray:
    path = paint("source.tif", **{"seed": 3, "mpp": 0.5, "pyramid": False, **options}).path
    pixels = tifffile.imread(path)
    path.unlink()
    return pixels


def written(folder: Path, pixels: np.ndarray, mpp: float = 0.5, **options: Any) -> None:
    resolution = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(folder / "A1.tif", pixels, **{"photometric": "rgb", "tile": (256, 256), **resolution, **options})


# What is done to a slide of 1024 px, the options of both commands, and what takes most of its tiles.
KINDS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any], dict[str, Any], str]] = {
    "coloured": (lambda pixels: pixels, {}, {}, ""),
    "grey of three channels": (
        lambda p: p.mean(2, keepdims=True).repeat(3, 2).astype("u1"),
        {},
        {},
        "--min-saturation",
    ),
    "grey of one channel": (lambda pixels: pixels.mean(2).astype("u1"), GREY, {}, "--min-saturation"),
    "pale": (lambda p: (p.mean(2, keepdims=True) * 0.97 + p * 0.03).astype("u1"), {}, {}, "--min-saturation"),
    "blurred": (lambda p: ndimage.gaussian_filter(p, (6, 6, 0)), {}, {}, "--min-sharpness"),
    "blurred, kept": (
        lambda p: ndimage.gaussian_filter(p, (6, 6, 0)),
        {},
        {"tissue": TissueConfig(min_sharpness=0)},
        "",
    ),
    "tiny": (lambda pixels: pixels[:200, :200], {}, {}, "smaller than one tile"),
    "one tile": (lambda pixels: pixels[300:556, 300:556], {}, {}, ""),
    "blank": (lambda pixels: np.full_like(pixels, 244), {}, {}, ""),
    "no filter": (lambda pixels: pixels, {}, {"tissue": KEEP}, ""),
    "much tissue asked": (lambda pixels: pixels, {}, {"tissue": TissueConfig(min_tissue=1.0)}, ""),
    "two scales": (lambda pixels: pixels, {}, {"coarser_mpp": (1.0, 2.0)}, ""),
    "another scale": (lambda pixels: pixels, {}, {"mpp": 0.7}, ""),
    "native grid": (lambda pixels: pixels[:1000, :1000], {"compression": "jpeg"}, {"mpp": 0.51, "grid": "native"}, ""),
    "native by itself": (lambda pixels: pixels[:1000, :1000], {"compression": "jpeg"}, {"mpp": 0.51}, ""),
    "physical though native": (
        lambda p: p[:1000, :1000],
        {"compression": "jpeg"},
        {"mpp": 0.51, "grid": "physical"},
        "",
    ),
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", KINDS)
def test_scan_and_tile_agree(kind: str, paint: Callable[..., PaintedSlide], workspace: Workspace, tmp_path) -> None:
    change, layout, options, filter_ = KINDS[kind]
    folder = tmp_path / "archive"
    folder.mkdir()
    written(folder, np.ascontiguousarray(change(painted(paint))), **layout)
    scanned = scan(folder, workspace, ScanConfig(**options), 1).rows[0]
    tiled = tile_archive(folder, workspace, TileConfig(**options), 0)[0]
    assert scanned.expected_tiles == tiled.num_tiles, (scanned.reason, tiled.tile_reason)
    assert (scanned.status == "ok") == (tiled.num_tiles > 0) == (not tiled.tile_reason)
    if filter_:
        assert tiled.num_tiles == 0
        assert filter_ in scanned.reason
        assert filter_ in tiled.tile_reason


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "options",
    [{"pens": ("blue", "black"), "seed": 4}, {"num_folds": 3}, {"num_blurs": 3}, {"look": "pale"}, {"look": "fat"}],
    ids=str,
)
def test_scan_and_tile_nearly_agree_where_a_tile_is_judged_by_its_pixels(
    options: dict[str, Any], paint: Callable[..., PaintedSlide], workspace: Workspace
) -> None:
    """A copied tile whose bytes leave no doubt is not decoded: that is all the difference."""
    settings = {"tile_px": 128, "tissue": TissueConfig(max_fold=0.1)}
    folder = paint("A1.tif", **{"seed": 3, "mpp": 0.5, **options}).path.parent
    scanned = scan(folder, workspace, ScanConfig(**settings), 1).rows[0]
    tiled = tile_archive(folder, workspace, TileConfig(**settings), 0)[0]
    assert tiled.num_tiles > 5
    assert scanned.expected_tiles == pytest.approx(tiled.num_tiles, abs=3)


@pytest.mark.usefixtures("here")
def test_expected_tiles_follow_the_settings_of_tiling(painted_slide: PaintedSlide, workspace: Workspace) -> None:
    def look(tissue: TissueConfig = TissueConfig(), **options: Any) -> LedgerRow:
        return scan(painted_slide.path.parent, workspace, ScanConfig(tile_px=128, tissue=tissue, **options)).rows[0]

    assert look(KEEP).expected_tiles == 64, "no filter: tile cuts the glass too"
    assert look(TissueConfig(min_tissue=0)).expected_tiles < 64, "glass has no colour, and no focus"
    assert look().expected_tiles < 64
    assert look(jpeg_quality=50).expected_mb < 0.7 * look().expected_mb
    assert ScanConfig().jpeg_quality == TileConfig().jpeg_quality


@pytest.mark.usefixtures("here")
def test_given_scales_count_and_say_so(archive: Path, workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "mpp.csv").write_text("slide,mpp\nregion,0.25\n")
    config = ScanConfig(slide_mpp=0.5, mpp_csv=str(tmp_path / "mpp.csv"))
    rows = {row.file: row for row in scan(archive, workspace, config).rows}
    assert (rows["region.png"].mpp, rows["region.png"].mpp_source) == (0.25, "--mpp-csv")
    assert (rows["screen.tif"].mpp, rows["screen.tif"].mpp_source) == (0.5, "--slide-mpp")


@pytest.mark.usefixtures("here")
def test_known_rows_are_kept_until_the_file_or_the_settings_change(
    tmp_path: Path, painted_slide: PaintedSlide, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "archive"
    folder.mkdir()
    shutil.copy(painted_slide.path, folder / "A1.tif")
    (folder / "B1.svs").touch()
    looked: list[str] = []
    look_at = scanning.look_at
    monkeypatch.setattr(scanning, "look_at", lambda job, report: (looked.append(job.row.file), look_at(job, report))[1])

    def looked_at(config: ScanConfig = ScanConfig(), **options: Any) -> list[str]:
        looked.clear()
        scan(folder, workspace, config, **options)
        return sorted(looked)

    assert looked_at() == ["A1.tif", "B1.svs"]
    assert looked_at() == ["B1.svs"], "what was unreadable may have been mended"
    assert looked_at(again=True) == ["A1.tif", "B1.svs"]
    assert looked_at(ScanConfig(tile_px=128)) == ["A1.tif", "B1.svs"]
    assert looked_at(ScanConfig(tile_px=128, slide_mpp=0.4)) == ["A1.tif", "B1.svs"]
    assert looked_at(ScanConfig(tile_px=128, slide_mpp=0.4)) == ["B1.svs"]
    os.utime(folder / "A1.tif", (time.time(), time.time() + 5))
    assert looked_at(ScanConfig(tile_px=128, slide_mpp=0.4)) == ["A1.tif", "B1.svs"]


@pytest.mark.usefixtures("here")
def test_what_tiling_wrote_survives_a_scan(painted_slide: PaintedSlide, workspace: Workspace) -> None:
    rows = [
        LedgerRow("A1.tif", slide="A1", num_tiles=7, tile_status="tiled", rejected_blur=3, extra={"block": "B7"}),
        LedgerRow("gone.svs", slide="gone", num_tiles=5, tile_status="tiled"),
        LedgerRow("never.svs", "unreadable", "empty", slide="never"),
    ]
    write_ledger(workspace.archive_csv, rows)
    scan(painted_slide.path.parent, workspace, ScanConfig())
    after = {row.file: row for row in read_ledger(workspace.archive_csv)}
    assert (after["A1.tif"].num_tiles, after["A1.tif"].rejected_blur, after["A1.tif"].extra) == (7, 3, {"block": "B7"})
    assert after["A1.tif"].width_l0 == 1024
    assert "not in the folder any more" in after["gone.svs"].reason
    assert "never.svs" not in after


@pytest.mark.usefixtures("here")
def test_a_scan_of_another_folder_keeps_the_first_one_s_rows(
    painted_slide: PaintedSlide, tmp_path: Path, workspace: Workspace
) -> None:
    for name in ("one/A1.tif", "two/B1.tif"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(painted_slide.path, tmp_path / name)
    for folder in ("one", "two", "one"):
        scan(tmp_path / folder, workspace, ScanConfig())
    assert reasons(read_ledger(workspace.archive_csv)) == {"A1.tif": ("ok", ""), "B1.tif": ("ok", "")}
    (tmp_path / "one" / "A1.tif").rename(tmp_path / "one" / "A2.tif")
    scan(tmp_path / "one", workspace, ScanConfig())
    assert [row.file for row in read_ledger(workspace.archive_csv)] == ["A2.tif", "B1.tif"]


@pytest.mark.usefixtures("here")
def test_scan_and_tile_agree_which_of_copies_is_the_slide(
    tmp_path: Path, painted_slide: PaintedSlide, workspace: Workspace, cli: Callable[..., Any]
) -> None:
    folder = tmp_path / "copies"
    folder.mkdir()
    shutil.copy(painted_slide.path, folder / "B.tif")
    shutil.copy(painted_slide.path, folder / "C.tif")
    (folder / "A.tif").symlink_to(folder / "B.tif")
    told = cli("scan", folder, "-w", workspace.root, "--workers", 1)
    rows = {row.file: row for row in read_ledger(workspace.archive_csv)}
    assert {file: row.duplicate_of for file, row in rows.items()} == {"A.tif": "B.tif", "B.tif": "", "C.tif": "B.tif"}
    assert f"about {rows['B.tif'].expected_tiles} tiles" in " ".join(told.err.split())
    tiled = {row.file: row for row in tile_archive(folder, workspace, TileConfig(), 0)}
    assert {file: row.reason for file, row in tiled.items()} == {file: row.reason for file, row in rows.items()}
    (folder / "B.tif").rename(folder / "D.tif")
    (folder / "A.tif").unlink()
    tile_archive(folder, workspace, TileConfig(), 0)
    again = scan(folder, workspace, ScanConfig(), num_workers=1).rows
    assert [row.duplicate_of for row in again if not row.num_tiles] == [row.file for row in again if row.num_tiles]


def test_duplicates_are_forgotten_when_the_twin_goes(
    tmp_path: Path, painted_slide: PaintedSlide, workspace: Workspace
) -> None:
    folder = tmp_path / "archive"
    folder.mkdir()
    for name in ("A1.tif", "B1.tif"):
        shutil.copy(painted_slide.path, folder / name)
    changed = bytearray(painted_slide.path.read_bytes())
    changed[-1] ^= 1
    (folder / "C1.tif").write_bytes(changed)
    rows = {row.file: row for row in scan(folder, workspace, ScanConfig()).rows}
    assert (rows["A1.tif"].duplicate_of, rows["B1.tif"].duplicate_of) == ("", "A1.tif")
    assert rows["C1.tif"].duplicate_of == "", "one byte differs"
    (folder / "A1.tif").unlink()
    rows = {row.file: row for row in scan(folder, workspace, ScanConfig()).rows}
    assert (rows["B1.tif"].status, rows["B1.tif"].reason, rows["B1.tif"].duplicate_of) == ("ok", "", "")


@pytest.mark.usefixtures("here")
def test_damage_inside_is_found(tmp_path: Path, paint: Callable[..., PaintedSlide], workspace: Workspace) -> None:
    """Level 0 is overwritten here and there; the thumbnail, made from smaller levels, looks perfect."""
    path = paint("A1.tif").path
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        for offset, count in zip(tiff.pages[0].dataoffsets, tiff.pages[0].databytecounts, strict=True):
            content[offset : offset + count] = bytes(count)
    path.write_bytes(content)
    row = scan(path.parent, workspace, ScanConfig()).rows[0]
    assert row.status == "unreadable"
    assert row.reason.startswith("damaged")
    assert row.width_l0 == 1024, "what was found before the damage stays in the row"


def test_a_crash_and_a_hang_cost_their_own_row(
    archive: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from histossl.runtime import process_pool

    look_at = scanning.look_at

    def answers(function: Any, jobs: Any, num_workers: int, silence_s: float) -> Any:
        real = process_pool.run_jobs(sabotaged if function is look_at else function, jobs, num_workers, silence_s)
        yield from real

    monkeypatch.setattr(scanning, "run_jobs", answers)
    found = reasons(scan(archive, workspace, ScanConfig(time_limit_s=4), 2).rows)
    assert found["case1/A1.tif"] == ("ok", "")
    assert found["glass.tif"][0] == "unreadable"
    assert "crashed" in found["glass.tif"][1]
    assert found["screen.tif"][0] == "unreadable"
    assert "longer than 4 s" in found["screen.tif"][1]


def test_what_hung_and_has_not_changed_costs_no_time_again_without_retry(
    tmp_path: Path, painted_slide: PaintedSlide, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "archive"
    folder.mkdir()
    path = folder / "A1.tif"
    shutil.copy(painted_slide.path, path)
    tried: list[str] = []

    def hanging_jobs(function: Any, jobs: Any, num_workers: int, silence_s: float) -> Any:
        tried.extend(getattr(function, "__name__", "") for _ in jobs)
        for number in range(len(jobs)):
            yield Event(number, "failed", "hung: nothing came of it", hung=True)

    monkeypatch.setattr(scanning, "run_jobs", hanging_jobs)
    monkeypatch.setattr(tiling, "run_jobs", hanging_jobs)
    config = TileConfig(tile_px=128)

    def scanned(**options: bool) -> tuple[int, str]:
        tried.clear()
        return len(scan(folder, workspace, ScanConfig(), 1, **options).rows), " ".join(tried)

    assert scanned() == (1, "look_at")
    assert scanned() == (1, "")
    assert scanned(again=True) == (1, "")
    (row,) = read_ledger(workspace.archive_csv)
    assert row.status == "unreadable"
    assert "--retry" in row.reason
    tried.clear()
    (row,) = tile_archive(folder, workspace, config, 1)
    assert not tried
    assert row.tile_status == "failed"
    assert "--retry" in row.tile_reason
    tile_archive(folder, workspace, config, 1, retry=True)
    assert tried == ["tile_slide"]
    assert scanned() == (1, ""), "what hung in tile is not tried in scan"
    assert scanned(retry=True) == (1, "look_at")
    os.utime(path, (1, 1))
    assert scanned() == (1, "look_at"), "it changed"
    monkeypatch.undo()
    os.utime(path, (2, 2))
    (row,) = scan(folder, workspace, ScanConfig(), 1).rows
    assert (row.status, row.hung) == ("ok", "")
    (row,) = tile_archive(folder, workspace, config, 0)
    assert (row.tile_status, row.hung) == ("tiled", "")


def test_a_disk_that_hangs_while_twins_are_compared_does_not_stop_the_scan(
    tmp_path: Path, painted_slide: PaintedSlide, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from histossl.runtime import process_pool

    folder = tmp_path / "archive"
    folder.mkdir()
    for name in ("A1.tif", "B1.tif", "C1.tif"):
        shutil.copy(painted_slide.path, folder / name)
    silent = {scanning.sampled: hanging}

    def answers(function: Any, jobs: Any, num_workers: int, silence_s: float) -> Any:
        yield from process_pool.run_jobs(silent.get(function, function), jobs, num_workers, silence_s)

    monkeypatch.setattr(scanning, "run_jobs", answers)
    rows = {row.file: row.duplicate_of for row in scan(folder, workspace, ScanConfig(time_limit_s=4), 2).rows}
    assert rows == {"A1.tif": "", "B1.tif": "", "C1.tif": "A1.tif"}


def hanging(files: tuple[Path, ...], report: Any) -> str:
    if files[0].name == "B1.tif":
        time.sleep(600)
    return sampled(files, report)


def sabotaged(job: Any, report: Any) -> Any:
    if job.row.file == "glass.tif":
        os.kill(os.getpid(), 11)
    if job.row.file == "screen.tif":
        time.sleep(600)
    return scanning.look_at(job, report)


@pytest.mark.usefixtures("here")
def test_a_slide_that_vanishes_has_a_reason(
    archive: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = scanning.walk

    def then_delete(directory: Path) -> Any:
        found = walk(directory)
        (archive / "glass.tif").unlink()
        return found

    monkeypatch.setattr(scanning, "walk", then_delete)
    found = reasons(scan(archive, workspace, ScanConfig()).rows)
    assert found["glass.tif"][0] == "unreadable"
    assert "no such file" in found["glass.tif"][1]


@pytest.mark.usefixtures("here")
def test_regions_limit_what_is_expected(tmp_path: Path, painted_slide: PaintedSlide, workspace: Workspace) -> None:
    folder = tmp_path / "archive"
    folder.mkdir()
    shutil.copy(painted_slide.path, folder / "A1.tif")
    everything = scan(folder, workspace, ScanConfig(tile_px=64)).rows[0]
    (folder / "A1.geojson").write_text(
        '{"type": "Polygon", "coordinates": [[[0, 0], [512, 0], [512, 1024], [0, 1024], [0, 0]]]}'
    )
    (folder / "B1.geojson").write_text("of no slide here")
    scanned = scan(folder, workspace, ScanConfig(tile_px=64))
    assert scanned.ignored == {".geojson": 1}, "the other one was used"
    half = scanned.rows[0]
    assert everything.expected_tiles is not None
    assert half.expected_tiles == pytest.approx(everything.expected_tiles / 2, rel=0.25)
    none = scan(folder, workspace, ScanConfig(tile_px=64, tissue=KEEP)).rows[0]
    assert none.expected_tiles == 8 * 16, "half of the places, with tissue or without"
    (folder / "A1.geojson").write_text("not json")
    assert "not a GeoJSON" in scan(folder, workspace, ScanConfig(tile_px=64)).rows[0].reason


@pytest.mark.usefixtures("here")
def test_an_unforeseen_error_stays_in_its_row(
    archive: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stain_of(*_: object) -> object:
        raise ZeroDivisionError("odd slide")

    monkeypatch.setattr(scanning, "stain_of", stain_of)
    found = reasons(scan(archive, workspace, ScanConfig()).rows)
    assert found["case1/A1.tif"] == ("unreadable", "unexpected ZeroDivisionError (odd slide)")
    assert found["empty.svs"][0] == "unreadable"


def test_empty_folder_is_told(tmp_path: Path, workspace: Workspace) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(HistosslError, match="no slides in it or its subfolders: it is empty"):
        scan(tmp_path / "none", workspace, ScanConfig())
    (tmp_path / "none" / "notes.txt").touch()
    with pytest.raises(HistosslError, match=r"only 1 \.txt"):
        scan(tmp_path / "none", workspace, ScanConfig())


@pytest.mark.data
@pytest.mark.usefixtures("here")
def test_real_slides(real_data: Path, workspace: Workspace) -> None:
    rows = {row.slide: row for row in scan(real_data / "slides", workspace, ScanConfig()).rows}
    assert len(rows) == 6
    small = rows["CMU-1-Small-Region"]
    assert (small.status, small.vendor, small.stain, small.mpp, small.native_tile) == (
        "ok",
        "aperio",
        "H&E",
        0.499,
        "240x240",
    )
    assert "no microns-per-pixel" in rows["TCGA-CR-7395-01A-01-TS1"].reason
    assert "smaller than one tile" in rows["boxes_dicom"].reason
    rows = {row.slide: row for row in scan(real_data / "slides", workspace, ScanConfig(slide_mpp=0.25)).rows}
    assert (rows["TCGA-CR-7395-01A-01-TS1"].status, rows["TCGA-CR-7395-01A-01-TS1"].stain) == ("ok", "H&E")
    assert "Orientation tag 6" in rows["test_orient6"].reason


# ---- the command


def test_command_tells_regions_that_no_slide_answers_to(
    painted_slide: PaintedSlide, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    (tmp_path / "regions").mkdir()
    (tmp_path / "regions" / "B1.geojson").touch()
    options = ("-w", tmp_path / "ws", "--workers", 1, "--regions", tmp_path / "regions")
    told = cli("scan", painted_slide.path.parent, *options)
    assert told.code == 2
    assert "B1.geojson" in told.err


def test_command_prints_rows_reasons_and_totals(archive: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    told = cli("scan", archive, "-w", tmp_path / "ws", "--workers", 1, "--contact-sheet")
    assert told.code == 0
    for words in (
        "case1/A1.tif",
        "11 files",
        "1 ok, 2 warning, 8 unreadable",
        "no microns-per-pixel",
        "archive.csv",
        "1 .txt",
    ):
        assert words in told.err
    page = (tmp_path / "ws" / "contact-sheet.html").read_text()
    assert page.count("<article") == 11


def test_scan_says_at_which_size_tiles_could_be_copied() -> None:
    svs = LedgerRow(
        "A1.svs", vendor="aperio", levels="4000x4000 1000x1000", mpp=0.25, compression="JPEG", native_tile="240x240"
    )
    rows = [svs, replace(svs, native_tile="256x256", vendor="hamamatsu"), replace(svs, compression="JPEG 2000")]
    told = copies_at_other_size(rows, ScanConfig(mpp=0.25))
    assert told.startswith("1 of the slides has JPEG tiles of 240 px at this scale: tile --grid native --tile-px 240 ")
    both = copies_at_other_size([svs, svs], ScanConfig(mpp=0.25))
    assert both.startswith("2 of the slides have JPEG tiles of 240 px")
    assert copies_at_other_size(rows, ScanConfig(mpp=1.01)) != ""
    assert copies_at_other_size(rows, ScanConfig(mpp=0.5)) == "", "no level of that scale"
    assert copies_at_other_size(rows, ScanConfig(mpp=0.25, tile_px=240)) == "", "they are copied as it is"
    assert copies_at_other_size([replace(svs, native_tile="")], ScanConfig(mpp=0.25)) == "", "JPEG in strips"


def test_command_fails_when_nothing_can_be_read(archive: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    for name in ("case1/A1.tif", "twin.tif", "glass.tif"):
        (archive / name).unlink()
    told = cli("scan", archive, "-w", tmp_path / "ws", "--workers", 1)
    assert told.code == 1
    assert "none of its" in told.err
    assert len(read_ledger(tmp_path / "ws" / "archive.csv")) == 8


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--mpp", "fine"], "--mpp fine"),
        (["--mpp", "0"], "--mpp 0"),
        (["--mpp", "0.5,0"], "--mpp 0"),
        (["--mpp", "0.5,nan"], "--mpp nan"),
        (["--mpp", "1,0.5"], "--mpp 1,0.5"),
        (["--mpp", "1,0.5,-1"], "--mpp -1"),
        (["--jpeg-quality", "0"], "--jpeg-quality 0"),
        (["--slide-mpp", "-1"], "--slide-mpp -1"),
        (["--slide-mpp", "0"], "--slide-mpp 0"),
        (["--slide-mpp", "text"], "--slide-mpp"),
        (["--tile-px", "3"], "--tile-px 3"),
        (["--workers", "0"], "--workers 0"),
        (["--time-limit", "0"], "--time-limit 0"),
        (["--regions", "nowhere"], "--regions nowhere"),
        (["--mpp-csv", "nowhere.csv"], "--mpp-csv nowhere.csv"),
    ],
)
def test_wrong_options_are_told(archive: Path, tmp_path: Path, cli: Any, options: list[str], told: str) -> None:
    answer = cli("scan", archive, "-w", tmp_path / "ws", *options)
    assert answer.code == 2
    assert told in answer.err


@pytest.mark.parametrize("command", ["scan", "tile"])
def test_a_second_folder_is_told_that_one_is_taken(tmp_path: Path, cli: Any, command: str) -> None:
    answer = cli(command, tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert answer.code == 2
    told = f"error: {command} takes one folder, and searches its subfolders too; not also {tmp_path}/b {tmp_path}/c"
    assert answer.err.splitlines() == [told]


def test_name_in_the_reason_is_not_repeated() -> None:
    assert scanning._without_name("A1.svs: no", Path("x/A1.svs")) == "no"
    assert str(SlideError("A1.svs: no")) == "A1.svs: no"


def test_an_interrupted_scan_keeps_what_it_has_seen(
    painted_slide: PaintedSlide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("A1.tif", "A2.tif", "A3.tif"):
        shutil.copy(painted_slide.path, tmp_path / name)
    workspace = Workspace(tmp_path / "ws")
    looked_at = scanning._looked_at

    def until_ctrl_c(*given: Any) -> Any:
        for number, seen in enumerate(looked_at(*given)):
            if number == 2:
                raise KeyboardInterrupt
            yield seen

    monkeypatch.setattr(scanning, "_looked_at", until_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        scan(tmp_path, workspace, ScanConfig(), num_workers=1)
    assert len(read_ledger(workspace.archive_csv)) == 2
    opened: list[str] = []
    monkeypatch.setattr(
        scanning, "_looked_at", lambda jobs, *rest: (opened.extend(j.row.file for j in jobs), looked_at(jobs, *rest))[1]
    )
    assert len(scan(tmp_path, workspace, ScanConfig(), num_workers=1).rows) == 3
    assert len(opened) == 1


def test_no_more_processes_than_cores_that_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert scanning._num_workers(range(100), None) == 2


@pytest.mark.usefixtures("here")
def test_a_killed_scan_has_written_what_it_has_seen(
    painted_slide: PaintedSlide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill gives no chance to write, so the ledger is written on the way; Ctrl-C among the twins loses no row."""
    for name in ("A1.tif", "A2.tif"):
        shutil.copy(painted_slide.path, tmp_path / name)
    workspace = Workspace(tmp_path / "ws")
    written: list[int] = []
    monkeypatch.setattr(scanning, "LEDGER_EVERY_S", -1)
    monkeypatch.setattr(
        scanning, "write_ledger", lambda path, rows: (written.append(len(rows)), write_ledger(path, rows))
    )

    def interrupted(*given: Any) -> Any:
        assert written == [1, 2]
        raise KeyboardInterrupt

    monkeypatch.setattr(scanning, "_with_duplicates", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scan(tmp_path, workspace, ScanConfig())
    assert written == [1, 2, 2]


def test_a_level_that_is_damaged_does_not_cost_the_slide(paint: Callable[..., Any], workspace: Workspace) -> None:
    """The thumbnail's level is destroyed: tissue is found on the next one, and tiles are expected as before."""
    slide = paint("A1.tif", width_px=2048, height_px=2048, mpp=0.5, seed=2).path
    whole = scan(slide.parent, workspace, ScanConfig(), 1).rows[0]
    with tifffile.TiffFile(slide) as tiff:
        pages = [level.pages[0] for level in tiff.series[0].levels]
        places = [each for page in pages[2:] for each in zip(page.dataoffsets, page.databytecounts, strict=True)]
    content = bytearray(slide.read_bytes())
    for start, length in places:
        content[start : start + length] = bytes(length)
    slide.write_bytes(content)
    row = scan(slide.parent, workspace, ScanConfig(), 1).rows[0]
    assert row.readable, row.reason
    assert row.expected_tiles == pytest.approx(whole.expected_tiles, rel=0.05)


def test_a_disk_that_takes_nothing_is_told_before_the_scan(
    painted_slide: PaintedSlide, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "_looked_at", lambda *_: pytest.fail("a slide was opened"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(HistosslError, match=r"cannot be written .*--workspace"):
            scan(painted_slide.path.parent, workspace, ScanConfig())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_read_only_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "open", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(HistosslError, match=r"cannot be written .Read-only file system"):
        write_ledger(tmp_path / "archive.csv", [])


def test_no_scan_while_a_run_writes_the_same_ledger(painted_slide: PaintedSlide, workspace: Workspace) -> None:
    with alone_in_workspace(workspace, "tile"), pytest.raises(StoreError, match=r"another .histossl tile. \(process"):
        scan(painted_slide.path.parent, workspace, ScanConfig())
    assert not workspace.archive_csv.exists()


def test_a_slide_of_which_only_large_tiles_are_all_damaged_is_promised_its_small_ones(tmp_path: Path) -> None:
    """As `tile` cuts them: each large place has a damaged tile of the file, most small ones have none."""
    noise = np.random.default_rng(0).integers(-30, 30, (1024, 1024, 3))
    pixels = (np.array([200, 90, 150]) + noise).astype(np.uint8)
    (tmp_path / "slides").mkdir()
    path = tmp_path / "slides" / "A1.tif"
    options: dict[str, Any] = {"photometric": "rgb", "tile": (128, 128), "compression": "deflate", "metadata": None}
    tifffile.imwrite(path, pixels, resolution=(20000, 20000), resolutionunit="CENTIMETER", **options)
    with tifffile.TiffFile(path) as tiff:
        places = [int(tiff.pages[0].dataoffsets[row * 8 + column]) for row in (1, 5) for column in (1, 5)]
    content = bytearray(path.read_bytes())
    for place in places:
        content[place : place + 400] = bytes(400)
    path.write_bytes(content)
    config = ScanConfig(tile_px=128, mpp=0.5, coarser_mpp=(2.0,), tissue=TissueConfig(min_sharpness=0))
    (row,) = scan(tmp_path / "slides", Workspace.at(tmp_path / "ws"), config, 1).rows
    assert row.status == "warning", row.reason
    assert "damaged" in row.reason
    assert row.expected_tiles is not None
    assert 40 <= row.expected_tiles <= 64
