"""KoLeo and KDE: lightly's fixtures, the sign, and what a gradient step does (oracles 20, 21)."""

import math
from collections.abc import Callable

import pytest
import torch
from lightly.loss import KoLeoLoss
from runtime.test_collectives import on_two
from torch import Tensor
from torch.nn import functional as F

from histossl.methods.losses.koleo import kde, koleo
from histossl.runtime import collectives


def features(count: int = 8, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("points", "value"),
    [([[1.0, 0], [-1, 0]], -math.log(2)), ([[1.0, 0], [0, 1]], -math.log(math.sqrt(2)))],
)
def test_koleo_of_opposite_and_orthogonal_pairs(points: list[list[float]], value: float) -> None:
    assert koleo(torch.tensor(points)).item() == pytest.approx(value, abs=1e-6)


def test_koleo_of_duplicates_is_large_and_finite_with_a_finite_gradient() -> None:
    x = torch.ones(4, 3, requires_grad=True)
    value = koleo(x)
    value.backward()
    assert 17 < value.item() < 18.5
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())


def test_koleo_equals_lightly_s_and_its_gradient() -> None:
    a, b = features().requires_grad_(), features().requires_grad_()
    ours, theirs = koleo(a), KoLeoLoss()(b)
    ours.backward()
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kappa", [5.0, 10.0])
def test_kde_closed_forms(kappa: float) -> None:
    assert kde(torch.ones(6, 4), kappa).item() == pytest.approx(kappa, rel=1e-5)
    assert kde(torch.eye(6), kappa).item() == pytest.approx(0, abs=1e-5)
    assert kde(torch.tensor([[1.0, 0], [-1, 0]]), kappa).item() == pytest.approx(-kappa, rel=1e-5)


@pytest.mark.parametrize("term", [koleo, kde])
def test_a_step_against_the_gradient_draws_features_apart(term: Callable[[Tensor], Tensor]) -> None:
    """The sign: a public code base minimises the negated density and clumps its features."""

    def closeness(x: Tensor) -> float:
        unit = F.normalize(x, dim=1)
        return float((unit @ unit.T - 2 * torch.eye(len(x))).amax(1).mean())

    x = (features() + 3).requires_grad_()
    before = closeness(x.detach())
    for _ in range(20):
        (gradient,) = torch.autograd.grad(term(x), x)
        x = (x - 0.3 * gradient).detach().requires_grad_()
    assert closeness(x.detach()) < before - 0.01


def spread() -> tuple[Tensor, Tensor]:
    x = collectives.own_part(features()).clone().requires_grad_()
    loss = koleo(x) + kde(x)
    loss.backward()
    assert x.grad is not None
    return collectives.mean_over_processes(loss.detach()), collectives.gather(x.grad) / collectives.world_size()


def test_neighbours_are_sought_on_all_processes(tmp_path) -> None:
    for together in on_two(spread, tmp_path):
        for ours, theirs in zip(together, spread(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
