"""Which patches a student does not see. Drawn by tile position, so that they do not depend on the number of processes.

Shapes: V crops of each tile, B tiles of this process, N = h x w patches.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from histossl.methods.method import Views
from histossl.runtime import collectives

Bools = NDArray[np.bool_]
Shares = NDArray[np.float64]

ASPECT = 0.3  # of a block, and its inverse (BEiT)
ATTEMPTS = 10


def masked_shares(views: Views, num_crops: int, probability: float, low: float, high: float) -> Shares:
    """(V, B) share of patches to hide in each crop; 0 in those that stay whole.

    As DINOv2 (collate.py): exactly `probability` of the crops of the whole batch are masked, and their shares are
    spread over low..high in equal strata, so every batch holds light and heavy masks. (iBOT draws each crop's share by
    itself; the distribution is the same.)
    """
    assert views.positions_B is not None
    place_B = views.positions_B.numpy()
    total = len(place_B) * collectives.world_size()
    rng = np.random.default_rng([views.seed, int(place_B.min()) // total])  # the same on every process
    order = rng.permutation(num_crops * total)
    within = rng.random(num_crops * total)
    own = np.arange(num_crops)[:, None] * total + place_B % total
    num_masked = int(num_crops * total * probability)
    share = low + (high - low) * (order[own] + within[own]) / max(1, num_masked)
    return np.where(order[own] < num_masked, share, 0.0)


def random_masks(views: Views, share_VB: Shares, grid: tuple[int, int]) -> Bools:
    """(V, B, N): the wanted number of patches anywhere. Measured a little better than blocks for ViT-B (iBOT)."""
    num_crops, num_patches = len(share_VB), grid[0] * grid[1]
    draws = views.draws()
    noise = np.stack([draws.uniform(f"mask {crop}", times=num_patches) for crop in range(num_crops)])
    rank = noise.argsort(axis=-1).argsort(axis=-1)
    return rank < np.round(share_VB * num_patches)[..., None]


def block_masks(views: Views, share_VB: Shares, grid: tuple[int, int], least: int = 4) -> Bools:
    """(V, B, N): rectangles of `least` patches or more until the wanted number is reached, never more than it.

    BEiT's, as iBOT and DINOv2 have them. Where no rectangle fits any more they stop short; here single patches follow,
    so that every crop has the share that was drawn for it.
    """
    assert views.positions_B is not None
    masks = np.zeros((*share_VB.shape, *grid), dtype=bool)
    for crop, tile in zip(*np.nonzero(share_VB), strict=True):
        rng = np.random.default_rng([views.seed, int(views.positions_B[tile]), int(crop)])
        _fill_with_blocks(masks[crop, tile], round(share_VB[crop, tile] * masks[crop, tile].size), least, rng)
    return masks.reshape(*share_VB.shape, -1)


def _fill_with_blocks(mask: Bools, wanted: int, least: int, rng: np.random.Generator) -> None:
    height, width = mask.shape
    smallest = min(max(1, least), wanted)
    while (missing := wanted - int(mask.sum())) > 0:
        for _ in range(ATTEMPTS):
            area = rng.uniform(min(smallest, missing), missing)
            aspect = math.exp(rng.uniform(math.log(ASPECT), -math.log(ASPECT)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < h <= height and 0 < w <= width):
                continue
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            block = mask[top : top + h, left : left + w]
            if 0 < block.size - int(block.sum()) <= missing:
                block[:] = True
                break
        else:  # no block fits any more: what is missing is filled patch by patch
            free = np.flatnonzero(~mask.ravel())
            mask.ravel()[rng.choice(free, missing, replace=False)] = True
