"""Looking at a run from time to time: are its features healthy, its keys fresh, does the probe say that it helps?"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from histossl.backbones.loading import save_backbone
from histossl.core import console
from histossl.core.errors import TrainingError
from histossl.core.workspace import PretrainDir
from histossl.methods.modules.batchnorm import has_batchnorm, still_as_in_training
from histossl.runtime.distributed import others_wait
from histossl.training.loop import Probe
from histossl.training.monitoring.diagnostics import (
    UNMOVED,
    Ceiling,
    Health,
    KeyDrift,
    ProbeTrend,
    Shortcut,
    Watch,
    weight_change,
)
from histossl.training.monitoring.log import RunLog
from histossl.training.run_files.export import BEST_BATCHNORM_TILES, adapted_info, clean_backbone, plain_backbone
from histossl.training.setup.planner import keys_of_a_tile
from histossl.training.setup.run import MONITOR, Prepared

MONITOR_TILES, KEY_TILES = 512, 128
FEW_SLIDES = 1.5  # in the queue, as many as weigh alike


@dataclass(frozen=True)
class Best:
    """By the probe on labelled training slides. Step 0 is a candidate like any other."""

    step: int = 0
    score: float = math.nan
    at_start: float = math.nan
    last: float = math.nan
    num_looks: int = 0  # after the start

    def with_look(self, done: int, score: float) -> Best:
        if done == 0:
            return Best(0, score, score, score)
        best = replace(self, last=score, num_looks=self.num_looks + 1)
        # No score at all before it: the labels were given when the run went on.
        return replace(best, step=done, score=score) if score > self.score or math.isnan(self.score) else best


class Looks:
    """What is remembered from look to look. `log` is None where nothing is written."""

    def __init__(self, prepared: Prepared, probe: Probe | None) -> None:
        self.prepared = prepared
        self.probe = probe if prepared.processes.writes else None
        self.log: RunLog | None = None
        self.watch = Watch()
        self.ceiling = Ceiling(prepared.method.stuck_by, prepared.method.above_by)
        self.probe_trend = ProbeTrend()
        keys_of_a_step = prepared.plan.batch_size * keys_of_a_tile(asdict(prepared.knobs))
        self.key_drift = KeyDrift(prepared.plan.knobs.get("queue_size", 0) / keys_of_a_step)
        self.best = Best()
        self.shortcut = Shortcut(has_batchnorm(prepared.method.backbone))
        self.loss = math.nan  # of the last logged step
        self.tile_s = 0.0  # of the last look: to embed one
        self.last_look: list[str] = []
        self.told = ""

    def look(self, done: int) -> None:
        """Embed the fixed tiles, log their health, ask the probe, keep the best, and stop a collapse."""
        prepared, run = self.prepared, self.prepared.run
        method = prepared.method
        began_s = time.monotonic()
        features_ND, places_N = monitor_features(prepared, method.backbone)
        self.tile_s = (time.monotonic() - began_s) / len(features_ND)
        health = self.watch.look(features_ND, places_N, method.judges_rank)
        change = weight_change(method.backbone, prepared.start_weights)
        row = {
            "step": done,
            "feature_std": health.spread,
            "effective_rank": health.rank,
            "effective_rank_share": health.rank_share,
            "drift": health.drift,
            "moved": health.moved,
            **self._look_at_keys(done),
            **self._look_at_student(done),
            **method.diagnostics(),
            **{f"weight_change/{name}": value for name, value in change.items()},
        }
        if done and not any(change.values()) and prepared.processes.writes:
            self._warn(done, UNMOVED)
        with others_wait(prepared.processes):
            self._judge(health, row, done)
        if health.collapsed and prepared.operation.stop_on_collapse and done:
            raise _collapse(health, done, run)

    def _judge(self, health: Health, row: dict[str, float], done: int) -> None:
        """What the process that writes does alone: it asks the probe, keeps the best and the healthy, tells, logs."""
        prepared, writes = self.prepared, self.prepared.processes.writes
        run = prepared.run
        if self.probe is not None:
            row["probe"] = score = self.probe(plain_backbone(prepared), prepared.info)
            self.best = self.best.with_look(done, score)
            if done and self.best.step == done:
                backbone = clean_backbone(prepared, BEST_BATCHNORM_TILES)
                save_backbone(run.best_backbone, backbone, adapted_info(prepared, done))
            if done and writes:
                share_done = done / prepared.plan.num_steps
                trend = self.probe_trend.look(score, self.loss, self.best.at_start, self.best.score, share_done)
                if trend:
                    self._warn(done, trend)
        if row.get("queue_slides", math.inf) < FEW_SLIDES and prepared.order.num_slides > 1 and writes:
            self._warn(
                done,
                f"the queue is nearly all of one slide (as good as {row['queue_slides']:.1f} slides), so "
                "negatives betray their slide; use --slide-balance 1, or a larger --set queue_size",
            )
        if self.log:
            self.log.write(row)
        self.last_look = [f"rank {health.rank:.0f}", *([f"probe {row['probe']:.3f}"] if "probe" in row else [])]
        if health.verdict and writes:
            self._warn(done, health.verdict)
        if not health.collapsed and done and writes:
            # With statistics of clean tiles each time: whatever ends the run, what lies there is fit to be used.
            save_backbone(run.healthy_backbone, clean_backbone(prepared, MONITOR_TILES), adapted_info(prepared, done))

    @torch.no_grad()
    def _look_at_keys(self, done: int) -> dict[str, float]:
        """How far the keys of fixed tiles move while one is kept, of a method that keeps any."""
        prepared = self.prepared
        keys: list[Tensor] = []
        places: list[Tensor] = []
        with still_as_in_training(prepared.method), prepared.precision.autocast(prepared.device):
            for batch, places_B in prepared.clean_batches(MONITOR, KEY_TILES):
                if (key_BD := prepared.method.keys_of(batch)) is None:
                    return {}
                keys.append(key_BD)
                places.append(places_B)
        drift = self.key_drift.look(done, torch.cat(keys), torch.cat(places))
        if prepared.processes.writes and (stale := self.key_drift.verdict(drift)):
            self._warn(done, stale)
        return {"key_drift": drift}

    def _look_at_student(self, done: int) -> dict[str, float]:
        """Of a method that exports a teacher: it begins as the student, and shows a dead one late or never."""
        learner = self.prepared.method.learner()
        if learner is self.prepared.method.backbone:
            return {}
        health = self.watch.beside(*monitor_features(self.prepared, learner))
        if health.verdict and done and self.prepared.processes.writes:
            self._warn(done, f"the student, whom the exported teacher follows: {health.verdict}")
        return {"student_feature_std": health.spread, "student_effective_rank_share": health.rank_share}

    def logged(self, row: dict[str, float], done: int) -> None:
        """Judge what a logged step says: a loss at its ceiling, a task too easy, what the method itself finds wrong."""
        self.loss, num_steps = row["loss"], self.prepared.plan.num_steps
        stuck = self.ceiling.stuck(row["loss"], row.get("loss_ceiling"), done, num_steps)
        easy = self.shortcut.taken(row, done, num_steps, helps=self.best.score > self.best.at_start)
        for told in (stuck, easy):
            if told and self.prepared.processes.writes:
                self._warn(done, told)
        self._tell_ailment(row, done)

    def _tell_ailment(self, row: dict[str, float], done: int) -> None:
        """What the method itself finds wrong with a logged step, once for as long as it lasts."""
        ailment = self.prepared.method.ailment(row)
        kind = re.sub(r"\d[\d.,]*", "", ailment)  # the next line has other figures for the same
        if ailment and kind != self.told and self.prepared.processes.writes:
            self._warn(done, ailment)
        self.told = kind

    def _warn(self, done: int, text: str) -> None:
        """On the console, and in the log: the report of a finetuning tells what went wrong with its backbone."""
        console.warn(f"step {done}: {text}")
        if self.log:
            self.log.warn(done, text)

    def state_dict(self) -> dict[str, Any]:
        """Under the names that a checkpoint has them."""
        return {
            "watch": self.watch.state_dict(),
            "keys_of_step": self.key_drift.state_dict(),
            "best": asdict(self.best),
            "noticed": {
                "ceiling": {name: getattr(self.ceiling, name) for name in ("lowest", "told", "lines_above")},
                "probe_trend": dict(vars(self.probe_trend)),
                "shortcut": {"lines": self.shortcut.lines},
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.watch.load_state_dict(state["watch"])
        self.key_drift.load_state_dict(state["keys_of_step"])
        self.best = Best(**state["best"])
        for name, noticed in state.get("noticed", {}).items():  # absent from older checkpoints
            vars(getattr(self, name)).update(noticed)


def _collapse(health: Health, done: int, run: PretrainDir) -> TrainingError:
    kept = run.healthy_backbone
    return TrainingError(
        f"step {done}: {health.verdict}. Stopped; "
        + (f"the last healthy backbone is {kept}" if kept.exists() else "no healthy backbone was seen before")
        + ". Go on anyway with --no-stop-on-collapse, or begin again with other settings under another --name"
    )


@torch.no_grad()
def monitor_features(prepared: Prepared, backbone: nn.Module, num_tiles: int = MONITOR_TILES) -> tuple[Tensor, Tensor]:
    """(N, D) of the tiles that can be read, and their places (N,) among `num_tiles`."""
    backbone.eval()
    with prepared.precision.autocast(prepared.device):
        seen = [(backbone(batch).float(), places) for batch, places in prepared.clean_batches(MONITOR, num_tiles)]
    prepared.method.train()
    return torch.cat([features for features, _ in seen]), torch.cat([places for _, places in seen])


def probe_verdict(best: Best, num_steps: int, run: PretrainDir) -> str:
    """What the labelled training slides say of the last look, whose backbone is left, and of the best one."""
    if best.num_looks == 0:
        return "The probe was never asked: the labels came after the last look"
    probe = "the probe (balanced accuracy by the nearest tiles of other patients)"
    last = f"the last look, whose backbone is what finetune takes, has {best.last:.3f}"
    if math.isnan(best.at_start):
        return f"The labels came when the run had begun, so there is no score of the start to compare with; {last}"
    if best.step == 0:
        return (
            f"Adaptation did not help on the labelled training slides: no look of {probe} scored above the start "
            f"({best.at_start:.3f}); {last}"
        )
    if f"{best.score:.3f}" == f"{best.at_start:.3f}":
        return f"On the labelled training slides {probe} stayed at {best.at_start:.3f}; {last}"
    kept = "" if best.step == num_steps else f"; the best look's backbone is {run.best_backbone}"
    worse = "" if best.last > best.at_start else ", no more than the start"
    chance = f". The highest of {best.num_looks:,} looks is partly luck: a small rise is no evidence"
    return (
        f"On the labelled training slides {probe} rose from {best.at_start:.3f} to {best.score:.3f} "
        f"(step {best.step} of {num_steps}){kept}; {last}{worse}{chance if best.num_looks > 1 else ''}"
    )
