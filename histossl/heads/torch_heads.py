"""A saved model as a teacher: the network that tells the class of one tile, on the device, batch by batch.

Heads are numpy and see items; here each becomes a torch module over single tiles whose softmax is the head's own
`predict_proba`. A class that the model never saw is none of the teacher's classes.

Shapes: B tiles, D features, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from histossl.backbones.loading import BackboneInfo, load_backbone, weights_digest
from histossl.core.errors import UsageError
from histossl.heads.abmil import FittedAbmil, GatedAttention
from histossl.heads.feature_heads import (
    Fitted,
    FittedKnn,
    FittedLinear,
    FittedPrototypes,
    Ints,
    KnnHead,
    SimpleShotHead,
)
from histossl.heads.model_folder import Model
from histossl.methods.distillation import Teacher


def teacher_of(model: Model, student: BackboneInfo) -> Teacher:
    """The teacher of a student whose views are normalised as `student` says. `facts` tell who it is."""
    head, present = tile_head(model.fitted)
    classes = [model.info.classes[number] for number in present]
    if len(classes) < 2:
        raise UsageError(f"--teacher {model.folder}: knows one class ({', '.join(classes)}); there is nothing to teach")
    backbone, info = load_backbone(model.folder / "backbone.safetensors")
    taught = Teacher(
        backbone, head, classes, model.info.input_px, (info.mean, info.std), (student.mean, student.std), facts={}
    )
    taught.facts = {
        "digest": weights_digest(taught),
        "folder": str(model.folder),
        "backbone": info.timm_name,
        "head": model.info.head,
        "classes": list(model.info.classes),
        # Whose labels it knows.
        "slides": list(model.info.provenance.get("slides", ())),
        "contents": model.info.provenance.get("contents", {}),
        "tiling": model.info.provenance.get("tiling", {}),
    }
    return taught


def present_classes(fitted: Fitted) -> Ints:
    """Numbers of the classes that the head was trained on."""
    known = fitted.labels if isinstance(fitted, FittedKnn) else fitted.present  # type: ignore[attr-defined]
    return np.unique(known).astype(np.int64)


def tile_head(fitted: Fitted) -> tuple[nn.Module, Ints]:
    """Features (B, D) of tiles -> logits (B, C) over the classes whose numbers come with it."""
    present = present_classes(fitted)
    if isinstance(fitted, FittedLinear):
        return _Linear(fitted), present
    if isinstance(fitted, FittedPrototypes):
        return _Prototypes(fitted), present
    if isinstance(fitted, FittedKnn):
        return _Neighbours(fitted, present), present
    assert isinstance(fitted, FittedAbmil)
    return _BagOfOne(fitted), present


def student_head(weight: NDArray[Any], bias: NDArray[Any], present: Ints, num_classes: int) -> FittedLinear:
    """A student's classifier as the `mean` head has it.

    Linear, so of a slide's mean features it says the mean of its tiles' logits.
    """
    width = weight.shape[1]
    return FittedLinear(
        np.zeros(width),
        np.ones(width),
        weight.astype(np.float64),
        bias.astype(np.float64),
        present,
        np.array(num_classes),
    )


class _Linear(nn.Module):
    """Standardising is linear too: it goes into the weights. A feature that never varied has scale inf, weight 0."""

    weight: Tensor
    bias: Tensor

    def __init__(self, fitted: FittedLinear) -> None:
        super().__init__()
        weight = fitted.weight / fitted.scale
        self.register_buffer("weight", _fp32(weight))
        self.register_buffer("bias", _fp32(fitted.bias - weight @ fitted.centre))

    def forward(self, x_BD: Tensor) -> Tensor:
        return F.linear(x_BD, self.weight, self.bias)


class _Prototypes(nn.Module):
    centre: Tensor
    prototypes: Tensor

    def __init__(self, fitted: FittedPrototypes) -> None:
        super().__init__()
        self.register_buffer("centre", _fp32(fitted.centre))
        self.register_buffer("prototypes", _fp32(fitted.prototypes))

    def forward(self, x_BD: Tensor) -> Tensor:
        x_BD = F.normalize(x_BD - self.centre, dim=1)
        squared_BC = (x_BD[:, None] - self.prototypes[None]).square().sum(2)
        return -squared_BC / SimpleShotHead.TEMPERATURE


class _Neighbours(nn.Module):
    """Log of the votes; a class without a vote has logit -inf, probability 0."""

    centre: Tensor
    keys: Tensor
    one_hot: Tensor

    def __init__(self, fitted: FittedKnn, present: Ints) -> None:
        super().__init__()
        self.neighbours = int(fitted.neighbours)
        self.register_buffer("centre", _fp32(fitted.centre))
        self.register_buffer("keys", _fp32(fitted.keys))
        self.register_buffer("one_hot", _fp32(fitted.labels[:, None] == present[None]))

    def forward(self, x_BD: Tensor) -> Tensor:
        cosine = F.normalize(x_BD - self.centre, dim=1) @ self.keys.T
        nearest, places = cosine.topk(self.neighbours, dim=1)
        votes = (nearest / KnnHead.TEMPERATURE)[:, :, None] + self.one_hot[places].log()
        return torch.logsumexp(votes, 1)


class _BagOfOne(nn.Module):
    """Each tile is a bag by itself: its attention is 1."""

    centre: Tensor
    scale: Tensor

    def __init__(self, fitted: FittedAbmil) -> None:
        super().__init__()
        self.model: GatedAttention = fitted.model
        self.register_buffer("centre", fitted.centre)
        self.register_buffer("scale", fitted.scale)

    def forward(self, x_BD: Tensor) -> Tensor:
        logits_BC: Tensor = self.model(((x_BD - self.centre) / self.scale)[:, None])[0]
        return logits_BC


def _fp32(x: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
