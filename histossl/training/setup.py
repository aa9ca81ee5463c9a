"""How a method is set on its device: precision, optimizer and its parameter groups, switches of torch."""

from __future__ import annotations

import inspect
import os
import shutil
from typing import Any

import torch
from timm.optim import param_groups_layer_decay
from torch.nn.parallel import DistributedDataParallel

from histossl.errors import UsageError
from histossl.methods.method import Method
from histossl.training.loop import Precision
from histossl.training.planner import Plan


def precision_for(name: str, device: torch.device) -> Precision:
    if name == "auto":
        if device.type != "cuda":
            return Precision("fp32")
        return Precision("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16")
    if name not in ("fp32", "bf16", "fp16"):
        raise UsageError(f"--precision {name}: must be auto, fp32, bf16 or fp16")
    if name == "fp16" and device.type != "cuda":
        raise UsageError("--precision fp16: needs a GPU; use --precision fp32 or bf16")
    return Precision(name)


def optimizer_for(method: Method, planned: Plan, device: torch.device) -> torch.optim.Optimizer:
    """Backbone blocks with layer decay, heads at the full rate; biases and norms without weight decay under AdamW."""
    decays_all = planned.optimizer == "sgd"  # as MoCo's official code
    groups = param_groups_layer_decay(
        method.backbone,
        weight_decay=planned.weight_decay,
        weight_decay_exclude_1d=not decays_all,
        layer_decay=planned.layer_decay,
    )
    inside = {id(parameter) for parameter in method.backbone.parameters()}
    heads = [parameter for parameter in method.parameters() if parameter.requires_grad and id(parameter) not in inside]
    for flat, decay in ((False, planned.weight_decay), (True, planned.weight_decay if decays_all else 0.0)):
        chosen = [parameter for parameter in heads if (parameter.ndim <= 1) == flat]
        if chosen:
            groups.append({"params": chosen, "weight_decay": decay, "lr_scale": 1.0})
    fused = device.type == "cuda"
    if planned.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=planned.lr, momentum=0.9, fused=fused)
    return torch.optim.AdamW(groups, lr=planned.lr, betas=(0.9, 0.999), fused=fused)


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
        method.to(memory_format=torch.channels_last)
    if compiled:
        for part in method.children():
            part.compile()


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
