"""What methods are given when other processes are only imagined: shapes and memory as if they were there."""

import torch
from torch import nn

from histossl.methods.modules.batchnorm import globalise_batchnorms
from histossl.runtime import collectives
from histossl.training.setup.memory import kept_for_backward


def test_imagined_processes_say_what_this_one_says() -> None:
    x = torch.arange(6.0).view(3, 2).requires_grad_()
    assert collectives.world_size() == 1
    assert collectives.gather(x) is x
    with collectives.imagined(4):
        assert (collectives.world_size(), collectives.rank()) == (4, 0)
        everybody = collectives.gather(x)
        assert torch.equal(everybody, x.detach().repeat(4, 1))
        assert torch.equal(collectives.own_part(everybody), x.detach())
        assert torch.equal(collectives.mean_over_processes(x), x.detach())
        assert torch.equal(collectives.max_over_processes(x.detach()), x.detach())
        collectives.gather_with_gradient(x).sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad, torch.full_like(x, 4.0))
    assert collectives.world_size() == 1


def test_a_norm_over_imagined_processes_gives_the_same_and_takes_its_own_memory() -> None:
    """What is tried out beforehand must take the road that the run will take."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    kept, given = {}, {}
    for count in (1, 2):
        norm = nn.Sequential(nn.BatchNorm2d(3))
        globalise_batchnorms(norm)
        with collectives.imagined(count), kept_for_backward() as total:
            given[count] = norm(x.clone().requires_grad_())
        kept[count] = total[0]
    torch.testing.assert_close(given[1], given[2])
    assert kept[2] > 1.5 * kept[1]
