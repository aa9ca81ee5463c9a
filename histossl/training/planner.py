"""Batch, queue, momentum, learning rate and steps, worked out before the run and printed with their reasons.

Every number can be set by hand; an impossible one is refused with the reason. The rules are proposals from the
published settings (queue share, staleness, horizon), not laws: what a run used stands in its run.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from histossl.config import PretrainConfig
from histossl.errors import UsageError

QUEUE_MOST = 65536  # MoCo's own, for 1.28 million images
QUEUE_SHARE = 0.08  # of the tiles: 5-8 % in the published runs; more means the queue holds a tile's own keys
QUEUE_SHARE_WARN = 0.25
PRESENTATIONS = 1_000_000  # tiles shown in a run, where neither --steps nor --epochs says it: what short runs needed
EPOCHS_MOST = 100
BATCHNORM_GROUP = 32  # tiles per statistic, as the methods' knob has it


@dataclass(frozen=True)
class Plan:
    """What a run will do. `reasons` are lines for a person."""

    num_tiles: int
    num_slides: int
    batch_size: int
    num_processes: int
    micro_batches: int
    tiles_per_pass: int  # per process and forward pass
    num_steps: int
    warmup_steps: int
    optimizer: str
    lr: float
    final_lr: float
    weight_decay: float
    layer_decay: float
    queue_size: int  # 0: the method has none
    momentum: float  # 0: the method has none
    reasons: tuple[str, ...] = field(default=())


def plan(
    config: PretrainConfig,
    num_tiles: int,
    num_slides: int,
    knobs: Mapping[str, Any],
    num_processes: int = 1,
    micro_batches: int = 1,
    batchnorm: bool = True,
) -> Plan:
    """`knobs` are the method's own settings as given by hand (--set); `batchnorm`: whether the backbone has any."""
    batch, pieces = config.batch_size, num_processes * micro_batches
    reasons: list[str] = []
    if batch % pieces:
        raise UsageError(
            f"--batch-size {batch}: cannot be shared by {num_processes} processes x {micro_batches} micro-batches; "
            f"use {batch // pieces * pieces or pieces} or {-(-batch // pieces) * pieces}"
        )
    if batch > num_tiles:
        raise UsageError(
            f"--batch-size {batch}: there are only {num_tiles} tiles to pretrain on; use {max(2, num_tiles // 8)} or so"
        )
    num_steps = _steps(config, num_tiles, reasons)
    queue_size = _queue(config, num_tiles, num_slides, knobs, reasons) if config.method.startswith("moco") else 0
    momentum = _momentum(num_tiles, num_steps, queue_size, batch, knobs, reasons) if queue_size else 0.0
    optimizer, lr, weight_decay, layer_decay = _optimizer(config, batchnorm, reasons)
    group = int(knobs.get("batchnorm_group_tiles", BATCHNORM_GROUP))
    if batchnorm and group and pieces > 1 and (batch // pieces) % group:
        reasons.append(
            f"warning: passes of {batch // pieces} tiles are no whole groups of {group}: BatchNorm takes each pass as "
            "it comes, so another number of GPUs gives other statistics; --set batchnorm_group_tiles=N"
        )
    return Plan(
        num_tiles=num_tiles,
        num_slides=num_slides,
        batch_size=batch,
        num_processes=num_processes,
        micro_batches=micro_batches,
        tiles_per_pass=batch // pieces,
        num_steps=num_steps,
        warmup_steps=round(config.warmup * num_steps),
        optimizer=optimizer,
        lr=lr,
        final_lr=lr * config.final_lr,
        weight_decay=weight_decay,
        layer_decay=layer_decay,
        queue_size=queue_size,
        momentum=momentum,
        reasons=tuple(reasons),
    )


def _steps(config: PretrainConfig, num_tiles: int, reasons: list[str]) -> int:
    if config.steps:
        num_steps, why = config.steps, "--steps"
    elif config.epochs:
        num_steps, why = max(1, round(config.epochs * num_tiles / config.batch_size)), f"--epochs {config.epochs:g}"
    else:
        # (--hours begins here too: its steps follow when a step has been timed)
        presentations = max(num_tiles, min(PRESENTATIONS, EPOCHS_MOST * num_tiles))
        num_steps = max(1, round(presentations / config.batch_size))
        why = f"{presentations:,} tiles shown: at least once each, at most {EPOCHS_MOST} times"
    reasons.append(
        f"steps {num_steps:,} ({why}; {num_steps * config.batch_size / num_tiles:.2g} epochs of {num_tiles:,} tiles)"
    )
    return num_steps


def _queue(
    config: PretrainConfig, num_tiles: int, num_slides: int, knobs: Mapping[str, Any], reasons: list[str]
) -> int:
    batch = config.batch_size
    if "queue_size" in knobs:
        queue, why = int(knobs["queue_size"]), "--set queue_size"
    else:
        queue = batch * max(8, round(min(QUEUE_MOST, QUEUE_SHARE * num_tiles) / batch))
        why = f"{QUEUE_SHARE:.0%} of the tiles, at most {QUEUE_MOST:,}, at least 8 batches"
        if queue > QUEUE_SHARE_WARN * num_tiles:
            queue = max(1, int(QUEUE_SHARE_WARN * num_tiles))
            why = f"a quarter of the tiles: there are few, 8 batches of {batch} would be too many"
    if queue >= num_tiles:
        raise UsageError(
            f"queue of {queue} keys: must be smaller than the {num_tiles} tiles, or it holds every tile's own key; "
            f"use --set queue_size={max(1, num_tiles // 12)}"
        )
    share = queue / num_tiles
    reasons.append(
        f"queue {queue:,} keys ({why}): a key is at most {queue / batch:.1f} steps old; {share:.1%} of the tiles "
        f"are in it (their own keys are never negatives); about {1 / num_slides:.1%} of it is of the query's own slide"
    )
    if share > QUEUE_SHARE_WARN:
        reasons.append(f"warning: the queue holds {share:.0%} of the tiles, {num_tiles // 12} is usual")
    return queue


def _momentum(
    num_tiles: int, num_steps: int, queue: int, batch: int, knobs: Mapping[str, Any], reasons: list[str]
) -> float:
    if "momentum" in knobs:
        momentum, why = float(knobs["momentum"]), "--set momentum"
    else:
        momentum = 0.99 if num_tiles < 100_000 else 0.996 if num_tiles < 1_000_000 else 0.999
        why = f"{num_tiles:,} tiles"
        # The key encoder's memory is 1 / (1 - m) steps: a twentieth of the run at most, but 50 at least, or keys age.
        horizon = max(50.0, num_steps / 20)
        if momentum > 1 - 1 / horizon:
            momentum, why = round(1 - 1 / horizon, 4), f"a memory of {horizon:.0f} steps in a run of {num_steps:,}"
    staleness = queue / batch * (1 - momentum)
    reasons.append(
        f"momentum {momentum:g} ({why}); over the queue's age the key encoder moves {staleness:.2f} of its way"
    )
    return momentum


def _optimizer(config: PretrainConfig, batchnorm: bool, reasons: list[str]) -> tuple[str, float, float, float]:
    continuing = config.weights != "random"
    optimizer = config.optimizer or ("sgd" if batchnorm else "adamw")
    if config.lr:
        lr, why = config.lr, "--lr"
    elif optimizer == "sgd":
        lr = (0.01 if continuing else 0.03) * config.batch_size / 256
        why = f"{'a third of' if continuing else ''} MoCo's 0.03 at batch 256, linear in the batch".strip()
    else:
        lr = (3e-4 if continuing else 5e-4) * math.sqrt(config.batch_size / 128)
        why = f"{3e-4 if continuing else 5e-4:g} at batch 128, by the square root of the batch"
    weight_decay = config.weight_decay if config.weight_decay >= 0 else (1e-4 if optimizer == "sgd" else 0.04)
    layer_decay = config.layer_decay or (0.75 if continuing and optimizer == "adamw" else 1.0)
    reasons.append(
        f"{optimizer}, learning rate {lr:.3g} ({why}), falling to {lr * config.final_lr:.2g}; weight decay "
        f"{weight_decay:g}; layer decay {layer_decay:g}"
    )
    return optimizer, lr, weight_decay, layer_decay
