"""Two gloo processes compute what one computes: gathered gradients, sums, BatchNorm over all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from histossl.methods.modules.batchnorm import GlobalBatchNorm, globalise_batchnorms
from histossl.runtime import collectives


def rows(count: int = 8, width: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def _worker(rank: int, folder: str, work: Callable[[], Any]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        torch.save(work(), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def on_two(work: Callable[[], Any], folder: Path) -> list[Any]:
    """What `work` returns on each of two processes. It is called in them, so it must be a module's function."""
    mp.start_processes(_worker, (str(folder), work), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def contrast() -> tuple[Tensor, Tensor]:
    """A loss of every row against all rows, the mean over the own ones; and its gradient averaged as DDP does."""
    weight = rows(5, 3, seed=1).requires_grad_()
    z = collectives.own_part(rows()) @ weight
    loss = (z @ collectives.gather_with_gradient(z).T).exp().mean(1).log().mean()
    loss.backward()
    assert weight.grad is not None
    return collectives.mean_over_processes(loss.detach()), collectives.mean_over_processes(weight.grad)


def normed() -> list[Tensor]:
    """BatchNorm over all, its input's gradient (averaged weights' gradient) and its running statistics."""
    norm = nn.BatchNorm1d(5)
    norm.weight.data = torch.linspace(0.5, 1.5, 5)
    assert globalise_batchnorms(norm) == 1
    x = collectives.own_part(rows()).clone().requires_grad_()
    loss = norm(x).square().mul(torch.arange(5)).mean() + norm(x)[:, 0].exp().mean()
    loss.backward()
    assert norm.weight.grad is not None
    assert x.grad is not None
    means = [collectives.mean_over_processes(each) for each in (loss.detach(), norm.weight.grad, norm.running_mean)]
    return [*means, norm.running_var, collectives.gather(x.grad) / collectives.world_size()]


@pytest.mark.parametrize("work", [contrast, normed])
def test_two_processes_compute_what_one_does(work: Callable[[], Any], tmp_path: Path) -> None:
    alone = work()
    for together in on_two(work, tmp_path):
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_global_batchnorm_is_batchnorm_in_one_process() -> None:
    x = torch.randn(6, 4, 3, 3)
    plain, ours = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    globalise_batchnorms(ours)
    assert isinstance(ours, GlobalBatchNorm)
    assert torch.equal(plain(x), ours(x))
    assert torch.equal(plain.eval()(x), ours.eval()(x))
