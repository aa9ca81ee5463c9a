"""The order of tiles: complete, shuffled, balanced, addressable, and without a list."""

import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from histossl.core.errors import UsageError
from histossl.tiles.stream.sampler import TileOrder, keys, permuted


class Counts:
    """An index of nothing but slides with so many tiles each."""

    def __init__(self, *counts):
        self.ends = np.cumsum([0, *counts])
        self.slides = [f"slide{number}" for number in range(len(counts))]

    def tiles_of(self, slide):
        number = int(slide.removeprefix("slide"))
        return range(int(self.ends[number]), int(self.ends[number + 1]))


COUNTS = (5, 100, 7, 1000, 1)
TOTAL = sum(COUNTS)


def drawn_per_slide(order, start, count, counts=COUNTS):
    edges = np.cumsum([0, *counts])
    return np.histogram(order.tile_numbers(start, count), edges)[0]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 100, 4099])
def test_a_permutation_visits_each_place_once(size):
    places = np.arange(size)
    for seed in range(5):
        assert sorted(permuted(places, np.full(size, size), keys(seed, np.int64(0)))) == list(places)


@pytest.mark.parametrize("size", [3, 5, 7, 11])
def test_two_places_fall_on_all_pairs_alike(size):
    num_keys = 20_000
    sizes, key = np.full(num_keys, size), keys(1, np.arange(num_keys))
    first, second = (permuted(np.full(num_keys, place), sizes, key) for place in (0, 1))
    seen = Counter(zip(first.tolist(), second.tolist(), strict=True))
    pairs = [seen[pair] for pair in itertools.permutations(range(size), 2)]
    assert sum(pairs) == num_keys
    assert stats.chisquare(pairs).pvalue > 1e-3


def test_an_epoch_is_every_tile_once_and_the_next_in_another_order():
    order = TileOrder(Counts(*COUNTS), seed=0)
    first, second = order.tile_numbers(0, TOTAL), order.tile_numbers(TOTAL, TOTAL)
    assert sorted(first) == sorted(second) == list(range(TOTAL))
    assert (first == second).mean() < 0.02
    assert abs(stats.spearmanr(np.arange(TOTAL), first).statistic) < 0.1


def test_seeds_differ_and_the_same_seed_does_not():
    one, again, other = (TileOrder(Counts(*COUNTS), seed).tile_numbers(0, 500) for seed in (1, 1, 2))
    assert (one == again).all()
    assert (one == other).mean() < 0.02


@pytest.mark.parametrize("slide_balance", [0.0, 0.5, 1.0])
def test_any_part_of_the_stream_can_be_asked_for(slide_balance):
    order = TileOrder(Counts(*COUNTS), seed=3, slide_balance=slide_balance)
    whole = order.tile_numbers(0, 4 * TOTAL)
    assert (order.tile_numbers(TOTAL - 7, 300) == whole[TOTAL - 7 : TOTAL + 293]).all()
    scattered = np.array([4000, 3, 1500, 3, 2226])
    assert (order.tiles_at(scattered) == whole[scattered]).all()


@pytest.mark.parametrize("slide_balance", [0.0, 0.25, 0.5, 1.0])
def test_slides_are_drawn_in_proportion_to_their_tiles_to_the_power_one_minus_balance(slide_balance):
    order = TileOrder(Counts(*COUNTS), seed=0, slide_balance=slide_balance)
    weights = np.array(COUNTS) ** (1 - slide_balance)
    expected = TOTAL * weights / weights.sum()
    for epoch in (0, 1, 50):
        assert np.abs(drawn_per_slide(order, epoch * TOTAL, TOTAL) - expected).max() <= 2
    assert np.abs(drawn_per_slide(order, 0, 20 * TOTAL) - 20 * expected).max() <= 2


