"""The stage as a whole, on a synthetic store: it resumes exactly, refuses what does not fit, leaves what timm loads."""

import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import timm
import torch
from safetensors.torch import load_file
from synthetic_store import write_synthetic_store
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from histossl.backbones.loading import create_backbone, load_backbone, save_backbone
from histossl.core.config import PretrainConfig, RuntimeConfig, write_run
from histossl.core.errors import MismatchError, StoreError, TrainingError
from histossl.core.workspace import PretrainDir, Workspace
from histossl.evaluation.probe import probe_of
from histossl.labels.label_table import Item, LabelTable
from histossl.methods.dinov2 import DINOv2
from histossl.methods.method import Outcome, Views
from histossl.methods.mocov2 import Keys, MoCoV2
from histossl.methods.modules.batchnorm import GroupedBatchNorm2d
from histossl.runtime.distributed import Processes
from histossl.runtime.locks import alone_in_run
from histossl.runtime.signals import Stop
from histossl.tiles.store.index import TileIndex
from histossl.tiles.store.subset import write_subset
from histossl.tiles.stream.loader import decode_tiles
from histossl.training import pretrain as pretraining
from histossl.training.loop import Step
from histossl.training.monitoring.periodic_checks import Looks
from histossl.training.plan import settle_batch, show_plan
from histossl.training.pretrain import _Pretraining, _refuse_other_format, pretrain, steps_within_reach
from histossl.training.run_files.checkpoint import load_checkpoint, save_checkpoint
from histossl.training.setup import dry_run
from histossl.training.setup.run import Prepared
from histossl.views.recipe import clean_view

TINY = PretrainConfig(
    backbone="resnet10t", weights="random", steps=8, batch_size=8, view_px=32, set=("batchnorm_group_tiles=4",)
)
CPU = torch.device("cpu")
QUICK = RuntimeConfig(num_workers=0, log_every=1, monitor_every=3)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> TileIndex:
    workspace = Workspace(tmp_path_factory.mktemp("store"))
    return write_synthetic_store(workspace, slides=("A1", "A2", "B1", "B2"), tiles_per_slide=16, tile_px=40)


def run_dir(path: Path, name: str = "run") -> PretrainDir:
    return PretrainDir(path / name)


def rows(run: PretrainDir) -> list[dict[str, float]]:
    return [json.loads(line) for line in run.log.read_text().splitlines()]


class Killed(Exception):
    pass


def die_at_look(number: int):
    looks = iter(range(number))

    def probe(*_: object) -> float:
        if next(looks, None) is None:
            raise Killed
        return 0.5

    return probe


def test_four_steps_then_resume_equals_the_unbroken_run(index: TileIndex, tmp_path: Path) -> None:
    unbroken, broken = run_dir(tmp_path, "unbroken"), run_dir(tmp_path, "broken")
    pretrain(index, unbroken, TINY, QUICK)
    with pytest.raises(Killed):  # at the look after step 6, with checkpoints at 4 and nothing after it
        pretrain(index, broken, TINY, replace(QUICK, checkpoint_every="4"), probe=die_at_look(2))
    state = load_checkpoint(broken)
    assert state is not None
    assert state["step"] == 4
    assert not broken.backbone.exists()
    result = pretrain(index, broken, TINY, QUICK)
    assert result.finished
    assert broken.backbone.read_bytes() == unbroken.backbone.read_bytes()
    assert [row["step"] for row in rows(broken) if "loss" in row] == list(range(1, 9))  # nothing lost, nothing doubled
    losses = [[row["loss"] for row in rows(run) if "loss" in row] for run in (unbroken, broken)]
    assert losses[0] == losses[1]
    board = EventAccumulator(str(broken.tensorboard)).Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, 9))
    assert [event.step for event in board.Scalars("effective_rank")] == [0, 3, 6, 8]


def test_the_same_command_again_is_finished(index: TileIndex, tmp_path: Path) -> None:
    run = run_dir(tmp_path)
    pretrain(index, run, replace(TINY, steps=1), QUICK)
    before = run.backbone.stat().st_mtime_ns
    assert "finished before" in pretrain(index, run, replace(TINY, steps=1), QUICK).text
    assert run.backbone.stat().st_mtime_ns == before


def test_other_settings_in_the_same_directory_are_refused_by_name(index: TileIndex, tmp_path: Path) -> None:
    run = run_dir(tmp_path)
    pretrain(index, run, replace(TINY, steps=1), QUICK)
    with pytest.raises(MismatchError, match=r"seed was 0, now 7.*another --name"):
        pretrain(index, run, replace(TINY, steps=1, seed=7), QUICK)


def test_other_tiles_in_the_same_directory_are_refused(index: TileIndex, tmp_path: Path) -> None:
    run = run_dir(tmp_path)
    pretrain(index, run, replace(TINY, steps=1), QUICK)
    other = write_synthetic_store(Workspace(tmp_path / "other"), slides=("A1", "C"), tiles_per_slide=20, tile_px=40)
    with pytest.raises(MismatchError, match="begun on other tiles"):
        pretrain(other, run, replace(TINY, steps=1), QUICK)


def test_backbone_loads_in_timm_with_nothing_missing(index: TileIndex, tmp_path: Path) -> None:
    run = run_dir(tmp_path)
    pretrain(index, run, replace(TINY, steps=2), QUICK)
    loaded = timm.create_model("resnet10t", checkpoint_path=str(run.backbone), num_classes=0)
    ours, info = load_backbone(run.backbone)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    assert info.input_px == 32
    assert info.method == "mocov2"
    assert info.provenance["pretraining_slides"] == ["A1", "A2", "B1", "B2"]
    assert info.provenance["start_weights"] == "random"


def test_a_head_layer_that_the_method_keeps_is_behind_the_backbone(index: TileIndex, tmp_path: Path) -> None:
    run, seen = run_dir(tmp_path), []

    def probe(backbone: torch.nn.Module, _: object) -> float:
        seen.append(backbone(torch.zeros(2, 3, 32, 32)).shape[1])
        return 0.5

    pretrain(index, run, replace(TINY, method="simclrv2", steps=2, set=("queue_size=8",)), QUICK, probe)
    backbone, info = load_backbone(run.backbone)
    features = backbone.eval()(torch.randn(4, 3, 32, 32))
    assert features.shape == (4, info.feature_dim)
    assert (features >= 0).all()  # behind a ReLU
    assert set(seen) == {info.feature_dim}
    timm.create_model("resnet10t", checkpoint_path=str(run.backbone), num_classes=0)
    logged = [row for row in rows(run) if "loss" in row]
    assert [row["loss_ceiling"] for row in logged] == pytest.approx([math.log(14 + 8 + 1)] * 2, rel=0.05)
    assert json.loads(run.run_json.read_text())["plan"]["optimizer"] == "lars"


def test_excluded_slides_are_never_drawn_and_told(index: TileIndex, tmp_path: Path) -> None:
    run = run_dir(tmp_path)
    drawn: set[int] = set()
    read = index.read
    try:
        index.read = lambda number: (drawn.add(number), read(number))[1]  # type: ignore[method-assign, func-returns-value]
        pretrain(index, run, replace(TINY, steps=6, excluded_slides=("A2", "B1")), QUICK)
    finally:
        del index.read
    assert {index.slides[int(number)] for number in index.slide_of(sorted(drawn))} == {"A1", "B2"}
    provenance = json.loads(run.backbone.with_suffix(".json").read_text())["provenance"]
    assert provenance["excluded_slides"] == ["A2", "B1"]
    assert provenance["pretraining_slides"] == ["A1", "B2"]


