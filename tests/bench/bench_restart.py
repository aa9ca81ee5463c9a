"""What it costs when one process of `pretrain --gpus 2` is killed: seconds from `kill -9` to the next step.

    python tests/bench/bench_restart.py               # rank 1, five times; three minutes on two cores
    python tests/bench/bench_restart.py slow 0 10     # rank 0 in the midst of steps of many seconds, ten times
    python tests/bench/bench_restart.py starting 1 5  # rank 1 before the processes have met

Only what is printed and what processes there are is looked at, so that any two versions can be compared.
"""

import itertools
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from synthetic_store import write_synthetic_store

from histossl.core.workspace import PretrainDir, Workspace

OPTIONS = "--weights random --log-every 1 --monitor-every 1000 --steps 100000 --workers 0 --gpus 2"
QUICK = "--backbone resnet10t --batch-size 8 --view-px 32 --checkpoint-every 5s --set batchnorm_group_tiles=4"
SLOW = "--backbone resnet50 --batch-size 32 --view-px 224 --checkpoint-every 1 --set batchnorm_group_tiles=4"
PATIENCE_S = 300


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def workers_of(launcher: psutil.Process) -> list[psutil.Process]:
    """By rank: they are started in that order."""
    return [one for one in sorted(launcher.children(), key=lambda one: one.pid) if alive(one) and is_ours(one)]


def is_ours(process: psutil.Process) -> bool:
    try:
        return "histossl" in process.cmdline()
    except psutil.Error:  # it ended just now
        return False


class Said:
    """What a command prints, and when."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.lines: list[tuple[float, str]] = []
        threading.Thread(target=self._read, args=(process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        for line in process.stderr or ():
            self.lines.append((time.monotonic(), line.rstrip()))

    def when(self, pattern: str, since_s: float) -> float | None:
        return next((at_s for at_s, line in self.lines if at_s > since_s and re.search(pattern, line)), None)


def until(there: object) -> float:
    deadline_s = time.monotonic() + PATIENCE_S
    while not there():  # type: ignore[operator]
        if time.monotonic() > deadline_s:
            raise TimeoutError
        time.sleep(0.02)
    return time.monotonic()


def num_rows(run: PretrainDir) -> int:
    return run.log.read_bytes().count(b"\n") if run.log.exists() else 0


def once(workspace: Path, when: str, rank: int, name: str) -> dict[str, float]:
    """Seconds until the old processes are gone, new ones started, the checkpoint is read, and a step is done."""
    line = [sys.executable, "-m", "histossl", "pretrain", "-w", str(workspace), "--name", name]
    line += [*OPTIONS.split(), *(SLOW if when == "slow" else QUICK).split()]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    run, said = PretrainDir(workspace / "pretrain" / name), Said(process)
    launcher = psutil.Process(process.pid)
    try:
        until(lambda: len(workers_of(launcher)) == 2)
        old = workers_of(launcher)
        if when == "starting":
            time.sleep(1)
            old[rank].suspend()  # the other has come, and waits for it
            time.sleep(15)
        else:
            until(run.previous_checkpoint.exists)
            time.sleep(0.5)
        old[rank].kill()
        killed_s = time.monotonic()
        ended_s = until(lambda: not any(map(alive, old)))
        started_s = until(lambda: any(one not in old for one in workers_of(launcher)))
        ready = "x 2 processes" if when == "starting" else "going on from step"
        until(lambda: said.when(ready, killed_s))
        read_s = said.when(ready, killed_s) or 0
        rows = num_rows(run)
        stepped_s = until(lambda: num_rows(run) > rows)
    except TimeoutError:
        print("\n".join(line for _, line in said.lines), file=sys.stderr)
        raise
    finally:
        for one in [launcher, *launcher.children(recursive=True)]:
            one.kill()
        process.wait()
    marks = (killed_s, ended_s, started_s, read_s, stepped_s)
    parts = [later - earlier for earlier, later in itertools.pairwise(marks)]
    return dict(zip(("ended", "started", "read", "stepped", "in all"), [*parts, stepped_s - killed_s], strict=True))


def main(when: str = "quick", rank: str = "1", rounds: str = "5") -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_synthetic_store(Workspace(Path(folder)), ("A1", "A2", "B1", "B2"), tiles_per_slide=16, tile_px=256)
        taken = []
        for number in range(int(rounds)):
            taken.append(once(Path(folder), when, int(rank), f"run-{number}"))
            print("  ".join(f"{what} {seconds:.1f} s" for what, seconds in taken[-1].items()), flush=True)
        print("median: ", "  ".join(f"{what} {median(one[what] for one in taken):.1f} s" for what in taken[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
