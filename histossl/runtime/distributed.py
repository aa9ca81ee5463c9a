"""One process or many: joining torchrun or SLURM, starting our own processes, and who may write.

`histossl pretrain --gpus 4` starts itself four times through torch's elastic launcher and joins what it started.

A process that dies is noticed at once on CPUs (gloo). One that hangs, or whose machine is gone, is noticed when for
TIMEOUT it has not come to an exchange, and so is any on GPUs, where the others stand in a wait of nccl's that no signal
ends; then all are started again from the last checkpoint. So it is short; what one process does alone (asking the
probe, writing a checkpoint) may take longer, for there the others wait in `others_wait` and are given signs of life.
What TIMEOUT must outlast is one process loading tiles or compiling more slowly than the others: where a disk stalls for
minutes, or tasks start further apart, set HISTOSSL_TIMEOUT_S (seconds).
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from histossl.core import console
from histossl.core.errors import TrainingError, UsageError
from histossl.runtime import launcher_messages

TIMEOUT = timedelta(seconds=float(os.environ.get("HISTOSSL_TIMEOUT_S") or 180))
SIGN_EVERY_S = 10.0
SIGNS_END_S = 3600.0  # whoever works alone for longer hangs, too
# What processes have to end their step, look and save in when they are asked to stop. torch's own is half a minute.
STOP_S = 600
RESTART = 75  # exit code of a worker that wants to be started again (EX_TEMPFAIL)
# What gloo, and torch for nccl, say of a process that is gone or has not come. Whatever else they say is a mistake.
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
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        signs = dist.new_group(backend="gloo", timeout=TIMEOUT)
        yield Processes(dist.get_rank(), local_rank, dist.get_world_size(), device, signs)
    except BaseException as error:
        # nccl would wait here for the others, who wait for this one in an exchange. It ends, and all are told by that.
        if device.type != "cuda":
            dist.destroy_process_group()
        if isinstance(error, RuntimeError) and is_lost_process(error):
            raise others_lost(error) from error
        raise
    dist.destroy_process_group()


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
    return (isinstance(error, dist.DistError) or "gloo" in text) and any(words in text for words in LOST)


def others_lost(error: RuntimeError) -> SystemExit:
    """What ends a process that has lost another. Each says so, in a line, on whatever of its own is kept."""
    (first, *_) = str(error).splitlines() or [""]
    sys.stderr.write(
        f"process {os.environ.get('RANK', '?')}: another process of this run is lost, or was slower than "
        f"HISTOSSL_TIMEOUT_S={TIMEOUT.total_seconds():g}; this one ends too ({first})\n"
    )
    return SystemExit(RESTART)


def launch(count: int, arguments: Sequence[str], max_restarts: int) -> int:
    """Run `histossl ARGUMENTS` in `count` processes; a worker that dies is restarted with the others. The exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Without it a restarted worker may read the addresses of the round before (seen in 3 of 7 restarts).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    for name in ("", ".agent.server.api"):  # the latter has a level of its own
        logging.getLogger(f"torch.distributed.elastic{name}").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="histossl-") as directory:
        note = Path(directory) / "failure.json"
        os.environ[launcher_messages.NOTE], os.environ[launcher_messages.LAUNCHER] = str(note), str(os.getpid())
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
            code = launcher_messages.read_end(note) or 0
        except ChildFailedError as error:
            first = next(iter(error.failures.items()))  # of those that have lost another, if there are no others
            rank, failure = next((one for one in error.failures.items() if one[1].exitcode != RESTART), first)
            code = 1
            if not note.exists():
                raise TrainingError(
                    f"process {rank} ended with {_how(failure.exitcode)} and {max_restarts} restarts did not help; its "
                    "own words are above. The same command goes on from the last checkpoint"
                ) from error
        except SignalException as error:  # handed on to the workers, which save and stop, and say so
            ended = launcher_messages.read_end(note)
            code = 128 + error.sigval if ended is None else ended  # as of one process that could not save any more
        finally:
            del os.environ[launcher_messages.NOTE], os.environ[launcher_messages.LAUNCHER]
        told = launcher_messages.read_note(note)
    if told is not None:
        code, text = told
        console.fail(text)
    return code


def _patience(config: type) -> dict[str, Any]:
    """Where torch can be told how long a process that was asked to stop may take (2.10 cannot everywhere)."""
    return {"shutdown_timeout": STOP_S} if "shutdown_timeout" in inspect.signature(config).parameters else {}


def _how(exitcode: int) -> str:
    return f"signal {signal.Signals(-exitcode).name}" if exitcode < 0 else f"exit code {exitcode}"
