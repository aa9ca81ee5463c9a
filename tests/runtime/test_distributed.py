"""Processes beside others: how they meet, wait for each other, and end when one is lost."""

import os
import re
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from histossl.core.errors import UsageError
from histossl.runtime import distributed
from histossl.runtime.distributed import (
    Processes,
    agreed,
    gpu_of,
    is_lost_process,
    is_worker,
    joined,
    num_processes_for,
    others_wait,
)


def _two(rank: int, folder: str, sign_every_s: float, work_s: float) -> None:
    """Rank 0 works alone while the other waits. Leaves how long each was there, or what it was told."""
    distributed.SIGN_EVERY_S = sign_every_s
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    dist.barrier()  # on a busy machine they come seconds apart
    signs = dist.new_group(backend="gloo", timeout=timedelta(seconds=4))
    began_s = time.monotonic()
    try:
        with others_wait(Processes(rank, rank, 2, torch.device("cpu"), signs)):
            time.sleep(work_s if rank == 0 else 0)
        said = f"{time.monotonic() - began_s}"
    except RuntimeError:
        said = "lost"
    Path(folder, str(rank)).write_text(said)
    os._exit(0)  # gloo may abort a process that ends with a broken connection


@pytest.mark.parametrize(("sign_every_s", "work_s", "lost"), [(0.3, 8.0, False), (60.0, 12.0, True)])
def test_work_of_one_process_may_take_longer_than_the_time_out_while_it_gives_signs(
    tmp_path: Path, sign_every_s: float, work_s: float, lost: bool
) -> None:
    """A time-out of 4 s: eight seconds of work with signs are waited for, silence is not."""
    mp.start_processes(_two, (str(tmp_path), sign_every_s, work_s), nprocs=2, start_method="spawn")
    said = (tmp_path / "1").read_text()
    assert (said == "lost") == lost
    if not lost:
        assert float(said) > work_s - 1
    assert float((tmp_path / "0").read_text()) >= work_s  # nobody breaks off what it does


def _agree(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    processes = Processes(rank, rank, 2, torch.device("cpu"))
    told = [
        agreed(processes, 0, due=rank == 1),  # the clock of the one that does not write is ahead
        agreed(processes, 0, due=rank == 0),
        agreed(processes, signal.SIGTERM if rank == 1 else 0, due=False),
    ]
    Path(folder, str(rank)).write_text(repr(told))
    dist.destroy_process_group()


def test_clocks_that_differ_make_no_process_save_alone(tmp_path: Path) -> None:
    mp.start_processes(_agree, (str(tmp_path),), nprocs=2, start_method="spawn")
    wanted = repr([(0, False), (0, True), (int(signal.SIGTERM), False)])
    assert [(tmp_path / rank).read_text() for rank in "01"] == [wanted, wanted]


def _loses_another(rank: int, folder: str) -> None:
    """Rank 1 dies where rank 0 waits for it. Leaves what rank 0 says, and its exit code."""
    port = Path(folder, "port").read_text()
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port})
    sys.stderr = Path(folder, str(rank)).open("w")  # noqa: SIM115
    try:
        with joined() as processes:
            dist.barrier()
            if rank == 1:
                os._exit(0)
            dist.all_reduce(torch.ones(1, device=processes.device))
    except SystemExit as end:
        sys.stderr.write(f"exit code {end.code}")
    sys.stderr.flush()
    os._exit(0)


def test_who_loses_another_process_says_so_wherever_it_is(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    mp.start_processes(_loses_another, (str(tmp_path),), nprocs=2, start_method="spawn")
    said = (tmp_path / "0").read_text()
    assert "process 0: another process of this run is lost, or was slower than HISTOSSL_TIMEOUT_S=" in said
    assert said.endswith("exit code 75")


def _meets(rank: int, folder: str, port: int, restart: int) -> None:
    variables = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    torchruns = {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": restart}
    os.environ.update({name: str(value) for name, value in {**variables, **torchruns}.items()})
    time.sleep(3 * restart * rank)  # who comes first reads what is there of the other
    with joined():
        dist.barrier()
        Path(folder, f"{rank}-{restart}").touch()
        os._exit(0)


@pytest.mark.slow
def test_processes_that_torchrun_starts_again_do_not_call_the_dead_ones(tmp_path: Path) -> None:
    """Its store outlives them, with their addresses."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    for restart in (0, 1):
        mp.start_processes(_meets, (str(tmp_path), store.port, restart), nprocs=2, start_method="spawn")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["0-0", "0-1", "1-0", "1-1"]


def test_processes_send_each_other_numbers_and_nothing_that_is_unpickled() -> None:
    """Between machines nobody asks who sends."""
    package = Path(distributed.__file__).parents[1]
    assert not [path for path in package.rglob("*.py") if re.search(r"_object(_list)?\(", path.read_text("utf-8"))]


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242"), True),
        (RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 180000ms for recv"), True),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (dist.DistBackendError("NCCL error: invalid usage: Duplicate GPU detected : rank 0 and rank 1"), False),
        (RuntimeError("[/gloo/transport/tcp/pair.cc:144] no error: connectFullMesh failed: refused"), False),
        (RuntimeError("Wait timeout"), True),  # torch's FileStore, of one that has not come
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_mistakes_are_not_taken_for_a_lost_process(error: RuntimeError, lost: bool) -> None:
    assert is_lost_process(error) == lost


def test_in_one_process_clock_and_signal_are_its_own() -> None:
    assert agreed(Processes(0, 0, 1, torch.device("cpu")), 15, True) == (15, True)


def test_gpus_that_torch_cannot_use_are_no_reason_to_train_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for asked in ("auto", "2"):
        with pytest.raises(UsageError, match=r"4 GPUs that torch .* cannot use.*driver"):
            num_processes_for(asked)


def test_in_one_process_nobody_waits() -> None:
    with others_wait(Processes(0, 0, 1, torch.device("cpu"))):
        pass


def test_a_process_that_hangs_is_noticed_within_minutes() -> None:
    assert distributed.TIMEOUT.total_seconds() <= 180


def test_a_batch_script_is_no_worker_before_srun_has_started_any(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in (*ours, "SLURM_STEP_NUM_TASKS"):
        monkeypatch.setenv(name, "")  # so that what is_worker sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert not is_worker()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert is_worker()
    assert os.environ["WORLD_SIZE"] == "4"


def test_a_task_that_sees_one_gpu_takes_it_whatever_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    assert gpu_of(2, 4) == 2
    with pytest.raises(UsageError, match="process 1 of this machine has no GPU: it shows 1"):
        gpu_of(1, 1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert gpu_of(1, 1) == 0
