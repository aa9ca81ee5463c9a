"""What a method needs from the other processes. In one process each function is the identity.

Order is rank-major everywhere: rank 0's tiles, then rank 1's, as one process would hold them in one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Within it every process is the only one: for trying things out, where one may stop before the others."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def gather(x_BX: Tensor) -> Tensor:
    """(B, ...) of every process, concatenated to (B * processes, ...). Carries no gradient."""
    if world_size() == 1:
        return x_BX
    x_BX = x_BX.detach().contiguous()
    parts = [torch.empty_like(x_BX) for _ in range(world_size())]
    dist.all_gather(parts, x_BX)
    return torch.cat(parts)


def own_part(x_GX: Tensor) -> Tensor:
    """This process's rows of a gathered tensor."""
    return x_GX.chunk(world_size())[rank()]


def mean_over_processes(x: Tensor) -> Tensor:
    if world_size() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / world_size()
