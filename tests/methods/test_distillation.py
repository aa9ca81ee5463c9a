"""Distillation: its loss in closed form, whom it moves, and that two processes compute what one does."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from histossl.core.errors import UsageError
from histossl.methods import TAUGHT, classes_of
from histossl.methods.distillation import Distillation, DistillationConfig, Teacher, entropy
from histossl.methods.losses.contrastive import distillation
from histossl.methods.method import Views
from histossl.methods.modules.batchnorm import batchnorm_buffers
from histossl.runtime import collectives
from histossl.views.recipe import recipe_named
from tests.runtime.test_collectives import on_two

TEACHER_BC = torch.tensor([[2.0, 0.5, -1.0], [0.0, 0.0, 3.0]])


class Colours(nn.Module):
    """Eight features: a BatchNorm over a linear map of a view's mean colours."""

    def __init__(self, seed: int, norm: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.mix = nn.Linear(3, 8, bias=False)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.norm(self.mix(images.mean((2, 3))))
        return features


SAME = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def teacher(classes: str = "abc", input_px: int = 8, shown: Any = SAME) -> Teacher:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        head = nn.Linear(8, len(classes))
    return Teacher(Colours(1, norm=False), head, classes, input_px, SAME, shown, {"folder": "model"})


def method(**knobs: Any) -> Distillation:
    recipe = recipe_named("distillation", 8)
    return Distillation(Colours(2), 8, recipe, DistillationConfig(**knobs), teacher()).train()


def views(count: int = 8) -> Views:
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    numbers = torch.arange(count)
    return Views([images], numbers, numbers, 0)


# ---- the loss


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_a_student_with_the_teachers_logits_has_its_entropy_as_loss(temperature: float) -> None:
    target = (TEACHER_BC / temperature).softmax(1)
    expected = temperature**2 * float(entropy(target).mean())
    assert float(distillation(TEACHER_BC, TEACHER_BC, temperature)) == pytest.approx(expected, rel=1e-6)
    assert float(distillation(TEACHER_BC + 7, TEACHER_BC, temperature)) == pytest.approx(expected, rel=1e-5)
    for seed in range(5):
        other = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
        assert float(distillation(other, TEACHER_BC, temperature)) > expected


def test_at_temperature_one_it_is_the_paper_s_equation_2() -> None:
    student = torch.tensor([[0.3, -0.2, 1.0], [1.0, 2.0, 0.0]])
    by_hand = -sum(
        float(p) * math.log(float(q))
        for row_p, row_q in zip(TEACHER_BC.softmax(1), student.softmax(1), strict=True)
        for p, q in zip(row_p, row_q, strict=True)
    )
    assert float(distillation(student, TEACHER_BC, 1.0)) == pytest.approx(by_hand / 2, rel=1e-5)


def test_when_cold_it_asks_for_the_first_choice_alone() -> None:
    student = TEACHER_BC.flip(1) / 10
    cold = 1e-3
    expected = cold**2 * F.cross_entropy(student / cold, TEACHER_BC.argmax(1))
    assert float(distillation(student, TEACHER_BC, cold)) == pytest.approx(float(expected), rel=1e-4)


def test_when_hot_it_is_the_distance_of_the_centred_logits() -> None:
    student, hot = TEACHER_BC.double().flip(1), 1e3
    above = hot**2 * (
        F.cross_entropy(student / hot, (TEACHER_BC.double() / hot).softmax(1))
        - entropy((TEACHER_BC.double() / hot).softmax(1)).mean()
    )
    apart = (student - student.mean(1, keepdim=True)) - (TEACHER_BC - TEACHER_BC.mean(1, keepdim=True))
    assert float(above) == pytest.approx(float(apart.square().sum(1).mean()) / 6, rel=1e-2)


def test_gradient_is_the_difference_of_the_shares_and_reaches_the_student_alone() -> None:
    student, taught = torch.zeros(2, 3, requires_grad=True), TEACHER_BC.clone().requires_grad_()
    distillation(student, taught, 2.0).backward()
    expected = 2.0 * (student.detach().softmax(1) - (TEACHER_BC / 2).softmax(1)) / 2  # T times, over two rows
    torch.testing.assert_close(student.grad, expected)
    assert taught.grad is None


def test_a_class_without_probability_costs_nothing() -> None:
    taught = torch.tensor([[0.0, 0.0, -math.inf]])
    loss = distillation(torch.zeros(1, 3, requires_grad=True), taught, 3.0)
    assert float(loss.detach()) == pytest.approx(9 * math.log(3))
    assert float(entropy(taught.softmax(1))[0]) == pytest.approx(math.log(2))


# ---- the method


def test_hard_labels_are_cross_entropy_to_the_first_choice() -> None:
    one = method(targets="hard")
    nn.init.normal_(one.classifier.weight)
    batch = views()
    logits = one.classifier(one.backbone(batch.images[0]))
    expected = F.cross_entropy(logits, one.teacher(batch.images[0]).argmax(1))
    torch.testing.assert_close(one(batch).loss, expected)


def test_it_begins_by_knowing_nothing() -> None:
    for temperature in (1.0, 3.0):
        assert float(method(temperature=temperature)(views()).loss.detach()) == pytest.approx(
            temperature**2 * math.log(3)
        )


def test_only_the_student_learns_and_the_teacher_is_in_no_checkpoint() -> None:
    one = method()
    nn.init.normal_(one.classifier.weight)
    before = [value.clone() for value in one.teacher.state_dict().values()]
    optimizer = torch.optim.SGD([each for each in one.parameters() if each.requires_grad], lr=1.0)
    one.train()(views()).loss.backward()
    optimizer.step()
    assert all(parameter.grad is not None for parameter in one.backbone.parameters())
    assert all(parameter.grad is None for parameter in one.teacher.parameters())
    for old, new in zip(before, one.teacher.state_dict().values(), strict=True):
        assert torch.equal(old, new)
    assert not one.teacher.training
    assert set(one.state_dict()) == {f"backbone.{name}" for name in one.backbone.state_dict()} | {
        "classifier.weight", "classifier.bias", "answer_C",
    }  # fmt: skip


def test_the_teacher_follows_to_another_device_and_type() -> None:
    one = method()
    one.to(torch.float64)
    assert one.teacher.head.weight.dtype == torch.float64
    one.to("meta")
    assert one.teacher.scale.device.type == "meta"


def test_forward_changes_nothing_but_batchnorm() -> None:
    one = method()
    assert torch.equal(one(views()).loss, one(views()).loss)
    assert not one.answer_C.any()


def test_the_ceiling_is_the_loss_of_answering_all_tiles_alike() -> None:
    one = method(temperature=2.0)
    assert one.loss_ceiling() is None
    batch = views()
    one.after_step([one(batch).carry], 0.1)
    target = (one.teacher(batch.images[0]) / 2).softmax(1)
    with torch.no_grad():
        one.classifier.bias.copy_(2 * target.mean(0).log())  # and weights of zero
    assert one.loss_ceiling() == pytest.approx(float(one(batch).loss.detach()), rel=1e-5)


def test_the_teacher_sees_views_as_it_was_trained_on_them() -> None:
    shown = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.1))
    image = torch.rand(2, 3, 8, 8)
    mean, std = (torch.tensor(each)[:, None, None] for each in shown)
    torch.testing.assert_close(teacher(shown=shown)((image - mean) / std), teacher()((image - 0.5) / 0.25))
    flat = torch.rand(2, 3, 1, 1)  # a flat tile has the same colour at any size
    torch.testing.assert_close(teacher(input_px=16)(flat.expand(2, 3, 8, 8)), teacher()(flat.expand(2, 3, 8, 8)))


