"""Copies are found within and across slides, whatever cell they fall in, and one of each group stays."""

import numpy as np
import pytest
import torch

from histossl.curation import near_duplicates
from histossl.curation.features import PICTURE, features_of
from histossl.curation.near_duplicates import Groups, bands_of, find_copies

CPU = torch.device("cpu")
DIM = 48


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def stored(shown, where):
    """Rows as features.npy holds them."""
    return np.concatenate([unit(shown), unit(where)], axis=1).astype(np.float16)


def archive(num, seed=0, kinds=30):
    """Tiles of some kinds of tissue: alike in what they show, different in where they show it."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(kinds, DIM))
    shown = unit(centres[rng.integers(kinds, size=num)]) + 0.1 * rng.normal(size=(num, DIM)) + 0.5
    return shown, rng.normal(size=(num, PICTURE)), rng


def with_copies(num, num_copied, noise=0.3, seed=0):
    """(features, numbers, place of each copy's original): the copies come last."""
    shown, where, rng = archive(num, seed)
    originals = rng.choice(num, num_copied, replace=False)
    again = unit(shown)[originals] + noise * rng.normal(size=(num_copied, DIM)) / DIM**0.5 * 0.3
    there = unit(where)[originals] + noise * rng.normal(size=(num_copied, PICTURE)) / PICTURE**0.5
    table = np.concatenate([stored(shown, where), stored(again, there)])
    numbers = np.arange(num + num_copied)
    return features_of(table, numbers), numbers, originals


def test_groups_are_what_links_join_whatever_their_order(monkeypatch):
    monkeypatch.setattr(near_duplicates, "LINKS_HELD", 2)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        links = np.array([[7, 3], [3, 5], [9, 8], [5, 0], [2, 2], [8, 1]])
        groups = Groups(10)
        for one, other in rng.permutation(links):
            groups.link(np.array([one]), np.array([other]))
        assert groups.first().tolist() == [0, 1, 2, 0, 4, 0, 6, 0, 1, 1]


@pytest.mark.parametrize("cells", ["one cell", "many cells"])
def test_planted_copies_are_found_and_nothing_else(cells, monkeypatch):
    if cells == "many cells":
        monkeypatch.setattr(near_duplicates, "ONE_CELL", 10)
    features, numbers, originals = with_copies(4000, 400)
    copies = find_copies(features, numbers, 0.85, 0, CPU)
    found = copies.stands_for[4000:] == originals
    assert found.mean() >= 0.95
    assert copies.dropped[:4000].mean() <= 0.01


def test_cells_find_what_comparing_all_with_all_finds(monkeypatch):
    features, numbers, _ = with_copies(3000, 600, noise=0.6)
    exact = find_copies(features, numbers, 0.8, 0, CPU)
    monkeypatch.setattr(near_duplicates, "ONE_CELL", 10)
    by_cells = find_copies(features, numbers, 0.8, 0, CPU)
    assert exact.dropped.sum() > 300
    assert (by_cells.dropped & exact.dropped).sum() >= 0.98 * exact.dropped.sum()
    assert not (by_cells.dropped & ~exact.dropped).any()


def test_a_thousand_copies_of_one_tile_are_one_group():
    shown, where, _ = archive(1500)
    table = stored(shown, where)
    table[200:1200] = table[200]
    numbers = np.arange(1500)
    copies = find_copies(features_of(table, numbers), numbers, 0.9, 0, CPU)
    assert (copies.stands_for[200:1200] == 200).all()
    assert copies.dropped.sum() == 999


def test_the_first_of_a_group_stays_and_the_same_always(monkeypatch):
    monkeypatch.setattr(near_duplicates, "ONE_CELL", 10)
    features, numbers, _ = with_copies(500, 100)
    one, again = (find_copies(features, numbers, 0.85, 0, CPU) for _ in range(2))
    assert (one.stands_for == again.stands_for).all()
    assert (one.pairs == again.pairs).all()
    assert (one.stands_for <= np.arange(600)).all()
    assert not one.dropped[one.stands_for].any()


def test_examples_lie_on_both_sides_of_the_threshold():
    features, numbers, _ = with_copies(1000, 300, noise=0.6)
    copies = find_copies(features, numbers, 0.85, 0, CPU)
    edges = bands_of(0.85)
    assert (copies.cosines >= edges[0]).all()
    assert ((copies.cosines >= 0.85) & (copies.cosines < edges[3])).any()
    assert ((copies.cosines < 0.85) & (copies.cosines >= edges[0])).any()
    vectors = features.shown_and_where(numbers)
    assert np.allclose((vectors[copies.pairs[:, 0]] * vectors[copies.pairs[:, 1]]).sum(1), copies.cosines, atol=1e-5)
    assert (copies.pairs[:, 0] < copies.pairs[:, 1]).all()


def test_the_nearest_neighbour_is_told():
    features, numbers, _ = with_copies(300, 50)
    vectors = features.shown_and_where(numbers)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1)
    assert np.allclose(find_copies(features, numbers, 0.9, 0, CPU).nearest, cosines.max(1), atol=1e-5)
