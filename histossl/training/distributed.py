"""One process or many: joining torchrun or SLURM, starting our own processes, and who may write.

`histossl pretrain --gpus 4` starts itself four times through torch's elastic launcher and joins what it started.
"""

from __future__ import annotations

import inspect
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from histossl import console, launched
from histossl.errors import TrainingError, UsageError

# Longer than a checkpoint to a slow disk takes, short enough that a dead neighbour is noticed and all are restarted.
TIMEOUT = timedelta(minutes=10)
# What processes have to end their step, look and save in when they are asked to stop. torch's own is half a minute.
STOP_S = 600


@dataclass(frozen=True)
class Processes:
    rank: int
    local_rank: int
    count: int
    device: torch.device

    @property
    def writes(self) -> bool:
        """Whether this process writes files and speaks to the person."""
        return self.rank == 0


def is_worker() -> bool:
    """Whether torchrun, SLURM or our own launcher has started this process beside others."""
    # Of this step: in a batch script before any srun, SLURM_NTASKS counts tasks that nobody has started.
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        _speak_as_torchrun()
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _speak_as_torchrun() -> None:
    """`srun histossl pretrain ...`: SLURM's names for what torch wants to know."""
    slurm = os.environ
    hosts = ["scontrol", "show", "hostnames", slurm.get("SLURM_JOB_NODELIST", "localhost")]
    try:
        first = subprocess.run(hosts, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        first = slurm.get("SLURM_LAUNCH_NODE_IPADDR", "localhost")
    slurm["RANK"], slurm["WORLD_SIZE"] = slurm["SLURM_PROCID"], slurm["SLURM_STEP_NUM_TASKS"]
    slurm["LOCAL_RANK"] = slurm.get("SLURM_LOCALID", "0")
    slurm.setdefault("MASTER_ADDR", first)
    slurm.setdefault("MASTER_PORT", str(20_000 + int(slurm.get("SLURM_JOB_ID", "0")) % 20_000))


def num_processes_for(gpus: str) -> int:
    """`--gpus`: 'auto' takes every visible GPU, or one process on the CPU; a number asks for that many.

    On a machine without GPUs a number starts that many CPU processes (gloo): slow, and right for trying things out.
    """
    visible = torch.cuda.device_count()
    if gpus == "auto":
        return max(1, visible)
    if not gpus.isdigit() or int(gpus) < 1:
        raise UsageError(f"--gpus {gpus}: must be 'auto' or a whole number, 1 or more")
    wanted = int(gpus)
    if visible and wanted > visible:
        raise UsageError(f"--gpus {wanted}: this machine shows {visible}; use --gpus {visible} or --gpus auto")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not visible and wanted > cores:
        raise UsageError(
            f"--gpus {wanted}: this machine has no GPU, and only {cores} CPU cores to stand in; use --gpus auto"
        )
    return wanted


def gpu_of(local_rank: int, visible: int) -> int:
    """SLURM's --gpus-per-task=1 shows each task its own GPU alone, which is then everybody's number 0."""
    if local_rank < visible:
        return local_rank
    if visible == 1 and "SLURM_STEP_NUM_TASKS" in os.environ:
        return 0
    raise UsageError(f"process {local_rank} of this machine has no GPU: it shows {visible}")


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the other processes where there are any; leave them at the end."""
    if not is_worker() or int(os.environ["WORLD_SIZE"]) == 1:
        yield Processes(0, 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", gpu_of(local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Processes(dist.get_rank(), local_rank, dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def is_lost_process(error: RuntimeError) -> bool:
    """Whether another process went away in the middle of an exchange. gloo says so in words alone."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def launch(count: int, arguments: Sequence[str], max_restarts: int) -> int:
    """Run `histossl ARGUMENTS` in `count` processes; a worker that dies is restarted with the others. The exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Without it a restarted worker may read the addresses of the round before (seen in 3 of 7 restarts).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="histossl-") as directory:
        note = Path(directory) / "failure.json"
        os.environ[launched.NOTE] = str(note)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=f"histossl-{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=max_restarts,
            monitor_interval=0.5,
            signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
            **_patience(LaunchConfig),
        )
        try:
            elastic_launch(config, sys.executable)("-u", "-m", "histossl", *arguments)
            code = 0
        except ChildFailedError as error:
            rank, failure = next(iter(error.failures.items()))
            code = 1
            if not note.exists():
                raise TrainingError(
                    f"process {rank} ended with {_how(failure.exitcode)} and {max_restarts} restarts did not help; its "
                    "own words are above. The same command goes on from the last checkpoint"
                ) from error
        except SignalException as error:  # handed on to the workers, which save and stop, and say so
            if launched.ended_well(note):
                return 0
            if not note.exists():
                raise TrainingError(
                    f"{error.sigval.name} ended the processes before they had saved; "
                    "the same command goes on from what was saved before"
                ) from error
        finally:
            del os.environ[launched.NOTE]
        told = launched.read_note(note)
    if told is not None:
        code, text = told
        console.fail(text)
    return code


def _patience(config: type) -> dict[str, Any]:
    """Where torch can be told how long a process that was asked to stop may take (2.10 cannot everywhere)."""
    return {"shutdown_timeout": STOP_S} if "shutdown_timeout" in inspect.signature(config).parameters else {}


def _how(exitcode: int) -> str:
    return f"signal {signal.Signals(-exitcode).name}" if exitcode < 0 else f"exit code {exitcode}"
