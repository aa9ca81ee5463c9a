"""The one training loop: every method and every finetuning runs through it.

    for step in train(...):      # schedule, forward, check, backward, clip, step, after_step
        ...                      # the caller logs, saves, probes and stops

It knows no method, no slide, no file and no console.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from histossl.backbones.loading import BackboneInfo
from histossl.core.errors import StoreError, TrainingError
from histossl.methods.method import Method, Outcome, Views
from histossl.methods.modules.batchnorm import batchnorm_buffers
from histossl.runtime import collectives
from histossl.training.setup.memory import is_out_of_memory

MAX_SKIPPED_IN_A_ROW = 5
# Scores a backbone on labelled training slides; higher is better.
Probe = Callable[[nn.Module, BackboneInfo], float]


@dataclass(frozen=True)
class Step:
    """What one optimizer step leaves to look at. Tensors stay on the device until somebody asks for their value."""

    number: int
    lr: float
    loss: Tensor  # (), mean over the micro-batches of this process
    grad_norm: Tensor  # (), before clipping
    metrics: dict[str, Tensor]
    skipped: bool  # loss or gradient was not finite: neither weights nor method state changed


def has_bf16(device: torch.device) -> bool:
    """Whether the GPU computes in bf16; older ones emulate it, more slowly than fp32."""
    if device.type != "cuda":
        return False
    with nullcontext() if device.index is None else torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


@dataclass(frozen=True)
class Precision:
    """fp32, bf16, or fp16 with a scaler. Losses and norms are computed in fp32 whatever it says."""

    name: str = "fp32"

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16 if self.name == "bf16" else torch.float16)

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(device.type, enabled=self.name == "fp16")


def train(
    method: Method,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Views],
    lr_at: Callable[[int], float],
    start_step: int,
    num_steps: int,
    device: torch.device,
    precision: Precision,
    scaler: torch.amp.GradScaler,
    clip_norm: float,
    micro_batches: int = 1,
    seed: int = 0,
    parallel: nn.Module | None = None,
    weight_decay_at: Callable[[int], float] | None = None,
) -> Iterator[Step]:
    """Yield after each optimizer step from `start_step` up to `num_steps`.

    `batches` gives `micro_batches` batches per step; their mean loss is the step's. `parallel` is the method wrapped
    for several processes (DistributedDataParallel). The learning rate is `lr_at(step)` times the method's `lr_factor`,
    and in each parameter group times its `lr_scale`; a group that decays at all decays by `weight_decay_at(step)` where
    that is given. Gradients are clipped as the method's `trained_by.clip_by` says. Raises TrainingError when
    five steps in a row are not finite.
    """
    clipped = _clipped_together(method, optimizer)
    wrapped = parallel if parallel is not None else method
    skipped_in_a_row = 0
    statistics = batchnorm_buffers(method)
    before = [buffer.clone() for buffer in statistics]
    views = next(batches, None)
    for number in range(start_step, num_steps):
        lr = lr_at(number) * method.lr_factor(number / num_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
            if weight_decay_at is not None and group["weight_decay"]:
                group["weight_decay"] = weight_decay_at(number)
        # Dropout and drop path draw from the step's own stream: a resumed run draws what the unbroken one did.
        torch.manual_seed((seed * 1_000_003 + number + 7919 * collectives.rank()) & 0x7FFFFFFF)
        optimizer.zero_grad(set_to_none=True)
        if statistics:
            torch._foreach_copy_(before, statistics)
        outcomes: list[Outcome] = []
        with put_back_if_broken(statistics, before):
            for part in range(micro_batches):
                assert views is not None, "fewer batches than steps"
                last = part == micro_batches - 1
                with nullcontext() if last or parallel is None else parallel.no_sync():  # type: ignore[operator]
                    with precision.autocast(device):
                        here = views._replace(step=number, part=part, progress=number / num_steps)
                        outcome: Outcome = wrapped(here)
                    scaler.scale(outcome.loss / micro_batches).backward()
                outcomes.append(outcome._replace(loss=outcome.loss.detach()))
                if not last:
                    views = next(batches, None)  # made on the host while the device is still busy with this one
        scaler.unscale_(optimizer)
        method.before_step(number / num_steps)
        grad_norm = clip_gradients(clipped, clip_norm)
        loss = torch.stack([outcome.loss for outcome in outcomes]).mean()

        # Before the step: after it the weights, and after the next the teacher, would have swallowed the NaN.
        # All processes decide alike: gradients are averaged over them, losses are not. The host waits for the answer
        # only when the next views stand in the device's line behind it, so that the device has work while it is told.
        broken = torch.stack([~torch.isfinite(grad_norm), ~torch.isfinite(loss)]).float()
        answer = Answer(collectives.max_over_processes(broken))
        with put_back_if_broken(statistics, before, scaler):
            views = next(batches, None)
        gradient_broken, loss_broken = answer.get()
        skipped = gradient_broken or loss_broken
        if skipped:
            if statistics:  # forward has put the NaN into them already
                torch._foreach_copy_(statistics, before)
            # fp16 finding its scale is no fault of the run, but a loss that is broken before it is scaled.
            falling = scaler.is_enabled() and scaler.get_scale() > 1 and not loss_broken
            skipped_in_a_row += not falling
            if scaler.is_enabled():
                scaler.update(scaler.get_scale() / (1 if loss_broken else 2))
            if skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise TrainingError(
                    f"step {number + 1}: loss or gradient was not finite {skipped_in_a_row} times in a row "
                    f"(loss of this process {float(loss):.4g}). "
                    f"The weights of step {number + 1 - skipped_in_a_row} are kept. "
                    "Likely causes: --lr too high, or tiles with no content"
                )
        else:
            skipped_in_a_row = 0
            try:
                scaler.step(optimizer)
                scaler.update()
                method.after_step([outcome.carry for outcome in outcomes], (number + 1) / num_steps)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise HalfDoneError(number) from error
                raise
        yield Step(number, lr, loss, grad_norm, _mean_metrics([outcome.metrics for outcome in outcomes]), skipped)


def clip_gradients(together: Sequence[Sequence[Tensor]], most: float) -> Tensor:
    """Shorten the gradients of each set of parameters to the norm `most`, in place. The norm of all before it, ().

    One set is the usual global norm; a set for each parameter is DINO's way.
    """
    grads = [[each.grad for each in parameters if each.grad is not None] for parameters in together]
    norms = [torch.nn.utils.get_total_norm(own) for own in grads if own]
    if not norms:
        return torch.zeros(())
    for own, norm in zip([own for own in grads if own], norms, strict=True):
        factor = torch.clamp(most / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(own, factor.to(own[0].device))
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _clipped_together(method: Method, optimizer: torch.optim.Optimizer) -> list[list[Tensor]]:
    parameters: list[Tensor] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if method.trained_by.clip_by == "parameter":
        return [[parameter] for parameter in parameters]
    return [parameters]


class HalfDoneError(TrainingError):
    """Memory ran out while weights or method state were being changed: what is in memory now must not be saved."""

    def __init__(self, step: int) -> None:
        super().__init__(
            f"step {step}: out of GPU memory while the weights were being changed; use more --accumulate. "
            "The same command goes on from the last checkpoint"
        )


class Answer:
    """Yeses and noes on their way from the device: only who asks for them waits, and only for what came before."""

    def __init__(self, flags_N: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._flags_N = flags_N
        if flags_N.device.type == "cuda":
            self._flags_N = torch.empty_like(flags_N, device="cpu", pin_memory=True).copy_(flags_N, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(flags_N.device))

    def get(self) -> list[bool]:
        if self._copied is not None:
            self._copied.synchronize()
        return [bool(flag) for flag in self._flags_N.tolist()]


@contextmanager
def put_back_if_broken(
    statistics: list[Tensor], before: list[Tensor], unscaled_by: torch.amp.GradScaler | None = None
) -> Iterator[None]:
    """A pass that breaks off leaves no trace: BatchNorm's statistics are all that it has changed.

    And a scaler that has divided its gradients already remembers that: it is told that they are given up.
    """
    try:
        yield
    except (RuntimeError, StoreError) as error:  # memory ran out, or too many tiles are damaged
        if isinstance(error, StoreError) or is_out_of_memory(error):
            if statistics:
                torch._foreach_copy_(statistics, before)
            if unscaled_by is not None and unscaled_by.is_enabled():
                unscaled_by.update(unscaled_by.get_scale())
        raise


def _mean_metrics(metrics: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in metrics]).mean() for name in metrics[0]}
