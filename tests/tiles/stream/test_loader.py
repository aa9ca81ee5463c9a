"""Batches of tiles: the pixels of the store, in the order asked for, on any number of workers and processes."""

import os
import threading

import numpy as np
import psutil
import pytest
import simplejpeg
import torch

from histossl.core.errors import StoreError, UsageError
from histossl.tiles.store.index import TileIndex
from histossl.tiles.store.zip_store import new_store
from histossl.tiles.stream import loader
from histossl.tiles.stream.loader import TooManyDamaged, decode_tiles, tile_batches
from histossl.tiles.stream.sampler import TileOrder


class Store:
    """Slides of flat tiles: a tile's grey value is its number (over 4)."""

    tile_px = 32

    def __init__(self, num_tiles=1000, damaged=()):
        self.num_tiles, self.damaged, self.slides = num_tiles, set(damaged), ["A", "B"]

    def tiles_of(self, slide):
        half = self.num_tiles // 2
        return range(half) if slide == "A" else range(half, self.num_tiles)

    def read(self, number):
        jpeg = simplejpeg.encode_jpeg(np.full((self.tile_px, self.tile_px, 3), number // 4, np.uint8), 90)
        if number in self.damaged:
            raise StoreError(f"A.zip: tile {number} is cut off")
        return jpeg

    def read_many(self, numbers):
        return [self.read(int(number)) for number in numbers]


def batches_of(store, num_workers=2, seed=0, **how):
    how = {"global_batch": 40, "start_step": 0, "num_steps": 5} | how
    return tile_batches(store, TileOrder(store, seed), num_workers=num_workers, **how)


def test_tiles_are_the_pixels_of_their_numbers_in_the_order_of_the_stream():
    store = Store()
    with batches_of(store) as batches:
        seen = list(batches)
    assert [tuple(tiles.shape) for tiles, _, _ in seen] == [(40, 3, 32, 32)] * 5
    numbers = torch.cat([numbers for _, numbers, _ in seen])
    assert (numbers.numpy() == TileOrder(store, 0).tile_numbers(0, 200)).all()
    assert torch.cat([positions for _, _, positions in seen]).tolist() == list(range(200))
    values = torch.cat([tiles for tiles, _, _ in seen])
    assert values.dtype == torch.uint8
    assert (values == (numbers // 4)[:, None, None, None]).all()


def test_the_number_of_workers_changes_nothing():
    runs = [list(batches_of(Store(), workers)) for workers in (0, 1, 3)]
    runs.append(list(batches_of(Store(), 2, decode_on=torch.device("cpu"))))
    for other in runs[1:]:
        for mine, yours in zip(runs[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, yours, strict=True))


def test_processes_share_a_batch_in_slices_and_a_resume_goes_on():
    whole = torch.cat([numbers for _, numbers, _ in batches_of(Store())])
    ranks = [list(batches_of(Store(), rank=rank, world_size=4)) for rank in range(4)]
    shared = torch.cat([torch.cat([ranks[rank][step][1] for rank in range(4)]) for step in range(5)])
    assert torch.equal(whole, shared)
    resumed = torch.cat([numbers for _, numbers, _ in batches_of(Store(), start_step=3, num_steps=2)])
    assert torch.equal(whole[120:], resumed)


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(UsageError, match="multiple of the 3 processes"):
        batches_of(Store(), world_size=3)


def test_a_damaged_tile_is_replaced_alike_on_every_run_and_counted():
    stream = TileOrder(Store(), 0)
    bad = int(stream.tile_numbers(17, 1)[0])
    runs = []
    late = torch.device("cpu")  # decoded when asked for, as on a GPU
    for workers, ranks, decode_on in ((0, 1, None), (3, 1, None), (2, 2, None), (2, 1, late)):
        how = {"world_size": ranks, "decode_on": decode_on}
        parts = [batches_of(Store(damaged=[bad]), workers, rank=rank, **how) for rank in range(ranks)]
        steps = [[batch[1] for batch in part] for part in parts]
        assert sum(part.damaged.get(bad) is not None for part in parts) == 1
        assert sum(len(part.damaged) for part in parts) == 1
        runs.append(torch.cat([torch.cat(step) for step in zip(*steps, strict=True)]))
    assert all(torch.equal(runs[0], run) for run in runs[1:])
    assert int(runs[0][17]) == int(stream.tile_numbers(517, 1)[0])
    unharmed = np.arange(200) != 17
    assert (runs[0].numpy()[unharmed] == stream.tile_numbers(0, 200)[unharmed]).all()


def test_more_than_one_per_cent_of_damage_ends_the_run_with_the_last_reason():
    with pytest.raises(TooManyDamaged, match=r"1\d of the .* tiles read so far are damaged .*A.zip: tile"):
        list(batches_of(Store(damaged=range(0, 1000, 5)), num_steps=25))
    with batches_of(Store(damaged=range(0, 1000, 100)), num_steps=25) as one_per_cent:
        assert sum(1 for _ in one_per_cent) == 25
    assert len(one_per_cent.damaged) == 10


def test_a_store_without_a_good_tile_ends_instead_of_searching_for_ever():
    for num_tiles in (2, 400):
        with pytest.raises(TooManyDamaged):
            list(batches_of(Store(num_tiles, damaged=range(num_tiles)), global_batch=2))


def test_closing_early_leaves_no_thread_behind():
    before = threading.active_count()
    with batches_of(Store(), num_workers=3) as batches:
        next(batches)
        assert threading.active_count() > before
    assert threading.active_count() == before
    assert list(batches) == []


def test_a_tile_that_is_no_jpeg_or_of_another_size_is_named():
    good = Store().read(0)
    assert decode_tiles([good, good], 32).shape == (2, 3, 32, 32)
    with pytest.raises(StoreError, match="tile 1 of 2: is not a whole JPEG"):
        decode_tiles([good, good[: len(good) // 2]], 32)
    with pytest.raises(StoreError, match="tile 0 of 1: is not a whole JPEG"):
        decode_tiles([b"no picture"], 32)
    with pytest.raises(StoreError, match="tile 0 of 1: is 32 x 32 px, not 64 x 64 px"):
        decode_tiles([good], 64)


def speckled(subsampling):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8).repeat(12, 0).repeat(12, 1)
    return simplejpeg.encode_jpeg(pixels, 90, colorsubsampling=subsampling)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("subsampling", "mean", "most"), [("444", 0.5, 3), ("420", 4.0, 120)])
def test_decoding_on_the_gpu_agrees_with_the_cpu(subsampling, mean, most):
    """Thinned-out colours are enlarged without smoothing there; hard edges of colour are the worst for it."""
    jpeg = speckled(subsampling)
    theirs = decode_tiles([jpeg] * 8, 96, torch.device("cuda")).cpu()
    off = (theirs.int() - decode_tiles([jpeg] * 8, 96).int()).abs()
    assert off.float().mean() <= mean
    assert off.max() <= most
    with pytest.raises(StoreError, match="tile 1 of 2: is not a whole JPEG"):
        decode_tiles([jpeg, jpeg[: len(jpeg) * 2 // 3]], 96, torch.device("cuda"))


@pytest.mark.parametrize("broken", [False, True])
def test_a_gpu_that_cannot_decode_is_not_blamed_on_the_tiles(monkeypatch, broken):
    import torchvision

    class Stream:
        def synchronize(self):
            pass

    def refuse(*_, **__):
        raise RuntimeError("nvjpegCreateSimple failed: 2")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    monkeypatch.setattr(torchvision.io, "decode_jpeg", refuse)
    good = Store().read(0)
    bad = good[: len(good) // 2] if broken else good
    if broken:
        with pytest.raises(StoreError, match="tile 1 of 2: is not a whole JPEG"):
            decode_tiles([good, bad], 32, torch.device("cuda"))
    else:
        with pytest.raises(UsageError, match=r"--decode-on-gpu: does not work on this machine \(nvjpegCreateSimple"):
            decode_tiles([good, bad], 32, torch.device("cuda"))


@pytest.mark.parametrize(("failing", "ends"), [(2, False), (1, True)])
def test_a_tile_that_only_the_cpu_can_decode_does_not_end_a_run(workspace, monkeypatch, failing, ends):
    """At the first batch it is the machine; later a tile of a kind that nvJPEG does not know."""
    index, calls = packed(workspace), []
    decode = loader.decode_tiles

    def picky(jpegs, tile_px, device=None):
        calls.append(device)
        if len(calls) == failing:
            raise loader.CannotDecodeError("--decode-on-gpu: does not work on this machine")
        return decode(jpegs, tile_px)

    monkeypatch.setattr(loader, "decode_tiles", picky)
    with tile_batches(index, TileOrder(index, 0), 20, 0, 3, num_workers=0, decode_on=torch.device("cpu")) as batches:
        if ends:
            with pytest.raises(UsageError, match="does not work on this machine"):
                next(batches)
        else:
            assert [len(tiles) for tiles, *_ in batches] == [20, 20, 20]
            assert not batches.damaged


def test_decoding_agrees_with_pillow():
    from io import BytesIO

    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8).repeat(12, 0).repeat(12, 1)
    jpeg = simplejpeg.encode_jpeg(pixels, 85, colorsubsampling="420")
    theirs = torch.from_numpy(np.array(Image.open(BytesIO(jpeg)))).permute(2, 0, 1)
    assert torch.equal(decode_tiles([jpeg], 96)[0], theirs)


# ---- a real store


def packed(workspace, num_tiles=60):
    """Two zips of noise tiles."""
    chance = np.random.default_rng(0)
    for slide in ("A", "B"):
        with new_store(workspace.zip_of(slide), [0.5]) as writer:
            for number in range(num_tiles // 2):
                pixels = chance.integers(0, 256, (4, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)
                writer.add(32 * number, 0, simplejpeg.encode_jpeg(pixels, 90))
            scales = [{"name": "0.5", "mpp": 0.5}]
            writer.finish({"tile_px": 32, "scales": scales, "config": {"mpp": 0.5}, "slide": {}, "regions": []})
    return TileIndex.open(workspace)


def test_batches_of_a_store_on_disk_are_its_tiles(workspace):
    index = packed(workspace)
    with tile_batches(index, TileOrder(index, 0), 20, 0, 3, num_workers=3) as batches:
        for tiles, numbers, _ in batches:
            assert torch.equal(tiles, decode_tiles(index.read_many(numbers.numpy()), 32))


@pytest.mark.parametrize("decode_on", [None, torch.device("cpu")])
def test_a_tile_that_rotted_on_disk_is_replaced_and_named(workspace, decode_on):
    index = packed(workspace)
    bad = 7
    place, zip_path = index.rows([bad])[0], workspace.zip_of("A")
    times = zip_path.stat()
    data = bytearray(zip_path.read_bytes())
    middle = int(place["offset"]) + int(place["length"]) // 2
    data[middle : middle + 40] = b"\xff\xd8" * 20  # a marker where pixels should be
    zip_path.write_bytes(data)
    os.utime(zip_path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with tile_batches(index, TileOrder(index, 0), 20, 0, 3, num_workers=2, decode_on=decode_on) as batches:
        numbers = torch.cat([numbers for _, numbers, _ in batches])
    assert list(batches.damaged) == [bad]
    assert "tile 7: is not a whole JPEG" in batches.damaged[bad]
    assert bad not in numbers
    assert len(numbers) == 60


def test_memory_stays_flat_over_many_batches(workspace):
    index, process = packed(workspace), psutil.Process()
    with tile_batches(index, TileOrder(index, 0), 64, 0, 600, num_workers=2) as batches:
        sizes = [process.memory_info().rss for _ in batches]
    assert sizes[-1] < 1.05 * sizes[100]