def test_a_run_begun_from_another_tells_that_ones_slides_too(index: TileIndex, tmp_path: Path) -> None:
    first, second = run_dir(tmp_path, "first"), run_dir(tmp_path, "second")
    one_step = replace(TINY, steps=1, set=("batchnorm_group_tiles=0",))
    pretrain(index, first, replace(one_step, excluded_slides=("A1",)), QUICK)
    from_first = replace(one_step, weights=str(first.backbone), excluded_slides=("A2", "B1"))
    pretrain(index, second, from_first, QUICK)
    provenance = json.loads(second.backbone.with_suffix(".json").read_text())["provenance"]
    assert provenance["pretraining_slides"] == ["A1", "B2", "A2", "B1"]


def test_batchnorm_statistics_are_those_of_clean_tiles(index: TileIndex, tmp_path: Path) -> None:
    """Mean and variance of what the first convolution makes of all 64 tiles, shown whole."""
    run = run_dir(tmp_path)
    pretrain(index, run, replace(TINY, steps=2), QUICK)
    state = load_file(run.backbone)
    backbone, info = load_backbone(run.backbone)
    tiles = decode_tiles(index.read_many(range(len(index))), index.tile_px)
    with torch.no_grad():
        before_norm = backbone.conv1(clean_view(tiles, 32, (info.mean, info.std)))
    torch.testing.assert_close(state["bn1.running_mean"], before_norm.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["bn1.running_var"], before_norm.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_one_tile_more_than_a_batch_weighs_no_more_than_the_others(tmp_path: Path) -> None:
    """65 tiles, 64 at a time: the last one by itself would be half of the statistics, and too few for a BatchNorm."""
    index = write_synthetic_store(Workspace(tmp_path / "odd"), slides=("A1",), tiles_per_slide=65, tile_px=40)
    stage = Prepared(index, run_dir(tmp_path), TINY, QUICK, Processes(0, 0, 1, CPU))
    assert [len(batch) for batch, _ in stage.clean_batches(2, 1000)] == [33, 32]


def test_micro_batches_give_the_losses_of_one_batch(index: TileIndex, tmp_path: Path) -> None:
    """A LayerNorm backbone: the same keys, queue and gradients, whether 8 tiles come at once or in twice 4."""
    whole, parts = run_dir(tmp_path, "whole"), run_dir(tmp_path, "parts")
    config = replace(TINY, steps=4, backbone="test_vit", view_px=32, set=())
    pretrain(index, whole, config, QUICK)
    pretrain(index, parts, config, replace(QUICK, micro_batches=2))
    for one, two in zip(rows(whole), rows(parts), strict=True):
        if "loss" in one:
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


def test_looking_changes_nothing_of_the_run(index: TileIndex, tmp_path: Path) -> None:
    """Features, keys through BatchNorm by batch, the probe: a run that looks at every step is one that never does."""
    often, never = run_dir(tmp_path, "often"), run_dir(tmp_path, "never")
    pretrain(index, often, replace(TINY, steps=5), replace(QUICK, monitor_every=1))
    pretrain(index, never, replace(TINY, steps=5), replace(QUICK, monitor_every=100))
    assert often.backbone.read_bytes() == never.backbone.read_bytes()
    drifts = [row["key_drift"] for row in rows(often) if "key_drift" in row]
    assert len(drifts) == 6
    assert drifts[0] == 0 < drifts[-1]


def test_probe_that_never_rises_is_said_aloud(index: TileIndex, tmp_path: Path) -> None:
    result = pretrain(index, run_dir(tmp_path), TINY, QUICK, probe=lambda *_: 0.5)
    assert "Adaptation did not help" in result.text


def test_best_look_is_kept_beside_the_last(index: TileIndex, tmp_path: Path) -> None:
    scores = iter([0.4, 0.9, 0.6, 0.5])
    run = run_dir(tmp_path)
    result = pretrain(index, run, TINY, QUICK, probe=lambda *_: next(scores))
    assert "rose from 0.400 to 0.900 (step 3 of 8)" in result.text
    assert load_backbone(run.best_backbone)[1].provenance["steps"] == 3


def test_the_best_look_is_kept_with_statistics_of_clean_tiles(index: TileIndex, tmp_path: Path) -> None:
    """All 64 tiles, as in the last backbone's own; the run itself goes on with those of its crops."""
    scores, run = iter([0.4, 0.5, 0.6, 0.9]), run_dir(tmp_path)  # the last look is the best one, and healthy
    pretrain(index, run, TINY, QUICK, probe=lambda *_: next(scores))
    last = load_file(run.backbone)
    for kept in (load_file(run.best_backbone), load_file(run.healthy_backbone)):
        for name, value in last.items():
            torch.testing.assert_close(kept[name], value, msg=name)


def test_forced_collapse_is_named(index: TileIndex, tmp_path: Path) -> None:
    """Momentum 0 and a hundredfold learning rate without warm-up: the published way to fail, with finite numbers."""
    run = run_dir(tmp_path)
    config = replace(TINY, steps=60, lr=30.0, warmup=0.0, clip_norm=100.0, set=("momentum=0", *TINY.set))
    with pytest.raises(TrainingError, match=r"step \d+: complete collapse: all tiles get nearly .*spread 0\.0"):
        pretrain(index, run, config, replace(QUICK, monitor_every=5))
    assert all(row["loss"] is not None for row in rows(run) if "loss" in row)
    assert not run.backbone.exists()


def test_the_last_healthy_backbone_outlives_a_collapse(
    index: TileIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 5 on the last BatchNorm gives nothing, so all tiles get the same features."""
    run = run_dir(tmp_path)
    after_step = MoCoV2.after_step

    def dying(self: MoCoV2, carries: Sequence[Keys], progress: float) -> None:
        after_step(self, carries, progress)
        if progress > 0.6:
            for parameter in self.backbone.parameters():
                parameter.data.zero_()

    monkeypatch.setattr(MoCoV2, "after_step", dying)
    with pytest.raises(TrainingError, match=r"step 6: complete collapse.*the last healthy backbone is .*healthy"):
        pretrain(index, run, TINY, QUICK)
    assert load_backbone(run.healthy_backbone)[1].provenance["steps"] == 3
    assert any(value.abs().sum() > 0 for value in load_file(run.healthy_backbone).values())
    assert not run.backbone.exists()
    kept, info = load_backbone(run.healthy_backbone)
    tiles = decode_tiles(index.read_many(range(len(index))), index.tile_px)
    with torch.no_grad():
        before_norm = kept.conv1(clean_view(tiles, 32, (info.mean, info.std)))
    torch.testing.assert_close(kept.bn1.running_mean, before_norm.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


VIEWS_THAT_SHOW_ALL = (
    "scale=1,1", "ratio=1,1", "mirror_p=0", "flip_p=0", "quarter_turns=false", "rotation_deg=0", "stain_p=0",
    "jitter_p=0", "grey_p=0", "blur_p=0",
)  # fmt: skip


@pytest.mark.parametrize("views", [VIEWS_THAT_SHOW_ALL, ()])
def test_views_that_are_the_tile_itself_are_called_a_shortcut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], views: tuple[str, ...]
) -> None:
    def noise(slide: int, tile: int, tile_px: int) -> np.ndarray:
        colours = np.random.default_rng([slide, tile]).integers(0, 255, (5, 5, 3), np.uint8)
        return colours.repeat(tile_px // 5, 0).repeat(tile_px // 5, 1)

    index = write_synthetic_store(Workspace(tmp_path), tiles_per_slide=40, tile_px=40, picture=noise)
    config = replace(TINY, backbone="test_vit", set=("queue_size=100",), view_set=views, steps=4, lr=1e-6)
    pretrain(index, run_dir(tmp_path), config, QUICK)
    assert ("shortcut: a tile's other view is found among 100 others" in capsys.readouterr().err) == bool(views)


def test_a_queue_of_one_slide_is_named_with_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = Workspace(tmp_path)
    index = write_synthetic_store(at, slides=("A", "B"), tiles_per_slide=(62, 2), tile_px=40)
    pretrain(index, run_dir(tmp_path, "plain"), replace(TINY, steps=1), QUICK)
    said = capsys.readouterr().err
    assert re.search(r"step 0: the queue is nearly all of one slide \(as good as 1\.\d slides\)", said)
    assert "use --slide-balance 1" in said
    pretrain(index, run_dir(tmp_path, "balanced"), replace(TINY, steps=1, slide_balance=1.0), QUICK)
    assert "nearly all of one slide" not in capsys.readouterr().err


def test_a_plan_or_a_process_of_torchrun_says_that_it_cuts_no_tiles(
    index: TileIndex, tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = index.path.parents[1]
    told = cli("plan", *command(workspace, "--slides", tmp_path)[1:])
    assert told.code == 0
    assert f"--slides {tmp_path}: histossl plan cuts no tiles; with the 64 that are in" in told.err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    told = cli(*command(workspace, "--slides", tmp_path, "--name", "launched", steps=1))
    assert told.code == 0
    assert "a process of torchrun or SLURM cuts no tiles" in told.err


def test_the_time_is_told_in_the_plan_s_line_and_by_the_run_itself(
    index: TileIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(index, run_dir(tmp_path), TINY, QUICK)
    said = capsys.readouterr().err
    assert "time: told after the run's first 20 steps" in said
    assert re.search(r"time: from here about .* \(\d steps of .* s, .*\), until \d\d:\d\d", said)


def test_a_signal_before_the_first_step_is_obeyed(
    index: TileIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_dir(tmp_path)
    prefill = _Pretraining._prefill
    monkeypatch.setattr(
        _Pretraining, "_prefill", lambda stage: (os.kill(os.getpid(), signal.SIGUSR1), prefill(stage))[1]
    )
    result = pretrain(index, run, TINY, QUICK)
    assert not result.finished
    assert "stopped at step 0 of 8" in result.text
    assert pretrain(index, run, TINY, QUICK).finished


def test_processes_that_found_different_checkpoints_do_not_go_on(
    index: TileIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one has none: its step is -1."""
    stage = _Pretraining(Prepared(index, run_dir(tmp_path), TINY, QUICK, Processes(0, 0, 1, CPU)), None)
    stage._refuse_apart(4)
    other = torch.tensor([-1, 1])
    monkeypatch.setattr("histossl.training.pretrain.max_over_processes", lambda steps: torch.maximum(steps, other))
    with pytest.raises(TrainingError, match=r"different steps \(-1 and 4"):
        stage._refuse_apart(4)


def test_damaged_newest_checkpoint_falls_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_dir(tmp_path)
    save_checkpoint(run, {"step": 1, "x": torch.zeros(1000)})
    save_checkpoint(run, {"step": 2, "x": torch.zeros(1000)})
    content = bytearray(run.checkpoint.read_bytes())
    content[len(content) // 2] ^= 0xFF
    run.checkpoint.write_bytes(bytes(content))
    state = load_checkpoint(run)
    assert state is not None
    assert state["step"] == 1
    assert "damaged" in capsys.readouterr().err
    assert run.damaged_checkpoint.exists()
    save_checkpoint(run, {"step": 3})
    state = torch.load(run.previous_checkpoint, weights_only=True)  # the whole one, were the newest to break again
    assert state["step"] == 1
    run.checkpoint.write_bytes(b"")
    run.previous_checkpoint.write_bytes(b"no zip")
    with pytest.raises(TrainingError, match=r"no whole checkpoint to go on from: checkpoint.pt .*previous"):
        load_checkpoint(run)  # never silently from step 0


@pytest.mark.parametrize(("changed", "why"), [({"format": 99}, "in format 99"), ({}, "without best")])
def test_a_checkpoint_of_another_version_is_one_line(tmp_path: Path, changed: dict[str, int], why: str) -> None:
    state = dict.fromkeys(("step", "method", "optimizer", "scaler", "watch", "keys_of_step"), 0) | changed
    if changed:
        state["best"] = 0
    with pytest.raises(TrainingError, match=f"checkpoint.pt: was written by another version of histossl .{why}"):
        _refuse_other_format(run_dir(tmp_path), state)


def test_a_step_that_is_not_finite_leaves_no_trace(
    index: TileIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One poisoned batch: the weights, the queue and BatchNorm's statistics are those of before, and looks go on."""
    run = run_dir(tmp_path)
    forward = MoCoV2.forward

    def poisoned(self: MoCoV2, views: Views) -> Outcome:
        if views.step == 2:
            views = views._replace(images=[image * float("nan") for image in views.images])
        return forward(self, views)

    monkeypatch.setattr(MoCoV2, "forward", poisoned)
    assert pretrain(index, run, TINY, replace(QUICK, monitor_every=1)).finished
    assert all(torch.isfinite(value).all() for value in load_file(run.backbone).values())
    assert all(math.isfinite(row["effective_rank"]) for row in rows(run) if "effective_rank" in row)
    assert next(row for row in rows(run) if row["step"] == 3 and "loss" in row)["loss"] is None


def test_learning_starts_at_the_ceiling_of_its_queue(index: TileIndex, tmp_path: Path) -> None:
    run = run_dir(tmp_path)
    pretrain(index, run, TINY, QUICK)
    first = next(row for row in rows(run) if "loss" in row)
    assert first["loss_ceiling"] == pytest.approx(math.log(17))  # a quarter of 64 tiles
    assert 0 < first["loss"] < first["loss_ceiling"] + 1


def test_what_a_run_has_noticed_it_remembers_when_it_goes_on(index: TileIndex, tmp_path: Path) -> None:
    """A loss that has left its ceiling, and what was said already: else both are told again after each resume."""
    prepared = Prepared(index, run_dir(tmp_path), TINY, QUICK, Processes(0, 0, 1, CPU))
    before, after = Looks(prepared, None), Looks(prepared, None)
    before.look(0)
    before.ceiling.stuck(6.0, 8.0, 10, 1000)
    for step in range(4):
        before.probe_trend.look(0.4 - step / 100, 1.0, 0.5, 0.5, 0.5)
    after.load_state_dict(before.state_dict())
    assert after.ceiling.stuck(7.9, 8.0, 500, 1000) == ""
    assert after.probe_trend.look(0.3, 1.0, 0.5, 0.5, 0.6) == ""
    assert after.state_dict()["noticed"]["probe_trend"]["looks"][0] == (0.4, 1.0)


def damage(workspace: Workspace, rows: Iterable[Any]) -> None:
    """Tiles of slide A1: their bytes become zeros."""
    with workspace.zip_of("A1").open("r+b") as file:
        for row in rows:
            file.seek(int(row["offset"]) + 20)
            file.write(bytes(int(row["length"]) - 20))


def test_a_damaged_tile_is_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = Workspace(tmp_path / "damaged")
    index = write_synthetic_store(workspace, slides=("A1", "A2"), tiles_per_slide=16, tile_px=40)
    damage(workspace, index.table[5:6])
    result = pretrain(TileIndex.open(workspace), run_dir(tmp_path), replace(TINY, set=("queue_size=8",)), QUICK)
    assert result.finished
    said = capsys.readouterr().err
    assert "1 damaged tile was left out" in said
    assert "tile 5 of A1 was left out" in said


def test_a_tile_that_goes_bad_in_the_middle_of_a_run_is_missing_from_its_looks(tmp_path: Path) -> None:
    """Of those that each look embeds, by which the run is judged; so it is when the run goes on from a checkpoint."""
    workspace, run = Workspace(tmp_path / "damaged"), run_dir(tmp_path)
    index = write_synthetic_store(workspace, slides=("A1", "A2"), tiles_per_slide=16, tile_px=40)
    config = replace(TINY, set=("queue_size=8",))
    looks = 0

    def goes_bad(*_: object) -> float:
        nonlocal looks
        looks += 1
        if looks == 2:
            damage(workspace, index.table[5:6])
        if looks == 4:
            raise Killed
        return 0.5

    operation = replace(QUICK, monitor_every=2, checkpoint_every="1")
    with pytest.raises(Killed):
        pretrain(TileIndex.open(workspace), run, config, operation, probe=goes_bad)
    assert pretrain(TileIndex.open(workspace), run, config, operation, probe=goes_bad).finished
    seen = [row for row in rows(run) if "effective_rank" in row]
    assert [row["step"] for row in seen] == [0, 2, 4, 6, 8]
    assert all(math.isfinite(row[name]) for row in seen for name in ("drift", "moved", "key_drift"))
    assert seen[-1]["drift"] < 0.1


def test_a_look_that_can_read_nothing_saves_before_it_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, run = Workspace(tmp_path / "damaged"), run_dir(tmp_path)
    index = write_synthetic_store(workspace, slides=("A1",), tiles_per_slide=32, tile_px=40)
    look = Looks.look

    def goes_bad(self: Looks, done: int) -> None:
        if done == 3:
            damage(workspace, index.table)
        look(self, done)

    monkeypatch.setattr(Looks, "look", goes_bad)
    with pytest.raises(StoreError, match="none of 32 tiles can be read"):
        pretrain(TileIndex.open(workspace), run, replace(TINY, set=("queue_size=8",)), QUICK)
    state = load_checkpoint(run)
    assert state is not None
    assert state["step"] == 3


def test_more_than_one_per_cent_of_damaged_tiles_stops_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = Workspace(tmp_path / "damaged")
    index = write_synthetic_store(workspace, slides=("A1", "A2"), tiles_per_slide=600, tile_px=32)
    damage(workspace, index.table[:30])
    config = replace(TINY, batch_size=64, steps=20, set=("queue_size=64",))
    run = run_dir(tmp_path)
    with pytest.raises(StoreError, match=r"of the .* tiles read so far are damaged \(more than 1%\)"):
        pretrain(TileIndex.open(workspace), run, config, QUICK)
    assert "of A1 was left out" in capsys.readouterr().err  # which, and not only how many
    state = load_checkpoint(run)
    assert state is not None
    assert state["damaged"]


def test_a_damaged_checkpoint_in_a_run_goes_on_from_the_one_before(
    index: TileIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unbroken, run = run_dir(tmp_path, "unbroken"), run_dir(tmp_path)
    pretrain(index, unbroken, TINY, QUICK)
    with pytest.raises(Killed):  # checkpoints at 2 and 4
        pretrain(index, run, TINY, replace(QUICK, checkpoint_every="2", monitor_every=5), probe=die_at_look(1))
    run.checkpoint.write_bytes(run.checkpoint.read_bytes()[:-1000])
    assert pretrain(index, run, TINY, QUICK).finished
    said = capsys.readouterr().err
    assert "falling back to the checkpoint before it" in said
    assert "going on from step 2 of 8" in said
    assert run.backbone.read_bytes() == unbroken.backbone.read_bytes()


# ---- the command line


def test_a_probe_looks_at_no_more_tiles_than_it_says_however_many_slides_there_are(
    index: TileIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("histossl.evaluation.probe.TILES_MOST", 3)
    items = tuple(Item(name, name, name[0], name) for name in index.slides)
    probe = probe_of(index, LabelTable(items, ("A", "B")), 32)
    assert probe is not None
    seen: list[int] = []

    class Counting(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return super().forward(x.mean((2, 3)))

    probe(Counting(3, 2), create_backbone("resnet10t", "random")[1])
    assert sum(seen) == 3


def command(workspace: Path, *more: str, steps: int = 4) -> list[str]:
    options = "--backbone resnet10t --weights random --batch-size 8 --view-px 32 --log-every 1 --monitor-every 50"
    knobs = "--set batchnorm_group_tiles=4 --workers 0"
    return ["pretrain", "-w", str(workspace), "--steps", str(steps), *options.split(), *knobs.split(), *more]


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("--backbone", "resnet5"), 2, "timm has no such model"),
        (("--weights", "nowhere.pth"), 2, "no such file"),
        (("--weights", "imagenet", "--backbone", "resnet18"), 1, "Three ways out"),
        (("--method", "moco3"), 2, "did you mean 'mocov3'"),
        (("--set", "queue=5"), 2, "did you mean 'queue_size'"),
        (("--set", "queue_size=many"), 2, "must be a whole number"),
        (("--set", "queue_size=64"), 2, "must be smaller than the 64 tiles"),
        (("--batch-size", "100"), 2, "only 64 tiles"),
        (("--gpus", "400"), 2, "--gpus 400"),
        (("--gpus", "some"), 2, "must be 'auto' or a whole number"),
        (("--epochs", "2"), 2, "--steps and --epochs: give only one of them"),
        (("--checkpoint-every", "soon"), 2, "must be like 10m"),
        (("--recipe", "mocov9"), 2, "mocov9"),
        (("--recipe", "dino-histology"), 2, "MoCo takes 2"),
        (("--backbone", "deit_tiny_patch16_224", "--view-px", "40"), 2, "does not take that size"),
        (("--set", "batchnorm_group_tiles=1"), 2, "one tile has no variance"),
        (("--decode-on-gpu",), 2, "shows no GPU"),
        (("--recompute",), 2, "resnet10t is no ViT"),
        (("--precision", "fp8"), 2, "--precision "),
        (("--tile-px", "224"), 2, "--tile-px 224: the tiles of this workspace have 40"),
        (("--view-set", "jpg_p=0.5"), 2, "did you mean 'jpeg_p'"),
        (("--slide-mpp", "0.25"), 2, "without --slides none is read"),
        (("--slides", "/nowhere"), 2, "--slides /nowhere: no such folder"),
        (("--weight-decay", "-5"), 2, "--weight-decay -5: must be 0 or more"),
        (("--workers", "-7"), 2, "--workers"),
        (("--lr", "inf"), 2, "--lr inf: must be a number above 0"),
        (("--hours", "inf"), 2, "--hours inf: must be a number above 0"),
        (("--final-lr", "2"), 2, "must be a share of --lr"),
        (("--name", "../x"), 2, "plain directory name"),
    ],
)
def test_mistakes_get_one_clear_line(index: TileIndex, cli, more: tuple[str, ...], code: int, said: str) -> None:
    told = cli(*command(index.path.parents[1], *more))
    assert told.code == code
    assert said in told.err
    assert told.err.count("error:") == 1
    assert "Traceback" not in told.err


def test_a_workspace_without_tiles_says_how_to_make_them(cli, tmp_path: Path) -> None:
    told = cli(*command(tmp_path / "empty"))
    assert told.code == 1
    assert "no tiles yet" in told.err
    assert not (tmp_path / "empty").exists()  # a mistyped name leaves nothing behind


def test_what_comes_next_names_the_run_and_the_batch_gives_its_reason(index: TileIndex, cli) -> None:
    told = cli(*command(index.path.parents[1], "--name", "so called", "--batch-size", "auto", steps=1))
    assert told.code == 0
    assert "--adapted 'so called'" in told.err
    assert "--batch-size auto: 1% of the tiles" in told.err


def test_help_alone_is_no_error(cli) -> None:
    assert "error:" not in cli().err


def test_weights_of_another_architecture_name_the_keys(index: TileIndex, tmp_path: Path, cli) -> None:
    save_backbone(tmp_path / "vit.safetensors", *create_backbone("test_vit", "random"))
    told = cli(*command(index.path.parents[1], "--weights", str(tmp_path / "vit.safetensors"), "--name", "other"))
    assert told.code == 1
    assert "does not fit resnet10t" in told.err
    assert "keys missing" in told.err


@pytest.mark.parametrize(
    "content", [b"slide,label,patient,split\nA.tif,AC,AC-1,test\n", b"", b"PK\x03\x04", bytes(500)]
)
def test_a_file_that_is_no_weights_gets_one_line(index: TileIndex, tmp_path: Path, cli, content: bytes) -> None:
    (tmp_path / "weights.pth").write_bytes(content)
    told = cli(*command(index.path.parents[1], "--weights", str(tmp_path / "weights.pth"), "--name", "no-weights"))
    assert told.code == 1
    assert told.err.startswith("error:")
    assert "weights.pth: " in told.err
    assert "Error" not in told.err  # what Python calls it


@pytest.mark.parametrize("kept", [0.001, 0.5, 0.999], ids=["in-the-header", "half", "all-but-the-end"])
@pytest.mark.parametrize("name", ["backbone.safetensors", "weights.pth", "legacy.pth"])
def test_a_weights_file_that_is_cut_short_gets_one_line(
    index: TileIndex, tmp_path: Path, cli, name: str, kept: float
) -> None:
    """As a download or a copy that broke off leaves it."""
    path = tmp_path / name
    backbone, info = create_backbone("resnet10t", "random")
    if name == "backbone.safetensors":
        save_backbone(path, backbone, info)
    else:
        torch.save(backbone.state_dict(), path, _use_new_zipfile_serialization=name != "legacy.pth")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    told = cli(*command(index.path.parents[1], "--weights", str(path), "--name", "cut-short"))
    assert told.code == 1
    assert told.err.startswith("error:")
    assert f"{name}: is no weights file, or is truncated" in told.err
    assert told.err.count("error:") == 1
    assert "Error" not in told.err  # what Python calls it
    assert not (index.path.parents[1] / "pretrain" / "cut-short").exists()


def test_how_many_keys_were_loaded_is_told(index: TileIndex, tmp_path: Path, cli) -> None:
    save_backbone(tmp_path / "start.safetensors", *create_backbone("resnet10t", "random", seed=5))
    told = cli("plan", *command(index.path.parents[1], "--weights", str(tmp_path / "start.safetensors"))[1:])
    assert told.code == 0
    assert re.search(r"start: .*start\.safetensors, all \d\d keys of the backbone loaded", told.err)


def test_pickled_code_is_refused(index: TileIndex, tmp_path: Path, cli) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    told = cli(*command(index.path.parents[1], "--weights", str(tmp_path / "evil.pth"), "--name", "evil"))
    assert told.code == 1
    assert "refused" in told.err
    assert not (tmp_path / "ran").exists()


def test_config_file_gives_defaults_and_the_command_line_wins(index: TileIndex, tmp_path: Path, cli) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text('name = "from-file"\nseed = 3\nview-px = 32\n')
    assert cli(*command(index.path.parents[1], "--config", str(toml), "--seed", "4", steps=1)).code == 0
    run = PretrainDir(index.path.parents[1] / "pretrain" / "from-file")
    assert json.loads(run.run_json.read_text())["config"]["seed"] == 4
    toml.write_text('set = ["temperature=0.3"]\ncompile = false\nname = "named-as-on-the-command-line"\n')
    assert cli(*command(index.path.parents[1], "--config", str(toml), steps=1)).code == 0
    toml.write_text("sede = 3\n")
    told = cli(*command(index.path.parents[1], "--config", str(toml)))
    assert told.code == 2
    assert "unknown setting 'sede', did you mean 'seed'?" in told.err


@pytest.mark.parametrize(("how", "code"), [(signal.SIGUSR1, 0), (signal.SIGINT, 130)])
def test_a_signal_to_any_process_saves_the_run(index: TileIndex, how: signal.Signals, code: int) -> None:
    """SLURM warns one machine of several: all save, at the same step, and exit well. Of Ctrl-C the launcher hears."""
    workspace = index.path.parents[1]
    name = f"asked-{how.name}"
    options = command(workspace, "--gpus", "2", "--name", name, steps=4000)
    process = subprocess.Popen([sys.executable, "-m", "histossl", *options], stderr=subprocess.PIPE, text=True)
    run = PretrainDir(workspace / "pretrain" / name)
    deadline_s = time.monotonic() + 200
    while not (run.log.exists() and len(rows(run)) > 3) and process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.05)
    last = max(workers_of(psutil.Process(process.pid)), key=lambda worker: worker.pid)
    last.send_signal(how)
    _, said = process.communicate(timeout=200)
    assert process.returncode == code, said
    assert said.count("the same command goes on from there") == 1
    state = load_checkpoint(run)
    assert state is not None
    assert state["step"] == max(row["step"] for row in rows(run))


def test_processes_whose_launcher_is_killed_save_and_end(index: TileIndex, tmp_path: Path) -> None:
    """Nobody could end them any more: they would hold their GPUs, and the run's lock. (And what the labels file lacks
    is told once, not by the launcher and each process.)"""
    workspace, labels = index.path.parents[1], tmp_path / "labels.csv"
    labels.write_text("slide,label,patient\nA1,a,1\nA2,a,2\nB1,b,3\nB2,b,4\n")
    options = command(workspace, "--gpus", "2", "--name", "orphans", "--labels", str(labels), steps=4000)
    process = subprocess.Popen([sys.executable, "-m", "histossl", *options], stderr=subprocess.PIPE, text=True)
    run = PretrainDir(workspace / "pretrain" / "orphans")
    deadline_s = time.monotonic() + 200
    while not (run.log.exists() and len(rows(run)) > 3) and process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.05)
    workers = workers_of(psutil.Process(process.pid))
    assert len(workers) == 2
    process.kill()
    _, said = process.communicate(timeout=200)  # until the last of them has let go of it
    assert not psutil.wait_procs(workers, timeout=60)[1]
    assert said.count("no split column") == 1, said
    assert said.count("guessing scores 0.50") == 1
    state = load_checkpoint(run)
    assert state is not None
    assert 3 < state["step"] < 4000


def test_a_run_that_somebody_is_at_is_refused_before_processes_are_started(index: TileIndex, cli) -> None:
    workspace = index.path.parents[1]
    with alone_in_run(PretrainDir(workspace / "pretrain" / "busy")):
        told = cli(*command(workspace, "--gpus", "2", "--name", "busy"))
    assert told.code == 1
    assert "another process is at work on this run (process " in told.err
    assert "a first look" not in told.err


def test_two_processes_compute_the_run_of_one(index: TileIndex) -> None:
    """Losses, weights and BatchNorm statistics, over gloo: groups of 4 tiles fall alike on one process or two."""
    workspace = index.path.parents[1]
    for name, gpus in (("one", "1"), ("two", "2")):
        line = [sys.executable, "-m", "histossl", *command(workspace, "--name", name, "--gpus", gpus)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    one, two = (PretrainDir(workspace / "pretrain" / name) for name in ("one", "two"))
    for a, b in zip(rows(one), rows(two), strict=True):
        for key in ("loss", "instance_accuracy", "positive_cosine", "grad_norm", "queue_slides"):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=2e-3), key
    first, second = load_file(one.backbone), load_file(two.backbone)
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=1e-3, atol=1e-4, msg=key)


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children(recursive=True) if "histossl" in child.cmdline()]


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)], ids=["dies", "hangs"]
)
def test_a_worker_that_dies_or_hangs_is_replaced_and_the_run_is_the_unbroken_one(
    index: TileIndex, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    """One that hangs deaf to signals is noticed by the other's time-out, and killed."""
    if how == signal.SIGSTOP:
        monkeypatch.setenv("HISTOSSL_TIMEOUT_S", "20")
    workspace = index.path.parents[1]
    line = [sys.executable, "-m", "histossl"]
    options = ("--gpus", "2", "--checkpoint-every", "1", "--name")
    process = subprocess.Popen(
        [*line, *command(workspace, *options, how.name, steps=16)], stderr=subprocess.PIPE, text=True
    )
    run, whole = (PretrainDir(workspace / "pretrain" / name) for name in (how.name, "whole-2"))
    deadline_s = time.monotonic() + 200
    while not run.previous_checkpoint.exists() and process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.02)
    workers_of(psutil.Process(process.pid))[-1].send_signal(how)
    _, said = process.communicate(timeout=400)
    assert process.returncode == 0, said
    assert "going on from step" in said
    if not whole.backbone.exists():
        unbroken = [*line, *command(workspace, *options, "whole-2", steps=16)]
        assert subprocess.run(unbroken, capture_output=True, timeout=400, check=False).returncode == 0
    for (key, one), two in zip(load_file(run.backbone).items(), load_file(whole.backbone).values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, msg=key)
    assert [row["step"] for row in rows(run) if "loss" in row] == list(range(1, 17))


