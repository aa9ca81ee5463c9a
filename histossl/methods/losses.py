"""Losses as functions of their arguments, in fp32 whatever the autocast.

Shapes: B tiles of this process, K keys in the queue, D embedding dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NEVER = -1e4  # as a logit: weight 0 in fp32, and a finite gradient also where nothing is left


class InfoNCE:
    """What InfoNCE gives: the loss, and the logits for whoever wants to look at them."""

    def __init__(self, loss: Tensor, positive_B: Tensor, negatives_BK: Tensor, allowed_BK: Tensor | None) -> None:
        self.loss, self.positive_B, self.negatives_BK, self.allowed_BK = loss, positive_B, negatives_BK, allowed_BK


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
        negatives_BK = query_BD @ queue_KD.T
        logits_BK = negatives_BK / temperature
        if log_weight_BK is not None:
            logits_BK = logits_BK + log_weight_BK
        if allowed_BK is not None:
            logits_BK = logits_BK.masked_fill(~allowed_BK, NEVER)
        # The cross-entropy of [positive, negatives] against the first, in a form that keeps its digits in fp32 when the
        # positive is far ahead: 65,536 terms of 1e-7 each, added to 1 one by one, lose 0.2 %.
        loss = F.softplus(torch.logsumexp(logits_BK, 1) - positive_B / temperature).mean()
        return InfoNCE(loss, positive_B.detach(), negatives_BK.detach(), allowed_BK)
