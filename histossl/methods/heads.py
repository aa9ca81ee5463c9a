"""Projection heads: what is put on a backbone for pretraining and thrown away after it."""

from __future__ import annotations

from torch import nn


def moco_head(feature_dim: int, embedding_dim: int, hidden_dim: int | None = None) -> nn.Sequential:
    """MoCo v2's head: Linear, ReLU, Linear, without BatchNorm (Chen et al. 2020, arXiv 2003.04297).

    The hidden layer is as wide as the features unless told otherwise (2048 for ResNet-50, as in the paper).
    """
    hidden_dim = hidden_dim or feature_dim
    return nn.Sequential(nn.Linear(feature_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, embedding_dim))
