import math

import pytest
import torch

from histossl.training.monitoring.diagnostics import (
    Ceiling,
    KeyDrift,
    ProbeTrend,
    Shortcut,
    Watch,
    effective_rank,
    feature_spread,
    weight_change,
)


def gaussian(n: int, d: int, rank: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, rank or d, generator=generator)
    return x if rank is None else x @ torch.randn(rank, d, generator=generator)


def test_isotropic_features_have_spread_one_and_full_rank() -> None:
    x = gaussian(4000, 64)
    assert feature_spread(x) == pytest.approx(1, abs=0.02)
    assert effective_rank(x) == pytest.approx(64, abs=1)


def test_rank_sees_the_collapse_that_spread_misses() -> None:
    x = gaussian(4000, 128, rank=8)
    assert feature_spread(x) > 0.9
    assert effective_rank(x) < 8.5


def test_orthonormal_rows_have_their_number_as_rank() -> None:
    assert effective_rank(torch.eye(10)) == pytest.approx(10)


def test_healthy_features_raise_nothing_and_a_constant_is_named() -> None:
    watch = Watch()
    assert watch.look(gaussian(256, 32)).verdict == ""
    assert watch.look(gaussian(256, 32) + 0.1).verdict == ""
    health = watch.look(torch.ones(256, 32) + 1e-4 * gaussian(256, 32))
    assert health.collapsed
    assert "complete collapse" in health.verdict
    assert "--lr too high" in health.verdict


def test_dimensional_collapse_is_named() -> None:
    watch = Watch()
    watch.look(gaussian(256, 64))
    health = watch.look(gaussian(256, 64, rank=2))
    assert health.collapsed
    assert "dimensional collapse" in health.verdict


def test_random_weights_that_spread_little_are_not_called_a_collapse() -> None:
    watch = Watch()
    narrow = 1 + 0.02 * gaussian(256, 32)
    assert feature_spread(narrow) < 0.3
    assert watch.look(narrow).verdict == ""


def test_drift_is_from_the_last_look_and_moved_from_the_first() -> None:
    watch = Watch()
    x = gaussian(64, 16)
    watch.look(x)
    health = watch.look(-x)
    assert (health.drift, health.moved) == (pytest.approx(2), pytest.approx(2))
    assert watch.look(-x).drift == pytest.approx(0, abs=1e-6)
    again = Watch()
    again.load_state_dict(watch.state_dict())
    assert again.look(x).moved == pytest.approx(0, abs=1e-6)
    assert again.look(x).drift == pytest.approx(0, abs=1e-6)


def test_weight_change_is_relative_and_per_block() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    start = {name: value.detach().clone() for name, value in network.named_parameters()}
    with torch.no_grad():
        network[1].weight.mul_(1.5)
    assert weight_change(network, start) == {"0": 0.0, "1": pytest.approx(0.5)}


def test_a_loss_that_never_leaves_its_ceiling_is_told_once() -> None:
    ceiling = Ceiling()
    assert ceiling.stuck(6.9, 6.93, 50, 200) == ""  # too early to judge
    assert "never left its ceiling 6.93 (lowest 6.88)" in ceiling.stuck(6.88, 6.93, 110, 200)
    assert ceiling.stuck(6.88, 6.93, 150, 200) == ""
    learning = Ceiling()
    learning.stuck(5.0, 6.93, 20, 200)
    assert learning.stuck(6.9, 6.93, 180, 200) == ""
    assert Ceiling().stuck(9.0, None, 180, 200) == ""


def test_a_loss_that_rises_above_its_ceiling_again_is_told() -> None:
    ceiling = Ceiling()
    ceiling.stuck(3.0, 6.93, 20, 200)
    said = [ceiling.stuck(9.0, 6.93, done, 200) for done in range(110, 180, 10)]
    assert [bool(each) for each in said] == [False] * 4 + [True] + [False] * 2
    assert "above its ceiling 6.93 for 5 logged lines (now 9.00)" in said[4]


def told_of(accuracies: list[float], negatives: float = 4096, helps: bool = False, num_steps: int = 1000) -> list[str]:
    shortcut = Shortcut(batchnorm=True)
    row = {"loss_ceiling": math.log(negatives + 1)}
    return [
        shortcut.taken({**row, "instance_accuracy": each}, 10 * number, num_steps, helps)
        for number, each in enumerate(accuracies, 1)
    ]


