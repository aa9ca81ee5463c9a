"""What a method needs from the other processes. In one process each function is the identity.

Order is rank-major everywhere: rank 0's tiles, then rank 1's, as one process would hold them in one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_imagined = 0  # processes; 0: those that there are


@contextmanager
def imagined(count: int = 1) -> Iterator[None]:
    """Within it every process is as if it were one of `count` that all say what it says, and nothing is exchanged.

    For trying things out, where one may stop before the others. What they would send takes its memory.
    """
    global _imagined
    _imagined = count
    try:
        yield
    finally:
        _imagined = 0


def world_size() -> int:
    return _imagined or (dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1)


def rank() -> int:
    return dist.get_rank() if world_size() > 1 and not _imagined else 0


def gather(x_BX: Tensor) -> Tensor:
    """(B, ...) of every process, concatenated to (B * processes, ...). Carries no gradient."""
    if world_size() == 1:
        return x_BX
    x_BX = x_BX.detach().contiguous()
    if _imagined:
        return torch.cat([x_BX] * _imagined)
    parts = [torch.empty_like(x_BX) for _ in range(world_size())]
    dist.all_gather(parts, x_BX)
    return torch.cat(parts)


def own_part(x_GX: Tensor) -> Tensor:
    """This process's rows of a gathered tensor."""
    return x_GX.chunk(world_size())[rank()]


def mean_over_processes(x: Tensor) -> Tensor:
    return x if world_size() == 1 else sum_over_processes(x) / world_size()


def gather_with_gradient(x_BX: Tensor) -> Tensor:
    """As `gather`, and the gradient comes home: each process gets the sum of what all losses say of its rows.

    With a loss that is the mean over a process's own rows, and gradients averaged over processes, this is the gradient
    of the mean over all rows, as one process would compute it.
    """
    gathered: Tensor = _Gather.apply(x_BX) if world_size() > 1 else x_BX
    return gathered


def sum_with_gradient(x: Tensor) -> Tensor:
    """The sum over processes; its gradient is the sum of theirs."""
    total: Tensor = _Sum.apply(x) if world_size() > 1 else x
    return total


def sum_over_processes(x: Tensor) -> Tensor:
    """As `sum_with_gradient`, without any."""
    if world_size() == 1:
        return x
    if _imagined:
        return x.detach() * _imagined
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def max_over_processes(x: Tensor) -> Tensor:
    if world_size() == 1 or _imagined:
        return x
    x = x.detach().clone()
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x_BX: Tensor) -> Tensor:
        return gather(x_BX)

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> Tensor:
        return own_part(sum_over_processes(grads[0].contiguous()))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return sum_over_processes(x)

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> Tensor:
        return sum_over_processes(grads[0].contiguous())
