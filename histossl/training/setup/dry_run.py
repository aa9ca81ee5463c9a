"""Trying a run out before step 0: into how many passes a batch must be cut to fit memory, and how long a step takes.

Real passes through the real method; what they change is put back.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from histossl.core import console
from histossl.core.config import read_run
from histossl.core.errors import TrainingError
from histossl.methods.method import Views
from histossl.methods.modules.batchnorm import has_batchnorm
from histossl.runtime import collectives
from histossl.runtime.collectives import max_over_processes, mean_over_processes
from histossl.runtime.distributed import others_wait
from histossl.training.loop import Probe, train
from histossl.training.monitoring.periodic_checks import MONITOR_TILES, monitor_features
from histossl.training.run_files.export import BATCHNORM_TILES, plain_backbone
from histossl.training.setup.memory import free_ram, is_out_of_memory, kept_for_backward
from histossl.training.setup.run import PREFILL, Prepared
from histossl.training.setup.time_estimate import Expected, steps_within
from histossl.views.recipe import make_views

SURELY_FITS_PX = 2 << 20  # of all views of a pass on a CPU: two gigabytes with a ResNet-50
SMALL_PASS = 4  # tiles, to learn what one takes
SMALLEST_PASS = 8  # tiles: of fewer BatchNorm and negatives within the batch say too little
RAM_SHARE = 0.8  # of what is free; the loader, the system and other people want some
BESIDE = 1.2  # views, gradients on their way back, what the optimizer keeps: measured 1.0 to 1.1 of what is kept


def fit_memory(prepared: Prepared) -> None:
    """Into how many micro-batches a batch is cut: as the run was before, or until a pass fits on all processes.

    On GPUs that is tried out; on a CPU, where too much is never forgiven, it is worked out.
    """
    before = read_run(prepared.run.run_json)["plan"] if prepared.run.run_json.exists() else {}
    if before.get("recompute"):
        prepared.recompute()
    if prepared.operation.micro_batches:
        return
    if before.get("num_processes") == prepared.processes.count and before["batch_size"] == prepared.plan.batch_size:
        pieces = int(before["micro_batches"])
    elif prepared.device.type == "cuda":
        if not fits(prepared, prepared.plan.tiles_per_pass):
            prepared.recompute()
        pieces = fewest_pieces(partial(fits, prepared), prepared.plan.batch_size, prepared.processes.count)
    elif pixels_of_pass(prepared) > SURELY_FITS_PX and (free := _free_for_each(prepared)) is not None:
        pieces = _pieces_for(prepared, free - _fixed_bytes(prepared))
    else:
        return
    prepared.replan(pieces)


def fewest_pieces(fits_in_memory: Callable[[int], bool], batch_size: int, num_processes: int) -> int:
    """In how many micro-batches a batch must come so that `fits_in_memory(tiles of one pass)`. Doubles from one."""
    pieces = 1
    while batch_size % (pieces * num_processes) == 0:
        if fits_in_memory(batch_size // pieces // num_processes):
            return pieces
        pieces *= 2
    raise TrainingError(
        f"out of memory even with {2 * batch_size // pieces // num_processes} tiles a pass; "
        "use a smaller --view-px, a smaller --backbone, or a --batch-size with more factors of two"
    )


def pixels_of_pass(prepared: Prepared) -> int:
    sides = (view.size_px for view in prepared.method.views(1.0).views)
    return prepared.plan.tiles_per_pass * sum(side * side for side in sides)


def _free_for_each(prepared: Prepared) -> int | None:
    """Bytes of the machine's memory that each process may take; the least that any of them sees."""
    free = free_ram()
    if free is None:
        return None
    least = -max_over_processes(torch.tensor(-float(free), device=prepared.device))
    return int(RAM_SHARE * float(least) / max(1, prepared.processes.count))


def _fixed_bytes(prepared: Prepared) -> int:
    """Gradients, and what the optimizer and other processes will keep of each weight."""
    trained: int = sum(each.numel() for group in prepared.optimizer.param_groups for each in group["params"])
    return 4 * trained * (1 + _copies(prepared))


