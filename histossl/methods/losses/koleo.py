"""Terms that push features of different tiles apart, over the tiles of all processes. B tiles here, G of all."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from histossl.runtime import collectives

EPSILON = 1e-8


def koleo(features_BD: Tensor) -> Tensor:
    """Minus the mean log distance to the nearest neighbour in the batch, of unit-length features.

    Sablayrolles et al. 2019, arXiv 1806.03198; DINOv2 weighs it 0.1, on the class token of each global crop by itself.
    Its code looks for neighbours on one GPU alone; here the whole batch of all processes is searched, so that the value
    does not depend on their number. Two alike give -log(2e-8), not infinity. Orthogonal: -log sqrt 2; opposite: -log 2.
    """
    with torch.autocast(features_BD.device.type, enabled=False):
        own_BD, all_GD = _unit(features_BD)
        with torch.no_grad():
            nearest_B = _others(own_BD @ all_GD.T, -2.0).argmax(1)
        distance_B = F.pairwise_distance(own_BD, all_GD[nearest_B], 2, eps=EPSILON)
        return -torch.log(distance_B + EPSILON).mean()


def kde(features_BD: Tensor, kappa: float = 10.0) -> Tensor:
    """Mean log of the mean of exp(kappa cos) to all other tiles: a density that is to fall (Virchow2, 2408.00738).

    The sign matters: minimising it repels. (A public code base adds it negated and draws features together.)
    Closed forms: all alike +kappa, orthogonal 0, an opposite pair -kappa.
    """
    with torch.autocast(features_BD.device.type, enabled=False):
        own_BD, all_GD = _unit(features_BD)
        density_B = torch.logsumexp(_others(kappa * own_BD @ all_GD.T, -torch.inf), 1)
        return (density_B - math.log(max(1, len(all_GD) - 1))).mean()


def _unit(features_BD: Tensor) -> tuple[Tensor, Tensor]:
    own_BD = F.normalize(features_BD.float(), dim=1, eps=EPSILON)
    return own_BD, collectives.gather_with_gradient(own_BD)


def _others(similarity_BG: Tensor, never: float) -> Tensor:
    """Each row's own column set to `never`."""
    rows = torch.arange(len(similarity_BG), device=similarity_BG.device)
    itself = torch.zeros_like(similarity_BG, dtype=torch.bool)
    itself[rows, rows + collectives.rank() * len(rows)] = True
    return similarity_BG.masked_fill(itself, never)
