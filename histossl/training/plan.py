"""Before a run: what is refused, what would be done and how long it would take."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from histossl.core import console
from histossl.core.config import PretrainConfig, RuntimeConfig, read_run
from histossl.core.errors import MismatchError
from histossl.core.workspace import PretrainDir
from histossl.runtime.distributed import Processes, joined
from histossl.runtime.locks import refuse_held
from histossl.tiles.store.index import TileIndex
from histossl.tiles.stream.sampler import TileOrder
from histossl.training.loop import Probe
from histossl.training.run_files.run_identity import refuse_other_run
from histossl.training.setup.dry_run import expected_time, fewest_pieces, fit_hours, fit_memory, fits, timed_step_s
from histossl.training.setup.plan_report import announce
from histossl.training.setup.planner import batch_bounds
from histossl.training.setup.run import Prepared, pool_of


def check(
    index: TileIndex,
    run: PretrainDir,
    config: PretrainConfig,
    operation: RuntimeConfig,
    num_processes: int,
    teacher: nn.Module | None = None,
) -> None:
    """Refuse what no process could carry out, before any is started."""
    refuse_other_run(index, run, config)
    refuse_held(run)
    if torch.cuda.is_available():  # this process stays on the CPU; its workers will not
        operation = replace(operation, precision="auto", decode_on_gpu=False)
    processes = Processes(0, 0, num_processes, torch.device("cpu"))
    settled = settle_batch(index, run, config, operation, processes, teacher)
    Prepared(index, run, settled, operation, processes, teacher)


def show_plan(
    index: TileIndex,
    run: PretrainDir,
    config: PretrainConfig,
    operation: RuntimeConfig,
    num_processes: int = 1,
    probe: Probe | None = None,
    teacher: nn.Module | None = None,
) -> None:
    """What `pretrain` would do, how long it would take, and why. Timed on one process with its share of the batch."""
    try:
        refuse_other_run(index, run, config)
    except MismatchError as error:
        console.warn(f"{error}. Planned as a new run")
        run = PretrainDir(run.root / "new")  # where nothing is that the plan would be taken from
    with joined() as processes:
        shared = replace(processes, count=num_processes)
        settled = settle_batch(index, run, config, operation, shared, teacher)
        prepared = Prepared(index, run, settled, operation, shared, teacher)
        fit_memory(prepared)
        step_s, asked = timed_step_s(prepared), probe if processes.writes else None
        if config.hours:
            fit_hours(prepared, asked, step_s)
        announce(prepared, config, f"{expected_time(prepared, asked, step_s)}, timed just now")


def settle_batch(
    index: TileIndex,
    run: PretrainDir,
    config: PretrainConfig,
    operation: RuntimeConfig,
    processes: Processes,
    teacher: nn.Module | None = None,
) -> PretrainConfig:
    """`--batch-size auto` (0) as a number: the run's own if it was begun, else the largest sensible one that fits."""
    if config.batch_size:
        return config
    if run.run_json.exists():
        return replace(config, batch_size=int(read_run(run.run_json)["plan"]["batch_size"]))
    subset, keep = pool_of(index, config)
    num_tiles = TileOrder(index, 0, keep=keep, tiles=subset.tiles if subset else None).num_tiles
    usual, most = batch_bounds(num_tiles, processes.count)
    if processes.device.type != "cuda":
        return replace(config, batch_size=usual)
    tried = Prepared(index, run, replace(config, batch_size=most), operation, processes, teacher)
    pieces = fewest_pieces(partial(fits, tried), most, processes.count)
    return replace(config, batch_size=max(usual, most // pieces))


def step_times_s(
    index: TileIndex, run: PretrainDir, config: PretrainConfig, operation: RuntimeConfig, num_steps: int = 20
) -> tuple[float, float]:
    """Seconds per step as it runs, and with views that never leave the device."""
    with joined() as processes:
        tried = Prepared(index, run, config, operation, processes)
        fit_memory(tried)
        return timed_step_s(tried, num_steps), timed_step_s(tried, num_steps, resident=True)
