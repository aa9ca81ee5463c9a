"""Distillation: a student learns what a labelled-slide model says of every tile (SimCLR v2's third act).

    loss = -T^2  sum over classes of  P_teacher(class | tile; T)  log P_student(class | tile; T)

Chen et al. 2020, arXiv 2006.10029, section 2, eq. 2: the teacher is fixed, no label is used, and the tiles are all
there are. The student is of the same architecture (self-distillation) or of another, smaller or larger.
Decided where paper and official colab (google-research/simclr, distillation_self_training) leave a choice:
teacher and student see the *same* view, cropped and mirrored, its colours as they are (colab: one image for both;
paper: random crop and flip only), so a soft label is of what the student sees and not of what was cropped away;
the factor T^2 is the colab's (eq. 2 has none): gradients keep their size whatever the temperature;
hard labels (the teacher's first choice) have no temperature, and one given with them is refused;
BatchNorm has one statistic over all processes, as on the paper's TPUs; the classifier starts at zero.
Left out: eq. 3's weighted sum with true labels. It needs labels of tiles. Ours are mostly of slides, and a carcinoma's
slide holds tiles of stroma; in the paper (table 2) the sum is worth less than a point.

Shapes: B tiles of this process, C classes that the teacher knows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from histossl.core.config import knob, require
from histossl.core.errors import UsageError
from histossl.core.options import nearest
from histossl.methods.losses.contrastive import distillation
from histossl.methods.method import Method, Outcome, Rate, Training, Views
from histossl.methods.modules.batchnorm import average_batchnorm_buffers, globalise_batchnorms
from histossl.runtime import collectives
from histossl.views.recipe import ViewRecipe

CHEN = "Chen et al. 2020, arXiv 2006.10029"
TARGETS = ("soft", "hard")
ALL_ONE = 0.98  # mean probability of one class, above which nothing else is said
REMEMBERED = 0.9  # of the teacher's mean answer, from step to step

Statistics = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class DistillationConfig:
    temperature: float = knob(
        1.0, "of both softmaxes: above 1 softens the labels of a teacher that is too sure", "1", CHEN
    )
    targets: str = knob("soft", "soft: the teacher's class probabilities; hard: its first choice", "soft", CHEN)

    def __post_init__(self) -> None:
        require(0 < self.temperature < math.inf, "temperature", self.temperature, "above 0")
        wanted = f"one of {', '.join(TARGETS)}{nearest(self.targets, TARGETS)}"
        require(self.targets in TARGETS, "targets", self.targets, wanted)
        if self.targets == "hard" and self.temperature != 1:
            raise UsageError(
                f"--temperature {self.temperature:g}: hard labels have no temperature; leave it out, or use soft ones"
            )


class Teacher(nn.Module):
    """A frozen backbone with a head over its classes: views as the student gets them -> logits (B, C)."""

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        classes: Sequence[str],
        input_px: int,
        own: Statistics,
        shown: Statistics,
        facts: Mapping[str, Any],
    ) -> None:
        """`own`: mean and std that it was trained with; `shown`: those by which its views are normalised."""
        super().__init__()
        self.backbone, self.head = backbone, head
        self.classes, self.input_px, self.facts = tuple(classes), input_px, dict(facts)
        (own_mean, own_std), (mean, std) = (
            [torch.tensor(each)[:, None, None] for each in pair] for pair in (own, shown)
        )
        self.register_buffer("scale", std / own_std, persistent=False)
        self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] != self.input_px:
            size = (self.input_px, self.input_px)
            images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        features_BD = self.backbone(torch.addcmul(self.shift, images, self.scale))
        with torch.autocast(images.device.type, enabled=False):
            logits_BC: Tensor = self.head(features_BD.float())
        return logits_BC


class Distillation(Method):
    # The rates of the tool's other AdamW runs; the paper's LARS (for batches of 4,096) is there by --optimizer lars.
    trained_by = Training(optimizer="adamw", adamw=Rate(5e-4, 3e-4, 128, "sqrt", 0.05, "5e-4"))
    judges_rank: ClassVar[bool] = False  # to tell C classes apart, C - 1 directions are enough

    def __init__(
        self, backbone: nn.Module, feature_dim: int, recipe: ViewRecipe, config: DistillationConfig, teacher: Teacher
    ) -> None:
        super().__init__()
        if len(recipe.views) != 1:
            raise UsageError(
                f"--recipe {recipe.name}: makes {len(recipe.views)} views, and distillation takes 1 "
                "(distillation, distillation-histology)"
            )
        self.config, self.recipe = config, recipe
        self.backbone = backbone
        globalise_batchnorms(backbone)
        self.classifier = nn.Linear(feature_dim, len(teacher.classes))
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        # In a list it is no part of the method: no checkpoint holds it, no optimizer and no other process hears of it.
        self.taught_by = [teacher.eval().requires_grad_(False)]
        self.register_buffer("answer_C", torch.zeros(len(teacher.classes)))
        self.answer_C: Tensor

    @property
    def teacher(self) -> Teacher:
        return self.taught_by[0]

    def _apply(self, fn: Any, recurse: bool = True) -> Distillation:
        """To another device or memory format, with the teacher."""
        self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def views(self, progress: float = 0.0) -> ViewRecipe:
        return self.recipe

    def forward(self, views: Views) -> Outcome:
        image = views.images[0]
        teacher_BC = self.teacher(image)
        student_BC = self.classifier(self.backbone(image)).float()
        if self.config.targets == "hard":
            choice_B = teacher_BC.argmax(1)
            target_BC = F.one_hot(choice_B, teacher_BC.shape[1]).float()
            loss = F.cross_entropy(student_BC, choice_B)
        else:
            target_BC = (teacher_BC / self.config.temperature).softmax(1)
            loss = distillation(student_BC, teacher_BC, self.config.temperature)
        return Outcome(loss, self._metrics(student_BC.detach(), teacher_BC, target_BC), target_BC.mean(0))

    def _metrics(self, student_BC: Tensor, teacher_BC: Tensor, target_BC: Tensor) -> dict[str, Tensor]:
        shares_BC = student_BC.softmax(1)
        told = zip(self.teacher.classes, target_BC.mean(0), shares_BC.mean(0), strict=True)
        return {
            "agreement": (student_BC.argmax(1) == teacher_BC.argmax(1)).float().mean(),
            "target_entropy": entropy(target_BC).mean(),
            "student_entropy": entropy((student_BC / self.config.temperature).softmax(1)).mean(),
            **{
                f"{whose}_share/{name}": share
                for name, target, student in told
                for whose, share in (("target", target), ("student", student))
            },
        }

    @torch.no_grad()
    def after_step(self, carries: Sequence[Tensor], progress: float) -> None:
        average_batchnorm_buffers(self)
        now_C = collectives.mean_over_processes(torch.stack(list(carries)).mean(0))
        # Of a first answer all; asked on the device, so that it is not waited for.
        self.answer_C.copy_(torch.where(self.answer_C.any(), self.answer_C.lerp(now_C, 1 - REMEMBERED), now_C))

    stuck_by = ("a teacher that says nearly the same of all tiles (--temperature too high)", "views that hide tissue")

    def loss_ceiling(self) -> float | None:
        """Of a student that answers every tile alike: at best T^2 times the entropy of the teacher's mean answer."""
        if not bool(self.answer_C.any()):
            return None
        return self.config.temperature**2 * float(entropy(self.answer_C[None])[0])

    def ailment(self, row: Mapping[str, float]) -> str:
        target, student = (self._largest(row, whose) for whose in ("target", "student"))
        if target is not None and target[1] > ALL_ONE:
            return (
                f"the teacher calls {target[1]:.0%} of the tiles {target[0]!r}: there is little else to learn from it. "
                "Likely causes: slides unlike those it was trained on, a class missing among its labels"
            )
        if student is not None and student[1] > ALL_ONE:
            return (
                f"collapse to one class: the student calls {student[1]:.0%} of the tiles {student[0]!r}, the teacher "
                f"{row.get(f'target_share/{student[0]}', math.nan):.0%}. Likely cause: --lr too high"
            )
        return ""

    def _largest(self, row: Mapping[str, float], whose: str) -> tuple[str, float] | None:
        shares = {name: row.get(f"{whose}_share/{name}") for name in self.teacher.classes}
        known = {name: share for name, share in shares.items() if share is not None}
        return max(known.items(), key=lambda each: each[1]) if known else None

    def kept(self) -> dict[str, Tensor]:
        return {"weight": self.classifier.weight, "bias": self.classifier.bias}

    def provenance(self) -> dict[str, Any]:
        return {"teacher": self.teacher.facts}


def entropy(share_BC: Tensor) -> Tensor:
    """Of each row, in nats; a class without probability adds nothing."""
    found: Tensor = -torch.special.xlogy(share_BC, share_BC).sum(1)
    return found
