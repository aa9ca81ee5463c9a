"""A step of DINO, iBOT and DINOv2 on backbones of a few thousand weights (oracles 12, 17, 22-24, 26)."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runtime.test_collectives import on_two
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from histossl.core.config import PretrainConfig
from histossl.core.errors import UsageError
from histossl.methods import classes_of
from histossl.methods.method import Method, Views
from histossl.methods.modules.projection_heads import PrototypeHead
from histossl.runtime import collectives
from histossl.training.loop import Precision, clip_gradients, train
from histossl.training.setup.optim import in_parallel, optimizer_for
from histossl.training.setup.planner import plan
from histossl.views.recipe import recipe_named

CPU = torch.device("cpu")
SMALL = {"prototypes": 16, "hidden_dim": 12, "bottleneck_dim": 8, "num_local": 2, "drop_path": 0.0}
METHODS = ("dino", "ibot", "dinov2")


def vit() -> nn.Module:
    torch.manual_seed(0)
    made = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0, dynamic_img_size=True
    )
    for parameter in made.parameters():  # timm's start gives nearly the same feature to all that it sees
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return made


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def method(name: str, backbone: nn.Module | None = None, **knobs: Any) -> Any:
    cls, config = classes_of(name)
    made: Method = cls(backbone or vit(), 16, recipe_named("dino", 32, 16), config(**{**SMALL, **knobs}))
    return made.train()


def views(count: int = 8, first: int = 0) -> Views:
    generator = torch.Generator().manual_seed(7)
    whole = [torch.randn(8, 3, side, side, generator=generator) for side in (32, 32, 16, 16)]
    images = [each[first : first + count] for each in whole]
    numbers = torch.arange(first, first + count)
    return Views(images, numbers, numbers // 2, 0, positions_B=numbers)


def step(made: Any, batch: Views, optimizer: torch.optim.Optimizer, progress: float = 0.5) -> Tensor:
    optimizer.zero_grad()
    outcome = made(batch._replace(progress=progress))
    outcome.loss.backward()
    made.before_step(progress)
    optimizer.step()
    made.after_step([outcome.carry], progress)
    return outcome.loss.detach()


# ---- student and teacher


@pytest.mark.parametrize("name", METHODS)
def test_teacher_begins_as_the_student_heads_too_and_has_no_gradient(name: str) -> None:
    made = method(name)
    pairs = [(made.teacher, made.student), (made.teacher_head, made.head)]
    if made.patch_head is not None:
        pairs.append((made.teacher_patch_head, made.patch_head))
    assert len(pairs) == (3 if name == "dinov2" else 2)
    for slow, fast in pairs:
        for a, b in zip(slow.state_dict().values(), fast.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    made(views()).loss.backward()
    assert all(parameter.grad is None for slow, _ in pairs for parameter in slow.parameters())
    assert all(parameter.grad is not None for parameter in made.learner().parameters())
    assert not any(parameter.requires_grad for parameter in made.backbone.parameters())  # exported: the teacher


@pytest.mark.parametrize("name", METHODS)
def test_forward_twice_gives_the_same_loss_and_changes_nothing(name: str) -> None:
    made = method(name)
    before = {key: value.clone() for key, value in made.state_dict().items()}
    assert made(views()).loss.item() == made(views()).loss.item()
    for key, value in made.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", METHODS)
def test_teacher_follows_after_the_step(name: str) -> None:
    made = method(name, momentum=0.9, momentum_end=0.9)
    start = {key: value.clone() for key, value in made.teacher.named_parameters()}
    step(made, views(), torch.optim.SGD(made.parameters(), lr=0.1))
    student = dict(made.student.named_parameters())
    for key, value in made.teacher.named_parameters():
        torch.testing.assert_close(value, 0.9 * start[key] + 0.1 * student[key].detach(), rtol=1e-5, atol=1e-6)


def test_momentum_rises_to_its_end_and_stays_for_zero() -> None:
    for end, expected in ((1.0, 1.0), (0.0, 0.5)):
        made = method("dino", momentum=0.5, momentum_end=end)
        start = made.teacher_head.last_layer.weight.clone()
        made.head.last_layer.weight.data += 1
        made.after_step([made(views()).carry], 1.0)
        assert float((made.teacher_head.last_layer.weight - start).mean()) == pytest.approx(1 - expected, abs=1e-5)


def test_pixels_of_the_teacher_get_no_gradient_those_of_the_student_do() -> None:
    made = method("dino")
    batch = views()
    images = [image.requires_grad_() for image in batch.images]
    made(batch._replace(images=images)).loss.backward()
    assert all(bool(torch.isfinite(image.grad).all()) and bool(image.grad.abs().sum() > 0) for image in images)
    made.zero_grad()
    for parameter in made.student.parameters():
        parameter.requires_grad_(False)
    for parameter in made.head.parameters():
        parameter.requires_grad_(False)
    assert not made(views()).loss.requires_grad  # nothing flows through the teacher


def test_batchnorm_of_a_cnn_teacher_takes_the_batch_s_statistics_and_drop_path_is_off() -> None:
    made = method("dino", cnn())
    assert all(module.training for module in made.teacher.modules() if isinstance(module, nn.BatchNorm2d.__base__))
    assert not made.teacher.training
    made.eval()
    assert not any(module.training for module in made.teacher.modules())


# ---- centre, temperature, last layer


def test_centre_is_of_batches_before_and_follows_its_closed_form() -> None:
    made = method("dino", momentum=1.0)
    outcome = made(views())
    assert float(made.centre_K.abs().sum()) == 0
    for number in range(1, 4):
        made.after_step([outcome.carry], 0.5)
        torch.testing.assert_close(made.centre_K, (1 - 0.9**number) * outcome.carry.crops_K, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "tokens"), [("ibot", 2 * 8 * 16), ("dinov2", None)])
def test_patch_centre_is_of_all_patches_for_ibot_and_of_the_masked_for_dinov2(name: str, tokens: int | None) -> None:
    made = method(name, assign="centre")
    outcome = made(views())
    masked = int(made._masked(views(), torch.cat(views().images[:2])).token_R.numel())
    assert float(outcome.carry.num_patches) == (tokens or masked)
    made.after_step([outcome.carry], 0.5)
    mean_K = outcome.carry.patches_K / outcome.carry.num_patches
    torch.testing.assert_close(made.patch_centre_K, 0.1 * mean_K, rtol=1e-4, atol=1e-7)


def test_teacher_temperature_rises_to_its_value_and_stays() -> None:
    made = method("dino", teacher_temperature=0.07, teacher_temperature_warmup=0.3)
    at = [made._teacher_temperature(progress, 0.07) for progress in (0.0, 0.15, 0.3, 1.0)]
    assert at == pytest.approx([0.04, 0.055, 0.07, 0.07])


def test_prototypes_rest_at_first_and_then_move() -> None:
    made = method("dinov2", freeze_last_layer=0.1, trainable_norm=True)
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.01, weight_decay=0.1)
    of_prototypes = ("last_layer.weight", "gain_K1")
    before = {name: value.clone() for name, value in made.named_parameters() if name.endswith(of_prototypes)}
    hidden = made.head.mlp[0].weight.clone()
    step(made, views(), optimizer, progress=0.05)
    heads = [name for name in before if not name.startswith("teacher")]
    assert len(heads) == 4
    for name in heads:
        assert torch.equal(made.get_parameter(name), before[name]), name
    assert not torch.equal(made.head.mlp[0].weight, hidden)
    step(made, views(), optimizer, progress=0.2)
    assert not any(torch.equal(made.get_parameter(name), before[name]) for name in heads)


def test_gains_and_the_mask_token_are_decayed_as_the_official_code_does() -> None:
    made = method("ibot", trainable_norm=True)
    planned: Any = SimpleNamespace(optimizer="adamw", lr=0.1, weight_decay=0.04, layer_decay=0.7)
    groups = optimizer_for(made, planned, torch.device("cpu")).param_groups
    decayed = {id(each) for group in groups for each in group["params"] if group["weight_decay"] == 0.04}
    assert {id(made.head.gain_K1), id(made.student.mask_token)} <= decayed
    assert id(made.head.mlp[0].bias) not in decayed


def test_one_prototype_alone_is_refused() -> None:
    with pytest.raises(UsageError, match="prototypes"):
        method("dino", prototypes=1)


def test_logits_are_cosines() -> None:
    head = PrototypeHead(6, 40, hidden_dim=8, bottleneck_dim=5)
    assert float(head(100 * torch.randn(64, 6)).detach().abs().max()) <= 1 + 1e-6
    gained = PrototypeHead(6, 40, hidden_dim=8, bottleneck_dim=5, trainable_norm=True)
    gained.load_state_dict({**head.state_dict(), "gain_K1": torch.full((40, 1), 2.0)})
    x = torch.randn(3, 6)
    torch.testing.assert_close(gained(x), 2 * head(x))


def test_loss_at_the_start_is_near_ln_of_prototypes() -> None:
    made = method("dino", prototypes=4096, bottleneck_dim=256)
    assert made(views()).loss.item() == pytest.approx(math.log(4096), rel=0.2)


# ---- crops


@pytest.mark.parametrize(("patch", "local"), [(8, 16), (14, 28)])
def test_small_crops_are_whole_patches(patch: int, local: int) -> None:
    side = 4 * patch
    backbone = VisionTransformer(
        img_size=side, patch_size=patch, embed_dim=16, depth=1, num_heads=2, num_classes=0, dynamic_img_size=True
    )
    cls, config = classes_of("dinov2")
    made = cls(backbone, 16, recipe_named("dinov2", side), config(**{**SMALL, "num_local": 8}))
    assert [view.size_px for view in made.views().views] == [side, side, *[local] * 8]


def test_the_last_phase_is_seen_larger() -> None:
    made = method("dinov2", high_resolution_px=64, high_resolution_share=0.2)
    assert [view.size_px for view in made.views(0.79).views] == [32, 32, 16, 16]
    assert [view.size_px for view in made.views(0.8).views] == [64, 64, 16, 16]


def test_the_last_phase_has_a_lower_rate_of_its_own() -> None:
    made = method("dinov2", high_resolution_px=64, high_resolution_share=0.4, high_resolution_lr=0.25)
    optimizer = torch.optim.SGD([{"params": list(made.learner().parameters()), "lr_scale": 0.5}], lr=1.0)
    batches = iter(
        views()._replace(images=make_larger(views().images) if number > 2 else views().images) for number in range(5)
    )
    precision, rates = Precision(), []
    loop = train(
        made, optimizer, batches, lambda step: 0.1 - 0.01 * step, 0, 5, CPU, precision, precision.scaler(CPU), 3
    )
    for done in loop:
        rates.append((done.lr, optimizer.param_groups[0]["lr"]))
    assert [lr for lr, _ in rates] == pytest.approx([0.1, 0.09, 0.08, 0.07 / 4, 0.06 / 4])
    assert [own for _, own in rates] == pytest.approx([lr / 2 for lr, _ in rates])
    assert method("dinov2", high_resolution_lr=0.25).lr_factor(1.0) == 1.0  # there is no such phase


def make_larger(images: list[Tensor]) -> list[Tensor]:
    return [nn.functional.interpolate(image, 64) for image in images[:2]] + images[2:]


def test_recipes_without_small_crops_are_refused_unless_none_are_wanted() -> None:
    cls, config = classes_of("dino")
    with pytest.raises(UsageError, match="has no small crops; use dino or dinov2, or --set num_local=0"):
        cls(vit(), 16, recipe_named("mocov2", 32), config(**SMALL))
    made = cls(vit(), 16, recipe_named("mocov2", 32), config(**{**SMALL, "num_local": 0}))
    assert len(made.views().views) == 2


def test_one_teacher_pass_and_one_student_pass_for_each_crop_size() -> None:
    made = method("dinov2")
    calls: list[tuple[str, tuple[int, ...]]] = []
    for name in ("teacher", "student"):
        getattr(made, name).register_forward_hook(
            lambda _, inputs, __, name=name: calls.append((name, tuple(inputs[0].shape)))
        )
    made(views())
    assert calls == [("teacher", (16, 3, 32, 32)), ("student", (16, 3, 32, 32)), ("student", (16, 3, 16, 16))]


# ---- clipping, by parameter and all together (oracle 23)


def test_clipping_one_by_one_and_all_together() -> None:
    def two() -> list[nn.Parameter]:
        made = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
        made[0].grad, made[1].grad = torch.tensor([4.0]), torch.tensor([3.0])
        return made

    together, apart = two(), two()
    assert float(clip_gradients([together], 1.0)) == pytest.approx(5)
    assert [float(each.grad) for each in together] == pytest.approx([0.8, 0.6], rel=1e-5)
    assert float(clip_gradients([[each] for each in apart], 3.5)) == pytest.approx(5)
    assert [float(each.grad) for each in apart] == pytest.approx([3.5, 3.0], rel=1e-5)


# ---- what a pass of fewer tiles changes


@pytest.mark.parametrize(
    ("name", "knobs", "seen_by"),
    [
        ("dino", {}, "Sinkhorn"),
        ("ibot", {}, "Sinkhorn"),
        ("ibot", {"koleo_weight": 0.1}, "Sinkhorn, KoLeo"),
        ("dinov2", {}, "Sinkhorn, KDE"),
        ("dinov2", {"assign": "centre"}, "KDE"),
        ("dinov2", {"assign": "centre", "kde_weight": 0.0}, ""),
    ],
)
def test_the_plan_says_what_micro_batches_make_see_less(name: str, knobs: dict[str, Any], seen_by: str) -> None:
    cls, config = classes_of(name)
    training = cls.trained_with(config(**knobs))
    settings = PretrainConfig(method=name, batch_size=32, steps=10)
    for pieces in (1, 2):
        planned = plan(settings, 1000, 4, {}, 1, pieces, False, training, cls.planned)
        told = "; ".join(planned.reasons)
        line = f"only the 16 tiles of a pass, not the batch of 32, are seen by {seen_by}"
        assert ("are seen by" in told) == bool(seen_by and pieces > 1)
        assert (line in told) == bool(seen_by and pieces > 1)


# ---- collapse, forced


@pytest.mark.parametrize(
    ("knobs", "told"),
    [({"teacher_temperature": 50.0, "warmup_teacher_temperature": 50.0}, "uniform collapse"), ({}, "one-hot collapse")],
)
@pytest.mark.parametrize("name", METHODS)
def test_forced_collapse_is_named(name: str, knobs: dict[str, float], told: str) -> None:
    made = method(name, prototypes=256, assign="centre", **knobs)
    if not knobs:  # what centring would have kept away: one prototype ahead of all others, for every tile
        made.teacher_head.last_layer.weight.data[:] = -made.teacher_head.last_layer.weight.data[:1]
        made.teacher_head.mlp[-1].bias.data = -100 * made.teacher_head.last_layer.weight.data[0]
        made.teacher_head.last_layer.weight.data[0] *= -1
    metrics = {name: float(value) for name, value in made(views()).metrics.items()}
    assert told in made.ailment(metrics)
    assert method(name, prototypes=256).ailment({}) == ""


@pytest.mark.parametrize("name", METHODS)
def test_a_student_that_says_the_same_of_all_is_named_and_a_copy_of_the_teacher_is_not(name: str) -> None:
    whole = {} if name == "dino" else {"mask_probability": 0.07}  # one crop of sixteen is masked
    for dead in (False, True):
        made = method(name, momentum=1.0, momentum_end=1.0, **whole)
        for head in (made.head, made.patch_head):
            if dead and head is not None:
                head.mlp[-1].weight.data.zero_()
                head.mlp[-1].bias.data.normal_()
        same = views().images[0]
        outcome = made(views()._replace(images=[same, same]))
        made.after_step([outcome.carry], 0.5)
        figures = {key: float(value) for key, value in outcome.metrics.items()}
        told = [made.ailment({**figures, "step": step}) for step in (500.0, 700.0)]
        assert ("collapse of the student: of what the teacher says of tiles" in told[1]) == dead
        assert not told[0]


# ---- processes


def stepped() -> list[Tensor]:
    """Two steps of each method: losses, then what gradients, EMA, centres and BatchNorm made of the state."""
    share = 8 // collectives.world_size()
    found: list[Tensor] = []
    for name, backbone, knobs in (
        ("dino", cnn(), {}),
        ("ibot", vit(), {}),
        ("ibot", vit(), {"assign": "centre"}),  # of all patches
        ("dinov2", vit(), {"koleo_weight": 0.1}),
        ("dinov2", vit(), {"assign": "centre"}),  # of the masked ones, whose number differs from process to process
    ):
        made = method(name, backbone, **knobs)
        optimizer = torch.optim.SGD([each for each in made.parameters() if each.requires_grad], lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            outcome = made(views(share, share * collectives.rank())._replace(progress=0.5))
            outcome.loss.backward()
            for parameter in made.parameters():
                if parameter.grad is not None:
                    parameter.grad = collectives.mean_over_processes(parameter.grad)
            optimizer.step()
            made.after_step([outcome.carry], 0.5)
            found.append(collectives.mean_over_processes(outcome.loss.detach()))
        found += [value.float() for value in made.state_dict().values()]
    return found


def test_two_processes_step_as_one(tmp_path) -> None:
    alone = stepped()
    for together in on_two(stepped, tmp_path):
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


def in_parallel_ddp() -> list[str]:
    """Through DistributedDataParallel itself: it refuses parameters that a pass leaves without a gradient."""
    share = 4
    for name, knobs in (
        ("dino", {}),
        ("ibot", {"patch_weight": 0.0}),
        ("ibot", {"mask_probability": 0.07}),  # one crop of sixteen is masked: one process has none
        ("dinov2", {}),
    ):
        made = method(name, **knobs)
        parallel = in_parallel(made)
        names = []
        for _ in range(2):  # the second pass would tell of parameters that the first did not reduce
            outcome = parallel(views(share, share * collectives.rank()))
            outcome.loss.backward()
            names = sorted(outcome.metrics)
        missing = [key for key, value in made.named_parameters() if value.requires_grad and value.grad is None]
        assert not missing, (name, knobs, missing)
    return names


def test_every_parameter_has_a_gradient_on_every_process(tmp_path) -> None:
    first, second = on_two(in_parallel_ddp, tmp_path)
    assert first == second  # the same figures, or averaging them would wait for ever


def test_figures_are_the_same_with_and_without_masked_patches() -> None:
    few, many = method("dinov2", mask_probability=0.01), method("dinov2")
    assert few(views()).metrics.keys() == many(views()).metrics.keys()


def test_a_last_phase_of_broken_patches_is_refused() -> None:
    with pytest.raises(UsageError, match="high_resolution_px=50: must be whole patches of 8 pixels"):
        method("dinov2", high_resolution_px=50)


@pytest.mark.parametrize(
    "knob",
    [{"prototypes": 0}, {"teacher_temperature": 0.0}, {"assign": "none"}, {"mask_kind": "x"}, {"mask_low": 0.9}],
)
def test_impossible_knobs_are_refused(knob: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(knob))):
        method("dinov2", **knob)
