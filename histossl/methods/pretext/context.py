"""Context prediction: tell where a patch lies about another (Doersch et al. 2015, arXiv 1505.05192).

    z = embed(backbone(patch)) for 3 x 3 patches        0 1 2
    loss = cross-entropy of head([z_a, z_b]) with       3 . 4     the place of b about a
                                                        5 6 7

The opposite direction is 7 - label. On tissue neighbours can be told by structures that go on from one to the other,
but most textures look the same in every direction.

Decided: pairs are the centre with each neighbour, both ways: 16 a tile, each label twice, so that chance is exactly 1/8
(Doersch pairs all neighbours of larger grids, which has the straight directions more often; Google one way only).
Guards: a gap of half a patch and a jitter of 7/96 (Doersch; Google's is at least 1 px); each patch standardised by
itself (both); two tiles of three grey (Google's, in the recipe) in place of Doersch's dropped colours, which
`colour_drop` brings back, with 0 for his noise of a hundredth. His random down- and upsampling is the recipe's blur.
The head is Google's without its dropout, which would differ from process to process, and with a narrower middle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from histossl.core.config import knob, require
from histossl.core.errors import UsageError
from histossl.methods.method import Outcome, Views
from histossl.methods.modules.batchnorm import globalise_batchnorms
from histossl.methods.pretext.base import (
    GOOGLE,
    GRID,
    Layout,
    Pretext,
    cut,
    encoded,
    encoder_px,
    only_one_channel,
    standardised,
    whole_numbers,
)
from histossl.views.geometry import on
from histossl.views.recipe import ViewRecipe

DOERSCH = "Doersch et al. 2015, arXiv 1505.05192"
CENTRE, DIRECTIONS = 4, 8


@dataclass(frozen=True)
class ContextConfig:
    gap: float = knob(0.5, "between patches, in patches", "0.5 (48 of 96 px)", DOERSCH)
    jitter: float = knob(7 / 96, "of each patch to all sides, in patches", "7/96", DOERSCH)
    colour_drop: float = knob(0.0, "share of patches that keep one channel alone", "1", DOERSCH)
    embedding_dim: int = knob(512, "of a patch", "1000", GOOGLE)
    hidden_dim: int = knob(1024, "of the head that sees the pair", "4096", GOOGLE)

    def __post_init__(self) -> None:
        require(0 <= self.jitter <= 1, "set jitter", self.jitter, "between 0 and 1")
        require(
            2 * self.jitter < self.gap <= 4, "set gap", self.gap, f"more than twice the jitter ({2 * self.jitter:.3g})"
        )
        require(0 <= self.colour_drop <= 1, "set colour_drop", self.colour_drop, "between 0 and 1")
        for name in ("embedding_dim", "hidden_dim"):
            require(getattr(self, name) >= 2, f"set {name}", getattr(self, name), "at least 2")


class Context(Pretext):
    question = "on which side of a patch its neighbour lies"
    shortcuts = "edges that run on over the gap, shading, chromatic aberration, the JPEG grid"
    stuck_by = ("tissue that looks alike in every direction, which is to be expected of this control",)
    caution = (
        "context prediction is close to ill-posed on tissue, most of which looks alike in every direction: "
        "use it as a control. Chance is 12.5 %"
    )

    def __init__(self, backbone: nn.Module, feature_dim: int, recipe: ViewRecipe, config: ContextConfig) -> None:
        super().__init__(backbone, recipe, DIRECTIONS)
        self.config = config
        self.layout = apart(recipe.views[0].size_px, config.gap, config.jitter)
        self.input_px = encoder_px(backbone, self.layout.patch_px, self.layout.side_px)
        self.embed = nn.Sequential(
            nn.Linear(feature_dim, config.embedding_dim), nn.BatchNorm1d(config.embedding_dim), nn.ReLU()
        )
        self.head = nn.Sequential(
            nn.Linear(2 * config.embedding_dim, config.hidden_dim),
            nn.BatchNorm1d(config.hidden_dim),
            nn.ReLU(),
            nn.Linear(config.hidden_dim, DIRECTIONS),
        )
        globalise_batchnorms(self)

    def forward(self, views: Views) -> Outcome:
        draws = views.draws()
        patches = cut(views.images[0], self.layout.corners(draws), self.layout.patch_px)
        if self.config.colour_drop:
            kept = whole_numbers(draws, "kept channel", 3, GRID**2)
            dropped = draws.uniform("colours dropped", times=GRID**2) < self.config.colour_drop
            patches = only_one_channel(patches, kept, dropped)
        features = encoded(self.backbone, standardised(patches), self.input_px)  # (B, 9, D)
        z = self.embed(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        first, second, label = (on(z.device, each.numpy()) for each in pairs())
        logits = self.head(torch.cat([z[:, first], z[:, second]], 2).flatten(0, 1))
        return self.answered(logits, label.repeat(len(z)))


def pairs() -> tuple[Tensor, Tensor, Tensor]:
    """(16,) each: the first patch, the second, and the place of the second about the first, 0..7 row by row."""
    around = torch.tensor([place for place in range(GRID**2) if place != CENTRE])
    centre, label = torch.full_like(around, CENTRE), torch.arange(DIRECTIONS)
    return torch.cat([centre, around]), torch.cat([around, centre]), torch.cat([label, DIRECTIONS - 1 - label])


def apart(side_px: int, gap: float, jitter: float) -> Layout:
    """The largest patches that fit a view with their gap and jitter (in patches)."""
    for patch_px in range(side_px, 0, -1):
        reach_px = 2 * round(jitter * patch_px)
        layout = Layout(side_px, patch_px, patch_px + round(gap * patch_px), reach_px)
        if layout.span_px <= side_px and layout.gap_px >= 1:
            return layout
    raise UsageError(f"--view-px {side_px}: too small for 3 x 3 patches with --set gap={gap:g}")
