"""How a method is set on its device: fused steps, and cheap activations computed twice from less memory."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from histossl.backbones.loading import create_backbone
from histossl.core.errors import UsageError
from histossl.methods.mocov2 import MoCoV2, MoCoV2Config
from histossl.training.loop import Precision
from histossl.training.setup.optim import optimizer_for, precision_for, recompute_cheap, tune
from histossl.views.recipe import recipe_named

CPU = torch.device("cpu")


class Alive(TorchDispatchMode):
    """Bytes of what was made under it and is still held."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else [out]:
            if isinstance(x, torch.Tensor):
                ref = StorageWeakRef(x.untyped_storage())
                self.made[ref.cdata] = (ref, x.untyped_storage().nbytes())
        return out

    def num_bytes(self) -> int:
        return sum(size for ref, size in self.made.values() if not ref.expired())


def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=64,
        depth=4,
        num_heads=2,
        num_classes=0,
        drop_path_rate=0.3,
        init_values=0.1,
    )


def passed(network: nn.Module, x: torch.Tensor, precision: str) -> tuple[int, list[torch.Tensor]]:
    """(bytes held between forward and backward, gradients). Two sizes of batch, as a student has two sizes of crop."""
    torch.manual_seed(1)  # of drop path
    with Alive() as alive, Precision(precision).autocast(CPU):
        loss = network(x).float().square().mean() + network(x[:3]).float().square().mean()
    held = alive.num_bytes()
    loss.backward()
    return held, [each.grad for each in network.parameters() if each.grad is not None]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_gradients_from_two_thirds_of_the_memory(precision: str) -> None:
    whole = vit().train()
    halved = copy.deepcopy(whole)
    assert recompute_cheap(halved)
    x = torch.randn(16, 3, 32, 32)
    held, gradients = passed(whole, x, precision)
    held_now, gradients_now = passed(halved, x, precision)
    assert len(gradients) == len(gradients_now) > 40
    for one, other in zip(gradients, gradients_now, strict=True):
        if precision == "fp32":
            assert torch.equal(one, other)
        else:  # autocast casts a weight once for both passes, and then sums its gradients in bf16
            torch.testing.assert_close(one, other, rtol=0.05, atol=0.01 * float(one.abs().max()))
    assert held_now < 0.7 * held


@pytest.mark.parametrize(("bf16", "chosen", "scaled"), [(True, "bf16", False), (False, "fp16", True)])
def test_a_gpu_without_bf16_gets_fp16_with_a_scaler(
    monkeypatch: pytest.MonkeyPatch, bf16: bool, chosen: str, scaled: bool
) -> None:
    """Emulated bf16, which older cards have, does not count: it is slower than fp32."""
    asked: list[bool] = []

    def supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    precision = precision_for("auto", torch.device("cuda"))
    assert precision.name == chosen
    assert asked == [False]
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    assert precision.scaler(torch.device("cuda")).is_enabled() == scaled
    assert precision_for("auto", CPU).name == "fp32"


def test_fp16_without_a_gpu_is_refused_with_the_way_out() -> None:
    with pytest.raises(UsageError, match="--precision fp16: needs a GPU; use --precision fp32 or bf16"):
        precision_for("fp16", CPU)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_fused_steps_are_those_of_the_loop_also_in_channels_last(name: str) -> None:
    """Fused kernels walk through memory as it lies: a gradient laid out otherwise would be taken for another's."""
    ends = []
    for fused in (True, False):
        torch.manual_seed(0)
        backbone, info = create_backbone("test_resnet", "random")
        made = MoCoV2(backbone, info.feature_dim, recipe_named("mocov2", 32), MoCoV2Config(queue_size=8)).train()
        tune(made, CPU, "fp32", compiled=False, deterministic=False)
        planned: Any = SimpleNamespace(optimizer=name, lr=1e-2, weight_decay=0.1, layer_decay=0.75)
        optimizer = optimizer_for(made, planned, CPU)
        assert optimizer.defaults["fused"]
        if not fused:
            for group in optimizer.param_groups:
                group["fused"] = False
        for _ in range(3):
            optimizer.zero_grad()
            made.head(made.backbone(torch.randn(8, 3, 32, 32))).square().sum().backward()
            optimizer.step()
        ends.append([each.detach().clone() for each in made.parameters()])
    for one, other in zip(*ends, strict=True):
        # By the norm: where a gradient is nearly 0, AdamW makes a whole step of its rounding, each processor another.
        assert float((one - other).norm()) <= 0.01 * float(other.norm()) + 1e-5


def test_what_is_let_go_later_takes_its_first_fused_step_beside_those_that_have_momentum() -> None:
    """DINO's last layer is frozen at first: SGD's fused kernel refuses momentum for some and none for others."""
    backbone, info = create_backbone("test_resnet", "random")
    made = MoCoV2(backbone, info.feature_dim, recipe_named("mocov2", 32), MoCoV2Config(queue_size=8)).train()
    planned: Any = SimpleNamespace(optimizer="sgd", lr=0.5, weight_decay=0.0, layer_decay=1.0)
    optimizer = optimizer_for(made, planned, CPU)
    last = next(parameter for parameter in reversed(list(made.head.parameters())) if parameter.requires_grad)
    start = last.detach().clone()
    for frozen in (True, False):
        for parameter in made.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        if frozen:
            last.grad = None
        optimizer.step()
        assert torch.equal(last, start if frozen else start - 0.5)


def test_without_gradients_it_is_the_network_alone() -> None:
    whole = vit().eval()
    halved = copy.deepcopy(whole)
    recompute_cheap(halved)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(whole(x), halved(x))
    assert list(whole.state_dict()) == list(halved.state_dict())


def test_other_backbones_are_left_as_they_are() -> None:
    assert not recompute_cheap(nn.Sequential(nn.Conv2d(3, 4, 3)))
