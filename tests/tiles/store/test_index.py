"""Any tile of an archive is one read away, whoever asks: threads, forks, spawned workers, another process."""

import errno
import json
import multiprocessing
import os
import pickle
import resource
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from synthetic_store import write_synthetic_store

from histossl.core.errors import HistosslError, MismatchError, StoreError
from histossl.core.workspace import Workspace
from histossl.tiles.store import index as index_module
from histossl.tiles.store.index import ROW, TileIndex, _write_header
from histossl.tiles.store.zip_store import new_store, read_store


def test_index_finds_every_tile_of_every_zip(workspace):
    index = write_synthetic_store(workspace, ["b", "a", "case2/c"], [3, 25, 7])
    assert index.slides == ["a", "b", "case2/c"]
    assert len(index) == 35
    assert index.counts.tolist() == [25, 3, 7]
    assert index.tiles_of("case2/c") == range(28, 35)
    assert index.slide_of([0, 24, 25, 27, 28, 34]).tolist() == [0, 0, 1, 1, 2, 2]
    for slide in index.slides:
        raw = workspace.zip_of(slide).read_bytes()
        for number, row in zip(index.tiles_of(slide), read_store(workspace.zip_of(slide)).table, strict=True):
            assert index.coords_l0([number]).tolist() == [[row["x_l0"], row["y_l0"]]]
            assert index.read(number) == raw[row["offset"] : row["offset"] + row["length"]]
    assert index.table["slide"].tolist() == index.slide_of(np.arange(35)).tolist()
    assert (index.tile_px, index.mpp) == (64, 0.5)
    assert index.facts("a")["mpp_l0"] == 0.25


def test_a_row_takes_32_bytes():
    assert ROW.itemsize == 32


def test_a_slide_without_tiles_is_none_of_the_slides(workspace):
    index = write_synthetic_store(workspace, ["a", "empty", "z"], [2, 0, 3])
    assert index.slides == ["a", "z"]
    assert index.slide_of([0, 1, 2, 4]).tolist() == [0, 0, 1, 1]
    assert index.table["slide"].tolist() == [0, 0, 1, 1, 1]
    assert index.tiles_of("z") == range(2, 5)
    with pytest.raises(StoreError, match="'empty' has no tiles"):
        index.tiles_of("empty")


def test_a_store_of_no_tiles_at_all_says_so(workspace):
    with pytest.raises(StoreError, match="none of its slides gave a tile"):
        write_synthetic_store(workspace, ["a"], 0)


def test_nothing_tiled_says_what_to_do(workspace):
    with pytest.raises(StoreError, match="histossl tile --slides DIR"):
        TileIndex.open(workspace)


def test_opening_again_builds_nothing(workspace, monkeypatch):
    write_synthetic_store(workspace)
    monkeypatch.setattr(index_module, "_build", lambda *_: pytest.fail("rebuilt"))
    assert len(TileIndex.open(workspace)) == 36


@pytest.mark.parametrize("change", ["added", "removed", "replaced", "index cut", "index gone", "index garbage"])
def test_index_follows_the_zips(workspace, change):
    index = write_synthetic_store(workspace, ["a", "b", "c"], [4, 5, 6])
    wanted = [4, 5, 6]
    if change == "added":
        write_synthetic_store(workspace, ["ab"], [2])
        wanted = [4, 2, 5, 6]
    elif change == "removed":
        workspace.zip_of("b").unlink()
        wanted = [4, 6]
    elif change == "replaced":
        write_synthetic_store(workspace, ["b"], [9])
        wanted = [4, 9, 6]
    elif change == "index cut":
        os.truncate(workspace.index, workspace.index.stat().st_size - 100)
    elif change == "index gone":
        workspace.index.unlink()
    else:
        workspace.index.write_bytes(b"no index at all" * 100)
    again = TileIndex.open(workspace)
    assert again.counts.tolist() == wanted
    for slide in again.slides:
        table = read_store(workspace.zip_of(slide)).table
        numbers = again.tiles_of(slide)
        assert again.table["offset"][numbers.start : numbers.stop].tolist() == table["offset"].tolist()
        assert all(again.read(number) for number in numbers)
    assert (again.digest == index.digest) == change.startswith("index")


def test_digest_is_of_the_tiles_not_of_the_files(workspace):
    digest = write_synthetic_store(workspace).digest
    os.utime(workspace.zip_of("A1"), (1, 1))
    assert TileIndex.open(workspace).digest == digest


def test_region_classes_are_one_list_for_all_slides(workspace):
    for slide, names in {"a": ["tumour", "stroma"], "b": ["stroma", "fat"]}.items():
        with new_store(workspace.zip_of(slide), [0.5]) as store:
            for tile in range(3):
                store.add(tile * 64, 0, b"\xff\xd8\xff\xd9", region=tile)
            scales = [{"name": "0.5", "mpp": 0.5}]
            store.finish({"tile_px": 64, "scales": scales, "regions": names, "slide": {}, "config": {"mpp": 0.5}})
    index = TileIndex.open(workspace)
    named = [index.regions[number] for number in index.table["region"]]
    assert named == ["", "tumour", "stroma", "", "stroma", "fat"]


