"""Losses as functions of their arguments, in fp32 whatever the autocast.

Shapes: B tiles of this process, K keys in the queue, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

NEVER = -1e4  # as a logit: weight 0 in fp32, and a finite gradient also where nothing is left


class InfoNCE:
    """What InfoNCE gives: the loss, and the logits for whoever wants to look at them."""

    def __init__(self, loss: Tensor, positive_B: Tensor, negatives_BK: Tensor, allowed_BK: Tensor | None) -> None:
        self.loss, self.positive_B, self.negatives_BK, self.allowed_BK = loss, positive_B, negatives_BK, allowed_BK

    @torch.no_grad()
    def figures(self) -> dict[str, Tensor]:
        """What to log, for methods whose negatives are the batch. `loss_ceiling`: the loss that telling nothing has."""
        assert self.allowed_BK is not None
        count_B = self.allowed_BK.sum(1)
        return {
            "instance_accuracy": (self.positive_B > self.negatives_BK.masked_fill(~self.allowed_BK, -1.0).amax(1))
            .float()
            .mean(),
            "positive_cosine": self.positive_B.mean(),
            "negative_cosine": self.negatives_BK.masked_fill(~self.allowed_BK, 0.0).sum() / count_B.sum(),
            "negatives": count_B.float().mean(),
            "loss_ceiling": (count_B + 1).float().log().mean(),
        }


def info_nce(
    query_BD: Tensor,
    key_BD: Tensor,
    queue_KD: Tensor,
    temperature: float,
    allowed_BK: Tensor | None = None,
    log_weight_BK: Tensor | None = None,
) -> InfoNCE:
    """Cross-entropy of finding the own key among a queue of others (van den Oord et al. 2018; He et al. 2020, eq. 1).

    All vectors unit length. Gradient flows into the query alone. `allowed_BK` False leaves a key out of the
    denominator (a key of the query's own tile is no negative); `log_weight_BK` adds the log of a negative's weight.
    Closed forms: ln(K+1) where all vectors are equal; ln(1 + K exp(-1/T)) for a perfect positive and orthogonal keys.
    """
    with torch.autocast(query_BD.device.type, enabled=False):
        query_BD, key_BD, queue_KD = query_BD.float(), key_BD.detach().float(), queue_KD.detach().float()
        positive_B = (query_BD * key_BD).sum(1)  # cosine: both sides unit length
        return _told_apart(positive_B, query_BD @ queue_KD.T, temperature, allowed_BK, log_weight_BK)


def nt_xent(first_BD: Tensor, second_BD: Tensor, others_KD: Tensor, allowed: Tensor, temperature: float) -> InfoNCE:
    """Both views of a tile find each other among the views of other tiles (Chen et al. 2020, eq. 1).

    All vectors unit length. `others_KD` are the views of all processes, gathered with their gradient, and what else is
    to be told apart (SimCLR v2: a memory); `allowed` (2B, K), first views before second ones, is False where one is of
    the row's own tile. Gradient flows everywhere.

    The mean over the 2B rows, as in the paper. google-research/simclr adds the means of both halves: twice this.
    Closed form: ln(2N-1) where all vectors of N tiles are equal.
    """
    with torch.autocast(first_BD.device.type, enabled=False):
        first_BD, second_BD, others_KD = first_BD.float(), second_BD.float(), others_KD.float()
        positive_B = (first_BD * second_BD).sum(1)
        negatives = torch.cat([first_BD, second_BD]) @ others_KD.T
        return _told_apart(positive_B.repeat(2), negatives, temperature, allowed, None)


def _told_apart(
    positive_B: Tensor,
    negatives_BK: Tensor,
    temperature: float,
    allowed_BK: Tensor | None,
    log_weight_BK: Tensor | None,
) -> InfoNCE:
    logits_BK = negatives_BK / temperature
    if log_weight_BK is not None:
        logits_BK = logits_BK + log_weight_BK
    if allowed_BK is not None:
        logits_BK = logits_BK.masked_fill(~allowed_BK, NEVER)
    # The cross-entropy of [positive, negatives] against the first, in a form that keeps its digits in fp32 when the
    # positive is far ahead: 65,536 terms of 1e-7 each, added to 1 one by one, lose 0.2 %.
    loss = F.softplus(torch.logsumexp(logits_BK, 1) - positive_B / temperature).mean()
    return InfoNCE(loss, positive_B.detach(), negatives_BK.detach(), allowed_BK)


GAP = 0.05  # between the cosines of positives and negatives; untrained networks have less, trained ones 0.3 and more
SETTLED = 100  # steps; before, random weights and fresh heads tell little apart


def tells_nothing(row: Mapping[str, float]) -> str:
    """A contrastive method's collapse, by the figures of a logged step; '' while all is well."""
    own, other = row["positive_cosine"], row["negative_cosine"]
    if row["step"] < SETTLED or own - other >= GAP:
        return ""
    return (
        f"collapse: two views of one tile are no more alike (cosine {own:.2f}) than views of different tiles "
        f"({other:.2f}), so the embeddings tell nothing. Likely causes: --lr too high, --set temperature too high, "
        "--set momentum too low where there is one, views that share nothing"
    )


def distillation(student_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    """T^2 times the cross-entropy of the student's softmax(logits / T) to the teacher's (Hinton et al. 2015).

    Gradient flows into the student alone. A teacher's logit may be -inf: that class has probability 0.
    Closed forms: T^2 times the teacher's entropy where both logits are equal, and never below it; T^2 ln C for a
    student that knows nothing. For a large T, what is above the entropy is the squared distance of the logits, each
    less their mean, over 2C.
    """
    with torch.autocast(student_BC.device.type, enabled=False):
        target_BC = (teacher_BC.detach().float() / temperature).softmax(1)
        return temperature**2 * F.cross_entropy(student_BC.float() / temperature, target_BC)