def test_a_balanced_slide_shows_all_its_tiles_before_one_comes_again():
    order = TileOrder(Counts(*COUNTS), seed=0, slide_balance=1.0)
    drawn = order.tile_numbers(0, 10 * TOTAL)
    for slide in ("slide0", "slide1", "slide3"):
        tiles = Counts(*COUNTS).tiles_of(slide)
        times = np.bincount(drawn[(drawn >= tiles.start) & (drawn < tiles.stop)] - tiles.start, minlength=len(tiles))
        assert times.max() - times.min() <= 1


def test_excluded_slides_never_come_and_the_others_all_do():
    keep = np.array([True, False, True, True, False])
    order = TileOrder(Counts(*COUNTS), seed=0, keep=keep)
    assert order.num_tiles == 1012
    assert order.num_slides == 3
    assert (drawn_per_slide(order, 0, 1012) == [5, 0, 7, 1000, 0]).all()


def test_a_pool_of_single_tiles_is_visited_whole():
    tiles = np.array([3, 4, 50, 51, 1000, 1112])
    order = TileOrder(Counts(*COUNTS), seed=0, tiles=tiles)
    assert sorted(order.tile_numbers(6, 6)) == list(tiles)
    halves = TileOrder(Counts(*COUNTS), seed=0, slide_balance=1.0, tiles=tiles)
    assert (drawn_per_slide(halves, 0, 600) == [150, 150, 0, 150, 150]).all()


def test_a_pool_of_single_tiles_without_a_slide_is_the_rest_of_it():
    tiles = np.array([3, 4, 50, 51, 1000, 1112])
    keep = np.array([False, True, True, True, True])
    order = TileOrder(Counts(*COUNTS), seed=0, keep=keep, tiles=tiles)
    assert sorted(order.tile_numbers(0, 4)) == [50, 51, 1000, 1112]
    assert order.num_slides == 3


@pytest.mark.parametrize("slide_balance", [0.0, 0.7])
def test_a_pool_of_all_tiles_is_drawn_as_no_pool_is(slide_balance):
    whole = TileOrder(Counts(*COUNTS), 3, slide_balance)
    pool = TileOrder(Counts(*COUNTS), 3, slide_balance, tiles=np.arange(TOTAL))
    assert (whole.tile_numbers(0, 3 * TOTAL) == pool.tile_numbers(0, 3 * TOTAL)).all()


def test_a_memory_mapped_pool_stays_on_disk(tmp_path):
    counts = np.full(1000, 10_000)
    np.save(tmp_path / "tiles.npy", np.arange(0, 10_000_000, 2))
    tiles = np.load(tmp_path / "tiles.npy", mmap_mode="r")
    tracemalloc.start()
    try:
        order = TileOrder(Counts(*counts), seed=0, slide_balance=0.5, tiles=tiles)
        numbers = order.tile_numbers(order.num_tiles - 128, 256)  # across the border of two epochs
        assert order.num_tiles == 5_000_000
        assert (numbers % 2 == 0).all()
        assert tracemalloc.get_traced_memory()[1] < 15e6  # the pool is 40 MB
    finally:
        tracemalloc.stop()


def test_what_cannot_be_drawn_from_is_refused():
    with pytest.raises(UsageError, match=r"slide-balance 1\.5"):
        TileOrder(Counts(*COUNTS), 0, slide_balance=1.5)
    with pytest.raises(UsageError, match="no tiles to draw from"):
        TileOrder(Counts(*COUNTS), 0, keep=np.zeros(5, dtype=bool))


def test_a_hundred_million_tiles_need_no_list():
    counts = np.full(10_000, 10_000)
    counts[::2] += 37
    tracemalloc.start()
    try:
        order = TileOrder(Counts(*counts), seed=0, slide_balance=0.3)
        numbers = order.tile_numbers(3 * order.num_tiles - 128, 256)  # across the border of two epochs
        assert order.num_tiles > 100_000_000
        assert len(np.unique(numbers)) == 256
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