def test_stores_of_two_settings_do_not_mix(workspace):
    write_synthetic_store(workspace, ["a"], mpp=0.5)
    with pytest.raises(MismatchError, match=r"mpp 1.0 and 0.5.*another --workspace"):
        write_synthetic_store(workspace, ["b"], mpp=1.0)


def test_a_damaged_zip_is_named(workspace):
    write_synthetic_store(workspace, ["a", "b"])
    os.truncate(workspace.zip_of("b"), 500)
    with pytest.raises(StoreError, match=r"b\.zip: damaged"):
        TileIndex.open(workspace)


def test_a_damaged_tile_is_named(workspace):
    index = write_synthetic_store(workspace, ["a"], 3)
    status = workspace.zip_of("a").stat()
    offset = int(index.table["offset"][1])
    with workspace.zip_of("a").open("r+b") as file:
        file.seek(offset)
        file.write(bytes(20))
    os.utime(workspace.zip_of("a"), ns=(status.st_atime_ns, status.st_mtime_ns))
    assert index.read(0)
    with pytest.raises(StoreError, match=rf"a\.zip: the tile at byte {offset} is damaged"):
        index.read(1)


def test_a_zip_replaced_or_deleted_under_a_reader_is_an_error_not_other_tiles(workspace):
    index = write_synthetic_store(workspace, ["a", "b"], 5)
    write_synthetic_store(workspace, ["a"], 9)
    workspace.zip_of("b").unlink()
    with pytest.raises(StoreError, match="changed while"):
        index.read(0)
    with pytest.raises(StoreError, match="moved or deleted"):
        index.read(5)


def open_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_handles_stay_few_however_many_slides(workspace, monkeypatch):
    monkeypatch.setattr(index_module, "MAX_OPEN_ZIPS", 3)
    index = write_synthetic_store(workspace, [f"s{n:02d}" for n in range(20)], 2, tile_px=16)
    before = open_files()
    jpegs = [index.read(number) for number in range(40)]
    assert open_files() - before <= 3
    assert [index.read(number) for number in range(40)] == jpegs
    del index
    assert open_files() <= before


def test_threads_share_an_index(workspace, monkeypatch):
    monkeypatch.setattr(index_module, "MAX_OPEN_ZIPS", 2)
    index = write_synthetic_store(workspace, [f"s{n}" for n in range(6)], 10, tile_px=16)
    wanted = [index.read(number) for number in range(60)]
    wrong: list[object] = []

    def read(seed):
        try:
            for number in np.random.default_rng(seed).integers(0, 60, 500):
                if index.read(int(number)) != wanted[number]:
                    wrong.append(number)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def _lengths(index, queue):
    queue.put([len(jpeg) for jpeg in index.read_many(range(len(index)))])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_read_the_same(workspace, method):
    index = write_synthetic_store(workspace, tile_px=16)
    wanted = [len(jpeg) for jpeg in index.read_many(range(len(index)))]
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    worker = context.Process(target=_lengths, args=(index, queue))
    if method == "fork":
        index._lock.acquire()  # a thread of the parent is inside when the fork happens: the child must not wait for it
    worker.start()
    if method == "fork":
        index._lock.release()
    assert queue.get() == wanted
    worker.join()
    assert worker.exitcode == 0


def test_pickled_index_refuses_other_tiles(workspace):
    index = write_synthetic_store(workspace)
    again = pickle.loads(pickle.dumps(index))
    assert again.read(5) == index.read(5)
    parcel = pickle.dumps(index)
    write_synthetic_store(workspace, ["A1"], 5)
    with pytest.raises(StoreError, match="changed while"):
        pickle.loads(parcel)


def test_a_tile_is_looked_up_once(tmp_path):
    index = write_synthetic_store(Workspace(tmp_path), slides=("A",), tiles_per_slide=4, tile_px=32)
    index.release()
    index.read_many([0, 2, 3])
    assert index._looked_up == 3


def _open_often(root, queue):
    try:
        workspace = Workspace(root)
        zips = index_module.find_zips(workspace.tiles)
        stamps = [index_module._stamp(workspace.tiles, path) for path in zips]
        for _ in range(30):
            index_module._build(workspace.index, zips, stamps, None)
            index = TileIndex.open(workspace)
            assert len(index.read_many(range(len(index)))) == 36
        queue.put("fine")
    except Exception as error:
        queue.put(repr(error))