@pytest.mark.parametrize(
    ("target", "student", "said"),
    [
        ((0.4, 0.3, 0.3), (0.35, 0.35, 0.3), ""),
        ((0.4, 0.3, 0.3), (0.995, 0.003, 0.002), "collapse to one class.*'a'.*the teacher 40%"),
        ((0.001, 0.0, 0.999), (0.3, 0.3, 0.4), "the teacher calls 100% of the tiles 'c'"),
    ],
)
def test_what_ails_it_is_named(target: tuple[float, ...], student: tuple[float, ...], said: str) -> None:
    row = {f"target_share/{name}": share for name, share in zip("abc", target, strict=True)}
    row |= {f"student_share/{name}": share for name, share in zip("abc", student, strict=True)}
    found = method().ailment(row)
    assert (not found) if not said else pytest.RaisesExc(Exception, match=said).matches(Exception(found))


def test_a_student_pushed_into_one_class_is_recognised_from_its_own_row() -> None:
    one = method()
    with torch.no_grad():
        one.classifier.bias.copy_(torch.tensor([0.0, 50.0, 0.0]))
    row = {name: float(value) for name, value in one(views()).metrics.items()}
    assert "collapse to one class: the student calls 100% of the tiles 'b'" in one.ailment(row)


def test_impossible_settings_are_one_clear_line() -> None:
    with pytest.raises(UsageError, match="did you mean 'hard'"):
        DistillationConfig(targets="hart")
    with pytest.raises(UsageError, match="--temperature 0: must be above 0"):
        DistillationConfig(temperature=0)
    with pytest.raises(UsageError, match="hard labels have no temperature"):
        DistillationConfig(targets="hard", temperature=2)
    with pytest.raises(UsageError, match="makes 2 views, and distillation takes 1"):
        Distillation(Colours(2), 8, recipe_named("mocov2", 8), DistillationConfig(), teacher())


