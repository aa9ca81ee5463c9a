"""iBOT: DINO between crops, and masked patches told from what is around them (Zhou et al. 2021, arXiv 2111.07832). ViT.

Decided where paper and code differ (bytedance/ibot at da316d8): one head for crops and patches, as the paper and the
published runs; half of the global crops masked, at 10-50 % of their patches (the published runs' setting; the code's
default is 30 % of all); the patches' centre is the mean of all the teacher's patch tokens, not of the masked alone.
Prototypes are balanced by Sinkhorn, for the reason that dino.py gives; `--set assign=centre` is the paper's. The
shares are spread evenly over the batch (DINOv2's way), which has the distribution of iBOT's own draws.
"""

from __future__ import annotations

from dataclasses import dataclass

from histossl.core.config import knob
from histossl.methods.method import Rate, Training
from histossl.methods.self_distillation import ZHOU, MaskedConfig, SelfDistillation


@dataclass(frozen=True)
class IBOTConfig(MaskedConfig):
    prototypes: int = knob(8192, "of the head; the planner gives what fits the tile set", "8192", ZHOU)
    trainable_norm: bool = knob(False, "prototypes have a gain of their own", "true (code: false)", ZHOU)
    num_local: int = knob(8, "small crops", "10", ZHOU)
    patch_teacher_temperature: float = knob(0.07, "of the teacher at patches", "0.04 to 0.07", ZHOU)


class IBOT(SelfDistillation):
    trained_by = Training(
        optimizer="adamw",
        adamw=Rate(2.5e-4, 1e-4, 128, "sqrt", 0.04, "iBOT's 5e-4 at 256 tiles, 2.5e-4"),
        weight_decay_end=0.2,
        patch_embed_scale=0.2,
        clip_by="parameter",
        prototypes=(1, 8192),
    )
