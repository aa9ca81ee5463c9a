"""BatchNorm whose statistics do not depend on how many processes share the batch.

MoCo needs small groups: with one statistic over query and key alike, the network recognises the positive by it
(He et al. 2020, section 3.3). The official code has one group per GPU, so its result changes with their number.
Here a group is a fixed number of tiles, consecutive in the global batch, on one process or on many
(on one GPU this is the 'SplitBatchNorm' of the official CIFAR notebook).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from histossl.runtime import collectives

GROUP_LEAST = 4  # tiles: a statistic of fewer says nothing (a group asked for by hand may be smaller)


def group_of(pass_tiles: int, group_tiles: int, num_processes: int) -> int:
    """How many tiles share a statistic in a pass of one process: `group_tiles`, or the next smaller divisor.

    One process needs two groups at least, or query and key share their statistics whatever is shuffled. 0 where no
    such number divides the pass, which is then taken whole.
    """
    most = min(group_tiles, pass_tiles // 2 if num_processes == 1 else pass_tiles)
    least = min(GROUP_LEAST, group_tiles)
    return max((size for size in range(max(1, least), most + 1) if pass_tiles % size == 0), default=0)


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d with statistics over groups of `group_tiles` rows. Running statistics take the groups' mean.

    Of fewer rows where the batch is no two whole groups (`group_of`). In evaluation it is BatchNorm2d.
    """

    group_tiles: int = 0
    act: nn.Module  # timm's BatchNormAct2d carries an activation (and a drop layer) behind the norm
    drop: nn.Module

    def forward(self, x_BCHW: Tensor) -> Tensor:
        group_tiles = group_of(len(x_BCHW), self.group_tiles, collectives.world_size()) if self.training else 0
        num_groups = len(x_BCHW) // group_tiles if group_tiles else 1
        if num_groups < 2:
            y_BCHW = super().forward(x_BCHW)
        else:
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            means = self.running_mean.expand(num_groups, -1).clone()
            variances = self.running_var.expand(num_groups, -1).clone()
            y_BCHW = torch.cat(
                [
                    nn.functional.batch_norm(
                        group, means[i], variances[i], self.weight, self.bias, True, self.momentum, self.eps
                    )
                    for i, group in enumerate(x_BCHW.split(group_tiles))
                ]
            )
            self.running_mean.copy_(means.mean(0))
            self.running_var.copy_(variances.mean(0))
            self.num_batches_tracked += 1
        if hasattr(self, "act"):
            y_BCHW = self.act(self.drop(y_BCHW))
        return y_BCHW


def group_batchnorms(network: nn.Module, group_tiles: int) -> int:
    """Make every BatchNorm2d of `network` a grouped one, in place. Returns how many there are."""
    count = 0
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = GroupedBatchNorm2d
            module.group_tiles = group_tiles  # type: ignore[assignment]
            count += 1
    return count


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm with one statistic over the whole batch of all processes, with its gradient ('synchronised').

    SimCLR and MoCo v3 need it: a statistic of few tiles tells positives apart. (torch's own runs on GPUs alone.)
    In one process it is the BatchNorm that it was made of.
    """

    act: nn.Module
    drop: nn.Module

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.ndim >= 2

    def forward(self, x_BCX: Tensor) -> Tensor:
        if not self.training or collectives.world_size() == 1:
            y_BCX = super().forward(x_BCX)
        else:
            y_BCX = self._of_all(x_BCX)
        return self.act(self.drop(y_BCX)) if hasattr(self, "act") else y_BCX

    def _of_all(self, x_BCX: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        rest = [axis for axis in range(x_BCX.ndim) if axis != 1]
        shape = [1, -1] + [1] * (x_BCX.ndim - 2)
        with torch.autocast(x_BCX.device.type, enabled=False):
            x = x_BCX.float()
            count = x.numel() // x.shape[1] * collectives.world_size()
            mean_C = collectives.sum_with_gradient(x.sum(rest)) / count
            centred = x - mean_C.view(shape)
            variance_C = collectives.sum_with_gradient(centred.square().sum(rest)) / count
            y = centred * (variance_C + self.eps).rsqrt().view(shape)
            if self.weight is not None:
                y = y * self.weight.view(shape)
            if self.bias is not None:
                y = y + self.bias.view(shape)
        with torch.no_grad():
            self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((variance_C * count / (count - 1)).to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked += 1
        return y.to(x_BCX.dtype)


def globalise_batchnorms(network: nn.Module) -> int:
    """Make every BatchNorm of `network` one over all processes, in place. Returns how many there are."""
    count = 0
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = GlobalBatchNorm
            count += 1
    return count


def has_batchnorm(network: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def batchnorm_buffers(network: nn.Module) -> list[Tensor]:
    """Running means and variances of every BatchNorm."""
    return [
        buffer
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]


@contextmanager
def still_as_in_training(network: nn.Module) -> Iterator[None]:
    """Within it BatchNorm takes each batch's statistics, as in training, and all else is as in evaluation.

    Afterwards it is in training mode as before, and no running statistic has moved.
    """
    network.eval()
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    for norm in norms:
        norm.train()
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
        network.train()


@torch.no_grad()
def average_batchnorm_buffers(network: nn.Module) -> None:
    """Running statistics become their mean over processes: what one process would have seen in all groups."""
    if collectives.world_size() == 1:
        return
    buffers = batchnorm_buffers(network)
    if not buffers:
        return
    flat = collectives.mean_over_processes(torch.cat([buffer.flatten() for buffer in buffers]))
    for buffer, value in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(value.view_as(buffer))
