"""Projection heads: what is put on a backbone for pretraining and thrown away after it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def moco_head(feature_dim: int, embedding_dim: int, hidden_dim: int | None = None) -> nn.Sequential:
    """MoCo v2's head: Linear, ReLU, Linear, without BatchNorm (Chen et al. 2020, arXiv 2003.04297).

    The hidden layer is as wide as the features unless told otherwise (2048 for ResNet-50, as in the paper).
    """
    hidden_dim = hidden_dim or feature_dim
    return nn.Sequential(nn.Linear(feature_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, embedding_dim))


class PrototypeHead(nn.Module):
    """DINO's head: MLP with GELU, unit length, then the cosine to K prototypes (Caron et al. 2021, section 3.1).

    (..., D) -> (..., K). Prototypes are unit length, as weight normalisation with its gain frozen at 1 makes them
    (`norm_last_layer`; nanopath found the same best when continuing), so logits lie in -1..1. With `trainable_norm`
    each has a gain of its own, as DINOv2's.
    """

    def __init__(
        self,
        feature_dim: int,
        prototypes: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        trainable_norm: bool = False,
    ) -> None:
        super().__init__()
        widths = [feature_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = nn.Linear(bottleneck_dim, prototypes, bias=False)
        self.gain_K1 = nn.Parameter(torch.ones(prototypes, 1)) if trainable_norm else None

    def forward(self, x: Tensor) -> Tensor:
        towards = self.towards(x)
        return F.linear(towards, self.prototypes_KD().to(towards.dtype))

    def towards(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., bottleneck), of unit length: what has a cosine to each prototype."""
        return F.normalize(self.mlp(x), dim=-1, eps=1e-6)

    def prototypes_KD(self) -> Tensor:
        """(K, bottleneck), fp32, each as long as its gain."""
        prototypes_KD = F.normalize(self.last_layer.weight, dim=1)
        return prototypes_KD if self.gain_K1 is None else prototypes_KD * self.gain_K1


def normed_head(widths: Sequence[int], output_scale: bool = True) -> nn.Sequential:
    """Linear without bias and BatchNorm for each layer, the output's too, ReLU between them.

    As google-research/simclr: the output's BatchNorm has no shift. MoCo v3's has no scale either (`output_scale`).
    Weights start as torch's Linear has them; with BatchNorm behind each layer, the official 0.01 is the same function.
    """
    layers: list[nn.Module] = []
    for number, (width, next_width) in enumerate(itertools.pairwise(widths)):
        last = number == len(widths) - 2
        norm = nn.BatchNorm1d(next_width, affine=not last or output_scale)
        if last:
            norm.register_parameter("bias", None)
        layers += [nn.Linear(width, next_width, bias=False), norm, *([] if last else [nn.ReLU()])]
    return nn.Sequential(*layers)
