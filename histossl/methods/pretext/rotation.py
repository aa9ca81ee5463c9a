"""Rotation (RotNet): tell by how many quarters a tile was turned (Gidaris et al. 2018, arXiv 1803.07728).

    logits = head(backbone(tile turned by k quarters)),  k = 0, 1, 2, 3 counter-clockwise;  loss = cross-entropy with k

Tissue has no up, so on tissue the right answer is a guess: accuracy should stay at 25 %, and whatever lies above it was
read from shading, from the JPEG grid or from a slide's edge. That makes it a negative control for the others.

Decided: all four turns of each tile in one batch (RotNet and Google; VISSL turns each by one k at random:
`all_turns=false`); a linear head on pooled features (VISSL). The turn comes after the crop (RotNet and Google; VISSL
before it) and is exact, so no corner is empty and no resampling tells it. Nothing is flipped or turned but by the
label: mirroring left and right before it is as in all three; recipes that turn or flip the tile are refused, for they
make the label arbitrary. Against the JPEG grid the "-histology" recipe crops at another scale and compresses once more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from histossl.core.config import knob
from histossl.core.errors import UsageError
from histossl.methods.method import Outcome, Views
from histossl.methods.modules.batchnorm import globalise_batchnorms
from histossl.methods.pretext.base import Pretext
from histossl.views.geometry import on
from histossl.views.recipe import ViewRecipe

TURNS = 4


@dataclass(frozen=True)
class RotationConfig:
    all_turns: bool = knob(
        True, "each tile in all four turns, at four times the cost; false: in one at random", "true (VISSL: false)",
        "Gidaris et al. 2018, arXiv 1803.07728",
    )  # fmt: skip


class Rotation(Pretext):
    question = "how a tile was turned"
    stuck_by = ("tissue that has no up, which is to be expected of this control",)
    caution = (
        "rotation is ill-posed on tissue, which has no up: use it as a negative control. Accuracy should stay near 25 %"
    )

    def __init__(self, backbone: nn.Module, feature_dim: int, recipe: ViewRecipe, config: RotationConfig) -> None:
        super().__init__(backbone, recipe, TURNS)
        for view in recipe.views:
            if view.flip_p or view.quarter_turns or view.rotation_deg:
                raise UsageError(
                    f"--recipe {recipe.name}: flips or turns tiles, so that their rotation has no meaning; "
                    "use rotation or rotation-histology"
                )
        self.config = config
        self.head = nn.Linear(feature_dim, TURNS)
        globalise_batchnorms(self)

    def forward(self, views: Views) -> Outcome:
        every = in_all_turns(views.images[0])  # (B, 4, 3, h, w)
        if self.config.all_turns:
            turns = torch.arange(TURNS, device=every.device).repeat(len(every))
            turned = every.flatten(0, 1)
        else:
            turns = on(every.device, views.draws().whole("rotation", TURNS))
            turned = every[torch.arange(len(every), device=every.device), turns]
        return self.answered(self.head(self.backbone(turned)), turns)


def in_all_turns(images: Tensor) -> Tensor:
    """(B, 4, 3, h, h) of images (B, 3, h, h): turned by 0, 1, 2, 3 quarters counter-clockwise."""
    return torch.stack([torch.rot90(images, turns, (2, 3)) for turns in range(TURNS)], 1)
