"""`--gpus N`: what the launcher does when its processes die, fail or are asked to stop, and who else can reach them.

The processes are little programs where what they compute does not matter.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from synthetic_store import write_synthetic_store

from histossl.core.errors import HistosslError, TrainingError
from histossl.core.workspace import PretrainDir, Workspace
from histossl.runtime import launcher, launcher_messages
from histossl.runtime.launcher import launch
from histossl.tiles.store.index import TileIndex
from histossl.training.run_files.checkpoint import load_checkpoint
from tests.training.test_pretrain import command, rows, workers_of

Program = Callable[[str], None]


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Set what each process is to run; `rank`, `attempt` (how often it was started before) and `here` are known."""
    monkeypatch.chdir(tmp_path)
    before = """
        import json, os, pathlib, signal, sys, time
        rank, here = int(os.environ["RANK"]), pathlib.Path.cwd()
        started = here / f"started-{rank}"
        attempt = started.stat().st_size if started.exists() else 0
        started.write_bytes(bytes(attempt + 1))
        def tell(*words):
            os.write(int(os.environ["HISTOSSL_PIPE"]), json.dumps(words).encode() + b"\\n")
    """

    def program(text: str) -> None:
        (tmp_path / "program.py").write_text(textwrap.dedent(before) + textwrap.dedent(text))
        monkeypatch.setattr(launcher, "COMMAND", (sys.executable, str(tmp_path / "program.py")))

    return program


def times_started(rank: int = 0) -> int:
    return Path(f"started-{rank}").stat().st_size


@pytest.fixture
def asked(processes: Program) -> Iterator[Callable[..., None]]:
    """Send this process signals as soon as both programs say that they are ready."""
    threads = []

    def send(*numbers: signal.Signals) -> None:
        def wait() -> None:
            while not all(Path(f"ready-{rank}").exists() for rank in (0, 1)):
                time.sleep(0.02)
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.4)  # two of a kind would become one

        threads.append(threading.Thread(target=wait))
        threads[-1].start()

    yield send
    for thread in threads:
        thread.join()


# ---- deaths


