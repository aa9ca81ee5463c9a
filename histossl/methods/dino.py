"""DINO: self-distillation with no labels (Caron et al. 2021, arXiv 2104.14294). CNN or ViT.

The teacher says of each of two global crops which prototypes it sees; the student must say the same of every other crop
of the tile, small ones included. selfdistillation.py has the step; here is what makes it DINO.
Decided where paper and code differ (facebookresearch/dino at 7c446df): gradients are clipped parameter by parameter,
as in the code; crops of the published long runs (0.25..1), which are views/recipe.py's; teacher temperature 0.04
throughout, the code's default (the long runs rise to 0.07: --set teacher_temperature=0.07). A CNN's BatchNorm
statistics are over all processes, and its rates SGD's; it gets the ViT's crops, where the published ResNet-50 had
0.14..1 and 0.05..0.14. The teacher's temperature is 0.04 for any number of tiles, though for some 20,000, with few
prototypes, 0.02 to 0.03 may do better (untried here).
Not the paper's: prototypes are balanced by Sinkhorn, as DINOv2's; the centre is `--set assign=centre`. Of features that
are much alike to begin with it made nothing in short runs, where Sinkhorn learnt (examples/LOG.md, 2026-11-25). Under
layer decay the patch embedding has a fifth of its rate (DINOv2's and nanopath's, in iBOT here too).
"""

from __future__ import annotations

from dataclasses import dataclass

from histossl.methods.method import Rate, Training
from histossl.methods.self_distillation import SelfDistillation, SelfDistillationConfig


@dataclass(frozen=True)
class DINOConfig(SelfDistillationConfig):
    pass


class DINO(SelfDistillation):
    trained_by = Training(
        sgd=Rate(0.03, 0.01, 256, "linear", 1e-4, "DINO's 0.03 for ResNet-50"),
        adamw=Rate(2.5e-4, 1e-4, 128, "sqrt", 0.04, "DINO's 5e-4 at 256 tiles, 2.5e-4"),
        weight_decay_end=0.2,  # from scratch 0.4; 0.1 and 0.2 did the same when continuing (nanopath)
        patch_embed_scale=0.2,
        clip_by="parameter",
    )
