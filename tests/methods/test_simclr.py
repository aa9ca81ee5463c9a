"""SimCLR and SimCLR v2 against closed forms, lightly, and one process of the double batch."""

import math

import pytest
import torch
from contrast import WIDTH, backbone, made_constant, row, views
from torch import Tensor, nn
from torch.nn import functional as F

from histossl.core.errors import UsageError
from histossl.methods import classes_of
from histossl.methods.losses.contrastive import nt_xent
from histossl.methods.method import Method, Training
from histossl.methods.modules.batchnorm import GlobalBatchNorm
from histossl.methods.simclr import SimCLR, SimCLRConfig
from histossl.methods.simclrv2 import SimCLRv2, SimCLRv2Config
from histossl.training.monitoring.diagnostics import Ceiling
from histossl.training.setup.planner import in_batch_reason
from histossl.views.recipe import recipe_named


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).float()


def loss_of(first: Tensor, second: Tensor, temperature: float = 0.2) -> Tensor:
    tiles = torch.arange(len(first)).repeat(2)
    return nt_xent(first, second, torch.cat([first, second]), tiles[:, None] != tiles, temperature).loss


def simclr(**knobs: object) -> SimCLR:
    return SimCLR(backbone(), WIDTH, recipe_named("simclr", 16), SimCLRConfig(embedding_dim=4, **knobs)).train()


def simclr_v2(**knobs: object) -> SimCLRv2:
    config = SimCLRv2Config(embedding_dim=4, **knobs)
    return SimCLRv2(backbone(), WIDTH, recipe_named("simclr", 16), config).train()


# ---- the loss


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_equal_vectors_give_ln_of_all_other_views(temperature: float) -> None:
    x = unit(1, 16).expand(32, -1)
    assert loss_of(x, x, temperature).item() == pytest.approx(math.log(2 * 32 - 1), rel=1e-6)


def test_perfect_pairs_that_are_orthogonal_to_each_other() -> None:
    x = torch.eye(16)
    assert loss_of(x, x, 0.2).item() == pytest.approx(math.log(1 + 30 * math.exp(-5)), rel=1e-5)


def test_equals_the_explicit_softmax_and_half_of_the_official_sum() -> None:
    a, b = unit(12, 16, seed=1).double(), unit(12, 16, seed=2).double()
    itself = torch.eye(12) * 1e9
    labels = torch.arange(12)
    halves = [
        F.cross_entropy(torch.cat([x @ y.T / 0.3, x @ x.T / 0.3 - itself], 1), labels) for x, y in ((a, b), (b, a))
    ]
    ours = loss_of(a.float(), b.float(), 0.3).item()
    assert 2 * ours == pytest.approx(float(halves[0] + halves[1]), rel=1e-6)


def test_equals_lightly_in_loss_and_gradient() -> None:
    from lightly.loss import NTXentLoss

    leaves = [(3 * unit(8, 32, seed=seed)).requires_grad_() for seed in (1, 2, 1, 2)]
    ours = loss_of(F.normalize(leaves[0], dim=1), F.normalize(leaves[1], dim=1))
    theirs = NTXentLoss(temperature=0.2)(leaves[2], leaves[3])
    ours.backward()
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for mine, other in zip(leaves[:2], leaves[2:], strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_swapped_views_give_the_same_loss() -> None:
    a, b = unit(9, 16, seed=1), unit(9, 16, seed=2)
    assert loss_of(a, b).item() == pytest.approx(loss_of(b, a).item(), rel=1e-6)


def test_loss_is_in_fp32_under_autocast() -> None:
    a, b = unit(8, 32, seed=1), unit(8, 32, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = loss_of(a, b, 0.1)
    assert under.dtype == torch.float32
    assert under.item() == loss_of(a, b, 0.1).item()


def test_a_tile_that_is_in_the_batch_twice_is_no_negative_of_itself() -> None:
    method = simclr()
    twice = views()
    twice = twice._replace(tiles_B=torch.tensor([0, 1, 2, 3, 4, 5, 6, 6]))
    assert float(method(views()).metrics["negatives"]) == 14
    assert float(method(twice).metrics["negatives"]) == pytest.approx((6 * 14 + 2 * 12) / 8)


# ---- the method


def test_the_head_is_the_official_code_s() -> None:
    for method, layers in ((simclr(), 2), (simclr_v2(), 3)):
        linears = [each for each in method.head if isinstance(each, nn.Linear)]
        norms = [each for each in method.head if isinstance(each, GlobalBatchNorm)]
        assert [each.out_features for each in linears] == [WIDTH] * (layers - 1) + [4]
        assert all(each.bias is None for each in linears)
        assert len(norms) == layers
        assert [norm.bias is None for norm in norms] == [False] * (layers - 1) + [True]
        assert isinstance(method.head[-1], GlobalBatchNorm)
        assert isinstance(method.backbone[1], GlobalBatchNorm)


def test_forward_twice_gives_the_same_loss_and_no_other_state() -> None:
    method = simclr_v2(queue_size=12)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    assert method(views()).loss.item() == method(views()).loss.item()
    for name, value in method.state_dict().items():
        assert "running" in name or "num_batches" in name or torch.equal(value, before[name]), name


def test_its_loss_is_that_of_its_embeddings_and_its_ceiling_that_of_the_batch() -> None:
    method, batch = simclr(), views()
    outcome = method(batch)
    z = F.normalize(method.head(method.backbone(torch.cat(batch.images))), dim=1)
    assert outcome.loss.item() == pytest.approx(loss_of(*z.chunk(2)).item(), rel=1e-6)
    assert float(outcome.metrics["loss_ceiling"]) == pytest.approx(math.log(15), rel=1e-6)


@pytest.mark.parametrize("name", ["simclr", "simclrv2", "mocov1", "mocov2", "mocov3"])
def test_a_collapse_is_named(name: str) -> None:
    method_class, knobs_class = classes_of(name)
    small = {"queue_size": 8} if "queue_size" in knobs_class.__dataclass_fields__ else {"hidden_dim": 8}
    knobs = knobs_class(embedding_dim=4, **({} if name == "simclr" else small))
    method: Method = method_class(backbone(), WIDTH, recipe_named("simclr", 16), knobs).train()
    healthy = {"step": 500, "positive_cosine": 0.8, "negative_cosine": 0.1}
    assert method.ailment(healthy) == ""
    made_constant(method)
    if "key_backbone" in dict(method.named_children()):
        method.key_backbone.load_state_dict(method.backbone.state_dict())
    if name in ("mocov1", "mocov2"):
        method.prefill(views(50))
    assert "collapse" in method.ailment(row(method))
    assert method.ailment(row(method, step=10)) == ""  # fresh heads


def test_a_temperature_that_is_far_too_high_is_told_by_the_ceiling() -> None:
    figures = row(simclr(temperature=1000.0))
    assert "nothing is being learnt" in Ceiling().stuck(figures["loss"], figures["loss_ceiling"], 500, 1000)
    figures = row(simclr())
    assert Ceiling().stuck(figures["loss"], figures["loss_ceiling"], 500, 1000) == ""


@pytest.mark.parametrize("knob", [{"temperature": 0.0}, {"embedding_dim": 1}])
def test_impossible_knobs_are_refused(knob: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(knob))):
        SimCLRConfig(**knob)


@pytest.mark.parametrize("knob", [{"finetune_from_layer": 3}, {"queue_size": -1}, {"momentum": 2.0}])
def test_impossible_knobs_of_v2_are_refused(knob: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(knob))):
        SimCLRv2Config(**knob)


