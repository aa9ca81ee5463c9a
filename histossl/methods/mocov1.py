"""MoCo v1: MoCo v2 before it learnt from SimCLR (He et al. 2020, arXiv 1911.05722).

Queue, key encoder and loss are v2's. Different are the head, which is one linear layer (the official code's `fc`), the
temperature, 0.07, and the views: greyscale and a jitter that always applies, no blur (recipe mocov1).
Decided: v1's step schedule (rate / 10 at epochs 120 and 160 of 200) is not here; like all methods it falls by a cosine,
which for v2 made 0.2 points.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from histossl.core.config import knob
from histossl.methods.mocov2 import HE, MoCoV2, MoCoV2Config


@dataclass(frozen=True)
class MoCoV1Config(MoCoV2Config):
    temperature: float = knob(0.07, "of the softmax over keys", "0.07", HE)


class MoCoV1(MoCoV2):
    def make_head(self, feature_dim: int) -> nn.Module:
        return nn.Linear(feature_dim, self.config.embedding_dim)
