"""Retrieval gives what is most like the examples, each example in its turn."""

import numpy as np

from histossl.curation import features, retrieve
from histossl.curation.retrieve import thinned


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def pool_of(counts, dim=24, seed=0):
    rng = np.random.default_rng(seed)
    classes = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    return unit(
        unit(rng.normal(size=(len(counts), dim)))[classes] + 0.3 * rng.normal(size=(len(classes), dim)) / 5
    ), classes


def test_a_class_brings_its_own():
    vectors, classes = pool_of([1000, 1000, 300])
    examples, pool = np.flatnonzero(classes == 2)[:20], np.flatnonzero(np.arange(2300) >= 0)
    pool = np.setdiff1d(pool, examples)
    found = retrieve.retrieve(vectors.__getitem__, examples, pool, 200)
    assert len(np.unique(found.places)) == 200
    assert (classes[pool[found.places]] == 2).mean() > 0.95


def test_pieces_of_the_pool_are_merged_into_one_ranking(monkeypatch):
    vectors, _ = pool_of([500, 500])
    examples, pool = np.arange(10), np.arange(10, 1000)
    whole = retrieve.retrieve(vectors.__getitem__, examples, pool, 0)
    monkeypatch.setattr(features.pieces, "__defaults__", (97,))
    monkeypatch.setattr(retrieve, "PIECE", 97)
    again = retrieve.retrieve(vectors.__getitem__, examples, pool, 0)
    assert (whole.places == again.places).all()
    cosines = vectors[examples] @ vectors[pool].T
    four = {int(place) for row in np.argsort(-cosines, axis=1)[:, :4] for place in row}
    assert set(whole.places.tolist()) == four


def test_examples_of_a_rare_kind_get_their_turn():
    vectors, classes = pool_of([900, 300])
    examples = np.concatenate([np.flatnonzero(classes == 0)[:50], np.flatnonzero(classes == 1)[:5]])
    pool = np.setdiff1d(np.arange(1200), examples)
    found = retrieve.retrieve(vectors.__getitem__, examples, pool, 60)
    assert (classes[pool[found.places]] == 1).sum() >= 3


def test_more_than_there_is_gives_all():
    vectors, _ = pool_of([30, 30])
    found = retrieve.retrieve(vectors.__getitem__, np.arange(5), np.arange(5, 60), 1000)
    assert sorted(found.places) == list(range(55))


def test_examples_are_thinned_slide_by_slide():
    owner = np.repeat([0, 1, 2], [1000, 10, 500])
    kept = thinned(np.arange(1510), owner, 0, most=100)
    assert np.bincount(owner[kept]).tolist() == [45, 10, 45]
    assert (thinned(np.arange(1510), owner, 0, most=100) == kept).all()
    assert len(thinned(np.arange(1510), owner, 0, most=5000)) == 1510
