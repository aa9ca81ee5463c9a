"""The seam: a self-supervised objective is one file with one class that fills this in.

`forward` has no side effects but BatchNorm's statistics, so computing a loss twice, accumulating gradients or
validating never alters the algorithm. Every change of state (momentum encoder, queue, centre) is in `after_step`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from histossl.views.recipe import ViewRecipe
from histossl.views.rng import Draws

OF_THE_METHOD = 1000  # the "view" whose random numbers are the method's own: masks, permutations, patches


@dataclass(frozen=True)
class Rate:
    """A learning rate as published for a batch, and what is done with it at another batch."""

    lr: float  # peak, from scratch
    continued: float  # peak, when the weights are pretrained
    batch: int  # at which both hold
    scaling: str  # linear, sqrt: how they follow the batch
    weight_decay: float
    source: str  # for the plan's reason


@dataclass(frozen=True)
class Training:
    """How a method is optimized unless the command line says otherwise; the planner prints what came of it."""

    optimizer: str = ""  # '': `for_batchnorm` for backbones that have it, else adamw
    for_batchnorm: str = "sgd"
    sgd: Rate = Rate(0.03, 0.01, 256, "linear", 1e-4, "MoCo's 0.03")
    adamw: Rate = Rate(5e-4, 3e-4, 128, "sqrt", 0.04, "5e-4")
    lars: Rate = Rate(1.2, 0.4, 256, "sqrt", 1e-4, "SimCLR's 0.075 x sqrt(batch)")
    weight_decay_end: float | None = None  # adamw: reached by a cosine at the last step; None: constant
    layer_decay: float = 0.75  # adamw, when continuing
    patch_embed_scale: float = 1.0  # on the patch embedding's rate, over the layer decay
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.05  # share of the steps
    final_lr: float = 0.01  # share of the peak at the end of the cosine
    clip_by: str = "all"  # all: one norm over everything; parameter: each by its own (DINO)
    decay_flat: bool = False  # weight decay on biases and norms too, under sgd (MoCo's official code)
    of_the_pass: str = ""  # terms over the tiles of one pass, which see less in micro-batches
    prototypes: tuple[int, int] = (1, 65536)  # times the table's number for so many tiles, and the most
    in_batch: bool = False  # negatives are the tiles of the same pass: micro-batches make them fewer


class Views(NamedTuple):
    """A batch as a method sees it: augmented views, and which tile and slide each row comes from."""

    images: list[Tensor]  # each (B, 3, h, w), normalised for the backbone
    tiles_B: Tensor  # int64 tile numbers of the index
    slides_B: Tensor  # int64 slide numbers of the index
    step: int  # of the optimizer
    part: int = 0  # micro-batch within the step
    progress: float = 0.0  # share of the run that is done, in [0, 1)
    positions_B: Tensor | None = None  # int64 places in the global stream, on the CPU
    seed: int = 0

    def draws(self) -> Draws:
        """Random numbers of the method's own, by tile: the same on any number of processes and after a resume."""
        assert self.positions_B is not None, "a method that draws at random needs the tiles' positions"
        return Draws(self.seed, self.positions_B.numpy(), OF_THE_METHOD)


class Outcome(NamedTuple):
    loss: Tensor  # (), mean over this process's tiles
    metrics: dict[str, Tensor]  # detached scalars
    carry: Any = None  # what after_step needs; MoCo: this batch's keys


class Method(nn.Module):
    backbone: nn.Module  # what `pretrain` exports (MoCo: the query encoder; DINO: the teacher)
    trained_by: ClassVar[Training] = Training()
    planned: ClassVar[tuple[str, ...]] = ()  # knobs that the planner fits to tiles, slides and steps
    caution: ClassVar[str] = ""  # what a person should know before a run is begun, in a line
    # What a loss at its ceiling, or above it, may come from besides the rate: told with the warning.
    stuck_by: ClassVar[tuple[str, ...]] = ("views that share nothing",)
    above_by: ClassVar[tuple[str, ...]] = ()
    judges_rank: ClassVar[bool] = True  # whether features of fewer directions are an ailment (to a classifier not)

    @classmethod
    def trained_with(cls, knobs: Any) -> Training:  # noqa: ARG003  for methods that need them
        """`trained_by`, and what of it depends on the knobs (their class is the method's own)."""
        return cls.trained_by

    def learner(self) -> nn.Module:
        """The backbone that the optimizer moves: the exported one, but for methods that export a teacher."""
        return self.backbone

    def projection(self) -> dict[str, Tensor] | None:
        """Weights of head layers that belong to the exported backbone (SimCLR v2), as `Projected` takes them."""
        return None

    def views(self, progress: float = 0.0) -> ViewRecipe:
        """What the tiles must become at this share of the run; 1 gives the largest views of all."""
        raise NotImplementedError

    def lr_factor(self, progress: float) -> float:
        """What the run's learning rate is multiplied by at this share of it (DINOv2: less in its last phase)."""
        return 1.0

    def forward(self, views: Views) -> Outcome:
        raise NotImplementedError

    def before_step(self, progress: float) -> None:
        """Called with the gradients of a whole step, before they are clipped (DINO: the last layer's are dropped)."""

    def after_step(self, carries: Sequence[Any], progress: float) -> None:
        """Called once after each optimizer step. `carries`: one a micro-batch, in order; `progress` in [0, 1]."""

    def num_prefill_tiles(self) -> int:
        """How many tiles `prefill` wants to see before step 0."""
        return 0

    @torch.no_grad()
    def prefill(self, views: Views) -> None:
        """Called before step 0 with batches of views until `num_prefill_tiles` are through."""

    def diagnostics(self) -> dict[str, float]:
        """Figures too costly for every step; asked for when a step is logged."""
        return {}

    def keys_of(self, images: Tensor) -> Tensor | None:
        """(B, D) unit-length keys of views as they are now, of a method that keeps keys over steps; None otherwise.

        Asked for now and then, to see how far the key of one and the same tile moves while it is kept.
        """
        return None

    def kept(self) -> dict[str, Tensor]:
        """What of the heads is of use after the run: it is left beside the backbone, in head.safetensors."""
        return {}

    def provenance(self) -> dict[str, Any]:
        """What backbone.json must say besides: whom it was taught by, say."""
        return {}

    def loss_ceiling(self) -> float | None:
        """The loss of features that tell nothing, where a closed form exists (InfoNCE: ln(K+1))."""
        return None

    def ailment(self, row: Mapping[str, float]) -> str:
        """What is wrong by the figures of a logged step, with its likely cause; '' while all is well."""
        return ""

    def verdict(self) -> str:
        """What came of the task itself, told when the run ends; '' where the loss says all there is."""
        return ""
