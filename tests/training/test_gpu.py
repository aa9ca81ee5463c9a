"""What only a GPU can show: `pytest -m gpu`."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from synthetic_store import write_synthetic_store

from histossl.core.config import PretrainConfig, RuntimeConfig
from histossl.core.workspace import PretrainDir, Workspace
from histossl.methods import REGISTRY
from histossl.training import loop, pretrain

pytestmark = pytest.mark.gpu


@pytest.fixture
def refuse_to_wait() -> Iterator[Callable[[bool], None]]:
    """A switch: on, anything that makes the host wait for the GPU behind our back is an error."""
    yield lambda on: torch.cuda.set_sync_debug_mode("error" if on else "default")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
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
    operation = RuntimeConfig(num_workers=2, precision=precision, log_every=4, monitor_every=100)
    assert pretrain.pretrain(index, PretrainDir(tmp_path / "run"), config, operation).finished


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", REGISTRY)
def test_every_method_trains_saves_and_goes_on(tmp_path: Path, name: str, precision: str) -> None:
    index = write_synthetic_store(Workspace(tmp_path), slides=("A", "B"), tiles_per_slide=64, tile_px=64)
    backbone = "vit_tiny_patch16_224" if REGISTRY[name].backbones == "ViT" else "resnet18"
    config = PretrainConfig(method=name, backbone=backbone, weights="random", steps=12, batch_size=32, view_px=64)
    operation = RuntimeConfig(num_workers=2, precision=precision, log_every=4, monitor_every=6, checkpoint_every="5")

    def stop_at_the_second_look(*_: object) -> float:
        looks.append(1)
        if len(looks) == 2:
            raise KeyboardInterrupt
        return 0.5

    looks: list[int] = []
    run = PretrainDir(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(index, run, config, replace(operation, stop_on_collapse=False), stop_at_the_second_look)
    assert run.checkpoint.exists()
    assert pretrain.pretrain(index, run, config, replace(operation, stop_on_collapse=False)).finished


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tiles_decoded_on_the_gpu_train_as_those_of_the_workers(tmp_path: Path) -> None:
    index = write_synthetic_store(Workspace(tmp_path), slides=("A", "B"), tiles_per_slide=64, tile_px=64)
    config = PretrainConfig(backbone="resnet18", weights="random", steps=20, batch_size=32, view_px=64)
    last = []
    for on_gpu in (False, True):
        run = PretrainDir(tmp_path / str(on_gpu))
        operation = RuntimeConfig(num_workers=2, precision="fp32", log_every=1, decode_on_gpu=on_gpu)
        assert pretrain.pretrain(index, run, config, operation).finished
        rows = [json.loads(line) for line in run.log.read_text().splitlines()]
        last.append([row["loss"] for row in rows if "loss" in row][-1])
    assert last[1] == pytest.approx(last[0], rel=0.05)


def test_auto_batch_is_settled_by_memory_and_runs(tmp_path: Path) -> None:
    index = write_synthetic_store(Workspace(tmp_path), slides=("A", "B"), tiles_per_slide=400, tile_px=64)
    config = PretrainConfig(backbone="resnet18", weights="random", steps=3, batch_size=0, view_px=64)
    assert pretrain.pretrain(index, PretrainDir(tmp_path / "run"), config, RuntimeConfig(log_every=1)).finished
