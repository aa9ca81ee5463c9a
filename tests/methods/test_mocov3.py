"""MoCo v1 and v3: closed forms, an explicit softmax in float64, and one process of the double batch."""

import math

import pytest
import torch
from contrast import WIDTH, backbone, row, views
from torch import nn
from torch.nn import functional as F

from histossl.backbones.loading import create_backbone
from histossl.core.errors import UsageError
from histossl.methods.mocov1 import MoCoV1, MoCoV1Config
from histossl.methods.mocov3 import MoCoV3, MoCoV3Config
from histossl.methods.modules.batchnorm import GlobalBatchNorm
from histossl.views.recipe import recipe_named


def moco_v3(**knobs: object) -> MoCoV3:
    config = MoCoV3Config(**{"embedding_dim": 4, "hidden_dim": 8, **knobs})
    return MoCoV3(backbone(), WIDTH, recipe_named("mocov3", 16), config).train()


# ---- v3


def test_loss_is_the_explicit_softmax_of_both_directions() -> None:
    method, batch = moco_v3(), views()
    outcome = method(batch)
    images = torch.cat(batch.images)
    first, second = F.normalize(method.predictor(method.projector(method.backbone(images))), dim=1).double().chunk(2)
    first_key, second_key = method.keys(images).double().chunk(2)
    both = []
    for query, key in ((first, second_key), (second, first_key)):
        p = (query @ key.T / 0.2).exp()
        both.append(2 * 0.2 * -(p.diagonal() / p.sum(1)).log().mean())
    assert outcome.loss.item() == pytest.approx((both[0] + both[1]).item(), rel=1e-5)


def test_gradient_is_that_of_the_explicit_softmax() -> None:
    """dL/dq_i = 2 (sum_j p_ij k_j - k_i) / N for one direction: the temperature cancels."""
    method = moco_v3()
    query, key = (F.normalize(torch.randn(6, 4), dim=1) for _ in range(2))
    query.requires_grad_()
    (0.4 * method._found(query, key, ~torch.eye(6, dtype=torch.bool)).loss).backward()
    p = F.softmax(query.detach().double() @ key.double().T / 0.2, 1)
    torch.testing.assert_close(query.grad, (2 * (p @ key.double() - key) / 6).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_embeddings_that_tell_nothing_cost_four_t_ln_of_the_batch(temperature: float) -> None:
    method = moco_v3(temperature=temperature)
    x = F.normalize(torch.ones(8, 4), dim=1)
    one_way = method._found(x, x, ~torch.eye(8, dtype=torch.bool)).loss
    assert one_way.item() == pytest.approx(math.log(8), rel=1e-6)
    ceiling = row(method)["loss_ceiling"]
    assert ceiling == pytest.approx(4 * temperature * math.log(8), rel=1e-6)


def test_perfect_predictions_among_orthogonal_keys() -> None:
    x = torch.eye(4)
    loss = moco_v3()._found(x, x, ~torch.eye(4, dtype=torch.bool)).loss
    assert loss.item() == pytest.approx(math.log(1 + 3 * math.exp(-5)), rel=1e-5)


def test_heads_are_the_paper_s() -> None:
    method = moco_v3()
    for head, widths in ((method.projector, [8, 8, 4]), (method.predictor, [8, 4])):
        assert [each.out_features for each in head if isinstance(each, nn.Linear)] == widths
        norms = [each for each in head if isinstance(each, GlobalBatchNorm)]
        assert len(norms) == len(widths)
        assert norms[-1].weight is None
        assert norms[-1].bias is None
        assert isinstance(head[-1], GlobalBatchNorm)
    assert not hasattr(method, "queue_KD")


def test_key_encoder_is_a_copy_without_gradient_or_predictor() -> None:
    method = moco_v3()
    for query, key in ((method.backbone, method.key_backbone), (method.projector, method.key_projector)):
        for a, b in zip(query.state_dict().values(), key.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    method(views()).loss.backward()
    assert all(p.grad is None for part in (method.key_backbone, method.key_projector) for p in part.parameters())
    assert all(p.grad is not None for part in (method.backbone, method.predictor) for p in part.parameters())


def test_momentum_rises_to_one_along_half_a_cosine() -> None:
    method = moco_v3(momentum=0.0)
    with torch.no_grad():
        method.backbone[0].weight += 1
    before = method.key_backbone[0].weight.clone()
    method.after_step([None], 1.0)
    assert torch.equal(method.key_backbone[0].weight, before)
    method.after_step([None], 0.5)
    torch.testing.assert_close(method.key_backbone[0].weight, before + 0.5)


def test_a_vit_s_patch_embedding_stays_as_it_is_unless_told() -> None:
    for freeze in (True, False):
        vit, info = create_backbone("test_vit", "random")
        config = MoCoV3Config(embedding_dim=4, hidden_dim=8, freeze_patch_embed=freeze)
        method = MoCoV3(vit, info.feature_dim, recipe_named("mocov3", 160), config).train()
        still = {name for name, parameter in method.backbone.named_parameters() if not parameter.requires_grad}
        assert still == ({"patch_embed.proj.weight", "patch_embed.proj.bias"} if freeze else set())
        batch = views(count=4)
        images = [F.interpolate(image, 32) for image in batch.images]
        method(batch._replace(images=images)).loss.backward()
        assert method.backbone.pos_embed.grad is not None


def test_forward_twice_gives_the_same_loss() -> None:
    method = moco_v3()
    assert method(views()).loss.item() == method(views()).loss.item()


@pytest.mark.parametrize("knob", [{"momentum": 1.5}, {"temperature": 0.0}, {"embedding_dim": 1}, {"hidden_dim": 0}])
def test_impossible_knobs_are_refused(knob: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(knob))):
        MoCoV3Config(**knob)


# ---- v1


def test_v1_has_a_linear_head_and_its_temperature() -> None:
    method = MoCoV1(backbone(), WIDTH, recipe_named("mocov1", 16), MoCoV1Config(queue_size=8, embedding_dim=4)).train()
    assert isinstance(method.head, nn.Linear)
    assert method.config.temperature == 0.07
    assert [view.blur_p for view in method.views().views] == [0.0, 0.0]
    batch = views()
    outcome = method(batch)
    query = F.normalize(method.head(method.backbone(batch.images[0])), dim=1)
    logits = torch.cat([(query * outcome.carry.key_GD).sum(1, keepdim=True), query @ method.queue_KD.T], 1) / 0.07
    expected = F.cross_entropy(logits, torch.zeros(8, dtype=torch.long))
    assert outcome.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    method.after_step([outcome.carry], 0.5)
    assert method.queue_tiles_K.tolist() == list(range(8))
