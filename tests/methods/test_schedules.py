import itertools

import pytest

from histossl.methods.schedules import warmup_cosine


def test_values_at_the_corners() -> None:
    at = [warmup_cosine(step, 100, 10, 1.0, 0.1) for step in range(100)]
    assert at[0] == pytest.approx(0.1)  # never zero: the first step counts
    assert at[9] == at[10] == 1.0
    assert at[-1] == pytest.approx(0.1)
    assert at[10 + 89 // 2] == pytest.approx(0.55, abs=0.01)


def test_it_only_falls_after_the_warmup() -> None:
    at = [warmup_cosine(step, 57, 5, 3.0, 0.0) for step in range(5, 57)]
    assert all(later < earlier for earlier, later in itertools.pairwise(at))


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 1), (3, 3)])
def test_tiny_runs_have_finite_rates(steps: int, warmup: int) -> None:
    assert all(0 < warmup_cosine(step, steps, warmup, 1.0, 0.01) <= 1 for step in range(steps))
