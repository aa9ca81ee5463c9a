"""SimCLR, SimCLR v2 with a memory, every MoCo: two processes compute the loss, gradients and queue of one."""

from typing import Any

import pytest
from contrast import WIDTH, backbone, loss_and_gradients, own_views
from torch import Tensor

from histossl.methods import classes_of
from histossl.methods.method import Method
from histossl.views.recipe import recipe_named
from tests.runtime.test_collectives import on_two

# 12 is no multiple of 8: the queue's writing point wraps. Groups of two tiles for BatchNorm fit either half of a batch.
MOCO: dict[str, Any] = {"queue_size": 12, "same_slide_weight": 0.5, "batchnorm_group_tiles": 2}
KNOBS: dict[str, dict[str, Any]] = {
    "simclr": {},
    "simclrv2": {"queue_size": 12},
    "mocov1": MOCO,
    "mocov2": {**MOCO, "symmetric": True},
    "mocov3": {"hidden_dim": 8},
}


def steps() -> dict[str, list[Tensor]]:
    """A step of each, on this process's part of 8 tiles."""
    found = {}
    for name, knobs in KNOBS.items():
        method_class, config = classes_of(name)
        recipe = recipe_named("simclr", 16)
        method: Method = method_class(backbone(), WIDTH, recipe, config(embedding_dim=4, **knobs)).train()
        if method.num_prefill_tiles():
            method.prefill(own_views(4))
        found[name] = loss_and_gradients(method)
    return found


@pytest.fixture(scope="module")
def everyone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    """Alone, and each of two processes."""
    return [steps(), *on_two(steps, tmp_path_factory.mktemp("two"))]


@pytest.mark.parametrize("name", KNOBS)
def test_two_processes_compute_what_one_does(name: str, everyone: list[dict[str, list[Tensor]]]) -> None:
    alone = everyone[0][name]
    for together in everyone[1:]:
        assert len(together[name]) == len(alone)
        assert float(together[name][0]) == pytest.approx(float(alone[0]), rel=1e-5)
        for ours, theirs in zip(together[name], alone, strict=True):
            # By the norm: a chain of BatchNorms over 8 tiles magnifies the rounding of entries that are nearly 0.
            assert (ours - theirs).double().norm() <= 1e-3 * theirs.double().norm() + 1e-4
