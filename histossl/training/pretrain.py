"""Stage `pretrain`: tiles of a workspace in, one adapted backbone out. The same call goes on where it was cut off."""

from __future__ import annotations

import gc
import itertools
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from histossl import console
from histossl.backbones import (
    BackboneInfo,
    Projected,
    create_backbone,
    recorded_with,
    save_backbone,
    save_tensors,
)
from histossl.config import PretrainConfig, read_run, refuse_other_config, with_overrides, write_run
from histossl.errors import MismatchError, StoreError, TrainingError, UsageError
from histossl.methods import TAUGHT, classes_of, entry_of, gather, self_supervised
from histossl.methods.batchnorm import has_batchnorm, still_as_in_training
from histossl.methods.gather import max_over_processes, mean_over_processes
from histossl.methods.method import Method, Views
from histossl.methods.ramps import half_cosine
from histossl.methods.tokens import Tokens
from histossl.tiles.index import TileIndex
from histossl.tiles.loading import TileBatches, decode_good_tiles, tile_batches
from histossl.tiles.sampling import TileOrder
from histossl.tiles.subset import open_subset
from histossl.training.checkpoint import load_checkpoint, remove_checkpoints, save_checkpoint
from histossl.training.distributed import Processes, is_lost_process, joined
from histossl.training.lock import alone_in
from histossl.training.log import RunLog
from histossl.training.loop import HalfDoneError, Step, train
from histossl.training.monitor import UNMOVED, Ceiling, Health, KeyDrift, ProbeTrend, Watch, weight_change
from histossl.training.pace import Expected, Pace, steps_within
from histossl.training.planner import (
    BATCH_LEAST,
    BATCH_MOST,
    BATCH_SHARE,
    BATCH_USUAL,
    Plan,
    batch_bounds,
    in_batch_reason,
    of_the_pass_reason,
    plan,
)
from histossl.training.schedules import warmup_cosine
from histossl.training.setup import in_parallel, name_of, optimizer_for, precision_for, recompute_cheap, tune
from histossl.training.signals import stop_on_signal
from histossl.views.recipe import clean_view, make_views, normalise, recipe_named, with_settings
from histossl.workspace import PretrainDir

MONITOR_TILES, KEY_TILES = 512, 128
BATCHNORM_TILES = 10_000
BEST_BATCHNORM_TILES = 2048  # of a look's backbone: there may be many, and the other processes wait
# Added to the run's seed: other tiles, in another order, than the training stream begins with.
PREFILL, MONITOR, BATCHNORM = 1, 2, 3

FEW_SLIDES = 1.5  # in the queue, as many as weigh alike

DAMAGED_NAMED = 20  # of the damaged tiles, at the end
AUTO_BATCH = (
    f"--batch-size auto: {BATCH_SHARE:.0%} of the tiles, {BATCH_LEAST} to {BATCH_USUAL} (up to {BATCH_MOST:,} where "
    "GPU memory has room), at most an eighth of the tiles"
)
RECOMPUTED = "recompute: norms and GELU of the ViT's blocks are computed twice, for a third less memory"
CHECKPOINT_FORMAT = 1  # another one for each change that makes an older checkpoint useless
RESTART = 75  # exit code of a worker that wants to be started again (EX_TEMPFAIL)

Probe = Callable[[nn.Module, BackboneInfo], float]


@dataclass(frozen=True)
class Operation:
    """How a run is carried out. It may differ when a run goes on."""

    num_workers: int = 2
    precision: str = "auto"  # auto, fp32, bf16, fp16
    micro_batches: int = 0  # 0: as few as GPU memory allows
    decode_on_gpu: bool = False
    compiled: bool = False
    recompute: bool = False  # also where memory would do; False: by itself where it would not
    deterministic: bool = False
    log_every: int = 10  # steps
    monitor_every: int = 100  # steps
    checkpoint_every_s: float = 600.0
    checkpoint_every_steps: int = 0  # 0: by time alone
    stop_on_collapse: bool = True


@dataclass(frozen=True)
class Result:
    run: PretrainDir
    finished: bool
    text: str  # what a person should know, a line or a few


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


def pretrain(
    index: TileIndex,
    run: PretrainDir,
    config: PretrainConfig,
    operation: Operation = Operation(),
    probe: Probe | None = None,
    teacher: nn.Module | None = None,
) -> Result:
    """Continue pretraining on the tiles of `index` and leave `run.backbone`.

    `probe` scores a backbone on labelled training slides (higher is better); asked at step 0 and at every look.
    `teacher` is what a method learns from that is taught (distillation).
    Raises MismatchError when `run` belongs to other settings or other tiles, TrainingError when the run goes wrong.
    """
    _refuse_other_run(index, run, config)
    if run.backbone.exists():
        return Result(run, True, f"finished before: {run.backbone}")
    with stop_on_signal() as stop, joined() as processes, alone_in(run) if processes.writes else nullcontext():
        settled = settle_batch(index, run, config, operation, processes, teacher)
        return _Pretraining(index, run, settled, operation, probe, processes, teacher).carry_out(config, stop)


def _refuse_other_run(index: TileIndex, run: PretrainDir, config: PretrainConfig) -> None:
    refuse_other_config(run.run_json, config)
    if run.run_json.exists():
        tiles = read_run(run.run_json).get("tiles", {})
        before = tiles.get("digest")
        if before != index.digest:
            raise MismatchError(
                f"{run.root} was begun on other tiles (set {before}, now {index.digest}); "
                "use another --name, or another --workspace for other tiles"
            )
        now = open_subset(index, config.subset).facts() if config.subset else None
        if tiles.get("subset") != now:
            raise MismatchError(
                f"{run.root}: subset {config.subset!r} was made anew after this run had begun; use another --name"
            )


