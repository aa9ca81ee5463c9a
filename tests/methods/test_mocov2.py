"""MoCo v2's queue, momentum encoder and shuffled BatchNorm (oracles 6-8), on backbones of a few hundred weights."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from histossl.core.errors import UsageError
from histossl.methods.method import Views
from histossl.methods.mocov2 import Keys, MoCoV2, MoCoV2Config
from histossl.methods.modules.batchnorm import GroupedBatchNorm2d, batchnorm_buffers, group_batchnorms
from histossl.methods.modules.ema import ema_update, frozen_copy
from histossl.runtime import collectives
from histossl.views.recipe import recipe_named
from tests.runtime.test_collectives import on_two

DIM = 8


def backbone(norm: type[nn.Module] | None = nn.BatchNorm2d, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 6, 3, 2), *([norm(6)] if norm else []), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers)


def moco(norm: type[nn.Module] | None = nn.BatchNorm2d, **knobs: object) -> MoCoV2:
    settings = MoCoV2Config(**{"queue_size": 10, "embedding_dim": DIM, "batchnorm_group_tiles": 4, **knobs})
    return MoCoV2(backbone(norm), 6, recipe_named("mocov2", 16), settings).train()


def views(first_tile: int = 0, count: int = 8, step: int = 0) -> Views:
    generator = torch.Generator().manual_seed(first_tile)
    images = [torch.randn(count, 3, 16, 16, generator=generator) for _ in range(2)]
    tiles = torch.arange(first_tile, first_tile + count)
    return Views(images, tiles, tiles // 4, step)


def keys(first: int, count: int) -> Keys:
    tiles = torch.arange(first, first + count)
    return Keys(F.normalize(tiles[:, None].double().sin() + torch.arange(DIM), dim=1).float(), tiles, tiles // 4)


# ---- queue


def test_ring_holds_the_last_keys_in_order_whatever_the_batch() -> None:
    method = moco()  # 10 places
    for first, count in ((0, 4), (4, 4), (8, 3), (11, 7)):
        method.after_step([keys(first, count)], 0.5)
    held = torch.cat([method.queue_tiles_K[method.pointer :], method.queue_tiles_K[: method.pointer]])
    assert held.tolist() == list(range(8, 18))
    assert int(method.pointer) == 18 % 10
    torch.testing.assert_close(method.queue_KD[method.queue_tiles_K == 12], keys(12, 1).key_GD)


def test_a_batch_larger_than_the_ring_leaves_its_last_keys() -> None:
    method = moco()
    method.after_step([keys(0, 23)], 0.5)
    assert sorted(method.queue_tiles_K.tolist()) == list(range(13, 23))
    assert int(method.pointer) == 3


def test_no_noise_is_left_after_the_prefill() -> None:
    method = moco()
    noise = method.queue_KD.clone()
    assert method.num_prefill_tiles() == 10
    method.prefill(views(0))
    method.prefill(views(8))
    assert (method.queue_tiles_K >= 0).all()
    assert not torch.isclose(method.queue_KD, noise).all(dim=1).any()
    torch.testing.assert_close(method.queue_KD.norm(dim=1), torch.ones(10))


def test_own_key_is_no_negative_of_the_same_step() -> None:
    """With view 1 = view 2 and twin encoders, q.k+ = 1: were the key in the queue already, accuracy could not be 1."""
    method = moco(norm=None)
    batch = views()
    outcome = method(Views([batch.images[0]] * 2, batch.tiles_B, batch.slides_B, 0))
    assert float(outcome.metrics["positive_cosine"]) == pytest.approx(1, abs=1e-5)
    assert float(outcome.metrics["instance_accuracy"]) == 1
    assert (method.queue_tiles_K == -1).all()  # forward changed nothing


def test_positive_is_never_among_the_negatives() -> None:
    """The same tiles a second time: their keys of the first step are in the queue and are left out."""
    method = moco(norm=None, queue_size=16)
    method.after_step([method(views(0)).carry, method(views(8)).carry], 0.5)
    outcome = method(views(0))
    assert float(outcome.metrics["same_tile_negatives"]) == pytest.approx(1 / 16)
    others = method.queue_tiles_K >= 8
    query = F.normalize(method.head(method.backbone(views(0).images[0])), dim=1)
    key = outcome.carry.key_GD
    logits = []
    for row in range(8):
        rest = (method.queue_tiles_K != row).nonzero().flatten()
        logits.append(torch.cat([(query[row] @ key[row])[None], method.queue_KD[rest] @ query[row]]) / 0.2)
    expected = torch.stack([-F.log_softmax(each, 0)[0] for each in logits]).mean()
    assert others.sum() == 8
    assert outcome.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_same_slide_weight_of_zero_leaves_the_slide_out() -> None:
    method = moco(norm=None, queue_size=16, same_slide_weight=0.0)
    method.after_step([method(views(0)).carry, method(views(8)).carry], 0.5)
    outcome = method(views(100, count=4))
    alike = moco(norm=None, queue_size=16)
    alike.load_state_dict(method.state_dict())
    assert outcome.loss.item() == pytest.approx(alike(views(100, count=4)).loss.item())  # slide 25 is not in the queue
    assert method(views(0)).loss.item() < alike(views(0)).loss.item()


def test_symmetric_loss_is_the_mean_of_both_directions() -> None:
    method = moco(norm=None, symmetric=True)
    one_way = moco(norm=None)
    one_way.load_state_dict(method.state_dict())
    batch = views()
    turned = Views(batch.images[::-1], batch.tiles_B, batch.slides_B, 0)
    both = method(batch)
    assert both.loss.item() == pytest.approx((one_way(batch).loss.item() + one_way(turned).loss.item()) / 2, rel=1e-6)
    assert len(both.carry.key_GD) == 16
    method.after_step([both.carry], 0.5)
    assert int(method.pointer) == 16 % 10


# ---- momentum encoder


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_momentum_encoder_follows_its_closed_form(momentum: float) -> None:
    fast, slow = backbone(seed=1), frozen_copy(backbone(seed=2))
    start = [parameter.clone() for parameter in slow.parameters()]
    for _ in range(5):
        ema_update(slow, fast, momentum)
    share = momentum**5
    for now, before, target in zip(slow.parameters(), start, fast.parameters(), strict=True):
        torch.testing.assert_close(now, share * before + (1 - share) * target.detach(), rtol=1e-5, atol=1e-6)


def test_momentum_update_leaves_buffers_alone() -> None:
    fast, slow = backbone(seed=1), frozen_copy(backbone(seed=1))
    fast[1].running_mean += 1
    ema_update(slow, fast, 0.5)
    assert float(slow[1].running_mean.abs().max()) == 0


def test_key_encoder_starts_as_the_query_and_has_no_gradient() -> None:
    method = moco()
    pairs = [(method.backbone, method.key_backbone), (method.head, method.key_head)]
    for query, key in pairs:
        for a, b in zip(query.state_dict().values(), key.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    method(views()).loss.backward()
    assert all(parameter.grad is None for parameter in method.key_backbone.parameters())
    assert all(parameter.grad is not None for parameter in method.backbone.parameters())


def test_forward_twice_gives_the_same_loss() -> None:
    method = moco(norm=nn.BatchNorm2d)
    assert method(views()).loss.item() == method(views()).loss.item()


# ---- shuffled BatchNorm


def test_shuffled_keys_come_back_in_their_order() -> None:
    method = moco().eval()  # BatchNorm with fixed statistics: company does not matter
    batch = views()
    torch.testing.assert_close(method.encode_keys(batch.images[1], batch), method._key(batch.images[1]))


def test_shuffling_changes_the_company_of_a_key() -> None:
    method = moco()
    batch = views()
    shuffled, plain = method.encode_keys(batch.images[1], batch), method._key(batch.images[1])
    assert not torch.allclose(shuffled, plain, atol=1e-4)


def test_grouped_batchnorm_is_batchnorm_of_each_group() -> None:
    x = torch.randn(12, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    grouped = nn.Sequential(nn.BatchNorm2d(6))
    assert group_batchnorms(grouped, 4) == 1
    assert isinstance(grouped[0], GroupedBatchNorm2d)
    plain = [nn.BatchNorm2d(6) for _ in range(3)]
    expected = torch.cat([norm(group) for norm, group in zip(plain, x.split(4), strict=True)])
    torch.testing.assert_close(grouped(x), expected)
    torch.testing.assert_close(
        grouped[0].running_var, torch.stack([norm.running_var for norm in plain]).mean(0), rtol=1e-5, atol=1e-6
    )
    grouped.eval()
    torch.testing.assert_close(grouped(x), F.batch_norm(x, grouped[0].running_mean, grouped[0].running_var, eps=1e-5))


def test_one_group_is_split_so_that_shuffling_has_other_company_to_offer() -> None:
    """32 tiles, groups of 32: with one statistic for all, shuffled keys would be the unshuffled ones, leak and all."""
    torch.manual_seed(0)
    norm = nn.Sequential(nn.BatchNorm2d(6))
    group_batchnorms(norm, 32)
    x, order = torch.randn(32, 6, 4, 4), torch.randperm(32)
    assert (norm(x)[order] - norm(x[order])).abs().max() > 0.01


def test_the_ceiling_counts_negatives_by_their_weight_and_few_are_told() -> None:
    method = moco(queue_size=10, same_slide_weight=0.0)
    method.queue_slides_K[:] = torch.tensor([7] * 9 + [8])
    method.queue_tiles_K[:] = torch.arange(10) + 1000
    batch = views()
    row = method(batch._replace(slides_B=torch.full_like(batch.slides_B, 7))).metrics
    assert float(row["loss_ceiling"]) == pytest.approx(math.log(2))
    assert method.ailment({"step": 1, "loss_ceiling": math.log(2) - 0.1}).startswith("of the queue's 10 keys 0.8 are")


def test_gradient_through_groups_equals_gradient_of_each() -> None:
    x = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    grouped = nn.Sequential(nn.BatchNorm2d(6))
    group_batchnorms(grouped, 4)
    grouped(x).square().sum().backward()
    y = x.detach().clone().requires_grad_()
    torch.cat([nn.BatchNorm2d(6)(group) for group in y.split(4)]).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)


def test_ceiling_is_the_loss_of_a_collapsed_encoder() -> None:
    method = moco(norm=None)
    assert method.loss_ceiling() == math.log(11)


@pytest.mark.parametrize(
    "knob", [{"momentum": 1.5}, {"temperature": 0.0}, {"queue_size": 0}, {"same_slide_weight": 2.0}]
)
def test_impossible_knobs_are_refused(knob: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(knob))):
        MoCoV2Config(**knob)


def test_state_dict_holds_queue_pointer_and_owners() -> None:
    method = moco()
    method.after_step([keys(0, 13)], 0.5)
    state: dict[str, Tensor] = method.state_dict()
    again = moco()
    again.load_state_dict(state)
    assert int(again.pointer) == 3
    assert torch.equal(again.queue_KD, method.queue_KD)
    assert torch.equal(again.queue_tiles_K, method.queue_tiles_K)


def four_steps() -> list[Tensor]:
    """Queue, its tiles and pointer, BatchNorm's statistics and gradients, both with one direction and with two."""
    out: list[Tensor] = []
    for symmetric in (False, True):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        config = MoCoV2Config(queue_size=37, embedding_dim=8, batchnorm_group_tiles=4, symmetric=symmetric)
        method = MoCoV2(nn.Sequential(*layers), 6, recipe_named("mocov2", 16), config).train()
        generator = torch.Generator().manual_seed(1)
        for step in range(4):
            images = [collectives.own_part(torch.randn(16, 3, 16, 16, generator=generator)) for _ in range(2)]
            tiles_B = collectives.own_part(torch.arange(16) + 16 * step)
            outcome = method(Views(images, tiles_B, tiles_B // 4, step))
            outcome.loss.backward()
            method.after_step([outcome.carry], 0.5)
        out += [method.queue_KD, method.queue_tiles_K.float(), method.pointer.float()]
        out += batchnorm_buffers(method)
        out += [
            collectives.mean_over_processes(each.grad) for each in method.backbone.parameters() if each.grad is not None
        ]
    return [each.detach().clone() for each in out]


def test_two_processes_have_the_gradients_and_the_queue_of_one(tmp_path: Path) -> None:
    alone = four_steps()
    for together in on_two(four_steps, tmp_path):
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
