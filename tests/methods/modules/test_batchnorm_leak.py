"""Oracle 9: with query and key in the same BatchNorm company, MoCo recognises the positive by the statistics it shares.

Pure noise, in pairs. One tile of a pair is loud, as loud in both views; its quiet neighbour's views share nothing. In
one group of the statistics with the loud one, the quiet tile comes out the fainter the louder its company is, in query
and key alike: it can be recognised by nothing but the leak.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from histossl.methods.method import Views
from histossl.methods.mocov2 import MoCoV2, MoCoV2Config
from histossl.views.recipe import recipe_named

BATCH, GROUP, QUEUE, STEPS = 32, 2, 32, 200


class Unshuffled(MoCoV2):
    def encode_keys(self, key_view: Tensor, views: Views, direction: int = 0) -> Tensor:
        with torch.no_grad():
            return self._key(key_view)


def accuracy_of_quiet_tiles(kind: type[MoCoV2]) -> float:
    """How often a quiet tile's own key is nearer than every key of the queue, over the last 50 steps."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU()]
    backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    config = MoCoV2Config(queue_size=QUEUE, momentum=0.9, embedding_dim=16, batchnorm_group_tiles=GROUP)
    method = kind(backbone, 32, recipe_named("mocov2", 16), config).train()
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    right = []
    for step in range(STEPS):
        loudness = torch.ones(BATCH)
        loudness[::2] = torch.exp(1.5 * torch.randn(BATCH // 2, generator=generator))
        images = [torch.randn(BATCH, 3, 16, 16, generator=generator) * loudness[:, None, None, None] for _ in range(2)]
        tiles = torch.arange(BATCH) + step * BATCH
        outcome = method(Views(images, tiles, tiles, step))
        with torch.no_grad():
            query_BD = F.normalize(method.head(method.backbone(images[0])), dim=1)
            positive_B = (query_BD * outcome.carry.key_GD).sum(1)
            right.append((positive_B > (query_BD @ method.queue_KD.T).amax(1))[1::2].float().mean())
        optimizer.zero_grad()
        outcome.loss.backward()
        optimizer.step()
        method.after_step([outcome.carry], 0.5)
    return float(torch.stack(right[-50:]).mean())


def test_shuffling_closes_the_leak() -> None:
    chance = 1 / (QUEUE / 2 + 1)  # among quiet keys: loud ones are told apart by their content
    assert accuracy_of_quiet_tiles(Unshuffled) > 5 * chance
    assert accuracy_of_quiet_tiles(MoCoV2) < 2.5 * chance
