"""Stage `pretrain`: tiles of a workspace in, one adapted backbone out. The same call goes on where it was cut off."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from histossl.backbones.loading import save_backbone, save_tensors
from histossl.core import console
from histossl.core.config import PretrainConfig, RuntimeConfig, write_run
from histossl.core.errors import StoreError, TrainingError, UsageError
from histossl.core.workspace import PretrainDir
from histossl.methods.modules.batchnorm import has_batchnorm
from histossl.methods.ramps import half_cosine
from histossl.methods.schedules import warmup_cosine
from histossl.runtime import launcher_messages
from histossl.runtime.collectives import max_over_processes, mean_over_processes
from histossl.runtime.distributed import RESTART, agreed, is_lost_process, joined, others_lost, others_wait
from histossl.runtime.locks import alone_in_run
from histossl.runtime.signals import Stop, stop_on_signal
from histossl.tiles.store.index import TileIndex
from histossl.training.loop import HalfDoneError, Probe, Step, train
from histossl.training.monitoring.log import RunLog
from histossl.training.monitoring.periodic_checks import Looks, probe_verdict
from histossl.training.plan import settle_batch
from histossl.training.run_files.checkpoint import load_checkpoint, remove_checkpoints, save_checkpoint
from histossl.training.run_files.export import BATCHNORM_TILES, adapted_info, clean_backbone
from histossl.training.run_files.run_identity import digest_of_weights, findable, refuse_other_run
from histossl.training.setup.dry_run import fit_hours, fit_memory, larger_share
from histossl.training.setup.memory import is_out_of_memory
from histossl.training.setup.optim import in_parallel, name_of
from histossl.training.setup.plan_report import announce, note
from histossl.training.setup.planner import Plan
from histossl.training.setup.run import PREFILL, Prepared
from histossl.training.setup.time_estimate import Expected, Pace, clock

DAMAGED_NAMED = 20  # of the damaged tiles, at the end
CHECKPOINT_FORMAT = 1  # another one for each change that makes an older checkpoint useless
ASK_EVERY_S = 10.0


@dataclass(frozen=True)
class Result:
    run: PretrainDir
    finished: bool
    text: str  # what a person should know, a line or a few
    stopped_by: int = 0  # the signal that asked it to stop, if one did


def pretrain(
    index: TileIndex,
    run: PretrainDir,
    config: PretrainConfig,
    operation: RuntimeConfig = RuntimeConfig(),
    probe: Probe | None = None,
    teacher: nn.Module | None = None,
) -> Result:
    """Continue pretraining on the tiles of `index` and leave `run.backbone`.

    `probe` scores a backbone on labelled training slides (higher is better); asked at step 0 and at every look.
    `teacher` is what a method learns from that is taught (distillation).
    Raises MismatchError when `run` belongs to other settings or other tiles, TrainingError when the run goes wrong.
    """
    refuse_other_run(index, run, config)
    if run.backbone.exists():
        return Result(run, True, f"finished before: {run.backbone}")
    with stop_on_signal() as stop, joined() as processes, alone_in_run(run) if processes.writes else nullcontext():
        settled = settle_batch(index, run, config, operation, processes, teacher)
        prepared = Prepared(index, run, settled, operation, processes, teacher)
        return replace(_Pretraining(prepared, probe, config).carry_out(stop), stopped_by=stop.number)


class _Pretraining:
    """One run under way."""

    def __init__(self, prepared: Prepared, probe: Probe | None, asked: PretrainConfig | None = None) -> None:
        """`asked` is what run.json keeps: the config before `--batch-size auto` became a number."""
        self.prepared = prepared
        self.index, self.run, self.operation = prepared.index, prepared.run, prepared.operation
        self.processes, self.device = prepared.processes, prepared.device
        self.method, self.optimizer, self.scaler = prepared.method, prepared.optimizer, prepared.scaler
        self.asked = asked or prepared.config
        self.looks = Looks(prepared, probe)
        self.met_damaged: list[dict[int, str]] = []  # of each loader, which goes on filling it
        self.pace = Pace(0, prepared.plan.num_steps, prepared.operation.monitor_every)
        self.log: RunLog | None = None
        self.ask_at = 0  # of several GPUs, and when they were asked last
        self.last_ask: tuple[int, float] | None = None

    # ---- the recipe

    def carry_out(self, stop: Stop) -> Result:
        fit_memory(self.prepared)
        if self.prepared.config.hours:
            fit_hours(self.prepared, self.looks.probe)
        if self.processes.writes:
            self.log = self.looks.log = RunLog(self.run)
            announce(self.prepared, self.asked)
            self._write_run()
        first = self._resume()
        self._refuse_apart(-1 if first is None else first)
        if first is None:
            self._prefill()
            with self.pace.look():
                self.looks.look(0)
            first = 0
        try:
            if self._agreed(stop, False, first)[0]:  # asked before the first step
                done = first
                self._save_together(done)
            else:
                done = self._train_in_memory(first, stop)
        finally:
            self._tell_damaged()
        if done < self.prepared.plan.num_steps:
            goes_on = "" if stop.interrupted else "; the same command goes on from there"  # of Ctrl-C the CLI says it
            text = f"stopped at step {done:,} of {self.prepared.plan.num_steps:,} and saved{goes_on}"
            return Result(self.run, False, text)
        return Result(self.run, True, self._finish())

    def _train_in_memory(self, first: int, stop: Stop) -> int:
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
        planned, pieces = self.prepared.plan, 2 * self.prepared.plan.micro_batches
        if planned.batch_size % (pieces * planned.num_processes):
            raise TrainingError(
                f"step {done}: out of GPU memory with {planned.tiles_per_pass} tiles a pass, which cannot be halved"
                f"{self._whether_saved()}. Use a smaller --view-px or --backbone under another --name"
            )
        self.prepared.replan(pieces, planned.num_steps if self.prepared.config.hours else 0)
        self._write_run()
        console.warn(
            f"step {done}: out of GPU memory with {planned.tiles_per_pass} tiles a pass; on with "
            f"{self.prepared.plan.tiles_per_pass}, and the same batch of {planned.batch_size}"
        )
        for reason in self.prepared.plan.reasons:
            if reason.startswith("warning: ") and reason not in planned.reasons:
                console.warn(reason.removeprefix("warning: "))
        if self.processes.count > 1:
            raise SystemExit(RESTART)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _train(self, first: int, stop: Stop) -> int:
        """From step `first` to the end, or to a signal. Returns how many steps are done."""
        operation, num_steps = self.operation, self.prepared.plan.num_steps
        tiles = self.prepared.tile_batches(first)
        self.met_damaged.append(tiles.damaged)
        steps = train(
            self.method,
            self.optimizer,
            self.prepared.views(tiles, first),
            partial(_lr_at, self.prepared.plan),
            first,
            num_steps,
            self.device,
            self.prepared.precision,
            self.scaler,
            self.prepared.config.clip_norm,
            self.prepared.plan.micro_batches,
            self.prepared.config.seed,
            in_parallel(self.method) if self.processes.count > 1 else None,
            partial(_weight_decay_at, self.prepared.plan),
        )
        self.pace = Pace(first, num_steps, operation.monitor_every, self.pace.look_s)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # of trying out how many tiles fit
        saved_s = time.monotonic()
        stepped_s, waited_s, logged, done = 0.0, 0.0, first, first
        shown = console.progress("pretraining", num_steps, "steps", visible=self.processes.writes, framed=True)
        with tiles, shown as bar:
            bar.advance(first)
            for step in self._guarded(steps, first):
                self.pace.stepped()
                done = step.number + 1
                last = done == num_steps
                if step.skipped and self.processes.writes and not self._finds_its_scale(step):
                    console.warn(f"step {done}: loss or gradient not finite; the step was left out")
                if done % operation.log_every == 0 or last:
                    took_s = max(self.pace.stepped_s - stepped_s, 1e-9)
                    speed = {
                        "tiles_per_s": (done - logged) * self.prepared.plan.batch_size / took_s,
                        "data_wait": (tiles.wait_s - waited_s) / took_s,
                    }
                    row = self._row(step, speed)
                    if self.log:
                        self.log.write(row)
                    logged, stepped_s, waited_s = done, self.pace.stepped_s, tiles.wait_s
                    bar.note = ", ".join((note(row), *self.looks.last_look))
                    self.looks.logged(row, done)
                if self.pace.is_look(done):
                    with self.pace.look():
                        self._look(done)
                if (expected := self.pace.expected(done)) and self.processes.writes:
                    self._tell_time(replace(expected, rest_s=self._finish_s()))
                bar.advance()
                by_steps = operation.checkpoint_every_steps and done % operation.checkpoint_every_steps == 0
                due = time.monotonic() - saved_s >= operation.checkpoint_every_s
                stopping, by_time = self._agreed(stop, due, done)
                if last or stopping or by_steps or by_time:
                    self._save_together(done)
                    saved_s = time.monotonic()
                if stopping:
                    break
                self.pace.resumed()
        return done

    def _look(self, done: int) -> None:
        try:
            self.looks.look(done)
        except StoreError:  # none of the tiles that it looks at can be read
            self._save(done)
            raise

    def _finds_its_scale(self, step: Step) -> bool:
        """fp16 does so by steps that are not finite: no fault of the run, while there is room below."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 0.5 and bool(torch.isfinite(step.loss))

    def _tell_time(self, expected: Expected) -> None:
        larger = larger_share(self.prepared)
        later = f"; the last {larger:.0%} of the steps have larger views and take longer" if larger else ""
        console.say(f"time: from here {expected}, until {clock(expected.total_s)}{later}")

    def _finish_s(self) -> float:
        """What BatchNorm's statistics of clean tiles take at the end; 0 before a look has timed a tile."""
        if not has_batchnorm(self.method.backbone):
            return 0.0
        return self.looks.tile_s * min(BATCHNORM_TILES, self.prepared.order.num_tiles)

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
        except HalfDoneError:
            raise
        except (TrainingError, StoreError, UsageError):
            self._save(done)
            raise
        except RuntimeError as error:
            if not is_out_of_memory(error):
                if plain := self._in_plain_words(error, done):
                    raise plain from error
                raise
            self.optimizer.zero_grad(set_to_none=True)
            self._save(done)
            if self.asked.batch_size == 0 and not self.operation.micro_batches:
                raise _OutOfMemoryError(done) from error
            raise TrainingError(
                f"step {done}: out of GPU memory with {self.prepared.plan.tiles_per_pass} tiles a pass"
                f"{self._whether_saved()}. The same command with --accumulate {2 * self.prepared.plan.micro_batches} "
                f"goes on from {'there' if self.processes.writes else 'the last checkpoint'}"
            ) from error

    def _in_plain_words(self, error: RuntimeError, done: int) -> BaseException | None:
        if self.processes.count > 1 and is_lost_process(error):
            return others_lost(error)
        if "does not have a deterministic implementation" in str(error):
            return TrainingError(
                f"--deterministic: on a GPU a step of {self.prepared.config.backbone} has no such way "
                f"({str(error).split(' does not', maxsplit=1)[0]}): a ViT at another size than its own enlarges its "
                "positions. Use --view-px of its own size and a method without small crops, or leave it out"
            )
        return None

    def _whether_saved(self) -> str:
        """Only one of several processes writes checkpoints, and the others cannot ask it once one is in trouble."""
        return "; saved" if self.processes.writes else ""

    def _finish(self) -> str:
        """Leave the backbone (its presence means finished), and say what came of it."""
        backbone = clean_backbone(self.prepared)
        if self.processes.writes:
            if kept := self.method.kept():
                save_tensors(self.run.head, kept)
            save_backbone(self.run.backbone, backbone, adapted_info(self.prepared, self.prepared.plan.num_steps))
            remove_checkpoints(self.run)
        lines = [f"adapted backbone: {self.run.backbone}"]
        if verdict := self.method.verdict():
            lines.append(verdict)
        if self.looks.probe is not None:
            lines.append(probe_verdict(self.looks.best, self.prepared.plan.num_steps, self.run))
        return "\n".join(lines)

    # ---- state

    def _write_run(self) -> None:
        write_run(
            self.run.run_json,
            findable(self.asked),
            weights_digest=digest_of_weights(self.asked),
            plan=asdict(self.prepared.plan),
            knobs=asdict(self.prepared.knobs),
            tiles={
                "digest": self.index.digest,
                "num_tiles": self.prepared.order.num_tiles,
                "num_slides": self.prepared.order.num_slides,
                "subset": self.prepared.subset and self.prepared.subset.facts(),
            },
            device=name_of(self.device),
            precision=self.prepared.precision.name,
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
        self.looks.load_state_dict(state)
        self.met_damaged.append(state.get("damaged", {}))
        first = int(state["step"])
        if self.log:
            self.log.begin_at(first + 1)
            console.say(f"going on from step {first:,} of {self.prepared.plan.num_steps:,}")
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

    def _save_together(self, done: int) -> None:
        """Where all processes come to it: those that do not write wait for as long as it takes."""
        with others_wait(self.processes):
            self._save(done)

    def _save(self, done: int) -> None:
        if self.processes.writes:
            state = {
                "format": CHECKPOINT_FORMAT,
                "step": done,
                "method": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                **self.looks.state_dict(),
                "damaged": self._damaged(),
            }
            with launcher_messages.saving():
                save_checkpoint(self.run, state)

    def _agreed(self, stop: Stop, due: bool, done: int) -> tuple[bool, bool]:
        """Whether to stop, and whether to save, after `done` steps: at the same one on all processes.

        GPUs are asked at every tenth step, for the answer makes the host wait for them; sooner where steps are slow,
        or a cluster's warning would be heard too late.
        """
        if self.device.type == "cuda" and self.processes.count > 1:
            if done < self.ask_at:
                return False, False
            step_s = math.inf  # not known before the first one
            if self.last_ask is not None:
                before, then_s = self.last_ask
                waited_s = max_over_processes(torch.tensor(time.monotonic() - then_s, device=self.device))
                step_s = float(waited_s) / (done - before)
            self.ask_at, self.last_ask = done + steps_within_reach(step_s), (done, time.monotonic())
        number, due = agreed(self.processes, stop.number, due)
        if number:
            stop.ask(number)
        return number > 0, due  # a signal that came since is for the next time: the others do not know of it

    # ---- before the first step, and of each logged one

    @torch.no_grad()
    def _prefill(self) -> None:
        """Show the method what it wants to see before step 0 (MoCo: a queue of real keys)."""
        wanted = self.method.num_prefill_tiles()
        if not wanted:
            return
        num_steps = math.ceil(wanted / self.prepared.plan.batch_size)
        tiles = self.prepared.tile_batches(0, self.prepared.order_of(PREFILL), num_steps)
        self.met_damaged.append(tiles.damaged)
        with (
            tiles,
            console.progress("a first look at the tiles", num_steps, "batches", visible=self.processes.writes) as bar,
        ):
            for number, views in enumerate(self.prepared.views(tiles)):
                with self.prepared.precision.autocast(self.device):
                    self.method.prefill(views._replace(step=number))
                if (number + 1) % self.prepared.plan.micro_batches == 0:
                    bar.advance()

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


# ---- pieces


def steps_within_reach(step_s: float) -> int:
    """How many steps go by before processes on GPUs ask each other again whether to stop: ten, or about ASK_EVERY_S."""
    return max(1, min(10, int(ASK_EVERY_S / max(step_s, 1e-9))))


class _OutOfMemoryError(Exception):
    """Memory ran out in a step that left no trace; `done` steps are saved."""

    def __init__(self, done: int) -> None:
        super().__init__(done)
        self.done = done


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
