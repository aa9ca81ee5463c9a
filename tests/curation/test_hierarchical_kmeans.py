"""Balancing flattens what is frequent, keeps what is rare, and gives the number that was asked for."""

import numpy as np
import pytest

from histossl.curation.hierarchical_kmeans import Tree, balanced, clusters_for, tree_of, water_filled


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def tissue(counts, dim=32, spread=0.5, seed=0):
    """(vectors, class of each) of classes with so many tiles, each of a few kinds; in a shuffled order."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    kinds = unit(rng.normal(size=(len(counts) * 3, dim)))
    return unit(
        kinds[classes * 3 + rng.integers(3, size=len(classes))]
        + spread * rng.normal(size=(len(classes), dim)) / dim**0.5
    ), classes


def test_water_rises_alike_everywhere():
    rng = np.random.default_rng(0)
    assert water_filled(9, np.array([1, 100, 2, 100]), rng).tolist() == [1, 3, 2, 3]
    assert water_filled(1000, np.array([1, 100, 2]), rng).tolist() == [1, 100, 2]
    for _ in range(50):
        room = rng.integers(0, 30, size=7)
        wanted = int(rng.integers(0, room.sum() + 1))
        share = water_filled(wanted, room, rng)
        assert share.sum() == wanted
        assert (share <= room).all()
        full = share == room
        assert full.all() or share.max() - share[~full].min() <= 1


def test_what_cannot_be_shared_alike_goes_to_the_small_as_often_as_to_the_large():
    rng = np.random.default_rng(0)
    shares = sum(water_filled(2, np.array([5, 500, 50, 5000]), rng) for _ in range(2000))
    assert (abs(shares - 1000) < 100).all(), shares


def test_a_hundred_to_one_becomes_less_than_ten_to_one():
    counts = [6000, 3000, 1000, 200, 60]
    vectors, classes = tissue(counts)
    numbers = np.arange(len(vectors))
    for seed in range(3):
        tree = tree_of(vectors.__getitem__, numbers, clusters_for(len(numbers)), seed)
        chosen = balanced(tree, numbers, 500, seed)
        after = np.bincount(classes[chosen], minlength=5)
        assert len(chosen) == 500
        assert max(counts) / min(counts) == 100
        assert after.max() / after.min() < 10, after


def test_chance_alone_would_have_kept_the_imbalance():
    _, classes = tissue([6000, 3000, 1000, 200, 60])
    after = np.bincount(np.random.default_rng(0).permutation(classes)[:500], minlength=5)
    assert after.max() / max(1, after.min()) > 50


@pytest.mark.parametrize("wanted", [1, 17, 500, 1999, 2000])
def test_the_number_asked_for_is_kept_each_once(wanted):
    vectors, _ = tissue([1500, 400, 100])
    numbers = np.arange(2000) * 3
    tree = tree_of(lambda asked: vectors[asked // 3], numbers, (60, 8), 0)
    chosen = balanced(tree, numbers, wanted, 0)
    assert len(np.unique(chosen)) == wanted
    assert (balanced(tree, numbers, wanted, 0) == chosen).all()


def test_a_tree_knows_its_levels():
    tree = Tree((np.array([0, 1, 1, 2]), np.array([0, 0, 1])))
    assert tree.coarsest.tolist() == [0, 0, 0, 1]
    assert tree.sizes == (3, 2)
    assert balanced(tree, np.arange(4), 2, 0).tolist()[-1] == 3


def test_levels_follow_the_number_of_tiles():
    assert clusters_for(10_000_000)[:3] == (12_649, 10_540, 8783)
    assert (len(clusters_for(10_000_000)), clusters_for(10_000_000)[-1]) == (17, 682)
    assert clusters_for(100) == (40, 33, 27, 22, 18, 15, 12, 10, 8, 6, 5, 4)
    assert clusters_for(1)[0] >= 1
