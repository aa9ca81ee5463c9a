"""What the pretext tasks share: one view, a question with a known answer, its accuracy against chance, and patches.

A pretext task makes up a question from the tile alone (which way up? which patch lies where? which colour?). It is
learnt best by whatever betrays the answer, and on tissue some of that is no content at all: compression grids, shading,
the stain of a batch. So these methods are here as controls. Each tells how often it answers right and how often a guess
would, warns when the two are the same and when the answers come too easily, and guards against the known shortcuts.

Patches are cut 3 x 3 from the view, row by row, each moved at random, with a gap between them.
Shapes: B tiles, N = 9 patches, P pixels of a patch's side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from histossl.core.errors import UsageError
from histossl.methods.method import Method, Outcome, Rate, Training
from histossl.methods.modules import masked_vit
from histossl.runtime import collectives
from histossl.tiles.stream.sampler import Ints
from histossl.views.geometry import on
from histossl.views.recipe import ViewRecipe
from histossl.views.rng import Draws

GRID = 3
HALVED_TO_ONE = 32  # pixels: five halvings leave one
MEMORY = 0.98  # of the recent accuracy: some 50 steps
AT_CHANCE_AFTER, AT_CHANCE = 300, 1.1  # steps; times chance
TOO_EASY_BEFORE, TOO_EASY = 200, 0.95  # steps; accuracy
VISSL = "VISSL 09270ed2"
GOOGLE = "Kolesnikov et al. 2019, arXiv 1901.09005"


class Pretext(Method):
    """A question about one view. `question` is its name in a sentence, `shortcuts` what may answer it instead."""

    trained_by: ClassVar[Training] = Training(sgd=Rate(0.1, 0.03, 256, "linear", 1e-4, "VISSL's 0.1"))
    question: ClassVar[str]
    shortcuts: ClassVar[str] = "the JPEG grid, shading, a slide's edge"
    above_by = ("a head that is still new, and answers by chance",)
    chance: Tensor
    recent: Tensor

    def __init__(self, backbone: nn.Module, recipe: ViewRecipe, num_answers: int) -> None:
        super().__init__()
        if len(recipe.views) != 1:
            raise UsageError(
                f"--recipe {recipe.name}: makes {len(recipe.views)} views, and a pretext task takes 1 "
                "(rotation, context, jigsaw, colorization)"
            )
        self.recipe, self.backbone = recipe, backbone
        self.register_buffer("chance", torch.tensor(1 / num_answers))
        self.register_buffer("recent", torch.zeros(2, dtype=torch.float64))  # right and asked, fading

    def views(self, progress: float = 0.0) -> ViewRecipe:
        return self.recipe

    def answered(self, logits_QA: Tensor, answer_Q: Tensor) -> Outcome:
        """Cross-entropy of Q questions with A possible answers; ln A where the logits tell nothing."""
        with torch.autocast(logits_QA.device.type, enabled=False):
            loss = F.cross_entropy(logits_QA.float(), answer_Q)
        right = (logits_QA.argmax(1) == answer_Q).sum()
        return self.outcome(loss, right, torch.full_like(right, len(answer_Q)))

    def outcome(self, loss: Tensor, right: Tensor, asked: Tensor) -> Outcome:
        """`right` and `asked`: sums over this process's questions."""
        score = torch.stack([right, asked]).detach().to(self.recent.dtype)
        # Over the mean of `asked`, so that the mean over processes is right over asked of all.
        now = score[0] / collectives.mean_over_processes(score[1]).clamp(min=1e-12)
        recent = torch.where(self.recent[1] > 0, self.recent[0] / self.recent[1].clamp(min=1e-12), now)
        metrics = {"pretext_accuracy": now, "pretext_accuracy_recent": recent, "chance": self.chance.clone()}
        return Outcome(loss, metrics, score)

    @torch.no_grad()
    def after_step(self, carries: Sequence[Tensor], progress: float) -> None:
        self.recent.mul_(MEMORY).add_(collectives.sum_over_processes(torch.stack(list(carries)).sum(0)))

    def loss_ceiling(self) -> float | None:
        return -math.log(float(self.chance))

    def ailment(self, row: Mapping[str, float]) -> str:
        accuracy = row.get("pretext_accuracy_recent", row["pretext_accuracy"])
        step, chance = row["step"], row["chance"]
        if step >= AT_CHANCE_AFTER and accuracy < AT_CHANCE * chance:
            return (
                f"pretext accuracy {accuracy:.1%} is no better than chance ({chance:.1%}): nothing is being learnt. "
                f"Likely causes: the task is ill-posed on tissue ({self.question} cannot be seen); --lr too low or "
                "too high"
            )
        if step <= TOO_EASY_BEFORE and accuracy > TOO_EASY:
            return (
                f"pretext accuracy {accuracy:.1%} after {step:.0f} steps (chance {chance:.1%}): so easy that it is "
                f"likely a shortcut. Likely causes: {self.shortcuts}; look at `histossl views --recipe "
                f"{self.recipe.name}`, and cut anew with `--grid physical` where tiles were copied"
            )
        return ""

    def verdict(self) -> str:
        right, asked = self.recent.tolist()
        if not asked:
            return ""
        accuracy, chance = right / asked, float(self.chance)
        told = "no better than a guess" if accuracy < AT_CHANCE * chance else f"{accuracy / chance:.1f} times a guess"
        return (
            f"Pretext accuracy ({self.question}, over the last steps): {accuracy:.1%} against {chance:.1%} by chance, "
            f"{told}. A control: what it is worth the label-efficiency curve says, not this figure"
        )