def check(
    index: TileIndex,
    run: PretrainDir,
    config: PretrainConfig,
    operation: Operation,
    num_processes: int,
    teacher: nn.Module | None = None,
) -> None:
    """Refuse what no process could carry out, before any is started."""
    _refuse_other_run(index, run, config)
    if torch.cuda.is_available():  # this process stays on the CPU; its workers will not
        operation = replace(operation, precision="auto", decode_on_gpu=False)
    processes = Processes(0, 0, num_processes, torch.device("cpu"))
    settled = settle_batch(index, run, config, operation, processes, teacher)
    _Pretraining(index, run, settled, operation, None, processes, teacher)


def show_plan(
    index: TileIndex,
    run: PretrainDir,
    config: PretrainConfig,
    operation: Operation,
    num_processes: int = 1,
    probe: Probe | None = None,
    teacher: nn.Module | None = None,
) -> None:
    """What `pretrain` would do, how long it would take, and why. Timed on one process with its share of the batch."""
    with joined() as processes:
        shared = replace(processes, count=num_processes)
        settled = settle_batch(index, run, config, operation, shared, teacher)
        _Pretraining(index, run, settled, operation, probe, shared, teacher).show_plan(config)


def settle_batch(
    index: TileIndex,
    run: PretrainDir,
    config: PretrainConfig,
    operation: Operation,
    processes: Processes,
    teacher: nn.Module | None = None,
) -> PretrainConfig:
    """`--batch-size auto` (0) as a number: the run's own if it was begun, else the largest sensible one that fits."""
    if config.batch_size:
        return config
    if run.run_json.exists():
        return replace(config, batch_size=int(read_run(run.run_json)["plan"]["batch_size"]))
    num_tiles = sum(len(index.tiles_of(slide)) for slide in set(index.slides) - set(config.excluded_slides))
    usual, most = batch_bounds(num_tiles, processes.count)
    if processes.device.type != "cuda":
        return replace(config, batch_size=usual)
    tried = _Pretraining(index, run, replace(config, batch_size=most), operation, None, processes, teacher)
    pieces = fewest_pieces(tried._fits, most, processes.count)
    return replace(config, batch_size=max(usual, most // pieces))


def step_times_s(
    index: TileIndex, run: PretrainDir, config: PretrainConfig, operation: Operation, num_steps: int = 20
) -> tuple[float, float]:
    """Seconds per step as it runs, and with views that never leave the device."""
    with joined() as processes:
        tried = _Pretraining(index, run, config, operation, None, processes)
        tried._fit_memory()
        return tried.step_s(num_steps), tried.step_s(num_steps, resident=True)


class _Pretraining:
    """One run: what `pretrain` would otherwise pass from hand to hand."""

    def __init__(
        self,
        index: TileIndex,
        run: PretrainDir,
        config: PretrainConfig,
        operation: Operation,
        probe: Probe | None,
        processes: Processes,
        teacher: nn.Module | None = None,
    ) -> None:
        self.index, self.run, self.config, self.operation, self.processes = index, run, config, operation, processes
        self.probe = probe if processes.writes else None
        self.device = processes.device
        if operation.decode_on_gpu and self.device.type != "cuda":
            raise UsageError("--decode-on-gpu: this machine shows no GPU; leave it out")
        self.precision = precision_for(operation.precision, self.device)
        excluded = set(config.excluded_slides)
        self.subset = open_subset(index, config.subset) if config.subset else None
        self.keep = np.array([slide not in excluded for slide in index.slides])
        if self.subset is not None:
            self.keep &= self.subset.counts(index) > 0
        self.order = self._order(0)
        if teacher is None:
            self_supervised(config.method)
        taught = (teacher,) if config.method in TAUGHT else ()
        method_class, knobs_class = classes_of(config.method)
        knobs = with_overrides(knobs_class(), config.set)
        backbone, self.info = create_backbone(
            config.backbone, config.weights, config.seed, getattr(knobs, "drop_path", 0.0)
        )
        self.earlier = recorded_with(config.weights) or {}  # of weights that an earlier run left
        _refuse_view_size(backbone, config, config.view_px, "--view-px")
        by_hand = {assignment.partition("=")[0].strip().replace("-", "_") for assignment in config.set}
        self.plan_of = partial(
            plan,
            config,
            self.order.num_tiles,
            self.order.num_slides,
            {name: value for name, value in asdict(knobs).items() if name in by_hand},
            processes.count,
            batchnorm=has_batchnorm(backbone),
            training=method_class.trained_with(knobs),
            to_fit=method_class.planned,
            batchnorm_group=getattr(knobs, "batchnorm_group_tiles", 0),
            company=self.order.company(),
        )
        self.plan = self.plan_of(micro_batches=operation.micro_batches or 1)
        self.knobs = knobs = replace(knobs, **self.plan.knobs)
        self.start_weights = {name: value.detach().clone() for name, value in backbone.named_parameters()}
        recipe = recipe_named(config.recipe or entry_of(config.method).default_recipe, config.view_px)
        recipe = with_settings(recipe, config.view_set)
        torch.manual_seed(config.seed)  # of the heads
        method: Method = method_class(backbone, self.info.feature_dim, recipe, knobs, *taught)
        for side_px in {view.size_px for view in method.views().views} - {config.view_px}:
            _refuse_view_size(backbone, config, side_px, "--set local_px")
        self.method = method.to(self.device).train()
        tune(self.method, self.device, self.precision.name, operation.compiled, operation.deterministic)
        self.optimizer = optimizer_for(self.method, self.plan, self.device)
        self.scaler = self.precision.scaler(self.device)
        if operation.recompute:
            self._recompute(asked=True)
        self.watch = Watch()
        self.ceiling = Ceiling(method.stuck_by, method.above_by)
        self.probe_trend = ProbeTrend()
        self.loss = math.nan  # of the last logged step
        self.best = Best()
        self.last_look: list[str] = []
        self.met_damaged: list[dict[int, str]] = []  # of each loader, which goes on filling it
        self.told = ""
        self.key_drift = KeyDrift(self.plan.knobs.get("queue_size", 0) / self.plan.batch_size)
        self.asked = config
        self.pace = Pace(0, self.plan.num_steps, operation.monitor_every)
        self.log: RunLog | None = None

    # ---- the recipe

    def carry_out(self, asked: PretrainConfig, stop: threading.Event) -> Result:
        """`asked` is what run.json keeps: the config before `--batch-size auto` became a number."""
        self.asked = asked
        self._fit_memory()
        if self.config.hours:
            self._fit_hours(None)
        if self.processes.writes:
            self.log = RunLog(self.run)
            self._announce()
            self._write_run()
        first = self._resume()
        self._refuse_apart(-1 if first is None else first)
        if first is None:
            self._prefill()
            with self.pace.look():
                self._look(0)
            first = 0
        try:
            if self._all_stop(stop, 0):  # asked before the first step
                done = first
                self._save(done)
            else:
                done = self._train_in_memory(first, stop)
        finally:
            self._tell_damaged()
        if done < self.plan.num_steps:
            return Result(
                self.run,
                False,
                f"stopped at step {done} of {self.plan.num_steps} and saved; the same command goes on from there",
            )
        return Result(self.run, True, self._finish())

    def _train_in_memory(self, first: int, stop: threading.Event) -> int:
        """`_train`; where memory runs out under `--batch-size auto`, on with half the tiles a pass."""
        while True:
            try:
                return self._train(first, stop)
            except _OutOfMemoryError as error:
                first = error.done
            self._halve_pass(first)  # out here the error is gone, and with it what its traceback held in memory

    def _halve_pass(self, done: int) -> None:
        """The same global batch in twice as many micro-batches, from the state that was just saved.

        Other processes wait for the one that ran out, and cannot be told: it dies, and all start again with the pass
        that it has written down.
        """
        planned, pieces = self.plan, 2 * self.plan.micro_batches
        if planned.batch_size % (pieces * planned.num_processes):
            raise TrainingError(
                f"step {done}: out of GPU memory with {planned.tiles_per_pass} tiles a pass, which cannot be halved"
                f"{self._whether_saved()}. Use a smaller --view-px or --backbone under another --name"
            )
        self.plan = replace(planned, micro_batches=pieces, tiles_per_pass=planned.tiles_per_pass // 2)
        self._write_run()
        console.warn(
            f"step {done}: out of GPU memory with {planned.tiles_per_pass} tiles a pass; on with "
            f"{self.plan.tiles_per_pass}, and the same batch of {planned.batch_size}"
        )
        if self.processes.count > 1:
            raise SystemExit(RESTART)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _train(self, first: int, stop: threading.Event) -> int:
        """From step `first` to the end, or to a signal. Returns how many steps are done."""
        operation, num_steps = self.operation, self.plan.num_steps
        tiles = self._tile_batches(first)
        self.met_damaged.append(tiles.damaged)
        steps = train(
            self.method,
            self.optimizer,
            self._views(tiles, first),
            partial(_lr_at, self.plan),
            first,
            num_steps,
            self.device,
            self.precision,
            self.scaler,
            self.config.clip_norm,
            self.plan.micro_batches,
            self.config.seed,
            in_parallel(self.method) if self.processes.count > 1 else None,
            partial(_weight_decay_at, self.plan),
        )
        self.pace = Pace(first, num_steps, operation.monitor_every, self.pace.look_s)
        saved_s = time.monotonic()
        stepped_s, waited_s, logged, done = 0.0, 0.0, first, first
        shown = console.progress("pretraining", num_steps, "steps", visible=self.processes.writes, framed=True)
        with tiles, shown as bar:
            bar.advance(first)
            for step in self._guarded(steps, first):
                self.pace.stepped()
                done = step.number + 1
                last = done == num_steps
                # fp16 finds its scale by steps that are not finite: no fault of the run, while there is room below.
                searching = self.scaler.is_enabled() and self.scaler.get_scale() > 0.5
                if step.skipped and not searching and self.processes.writes:
                    console.warn(f"step {done}: loss or gradient not finite; the step was left out")
                if done % operation.log_every == 0 or last:
                    took_s = max(self.pace.stepped_s - stepped_s, 1e-9)
                    speed = {
                        "tiles_per_s": (done - logged) * self.plan.batch_size / took_s,
                        "data_wait": (tiles.wait_s - waited_s) / took_s,
                    }
                    row = self._row(step, speed)
                    self.loss = row["loss"]
                    if self.log:
                        self.log.write(row)
                    logged, stepped_s, waited_s = done, self.pace.stepped_s, tiles.wait_s
                    bar.note = ", ".join((_note(row), *self.last_look))
                    stuck = self.ceiling.stuck(row["loss"], row.get("loss_ceiling"), done, num_steps)
                    if stuck and self.processes.writes:
                        console.warn(f"step {done}: {stuck}")
                    self._tell_ailment(row, done)
                if self.pace.is_look(done):
                    with self.pace.look():
                        self._look(done)
                if (expected := self.pace.expected(done)) and self.processes.writes:
                    larger = self._larger_share()
                    later = f"; the last {larger:.0%} of the steps have larger views and take longer" if larger else ""
                    console.say(f"from here {expected}{later}")
                bar.advance()
                by_steps = operation.checkpoint_every_steps and done % operation.checkpoint_every_steps == 0
                by_time = time.monotonic() - saved_s >= operation.checkpoint_every_s
                stopping = self._all_stop(stop, done)
                if last or stopping or by_steps or by_time:
                    self._save(done)
                    saved_s = time.monotonic()
                if stopping:
                    break
                self.pace.resumed()
        return done

    def _damaged(self) -> dict[int, str]:
        """Tile number -> what is wrong with it, of all that this process and the run before it have met."""
        damaged: dict[int, str] = {}
        for met in self.met_damaged:
            damaged |= met
        return damaged

    def _tell_damaged(self) -> None:
        """Each process tells of the tiles that it has met."""
        damaged = list(self._damaged().items())
        if damaged:
            console.warn(
                f"{len(damaged)} damaged tile{'s were' if len(damaged) > 1 else ' was'} left out, others shown:"
            )
        for number, what in damaged[:DAMAGED_NAMED]:
            slide = self.index.slides[int(self.index.slide_of([number])[0])]
            console.warn(f"tile {number} of {slide} was left out: {what}")
        if len(damaged) > DAMAGED_NAMED:
            console.warn(f"... and {len(damaged) - DAMAGED_NAMED} more")

    def _guarded(self, steps: Iterator[Step], first: int) -> Iterator[Step]:
        """Out of memory, too many NaN, tiles that cannot be read: the state before the step is whole, so keep it."""
        done = first
        try:
            for step in steps:
                done = step.number + 1
                yield step
        except torch.OutOfMemoryError as error:
            self.optimizer.zero_grad(set_to_none=True)
            self._save(done)
            if self.asked.batch_size == 0 and not self.operation.micro_batches:
                raise _OutOfMemoryError(done) from error
            raise TrainingError(
                f"step {done}: out of GPU memory with {self.plan.tiles_per_pass} tiles a pass"
                f"{self._whether_saved()}. The same command with --accumulate {2 * self.plan.micro_batches} goes on "
                f"from {'there' if self.processes.writes else 'the last checkpoint'}"
            ) from error
        except HalfDoneError:
            raise
        except (TrainingError, StoreError):
            self._save(done)
            raise
        except RuntimeError as error:
            if self.processes.count > 1 and is_lost_process(error):
                if self.processes.writes:
                    console.warn(f"step {done}: another process of this run is lost; this one ends too")
                raise SystemExit(RESTART) from error
            raise

    def _whether_saved(self) -> str:
        """Only one of several processes writes checkpoints, and the others cannot ask it once one is in trouble."""
        return "; saved" if self.processes.writes else ""

    def _finish(self) -> str:
        """Leave the backbone (its presence means finished), and say what came of it."""
        backbone = self._clean_backbone()
        if self.processes.writes:
            if kept := self.method.kept():
                save_tensors(self.run.head, kept)
            save_backbone(self.run.backbone, backbone, self._adapted_info(self.plan.num_steps))
            remove_checkpoints(self.run)
        lines = [f"adapted backbone: {self.run.backbone}"]
        if verdict := self.method.verdict():
            lines.append(verdict)
        if self.probe is not None:
            lines.append(_probe_verdict(self.best, self.plan.num_steps, self.run))
        return "\n".join(lines)

    # ---- state

    def _write_run(self) -> None:
        write_run(
            self.run.run_json,
            self.asked,
            plan=asdict(self.plan),
            knobs=asdict(self.knobs),
            tiles={
                "digest": self.index.digest,
                "num_tiles": self.order.num_tiles,
                "num_slides": self.order.num_slides,
                "subset": self.subset and self.subset.facts(),
            },
            device=name_of(self.device),
            precision=self.precision.name,
        )

    def _resume(self) -> int | None:
        state = load_checkpoint(self.run)
        if state is None:
            if self.log:
                self.log.begin_at(0)
            return None
        _refuse_other_format(self.run, state)
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.watch.load_state_dict(state["watch"])
        self.key_drift.keys_of_step = state["keys_of_step"]
        self.best = Best(**state["best"])
        self.met_damaged.append(state.get("damaged", {}))
        first = int(state["step"])
        if self.log:
            self.log.begin_at(first + 1)
            console.say(f"going on from step {first} of {self.plan.num_steps}")
        return first

    def _refuse_apart(self, first: int) -> None:
        """All processes go on from the same step, or the gradients of different networks would be averaged."""
        steps = torch.tensor([first, -first], device=self.device)
        latest, earliest = max_over_processes(steps).tolist()
        if latest != -earliest:
            raise TrainingError(
                f"{self.run.root}: the processes found checkpoints of different steps ({-earliest} and {latest}; -1 is "
                "none); all machines must see the same --workspace, or one's copy is old"
            )

    def _save(self, done: int) -> None:
        if self.processes.writes:
            state = {
                "format": CHECKPOINT_FORMAT,
                "step": done,
                "method": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "watch": self.watch.state_dict(),
                "keys_of_step": self.key_drift.keys_of_step,
                "best": asdict(self.best),
                "damaged": self._damaged(),
            }
            save_checkpoint(self.run, state)

    def _all_stop(self, stop: threading.Event, done: int) -> bool:
        """Whether any process was asked to stop: they must save and leave the loop at the same step.

        GPUs are asked at every tenth step, for the answer makes the host wait for them.
        """
        if self.processes.count == 1:
            return stop.is_set()
        if self.device.type == "cuda" and done % 10:
            return False
        flag = torch.tensor(float(stop.is_set()), device=self.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        if flag.item() and not stop.is_set():
            stop.set()
        return bool(flag.item())

    # ---- tiles and views

    def _order(self, purpose: int) -> TileOrder:
        tiles = None if self.subset is None else self.subset.tiles
        return TileOrder(self.index, self.config.seed + purpose, self.config.slide_balance, self.keep, tiles)

    def _tile_batches(self, first: int, order: TileOrder | None = None, num_steps: int | None = None) -> TileBatches:
        parts = self.plan.micro_batches
        return tile_batches(
            self.index,
            order or self.order,
            self.plan.batch_size // parts,
            first * parts,
            ((self.plan.num_steps - first) if num_steps is None else num_steps) * parts,
            self.processes.rank,
            self.processes.count,
            self.operation.num_workers,
            pin_memory=self.device.type == "cuda",
            decode_on=self.device if self.operation.decode_on_gpu else None,
        )

    def _views(self, tiles: TileBatches, first: int = 0) -> Iterator[Views]:
        """What the method sees of each batch, from step `first` on."""
        for batch, (pixels, numbers, positions) in enumerate(tiles):
            recipe = self.method.views((first + batch // self.plan.micro_batches) / self.plan.num_steps)
            on_device = pixels.to(self.device, non_blocking=True)
            statistics = (self.info.mean, self.info.std)
            images = make_views(on_device, recipe, self.config.seed, positions, statistics)
            images = [image.contiguous(memory_format=torch.channels_last) for image in images]
            owners = torch.stack([numbers, torch.from_numpy(self.index.slide_of(numbers.numpy()))])
            if self.device.type == "cuda":
                owners = owners.pin_memory()
            tiles_B, slides_B = owners.to(self.device, non_blocking=True)
            yield Views(images, tiles_B, slides_B, step=0, positions_B=positions, seed=self.config.seed)

    def _clean_batches(self, purpose: int, num_tiles: int, size: int = 64) -> Iterator[Tensor]:
        """Tiles as they are, at the size of the views, normalised: the same ones whenever asked."""
        order = self._order(purpose)
        numbers = order.tile_numbers(0, min(num_tiles, order.num_tiles))
        for some in np.array_split(numbers, math.ceil(len(numbers) / size)):  # alike: BatchNorm weighs them alike
            pixels, good = decode_good_tiles(self.index, some)
            if len(good):
                view = clean_view(pixels.to(self.device), self.config.view_px)
                yield normalise(view, self.info.mean, self.info.std)

    @torch.no_grad()
    def _prefill(self) -> None:
        """Show the method what it wants to see before step 0 (MoCo: a queue of real keys)."""
        wanted = self.method.num_prefill_tiles()
        if not wanted:
            return
        num_steps = math.ceil(wanted / self.plan.batch_size)
        tiles = self._tile_batches(0, self._order(PREFILL), num_steps)
        self.met_damaged.append(tiles.damaged)
        with (
            tiles,
            console.progress("a first look at the tiles", num_steps, "batches", visible=self.processes.writes) as bar,
        ):
            for number, views in enumerate(self._views(tiles)):
                with self.precision.autocast(self.device):
                    self.method.prefill(views._replace(step=number))
                if (number + 1) % self.plan.micro_batches == 0:
                    bar.advance()

    # ---- trying out, before step 0

    def _fit_memory(self) -> None:
        """Into how many micro-batches a batch is cut: as the run was before, or on a GPU until a pass fits on all."""
        before = read_run(self.run.run_json)["plan"] if self.run.run_json.exists() else {}
        if before.get("recompute"):
            self._recompute()
        if self.operation.micro_batches:
            return
        if before.get("num_processes") == self.processes.count and before["batch_size"] == self.plan.batch_size:
            pieces = int(before["micro_batches"])
        elif self.device.type == "cuda":
            if not self._fits(self.plan.tiles_per_pass):
                self._recompute()
            pieces = fewest_pieces(self._fits, self.plan.batch_size, self.processes.count)
        else:
            return
        reasons = self.plan.reasons
        training = self.method.trained_with(self.knobs)
        if training.of_the_pass and pieces > 1:
            told = of_the_pass_reason(training, self.plan.batch_size, pieces)
            reasons = (*(each for each in reasons if "tiles of a pass, not" not in each), told)
        if training.in_batch and pieces > 1:
            before_cut, cut = (in_batch_reason(self.plan.batch_size, each) for each in (1, pieces))
            reasons = tuple(cut if reason == before_cut else reason for reason in reasons)
        self.plan = replace(
            self.plan,
            micro_batches=pieces,
            tiles_per_pass=self.plan.batch_size // pieces // self.processes.count,
            reasons=reasons,
        )

    def _recompute(self, asked: bool = False) -> None:
        """Before a batch is cut, which some methods pay for: what is cheap of a ViT's activations is not kept."""
        if asked and self.operation.compiled:
            raise UsageError("--recompute: what is compiled does so by itself; leave it or --compile out")
        if self.plan.recompute or self.operation.compiled:
            return
        if not recompute_cheap(self.method.learner()):
            if asked:
                raise UsageError(f"--recompute: {self.config.backbone} is no ViT, whose blocks it is for; leave it out")
            return
        self.plan = replace(self.plan, recompute=True, reasons=(*self.plan.reasons, RECOMPUTED))

    def _fits(self, tiles_per_pass: int) -> bool:
        failed = torch.zeros((), device=self.device)
        with self._unchanged(), gather.alone():  # who runs out of memory would keep the others waiting
            try:
                optimizer_state = self._like_optimizer_state()  # which comes with the first step, and stays
                side = self.index.tile_px
                tiles = torch.zeros(tiles_per_pass, 3, side, side, dtype=torch.uint8, device=self.device)
                numbers = torch.arange(tiles_per_pass)
                images = make_views(tiles, self.method.views(1.0), 0, numbers, (self.info.mean, self.info.std))
                on_device = numbers.to(self.device)
                self._pass(Views(images, on_device, on_device, 0, positions_B=numbers))
                del optimizer_state
            except torch.OutOfMemoryError:
                failed += 1
        torch.cuda.empty_cache()
        return not bool(mean_over_processes(failed))

    def _like_optimizer_state(self) -> list[Tensor]:
        """As much memory as the optimizer will take: one value a weight for sgd and lars, two for adamw."""
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return [torch.empty_like(each) for each in trained for _ in range(2 if self.plan.optimizer == "adamw" else 1)]

    def _fit_hours(self, step_s: float | None) -> None:
        """Steps from `--hours`: those of the run's first start, else what the time of a few steps gives."""
        if self.run.run_json.exists():
            num_steps = int(read_run(self.run.run_json)["plan"]["num_steps"])
        else:
            step_s = self._slowest(step_s or self.step_s())
            look_s, rest_s = (self._slowest(each) for each in self._beside_steps())
            num_steps = steps_within(self.config.hours * 3600, step_s, look_s, self.operation.monitor_every, rest_s)
        before = self.plan
        self.plan = self.plan_of(micro_batches=before.micro_batches, num_steps=num_steps)
        if before.recompute:
            self.plan = replace(self.plan, recompute=True, reasons=(*self.plan.reasons, RECOMPUTED))
        self.knobs = replace(self.knobs, **self.plan.knobs)
        vars(self.method).update(config=self.knobs)  # the momentum follows the length

    def _slowest(self, seconds: float) -> float:
        """Of all processes: the others wait for the one that asks the probe."""
        return float(max_over_processes(torch.tensor(seconds, device=self.device)))

    def step_s(self, num_steps: int = 20, at_most_s: float = 20.0, resident: bool = False) -> float:
        """Seconds per step: tiles, views, forward, backward; of a last phase with larger views its share of the steps.

        Nothing of the run is changed by it. `resident`: with the same views again and again, which never leave the
        device: what loading costs is the rest.
        """
        step_s, share = self._step_s(num_steps, at_most_s, resident), self._larger_share()
        if share:
            step_s += share * (self._step_s(num_steps, at_most_s, resident, self.plan.num_steps) - step_s)
        return step_s

    def _larger_share(self) -> float:
        """Share of the steps, in thousandths, in which the method sees other views than in the first."""
        first = self.method.views()
        return sum(self.method.views(thousandth / 1000) != first for thousandth in range(1000)) / 1000

    def _step_s(self, num_steps: int, at_most_s: float, resident: bool, first: int = 0) -> float:
        tiles = self._tile_batches(0, self._order(PREFILL), num_steps + 1)
        taken: list[float] = []
        with tiles, self._unchanged(), gather.alone():  # processes may differ in when they have seen enough
            views = self._views(tiles, first)
            if resident:
                views = itertools.repeat(next(views))
            began_s = time.perf_counter()
            for _ in range(num_steps + 1):
                for _ in range(self.plan.micro_batches):
                    self._pass(next(views))
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                now_s = time.perf_counter()
                taken.append(now_s - began_s)
                began_s = now_s
                if sum(taken) > at_most_s:
                    break
        return float(np.median(taken[1:] or taken))  # the first one warms up

    def _pass(self, views: Views) -> None:
        with self.precision.autocast(self.device):
            loss = self.method(views).loss
        loss.backward()

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        before = {name: value.detach().clone() for name, value in self.method.state_dict().items()}
        try:
            yield
        finally:
            self.method.load_state_dict(before)
            self.optimizer.zero_grad(set_to_none=True)

    # ---- looking at the run

    def _look(self, done: int) -> None:
        """Embed the fixed tiles, log their health, ask the probe, keep the best, and stop a collapse."""
        health = self.watch.look(self._monitor_features(self.method.backbone), self.method.judges_rank)
        change = self._weight_change()
        row = {
            "step": done,
            "feature_std": health.spread,
            "effective_rank": health.rank,
            "effective_rank_share": health.rank_share,
            "drift": health.drift,
            "moved": health.moved,
            **self._look_at_keys(done),
            **self._look_at_student(done),
            **self.method.diagnostics(),
            **{f"weight_change/{name}": value for name, value in change.items()},
        }
        if done and not any(change.values()) and self.processes.writes:
            console.warn(f"step {done}: {UNMOVED}")
        if self.probe is not None:
            row["probe"] = score = self.probe(self._plain_backbone(), self.info)
            self.best = self.best.with_look(done, score)
            if done and self.best.step == done:
                save_backbone(
                    self.run.best_backbone, self._clean_backbone(BEST_BATCHNORM_TILES), self._adapted_info(done)
                )
            if done and self.processes.writes:
                share_done = done / self.plan.num_steps
                trend = self.probe_trend.look(score, self.loss, self.best.at_start, self.best.score, share_done)
                if trend:
                    console.warn(f"step {done}: {trend}")
        if row.get("queue_slides", math.inf) < FEW_SLIDES and self.order.num_slides > 1 and self.processes.writes:
            console.warn(
                f"step {done}: the queue is nearly all of one slide (as good as {row['queue_slides']:.1f} slides), so "
                "negatives betray their slide; use --slide-balance 1, or a larger --set queue_size"
            )
        if self.log:
            self.log.write(row)
        self.last_look = [f"rank {health.rank:.0f}", *([f"probe {row['probe']:.3f}"] if "probe" in row else [])]
        if health.verdict and self.processes.writes:
            console.warn(f"step {done}: {health.verdict}")
        if health.collapsed and self.operation.stop_on_collapse and done:
            raise self._collapse(health, done)
        if not health.collapsed and done and self.processes.writes:
            save_backbone(self.run.healthy_backbone, self._plain_backbone(), self._adapted_info(done))

    @torch.no_grad()
    def _look_at_keys(self, done: int) -> dict[str, float]:
        """How far the keys of fixed tiles move while one is kept, of a method that keeps any."""
        keys: list[Tensor] = []
        with still_as_in_training(self.method), self.precision.autocast(self.device):
            for batch in self._clean_batches(MONITOR, KEY_TILES):
                if (key_BD := self.method.keys_of(batch)) is None:
                    return {}
                keys.append(key_BD)
        drift = self.key_drift.look(done, torch.cat(keys))
        if self.processes.writes and (stale := self.key_drift.verdict(drift)):
            console.warn(f"step {done}: {stale}")
        return {"key_drift": drift}

    def _look_at_student(self, done: int) -> dict[str, float]:
        """Of a method that exports a teacher: it begins as the student, and shows a dead one late or never."""
        if self.method.learner() is self.method.backbone:
            return {}
        health = self.watch.beside(self._monitor_features(self.method.learner()))
        if health.verdict and done and self.processes.writes:
            console.warn(f"step {done}: the student, whom the exported teacher follows: {health.verdict}")
        return {"student_feature_std": health.spread, "student_effective_rank_share": health.rank_share}

    @torch.no_grad()
    def _monitor_features(self, backbone: nn.Module, num_tiles: int = MONITOR_TILES) -> Tensor:
        backbone.eval()
        with self.precision.autocast(self.device):
            features = [backbone(batch).float() for batch in self._clean_batches(MONITOR, num_tiles)]
        self.method.train()
        return torch.cat(features)

    def _weight_change(self) -> dict[str, float]:
        return weight_change(self.method.backbone, self.start_weights)

    def _row(self, step: Step, speed: dict[str, float]) -> dict[str, float]:
        row = {
            "step": step.number + 1,
            "loss": float(mean_over_processes(step.loss)),
            "lr": step.lr,
            "grad_norm": float(step.grad_norm),
            **{name: float(mean_over_processes(value)) for name, value in step.metrics.items()},
            **speed,
        }
        ceiling = self.method.loss_ceiling()
        if ceiling is not None:
            row.setdefault("loss_ceiling", ceiling)  # unless it depends on the batch
        if self.device.type == "cuda":
            row["gpu_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return row

    def _tell_ailment(self, row: dict[str, float], done: int) -> None:
        """What the method itself finds wrong with a logged step, once for as long as it lasts."""
        ailment = self.method.ailment(row)
        kind = re.sub(r"\d[\d.,]*", "", ailment)  # the next line has other figures for the same
        if ailment and kind != self.told and self.processes.writes:
            console.warn(f"step {done}: {ailment}")
        self.told = kind

    def _collapse(self, health: Health, done: int) -> TrainingError:
        kept = self.run.healthy_backbone
        return TrainingError(
            f"step {done}: {health.verdict}. Stopped; "
            + (f"the last healthy backbone is {kept}" if kept.exists() else "no healthy backbone was seen before")
            + ". Go on anyway with --no-stop-on-collapse, or begin again with other settings under another --name"
        )

    # ---- what is left of it

    def _plain_backbone(self) -> nn.Module:
        """The backbone as timm makes it (no grouped BatchNorm), with the present weights, in evaluation mode.

        With the head layers behind it that the method wants kept.
        """
        plain, _ = create_backbone(self.config.backbone, "random")
        plain.load_state_dict(self.method.backbone.state_dict())
        projection = self.method.projection()
        if projection is not None:
            plain = Projected(plain, projection)
        return plain.to(self.device).eval()

    def _clean_backbone(self, num_tiles: int = BATCHNORM_TILES) -> nn.Module:
        """The plain backbone as it is worth keeping: BatchNorm's statistics are those of clean tiles."""
        backbone = self._plain_backbone()
        if has_batchnorm(backbone):
            _reestimate_batchnorm(backbone, self._clean_batches(BATCHNORM, num_tiles))
        return backbone

    def _adapted_info(self, done: int) -> BackboneInfo:
        slides = np.array(self.index.slides)
        own = slides[self.keep].tolist()
        before = sorted(set(self.earlier.get("pretraining_slides") or ()) - set(own))
        return replace(
            self.info,
            input_px=self.config.view_px,
            mpp=self.index.mpp,
            method=self.config.method,
            provenance={
                **self.info.provenance,
                **({"teacher": self.earlier["teacher"]} if "teacher" in self.earlier else {}),
                **self.method.provenance(),
                "steps": done,
                "tiles": self.index.digest,
                "num_tiles": self.order.num_tiles,
                "subset": self.subset and self.subset.facts(),
                "pretraining_slides": own + before,
                "excluded_slides": slides[~self.keep].tolist(),
                "seed": self.config.seed,
            },
        )

    def _announce(self, time_told: str = "told after the first steps; `histossl plan` times them beforehand") -> None:
        planned = self.plan
        lines = [
            f"{planned.num_tiles:,} tiles of {planned.num_slides} slides, {int((~self.keep).sum())} slides left out"
            + (f" (subset {self.subset.name} of {len(self.index):,} tiles)" if self.subset else ""),
            f"batch {planned.batch_size}: {planned.tiles_per_pass} tiles a pass x {planned.num_processes} "
            f"process{'es' if planned.num_processes > 1 else ''} ({name_of(self.device)}, {self.precision.name}) x "
            f"{planned.micro_batches} micro-batch{'es' if planned.micro_batches > 1 else ''}",
            *([AUTO_BATCH] if self.asked.batch_size == 0 else []),
            _weights_told(self.info, isinstance(getattr(self.method, "student", None), Tokens)),
            *planned.reasons,
            self._disk(),
            f"time: {time_told}",
        ]
        console.panel(
            f"{self.config.method}: {self.config.backbone} from {self.config.weights} weights", "\n".join(lines)
        )
        if self.method.caution:
            console.warn(self.method.caution)

    def show_plan(self, asked: PretrainConfig) -> None:
        """The plan with the time and disk that it will take, and nothing written."""
        self.asked = asked
        self._fit_memory()
        step_s = self.step_s()
        if self.config.hours:
            self._fit_hours(step_s)
        expected = self._expected(step_s)
        self._announce(f"{expected}, timed just now")

    def _expected(self, step_s: float) -> Expected:
        """The whole run's time, with what is not steps."""
        look_s, rest_s = self._beside_steps()
        num_looks = 1 + math.ceil(self.plan.num_steps / self.operation.monitor_every)
        return Expected(step_s, self.plan.num_steps, look_s, num_looks, rest_s)

    def _beside_steps(self) -> tuple[float, float]:
        """Seconds of a look, and of the rest: filling the queue, BatchNorm's statistics at the end."""
        num_tiles = min(64, self.order.num_tiles)
        self._monitor_features(self.method.backbone, num_tiles)  # warms up
        began_s = time.perf_counter()
        self._monitor_features(self.method.backbone, num_tiles)
        tile_s = (time.perf_counter() - began_s) / num_tiles
        look_s = tile_s * min(MONITOR_TILES, self.order.num_tiles)
        look_s *= 1 if self.method.learner() is self.method.backbone else 2
        if self.probe is not None:
            began_s = time.perf_counter()
            self.probe(self._plain_backbone(), self.info)
            look_s += time.perf_counter() - began_s
        other_tiles = self.method.num_prefill_tiles() / self.processes.count
        if has_batchnorm(self.method.backbone):
            other_tiles += min(BATCHNORM_TILES, self.order.num_tiles)
        return look_s, other_tiles * tile_s

    def _disk(self) -> str:
        state = self.method.state_dict().values()
        trained = sum(value.numel() * value.element_size() for value in self.method.parameters() if value.requires_grad)
        held = sum(value.numel() * value.element_size() for value in state)
        held += trained * (2 if self.plan.optimizer == "adamw" else 1)
        return f"disk: two checkpoints of {held / 2**20:,.0f} MB"


# ---- pieces


class _OutOfMemoryError(Exception):
    """Memory ran out in a step that left no trace; `done` steps are saved."""

    def __init__(self, done: int) -> None:
        super().__init__(done)
        self.done = done


@torch.no_grad()
def _refuse_view_size(backbone: nn.Module, config: PretrainConfig, side_px: int, option: str) -> None:
    """One empty image through the backbone, before anything else: some take no other size than their own."""
    backbone.eval()
    try:
        backbone(torch.zeros(1, 3, side_px, side_px))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UsageError(f"{option} {side_px}: {config.backbone} does not take that size ({error})") from error


def fewest_pieces(fits: Callable[[int], bool], batch_size: int, num_processes: int) -> int:
    """In how many micro-batches a batch must come so that `fits(tiles of one pass)`. Doubles from one."""
    pieces = 1
    while batch_size % (pieces * num_processes) == 0:
        if fits(batch_size // pieces // num_processes):
            return pieces
        pieces *= 2
    raise TrainingError(
        f"out of GPU memory even with {2 * batch_size // pieces // num_processes} tiles a pass; "
        "use a smaller --view-px, a smaller --backbone, or a --batch-size with more factors of two"
    )


def _weights_told(info: BackboneInfo, masks: bool) -> str:
    """Where the start comes from, that every key of it was filled, and what else of the file was (not) taken."""
    begun = info.provenance.get("start_weights", "")
    if "keys_loaded" not in info.provenance:
        return f"start: {begun}"
    brought = info.provenance.get("mask_token", False)
    also = " and its mask token" if brought and masks else ""
    dropped = Counter(key.partition(".")[0] for key in info.provenance["keys_dropped"])
    if brought and not masks:
        dropped["mask_token"] = 1
    names = [f"{name} ({count} keys)" if count > 1 else name for name, count in dropped.items()]
    rest = f"; left out: {', '.join(names)}" if names else ""
    return f"start: {begun}, all {info.provenance['keys_loaded']} keys of the backbone{also} loaded{rest}"


def _refuse_other_format(run: PretrainDir, state: Mapping[str, Any]) -> None:
    """Before anything of it is taken over."""
    wanted = ("step", "method", "optimizer", "scaler", "watch", "keys_of_step", "best")
    missing = [name for name in wanted if name not in state]
    if missing or state.get("format", CHECKPOINT_FORMAT) != CHECKPOINT_FORMAT:
        why = f"without {', '.join(missing)}" if missing else f"in format {state['format']}, not {CHECKPOINT_FORMAT}"
        raise TrainingError(
            f"{run.checkpoint}: was written by another version of histossl ({why}); go on with that one "
            f"(run.json names it), or begin again under another --name"
        )


def _lr_at(planned: Plan, step: int) -> float:
    return warmup_cosine(step, planned.num_steps, planned.warmup_steps, planned.lr, planned.final_lr)


def _weight_decay_at(planned: Plan, step: int) -> float:
    share = step / max(1, planned.num_steps - 1)
    return half_cosine(share, planned.weight_decay, planned.weight_decay_end)


@torch.no_grad()
def _reestimate_batchnorm(backbone: nn.Module, batches: Iterator[Tensor]) -> None:
    """Running statistics from clean tiles: training saw them through crops, colour and blur ('precise BN')."""
    norms = [module for module in backbone.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # plain average over the batches
        norm.train()
    for batch in batches:
        backbone(batch)
    backbone.eval()


def _note(row: dict[str, float]) -> str:
    parts = [f"loss {row['loss']:.3f}"]
    if "loss_ceiling" in row:
        parts[0] += f" of {row['loss_ceiling']:.2f}"
    for name, told in (("instance_accuracy", "accuracy"), ("agreement", "agreement"), ("learnt", "teacher followed")):
        if name in row:
            parts.append(f"{told} {max(0.0, row[name]):.0%}")  # below none is none
    if "pretext_accuracy_recent" in row:
        parts.append(f"accuracy {row['pretext_accuracy_recent']:.1%}, chance {row['chance']:.1%}")
    parts += [f"{row['tiles_per_s']:.0f} tiles/s", f"waiting for tiles {row['data_wait']:.0%}"]
    if "gpu_memory_gb" in row:
        parts.append(f"GPU memory {row['gpu_memory_gb']:.1f} GB")
    return ", ".join(parts)


def _probe_verdict(best: Best, num_steps: int, run: PretrainDir) -> str:
    """What the labelled training slides say of the last look, whose backbone is left, and of the best one."""
    if best.num_looks == 0:
        return "The probe was never asked: the labels came after the last look"
    last = f"the last look, whose backbone is what finetune takes, has {best.last:.3f}"
    if math.isnan(best.at_start):
        return f"The labels came when the run had begun, so there is no score of the start to compare with; {last}"
    if best.step == 0:
        return (
            f"Adaptation did not help on the labelled training slides: no look scored above the start "
            f"({best.at_start:.3f}); {last}"
        )
    if f"{best.score:.3f}" == f"{best.at_start:.3f}":
        return f"On the labelled training slides the probe stayed at {best.at_start:.3f}; {last}"
    kept = "" if best.step == num_steps else f"; the best look's backbone is {run.best_backbone}"
    worse = "" if best.last > best.at_start else ", no more than the start"
    chance = f". The highest of {best.num_looks} looks is partly luck: a small rise is no evidence"
    return (
        f"On the labelled training slides the probe rose from {best.at_start:.3f} to {best.score:.3f} "
        f"(step {best.step} of {num_steps}){kept}; {last}{worse}{chance if best.num_looks > 1 else ''}"
    )
