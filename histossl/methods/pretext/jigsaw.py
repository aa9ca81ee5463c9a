"""Jigsaw: tell in which order 3 x 3 patches of a tile were laid out (Noroozi and Favaro 2016, arXiv 1603.09246).

    z_n = embed(backbone(patch n)), n = 0..8;  loss = cross-entropy of head([z_p(0), ..., z_p(8)]) with the number of p

p is one of |P| orders that differ from each other in as many places as can be. Each patch is encoded alone, so laying
out the features in another order is laying out the patches.

Decided: the set grows by the largest of the *least* Hamming distances to those chosen (the paper takes the mean, which
can choose two orders that are nearly alike: `spread=mean`), equal ones by the mean, then by the alphabet; it belongs to
the state. |P| 100 (Google; VISSL 2000), eight orders a tile (Google, who shares them within a batch; VISSL one): an
order more costs a row of the head. Guards: cells a third of the view, patches 64/85 of them, moved within their cell,
at least 1 px apart; patches standardised each by itself (Noroozi, Google; VISSL by the dataset); two tiles of three
grey (VISSL 0.66), in the recipe, which also compresses once more. Flips and turns of the whole tile come before the
patches are cut and change no label.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from histossl.core.config import knob, require
from histossl.core.errors import UsageError
from histossl.methods.method import Outcome, Views
from histossl.methods.modules.batchnorm import globalise_batchnorms
from histossl.methods.pretext.base import (
    GOOGLE,
    GRID,
    VISSL,
    Layout,
    Pretext,
    cut,
    encoded,
    encoder_px,
    standardised,
    whole_numbers,
)
from histossl.views.geometry import on
from histossl.views.recipe import ViewRecipe

NOROOZI = "Noroozi and Favaro 2016, arXiv 1603.09246"
SPREADS = ("min", "mean")


@dataclass(frozen=True)
class JigsawConfig:
    num_orders: int = knob(100, "orders to tell apart; 10,000 are found in 10 s", "100 (VISSL 2000)", NOROOZI)
    orders_per_tile: int = knob(8, "that each tile is asked about", "1 (Google 8)", GOOGLE)
    spread: str = knob("min", "Hamming distance that the set is chosen by: min or mean", "mean", NOROOZI)
    order_seed: int = knob(0, "of the first order, from which the others follow", "", "ours")
    embedding_dim: int = knob(1000, "of a patch", "1000", VISSL)

    def __post_init__(self) -> None:
        require(2 <= self.num_orders <= 10_000, "set num_orders", self.num_orders, "2 to 10000")
        require(1 <= self.orders_per_tile <= 64, "set orders_per_tile", self.orders_per_tile, "1 to 64")
        require(self.spread in SPREADS, "set spread", self.spread, "min or mean")
        require(self.order_seed >= 0, "set order_seed", self.order_seed, "0 or more")
        require(self.embedding_dim >= 2, "set embedding_dim", self.embedding_dim, "at least 2")


class Jigsaw(Pretext):
    question = "in which order patches lie"
    shortcuts = "edges that run on over the gap, shading, chromatic aberration, the JPEG grid"
    stuck_by = (
        "tissue that has no order of its parts, which is to be expected of this control",
        "--set num_orders too high",
    )
    caution = "jigsaw is close to ill-posed on tissue, most of which has no order of its parts: use it as a control"
    orders_KN: Tensor

    def __init__(self, backbone: nn.Module, feature_dim: int, recipe: ViewRecipe, config: JigsawConfig) -> None:
        super().__init__(backbone, recipe, config.num_orders)
        self.config = config
        self.layout = cells(recipe.views[0].size_px)
        self.input_px = encoder_px(backbone, self.layout.patch_px, self.layout.side_px)
        self.embed = nn.Sequential(
            nn.Linear(feature_dim, config.embedding_dim), nn.BatchNorm1d(config.embedding_dim), nn.ReLU()
        )
        self.head = nn.Linear(GRID**2 * config.embedding_dim, config.num_orders)
        orders = far_orders(config.num_orders, config.order_seed, config.spread)
        self.register_buffer("orders_KN", torch.from_numpy(orders.astype(np.int64)))
        globalise_batchnorms(self)

    def forward(self, views: Views) -> Outcome:
        draws = views.draws()
        patches = standardised(cut(views.images[0], self.layout.corners(draws), self.layout.patch_px))
        features = encoded(self.backbone, patches, self.input_px)  # (B, 9, D)
        z = self.embed(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        asked = whole_numbers(draws, "order", self.config.num_orders, self.config.orders_per_tile)
        label_BO = on(z.device, asked)
        logits = self.head(laid_out(z, self.orders_KN[label_BO]).flatten(2).flatten(0, 1))
        return self.answered(logits, label_BO.flatten())


def laid_out(x_BNX: Tensor, order_BON: Tensor) -> Tensor:
    """(B, O, N, ...): place n of layout o holds what was at order[b, o, n]."""
    tile = torch.arange(len(x_BNX), device=x_BNX.device)[:, None, None]
    return x_BNX[tile, order_BON]


def cells(side_px: int) -> Layout:
    """VISSL's 64 px patches in cells of 85, moved by up to 20 px, on a view of any size."""
    cell_px = side_px // GRID
    patch_px = min(cell_px - 1, round(cell_px * 64 / 85))
    if patch_px < 1:
        raise UsageError(f"--view-px {side_px}: too small for 3 x 3 patches")
    return Layout(side_px, patch_px, cell_px, cell_px - patch_px - 1)


# ---- the set of orders


@lru_cache(maxsize=4)
def far_orders(count: int, seed: int = 0, spread: str = "min") -> NDArray[np.uint8]:
    """(count, 9) different orders of 0..8, each chosen to be as far as can be from those before it."""
    every = _all_orders(GRID**2)
    columns = np.ascontiguousarray(every.T)  # compared a place at a time: 362,880 orders in 2 ms
    chosen = [int(np.random.default_rng(seed).integers(len(every)))]
    least = np.full(len(every), GRID**2, dtype=np.int64)
    total = np.zeros(len(every), dtype=np.int64)
    while len(chosen) < count:
        distance = (columns != every[chosen[-1]][:, None]).sum(0, dtype=np.uint8)
        np.minimum(least, distance, out=least)
        total += distance
        least[chosen[-1]] = total[chosen[-1]] = -(10**9)  # not again
        chosen.append(int((least * (count * GRID**2) + total if spread == "min" else total).argmax()))
    return every[chosen]


@lru_cache(maxsize=1)
def _all_orders(length: int) -> NDArray[np.uint8]:
    """(length!, length), in alphabetical order."""
    orders = np.zeros((1, 1), dtype=np.uint8)
    for size in range(2, length + 1):
        first = np.repeat(np.arange(size, dtype=np.uint8), len(orders))[:, None]
        rest = np.tile(orders, (size, 1))
        orders = np.concatenate([first, rest + (rest >= first)], 1).astype(np.uint8)
    return orders
