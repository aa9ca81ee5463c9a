"""DINOv2: DINO and iBOT, balanced prototypes, two heads, features spread apart (Oquab et al. 2023, 2304.07193). ViT.

Defaults are those for continuing on tissue (algorithms.md 2.1, 2.7), since the published ones destroy pretrained
weights (dinov2#204: nearest neighbours 80 % to 10 %): rate 1e-4 falling by 0.7 from block to block and by 0.2 once
more at the patch embedding; random masks of 10-45 %; KDE instead of KoLeo; prototypes of unit length; a rate that
falls by half only, a momentum that stays, weight decay to 0.1 (annealing inside a short run cost 1.4 points there;
temperature and KDE do reach their ends, at 30 and 50 % of the run). Sinkhorn also for small
batches, where a centre is usually preferred: centred, short runs of 64 tiles ended uniform here.

The high-resolution phase is the end of the one run, at half the rate that the run would have there
(`high_resolution_lr`). The paper (appendix B.2) appends 10,000 steps with all schedules begun anew, compressed into
them, at a base rate that is "reduced", by how much it does not say. Begun anew, the rate would have to rise once more
on weights that have just been trained.

Decided where paper and code differ (facebookresearch/dinov2 at b8931f7): every pair of crops weighs the same also
without small crops (the code divides by 3); KoLeo over both global crops, as the code, and over all processes, unlike
it; crops are blurred as the paper says (recipe dinov2; dinov2-released does as the released code); the NaN check comes
before the step; no process group is needed for Sinkhorn; one norm clips all gradients (nanopath), not one a module.

Further differences, of timm's making: the layer decay leaves the last block its whole rate, which by DINOv2's rule has
0.7 of it; stochastic depth rises from 0 in the first block to `drop_path` in the last, where DINOv2's is alike in all.
Of nanopath not taken: its crops (0.2..1 and 0.03..0.25; here the paper's 0.32..1 and 0.05..0.32).
"""

from __future__ import annotations

from dataclasses import dataclass

from histossl.core.config import knob
from histossl.methods.method import Rate, Training
from histossl.methods.self_distillation import NANOPATH, OQUAB, ZHOU, MaskedConfig, SelfDistillation


@dataclass(frozen=True)
class DINOv2Config(MaskedConfig):
    prototypes: int = knob(131072, "of each head; the planner gives what fits the tile set", "131072; 65536", OQUAB)
    bottleneck_dim: int = knob(384, "width before the prototypes", "384, patches 256 (code: 256)", OQUAB)
    trainable_norm: bool = knob(False, "prototypes have a gain of their own", "true; false when continuing", OQUAB)
    teacher_temperature: float = knob(0.07, "of the teacher's softmax; 0.1 costs half a point", "0.07", OQUAB)
    teacher_temperature_warmup: float = knob(0.3, "share in which it rises", "30 of 100-500 epochs", OQUAB)
    momentum: float = knob(0.994, "of the teacher; less in a short run ends uniform", "0.992-0.994", OQUAB)
    momentum_end: float = knob(0.0, "to which it rises by a cosine; 0: it stays", "1; stays in short runs", NANOPATH)
    assign: str = knob("sinkhorn", "sinkhorn or centre", "sinkhorn", OQUAB)
    num_local: int = knob(8, "small crops", "8", OQUAB)
    local_px: int = knob(0, "side of the small crops; 0: 98 at 224 with patches of 14", "98 (patches of 14)", OQUAB)
    drop_path: float = knob(0.1, "stochastic depth, of the student alone", "0.3-0.4; 0.1 when continuing", OQUAB)
    share_head: bool = knob(False, "one head for crops and patches", "false (code: true)", OQUAB)
    mask_high: float = knob(0.45, "most share of patches masked in one crop", "0.5; 0.45", NANOPATH)
    mask_kind: str = knob("random", "block or random", "block; random when continuing", NANOPATH)
    least_block: int = knob(4, "least patches of a block", "4", OQUAB)
    patch_teacher_temperature: float = knob(0.0, "of the teacher at patches; 0: as of crops", "as of crops", OQUAB)
    patch_centre: str = knob("masked", "patches whose mean is the patches' centre: all or masked", "masked", OQUAB)
    koleo_weight: float = knob(0.0, "of KoLeo on the global crops' features", "0.1", OQUAB)
    kde_weight: float = knob(0.005, "of the kernel density of the crops' features", "0.05 (Virchow2), 0.005", NANOPATH)
    high_resolution_px: int = knob(0, "side of the global crops in the last phase; 0: none", "518", OQUAB)
    high_resolution_share: float = knob(0.1, "share of that phase", "10k steps after 625k", OQUAB)
    high_resolution_lr: float = knob(0.5, "factor on the learning rate in that phase", "below 1, not told", OQUAB)
    patch_weight: float = knob(1.0, "of the loss at masked patches", "1", ZHOU)


class DINOv2(SelfDistillation):
    trained_by = Training(
        optimizer="adamw",
        adamw=Rate(1.4e-3, 1e-4, 128, "sqrt", 0.04, "DINOv2's 0.004 at 1,024 tiles, 0.0014"),
        weight_decay_end=0.1,
        layer_decay=0.7,
        patch_embed_scale=0.2,
        betas=(0.9, 0.99),
        final_lr=0.5,
        prototypes=(4, 131072),
    )
