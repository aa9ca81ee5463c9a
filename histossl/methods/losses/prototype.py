"""What a teacher says of a token: its distribution over prototypes; and how far the student is from it.

Used by DINO, iBOT and DINOv2 (Caron et al. 2021, arXiv 2104.14294; Zhou et al. 2021, 2111.07832; Oquab et al. 2023,
2304.07193). All in fp32 whatever the autocast. Shapes: R tokens of this process, K prototypes, V views, B tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from histossl.runtime import collectives

SINKHORN_ITERATIONS = 3
CHUNK = 2**26  # values of logits at a time: 256 MB in fp32
PATIENCE = 200  # steps for which an ailment must last
SETTLED = 100  # steps; before, fresh heads have learnt little


@torch.no_grad()
def centred(logits_RK: Tensor, centre_K: Tensor, temperature: float) -> Tensor:
    """softmax((logits - centre) / temperature): the centre keeps any prototype from taking all (Caron et al. eq. 4)."""
    return torch.softmax((logits_RK.float() - centre_K).div_(temperature), dim=-1)


@torch.no_grad()
def sinkhorn(logits_RK: Tensor, temperature: float, iterations: int = SINKHORN_ITERATIONS) -> Tensor:
    """Each token one unit of mass, all prototypes as much: SwAV's Sinkhorn-Knopp over the tokens of all processes.

    Prototypes are normalised before tokens in each iteration, so rows sum to 1 exactly and columns nearly; a shift of a
    whole prototype changes nothing, one of a whole token does until convergence. The global maximum is taken off
    first, which changes nothing either and keeps exp() finite for any temperature. A process may hold no token.
    """
    mass_RK = logits_RK.to(torch.float32, copy=True).div_(temperature)  # in place: it may be gigabytes
    highest = mass_RK.amax() if len(mass_RK) else mass_RK.new_tensor(-torch.inf)
    # A token far below the highest (trained gains may put it there) keeps some mass, instead of being left out.
    mass_RK.sub_(collectives.max_over_processes(highest)).clamp_(min=-80.0).exp_()
    for _ in range(iterations):
        mass_RK.div_(collectives.sum_over_processes(mass_RK.sum(0)).clamp(min=1e-30))  # each prototype as much
        mass_RK.div_(mass_RK.sum(1, keepdim=True).clamp(min=1e-30))  # each token one
    return mass_RK


class _PrototypeCrossEntropy(torch.autograd.Function):
    """Cross-entropy over prototypes whose (R, K) logits are never held: some rows at a time, each with its gradient.

    The rows' weights are known beforehand, so the gradient can be taken in the forward pass: nothing is computed twice.
    With R = 9,000 masked patches and K = 131,072 the logits of a pass would take 4.7 GB, several times over.
    """

    @staticmethod
    def forward(
        ctx: Any,
        towards_RD: Tensor,
        prototypes_KD: Tensor,
        weight_R: Tensor,
        target_of: Callable[[int, int], Tensor],
        temperature: float,
    ) -> Tensor:
        device = towards_RD.device.type
        # As the autocast has it, except that gradients this small would vanish in fp16.
        low = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        dtype = torch.bfloat16 if low else torch.float32
        grad_RD = torch.empty_like(towards_RD)
        grad_KD = torch.zeros_like(prototypes_KD)
        total = torch.zeros((), device=towards_RD.device)
        with torch.autocast(device, enabled=False):
            prototypes_KD = prototypes_KD.to(dtype)
            for rows in _row_chunks(len(towards_RD), len(prototypes_KD)):
                part_rD, target_rK = towards_RD[rows].to(dtype), target_of(rows.start, rows.stop)
                scaled_rK = (part_rD @ prototypes_KD.T).float().div_(temperature)
                log_r1, mass_r1 = scaled_rK.logsumexp(1, keepdim=True), target_rK.sum(1, keepdim=True)
                weight_r1 = weight_R[rows, None].float()
                agreed_r1 = torch.linalg.vecdot(target_rK, scaled_rK)[:, None]
                total += (weight_r1 * (log_r1 * mass_r1 - agreed_r1)).sum()
                grad_rK = scaled_rK.sub_(log_r1).exp_().mul_(mass_r1).sub_(target_rK).mul_(weight_r1 / temperature)
                grad_rK = grad_rK.to(dtype)
                grad_RD[rows] = (grad_rK @ prototypes_KD).to(grad_RD.dtype)
                grad_KD += grad_rK.T @ part_rD
        ctx.save_for_backward(grad_RD, grad_KD)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_RD, grad_KD = ctx.saved_tensors
        return grad_RD * grad.to(grad_RD.dtype), grad_KD * grad.to(grad_KD.dtype), None, None, None


def _row_chunks(num_rows: int, width: int) -> list[slice]:
    size = max(1, CHUNK // width)
    return [slice(first, min(first + size, num_rows)) for first in range(0, num_rows, size)]


def view_loss(towards_QBD: Tensor, prototypes_KD: Tensor, teacher_VBK: Tensor, temperature: float) -> Tensor:
    """Mean over all pairs (teacher view v, student view q), q != v, and over tiles (Caron et al. eq. 3).

    `towards_QBD`: what the student's views have a cosine to the prototypes of, the teacher's views first among them;
    `teacher_VBK`: its distributions. With two teacher views and L small crops these are 2 (2 + L) - 2 pairs, each
    weighing the same, which is also DINOv2's weighting for L > 0 (its code divides by 3 instead of 2 for L = 0: not
    copied).
    """
    num_teacher, num_tiles, _ = teacher_VBK.shape
    num_views = len(towards_QBD)
    all_BK, own_XK = teacher_VBK.sum(0), teacher_VBK.flatten(0, 1)

    def target_of(first: int, last: int) -> Tensor:
        target_rK = all_BK[torch.arange(first, last, device=all_BK.device) % num_tiles]
        own_rK = own_XK[first:last]
        target_rK[: len(own_rK)] -= own_rK
        return target_rK

    weight = 1.0 / (num_tiles * (num_teacher * num_views - num_teacher))
    weight_R = torch.full((num_views * num_tiles,), weight, device=all_BK.device)
    loss: Tensor = _PrototypeCrossEntropy.apply(
        towards_QBD.flatten(0, 1), prototypes_KD, weight_R, target_of, temperature
    )
    return loss


def patch_loss(
    towards_RD: Tensor,
    prototypes_KD: Tensor,
    teacher_RK: Tensor,
    weight_R: Tensor,
    num_crops: int,
    temperature: float,
) -> Tensor:
    """Masked image modelling (Zhou et al. eq. 2): cross-entropy at masked patches, each crop's mean, over all.

    `weight_R`: one over the number of masked patches of the token's crop. A crop with no mask counts as 0.
    """
    loss: Tensor = _PrototypeCrossEntropy.apply(
        towards_RD, prototypes_KD, weight_R / num_crops, lambda first, last: teacher_RK[first:last], temperature
    )
    return loss


@torch.no_grad()
def assignment_metrics(
    target_RK: Tensor, prefix: str = "", loss: Tensor | None = None, weight_R: Tensor | None = None
) -> dict[str, Tensor]:
    """Entropy of the teacher (as a share of ln K), how the tokens share the prototypes, and what the student learnt.

    The same figures also where a process has no token: figures are averaged over processes by name.
    `loss`: of the student, the sum of weight_R (the mean without) times each token's cross-entropy.
    """
    num_tokens, num_prototypes = target_RK.shape
    own = {} if loss is None else {f"{prefix}learnt": target_RK.new_ones(())}
    if not num_tokens:
        zero, one = target_RK.new_zeros(()), target_RK.new_ones(())
        names = ("teacher_entropy", "prototypes_used", "largest_prototype")
        return {prefix + name: value for name, value in zip(names, (zero, one, zero), strict=True)} | own
    rows = _row_chunks(num_tokens, num_prototypes)
    entropy_R = torch.cat([torch.special.entr(target_RK[each]).sum(1) for each in rows])
    used = torch.zeros(num_prototypes, device=target_RK.device).index_fill_(0, target_RK.argmax(1), 1.0).sum()
    if loss is not None:
        weight_R = torch.full_like(entropy_R, 1 / num_tokens) if weight_R is None else weight_R
        own = {f"{prefix}learnt": learnt(loss, entropy_R, weight_R, math.log(num_prototypes))}
    return {
        f"{prefix}teacher_entropy": entropy_R.mean() / math.log(num_prototypes),
        f"{prefix}prototypes_used": used / min(num_tokens, num_prototypes),
        f"{prefix}largest_prototype": target_RK.mean(0).amax(),
    } | own


def learnt(loss: Tensor, entropy_R: Tensor, weight_R: Tensor, uniform: float) -> Tensor:
    """What the student tells of what the teacher tells: 1 is all, 0 as much as one that says the same of all tokens.

    Balanced targets are uniform in the mean, so such a student has a loss of `uniform`, ln K, at least; and none has
    less than the teacher's entropy. The loss itself shows little: of tissue a teacher's entropy is 0.95 ln K, and a
    student that learns well stays at 0.99 for a hundred steps.
    """
    ceiling = weight_R.sum() * uniform
    return (ceiling - loss) / (ceiling - (weight_R * entropy_R).sum()).clamp(min=1e-6)


class Ailments:
    """How a self-distilled teacher dies, and its student; none of it shows in the loss (algorithms.md section 6).

    A teacher that finds all alike, or a student that has learnt nothing, must last to be told: 200 steps, or a tenth of
    a short run. The student is not judged in the run's first fifth, nor its first 100 steps.
    """

    def __init__(self, assign: str) -> None:
        self.assign = assign
        self.since: dict[str, float] = {}  # what lasts -> the logged step at which it was first so

    def of(self, row: Mapping[str, float], progress: float) -> str:
        for prefix, where in (("", "tiles"), ("patch_", "patches")):
            alike = row.get(f"{prefix}teacher_entropy", 0.0) > 0.99
            if self._lasts(f"{prefix}uniform", alike, row, progress):
                return f"uniform collapse: the teacher finds all prototypes alike for all {where}. " + self._causes(
                    "--set teacher_temperature too high (0.07 at most)",
                    "more prototypes than the tiles can fill",
                    centred=(
                        "centring of features much alike to begin with (--set assign=sinkhorn)",
                        "centre_momentum too high",
                    ),
                )
            if row.get(f"{prefix}largest_prototype", 0.0) > 0.5 or row.get(f"{prefix}prototypes_used", 1.0) < 0.05:
                return (
                    f"one-hot collapse: the teacher gives nearly all {where} the same few prototypes. "
                    + self._causes(
                        "--set teacher_temperature too low",
                        centred=("centring off (centre_momentum 1) or too slow",),
                    )
                )
            dumb = progress >= 0.2 and row.get("step", 0.0) >= SETTLED and row.get(f"{prefix}learnt", 1.0) <= 0
            if self._lasts(f"{prefix}learnt", dumb, row, progress):
                return (
                    f"collapse of the student: of what the teacher says of {where} it tells no more than if it said "
                    "the same of all. " + self._causes("--lr too low", "views that share nothing")
                )
        return ""

    def _lasts(self, what: str, holds: bool, row: Mapping[str, float], progress: float) -> bool:
        if not holds:
            self.since.pop(what, None)
            return False
        step = row.get("step", 0.0)
        return step - self.since.setdefault(what, step) >= min(PATIENCE, 0.1 * step / max(progress, 1e-9))

    def _causes(self, *causes: str, centred: tuple[str, ...] = ()) -> str:
        everywhere = ("--lr too high", "--set momentum too low, or 1")
        own = centred if self.assign == "centre" else ()
        return f"Likely causes: {', '.join((*own, *everywhere, *causes))}"