def test_tissue_keeps_its_stain_and_most_of_the_tile() -> None:
    paper, tissue = (recipe_named(name, 96).views for name in ("distillation", "distillation-histology"))
    assert len(paper) == len(tissue) == 1
    assert (paper[0].scale, paper[0].mirror_p, paper[0].flip_p) == ((0.08, 1.0), 0.5, 0.0)
    assert (tissue[0].scale, tissue[0].quarter_turns, tissue[0].stain_p) == ((0.5, 1.0), True, 0.0)
    assert {view.jitter_p + view.grey_p + view.blur_p + view.solarize_p for view in (*paper, *tissue)} == {0}


def test_it_is_listed_as_taught() -> None:
    assert classes_of("distillation") == (Distillation, DistillationConfig)
    assert set(TAUGHT) == {"distillation"}


def one_step() -> dict[str, Tensor]:
    """Loss, gradients and state after a step, over all processes."""
    one = method(temperature=2.0)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        one.classifier.weight.copy_(torch.randn(3, 8, generator=generator))
    batch = views()
    mine = replace_images(batch, collectives.own_part(batch.images[0]))
    outcome = one(mine)
    outcome.loss.backward()
    one.after_step([outcome.carry], 0.5)
    grads = {name: collectives.mean_over_processes(each.grad) for name, each in one.named_parameters()}
    state = {str(number): each for number, each in enumerate(batchnorm_buffers(one))}
    return {"loss": collectives.mean_over_processes(outcome.loss), "answer": one.answer_C, **grads, **state}


def replace_images(batch: Views, images: Tensor) -> Views:
    numbers = collectives.own_part(batch.tiles_B)
    return batch._replace(images=[images], tiles_B=numbers, slides_B=numbers)


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    alone = one_step()
    for together in on_two(one_step, tmp_path):
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value.detach(), rtol=1e-4, atol=1e-6, msg=name)


def test_knobs_are_told_with_the_paper_s_values(cli) -> None:
    told = cli("methods", "distillation").out
    assert "--temperature" in told
    assert "--targets" in told
    assert "--set" not in told  # distill refuses it
    assert replace(DistillationConfig(), temperature=3.0).temperature == 3
