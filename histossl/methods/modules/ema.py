"""A slow copy of a network: the momentum (key, teacher) encoder."""

from __future__ import annotations

from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn

NetworkT = TypeVar("NetworkT", bound=nn.Module)


def frozen_copy(source: NetworkT) -> NetworkT:
    """A copy, buffers included, that no optimizer will touch."""
    return deepcopy(source).requires_grad_(False)


@torch.no_grad()
def ema_update(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """slow <- momentum * slow + (1 - momentum) * fast, parameters only (He et al. 2020, eq. 2).

    Buffers are left alone: the key encoder's BatchNorm statistics come from its own forwards, as in the official code.
    """
    slow_parameters: list[Tensor] = list(slow.parameters())
    fast_parameters: list[Tensor] = [parameter.detach() for parameter in fast.parameters()]
    torch._foreach_lerp_(slow_parameters, fast_parameters, 1 - momentum)
