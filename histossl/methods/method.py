"""The seam: a self-supervised objective is one file with one class that fills this in.

`forward` has no side effects but BatchNorm's statistics, so computing a loss twice, accumulating gradients or
validating never alters the algorithm. Every change of state (momentum encoder, queue, centre) is in `after_step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from histossl.views.recipe import ViewRecipe


class Views(NamedTuple):
    """A batch as a method sees it: augmented views, and which tile and slide each row comes from."""

    images: list[Tensor]  # each (B, 3, h, w), normalised for the backbone
    tiles_B: Tensor  # int64 tile numbers of the index
    slides_B: Tensor  # int64 slide numbers of the index
    step: int  # of the optimizer; with `part` it keys whatever a method draws at random
    part: int = 0  # micro-batch within the step


class Outcome(NamedTuple):
    loss: Tensor  # (), mean over this process's tiles
    metrics: dict[str, Tensor]  # detached scalars
    carry: Any = None  # what after_step needs; MoCo: this batch's keys


class Method(nn.Module):
    backbone: nn.Module  # what `pretrain` exports (MoCo: the query encoder; DINO: the teacher)

    def views(self) -> ViewRecipe:
        """What the tiles must become."""
        raise NotImplementedError

    def forward(self, views: Views) -> Outcome:
        raise NotImplementedError

    def after_step(self, carries: Sequence[Any], progress: float) -> None:
        """Called once after each optimizer step. `carries`: one a micro-batch, in order; `progress` in [0, 1]."""

    def num_prefill_tiles(self) -> int:
        """How many tiles `prefill` wants to see before step 0."""
        return 0

    @torch.no_grad()
    def prefill(self, views: Views) -> None:
        """Called before step 0 with batches of views until `num_prefill_tiles` are through."""

    def diagnostics(self) -> dict[str, float]:
        """Figures too costly for every step; asked for when a step is logged."""
        return {}

    def loss_ceiling(self) -> float | None:
        """The loss of features that tell nothing, where a closed form exists (InfoNCE: ln(K+1))."""
        return None