# ---- patches


@dataclass(frozen=True)
class Layout:
    """Where 3 x 3 patches may lie on a view: corners `pitch_px` apart, each moved by 0..`reach_px` on either axis."""

    side_px: int
    patch_px: int
    pitch_px: int
    reach_px: int

    @property
    def gap_px(self) -> int:
        """The least that lies between two patches."""
        return self.pitch_px - self.patch_px - self.reach_px

    @property
    def span_px(self) -> int:
        return (GRID - 1) * self.pitch_px + self.patch_px + self.reach_px

    def corners(self, draws: Draws) -> Ints:
        """(B, N, 2): top and left of each patch. What the grid leaves free of the view moves it as a whole."""
        place = np.stack(np.divmod(np.arange(GRID**2), GRID), 1) * self.pitch_px
        origin = whole_numbers(draws, "patch grid", self.side_px - self.span_px + 1, 2)[:, None]
        moved = whole_numbers(draws, "patch", self.reach_px + 1, 2 * GRID**2).reshape(-1, GRID**2, 2)
        corners: Ints = origin + place + moved
        return corners


def whole_numbers(draws: Draws, purpose: str, limit: int, times: int) -> Ints:
    """(B, times) whole numbers in 0..limit-1."""
    return np.minimum(draws.uniform(purpose, 0, limit, times).astype(np.int64), limit - 1)


def cut(images: Tensor, corners: Ints, patch_px: int) -> Tensor:
    """(B, N, 3, P, P) of images (B, 3, H, W), at whole pixels: nothing is resampled."""
    line = torch.arange(patch_px, device=images.device)
    top_BN, left_BN = on(images.device, corners).unbind(2)
    rows = (top_BN[..., None] + line)[..., :, None]
    columns = (left_BN[..., None] + line)[..., None, :]
    tile = torch.arange(len(images), device=images.device)[:, None, None, None]
    return images.permute(0, 2, 3, 1)[tile, rows, columns].permute(0, 1, 4, 2, 3)


def standardised(patches: Tensor) -> Tensor:
    """Each patch with mean 0 in each channel and deviation 1 over all of it: (..., 3, P, P).

    Brightness, contrast and cast then tell no longer which patches are of one tile, or nearer to its edge. (Google's
    has one mean for all channels: a cast remains. A deviation for each would raise an empty channel's noise.)
    """
    centred = patches - patches.mean((-2, -1), keepdim=True)
    return centred / centred.square().mean((-3, -2, -1), keepdim=True).sqrt().clamp(min=0.02)


def only_one_channel(patches: Tensor, kept: Ints, chosen: NDArray[np.bool_]) -> Tensor:
    """The `chosen` patches (B, N) with channel `kept` (B, N) alone, the others 0: no chromatic aberration to see."""
    keep = (np.arange(3) == kept[..., None]) | ~chosen[..., None]
    return patches * on(patches.device, keep)[..., None, None]


def encoder_px(backbone: nn.Module, patch_px: int, view_px: int) -> int:
    """At which side patches of `patch_px` go through a backbone: their own, or the nearest a ViT's own patches divide.

    Where that is too small (ConvNeXt halves its image five times) they are enlarged to a multiple of 32. Refuses
    backbones that take neither.
    """
    step = masked_vit.patch_px(backbone)
    own_px = max(1, round(patch_px / step)) * step
    enlarged_px = math.ceil(own_px / HALVED_TO_ONE) * HALVED_TO_ONE
    if _refusal(backbone, own_px) == "":
        return own_px
    refusal = _refusal(backbone, enlarged_px)
    if refusal:
        raise UsageError(
            f"--view-px {view_px}: this backbone takes no patches of {own_px} or {enlarged_px} px ({refusal}); "
            "use a ResNet, a ConvNeXt or a ViT"
        )
    return enlarged_px


@torch.no_grad()
def _refusal(backbone: nn.Module, side_px: int) -> str:
    """Why a backbone does not take images of this side; '' if it does."""
    training = backbone.training
    try:
        backbone.eval()(torch.zeros(1, 3, side_px, side_px))
    except (AssertionError, RuntimeError, ValueError) as error:
        return str(error) or type(error).__name__
    finally:
        backbone.train(training)
    return ""


def encoded(backbone: nn.Module, patches: Tensor, side_px: int) -> Tensor:
    """Features (B, N, D) of patches (B, N, 3, P, P), each seen alone."""
    flat = patches.flatten(0, 1)
    if flat.shape[-1] != side_px:
        flat = F.interpolate(flat, (side_px, side_px), mode="bilinear", antialias=True, align_corners=False)
    features: Tensor = backbone(flat)
    return features.view(*patches.shape[:2], -1)