def test_dino_s_views_are_refused() -> None:
    with pytest.raises(UsageError, match="SimCLR takes 2"):
        SimCLR(backbone(), WIDTH, recipe_named("dino", 32), SimCLRConfig())


def test_the_plan_says_what_there_is_to_tell_a_tile_from() -> None:
    assert "the 255 other tiles" in in_batch_reason(256, 1)
    assert "warning" not in in_batch_reason(256, 1)
    cut = in_batch_reason(256, 4)
    assert "the 63 other tiles" in cut
    assert "does not make up for one" in cut


def test_lars_is_for_batchnorm_alone() -> None:
    assert SimCLR.trained_by.for_batchnorm == "lars"
    assert SimCLR.trained_by.lars.lr * math.sqrt(4096 / 256) == pytest.approx(4.8)  # the paper's, 0.3 x 4096 / 256
    assert Training().for_batchnorm == "sgd"


# ---- v2's memory and projection


def test_memory_adds_negatives_but_never_the_tile_s_own() -> None:
    method = simclr_v2(queue_size=12)
    assert method.num_prefill_tiles() == 12
    method.prefill(views(0))  # the same tiles: 8 of 12 places
    method.prefill(views(100, count=4))
    outcome = method(views(0))
    assert float(outcome.metrics["negatives"]) == 14 + 11
    z = F.normalize(method.head(method.backbone(torch.cat(views(0).images))), dim=1)
    losses = []
    for place in range(16):
        tile, positive = place % 8, (place + 8) % 16
        rest = [z[other] for other in range(16) if other not in (place, positive)]
        rest += [key for key, owner in zip(method.queue_KD, method.queue_tiles_K, strict=True) if owner != tile]
        logits = torch.stack([z[positive], *rest]) @ z[place] / 0.2
        losses.append(-F.log_softmax(logits, 0)[0])
    assert outcome.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    outcome.loss.backward()
    assert all(parameter.grad is None for parameter in method.key_backbone.parameters())
    method.after_step([outcome.carry], 0.5)
    assert int(method.pointer) == 8


def test_without_a_memory_v2_is_simclr_with_another_head() -> None:
    method = simclr_v2()
    assert method.num_prefill_tiles() == 0
    assert not hasattr(method, "key_backbone")
    assert method.diagnostics() == {}
    assert float(method(views()).metrics["negatives"]) == 14
    assert method(views()).carry is None


def test_projection_is_the_head_up_to_the_layer_that_is_asked_for() -> None:
    assert simclr().projection() is None
    assert simclr_v2(finetune_from_layer=0).projection() is None
    weights = [name for name in simclr_v2(finetune_from_layer=2).projection() if name.endswith(".weight")]
    assert weights == ["0.weight", "1.weight", "3.weight", "4.weight"]
