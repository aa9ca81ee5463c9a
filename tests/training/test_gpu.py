"""What only a GPU can show: `pytest -m gpu`."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from synthetic_store import write_synthetic_store

from histossl.config import PretrainConfig
from histossl.training import loop, pretrain
from histossl.training.operation import Operation
from histossl.workspace import PretrainDir, Workspace

pytestmark = pytest.mark.gpu


@pytest.fixture
def refuse_to_wait() -> Iterator[Callable[[bool], None]]:
    """A switch: on, anything that makes the host wait for the GPU behind our back is an error."""
    yield lambda on: torch.cuda.set_sync_debug_mode("error" if on else "default")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("backbone", "precision"), [("resnet18", "bf16"), ("resnet18", "fp16"), ("test_vit", "bf16")])
def test_no_step_makes_the_host_wait(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refuse_to_wait: Callable[[bool], None],
    backbone: str,
    precision: str,
) -> None:
    """From the second step on, and between two lines of the log: tiles, views, passes, check, step, queue."""
    index = write_synthetic_store(Workspace(tmp_path), slides=("A", "B"), tiles_per_slide=64, tile_px=64)
    config = PretrainConfig(backbone=backbone, weights="random", steps=12, batch_size=32, view_px=64)

    def watched(*arguments: object, **options: object) -> Iterator[loop.Step]:
        for step in loop.train(*arguments, **options):  # type: ignore[arg-type]
            refuse_to_wait(False)  # the caller may look at what it is given
            yield step
            refuse_to_wait(2 <= step.number < 10)

    monkeypatch.setattr(pretrain, "train", watched)
    operation = Operation(num_workers=2, precision=precision, log_every=4, monitor_every=100)
    assert pretrain.pretrain(index, PretrainDir(tmp_path / "run"), config, operation).finished


def test_auto_batch_is_settled_by_memory_and_runs(tmp_path: Path) -> None:
    index = write_synthetic_store(Workspace(tmp_path), slides=("A", "B"), tiles_per_slide=400, tile_px=64)
    config = PretrainConfig(backbone="resnet18", weights="random", steps=3, batch_size=0, view_px=64)
    assert pretrain.pretrain(index, PretrainDir(tmp_path / "run"), config, Operation(log_every=1)).finished
