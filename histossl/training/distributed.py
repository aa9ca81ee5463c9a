"""One process or many: joining torchrun or SLURM, starting our own processes, and who may write.

`histossl pretrain --gpus 4` starts itself four times through torch's elastic launcher and joins what it started.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from histossl.errors import UsageError

# Longer than a checkpoint to a slow disk takes, short enough that a dead neighbour is noticed and all are restarted.
TIMEOUT = timedelta(minutes=5)


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


def launched() -> bool:
    """Whether torchrun (or something that speaks like it) has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


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


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the other processes where there are any; leave them at the end."""
    if not launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield Processes(0, 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UsageError(f"process {local_rank} of this machine has no GPU: it shows {torch.cuda.device_count()}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Processes(dist.get_rank(), local_rank, dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def launch(count: int, arguments: Sequence[str], max_restarts: int) -> int:
    """Run `histossl ARGUMENTS` in `count` processes; a worker that dies is restarted with the others. The exit code."""
    environment = {
        **os.environ,
        # Without it a restarted worker may read the addresses of the round before (seen in 3 of 7 restarts).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count))),
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={count}",
        f"--max-restarts={max_restarts}",
        "--monitor-interval=1",
        "-m",
        "histossl",
        *arguments,
    ]
    process = subprocess.Popen(command, env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # the workers got the signal too: they save and stop by themselves