def test_a_task_that_is_solved_at_once_is_told_as_a_shortcut_with_its_causes() -> None:
    said = told_of([0.5, 0.95, 0.97, 0.99, 1.0])
    assert [bool(each) for each in said] == [False, False, False, True, False]  # once, and not for one lucky line
    assert "among 4,096 others with 99% accuracy this early" in said[3]
    assert "--set batchnorm_group_tiles=32" in said[3]
    assert "stain or scanner" in said[3]
    without = Shortcut(batchnorm=False)
    row = {"instance_accuracy": 1.0, "negatives": 200.0}
    told = [without.taken(row, step, 1000) for step in (10, 20, 30)]
    assert "among 200 others" in told[2]
    assert "BatchNorm" not in told[2]


def test_what_is_learnt_in_its_time_or_helps_or_is_easy_by_nature_is_no_shortcut() -> None:
    assert not any(told_of([0.1] * 10 + [1.0] * 30))  # after the first 100 steps of 1,000
    assert any(told_of([0.1] * 10 + [1.0] * 30, num_steps=10_000))  # still in the first twentieth
    assert not any(told_of([1.0] * 9, helps=True))
    assert not any(told_of([1.0] * 9, negatives=16))
    assert Shortcut(True).taken({"loss": 1.0}, 10, 1000) == ""  # of a method without negatives


def test_a_probe_that_stays_below_the_start_is_told_once_a_fifth_of_the_run_is_over() -> None:
    trend = ProbeTrend()
    said = [trend.look(0.4, 5.0, at_start=0.5, best=0.5, share_done=share) for share in (0.1, 0.2, 0.3)]
    assert [bool(each) for each in said] == [False, True, False]
    assert "below the start (0.400, start 0.500)" in said[1]
    assert ProbeTrend().look(0.4, 5.0, at_start=0.5, best=0.6, share_done=0.5) == ""  # it was above


def test_a_probe_that_falls_while_the_loss_falls_is_told_once() -> None:
    trend = ProbeTrend()
    said = [trend.look(0.9 - number / 100, 5.0 - number, 0.5, 0.9, number / 10) for number in range(6)]
    assert [bool(each) for each in said] == [False] * 3 + [True] + [False] * 2
    rising_loss = ProbeTrend()
    assert not any(rising_loss.look(0.9 - number / 100, 5.0 + number, 0.5, 0.9, 0.5) for number in range(6))


def test_tiles_that_can_no_longer_be_read_are_missing_from_what_is_compared() -> None:
    watch, keys = Watch(), KeyDrift(age_steps=1)
    x = gaussian(64, 16)
    watch.look(x)
    keys.look(0, x)
    rest = torch.arange(64)[torch.arange(64) % 7 != 3]
    again, keys_again = Watch(), KeyDrift(age_steps=1)
    again.load_state_dict(watch.state_dict())
    keys_again.load_state_dict(keys.state_dict())
    for one in (watch, again):
        health = one.look(x[rest], rest)
        assert (health.drift, health.moved) == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6))
        assert one.look(x).drift == pytest.approx(0, abs=1e-6)  # a disk that came back
        assert one.look(-x[rest], rest).moved == pytest.approx(2)
    assert keys.look(1, x[rest], rest) == pytest.approx(0, abs=1e-6)
    assert keys_again.look(1, -x[rest], rest) == pytest.approx(2)


def turned(degrees: float) -> torch.Tensor:
    angle = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angle.cos(), angle.sin()]).expand(5, 2)


def test_key_drift_is_that_of_the_steps_a_key_is_kept() -> None:
    """Keys that turn by a degree each ten steps, kept for 100: 1 - cos(10 degrees), whatever the looks' spacing."""
    for every in (10, 50, 100):
        drift = KeyDrift(age_steps=100)
        for step in range(0, 601, every):
            last = drift.look(step, turned(step / 10))
        assert last == pytest.approx(1 - torch.cos(torch.deg2rad(torch.tensor(10.0))).item(), rel=1e-4), every
        assert len(drift.keys_of_step) <= 14


def test_key_drift_before_the_run_is_that_old_is_since_its_start() -> None:
    drift = KeyDrift(age_steps=1000)
    drift.look(0, turned(0))
    assert drift.look(100, turned(60)) == pytest.approx(0.5)


def test_key_drift_between_looks_is_in_proportion() -> None:
    drift = KeyDrift(age_steps=25)
    drift.look(0, turned(0))
    assert drift.look(100, turned(60)) == pytest.approx(0.125)


def test_stale_keys_are_named_with_their_cause() -> None:
    drift = KeyDrift(age_steps=64)
    assert drift.verdict(0.09) == ""
    assert "over the 64 steps" in drift.verdict(0.2)
    assert "momentum too low" in drift.verdict(0.2)
