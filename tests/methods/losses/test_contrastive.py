"""InfoNCE against closed forms, an explicit float64 softmax, and lightly (oracles 1-5 of the algorithms note)."""

import math

import pytest
import torch
from torch.nn import functional as F

from histossl.methods.losses.contrastive import info_nce


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_equal_vectors_give_ln_of_queue_plus_one(temperature: float) -> None:
    x = unit(1, 128)
    nce = info_nce(x.expand(8, -1), x.expand(8, -1), x.expand(4096, -1), temperature)
    assert nce.loss.item() == pytest.approx(math.log(4097), rel=1e-5)
    assert math.log(4097) == pytest.approx(8.3180, abs=1e-4)


@pytest.mark.parametrize(
    ("size", "temperature", "loss"), [(4096, 0.2, 3.3534), (4096, 0.1, 0.1706), (65536, 0.07, 0.0401)]
)
def test_perfect_positive_among_orthogonal_keys(size: int, temperature: float, loss: float) -> None:
    query = F.one_hot(torch.zeros(4, dtype=torch.long), 8).float()
    keys = F.one_hot(torch.ones(size, dtype=torch.long), 8).float()
    nce = info_nce(query, query, keys, temperature)
    assert nce.loss.item() == pytest.approx(math.log(1 + size * math.exp(-1 / temperature)), rel=1e-5)
    assert nce.loss.item() == pytest.approx(loss, rel=2e-3)  # the figure of the note


def test_random_vectors_start_near_the_known_value() -> None:
    nce = info_nce(unit(512, 128, seed=1), unit(512, 128, seed=2), unit(4096, 128, seed=3), 0.2)
    assert nce.loss.item() == pytest.approx(math.log(4097) + 1 / (2 * 128 * 0.2**2), abs=0.1)


def test_loss_and_gradient_equal_the_explicit_softmax() -> None:
    query = unit(6, 16, seed=1, dtype=torch.float32).requires_grad_()
    key, queue = unit(6, 16, seed=2).requires_grad_(), unit(40, 16, seed=3).requires_grad_()
    nce = info_nce(query, key, queue, 0.3)
    nce.loss.backward()
    q, k, bank = query.detach().double(), key.detach().double(), queue.detach().double()
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ bank.T], 1) / 0.3
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    expected = (p[:, :1] * k + p[:, 1:] @ bank - k) / 0.3 / 6
    assert nce.loss.item() == pytest.approx(float(-p[:, 0].log().mean()), rel=1e-5)
    torch.testing.assert_close(query.grad, expected.float(), rtol=1e-4, atol=1e-6)
    assert key.grad is None
    assert queue.grad is None


def test_equals_lightly_with_the_same_bank() -> None:
    from lightly.loss import NTXentLoss

    query, key, queue = unit(8, 32, seed=1), unit(8, 32, seed=2), unit(64, 32, seed=3)
    theirs = NTXentLoss(temperature=0.2, memory_bank_size=(64, 32))
    theirs.memory_bank.bank = queue.clone()
    theirs.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.long)
    a, b = (3 * query).requires_grad_(), (3 * query).requires_grad_()
    ours = info_nce(F.normalize(a, dim=1), key, queue, 0.2).loss  # theirs normalises inside
    other = theirs(b, key)
    ours.backward()
    other.backward()
    assert ours.item() == pytest.approx(other.item(), rel=1e-5)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_forbidden_keys_leave_the_denominator() -> None:
    query, key, queue = unit(4, 16, seed=1), unit(4, 16, seed=2), unit(20, 16, seed=3)
    allowed = torch.ones(4, 20, dtype=torch.bool)
    allowed[:, 5:] = False
    masked = info_nce(query, key, queue, 0.2, allowed_BK=allowed)
    assert float(masked.loss) == pytest.approx(info_nce(query, key, queue[:5], 0.2).loss.item(), rel=1e-6)


def test_a_weight_of_one_half_counts_two_keys_as_one() -> None:
    query, key, queue = unit(4, 16, seed=1), unit(4, 16, seed=2), unit(10, 16, seed=3)
    half = torch.full((4, 20), math.log(0.5))
    doubled = info_nce(query, key, torch.cat([queue, queue]), 0.2, log_weight_BK=half)
    assert float(doubled.loss) == pytest.approx(info_nce(query, key, queue, 0.2).loss.item(), rel=1e-6)


def test_loss_stays_in_fp32_under_autocast() -> None:
    query, key, queue = unit(8, 32, seed=1), unit(8, 32, seed=2), unit(64, 32, seed=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nce = info_nce(query, key, queue, 0.07)
    assert nce.loss.dtype == torch.float32
    assert nce.loss.item() == pytest.approx(info_nce(query, key, queue, 0.07).loss.item(), rel=1e-6)
