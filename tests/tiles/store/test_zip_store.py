"""A zip of tiles is whole or absent, opens in any zip program, and tells the same bytes by offset."""

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image
from synthetic_store import synthetic_tile, write_synthetic_store

from histossl.core.errors import HistosslError, MismatchError, StoreError
from histossl.tiles.store import zip_store as store_module
from histossl.tiles.store.zip_store import StoreWriter, new_store, read_store

TILING = {"tile_px": 8, "scales": [{"name": "0.5", "mpp": 0.5}], "regions": [], "slide": {}, "config": {"mpp": 0.5}}


def write(path, tiles, scales=(0.5,)):
    with new_store(path, scales) as store:
        for place, data in tiles.items():
            store.add(*place[:2], data, tissue=0.75, scale=place[2] if len(place) > 2 else 0)
        store.finish({**TILING, "scales": [{"name": f"{mpp:g}", "mpp": mpp} for mpp in scales]})


def test_a_long_name_is_written(tmp_path):
    path = tmp_path / ("ä" * 120 + ".zip")
    write(path, {(0, 0): b"tile"})
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_any_zip_program_reads_the_tiles(workspace):
    index = write_synthetic_store(workspace, ["A1"], 12, tile_px=32)
    with zipfile.ZipFile(workspace.zip_of("A1")) as archive:
        assert archive.testzip() is None
        assert all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
        names = [name for name in archive.namelist() if name.endswith(".jpg")]
        assert len(names) == 12
        for number in range(12):
            x_l0, y_l0 = index.coords_l0([number])[0]
            assert archive.read(f"{x_l0}_{y_l0}.jpg") == index.read(number)
        assert json.loads(archive.read("tiling.json"))["tile_px"] == 32
    decoded = np.asarray(Image.open(io.BytesIO(index.read(11)))).astype(int)
    assert np.abs(decoded - synthetic_tile(0, 11, 32)).mean() < 3


def test_table_gives_place_length_tissue_in_row_order(tmp_path):
    tiles = {(512, 0): b"\xff\xd8b\xff\xd9", (0, 512): b"\xff\xd8cc\xff\xd9", (0, 0): b"\xff\xd8\xff\xd9"}
    write(tmp_path / "a.zip", tiles)
    store = read_store(tmp_path / "a.zip")
    assert [tuple(row[["x_l0", "y_l0"]].item()) for row in store.table] == [(0, 0), (512, 0), (0, 512)]
    raw = (tmp_path / "a.zip").read_bytes()
    for row in store.table:
        wanted = tiles[int(row["x_l0"]), int(row["y_l0"])]
        assert raw[row["offset"] : row["offset"] + row["length"]] == wanted
        assert row["tissue"] == 0.75


def test_same_tiles_give_the_same_zip_to_the_byte(tmp_path):
    for name in ("a.zip", "b.zip"):
        write(tmp_path / name, {(0, 0): b"one", (8, 0): b"two"})
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    write(tmp_path / "c.zip", {(8, 0): b"two", (0, 0): b"one"})
    assert read_store(tmp_path / "c.zip").digest == read_store(tmp_path / "a.zip").digest
    write(tmp_path / "d.zip", {(0, 0): b"one", (8, 0): b"twO"})
    assert read_store(tmp_path / "d.zip").digest != read_store(tmp_path / "a.zip").digest


def test_two_scales_may_share_a_corner(tmp_path):
    write(tmp_path / "a.zip", {(0, 0, 0): b"fine", (0, 0, 1): b"coarse"}, scales=(0.5, 2.0))
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.read("0.5/0_0.jpg") == b"fine"
        assert archive.read("2/0_0.jpg") == b"coarse"
    assert read_store(tmp_path / "a.zip").table["scale"].tolist() == [0, 1]


def test_a_failure_midway_leaves_nothing(tmp_path):
    with pytest.raises((TypeError, AttributeError)):
        write(tmp_path / "a.zip", {(0, 0): b"one", (8, 0): None})
    assert list(tmp_path.iterdir()) == []


