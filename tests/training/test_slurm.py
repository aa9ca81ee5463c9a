"""SLURM without SLURM: tasks that find each other by its variables, and the jobs of examples/slurm.md as printed.

A stand-in for `srun` starts the tasks and tells them what SLURM would; signals go to whom SLURM would send them.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from synthetic_store import write_synthetic_store

from histossl.core.workspace import PretrainDir, Workspace
from histossl.runtime.distributed import is_worker, tasks_on_node
from histossl.runtime.process_pool import loader_threads
from histossl.tiles.store.index import TileIndex
from histossl.training.pretrain import pretrain
from histossl.training.run_files.checkpoint import load_checkpoint
from tests.training.test_pretrain import QUICK, TINY, command, rows

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "examples" / "slurm.md").read_text(encoding="utf-8")
JOBS = [job for job in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) if "#SBATCH --signal" in job]

SRUN = """
import itertools, os, pathlib, subprocess, sys
options = list(itertools.takewhile(lambda word: word.startswith("--"), sys.argv[1:]))
count = os.environ["SLURM_NTASKS"]
step = {"SLURM_STEP_NUM_TASKS": count, "SLURM_STEP_TASKS_PER_NODE": count}
a_task_per_node = os.environ.get("SLURM_NNODES") == count
step |= {"SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
tasks = [
    subprocess.Popen(
        sys.argv[1 + len(options) :],
        env={
            **os.environ,
            **step,
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NODEID": str(rank if a_task_per_node else 0),
        },
    )
    for rank in range(int(count))
]
codes = [task.wait() for task in tasks]
highest = max(code if code >= 0 else 128 - code for code in codes)
pathlib.Path(os.environ.get("SRUN_ENDED", os.devnull)).write_text(str(highest))
sys.exit(highest)
"""
SCONTROL = """
import os, pathlib, sys
if sys.argv[1] == "requeue":
    pathlib.Path(os.environ["REQUEUED"]).write_text(sys.argv[2])
else:
    print("localhost")
"""


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> TileIndex:
    workspace = Workspace(tmp_path_factory.mktemp("store"))
    return write_synthetic_store(workspace, slides=("A1", "A2", "B1", "B2"), tiles_per_slide=16, tile_px=40)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def stand_in(folder: Path, name: str, text: str) -> None:
    program = folder / name
    program.write_text(f"#!{sys.executable}\n{text}")
    program.chmod(0o755)


def environment(folder: Path, **more: str) -> Mapping[str, str]:
    path = os.pathsep.join((str(folder), str(Path(sys.executable).parent), os.environ["PATH"]))
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **more}


# ---- tasks of srun


def test_tasks_of_slurm_compute_the_run_of_one_process(index: TileIndex, tmp_path: Path, free_port: int) -> None:
    """Two of srun's tasks on loopback, where no scontrol names the hosts."""
    workspace = index.path.parents[1]
    stand_in(tmp_path, "srun", SRUN)
    line = ["srun", sys.executable, "-m", "histossl", *command(workspace, "--name", "tasks")]
    variables = environment(tmp_path, SLURM_NTASKS="2", SLURM_JOB_ID="7", MASTER_PORT=str(free_port))
    done = subprocess.run(line, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "x 2 processes" in done.stderr
    together, alone = (PretrainDir(workspace / "pretrain" / name) for name in ("tasks", "alone"))
    pretrain(index, alone, replace(TINY, steps=4), replace(QUICK, monitor_every=50))
    one, two = load_file(alone.backbone), load_file(together.backbone)
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize(
    ("per_node", "wanted"),
    [("2(x3),1", [2, 2, 2, 1]), ("4", [4, 4]), ("1,12(x2)", [1, 12, 12]), ("3,2", [3, 2]), ("8(x2)", [8, 8])],
)
def test_tasks_are_counted_on_each_node(per_node: str, wanted: list[int]) -> None:
    assert [tasks_on_node(per_node, node) for node in range(len(wanted))] == wanted


@pytest.fixture
def step_of_slurm(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The second of two nodes, with one of its four tasks."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what is_worker sets is undone
        monkeypatch.delenv(name)
    for name, value in {"STEP_NUM_TASKS": "5", "STEP_TASKS_PER_NODE": "1,4", "NODEID": "1", "PROCID": "3"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("bound_to", "cpus_on_node", "threads"),
    [
        (32, None, 7),  # every task sees all cores of the node
        (32, 32, 7),
        (128, 32, 7),  # ... and cores that are not this job's
        (8, 32, 7),  # each has cores of its own, which are shared with nobody
        (1, 4, 1),
    ],
)
def test_tasks_on_one_node_share_its_cores(
    step_of_slurm: pytest.MonkeyPatch, bound_to: int, cpus_on_node: int | None, threads: int
) -> None:
    step_of_slurm.setattr(os, "sched_getaffinity", lambda _: set(range(bound_to)), raising=False)
    if cpus_on_node:
        step_of_slurm.setenv("SLURM_CPUS_ON_NODE", str(cpus_on_node))
    assert is_worker()
    assert os.environ["LOCAL_WORLD_SIZE"] == "4"
    assert loader_threads(1) == threads


def test_where_no_scontrol_is_tasks_meet_at_the_node_that_launched_them(
    step_of_slurm: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    step_of_slurm.setenv("PATH", str(tmp_path))
    step_of_slurm.setenv("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.2")
    assert is_worker()
    assert os.environ["MASTER_ADDR"] == "127.0.0.2"


# ---- the jobs of examples/slurm.md


def test_no_job_has_a_rendezvous_that_unpickles_what_strangers_write() -> None:
    """torch's c10d rendezvous does, and its --standalone is one."""
    assert [job for job in JOBS if "torchrun" in job]
    for job in JOBS:
        assert ("--rdzv-backend=static" in job) == ("torchrun" in job)
        assert "--standalone" not in job


def small(job: str, name: str, pretraining: list[str], count: int, port: int) -> str:
    """The job as printed, but for the run's name and size, the number of processes, and a port that is free."""
    job = re.sub(r"histossl pretrain --name vits.*? --epochs 50", f"histossl {shlex.join(pretraining)}", job)
    job = job.replace("pretrain/vits/", f"pretrain/{name}/").replace("port=29500", f"port={port}")
    return re.sub(r"--nproc-per-node=\d+", f"--nproc-per-node={count}", job)


@pytest.mark.parametrize(
    ("number", "num_tasks"),
    [(0, 1), (1, 2), (2, 1), pytest.param(2, 2, marks=pytest.mark.slow)],
    ids=["histossl", "srun", "torchrun", "two-torchruns"],
)
def test_a_job_as_printed_saves_when_slurm_warns_it(
    index: TileIndex, tmp_path: Path, free_port: int, number: int, num_tasks: int
) -> None:
    """The script ends with 0 and is put back in the queue. Two torchruns stand for two nodes."""
    assert len(JOBS) == 3
    job, workspace, name = JOBS[number], index.path.parents[1], f"job-{number}-{num_tasks}"
    text = small(job, name, command(workspace, "--name", name, steps=4000), 2 // num_tasks, free_port)
    (tmp_path / "job.sh").write_text(text)
    stand_in(tmp_path, "srun", SRUN)
    stand_in(tmp_path, "scontrol", SCONTROL)
    of_job = {"NTASKS": num_tasks, "NNODES": num_tasks, "CPUS_PER_TASK": 8, "JOB_ID": 7}
    variables = environment(
        tmp_path,
        **{f"SLURM_{key}": str(value) for key, value in of_job.items()},
        SLURM_JOB_NODELIST="node[1-2]",
        MASTER_PORT=str(free_port),
        HISTOSSL_WORKSPACE=str(workspace),
        REQUEUED=str(tmp_path / "requeued"),
        SRUN_ENDED=str(tmp_path / "srun-ended"),
    )
    run, log = PretrainDir(workspace / "pretrain" / name), tmp_path / "said.txt"
    with log.open("w") as errors:
        script = subprocess.Popen(["bash", tmp_path / "job.sh"], env=variables, stderr=errors)
    shell = psutil.Process(script.pid)
    deadline_s = time.monotonic() + 200
    while not (run.log.exists() and len(rows(run)) > 3) and script.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.05)
    started = shell.children(recursive=True)
    assert started, log.read_text()
    batch, how = re.search(r"#SBATCH --signal=(B:)?(\w+)@\d+", job).groups()  # type: ignore[union-attr]
    try:
        for process in [shell] if batch else started[0].children():  # what srun started, and not what those started
            process.send_signal(signal.Signals[f"SIG{how}"])
        script.wait(timeout=200)
    finally:
        _, left = psutil.wait_procs(started, timeout=5)
        for process in [script, *left]:
            process.kill()
    said = log.read_text()
    assert not left, said
    assert script.returncode == 0, said
    if not batch:  # of a signal that it handed on torchrun makes a failure
        assert (tmp_path / "srun-ended").read_text() == ("1" if "torchrun" in job else "0"), said
    assert said.count("the same command goes on from there") == 1
    state = load_checkpoint(run)
    assert state is not None
    assert state["step"] == max(row["step"] for row in rows(run))
    assert (tmp_path / "requeued").read_text() == "7"
