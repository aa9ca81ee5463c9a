"""DINO's losses and assignments against closed forms, float64 sums and lightly (oracles 10, 11, 14-16)."""

import math

import pytest
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss
from runtime.test_collectives import on_two
from torch import Tensor
from torch.nn import functional as F

from histossl.methods.losses import prototype
from histossl.methods.losses.prototype import Ailments, assignment_metrics, centred, patch_loss, sinkhorn, view_loss
from histossl.runtime import collectives


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- cross-entropy between views


@pytest.mark.parametrize(("prototypes", "loss"), [(4096, 8.3178), (8192, 9.0109), (65536, 11.0904)])
def test_uniform_teacher_and_student_give_ln_of_prototypes(prototypes: int, loss: float) -> None:
    same = torch.zeros(2, 3, prototypes)
    ours = view_loss(torch.zeros(2, 3, 4), torch.ones(prototypes, 4), centred(same, torch.zeros(prototypes), 0.04), 0.1)
    assert ours.item() == pytest.approx(math.log(prototypes), rel=1e-6)
    assert ours.item() == pytest.approx(loss, abs=1e-4)


def test_loss_is_entropy_plus_divergence() -> None:
    teacher, student = logits(5, 16), logits(5, 16, seed=1)
    target = centred(teacher, torch.zeros(16), 0.07)
    p, q = (F.log_softmax(each.double(), 1) for each in (teacher / 0.07, student / 0.1))
    expected = -(p.exp() * p).sum(1) + (p.exp() * (p - q)).sum(1)
    weight = torch.arange(1.0, 6)
    ours = patch_loss(student, torch.eye(16), target, weight, 1, 0.1).double()
    torch.testing.assert_close(ours, expected @ weight.double(), rtol=1e-5, atol=1e-6)
    same = patch_loss(teacher, torch.eye(16), target, weight, 1, 0.07).double()
    torch.testing.assert_close(same, -(p.exp() * p).sum(1) @ weight.double(), rtol=1e-5, atol=1e-6)  # no divergence


@pytest.mark.parametrize("num_local", [0, 1, 8])
def test_every_pair_of_different_views_weighs_the_same(num_local: int) -> None:
    """2 (2 + L) - 2 pairs; also without small crops, where DINOv2's code divides by 3."""
    teacher, student = logits(2, 4, 12), logits(2 + num_local, 4, 12, seed=1)
    target = centred(teacher, torch.zeros(12), 0.05)
    log_q = F.log_softmax(student.double() / 0.1, -1)
    pairs = [(v, q) for v in range(2) for q in range(2 + num_local) if v != q]
    assert len(pairs) == 2 * (2 + num_local) - 2
    expected = torch.stack([-(target[v].double() * log_q[q]).sum(-1).mean() for v, q in pairs]).mean()
    assert view_loss(student, torch.eye(12), target, 0.1).item() == pytest.approx(expected.item(), rel=1e-5)


def test_equals_lightly_s_dino_loss_and_gradient() -> None:
    teacher, student = logits(2, 6, 32), logits(5, 6, 32, seed=1)
    theirs = DINOLoss(output_dim=32, warmup_teacher_temp=0.05, teacher_temp=0.05, student_temp=0.1)
    centre = logits(32, seed=2) / 10
    theirs.center.copy_(centre)
    a, b = student.clone().requires_grad_(), student.clone().requires_grad_()
    ours = view_loss(a, torch.eye(32), centred(teacher, centre, 0.05), 0.1)
    other = theirs(list(teacher), list(b), teacher_temp=0.05)
    ours.backward()
    other.backward()
    assert ours.item() == pytest.approx(other.item(), rel=1e-5)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