def test_processes_that_rebuild_at_once_do_not_disturb_each_other(workspace):
    write_synthetic_store(workspace, tile_px=16)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    workers = [context.Process(target=_open_often, args=(workspace.root, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    outcomes = [queue.get() for _ in workers]
    for worker in workers:
        worker.join()
    assert outcomes == ["fine"] * 3


def _read_all(index):
    return index.read_many(range(len(index)))


@pytest.fixture
def no_writing(workspace, tmp_path, monkeypatch):
    """The tiles may only be read, and their index is older than they are."""
    write_synthetic_store(workspace, ["a", "b"], [4, 5], tile_px=16)
    zip_path = workspace.zip_of("a")
    os.utime(zip_path, ns=(1, 1))
    real = Path.open

    def opened(path, mode="r", *more, **options):
        if "w" in mode and path.is_relative_to(workspace.root):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, mode, *more, **options)

    monkeypatch.setattr(Path, "open", opened)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def test_an_index_that_cannot_be_written_is_built_in_a_temporary_file(workspace, no_writing, capsys):
    before = workspace.index.read_bytes()
    index = TileIndex.open(workspace)
    assert "index.npy: cannot be written (Read-only file system); built in a temporary file" in capsys.readouterr().err
    assert index.counts.tolist() == [4, 5]
    assert Workspace.holding(index.path).root == workspace.root
    jpegs = index.read_many(range(9))
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert pool.apply(_read_all, (index,)) == jpegs
    assert len(list(no_writing.iterdir())) == 1
    del index
    assert not list(no_writing.iterdir())
    assert workspace.index.read_bytes() == before


def test_tiles_of_two_kinds_leave_no_temporary_file(workspace, no_writing, monkeypatch):
    def refuse(*_):
        raise MismatchError("two kinds")

    monkeypatch.setattr(index_module, "_refuse_mixed", refuse)
    with pytest.raises(MismatchError, match="two kinds"):
        TileIndex.open(workspace)
    assert not list(no_writing.iterdir())


def test_a_full_disk_is_an_error_still(workspace, monkeypatch):
    write_synthetic_store(workspace, ["a"], [4], tile_px=16)
    workspace.index.unlink()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(index_module, "_build_into", full)
    with pytest.raises(HistosslError, match="cannot be written"):
        TileIndex.open(workspace)


def test_unchanged_zips_are_not_read_again(workspace, monkeypatch):
    write_synthetic_store(workspace, ["a", "b", "c"], [4, 5, 6], tile_px=16)
    read = []
    monkeypatch.setattr(index_module, "read_store", lambda path: read.append(path.name) or read_store(path))
    index = write_synthetic_store(workspace, ["b"], [7], tile_px=16)
    assert read == ["b.zip"]
    assert index.table["slide"].tolist() == [0] * 4 + [1] * 7 + [2] * 6


def big_index(workspace, num_tiles, num_slides=1000):
    """An index file of many tiles, whose zips exist in name only. Sparse columns: it takes little time to write."""
    per_slide = num_tiles // num_slides
    rows = np.zeros(per_slide, ROW)
    rows["x_l0"] = np.arange(per_slide)
    entries = []
    workspace.tiles.mkdir(parents=True)
    with workspace.index.open("wb") as file:
        _write_header(file, num_tiles)
        for slide in range(num_slides):
            rows["slide"] = slide
            file.write(rows.tobytes())
            path = workspace.tiles / f"{slide:04d}.zip"
            path.touch()
            stamp = path.stat()
            entries.append(
                {"slide": f"{slide:04d}", "bytes": 0, "mtime_ns": stamp.st_mtime_ns, "start": slide * per_slide}
            )
            entries[-1] |= {"tiles": per_slide, "facts": {"scales": []}}
        info = {"digest": "d", "config": {}, "tile_px": 256, "mpps": [0.5], "regions": [""], "zips": entries}
        footer = json.dumps(info).encode()
        file.write(footer + index_module._FOOTER.pack(len(footer), index_module._MAGIC))


def _resident_after_many_lookups(root, queue):
    before = _resident_mb()
    started_s = time.monotonic()
    index = TileIndex.open(Workspace(root))
    opened_s = time.monotonic() - started_s
    random = np.random.default_rng(0)
    most = 0.0
    for _ in range(100):
        numbers = random.integers(0, len(index), 256)
        coords = index.coords_l0(numbers)
        per_slide = len(index) // len(index.slides)
        assert (coords[:, 0] == numbers % per_slide).all()
        assert (index.slide_of(numbers) == numbers // per_slide).all()
        most = max(most, _resident_mb() - before)
    queue.put((most, opened_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def _resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def lookups_in_new_process(workspace):
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    worker = context.Process(target=_resident_after_many_lookups, args=(workspace.root, queue))
    worker.start()
    outcome = queue.get()
    worker.join()
    return outcome


def test_ten_million_tiles_take_no_memory_to_speak_of(workspace):
    # 320 MB of table; resident memory grows only by the slide list and the pages of the last thousand lookups.
    big_index(workspace, 10_000_000)
    grown_mb, opened_s, _ = lookups_in_new_process(workspace)
    assert grown_mb < 100
    assert opened_s < 5


@pytest.mark.slow
def test_hundred_million_tiles_under_200_mb_of_resident_memory(workspace):
    big_index(workspace, 100_000_000, num_slides=10_000)
    grown_mb, opened_s, peak_mb = lookups_in_new_process(workspace)
    print(f"100 million tiles: +{grown_mb:.0f} MB, peak of the process {peak_mb:.0f} MB, open in {opened_s:.2f} s")
    assert peak_mb < 200