def test_a_failure_midway_leaves_the_old_zip(tmp_path):
    write(tmp_path / "a.zip", {(0, 0): b"old"})
    before = (tmp_path / "a.zip").read_bytes()
    with pytest.raises((TypeError, AttributeError)):
        write(tmp_path / "a.zip", {(0, 0): b"new", (8, 0): None})
    assert (tmp_path / "a.zip").read_bytes() == before


def test_more_than_65535_members(tmp_path):
    write(tmp_path / "a.zip", {(x, 0): b"t" for x in range(70_000)})
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert len(archive.namelist()) == 70_002
        assert archive.read("69999_0.jpg") == b"t"
    assert len(read_store(tmp_path / "a.zip").table) == 70_000


def test_zip_larger_than_4_gib(tmp_path):
    # A sparse file: the writer believes that 5 GiB are already there, and the disk holds almost nothing of them.
    path = tmp_path / "a.zip"
    with new_store(path, [0.5]) as store:
        store.add(0, 0, b"first")
        store._file.seek(5 << 30)
        store._position = 5 << 30
        store.add(8, 0, b"beyond")
        store.finish(TILING)
    with zipfile.ZipFile(path) as archive:
        assert archive.read("8_0.jpg") == b"beyond"
        assert archive.read("0_0.jpg") == b"first"
    table = read_store(path).table
    assert table["offset"][1] > 5 << 30


def repack_without(path, name):
    """What a file manager does when someone deletes a tile."""
    with zipfile.ZipFile(path) as archive:
        members = {each: archive.read(each) for each in archive.namelist() if each != name}
    with zipfile.ZipFile(path, "w") as archive:
        for each, data in members.items():
            archive.writestr(each, data)


def test_a_tile_deleted_by_hand_is_gone_and_the_others_are_right(tmp_path):
    tiles = {(x, 0): f"tile {x}".encode() for x in range(5)}
    write(tmp_path / "a.zip", tiles)
    repack_without(tmp_path / "a.zip", "2_0.jpg")
    store = read_store(tmp_path / "a.zip")
    raw = (tmp_path / "a.zip").read_bytes()
    assert store.table["x_l0"].tolist() == [0, 1, 3, 4]
    for row in store.table:
        assert raw[row["offset"] : row["offset"] + row["length"]] == tiles[int(row["x_l0"]), 0]
    assert store.table["tissue"].tolist() == [0.75] * 4


def test_every_truncation_and_foreign_file_is_named(tmp_path):
    path = tmp_path / "a.zip"
    write(path, {(x, 0): bytes(50) for x in range(5)})
    whole = path.read_bytes()
    for length in [0, 1, 100, len(whole) // 2, len(whole) - 200, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(StoreError, match=r"a\.zip: damaged"):
            read_store(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("holiday.jpg", b"beach")
    with pytest.raises(StoreError, match=r"a\.zip: damaged.*holds no"):
        read_store(path)


def test_a_zip_of_another_format_is_refused_and_not_called_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "FORMAT", 2)
    write(tmp_path / "a.zip", {(0, 0): bytes(50)})
    repack_without(tmp_path / "a.zip", "none.jpg")
    write(tmp_path / "b.zip", {(0, 0): bytes(50)})
    monkeypatch.undo()
    for name in ("a.zip", "b.zip"):
        with pytest.raises(MismatchError, match=f"{name}: a tile zip of format 2"):
            read_store(tmp_path / name)


def test_a_flipped_bit_in_the_table_is_noticed(tmp_path):
    path = tmp_path / "a.zip"
    write(path, {(x, 0): bytes(50) for x in range(5)})
    raw = bytearray(path.read_bytes())
    raw[raw.find(b"NUMPY") + 200] ^= 1
    path.write_bytes(raw)
    with pytest.raises(StoreError, match="checksum"):
        read_store(path)


class FullDisk(io.BytesIO):
    def write(self, data):
        raise OSError(28, "No space left on device")


def test_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(StoreWriter, "finish", lambda self, tiling: FullDisk().write(b""))
    with pytest.raises(HistosslError, match=r"a\.zip.*No space left on device"):
        write(tmp_path / "a.zip", {(0, 0): b"one"})
    assert list(tmp_path.iterdir()) == []