def test_when_one_is_killed_the_others_end_too_though_they_hang(
    processes: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Deaf to signals, as one that waits in an exchange on a GPU."""
    monkeypatch.setattr(launcher, "GRACE_S", 0.3)
    processes("""
        if attempt == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
    """)
    assert launch(2, [], 1) == 0
    assert [times_started(rank) for rank in (0, 1)] == [2, 2]
    said = " ".join(capsys.readouterr().err.split())
    assert "process 1 ended with signal SIGKILL (out of memory?); all start again" in said
    assert "(restart 1 of 1)" in said


def test_a_checkpoint_that_is_being_written_is_waited_for(processes: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "GRACE_S", 0.3)
    processes("""
        if attempt == 0:
            if rank == 1:
                while not (here / "writing").exists():
                    time.sleep(0.02)
                os.kill(os.getpid(), signal.SIGKILL)
            tell("saving", "")
            (here / "writing").touch()
            time.sleep(3)
            (here / "written").touch()
            tell("saved", "")
            time.sleep(600)
    """)
    assert launch(2, [], 1) == 0
    assert Path("written").exists()


def test_when_no_restart_helps_it_is_told_who_died_and_of_what(processes: Program) -> None:
    processes("sys.exit(75 if rank == 0 else 3)")
    with pytest.raises(TrainingError, match="process 1 ended with exit code 3 and 2 restarts did not help"):
        launch(2, [], 2)
    assert times_started() == 3


def test_a_mistake_is_told_once_and_not_made_again(processes: Program, capsys: pytest.CaptureFixture[str]) -> None:
    """Longer than a pipe holds, too."""
    processes("""
        tell("failed", f"--lr is too high, says {rank}" + "!" * 100_000)
        sys.exit(2)
    """)
    assert launch(2, [], 3) == 2
    assert times_started() == 1
    said = capsys.readouterr().err
    assert said.count("error:") == 1
    assert "--lr is too high, says 0" in said


def test_what_each_attempt_meets_in_is_new_and_nobody_elses(
    processes: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of killed processes would mislead those that are started after them."""
    monkeypatch.setattr(launcher, "GRACE_S", 0.3)
    processes("""
        meeting = pathlib.Path(os.environ["HISTOSSL_MEETING"])
        assert rank or not meeting.exists()
        assert meeting.parent.stat().st_mode & 0o777 == 0o700
        if rank == 0:
            with (here / "seen").open("a") as seen:
                seen.write(f"{meeting}\\n")
            meeting.touch()
            if attempt < 2:
                time.sleep(600)
        elif attempt < 2:
            while not meeting.exists():
                time.sleep(0.02)
            sys.exit(75)
    """)
    launcher_umask = os.umask(0)
    try:
        assert launch(2, [], 2) == 0
    finally:
        os.umask(launcher_umask)
    seen = Path("seen").read_text().split()
    assert len(set(seen)) == 3
    assert not any(Path(one).parent.exists() for one in seen)


def test_without_a_temporary_folder_there_is_one_line(
    processes: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(HistosslError, match=r"no temporary folder.*No such file.*set TMPDIR"):
        launch(2, [], 0)


# ---- signals

SAVES = """
    def save(number, _):
        with (here / f"heard-{rank}").open("a") as heard:
            heard.write(f"{signal.Signals(number).name} ")
        sys.exit(130 if number == signal.SIGINT else 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, save)
    (here / f"ready-{rank}").touch()
    time.sleep(600)
"""


@pytest.mark.parametrize(
    ("sent", "heard", "code"),
    [("TERM", "TERM", 0), ("USR1", "USR1", 0), ("INT", "INT", 130), ("HUP", "TERM", 0), ("QUIT", "TERM", 0)],
)
def test_signals_are_handed_on_once_and_who_saved_has_ended_well(
    processes: Program, asked: Callable[..., None], sent: str, heard: str, code: int
) -> None:
    """A closed terminal or Ctrl-\\ would end them unsaved: they hear of it as of `kill`."""
    processes(SAVES)
    asked(signal.Signals[f"SIG{sent}"])
    assert launch(2, [], 3) == code
    assert [Path(f"heard-{rank}").read_text() for rank in (0, 1)] == [f"SIG{heard} "] * 2
    assert times_started() == 1


def test_processes_that_are_asked_to_stop_have_minutes_to_save() -> None:
    assert launcher_messages.STOP_S >= 300


def test_a_signal_that_ends_processes_before_they_saved_is_no_success(
    processes: Program, asked: Callable[..., None]
) -> None:
    processes('(here / f"ready-{rank}").touch(); time.sleep(600)')
    asked(signal.SIGTERM)
    assert launch(2, [], 3) == 143
    assert times_started() == 1


def test_a_third_ctrl_c_waits_for_nobody(processes: Program, asked: Callable[..., None]) -> None:
    processes("""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        (here / f"ready-{rank}").touch()
        time.sleep(600)
    """)
    asked(signal.SIGINT, signal.SIGINT, signal.SIGINT)
    assert launch(2, [], 3) == 130


def test_under_nohup_a_closed_terminal_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with launcher._signals_noted() as noted:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.01)
        assert noted == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- a launcher that is gone

FOLLOWS = """
import pathlib, sys, time
from histossl.runtime.launcher_messages import end_with_launcher
end_with_launcher()
pathlib.Path(sys.argv[1]).touch()
time.sleep(600)
"""
STARTS = """
import os, subprocess, sys, time
variable = sys.argv[1]
os.environ[variable] = str(os.getpid())
print(subprocess.Popen([sys.executable, *sys.argv[2:]]).pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("variable", [launcher_messages.LAUNCHER, "TORCHELASTIC_RUN_ID"], ids=["ours", "torchrun"])
def test_a_process_ends_with_its_launcher_whatever_it_does(tmp_path: Path, variable: str) -> None:
    """Also where it trains nothing: `finetune`, or a start that is not over."""
    (tmp_path / "follows.py").write_text(FOLLOWS)
    (tmp_path / "starts.py").write_text(STARTS)
    line = [sys.executable, str(tmp_path / "starts.py"), variable, str(tmp_path / "follows.py"), str(tmp_path / "up")]
    variables = {name: value for name, value in os.environ.items() if name != launcher_messages.LAUNCHER}
    parent = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    while not (tmp_path / "up").exists():
        time.sleep(0.02)
    assert child.is_running()
    parent.kill()
    _, said = parent.communicate(timeout=60)  # until the child, too, has let go of it
    child.wait(timeout=60)
    assert "its launcher is gone" in said


def test_words_to_a_launcher_that_is_gone_are_for_the_person(monkeypatch: pytest.MonkeyPatch) -> None:
    hears, tells = os.pipe()
    monkeypatch.setenv(launcher_messages.PIPE, str(tells))
    assert launcher_messages.tell_launcher(HistosslError("wrong"))
    os.close(hears)
    assert not launcher_messages.tell_launcher(HistosslError("wrong"))
    with launcher_messages.saving():
        pass
    os.close(tells)
    assert not launcher_messages.tell_launcher(HistosslError("wrong"))


# ---- strangers


# A process of its own: torch's client waits for ever where something listens that is no store.
STRANGER = """
import base64, contextlib, os, pickle, socket, sys, threading, time
from datetime import timedelta
import torch.distributed as dist

left, run, *ports = sys.argv[1:]

class Payload:
    def __reduce__(self):
        return os.system, (f"touch {left}",)

payload = pickle.dumps(Payload())

def write(port):
    store = dist.TCPStore("localhost", int(port), is_master=False, timeout=timedelta(seconds=2), wait_for_workers=False)
    for name in (f"histossl-{run}", "none"):
        store.set(f"torch.rendezvous.{name}", base64.b64encode(payload))
    print(port, flush=True)

for port in ports:
    threading.Thread(target=write, args=(port,), daemon=True).start()
time.sleep(3)
for port in ports:  # and to whatever else may listen there, as it is
    with contextlib.suppress(OSError):
        socket.create_connection(("localhost", int(port)), 1).sendall(payload * 10)
os._exit(0)
"""


def heard_by(ports: list[int], left: Path, run: int) -> list[int]:
    """Those where a store of torch's took what a stranger wrote, under the names that torch is known to read."""
    line = [sys.executable, "-c", STRANGER, *map(str, (left, run, *ports))]
    said = subprocess.run(line, capture_output=True, text=True, timeout=100, check=True)
    return [int(port) for port in said.stdout.split()]


def test_the_stranger_is_heard_where_torch_listens(tmp_path: Path) -> None:
    """Else the next test would pass whatever the launcher did."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    assert heard_by([store.port], tmp_path / "left", 7) == [store.port]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> TileIndex:
    workspace = Workspace(tmp_path_factory.mktemp("store"))
    return write_synthetic_store(workspace, slides=("A1", "A2", "B1", "B2"), tiles_per_slide=16, tile_px=40)


def under_way(index: TileIndex, name: str, folder: Path, *more: str) -> tuple[subprocess.Popen[str], PretrainDir]:
    """A run of two processes that has taken some steps, with its temporary files in `folder`."""
    workspace, run = index.path.parents[1], PretrainDir(index.path.parents[1] / "pretrain" / name)
    line = [sys.executable, "-m", "histossl", *command(workspace, "--gpus", "2", "--name", name, *more, steps=4000)]
    process = subprocess.Popen(
        line, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(folder)}, start_new_session=True
    )
    deadline_s = time.monotonic() + 200
    while not (run.log.exists() and len(rows(run)) > 3) and process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return process, run


def test_strangers_are_not_heard_and_cleaned_temporary_folders_cost_nothing(index: TileIndex, tmp_path: Path) -> None:
    """Every port that a process of the run listens on is for this machine alone, and none is a store of torch's.

    A second user of the machine is tried out by one who may do more: this one.
    """
    folder, left = tmp_path / "tmp", tmp_path / "heard"
    folder.mkdir()
    process, run = under_way(index, "strangers", folder)
    try:
        both = [psutil.Process(process.pid), *workers_of(psutil.Process(process.pid))]
        assert len(both) == 3
        listening = [one.laddr for each in both for one in each.net_connections() if one.status == "LISTEN"]
        assert listening, "gloo's"
        assert {address.ip for address in listening} <= {"127.0.0.1", "::1"}
        assert not heard_by([address.port for address in listening], left, process.pid)
        (meeting,) = folder.glob("histossl-*")
        assert meeting.stat().st_mode & 0o777 == 0o700
        for one in folder.iterdir():
            shutil.rmtree(one)
    finally:
        process.terminate()
        _, said = process.communicate(timeout=200)
    assert not left.exists()
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert said.count("the same command goes on from there") == 1
    state = load_checkpoint(run)
    assert state is not None
    assert state["step"] == max(row["step"] for row in rows(run))
