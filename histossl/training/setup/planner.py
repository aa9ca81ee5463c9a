"""Batch, queue, momentum, learning rate and steps, worked out before the run and printed with their reasons.

Every number can be set by hand; an impossible one is refused with the reason. The rules are proposals from the
published settings (queue share, staleness, horizon), not laws: what a run used stands in its run.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from histossl.core.config import PretrainConfig
from histossl.core.errors import UsageError
from histossl.methods.method import Rate, Training
from histossl.methods.modules.batchnorm import group_of

QUEUE_MOST = 65536  # MoCo's own, for 1.28 million images
QUEUE_SHARE = 0.08  # of the tiles: 5-8 % in the published runs; more means the queue holds a tile's own keys
QUEUE_SHARE_WARN = 0.25
PRESENTATIONS = 1_000_000  # tiles shown in a run, where neither --steps nor --epochs says it: what short runs needed
EPOCHS_MOST = 100
LEAST_TILES = 2  # of a step: with one alone there is nothing to tell it from
BATCH_LEAST, BATCH_USUAL, BATCH_MOST = 32, 256, 1024  # of --batch-size auto: MoCo's own is 256
BATCH_SHARE = 0.01  # of the tiles: eight batches are then the queue's share
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
    weight_decay_end: float
    layer_decay: float
    knobs: dict[str, Any]  # of the method, as they fit tiles, slides and steps
    recompute: bool = False  # cheap activations are computed twice rather than kept
    reasons: tuple[str, ...] = field(default=())


def plan(
    config: PretrainConfig,
    num_tiles: int,
    num_slides: int,
    knobs: Mapping[str, Any],
    num_processes: int = 1,
    micro_batches: int = 1,
    batchnorm: bool = True,
    training: Training = Training(),
    to_fit: tuple[str, ...] = ("queue_size", "momentum"),
    batchnorm_group: int = BATCHNORM_GROUP,
    num_steps: int = 0,
    company: tuple[float, float] | None = None,
) -> Plan:
    """`knobs` are the method's own settings as given by hand (--set); `batchnorm`: whether the backbone has any.

    `training` is how the method is optimized, `to_fit` which of its knobs follow from tiles, slides and steps,
    `batchnorm_group` of how many tiles it takes one BatchNorm statistic (0: of all); of a run that was begun, its own.
    `num_steps` is what --hours came to, once a step was timed; `company` how likely two draws are of one slide, and of
    one tile (all slides alike without it).
    """
    batch, pieces = config.batch_size, num_processes * micro_batches
    reasons: list[str] = []
    least = -(-LEAST_TILES // pieces) * pieces
    if num_tiles < least:
        have = f"there {'is 1 tile' if num_tiles == 1 else f'are {num_tiles} tiles'} to pretrain on"
        raise UsageError(
            f"{have}, and a step takes {least} at least{'' if pieces == 1 else f' ({pieces} at a time)'}: tile more "
            "slides, or a smaller --tile-px in another --workspace; archive.csv says what the filters turned down"
        )
    if batch % pieces:
        raise UsageError(
            f"--batch-size {batch}: cannot be shared by {num_processes} processes x {micro_batches} micro-batches; "
            f"use {batch // pieces * pieces or pieces} or {-(-batch // pieces) * pieces}"
        )
    if batch > num_tiles:
        raise UsageError(
            f"--batch-size {batch}: there are only {num_tiles} tiles to pretrain on; use "
            f"{max(least, num_tiles // 8 // pieces * pieces)} or so"
        )
    num_steps = _steps(config, num_tiles, reasons, num_steps)
    same_slide, same_tile = company or (1 / num_slides, 1 / num_tiles)
    if num_slides == 1 and float(knobs.get("same_slide_weight", 1)) == 0:
        raise UsageError("--set same_slide_weight=0: all tiles are of one slide, so no negative would be left")
    fitted: dict[str, Any] = {}
    if "queue_size" not in to_fit and int(knobs.get("queue_size", 0)) >= num_tiles:
        raise UsageError(f"--set queue_size={knobs['queue_size']}: must be smaller than the {num_tiles} tiles")
    if "queue_size" in to_fit:
        fitted["queue_size"] = _queue(config, num_tiles, same_slide, same_tile, knobs, reasons)
    if "momentum" in to_fit:
        fitted["momentum"] = _momentum(num_tiles, num_steps, int(fitted.get("queue_size", 0)), batch, knobs, reasons)
    if "prototypes" in to_fit:
        fitted["prototypes"] = _prototypes(num_tiles, knobs, training, reasons)
    optimizer, lr, weight_decay, layer_decay = _optimizer(config, batchnorm, training, reasons)
    warmup = config.warmup if config.warmup >= 0 else training.warmup
    final_lr = lr * (config.final_lr if config.final_lr >= 0 else training.final_lr)
    reasons[-1] += f"; the rate falls to {final_lr:.2g}"
    if training.of_the_pass and micro_batches > 1:
        reasons.append(_of_the_pass_reason(training, batch, micro_batches))
    if training.in_batch:
        reasons.append(in_batch_reason(batch, micro_batches))
    elif batchnorm and batchnorm_group:
        fitted["batchnorm_group_tiles"] = _group(batch, batch // pieces, batchnorm_group, num_processes, reasons)
    return Plan(
        num_tiles=num_tiles,
        num_slides=num_slides,
        batch_size=batch,
        num_processes=num_processes,
        micro_batches=micro_batches,
        tiles_per_pass=batch // pieces,
        num_steps=num_steps,
        warmup_steps=round(warmup * num_steps),
        optimizer=optimizer,
        lr=lr,
        final_lr=final_lr,
        weight_decay=weight_decay,
        weight_decay_end=_weight_decay_end(config, optimizer, weight_decay, training, reasons),
        layer_decay=layer_decay,
        knobs=fitted,
        reasons=tuple(reasons),
    )


def batch_bounds(num_tiles: int, num_processes: int) -> tuple[int, int]:
    """--batch-size auto: (the usual batch, the largest sensible one), multiples of what the processes can share.

    A hundredth of the tiles, as the published runs have it, held between 32 tiles and MoCo's own 256, and up to 1,024
    where memory allows: the learning rate's rule was tried no further. Never more than an eighth of the tiles.
    """
    fitting = min(max(BATCH_SHARE * num_tiles, BATCH_LEAST), num_tiles / 8)
    share = BATCHNORM_GROUP * num_processes if fitting >= BATCHNORM_GROUP * num_processes else num_processes

    def shared(batch: float) -> int:
        pieces = max(1, int(batch) // share)
        return share << (pieces.bit_length() - 1)  # a power of two of them, so that it can be halved

    return max(2, shared(min(fitting, BATCH_USUAL))), max(2, shared(min(fitting, BATCH_MOST)))


def _of_the_pass_reason(training: Training, batch: int, micro_batches: int) -> str:
    seen = batch // micro_batches
    return f"warning: only the {seen:,} tiles of a pass, not the batch of {batch:,}, are seen by {training.of_the_pass}"


def in_batch_reason(batch: int, micro_batches: int) -> str:
    """What a method without a queue has to tell a tile from."""
    told = f"negatives: the {batch // micro_batches - 1:,} other tiles of a pass, of all processes together"
    if micro_batches == 1:
        return f"{told}; a larger --batch-size has more"
    return (
        f"warning: {told}. The batch of {batch} goes in {micro_batches} passes, which does not make up for one: "
        "use more GPUs, a smaller --view-px or --backbone, or --method mocov2, whose queue needs no large batch"
    )


def _group(batch: int, pass_tiles: int, asked: int, num_processes: int, reasons: list[str]) -> int:
    """What becomes of the groups of `asked` tiles where a pass is no whole number of them, two at least.

    Whoever computes the whole batch at once may take larger ones: then this run is not what one process computes.
    """
    group, at_once = group_of(pass_tiles, asked, num_processes), group_of(batch, asked, 1)
    if not group:
        leak = (
            ", and query and key share them, by which MoCo knows a tile without learning" if num_processes == 1 else ""
        )
        reasons.append(
            f"warning: BatchNorm takes one statistic of each pass: {pass_tiles} tiles are no groups of {asked} or fewer"
            f"{leak}; use a --batch-size with more factors of two"
        )
    elif group != at_once:
        reasons.append(
            f"warning: BatchNorm takes groups of {group} tiles, not {at_once} as one pass of the whole batch would: a "
            f"pass of {pass_tiles} holds no whole number of those{', two at least' if num_processes == 1 else ''}. A "
            f"run begun with --set batchnorm_group_tiles={group} is the same in however many parts"
        )
    elif group != asked:
        reasons.append(f"BatchNorm takes groups of {group} tiles: a batch of {batch} is not two or more of {asked}")
    return group or asked


def _steps(config: PretrainConfig, num_tiles: int, reasons: list[str], fitted: int = 0) -> int:
    if fitted:
        num_steps, why = fitted, f"--hours {config.hours:g}"
    elif config.steps:
        num_steps, why = config.steps, "--steps"
    elif config.epochs:
        num_steps, why = max(1, round(config.epochs * num_tiles / config.batch_size)), f"--epochs {config.epochs:g}"
    else:
        # (--hours begins here too: its steps follow when a step has been timed)
        presentations = max(num_tiles, min(PRESENTATIONS, EPOCHS_MOST * num_tiles))
        num_steps = max(1, round(presentations / config.batch_size))
        why = f"{presentations:,} tiles shown: at least once each, at most {EPOCHS_MOST} times"
    reasons.append(
        f"steps {num_steps:,} ({why}; {_told(num_steps * config.batch_size / num_tiles)} epochs of {num_tiles:,} tiles)"
    )
    return num_steps


def _told(epochs: float) -> str:
    return f"{epochs:,.0f}" if epochs >= 10 else f"{epochs:.2g}"


def _queue(
    config: PretrainConfig,
    num_tiles: int,
    same_slide: float,
    same_tile: float,
    knobs: Mapping[str, Any],
    reasons: list[str],
) -> int:
    batch, of_a_tile = config.batch_size, keys_of_a_tile(knobs)
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
    held = queue / of_a_tile  # tiles
    reasons.append(
        f"queue {queue:,} keys ({why}): a key is at most {held / batch:.1f} steps old; {min(1, held * same_tile):.1%} "
        "of the tiles shown are in it (their own keys are never negatives); about "
        f"{same_slide:.1%} of it is of the query's own slide"
    )
    if share > QUEUE_SHARE_WARN:
        reasons.append(f"warning: the queue holds {share:.0%} of the tiles, {num_tiles // 12} is usual")
    return queue


def keys_of_a_tile(knobs: Mapping[str, Any]) -> int:
    """How many keys of a tile join the queue in a step."""
    return 2 if knobs.get("symmetric") else 1


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
    age_steps = queue / batch / keys_of_a_tile(knobs)
    aged = f"; over the queue's age the key encoder moves {age_steps * (1 - momentum):.2f} of its way"
    reasons.append(f"momentum {momentum:g} ({why}){aged if queue else ''}")
    return momentum


# Prototypes for fewer tiles than this: more than there are kinds of tile to tell apart never fill. lightly-train's
# table for DINO (algorithms.md 2.2); DINO's own ablation is flat from 4,096 upwards on ImageNet.
PROTOTYPES = ((20_000, 1024), (50_000, 2048), (100_000, 4096), (200_000, 16384), (500_000, 32768), (math.inf, 65536))


def _prototypes(num_tiles: int, knobs: Mapping[str, Any], training: Training, reasons: list[str]) -> int:
    if "prototypes" in knobs:
        prototypes, why = int(knobs["prototypes"]), "--set prototypes"
    else:
        times, most = training.prototypes
        prototypes = min(most, times * next(number for below, number in PROTOTYPES if num_tiles < below))
        why = f"{num_tiles:,} tiles"
    reasons.append(
        f"prototypes {prototypes:,} ({why}); a head that tells nothing has a loss of {math.log(prototypes):.2f}"
    )
    return prototypes


def _optimizer(
    config: PretrainConfig, batchnorm: bool, training: Training, reasons: list[str]
) -> tuple[str, float, float, float]:
    continuing = config.weights != "random"
    optimizer = config.optimizer or training.optimizer or (training.for_batchnorm if batchnorm else "adamw")
    rate: Rate = getattr(training, optimizer)
    if config.lr:
        lr, why = config.lr, "--lr"
    else:
        peak, times = rate.continued if continuing else rate.lr, config.batch_size / rate.batch
        lr = peak * (math.sqrt(times) if rate.scaling == "sqrt" else times)
        share = f"; {peak / rate.lr:.2g} of it, as the weights are pretrained" if peak != rate.lr else ""
        follows = "by the square root of" if rate.scaling == "sqrt" else "linear in"
        why = f"{rate.source} at batch {rate.batch}, {follows} the batch{share}"
    weight_decay = config.weight_decay if config.weight_decay >= 0 else rate.weight_decay
    layer_decay = config.layer_decay or (training.layer_decay if continuing and optimizer == "adamw" else 1.0)
    reasons.append(
        f"{optimizer}, learning rate {lr:.3g} ({why}); weight decay {weight_decay:g}; layer decay {layer_decay:g}"
    )
    return optimizer, lr, weight_decay, layer_decay


def _weight_decay_end(
    config: PretrainConfig, optimizer: str, weight_decay: float, training: Training, reasons: list[str]
) -> float:
    """Constant where it was set by hand, and without AdamW."""
    if training.weight_decay_end is None or optimizer != "adamw" or config.weight_decay >= 0:
        return weight_decay
    reasons.append(f"weight decay rises to {training.weight_decay_end:g} by a cosine")
    return training.weight_decay_end