def test_a_run_goes_on_with_another_number_of_processes(index: TileIndex, tmp_path: Path) -> None:
    """One process up to step 4, two from there: the tiles, and so the losses, of one process all the way."""
    workspace = index.path.parents[1]
    config = replace(TINY, steps=8)
    one, run = PretrainDir(workspace / "pretrain" / "alone"), PretrainDir(workspace / "pretrain" / "joined")
    pretrain(index, one, config, replace(QUICK, monitor_every=50))
    with pytest.raises(Killed):
        pretrain(index, run, config, replace(QUICK, monitor_every=5, checkpoint_every="4"), probe=die_at_look(1))
    line = [sys.executable, "-m", "histossl", *command(workspace, "--name", "joined", "--gpus", "2", steps=8)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "going on from step 4 of 8" in done.stderr
    losses = [[row["loss"] for row in rows(each) if "loss" in row] for each in (one, run)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_a_mistake_with_two_processes_is_told_once(index: TileIndex) -> None:
    line = [sys.executable, "-m", "histossl", *command(index.path.parents[1], "--gpus", "2", "--batch-size", "9")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "cannot be shared by 2 processes" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failure_in_the_workers_is_told_once(index: TileIndex) -> None:
    """Collapse is found by both processes at once; no restart would help, and none is tried."""
    more = ("--gpus", "2", "--lr", "1e30", "--warmup", "0", "--clip-norm", "1e30", "--name", "burnt")
    line = [sys.executable, "-m", "histossl", *command(index.path.parents[1], *more, steps=40)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert "not finite" in done.stderr or "collapse" in done.stderr


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_from_outside_and_run_again_equals_the_unbroken_run(index: TileIndex, how: signal.Signals) -> None:
    workspace = index.path.parents[1]
    for attempt in range(5):  # on a busy machine twenty small steps may be over before this process comes to ask
        name = f"{how.name}-{attempt}"
        every = ("--checkpoint-every", "1", "--name", name, "--deterministic")
        line = [sys.executable, "-m", "histossl", *command(workspace, *every, steps=20)]
        process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
        run = PretrainDir(workspace / "pretrain" / name)
        deadline_s = time.monotonic() + 120
        while not run.previous_checkpoint.exists() and process.poll() is None and time.monotonic() < deadline_s:
            time.sleep(0.02)
        process.send_signal(how)
        _, said = process.communicate(timeout=120)
        if not run.backbone.exists():
            break
    assert not run.backbone.exists(), "too late: the run was over"
    if how != signal.SIGKILL:  # a cluster is obeyed; after Ctrl-C nothing chained with && is to follow
        assert process.returncode == (130 if how == signal.SIGINT else 0)
        assert "the same command goes on from there" in said
    assert subprocess.run(line, capture_output=True, timeout=300, check=False).returncode == 0
    whole = PretrainDir(workspace / "pretrain" / "whole")
    if not whole.backbone.exists():
        pretrain(index, whole, replace(TINY, steps=20), replace(QUICK, monitor_every=50))
    assert run.backbone.read_bytes() == whole.backbone.read_bytes()
    steps = [row["step"] for row in rows(run) if "loss" in row]
    assert steps == list(range(1, 21))


def test_hours_become_steps_once_and_a_resumed_run_keeps_them(
    index: TileIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_dir(tmp_path)
    config = replace(TINY, steps=0, hours=0.0004)  # 1.44 s: a look at the start, and four steps with a look each
    monkeypatch.setattr(
        "histossl.training.setup.dry_run.timed_step_s", lambda _: 0.3
    )  # whatever else this machine is doing
    monkeypatch.setattr("histossl.training.setup.dry_run.beside_steps", lambda *_: (0.02, 0.0))
    with pytest.raises(Killed):
        pretrain(index, run, config, replace(QUICK, monitor_every=1, checkpoint_every="1"), probe=die_at_look(2))
    planned = json.loads(run.run_json.read_text())["plan"]["num_steps"]
    assert planned == 4
    monkeypatch.setattr("histossl.training.setup.dry_run.timed_step_s", lambda _: 0.1)
    pretrain(index, run, config, QUICK)
    assert [row["step"] for row in rows(run) if "loss" in row] == list(range(1, planned + 1))


@pytest.mark.parametrize(
    "config",
    [TINY, replace(TINY, method="dinov2", backbone="test_vit", set=("drop_path=0.3",))],
    ids=["sgd", "adamw and drop path"],
)
def test_trying_out_changes_nothing_of_the_run(index: TileIndex, tmp_path: Path, config: PretrainConfig) -> None:
    """`--hours` takes real steps first; the weights it leaves are those of the same number of --steps."""
    timed, plain = run_dir(tmp_path, "timed"), run_dir(tmp_path, "plain")
    pretrain(index, timed, replace(config, steps=0, hours=0.0004), QUICK)
    num_steps = json.loads(timed.run_json.read_text())["plan"]["num_steps"]
    pretrain(index, plain, replace(config, steps=num_steps), QUICK)
    assert timed.backbone.read_bytes() == plain.backbone.read_bytes()


def test_out_of_memory_keeps_the_run_and_says_what_to_change(
    index: TileIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_dir(tmp_path)
    forward = MoCoV2.forward

    def crowded(self: MoCoV2, views: Views) -> Outcome:
        if views.step == 3 and len(views.tiles_B) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, views)

    monkeypatch.setattr(MoCoV2, "forward", crowded)
    with pytest.raises(TrainingError, match=r"step 3: out of GPU memory with 8 tiles a pass; saved.*--accumulate 2"):
        pretrain(index, run, TINY, QUICK)
    assert pretrain(index, run, TINY, replace(QUICK, micro_batches=2)).finished
    assert [row["step"] for row in rows(run) if "loss" in row] == list(range(1, 9))


def broken_off(index: TileIndex, run: PretrainDir, rank: int, error: RuntimeError) -> None:
    """A run on one of two processes whose second step ends in `error`."""

    def steps():
        yield Step(0, 0.1, torch.zeros(()), torch.zeros(()), {}, False)
        raise error

    processes = Processes(rank, rank, 2, torch.device("cpu"))
    list(_Pretraining(Prepared(index, run, TINY, QUICK, processes), None)._guarded(steps(), 0))


def test_a_process_that_does_not_write_never_says_that_it_saved(index: TileIndex, tmp_path: Path) -> None:
    run, error = run_dir(tmp_path), torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(TrainingError, match=r"tiles a pass\. .*--accumulate 2 goes on from the last checkpoint"):
        broken_off(index, run, 1, error)
    assert not run.checkpoint.exists()
    with pytest.raises(TrainingError, match=r"tiles a pass; saved\. .*goes on from there"):
        broken_off(index, run, 0, error)
    assert run.checkpoint.exists()


def test_a_lost_process_is_told_in_one_line(
    index: TileIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]")
    with pytest.raises(SystemExit) as ended:
        broken_off(index, run_dir(tmp_path), 0, lost)
    assert ended.value.code == 75
    assert "another process of this run is lost" in capsys.readouterr().err


def test_a_step_that_no_gpu_takes_deterministically_is_told_in_plain_words(index: TileIndex, tmp_path: Path) -> None:
    said = (
        "_upsample_bicubic2d_aa_backward_out_cuda does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'."
    )
    with pytest.raises(TrainingError, match=r"--deterministic: .* \(_upsample_bicubic2d_aa_backward_out_cuda\).*leave"):
        broken_off(index, run_dir(tmp_path), 0, RuntimeError(said))
    with pytest.raises(RuntimeError, match="some other"):
        broken_off(index, run_dir(tmp_path), 0, RuntimeError("some other fault"))


def test_settings_of_a_run_that_saved_nothing_may_be_given_up(index: TileIndex, tmp_path: Path) -> None:
    run = run_dir(tmp_path)
    pretrain(index, run, TINY, QUICK)
    with pytest.raises(MismatchError) as finished:
        pretrain(index, run, replace(TINY, batch_size=16), QUICK)
    assert "Nothing was saved" not in str(finished.value)
    run.backbone.unlink()
    with pytest.raises(MismatchError, match=r"batch_size was 8, now 16.*Nothing was saved in it yet"):
        pretrain(index, run, replace(TINY, batch_size=16), QUICK)
    with alone_in_run(run), pytest.raises(MismatchError) as under_way:
        pretrain(index, run, replace(TINY, batch_size=16), QUICK)
    assert "Nothing was saved" not in str(under_way.value)


def test_a_signal_that_comes_after_all_were_asked_is_for_the_next_step(
    index: TileIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process would leave the loop while the other takes a step, and waits for it for ever."""
    processes = Processes(1, 1, 2, torch.device("cpu"))
    one = _Pretraining(Prepared(index, run_dir(tmp_path), TINY, QUICK, processes), None)
    stop = Stop()

    def asked(_: Processes, number: int, due: bool) -> tuple[int, bool]:
        stop.ask(signal.SIGTERM)  # while the answer was on its way
        return number, due

    monkeypatch.setattr(pretraining, "agreed", asked)
    assert one._agreed(stop, False, 5) == (False, False)
    assert one._agreed(stop, False, 6) == (True, False)


def test_auto_batch_halves_the_pass_when_memory_runs_out_and_goes_on(
    index: TileIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice, the second time in the middle of a step."""
    auto, run = replace(TINY, batch_size=0), run_dir(tmp_path)
    forward = MoCoV2.forward

    def crowded(self: MoCoV2, views: Views) -> Outcome:
        outcome = forward(self, views)  # BatchNorm has seen the tiles before memory runs out
        if len(views.tiles_B) > 4 or (views.step == 5 and len(views.tiles_B) > 2 and views.part == 1):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return outcome

    monkeypatch.setattr(MoCoV2, "forward", crowded)
    assert pretrain(index, run, auto, QUICK).finished
    said = capsys.readouterr().err
    assert "out of GPU memory with 8 tiles a pass; on with 4, and the same batch of 8" in said
    assert "step 5: out of GPU memory with 4 tiles a pass; on with 2" in said
    written = json.loads(run.run_json.read_text())
    assert written["config"]["batch_size"] == 0
    assert (written["plan"]["batch_size"], written["plan"]["micro_batches"]) == (8, 4)
    assert [row["step"] for row in rows(run) if "loss" in row] == list(range(1, 9))
    assert pretrain(index, run, auto, QUICK).finished  # the same command: no other batch, no other run


def test_memory_that_runs_out_while_weights_change_is_never_saved(
    index: TileIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_dir(tmp_path)
    after_step = MoCoV2.after_step

    def crowded(self: MoCoV2, carries: Sequence[Keys], progress: float) -> None:
        if progress > 0.7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        after_step(self, carries, progress)

    monkeypatch.setattr(MoCoV2, "after_step", crowded)
    with pytest.raises(TrainingError, match=r"step 5: out of GPU memory while.*goes on from the last checkpoint"):
        pretrain(index, run, replace(TINY, batch_size=0), replace(QUICK, checkpoint_every="2"))
    state = load_checkpoint(run)
    assert state is not None
    assert state["step"] == 4


def test_plan_prints_and_writes_nothing(index: TileIndex, cli) -> None:
    workspace = index.path.parents[1]
    told = cli("plan", *command(workspace, "--name", "planned")[1:])
    assert told.code == 0
    assert re.search(r"time: about .* \(4 steps of .* s, 2 looks of ", told.err)
    assert "disk: two checkpoints of" in told.err
    assert "queue 16 keys" in told.err
    assert not (workspace / "pretrain" / "planned").exists()


def test_a_disk_too_full_for_the_checkpoints_is_told_beforehand(
    index: TileIndex, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = index.path.parents[1]
    for free_mb, warned in ((100, True), (1000, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, mb=free_mb: SimpleNamespace(free=mb << 20))
        told = " ".join(cli("plan", *command(workspace, "--name", "planned")[1:]).err.split())
        assert ("warning: disk: two checkpoints of" in told) == warned, told
        assert ("has 100 MB free" in told) == warned


def test_processes_whose_steps_are_slow_ask_each_other_sooner_whether_to_stop(
    index: TileIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [steps_within_reach(step_s) for step_s in (0, 0.1, 2, 12, 300)] == [10, 10, 5, 1, 1]
    prepared = Prepared(index, run_dir(tmp_path), TINY, QUICK, Processes(0, 0, 2, torch.device("cpu")))
    run = _Pretraining(prepared, None)
    run.device = SimpleNamespace(type="cuda")
    clock = itertools.count(0, 30)  # seconds: it is read twice each time they ask
    asked = []
    monkeypatch.setattr(pretraining.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(torch, "tensor", lambda value, device: value)
    monkeypatch.setattr(pretraining, "agreed", lambda *_: (asked.append(done), (0, False))[1])
    for done in range(1000, 1012):  # a run that goes on
        run._agreed(Stop(), False, done)
    assert asked[:3] == [1000, 1001, 1002]


def test_plan_under_a_name_that_is_taken_is_that_of_a_new_run(index: TileIndex, tmp_path: Path, capsys) -> None:
    """Not of the run that has the name: its steps and its batch were fitted to other settings."""
    run = run_dir(tmp_path)
    assert pretrain(index, run, replace(TINY, steps=1), QUICK).finished
    capsys.readouterr()
    show_plan(index, run, replace(TINY, steps=0, epochs=1.0, batch_size=0), QUICK)
    said = " ".join(capsys.readouterr().err.split())
    assert "was made with other settings: steps was 1" in said
    assert "Planned as a new run" in said
    assert "steps 8 (--epochs 1" in said
    show_plan(index, run, replace(TINY, steps=1), QUICK)
    assert "new run" not in capsys.readouterr().err


def test_an_automatic_batch_follows_the_tiles_of_the_subset(index: TileIndex, tmp_path: Path) -> None:
    place = Workspace.holding(index.path).subset("few")
    place.root.mkdir(parents=True)
    write_subset(place, np.arange(0, 64, 4), {})
    write_run(place.run_json, TINY, tiles={"digest": index.digest})
    few = replace(TINY, batch_size=0, steps=1, subset="few")
    one = Processes(0, 0, 1, CPU)
    assert settle_batch(index, run_dir(tmp_path), few, QUICK, one).batch_size == 2  # an eighth of 16
    without = replace(few, subset="", excluded_slides=("A1", "A2"))
    assert settle_batch(index, run_dir(tmp_path), without, QUICK, one).batch_size == 4


def test_a_run_keeps_its_batchnorm_groups_on_another_number_of_processes(index: TileIndex, tmp_path: Path) -> None:
    run, config = run_dir(tmp_path), replace(TINY, batch_size=64, set=("queue_size=8", "batchnorm_group_tiles=32"))
    on = [Processes(0, 0, count, CPU) for count in (1, 4)]
    assert Prepared(index, run, config, QUICK, on[0]).knobs.batchnorm_group_tiles == 32
    begun = Prepared(index, run, config, QUICK, on[1])
    _Pretraining(begun, None)._write_run()
    assert begun.knobs.batchnorm_group_tiles == 16
    on_one = Prepared(index, run, config, QUICK, on[0])
    assert on_one.knobs.batchnorm_group_tiles == 16
    assert {module.group_tiles for module in on_one.method.modules() if isinstance(module, GroupedBatchNorm2d)} == {16}


def test_a_last_phase_with_larger_views_counts_in_the_time_planned(
    index: TileIndex, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = DINOv2.forward

    def watched(made: DINOv2, views: Views) -> Outcome:
        seen.append(views.images[0].shape[-1])
        return forward(made, views)

    monkeypatch.setattr(DINOv2, "forward", watched)
    timed = dry_run._step_s
    monkeypatch.setattr(dry_run, "_step_s", lambda *asked: (timed(*asked), 31.0 if asked[4:] else 1.0)[1])
    knobs = ("high_resolution_px=64", "high_resolution_share=0.1", "hidden_dim=8", "num_local=0")
    options = "--method dinov2 --backbone test_vit --weights random --batch-size 8 --view-px 32 --workers 0 --steps 10"
    sets = itertools.chain.from_iterable(("--set", knob) for knob in knobs)
    told = cli("plan", "-w", index.path.parents[1], *options.split(), *sets)
    assert set(seen) == {32, 64}
    assert told.code == 0, told.err
    assert "10 steps of 4 s" in told.err


def test_methods_lists_each_and_its_knobs(cli) -> None:
    assert "mocov2" in cli("methods").out
    told = cli("methods", "mocov2").out
    for knob in ("queue_size", "momentum", "temperature", "symmetric"):
        assert knob in told
    assert cli("methods", "moco").code == 2


@pytest.mark.slow
def test_two_machines_compute_the_run_of_one(index: TileIndex) -> None:
    """Two of torch's launchers meet on loopback, as two hosts would (examples/slurm.md)."""
    workspace = index.path.parents[1]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    meeting = ["--rdzv-backend=static", "--master-addr=localhost", f"--master-port={port}"]
    ours = ["-m", "histossl", *command(workspace, "--name", "hosts")]
    hosts = [
        subprocess.Popen([*launcher, *meeting, f"--node-rank={rank}", *ours], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    said = [host.communicate(timeout=400)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    alone = PretrainDir(workspace / "pretrain" / "one-host")
    pretrain(index, alone, replace(TINY, steps=4), replace(QUICK, monitor_every=50))
    together = PretrainDir(workspace / "pretrain" / "hosts")
    for (key, one), two in zip(load_file(alone.backbone).items(), load_file(together.backbone).values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4, msg=key)


CROWDED = """
import sys
import torch
from histossl.cli import main
from histossl.methods.mocov2 import MoCoV2

forward = MoCoV2.forward

def crowded(self, views):
    if views.step == 3 and len(views.tiles_B) > 2 and int(__import__("os").environ["RANK"]) == 1:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return forward(self, views)

MoCoV2.forward = crowded
sys.exit(main())
"""


@pytest.mark.slow
def test_a_process_without_memory_has_all_start_again_with_half_the_pass(index: TileIndex, tmp_path: Path) -> None:
    """Its neighbours wait for it and cannot be told, so it dies, and the launcher restarts all of them."""
    workspace = index.path.parents[1]
    (tmp_path / "crowded.py").write_text(CROWDED)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2"]
    options = command(workspace, "--name", "crowded", "--batch-size", "auto", "--checkpoint-every", "1", steps=6)
    done = subprocess.run(
        [*launcher, f"--master-port={port}", str(tmp_path / "crowded.py"), *options],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "step 3: out of GPU memory with 4 tiles a pass; on with 2, and the same batch of 8" in done.stderr
    assert "going on from step 3 of 6" in done.stderr
    run = PretrainDir(workspace / "pretrain" / "crowded")
    assert json.loads(run.run_json.read_text())["plan"]["micro_batches"] == 2
    assert [row["step"] for row in rows(run) if "loss" in row] == list(range(1, 7))


@pytest.mark.parametrize(("content", "slides"), [("A2\nB1.svs\n\n", ["A2", "B1"]), ("A2\nZ9\n", None)])
def test_slides_named_in_a_file_are_left_out(
    index: TileIndex, tmp_path: Path, cli, content: str, slides: list[str] | None
) -> None:
    (tmp_path / "out.txt").write_text(content)
    told = cli(*command(index.path.parents[1], "--exclude", tmp_path / "out.txt", "--name", "without", steps=1))
    if slides is None:
        assert told.code == 2
        assert "'Z9' is none of the tiled slides" in told.err
    else:
        assert told.code == 0, told.err
        run = PretrainDir(index.path.parents[1] / "pretrain" / "without")
        assert json.loads(run.run_json.read_text())["config"]["excluded_slides"] == slides


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "ghostnet_050", "lcnet_050", "convnext_atto", "test_vit"])
def test_feature_dim_is_what_comes_out(name: str) -> None:
    backbone, info = create_backbone(name, "random")
    assert backbone.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, info.feature_dim)
