"""MoCo v3: predict a tile's slowly moving key among all keys of the batch (Chen, Xie, He 2021, arXiv 2104.02057).

    query = predictor(projector(backbone(view))), trained       key = projector_k(backbone_k(view)), a slow copy
    loss  = 2T CE(query of view 1, keys of view 2) + 2T CE(query of view 2, keys of view 1)

No queue: the negatives are the other tiles' keys of all processes. The momentum rises to 1 along half a cosine. All
layers of projector (3) and predictor (2) have BatchNorm, with one statistic over all processes (Grill et al. 2020's
heads; the paper's ResNet-50 has a projector of 2). A ViT's patch embedding is not trained: its gradient is what made
the paper's ViTs unstable.

Written from the paper alone. Decided, where it leaves it open or we differ: the output's BatchNorm has neither scale
nor shift; both views go through an encoder in one pass, so they share a statistic; the keys' momentum step follows the
optimizer step; a tile that is in the batch twice is no negative of itself; temperature 0.2 for every backbone (its
ResNet-50 is often run with 1.0); the patch embedding stays that of the pretrained weights (the paper's is random).
The position grid is the weights' own and trained (the paper's is sine and cosine, fixed).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from histossl.core.config import knob, require
from histossl.core.errors import UsageError
from histossl.methods.losses.contrastive import InfoNCE, info_nce, tells_nothing
from histossl.methods.method import Method, Outcome, Rate, Training, Views
from histossl.methods.modules.batchnorm import globalise_batchnorms
from histossl.methods.modules.ema import ema_update, frozen_copy
from histossl.methods.modules.projection_heads import normed_head
from histossl.methods.ramps import half_cosine
from histossl.runtime import collectives
from histossl.views.recipe import ViewRecipe

# B tiles of this process, G of all processes, D embedding dimensions.

CHEN = "Chen, Xie, He 2021, arXiv 2104.02057"


@dataclass(frozen=True)
class MoCoV3Config:
    """Knobs for `--set key=value`. Defaults of the paper's ViTs, where continuing has no reason to differ."""

    momentum: float = knob(
        0.99, "of the key encoder at the start, rising to 1; the planner gives what fits the run's length", "0.99", CHEN
    )
    temperature: float = knob(0.2, "of the softmax over the batch's keys", "0.2 (ResNet-50: 1.0)", CHEN)
    embedding_dim: int = knob(256, "of queries and keys", "256", CHEN)
    hidden_dim: int = knob(4096, "of projector and predictor", "4096", CHEN)
    freeze_patch_embed: bool = knob(True, "leave a ViT's patch embedding as it is; CNNs have none", "true", CHEN)

    def __post_init__(self) -> None:
        require(0 <= self.momentum <= 1, "set momentum", self.momentum, "between 0 and 1")
        require(self.temperature > 0, "set temperature", self.temperature, "above 0")
        require(self.embedding_dim >= 2, "set embedding_dim", self.embedding_dim, "at least 2")
        require(self.hidden_dim >= 2, "set hidden_dim", self.hidden_dim, "at least 2")


class MoCoV3(Method):
    planned = ("momentum",)
    stuck_by = (
        "views that share nothing",
        "a batch of tiles that are all alike",
        "--set temperature too high",
    )
    above_by = ("--set momentum too low",)
    trained_by = Training(
        for_batchnorm="lars",
        adamw=Rate(1.5e-4, 1e-4, 256, "linear", 0.1, "MoCo v3's 1.5e-4"),
        lars=Rate(0.3, 0.1, 256, "linear", 1.5e-6, "MoCo v3's 0.3 for ResNet-50"),
        warmup=0.1,
        in_batch=True,
    )

    def __init__(self, backbone: nn.Module, feature_dim: int, recipe: ViewRecipe, config: MoCoV3Config) -> None:
        super().__init__()
        if len(recipe.views) != 2:
            raise UsageError(f"--recipe {recipe.name}: makes {len(recipe.views)} views, and MoCo v3 takes 2 (mocov3)")
        self.config = config
        self.recipe = recipe
        self.backbone = backbone
        embedding, hidden = config.embedding_dim, config.hidden_dim
        self.projector = normed_head([feature_dim, hidden, hidden, embedding], output_scale=False)
        self.predictor = normed_head([embedding, hidden, embedding], output_scale=False)
        globalise_batchnorms(self)
        if config.freeze_patch_embed and isinstance(patch_embed := getattr(backbone, "patch_embed", None), nn.Module):
            patch_embed.requires_grad_(False)
        self.key_backbone = frozen_copy(self.backbone)
        self.key_projector = frozen_copy(self.projector)

    def views(self, progress: float = 0.0) -> ViewRecipe:
        return self.recipe

    def forward(self, views: Views) -> Outcome:
        images = torch.cat(views.images)
        query = F.normalize(self.predictor(self.projector(self.backbone(images))).float(), dim=1)
        first_BD, second_BD = query.chunk(2)
        first_key_BD, second_key_BD = self.keys(images).chunk(2)
        tiles_G = collectives.gather(views.tiles_B)
        allowed_BG = views.tiles_B[:, None] != tiles_G[None, :]
        nces = [
            self._found(query_BD, key_BD, allowed_BG)
            for query_BD, key_BD in ((first_BD, second_key_BD), (second_BD, first_key_BD))
        ]
        scale = 2 * self.config.temperature
        figures = nces[0].figures()
        figures["loss_ceiling"] = 2 * scale * figures["loss_ceiling"]
        return Outcome(scale * (nces[0].loss + nces[1].loss), figures)

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        return F.normalize(self.key_projector(self.key_backbone(images)).float(), dim=1)

    def _found(self, query_BD: Tensor, key_BD: Tensor, allowed_BG: Tensor) -> InfoNCE:
        return info_nce(query_BD, key_BD, collectives.gather(key_BD), self.config.temperature, allowed_BK=allowed_BG)

    @torch.no_grad()
    def after_step(self, carries: Sequence[None], progress: float) -> None:
        momentum = half_cosine(progress, self.config.momentum, 1.0)
        ema_update(self.key_backbone, self.backbone, momentum)
        ema_update(self.key_projector, self.projector, momentum)

    def ailment(self, row: Mapping[str, float]) -> str:
        return tells_nothing(row)
