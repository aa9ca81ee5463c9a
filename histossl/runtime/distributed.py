"""One process or many: joining those of torchrun, SLURM or our own launcher, and who may write.

A process that dies is noticed at once: by our own launcher, and on CPUs (gloo) by the others. One that hangs, or whose
machine is gone, is noticed when for TIMEOUT it has not come to an exchange, and so is, under torchrun or SLURM, any on
GPUs, where the others stand in a wait of nccl's that no signal ends; then all are started again from the last
checkpoint. So it is short; what one process does alone (asking the probe, writing a checkpoint) may take longer, for
there the others wait in `others_wait` and are given signs of life.
What TIMEOUT must outlast is one process loading tiles or compiling more slowly than the others: where a disk stalls for
minutes, or tasks start further apart, set HISTOSSL_TIMEOUT_S (seconds).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from histossl.core.errors import UsageError
from histossl.runtime import launcher_messages

TIMEOUT = timedelta(seconds=float(os.environ.get("HISTOSSL_TIMEOUT_S") or 180))
SIGN_EVERY_S = 10.0
SIGNS_END_S = 3600.0  # whoever works alone for longer hangs, too
RESTART = 75  # exit code of a worker that wants to be started again (EX_TEMPFAIL)
# What gloo, and torch for nccl, say of a process that is gone or has not come. Whatever else they say is a mistake.
NOT_COME = "Wait timeout"  # to the file of our launcher
LOST = ("closed by peer", "reset by peer", "Broken pipe", "imed out", "ncclRemoteError", "remote process exited")


@dataclass(frozen=True)
class Processes:
    rank: int
    local_rank: int
    count: int
    device: torch.device
    signs: Any = None  # a group of its own for signs of life; None in one process

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
    per_node = slurm.get("SLURM_STEP_TASKS_PER_NODE") or slurm.get("SLURM_NTASKS_PER_NODE") or slurm["WORLD_SIZE"]
    slurm["LOCAL_WORLD_SIZE"] = str(tasks_on_node(per_node, int(slurm.get("SLURM_NODEID", "0"))))
    slurm.setdefault("MASTER_ADDR", first)
    slurm.setdefault("MASTER_PORT", str(20_000 + int(slurm.get("SLURM_JOB_ID", "0")) % 20_000))


def tasks_on_node(per_node: str, node: int) -> int:
    """SLURM's `2(x3),1`: two tasks on each of nodes 0 to 2, one on node 3. A number alone holds for every node."""
    counts = [
        int(count) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node) for _ in range(int(times or 1))
    ]
    return counts[min(node, len(counts) - 1)]


def num_processes_for(gpus: str) -> int:
    """`--gpus`: 'auto' takes every visible GPU, or one process on the CPU; a number asks for that many.

    On a machine without GPUs a number starts that many CPU processes (gloo): slow, and right for trying things out.
    """
    visible = torch.cuda.device_count()
    if visible and not torch.cuda.is_available():  # else it would be a long run on the CPU, and nobody told
        raise UsageError(
            f"--gpus {gpus}: this machine has {visible} GPUs that torch {torch.__version__} cannot use (is the driver "
            "too old for it?); update the driver, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
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
    try:
        _meet("nccl" if device.type == "cuda" else "gloo")
        signs = dist.new_group(backend="gloo", timeout=TIMEOUT)
        yield Processes(dist.get_rank(), local_rank, dist.get_world_size(), device, signs)
    except BaseException as error:
        # nccl would wait here for the others, who wait for this one in an exchange. It ends, and all are told by that.
        if device.type != "cuda" and dist.is_initialized():
            dist.destroy_process_group()
        if isinstance(error, RuntimeError) and is_lost_process(error):
            raise others_lost(error) from error
        raise
    dist.destroy_process_group()


def _meet(backend: str) -> None:
    """Find the others: through the file of our own launcher, or where torchrun or SLURM says."""
    meeting = os.environ.get(launcher_messages.MEETING)
    store: Any
    if meeting is not None:
        if not Path(meeting).parent.exists():  # torch would look for it for five minutes
            _say_of_this(f"{Path(meeting).parent}, through which the processes find each other, is gone; this one ends")
            raise SystemExit(RESTART)
        store = dist.FileStore(meeting, int(os.environ["WORLD_SIZE"]))  # type: ignore[attr-defined]
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # Here torchrun keeps one store for all its restarts, with the addresses of processes that are dead.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        kept = dist.TCPStore(address, port, is_master=False, timeout=TIMEOUT)  # type: ignore[attr-defined]
        store = dist.PrefixStore(f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}", kept)  # type: ignore[attr-defined]
    else:
        dist.init_process_group(backend, timeout=TIMEOUT)
        return
    store.set_timeout(TIMEOUT)
    rank, count = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)


@contextmanager
def others_wait(processes: Processes) -> Iterator[None]:
    """Within it the process that writes may take its time: the others wait for it at the end, as long as it lives.

    They need its sign every TIMEOUT, which it gives every few seconds from a thread; no exchange may be made within.
    """
    if processes.signs is None:
        yield
    elif processes.writes:
        over = threading.Event()
        giving = threading.Thread(target=_give_signs, args=(processes.signs, over), daemon=True)
        giving.start()
        try:
            yield
        finally:
            over.set()
            giving.join()
    else:
        yield
        at_work = torch.ones(())
        while at_work:
            dist.broadcast(at_work, 0, processes.signs)


def _give_signs(group: Any, over: threading.Event) -> None:
    began_s = time.monotonic()
    at_work = True
    while at_work and time.monotonic() - began_s < SIGNS_END_S:
        at_work = not over.wait(SIGN_EVERY_S)
        try:
            dist.broadcast(torch.tensor(float(at_work)), 0, group)
        except RuntimeError:  # another process is lost: the next exchange says so
            return


def agreed(processes: Processes, signal_number: int, due: bool) -> tuple[int, bool]:
    """The signal that any process was sent (0: none), and whether the one that writes finds a checkpoint due.

    Each asked by itself would be wrong: signals come to one, and no two clocks agree on when ten minutes are over.
    """
    if processes.count == 1:
        return signal_number, due
    asked = torch.tensor([signal_number, due and processes.writes], device=processes.device)
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    number, due_there = asked.tolist()
    return number, bool(due_there)


def is_lost_process(error: RuntimeError) -> bool:
    """Whether another process went away in the middle of an exchange, or did not come: it is said in words alone."""
    text = str(error)
    if text.startswith(NOT_COME):
        return True
    return (isinstance(error, dist.DistError) or "gloo" in text) and any(words in text for words in LOST)


def others_lost(error: RuntimeError) -> SystemExit:
    """What ends a process that has lost another. Each says so, in a line, on whatever of its own is kept."""
    (first, *_) = str(error).splitlines() or [""]
    _say_of_this(
        f"another process of this run is lost, or was slower than HISTOSSL_TIMEOUT_S={TIMEOUT.total_seconds():g}; "
        f"this one ends too ({first})"
    )
    return SystemExit(RESTART)


def _say_of_this(text: str) -> None:
    sys.stderr.write(f"process {os.environ.get('RANK', '?')}: {text}\n")