def test_equals_lightly_s_patch_loss_and_gradient() -> None:
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[0, :2], mask[2, 1, 1:] = True, True  # the second crop stays whole
    teacher, student = logits(int(mask.sum()), 10), logits(int(mask.sum()), 10, seed=1)
    theirs = IBOTPatchLoss(output_dim=10, teacher_temp=0.07, student_temp=0.1)
    a, b = student.clone().requires_grad_(), student.clone().requires_grad_()
    weight = (1.0 / mask.flatten(1).sum(1).clamp(min=1))[mask.flatten(1).nonzero()[:, 0]]
    ours = patch_loss(a, torch.eye(10), centred(teacher, torch.zeros(10), 0.07), weight, 3, 0.1)
    other = theirs(teacher, b, mask, teacher_temp=0.07)
    ours.backward()
    other.backward()
    assert ours.item() == pytest.approx(other.item(), rel=1e-5)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


def test_a_shift_of_prototypes_that_the_centre_has_changes_nothing() -> None:
    teacher, shift = logits(4, 8), logits(8, seed=1)
    torch.testing.assert_close(centred(teacher + shift, shift, 0.04), centred(teacher, torch.zeros(8), 0.04))


def of_a_plain_head(towards: Tensor, prototypes: Tensor, target: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """The same loss as autograd has it from whole logits."""
    scaled = (towards @ prototypes.T).float() / temperature
    return (weight * (torch.logsumexp(scaled, -1) * target.sum(-1) - (target * scaled).sum(-1))).sum()


@pytest.mark.parametrize("values", [1, 24 * 3, 2**26])  # rows one by one, three at a time (the last alone), all
def test_in_pieces_it_is_the_loss_and_gradient_of_whole_logits(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prototype, "CHUNK", values)
    target, weight = 2 * centred(logits(7, 24), torch.zeros(24), 0.05), logits(7, seed=3).abs()
    ours = [logits(7, 5, seed=1).requires_grad_(), logits(24, 5, seed=2).requires_grad_()]
    theirs = [each.detach().clone().requires_grad_() for each in ours]
    loss, expected = patch_loss(*ours, target, weight, 1, 0.1), of_a_plain_head(*theirs, target, weight, 0.1)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_under_autocast_only_the_products_are_in_bf16() -> None:
    towards, prototypes = (logits(*shape, seed=1).bfloat16().float() for shape in ((7, 4), (64, 4)))
    target, weight = centred(logits(7, 64), torch.zeros(64), 0.04), torch.ones(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = patch_loss(towards, prototypes, target, weight, 1, 0.1)
    rounded = of_a_plain_head(towards.bfloat16(), prototypes.bfloat16(), target, weight, 0.1)
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(rounded.item(), rel=1e-6)


def test_a_batch_without_masked_patches_has_no_patch_loss() -> None:
    towards = torch.zeros(0, 4, requires_grad=True)
    loss = patch_loss(towards, torch.ones(8, 4), torch.zeros(0, 8), torch.zeros(0), 3, 0.1)
    loss.backward()
    assert loss.item() == 0


# ---- Sinkhorn


def test_tokens_have_one_unit_and_prototypes_share_them() -> None:
    cosine = F.normalize(logits(64, 32), dim=1)
    mass = sinkhorn(cosine, 0.07)
    torch.testing.assert_close(mass.sum(1), torch.ones(64), rtol=1e-6, atol=1e-6)
    assert float((mass.sum(0) / 2 - 1).abs().max()) < 0.5  # three iterations: nearly
    torch.testing.assert_close(sinkhorn(cosine, 0.07, 100).sum(0), torch.full((32,), 2.0), rtol=1e-4, atol=1e-4)


def test_shifting_all_or_one_prototype_changes_nothing_shifting_a_token_does() -> None:
    """Prototypes are normalised first: this pins the order of the iteration."""
    cosine = logits(16, 8).double() / 4
    alone = sinkhorn(cosine, 0.1)
    torch.testing.assert_close(sinkhorn(cosine + 3, 0.1), alone, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sinkhorn(cosine + logits(8, seed=1), 0.1), alone, rtol=1e-3, atol=1e-5)
    by_token = sinkhorn(cosine + logits(16, 1, seed=2), 0.1)
    assert float((by_token - alone).abs().max()) > 0.05


def test_logits_that_would_overflow_exp_are_finite() -> None:
    mass = sinkhorn(torch.tensor([[100.0, 0.0], [0.0, 100.0]]), 0.05)
    torch.testing.assert_close(mass, torch.eye(2), rtol=0, atol=1e-6)


def test_no_tokens_give_no_rows() -> None:
    assert sinkhorn(torch.zeros(0, 5), 0.1).shape == (0, 5)


def balanced() -> Tensor:
    return collectives.gather(sinkhorn(collectives.own_part(logits(8, 6)), 0.1))


def test_two_processes_balance_what_one_balances(tmp_path) -> None:
    for together in on_two(balanced, tmp_path):
        torch.testing.assert_close(together, balanced(), rtol=1e-5, atol=1e-7)


# ---- what is told of a teacher that dies


def told(target: Tensor, assign: str = "sinkhorn") -> str:
    return Ailments(assign).of({name: float(value) for name, value in assignment_metrics(target).items()}, 0.5)


def test_a_teacher_that_finds_all_alike_is_named() -> None:
    alike = torch.full((32, 64), 1 / 64)
    assert "uniform collapse" in told(alike)
    assert "assign=sinkhorn" in told(alike, "centre")
    for cause in ("--lr too high", "momentum too low"):
        assert cause in told(alike)
    assert "centr" not in told(alike)  # it is on Sinkhorn


def test_a_teacher_of_one_prototype_is_named() -> None:
    assert "one-hot collapse" in told(F.one_hot(torch.zeros(32, dtype=torch.long), 64).float())


def test_a_healthy_teacher_is_left_alone() -> None:
    assert told(sinkhorn(F.normalize(logits(64, 128), dim=1), 0.04)) == ""


@pytest.mark.parametrize(("num_steps", "after"), [(20_000, 200), (600, 60)])
def test_all_alike_must_last_two_hundred_steps_or_a_tenth_of_the_run(num_steps: int, after: int) -> None:
    ailments = Ailments("sinkhorn")
    alike, healthy = {"teacher_entropy": 0.995}, {"teacher_entropy": 0.9898}  # the second: a fresh head of 131,072

    def at(step: int, row: dict[str, float]) -> str:
        return ailments.of({"step": float(step), **row}, step / num_steps)

    assert not at(1, healthy)
    assert not at(10, alike)
    assert not at(9 + after, alike)
    assert "uniform collapse" in at(10 + after, alike)
    assert not at(20 + after, healthy)
    assert not at(30 + after, alike)  # begins anew


def test_a_student_that_says_the_same_of_all_has_learnt_nothing_and_the_teacher_itself_all() -> None:
    target = sinkhorn(F.normalize(logits(64, 128), dim=1), 0.04)
    for said, expected in ((torch.full((64, 128), 1 / 128), 0.0), (target.mean(0).expand(64, -1), 0.0), (target, 1.0)):
        loss = -(target * said.log()).sum(1).mean()
        assert float(assignment_metrics(target, loss=loss)["learnt"]) == pytest.approx(expected, abs=0.02)
    constant = torch.softmax(logits(1, 128), 1).expand(64, -1)
    assert float(assignment_metrics(target, loss=-(target * constant.log()).sum(1).mean())["learnt"]) < 0


def test_a_student_that_learns_nothing_is_told_after_a_fifth_of_the_run() -> None:
    for start, heard in ((100, False), (300, True)):
        ailments = Ailments("sinkhorn")
        rows = [{"step": float(start + more), "learnt": 0.3, "patch_learnt": -0.1} for more in (0, 50, 110)]
        told = [ailments.of(row, row["step"] / 1001) for row in rows]
        assert ("collapse of the student: of what the teacher says of patches" in told[-1]) == heard
        assert not told[0]