def _pieces_for(prepared: Prepared, free: float) -> int:
    """In how many micro-batches a pass stays below `free` bytes. An estimate: it is no reason to refuse a run."""
    plan, tile, pieces = prepared.plan, bytes_per_tile(prepared), 1
    while plan.batch_size // pieces // plan.num_processes * tile > free:
        tiles, rest = divmod(plan.batch_size, 2 * pieces * plan.num_processes)
        if rest or tiles < SMALLEST_PASS:
            console.warn(
                f"a pass of {plan.batch_size // pieces // plan.num_processes} tiles takes about "
                f"{plan.batch_size // pieces // plan.num_processes * tile / 1e9:.1f} GB, and about "
                f"{max(0, free) / 1e9:.1f} GB are free: it may be killed; a smaller --batch-size takes less"
            )
            break
        pieces *= 2
    return pieces


def bytes_per_tile(prepared: Prepared) -> float:
    """What a pass keeps of each tile for its backward pass, and what it needs beside that, on a CPU: from a small pass.

    There nobody says that memory ran out: the process is killed.
    """
    with _unchanged(prepared), collectives.imagined(), kept_for_backward() as kept:
        _pass(prepared, _blank_views(prepared, SMALL_PASS))
    return BESIDE * kept[0] / SMALL_PASS


def _blank_views(prepared: Prepared, num_tiles: int) -> Views:
    """Views as large as they ever get, of tiles without content."""
    side = prepared.index.tile_px
    tiles = torch.zeros(num_tiles, 3, side, side, dtype=torch.uint8, device=prepared.device)
    numbers = torch.arange(num_tiles)
    images = make_views(tiles, prepared.method.views(1.0), 0, numbers, (prepared.info.mean, prepared.info.std))
    on_device = numbers.to(prepared.device)
    return Views(images, on_device, on_device, 0, positions_B=numbers)


def fits(prepared: Prepared, tiles_per_pass: int) -> bool:
    failed = torch.zeros((), device=prepared.device)
    # Who runs out of memory would keep the others waiting; what they would send takes memory all the same.
    with _unchanged(prepared), collectives.imagined(prepared.processes.count):
        try:
            optimizer_state = _like_optimizer_state(prepared)  # which comes with the first step, and stays
            _pass(prepared, _blank_views(prepared, tiles_per_pass))
            del optimizer_state
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failed += 1
    torch.cuda.empty_cache()
    return not bool(mean_over_processes(failed))


def _like_optimizer_state(prepared: Prepared) -> list[Tensor]:
    """As much memory as the optimizer will take: one value a weight for sgd and lars, two for adamw.

    And one for what several processes exchange (DistributedDataParallel's buckets).
    """
    trained = [parameter for group in prepared.optimizer.param_groups for parameter in group["params"]]
    return [torch.empty_like(each) for each in trained for _ in range(_copies(prepared))]


def _copies(prepared: Prepared) -> int:
    return (2 if prepared.plan.optimizer == "adamw" else 1) + (prepared.processes.count > 1)


def fit_hours(prepared: Prepared, probe: Probe | None, step_s: float | None = None) -> None:
    """Steps from `--hours`: those of the run's first start, else what the time of a few steps gives."""
    if prepared.run.run_json.exists():
        num_steps = int(read_run(prepared.run.run_json)["plan"]["num_steps"])
    else:
        step_s = _slowest(prepared, step_s or timed_step_s(prepared))
        with others_wait(prepared.processes):
            beside_s = beside_steps(prepared, probe)
        look_s, rest_s = (_slowest(prepared, each) for each in beside_s)
        num_steps = steps_within(prepared.config.hours * 3600, step_s, look_s, prepared.operation.monitor_every, rest_s)
    prepared.replan(prepared.plan.micro_batches, num_steps)


def _slowest(prepared: Prepared, seconds: float) -> float:
    """Of all processes: the others wait for the one that asks the probe."""
    return float(max_over_processes(torch.tensor(seconds, device=prepared.device)))


