"""LARS against google-research/simclr's formula, worked out again in float64 (oracle 28)."""

import pytest
import torch

from histossl.training.setup.lars import LARS


def rule(w: torch.Tensor, g: torch.Tensor, v: torch.Tensor, lr: float, decay: float, adapt: bool) -> tuple:
    if adapt:
        g = g + decay * w
        norms = w.norm(), g.norm()
        g = g * (0.001 * norms[0] / norms[1] if all(norms) else 1.0)
    v = 0.9 * v + lr * g
    return w - v, v


@pytest.mark.parametrize("shape", [(4, 3), (5, 2, 3, 3), (6,)])
def test_three_steps_follow_the_official_rule(shape: tuple[int, ...]) -> None:
    """Trust eta |w| / |g + wd w| on weights; none, and no decay, on biases and norms."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    weight = torch.nn.Parameter(start.clone())
    flat = len(shape) == 1
    optimizer = LARS([{"params": [weight], "weight_decay": 0.0 if flat else 0.1}], lr=0.5)
    w, v = start.double(), torch.zeros(shape, dtype=torch.float64)
    for lr in (0.5, 0.5, 0.25):
        gradient = torch.randn(shape, generator=generator)
        weight.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        w, v = rule(w, gradient.double(), v, lr, 0.1, adapt=not flat)
    torch.testing.assert_close(weight.detach().double(), w, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("zero", ["weight", "gradient"])
def test_a_zero_norm_takes_the_plain_rate(zero: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 2) if zero == "weight" else torch.ones(2, 2))
    weight.grad = torch.ones(2, 2) if zero == "weight" else torch.zeros(2, 2)
    LARS([{"params": [weight], "weight_decay": 0.0}], lr=0.5).step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), -0.5) if zero == "weight" else torch.ones(2, 2))


def test_scale_of_the_loss_does_not_matter_to_weights() -> None:
    """So the official SimCLR loss, twice the paper's, trains alike."""
    ends = []
    for scale in (1.0, 2.0):
        weight = torch.nn.Parameter(torch.ones(3, 3))
        weight.grad = scale * torch.arange(9.0).reshape(3, 3)
        LARS([{"params": [weight], "weight_decay": 0.0}], lr=0.5).step()
        ends.append(weight.detach())
    torch.testing.assert_close(*ends)
