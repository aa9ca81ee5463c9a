"""MoCo v2: tell a tile's own key from a queue of other tiles' keys (He et al. 2020; Chen et al. 2020).

    query = head(backbone(view 1)), trained          key = head_k(backbone_k(view 2)), a slow copy, no gradient
    loss  = -log  exp(q.k+ / T) / (exp(q.k+ / T) + sum over the queue of exp(q.k / T))

The queue keeps negatives of past batches, so a small batch on one GPU has as many as it wants.
Where this differs from facebookresearch/moco at 132aea9, all on purpose:
the queue is a ring that takes any batch size; it starts full of real keys; it knows each key's tile and slide, so a
tile is never its own negative; BatchNorm groups are of fixed size, shuffled across all processes; the momentum step
follows the optimizer step instead of preceding the next key forward, which is the same computation.
And as every method here (Training, config.py): gradients are clipped at norm 3, the rate rises over the first 5 % of
the steps and then follows a cosine step by step down to 1 % of its peak; there it is a cosine by epochs, down to 0,
with neither warm-up nor clipping.
Continuing, SGD's rate is 0.01 for a batch of 256, however many tiles there are; with a million the paper's 0.03 (--lr)
is worth a try.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from histossl.core.config import knob, require
from histossl.core.errors import UsageError
from histossl.methods.losses.contrastive import NEVER, InfoNCE, info_nce, tells_nothing
from histossl.methods.method import Outcome, Training, Views
from histossl.methods.modules.batchnorm import average_batchnorm_buffers, group_batchnorms
from histossl.methods.modules.ema import ema_update, frozen_copy
from histossl.methods.modules.projection_heads import moco_head
from histossl.methods.modules.queue import Keys, Ring
from histossl.runtime import collectives
from histossl.views.geometry import on
from histossl.views.recipe import ViewRecipe

# B tiles of this process, G of all processes, K keys in the queue, D embedding dimensions.


FEW_LEFT = 0.1  # of the queue, by weight
HE, CHEN = "MoCo, 1911.05722", "MoCo v2, 2003.04297"


@dataclass(frozen=True)
class MoCoV2Config:
    """Knobs for `--set key=value`. Defaults of the paper, where continuing has no reason to differ."""

    queue_size: int = knob(65536, "keys in the queue; the planner gives what fits the tile set", "65536", HE)
    momentum: float = knob(0.999, "of the key encoder; the planner gives what fits the run's length", "0.999", HE)
    temperature: float = knob(0.2, "0.1 is worth a try for queues up to 4,096", "0.2", CHEN)
    embedding_dim: int = knob(128, "of queries and keys", "128", HE)
    symmetric: bool = knob(False, "mean of both directions; both views' keys join the queue", "false", CHEN)
    same_slide_weight: float = knob(
        1.0, "of a negative from the query's own slide: 1 treats all alike, 0 leaves it out", "1", "ours"
    )
    batchnorm_group_tiles: int = knob(
        32, "tiles per BatchNorm statistic; 0 takes each process's batch as it comes", "32 (256 on 8 GPUs)", HE
    )

    def __post_init__(self) -> None:
        require(self.queue_size >= 1, "set queue_size", self.queue_size, "at least 1")
        require(0 <= self.momentum <= 1, "set momentum", self.momentum, "between 0 and 1")
        require(self.temperature > 0, "set temperature", self.temperature, "above 0")
        require(self.embedding_dim >= 2, "set embedding_dim", self.embedding_dim, "at least 2")
        require(0 <= self.same_slide_weight <= 1, "set same_slide_weight", self.same_slide_weight, "between 0 and 1")
        group = self.batchnorm_group_tiles
        require(
            group == 0 or group >= 2, "set batchnorm_group_tiles", group, "0, or 2 or more: one tile has no variance"
        )


class MoCoV2(Ring):
    planned = ("queue_size", "momentum")
    trained_by = Training(decay_flat=True)  # biases and norms too, as the official code
    stuck_by = ("views that share nothing", "a queue full of a tile's own neighbours", "--set temperature too high")
    above_by = ("--set momentum too low",)

    def __init__(self, backbone: nn.Module, feature_dim: int, recipe: ViewRecipe, config: MoCoV2Config) -> None:
        super().__init__()
        if len(recipe.views) != 2:
            raise UsageError(
                f"--recipe {recipe.name}: makes {len(recipe.views)} views, and MoCo takes 2 (mocov2, simclr)"
            )
        self.config = config
        self.recipe = recipe
        self.num_batchnorms = group_batchnorms(backbone, config.batchnorm_group_tiles)
        self.backbone = backbone
        self.head = self.make_head(feature_dim)
        self.key_backbone = frozen_copy(self.backbone)
        self.key_head = frozen_copy(self.head)
        self.make_ring(config.queue_size, config.embedding_dim)

    def make_head(self, feature_dim: int) -> nn.Module:
        return moco_head(feature_dim, self.config.embedding_dim)

    def views(self, progress: float = 0.0) -> ViewRecipe:
        return self.recipe

    # ---- forward: computes, changes nothing

    def forward(self, views: Views) -> Outcome:
        first, second = views.images
        pairs = [(first, second), (second, first)] if self.config.symmetric else [(first, second)]
        losses, keys, metrics = [], [], {}
        for direction, (query_view, key_view) in enumerate(pairs):
            query_BD = F.normalize(self.head(self.backbone(query_view)).float(), dim=1)
            key_GD = self.encode_keys(key_view, views, direction)
            nce = info_nce(
                query_BD,
                collectives.own_part(key_GD),
                self.queue_KD,
                self.config.temperature,
                allowed_BK=views.tiles_B[:, None] != self.queue_tiles_K[None, :],
                log_weight_BK=self._log_weight(views.slides_B),
            )
            losses.append(nce.loss)
            keys.append(key_GD)
            if direction == 0:
                metrics = self._metrics(nce, views.slides_B)
        return Outcome(torch.stack(losses).mean(), metrics, Keys.of(keys, views))

    @torch.no_grad()
    def encode_keys(self, key_view: Tensor, views: Views, direction: int = 0) -> Tensor:
        """Keys of all processes, (G, D) unit length, encoded in shuffled company ('shuffling BN', He et al. 3.3).

        The permutation over the global batch comes from the step, so every process draws the same one.
        LayerNorm backbones have no statistics to leak and skip the exchange of images.
        """
        if self.num_batchnorms == 0:
            return collectives.gather(self._key(key_view))
        images_G = collectives.gather(key_view)
        generator = torch.Generator().manual_seed((views.step * 1000 + views.part) * 2 + direction)
        order_G = on(key_view.device, torch.randperm(len(images_G), generator=generator).numpy())
        shuffled_GD = collectives.gather(self._key(images_G[collectives.own_part(order_G)]))
        return torch.empty_like(shuffled_GD).index_copy_(0, order_G, shuffled_GD)

    def _key(self, images: Tensor) -> Tensor:
        return F.normalize(self.key_head(self.key_backbone(images)).float(), dim=1)

    def _log_weight(self, slides_B: Tensor) -> Tensor | None:
        weight = self.config.same_slide_weight
        if weight == 1:
            return None
        same_BK = slides_B[:, None] == self.queue_slides_K[None, :]
        return torch.where(same_BK, math.log(weight) if weight else NEVER, 0.0)

    @torch.no_grad()
    def _metrics(self, nce: InfoNCE, slides_B: Tensor) -> dict[str, Tensor]:
        assert nce.allowed_BK is not None
        negatives_BK = nce.negatives_BK.masked_fill(~nce.allowed_BK, -1.0)
        same_BK = slides_B[:, None] == self.queue_slides_K[None, :]
        weight = self.config.same_slide_weight
        weight_BK = torch.where(same_BK, weight, 1.0) * nce.allowed_BK
        return {
            "instance_accuracy": (nce.positive_B > negatives_BK.amax(1)).float().mean(),
            "positive_cosine": nce.positive_B.mean(),
            "negative_cosine": nce.negatives_BK.mean(),
            "same_tile_negatives": (~nce.allowed_BK).float().mean(),
            "same_slide_negatives": same_BK.float().mean(),
            **({"loss_ceiling": (weight_BK.sum(1) + 1).log().mean()} if weight < 1 else {}),
        }

    def keys_of(self, images: Tensor) -> Tensor:
        return self._key(images)

    # ---- after_step: all change of state

    @torch.no_grad()
    def after_step(self, carries: Sequence[Keys], progress: float) -> None:
        ema_update(self.key_backbone, self.backbone, self.config.momentum)
        ema_update(self.key_head, self.head, self.config.momentum)
        average_batchnorm_buffers(self)
        # Keys join the queue after the loss: enqueued earlier, every positive would also be its own negative.
        self.enqueue(carries)

    # ---- before step 0

    def ring_keys(self, views: Views) -> Keys:
        return Keys.of([self.encode_keys(views.images[1], views)], views)

    # ---- what its figures mean

    def loss_ceiling(self) -> float:
        return math.log(len(self.queue_KD) + 1)

    def ailment(self, row: Mapping[str, float]) -> str:
        size = len(self.queue_KD)
        left = math.exp(row["loss_ceiling"]) - 1 if self.config.same_slide_weight < 1 else size
        if left < FEW_LEFT * size:
            return (
                f"of the queue's {size:,} keys {left:.1f} are left as negatives: nearly all are of the query's own "
                "slide, which --set same_slide_weight leaves out; raise it, or use --slide-balance 1"
            )
        return tells_nothing(row)
