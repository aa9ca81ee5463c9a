"""How much memory is free, what a pass keeps of it, and into how many passes a batch is cut on a CPU."""

import json
from pathlib import Path

import pytest
import torch
from synthetic_store import write_synthetic_store
from torch import nn

from histossl.core.config import PretrainConfig, RuntimeConfig
from histossl.core.workspace import PretrainDir, Workspace
from histossl.training.pretrain import pretrain
from histossl.training.setup import dry_run, memory
from histossl.training.setup.memory import free_ram, kept_for_backward

GB = 1 << 30


@pytest.mark.parametrize(
    ("limit", "names"),
    [
        (str(2 * GB), ("memory.max", "memory.current", "inactive_file")),
        (str(2 * GB), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
        ("max", ("memory.max", "memory.current", "inactive_file")),
    ],
)
def test_a_container_may_have_less_than_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, names: tuple[str, str, str]
) -> None:
    monkeypatch.setattr(memory, "_cgroups", lambda: [])
    machine = free_ram()
    if machine is None:
        pytest.skip("this system does not tell what is free")
    most, used, cache = names
    (tmp_path / most).write_text(limit + "\n")
    (tmp_path / used).write_text(f"{GB}\n")
    (tmp_path / "memory.stat").write_text(
        f"anon 5\n{cache} {GB // 4}\n{cache.replace('inactive', 'active')} {GB // 8}\n"
    )
    monkeypatch.setattr(memory, "_cgroups", lambda: [tmp_path, tmp_path / "no limit here"])
    free = free_ram()
    if limit == "max":
        assert free == pytest.approx(machine, rel=0.1)
    else:
        assert free == GB + GB // 4 + GB // 8  # files that were read are given back when asked for


def test_what_a_pass_keeps_is_counted_once_and_without_weights() -> None:
    network = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    with kept_for_backward() as kept:
        network(torch.randn(8, 100)).sum().backward()
    assert kept == [8 * (100 + 50) * 4]  # each layer's input; what ReLU gives is the second's


def test_on_a_cpu_a_batch_is_cut_until_a_pass_fits_and_stays_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = write_synthetic_store(Workspace(tmp_path), slides=("A", "B"), tiles_per_slide=32, tile_px=40)
    config = PretrainConfig(
        backbone="resnet10t", weights="random", steps=2, batch_size=16, view_px=32, set=("batchnorm_group_tiles=4",)
    )
    monkeypatch.setattr(dry_run, "SURELY_FITS_PX", 0)
    monkeypatch.setattr(dry_run, "bytes_per_tile", lambda _: 1e6)
    run = PretrainDir(tmp_path / "run")

    def free(num_bytes: int | None) -> None:
        monkeypatch.setattr(dry_run, "free_ram", lambda: num_bytes)

    monkeypatch.setattr(dry_run, "_fixed_bytes", lambda _: 1_000_000)
    monkeypatch.setattr(dry_run, "SMALLEST_PASS", 2)
    free(round(6e6 / dry_run.RAM_SHARE))
    assert pretrain(index, run, config, RuntimeConfig(num_workers=0)).finished
    planned = json.loads(run.run_json.read_text())["plan"]
    assert (planned["micro_batches"], planned["tiles_per_pass"]) == (4, 4)
    assert "BatchNorm takes one statistic of each pass: 4 tiles" in " ".join(capsys.readouterr().err.split())
    free(None)
    whole = PretrainDir(tmp_path / "whole")
    assert pretrain(index, whole, config, RuntimeConfig(num_workers=0)).finished
    assert json.loads(whole.run_json.read_text())["plan"]["micro_batches"] == 1
    free(1000)
    little = PretrainDir(tmp_path / "little")
    assert pretrain(index, little, config, RuntimeConfig(num_workers=0)).finished  # an estimate is no reason to refuse
    assert json.loads(little.run_json.read_text())["plan"]["tiles_per_pass"] == dry_run.SMALLEST_PASS
    assert "may be killed" in capsys.readouterr().err


def test_bytes_per_tile_grow_with_the_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, float] = {}
    index = write_synthetic_store(Workspace(tmp_path), slides=("A", "B"), tiles_per_slide=32, tile_px=40)
    real = dry_run.bytes_per_tile
    monkeypatch.setattr(dry_run, "SURELY_FITS_PX", 0)
    for px in (32, 64):
        config = PretrainConfig(
            backbone="resnet10t", weights="random", steps=1, batch_size=16, view_px=px, set=("batchnorm_group_tiles=4",)
        )
        monkeypatch.setattr(dry_run, "bytes_per_tile", lambda prepared, px=px: seen.setdefault(px, real(prepared)))
        assert pretrain(index, PretrainDir(tmp_path / str(px)), config, RuntimeConfig(num_workers=0)).finished
    assert 3 < seen[64] / seen[32] < 4.5
