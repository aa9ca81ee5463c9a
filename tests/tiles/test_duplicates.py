"""Two slides are one only if every byte is: samples of equal size are a suspicion, and a wrong label is the price."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import tifffile

from histossl.core.config import ScanConfig, TileConfig, TissueConfig
from histossl.labels.slide_lookup import holders
from histossl.slides import content
from histossl.slides.content import SAMPLE_BYTES, SPOTS, contents, files_of, fingerprint, samples_are_all
from histossl.slides.ledger import read_ledger
from histossl.slides.scan import scan
from histossl.tiles.store import duplicate_slides
from histossl.tiles.store.index import find_zips
from histossl.tiles.store.zip_store import read_store
from histossl.tiles.tiling import tile_archive

ALL = TissueConfig(min_tissue=0, min_sharpness=0, max_fold=1, max_ink=1, min_saturation=0)
CONFIG = TileConfig(tissue=ALL)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[bytes, bytes]:
    """Two slides without compression, of one size, that differ only between the samples of their bytes."""
    rng = np.random.default_rng(4)
    pixels = rng.integers(120, 200, (2048, 2048, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("pair") / "P1.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(256, 256), resolution=(20000, 20000), resolutionunit=3)
    first = path.read_bytes()
    assert not samples_are_all(path)
    seen = np.zeros(len(first), bool)
    for spots in (10, content.FEW_SPOTS, SPOTS):
        for spot in range(spots):
            start = (len(first) - SAMPLE_BYTES) * spot // (spots - 1)
            seen[start : start + SAMPLE_BYTES] = True
    second = np.frombuffer(first, np.uint8).copy()
    middle = np.arange(len(first)) // (len(first) // 10)  # of the file, where the tissue of a biopsy may lie
    second[~seen & (middle == 5)] ^= 0x40
    return first, second.tobytes()


def put(folder: Path, **slides: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in slides.items():
        (folder / f"{name}.tif").write_bytes(data)
    return folder


def tiled(folder: Path, workspace, **options):
    return {row.file: row for row in tile_archive(folder, workspace, CONFIG, 0, **options)}


def shows(zip_path: Path, data: bytes, tmp_path: Path) -> bool:
    """Whether a zip's tiles are the pixels of these bytes."""
    (tmp_path / "truth.tif").write_bytes(data)
    truth = tifffile.imread(tmp_path / "truth.tif").astype(int)
    store = read_store(zip_path)
    raw = zip_path.read_bytes()
    differences = []
    for row in store.table:
        tile = simplejpeg.decode_jpeg(raw[int(row["offset"]) :][: int(row["length"])]).astype(int)
        x, y = int(row["x_l0"]), int(row["y_l0"])
        # Noise does not survive JPEG, the mean of a tile does: 0x40 in two thirds of its bytes is more than 10 levels.
        differences.append(abs(tile.mean() - truth[y : y + 256, x : x + 256].mean()))
    return len(store.table) == 64 and max(differences) < 2


def test_the_two_slides_differ_where_no_sample_looks(pair, tmp_path) -> None:
    put(tmp_path, P1=pair[0], P2=pair[1])
    assert pair[0] != pair[1]
    for spots in (10, SPOTS):
        assert fingerprint(tmp_path / "P1.tif", spots=spots) == fingerprint(tmp_path / "P2.tif", spots=spots)


def test_slides_of_equal_samples_keep_their_own_tiles_and_labels(pair, tmp_path, workspace) -> None:
    folder = put(tmp_path / "slides", P1=pair[0], P2=pair[1])
    assert [row.duplicate_of for row in scan(folder, workspace, ScanConfig(), 1).rows] == ["", ""]
    rows = tiled(folder, workspace)
    assert {file: (row.num_tiles, row.tile_twin) for file, row in rows.items()} == {
        "P1.tif": (64, ""),
        "P2.tif": (64, ""),
    }
    for number, name in enumerate(("P1", "P2")):
        assert shows(workspace.zip_of(name), pair[number], tmp_path)
        assert not shows(workspace.zip_of(name), pair[1 - number], tmp_path)
    assert holders(workspace, ["P1", "P2"]) == {}


def test_a_copy_is_found_once_and_not_read_again(pair, tmp_path, workspace, monkeypatch) -> None:
    folder = put(tmp_path / "slides", P1=pair[0], P2=pair[0], P3=pair[1])
    assert {row.file: row.duplicate_of for row in scan(folder, workspace, ScanConfig(), 1).rows}["P2.tif"] == "P1.tif"
    compared: list[int] = []

    def counted(groups, *more):
        groups = list(groups)
        compared.append(sum(map(len, groups)))
        return contents(groups, *more)

    monkeypatch.setattr(duplicate_slides, "contents", counted)
    for _ in range(2):
        rows = tiled(folder, workspace)
        assert (rows["P2.tif"].tile_twin, rows["P3.tif"].tile_twin) == ("P1", "")
    assert compared[0] > 0
    assert compared[1] == 0
    os.utime(folder / "P2.tif", (1, 1))  # written to since: compared once more
    assert tiled(folder, workspace)["P2.tif"].tile_twin == "P1"
    assert compared[2] > 0
    (folder / "P2.tif").write_bytes(pair[1])
    rows = tiled(folder, workspace)
    assert rows["P2.tif"].tile_twin == "P3"
    assert {path.stem for path in find_zips(workspace.tiles)} == {"P1", "P3"}


