"""Random numbers without a state: uniform, independent, and a function of their names alone."""

import numpy as np
import pytest
from scipy import stats

from histossl.views.rng import Draws

POSITIONS = np.arange(20_000)


def test_numbers_are_uniform_and_normal():
    draws = Draws(0, POSITIONS, view=0)
    assert stats.kstest(draws.one("a"), "uniform").pvalue > 1e-3
    assert stats.kstest(draws.normal("b", 1)[:, 0], "norm").pvalue > 1e-3
    assert stats.chisquare(np.bincount(draws.whole("c", 24), minlength=24)).pvalue > 1e-3
    low_high = draws.one("d", -3, 5)
    assert low_high.min() >= -3
    assert low_high.max() < 5


def test_neighbours_views_purposes_times_and_seeds_are_independent():
    first = Draws(0, POSITIONS, 0)
    pair = first.uniform("a", times=2)
    for other in (
        np.roll(pair[:, 0], 1),
        pair[:, 1],
        first.one("b"),
        Draws(0, POSITIONS, 1).one("a"),
        Draws(1, POSITIONS, 0).one("a"),
        first.normal("a", 1)[:, 0],
    ):
        assert abs(stats.spearmanr(pair[:, 0], other).statistic) < 4 / np.sqrt(len(POSITIONS))


def test_a_number_depends_on_nothing_but_its_names():
    whole = Draws(5, POSITIONS, 1).uniform("a", times=3)
    shuffled = np.random.default_rng(0).permutation(POSITIONS)[:100]
    assert (Draws(5, shuffled, 1).uniform("a", times=3) == whole[shuffled]).all()
    assert (Draws(5, POSITIONS, 1).one("a") == whole[:, 0]).all()


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_coins_fall_as_often_as_asked(probability):
    heads = Draws(0, POSITIONS, 0).happens("coin", probability).sum()
    spread = np.sqrt(len(POSITIONS) * probability * (1 - probability))
    assert abs(heads - len(POSITIONS) * probability) <= 4 * spread


def test_no_two_samples_ever_share_their_randomness():
    """Of any position, view and seed: the numpy seed that two loader workers share has no place here."""
    seen = np.concatenate([Draws(seed, POSITIONS, view).one("a") for seed in range(3) for view in range(4)])
    assert len(np.unique(seen)) == len(seen)
