"""What a run writes is whole, readable, and written by one process at a time, whatever happens to disk and process."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from histossl.backbones.loading import create_backbone, save_backbone
from histossl.core.errors import HistosslError, TrainingError
from histossl.core.workspace import PretrainDir
from histossl.runtime.locks import alone_in_run
from histossl.training.run_files.checkpoint import save_checkpoint


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond it, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    run = PretrainDir(tmp_path)
    backbone, info = create_backbone("resnet10t", "random")
    with room_for(1_000_000):
        with pytest.raises(HistosslError, match=r"checkpoint.pt: cannot be written"):
            save_checkpoint(run, {"x": torch.zeros(1_000_000)})
        with pytest.raises(HistosslError, match=r"backbone.safetensors: cannot be written"):
            save_backbone(run.backbone, backbone, info)
    assert [path.name for path in tmp_path.iterdir()] == ["backbone.json"]


def test_weights_may_be_read_by_whoever_may_read_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    save_backbone(path, *create_backbone("resnet10t", "random"))
    assert path.stat().st_mode == path.with_suffix(".json").stat().st_mode


def test_a_second_process_in_a_run_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    run = PretrainDir(tmp_path / "run")
    with alone_in_run(run):
        with (
            pytest.raises(TrainingError, match=r"another process is at work on this run \(process \d+\)"),
            alone_in_run(run),
        ):
            pass
        run.log.touch()
    with alone_in_run(run):
        pass


def test_what_a_kill_left_half_written_is_removed_and_an_unused_directory_goes(tmp_path: Path) -> None:
    run = PretrainDir(tmp_path / "run")
    with alone_in_run(run):
        pass
    assert not run.root.exists()
    left = run.best_backbone.with_name(".backbone.safetensors.1-abcd.part")
    left.parent.mkdir(parents=True)
    left.touch()
    with alone_in_run(run):
        assert not left.exists()
