"""The backbone of a run as it is handed out: timm's own keys, BatchNorm's statistics of clean tiles, and its record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from histossl.backbones.loading import BackboneInfo, Projected, create_backbone
from histossl.methods.modules.batchnorm import has_batchnorm
from histossl.training.setup.run import BATCHNORM, Prepared

BATCHNORM_TILES = 10_000
BEST_BATCHNORM_TILES = 2048  # of a look's backbone: there may be many, and the other processes wait


def plain_backbone(prepared: Prepared) -> nn.Module:
    """The backbone as timm makes it (no grouped BatchNorm), with the present weights, in evaluation mode.

    With the head layers behind it that the method wants kept.
    """
    plain, _ = create_backbone(prepared.config.backbone, "random")
    plain.load_state_dict(prepared.method.backbone.state_dict())
    projection = prepared.method.projection()
    if projection is not None:
        plain = Projected(plain, projection)
    return plain.to(prepared.device).eval()


def clean_backbone(prepared: Prepared, num_tiles: int = BATCHNORM_TILES) -> nn.Module:
    """The plain backbone as it is worth keeping: BatchNorm's statistics are those of clean tiles."""
    backbone = plain_backbone(prepared)
    if has_batchnorm(backbone):
        _reestimate_batchnorm(backbone, prepared.clean_batches(BATCHNORM, num_tiles))
    return backbone


def adapted_info(prepared: Prepared, done: int) -> BackboneInfo:
    slides = np.array(prepared.index.slides)
    own = slides[prepared.keep].tolist()
    before = sorted(set(prepared.earlier.get("pretraining_slides") or ()) - set(own))
    return replace(
        prepared.info,
        input_px=prepared.config.view_px,
        mpp=prepared.index.mpp,
        method=prepared.config.method,
        provenance={
            **prepared.info.provenance,
            **({"teacher": prepared.earlier["teacher"]} if "teacher" in prepared.earlier else {}),
            **prepared.method.provenance(),
            "steps": done,
            "tiles": prepared.index.digest,
            "num_tiles": prepared.order.num_tiles,
            "subset": prepared.subset and prepared.subset.facts(),
            "pretraining_slides": own + before,
            "excluded_slides": slides[~prepared.keep].tolist(),
            "seed": prepared.config.seed,
        },
    )


@torch.no_grad()
def _reestimate_batchnorm(backbone: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    """Running statistics from clean tiles: training saw them through crops, colour and blur ('precise BN')."""
    norms = [module for module in backbone.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # plain average over the batches
        norm.train()
    for batch, _ in batches:
        backbone(batch)
    backbone.eval()
