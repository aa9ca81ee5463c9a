"""SimCLR v2: a deeper head, of which finetuning keeps the first layer (Chen et al. 2020b, arXiv 2006.10029).

As SimCLR with a head of three layers. The layers up to `finetune_from_layer` stay on the exported backbone: `embed`,
`finetune` and `predict` see relu(bn(linear(features))). They lie in a file of their own beside the weights, which keep
timm's keys. The paper's third act, distillation on the unlabelled tiles, is `histossl distill`.

Optional, as in the paper: a memory of keys from a slow copy of the encoder, which are negatives and never positives.
The paper adds them to a batch of 4,096 and gains 1 %; a small batch has more use for them. Decided: the memory keeps
the second view's keys alone (one more pass without gradient, not two), and it is off unless it is given a size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from histossl.core.config import knob, require
from histossl.methods.method import Views
from histossl.methods.modules.ema import ema_update, frozen_copy
from histossl.methods.modules.queue import Keys, Ring
from histossl.methods.simclr import SimCLR, SimCLRConfig
from histossl.runtime import collectives
from histossl.views.recipe import ViewRecipe

CHEN_V2 = "Chen et al. 2020b, arXiv 2006.10029"


@dataclass(frozen=True)
class SimCLRv2Config(SimCLRConfig):
    finetune_from_layer: int = knob(
        1, "of the head; it and those before it stay on the backbone. 0: none, as in v1", "1", CHEN_V2
    )
    queue_size: int = knob(
        0, "keys of a slow encoder as further negatives; 0: none. 8 % of the tiles are usual", "0 or 65536", CHEN_V2
    )
    momentum: float = knob(
        0.99, "of the slow encoder, where queue_size is set; 0.999 for runs of 20,000 steps and more", "0.999", CHEN_V2
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.finetune_from_layer <= 2, "set finetune_from_layer", self.finetune_from_layer, "0, 1 or 2")
        require(self.queue_size >= 0, "set queue_size", self.queue_size, "0 or more")
        require(0 <= self.momentum <= 1, "set momentum", self.momentum, "between 0 and 1")


class SimCLRv2(SimCLR, Ring):
    head_layers = 3
    above_by = ("--set momentum too low, where queue_size is set",)
    config: SimCLRv2Config

    def __init__(self, backbone: nn.Module, feature_dim: int, recipe: ViewRecipe, config: SimCLRv2Config) -> None:
        super().__init__(backbone, feature_dim, recipe, config)
        if config.queue_size:
            self.key_backbone = frozen_copy(self.backbone)
            self.key_head = frozen_copy(self.head)
        self.make_ring(config.queue_size, config.embedding_dim)

    def projection(self) -> dict[str, Tensor] | None:
        num_layers = self.config.finetune_from_layer
        assert isinstance(self.head, nn.Sequential)
        return self.head[: 3 * num_layers].state_dict() if num_layers else None

    # ---- the memory

    def memory(self) -> tuple[Tensor, Tensor]:
        return self.queue_KD, self.queue_tiles_K

    @torch.no_grad()
    def ring_keys(self, views: Views) -> Keys:
        key_BD = F.normalize(self.key_head(self.key_backbone(views.images[1])).float(), dim=1)
        return Keys.of([collectives.gather(key_BD)], views)

    def carry(self, views: Views) -> Keys | None:
        return self.ring_keys(views) if self.config.queue_size else None

    @torch.no_grad()
    def after_step(self, carries: Sequence[Keys], progress: float) -> None:
        if self.config.queue_size:
            ema_update(self.key_backbone, self.backbone, self.config.momentum)
            ema_update(self.key_head, self.head, self.config.momentum)
            self.enqueue(carries)  # after the loss, as MoCo's

    def diagnostics(self) -> dict[str, float]:
        return super().diagnostics() if self.config.queue_size else {}