def expected_time(prepared: Prepared, probe: Probe | None, step_s: float) -> Expected:
    """The whole run's time, with what is not steps."""
    look_s, rest_s = beside_steps(prepared, probe)
    num_looks = 1 + math.ceil(prepared.plan.num_steps / prepared.operation.monitor_every)
    return Expected(step_s, prepared.plan.num_steps, look_s, num_looks, rest_s)


def beside_steps(prepared: Prepared, probe: Probe | None) -> tuple[float, float]:
    """Seconds of a look, and of the rest: filling the queue, BatchNorm's statistics at the end."""
    num_tiles = min(64, prepared.order.num_tiles)
    monitor_features(prepared, prepared.method.backbone, num_tiles)  # warms up
    began_s = time.perf_counter()
    monitor_features(prepared, prepared.method.backbone, num_tiles)
    tile_s = (time.perf_counter() - began_s) / num_tiles
    look_s = tile_s * min(MONITOR_TILES, prepared.order.num_tiles)
    look_s *= 1 if prepared.method.learner() is prepared.method.backbone else 2
    if has_batchnorm(prepared.method.backbone):  # the healthy backbone's statistics
        look_s += tile_s * min(MONITOR_TILES, prepared.order.num_tiles)
    if probe is not None:
        began_s = time.perf_counter()
        probe(plain_backbone(prepared), prepared.info)
        look_s += time.perf_counter() - began_s
    other_tiles = prepared.method.num_prefill_tiles() / prepared.processes.count
    if has_batchnorm(prepared.method.backbone):
        other_tiles += min(BATCHNORM_TILES, prepared.order.num_tiles)
    return look_s, other_tiles * tile_s


def timed_step_s(prepared: Prepared, num_steps: int = 20, at_most_s: float = 20.0, resident: bool = False) -> float:
    """Seconds per step of the training loop itself; of a last phase with larger views its share of the steps.

    Nothing of the run is changed by it. What processes exchange is not in it. `resident`: with the same views again and
    again, which never leave the device: what loading costs is the rest.
    """
    step_s, share = _step_s(prepared, num_steps, at_most_s, resident), larger_share(prepared)
    if share:
        step_s += share * (_step_s(prepared, num_steps, at_most_s, resident, prepared.plan.num_steps) - step_s)
    return step_s


def larger_share(prepared: Prepared) -> float:
    """Share of the steps, in thousandths, in which the method sees other views than in the first."""
    first = prepared.method.views()
    return sum(prepared.method.views(thousandth / 1000) != first for thousandth in range(1000)) / 1000


def _step_s(prepared: Prepared, num_steps: int, at_most_s: float, resident: bool, first: int = 0) -> float:
    tiles = prepared.tile_batches(0, prepared.order_of(PREFILL), num_steps + 1)
    taken: list[float] = []
    with tiles, _unchanged(prepared), collectives.imagined():  # processes may differ in when they have seen enough
        views = prepared.views(tiles, first)
        if resident:
            views = itertools.repeat(next(views))
        steps = train(
            prepared.method,
            prepared.optimizer,
            views,
            lambda _: 0.0,
            first,
            first + num_steps + 1,
            prepared.device,
            prepared.precision,
            prepared.precision.scaler(prepared.device),
            prepared.config.clip_norm,
            prepared.plan.micro_batches,
        )
        began_s = time.perf_counter()
        for _ in steps:  # each waits for the device's answer on the one before
            now_s = time.perf_counter()
            taken.append(now_s - began_s)
            began_s = now_s
            if sum(taken) > at_most_s:
                break
    return float(np.median(taken[1:] or taken))  # the first one warms up


def _pass(prepared: Prepared, views: Views) -> None:
    with prepared.precision.autocast(prepared.device):
        loss = prepared.method(views).loss
    loss.backward()


@contextmanager
def _unchanged(prepared: Prepared) -> Iterator[None]:
    before = {name: value.detach().clone() for name, value in prepared.method.state_dict().items()}
    optimizer = copy.deepcopy(prepared.optimizer.state_dict())
    with torch.random.fork_rng([prepared.device] if prepared.device.type == "cuda" else []):
        try:
            yield
        finally:
            prepared.method.load_state_dict(before)
            prepared.optimizer.load_state_dict(optimizer)
            prepared.optimizer.zero_grad(set_to_none=True)
