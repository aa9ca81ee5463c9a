"""How a method is set on its device: precision, optimizer and its parameter groups, switches of torch."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from histossl.core.errors import UsageError
from histossl.methods.method import Method
from histossl.training.loop import Precision, has_bf16
from histossl.training.setup.lars import LARS
from histossl.training.setup.planner import Plan

PRODUCTS = [
    getattr(torch.ops.aten, name).default
    for name in (
        "mm", "addmm", "bmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu",
    )
]  # fmt: skip


def precision_for(name: str, device: torch.device) -> Precision:
    if name == "auto":
        if device.type != "cuda":
            return Precision("fp32")
        return Precision("bf16" if has_bf16(device) else "fp16")
    if name not in ("fp32", "bf16", "fp16"):
        raise UsageError(f"--precision {name}: must be auto, fp32, bf16 or fp16")
    if name == "fp16" and device.type != "cuda":
        raise UsageError("--precision fp16: needs a GPU; use --precision fp32 or bf16")
    return Precision(name)


def optimizer_for(method: Method, planned: Plan, device: torch.device) -> torch.optim.Optimizer:
    """Backbone blocks with layer decay, heads at the full rate; biases and norms without weight decay.

    (MoCo's SGD decays all, as its official code does.) Groups are made of the method's `learner`, not of a teacher.
    """
    decays_all = planned.optimizer == "sgd" and method.trained_by.decay_flat
    learner = method.learner()
    groups = param_groups_layer_decay(
        learner,
        weight_decay=planned.weight_decay,
        weight_decay_exclude_1d=not decays_all,
        layer_decay=planned.layer_decay,
    )
    _slow_patch_embedding(groups, learner, method.trained_by.patch_embed_scale if planned.layer_decay < 1 else 1.0)
    inside = {id(parameter) for parameter in learner.parameters()}
    heads = [parameter for parameter in method.parameters() if parameter.requires_grad and id(parameter) not in inside]
    for flat, decay in ((False, planned.weight_decay), (True, planned.weight_decay if decays_all else 0.0)):
        chosen = [parameter for parameter in heads if (parameter.ndim <= 1) == flat]
        if chosen:
            groups.append({"params": chosen, "weight_decay": decay, "lr_scale": 1.0})
    # On a CPU too: a fifth of the time of the loop over parameters, which was 5 % of a DINOv2 step (bench_methods.py).
    fused = device.type in ("cuda", "cpu")
    if planned.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=planned.lr, momentum=0.9, fused=fused)
        # From zero, as if all had a step behind them (the same first step): the fused one cannot take parameters that
        # have a momentum together with such that have none yet, as DINO's last layer when it is let go.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    if planned.optimizer == "lars":
        return LARS(groups, lr=planned.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=planned.lr, betas=method.trained_by.betas, fused=fused)


def _slow_patch_embedding(groups: list[dict[str, Any]], learner: nn.Module, scale: float) -> None:
    """The patch embedding by itself, `scale` times slower than its layer (DINOv2: 0.2)."""
    first = getattr(learner, "patch_embed", None)
    if first is None or scale == 1:
        return
    inside = {id(parameter) for parameter in first.parameters()}
    for group in list(groups):
        own = [parameter for parameter in group["params"] if id(parameter) in inside]
        if own:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in inside]
            groups.append({**group, "params": own, "lr_scale": scale * group.get("lr_scale", 1.0)})


def in_parallel(method: Method) -> DistributedDataParallel:
    """For several processes: gradients are averaged; buffers are the method's own affair (BatchNorm, queue)."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch 2.15 renamed it
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(method, **options)


def tune(method: Method, device: torch.device, precision: str, compiled: bool, deterministic: bool) -> None:
    """Switches of torch that change speed, not meaning."""
    if compiled and not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")):
        raise UsageError(
            "--compile: needs a C++ compiler, and this machine has none (apt-get install g++); leave it out"
        )
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        if precision == "fp32":
            torch.set_float32_matmul_precision("high")  # TF32, also in the losses; under bf16 and fp16 they stay fp32
        torch.backends.cudnn.benchmark = not deterministic
    method.to(memory_format=torch.channels_last)  # on a CPU, too: faster there (tests/bench/bench_train.py)
    if compiled:
        for part in method.children():
            part.compile()


def recompute_cheap(network: nn.Module) -> bool:
    """Let a ViT's blocks keep only products for the backward pass, and compute norms, GELU and scales again for it.

    A third of the memory of activations less (bench_methods.py memory), no product twice, the same values. False where
    there are no such blocks.
    """
    blocks = getattr(network, "blocks", None)
    if not isinstance(blocks, nn.Sequential):
        return False
    for block in blocks:
        block.forward = partial(_recomputed, block.forward)
    return True


def _recomputed(forward: Callable[..., Tensor], *given: Any, **named: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*given, **named)
    kept = partial(create_selective_checkpoint_contexts, PRODUCTS)
    out: Tensor = checkpoint(_cast_anew, forward, *given, use_reentrant=False, context_fn=kept, **named)
    return out


def _cast_anew(forward: Callable[..., Tensor], x: Tensor, *given: Any, **named: Any) -> Tensor:
    """Without autocast's store of cast weights, which is gone in the backward pass: both must do the same."""
    kind = x.device.type
    low = torch.is_autocast_enabled(kind)
    with torch.autocast(kind, torch.get_autocast_dtype(kind) if low else None, low, cache_enabled=False):
        return forward(x, *given, **named)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
