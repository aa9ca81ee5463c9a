"""SimCLR: find a tile's other view among all other views of the batch (Chen et al. 2020, arXiv 2002.05709).

    z = head(backbone(view)), both views in one pass, both with gradient
    loss = mean over the 2N views of  -log  exp(z.z' / T) / sum over the other 2N - 1 views of exp(z.z'' / T)

The negatives are the batch, so the batch decides: the paper's ResNet-50 reaches 61.9 % (256 tiles, 200 epochs), 66.6 %
(8,192) of ImageNet. What 1-4 GPUs give is at the lower end, and there MoCo's queue is worth more.

Where paper and google-research/simclr differ, or we do:
the loss is the paper's mean over 2N views; the official code's sum of two means is twice it (under LARS the same).
Embeddings are gathered over processes *with* their gradient, as there. The head is the official code's (BatchNorm
behind each layer, the output's without shift), as is one BatchNorm statistic over both views of all processes: with a
statistic of its own, a process's few tiles give their positives away. A tile that is in the batch twice is no negative
of itself. Micro-batches do not add negatives: the plan warns where it makes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from histossl.core.config import knob, require
from histossl.core.errors import UsageError
from histossl.methods.losses.contrastive import nt_xent, tells_nothing
from histossl.methods.method import Method, Outcome, Training, Views
from histossl.methods.modules.batchnorm import globalise_batchnorms
from histossl.methods.modules.projection_heads import normed_head
from histossl.runtime import collectives
from histossl.views.recipe import ViewRecipe

# B tiles of this process, G views of all processes, K what a view is told from, D embedding dimensions.

CHEN = "Chen et al. 2020, arXiv 2002.05709"


@dataclass(frozen=True)
class SimCLRConfig:
    """Knobs for `--set key=value`. Defaults of the paper, where a batch of 1-4 GPUs has no reason to differ."""

    # The lower the temperature, the more the nearest negatives weigh. At batch 4,096 0.1 was best; at 256-1,024 there
    # are few negatives, and among tissue the nearest are often the same thing. MoCo v2's own sweep peaks at 0.2.
    temperature: float = knob(0.2, "for batches of 256 to 1,024; 0.1 for larger ones", "0.1 (batch 4,096)", CHEN)
    embedding_dim: int = knob(128, "of the head's output", "128", CHEN)

    def __post_init__(self) -> None:
        require(self.temperature > 0, "set temperature", self.temperature, "above 0")
        require(self.embedding_dim >= 2, "set embedding_dim", self.embedding_dim, "at least 2")


class SimCLR(Method):
    # SGD, where it is asked for, takes MoCo's rates: our loss is a mean of cross-entropies, as MoCo's is.
    trained_by = Training(for_batchnorm="lars", warmup=0.1, in_batch=True)
    stuck_by = (
        "views that share nothing",
        "a batch of tiles that are all alike",
        "--set temperature too high",
    )
    head_layers = 2

    def __init__(self, backbone: nn.Module, feature_dim: int, recipe: ViewRecipe, config: SimCLRConfig) -> None:
        super().__init__()
        if len(recipe.views) != 2:
            raise UsageError(f"--recipe {recipe.name}: makes {len(recipe.views)} views, and SimCLR takes 2 (simclr)")
        self.config = config
        self.recipe = recipe
        self.backbone = backbone
        self.head = normed_head([feature_dim] * self.head_layers + [config.embedding_dim])
        globalise_batchnorms(self)

    def views(self, progress: float = 0.0) -> ViewRecipe:
        return self.recipe

    def forward(self, views: Views) -> Outcome:
        embeddings = F.normalize(self.head(self.backbone(torch.cat(views.images))).float(), dim=1)
        first_BD, second_BD = embeddings.chunk(2)
        tiles = views.tiles_B.repeat(2)
        others_KD, tiles_K = collectives.gather_with_gradient(embeddings), collectives.gather(tiles)
        memory_KD, memory_tiles_K = self.memory()
        others_KD, tiles_K = torch.cat([others_KD, memory_KD]), torch.cat([tiles_K, memory_tiles_K])
        nce = nt_xent(first_BD, second_BD, others_KD, tiles[:, None] != tiles_K[None, :], self.config.temperature)
        return Outcome(nce.loss, nce.figures(), self.carry(views))

    def memory(self) -> tuple[Tensor, Tensor]:
        """Further negatives (K, D) and their tiles. Here: none."""
        like = next(self.head.parameters())
        return like.new_empty(0, self.config.embedding_dim), torch.empty(0, dtype=torch.long, device=like.device)

    def carry(self, views: Views) -> Any:
        return None

    def ailment(self, row: Mapping[str, float]) -> str:
        return tells_nothing(row)