def test_links_are_one_without_being_read(pair, tmp_path, monkeypatch) -> None:
    folder = put(tmp_path / "slides", P1=pair[0])
    (folder / "soft.tif").symlink_to(folder / "P1.tif")
    os.link(folder / "P1.tif", folder / "hard.tif")
    monkeypatch.setattr(content, "run_jobs", None)
    group = [files_of(path) for path in sorted(folder.iterdir())]
    assert len(set(contents([group], 1, 60).values())) == 1


def test_a_slide_in_a_gone_ones_place_is_not_that_one_for_its_samples(pair, tmp_path, workspace) -> None:
    folder = put(tmp_path / "slides", P1=pair[0])
    tiled(folder, workspace)
    (folder / "P1.tif").rename(tmp_path / "away.tif")
    rows = tiled(put(folder, P2=pair[1]), workspace)
    assert rows["P2.tif"].num_tiles == 64
    assert shows(workspace.zip_of("P2"), pair[1], tmp_path)
    assert shows(workspace.zip_of("P1"), pair[0], tmp_path)
    assert holders(workspace, ["P1", "P2"]) == {}


def test_a_renamed_slide_too_large_for_samples_is_cut_again_and_stands_once(pair, tmp_path, workspace) -> None:
    folder = put(tmp_path / "slides", P1=pair[0])
    tiled(folder, workspace)
    before = read_store(workspace.zip_of("P1")).digest
    (folder / "P1.tif").rename(folder / "P9.tif")
    row = tiled(folder, workspace)["P9.tif"]
    assert (row.num_tiles, row.tile_status) == (64, "tiled")
    assert [path.stem for path in find_zips(workspace.tiles)] == ["P9"]
    assert read_store(workspace.zip_of("P9")).digest == before
    gone = next(row for row in read_ledger(workspace.archive_csv) if row.file == "P1.tif")
    assert (gone.num_tiles, gone.tile_twin) == (None, "P9")
    assert "P9.tif" in gone.reason


@pytest.mark.parametrize("same", [True, False])
def test_a_copy_of_a_slide_whose_disk_is_away_is_known_by_its_tiles(pair, tmp_path, workspace, same: bool) -> None:
    first = put(tmp_path / "first", P1=pair[0])
    tiled(first, workspace)
    first.rename(tmp_path / "away")
    second = put(tmp_path / "second", N1=pair[0 if same else 1])
    for _ in range(2):
        row = tiled(second, workspace)["N1.tif"]
        assert (row.tile_twin, row.num_tiles) == (("P1", 0) if same else ("", 64))
        assert len(find_zips(workspace.tiles)) == (1 if same else 2)
    assert shows(workspace.zip_of("P1"), pair[0], tmp_path)


def test_a_slide_exchanged_in_its_place_is_not_taken_for_the_old_one(pair, tmp_path, workspace) -> None:
    folder = put(tmp_path / "slides", P1=pair[0])
    tiled(folder, workspace)
    old = workspace.zip_of("P1").stat().st_mtime_ns
    os.utime(folder / "P1.tif", (5, 5))  # copied without its time
    assert tiled(folder, workspace)["P1.tif"].num_tiles == 64
    assert workspace.zip_of("P1").stat().st_mtime_ns == old
    put(folder, P1=pair[1])
    for _ in range(2):
        row = tiled(folder, workspace)["P1.tif"]
        assert row.tile_status == "failed"
        assert "--retry" in row.tile_reason
    assert shows(workspace.zip_of("P1"), pair[0], tmp_path)
    assert tiled(folder, workspace, retry=True)["P1.tif"].num_tiles == 64
    assert shows(workspace.zip_of("P1"), pair[1], tmp_path)


def test_empty_files_are_nobodys_duplicates(tmp_path, workspace) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    for number in range(5):
        (folder / f"S{number}.svs").touch()
    for rows in (scan(folder, workspace, ScanConfig(), 1).rows, list(tiled(folder, workspace).values())):
        assert {(row.status, row.duplicate_of, row.tile_twin) for row in rows} == {("unreadable", "", "")}
        assert not any("same content" in row.reason for row in rows)


@pytest.mark.parametrize("where", ["Data0001.dat", "Slidedat.ini", "nowhere"])
def test_all_files_of_a_slide_count(tmp_path, workspace, where: str) -> None:
    for name in ("a", "b"):
        folder = tmp_path / "slides" / name
        folder.mkdir(parents=True)
        (folder.with_suffix(".mrxs")).write_bytes(b"stub")
        (folder / "Slidedat.ini").write_bytes(bytes(1000))
        (folder / "Data0001.dat").write_bytes(bytes(1 << 20))
    if where != "nowhere":
        changed = tmp_path / "slides" / "b" / where
        data = bytearray(changed.read_bytes())
        data[400 if where == "Slidedat.ini" else 20_000] = 1
        changed.write_bytes(data)
    rows = scan(tmp_path / "slides", workspace, ScanConfig(), 1).rows
    assert [row.duplicate_of for row in rows] == ["", "a.mrxs" if where == "nowhere" else ""]
    rows = tile_archive(tmp_path / "slides", workspace, CONFIG, 0)
    assert [row.tile_twin for row in rows] == ["", "a" if where == "nowhere" else ""]
    shutil.rmtree(tmp_path / "slides")
