"""What a teacher says of a token: its distribution over prototypes; and how far the student is from it.

Used by DINO, iBOT and DINOv2 (Caron et al. 2021, arXiv 2104.14294; Zhou et al. 2021, 2111.07832; Oquab et al. 2023,
2304.07193). All in fp32 whatever the autocast. Shapes: R tokens of this process, K prototypes, V views, B tiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from histossl.methods import gather

SINKHORN_ITERATIONS = 3


@torch.no_grad()
def centred(logits_RK: Tensor, centre_K: Tensor, temperature: float) -> Tensor:
    """softmax((logits - centre) / temperature): the centre keeps any prototype from taking all (Caron et al. eq. 4)."""
    return torch.softmax((logits_RK.float() - centre_K) / temperature, dim=-1)


@torch.no_grad()
def sinkhorn(logits_RK: Tensor, temperature: float, iterations: int = SINKHORN_ITERATIONS) -> Tensor:
    """Each token one unit of mass, all prototypes as much: SwAV's Sinkhorn-Knopp over the tokens of all processes.

    Prototypes are normalised before tokens in each iteration, so rows sum to 1 exactly and columns nearly; a shift of a
    whole prototype changes nothing, one of a whole token does until convergence. The global maximum is taken off
    first, which changes nothing either and keeps exp() finite for any temperature. A process may hold no token.
    """
    scaled_RK = logits_RK.float() / temperature
    highest = scaled_RK.amax() if len(scaled_RK) else scaled_RK.new_tensor(-torch.inf)
    # A token far below the highest (trained gains may put it there) keeps some mass, instead of being left out.
    mass_RK = torch.exp((scaled_RK - gather.max_over_processes(highest)).clamp(min=-80.0))
    for _ in range(iterations):
        mass_RK = mass_RK / gather.sum_over_processes(mass_RK.sum(0)).clamp(min=1e-30)  # each prototype as much
        mass_RK = mass_RK / mass_RK.sum(1, keepdim=True).clamp(min=1e-30)  # each token one
    return mass_RK


def cross_entropy_R(logits_RK: Tensor, target_RK: Tensor, temperature: float) -> Tensor:
    """(R,) cross-entropy of softmax(logits / temperature) against `target_RK`, whose rows may sum to any mass."""
    with torch.autocast(logits_RK.device.type, enabled=False):
        scaled_RK = logits_RK.float() / temperature
        return torch.logsumexp(scaled_RK, -1) * target_RK.sum(-1) - (target_RK * scaled_RK).sum(-1)


def view_loss(student: Sequence[Tensor], teacher_VBK: Tensor, temperature: float) -> Tensor:
    """Mean over all pairs (teacher view v, student view q), q != v, and over tiles (Caron et al. eq. 3).

    `student`: logits by crop size, each (views, B, K), the teacher's views first among them; `teacher_VBK`: its
    distributions. With two teacher views and L small crops these are 2 (2 + L) - 2 pairs, each weighing the same, which
    is also DINOv2's weighting for L > 0 (its code divides by 3 instead of 2 for L = 0: not copied).
    """
    num_teacher = len(teacher_VBK)
    total, number, all_B = teacher_VBK.new_zeros(()), 0, teacher_VBK.sum(0)
    for logits_VBK in student:
        for view_BK in logits_VBK:
            target_BK = all_B - teacher_VBK[number] if number < num_teacher else all_B
            total = total + cross_entropy_R(view_BK, target_BK, temperature).mean()
            number += 1
    return total / (num_teacher * number - num_teacher)


def patch_loss(student_RK: Tensor, teacher_RK: Tensor, weight_R: Tensor, num_crops: int, temperature: float) -> Tensor:
    """Masked image modelling (Zhou et al. eq. 2): cross-entropy at masked patches, each crop's mean, over all.

    `weight_R`: one over the number of masked patches of the token's crop. A crop with no mask counts as 0.
    """
    return (cross_entropy_R(student_RK, teacher_RK, temperature) * weight_R).sum() / num_crops


@torch.no_grad()
def assignment_metrics(target_RK: Tensor, prefix: str = "") -> dict[str, Tensor]:
    """Entropy of the teacher (as a share of ln K), and how the tokens share the prototypes.

    The same figures also where a process has no token: figures are averaged over processes by name.
    """
    num_tokens, num_prototypes = target_RK.shape
    if not num_tokens:
        zero, one = target_RK.new_zeros(()), target_RK.new_ones(())
        names = ("teacher_entropy", "prototypes_used", "largest_prototype")
        return {prefix + name: value for name, value in zip(names, (zero, one, zero), strict=True)}
    entropy = torch.special.entr(target_RK).sum(1).mean()
    used = torch.zeros(num_prototypes, device=target_RK.device).index_fill_(0, target_RK.argmax(1), 1.0).sum()
    return {
        f"{prefix}teacher_entropy": entropy / math.log(num_prototypes),
        f"{prefix}prototypes_used": used / min(num_tokens, num_prototypes),
        f"{prefix}largest_prototype": target_RK.mean(0).amax(),
    }


def assignment_ailment(row: Mapping[str, float]) -> str:
    """The two ways in which a self-distilled teacher dies; neither shows in the loss (algorithms.md section 6)."""
    for prefix, where in (("", "tiles"), ("patch_", "patches")):
        if row.get(f"{prefix}teacher_entropy", 0.0) > 0.99:
            return (
                f"uniform collapse: the teacher finds all prototypes alike for all {where}. Likely causes: "
                "centring of features that are much alike to begin with (--set assign=sinkhorn), teacher_temperature "
                "too high (0.07 at most), centre_momentum too high, more prototypes than the tiles can fill"
            )
        if row.get(f"{prefix}largest_prototype", 0.0) > 0.5 or row.get(f"{prefix}prototypes_used", 1.0) < 0.05:
            return (
                f"one-hot collapse: the teacher gives nearly all {where} the same few prototypes. Likely causes: "
                "--set teacher_temperature too low, centring off (centre_momentum 1) or too slow, --lr too high"
            )
    return ""
