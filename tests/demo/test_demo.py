"""The demo goes the whole road, goes on where it was, and writes over nothing."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from histossl.cli import main
from histossl.core.config import DemoConfig
from histossl.core.errors import MismatchError, UsageError
from histossl.core.workspace import Workspace
from histossl.demo import run
from histossl.demo.run import run_demo


def test_only_paint_gives_an_archive_with_labels_and_nothing_else(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SIDE_PX", 256)
    told = cli("demo", "--only-paint", tmp_path / "archive", "--slides", 6)
    assert told.code == 0, told.err
    names = {path.name for path in (tmp_path / "archive").iterdir()}
    with (tmp_path / "archive" / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert names == {f"{row['slide']}.tif" for row in rows} | {"labels.csv", "painted.json"}
    assert len(rows) == 6
    assert {path.name for path in tmp_path.iterdir()} == {"archive"}


def test_painting_again_goes_on_and_never_over_something_else(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SIDE_PX", 256)
    archive = tmp_path / "archive"
    assert cli("demo", "--only-paint", archive, "--slides", 2).code == 0
    painted = {path.name: path.stat().st_mtime_ns for path in archive.iterdir()}
    assert cli("demo", "--only-paint", archive, "--slides", 2).code == 0
    assert {path.name: path.stat().st_mtime_ns for path in archive.iterdir()} == painted
    told = cli("demo", "--only-paint", archive, "--slides", 2, "--seed", 1)
    assert told.code == 2
    assert "seed was 0, now 1" in told.err
    (archive / "labels.csv").unlink()  # as after a kill: painted anew, to the same slides
    assert cli("demo", "--only-paint", archive, "--slides", 2).code == 0
    assert {path.name for path in archive.iterdir()} == set(painted)


def test_a_place_that_cannot_be_written_is_told_with_demo_s_own_option(cli, tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    told = cli("demo", "--output", tmp_path / "out")
    assert told.code == 1
    assert "cannot be made (Permission denied); pass --output DIR" in told.err
    assert "--workspace" not in told.err


def test_a_folder_with_other_things_is_left_alone(cli, tmp_path):
    (tmp_path / "labels.csv").write_text("slide,label\nmine,A\n")
    told = cli("demo", "--only-paint", tmp_path)
    assert told.code == 2
    assert "neither empty nor painted by histossl" in told.err
    assert [path.name for path in tmp_path.iterdir()] == ["labels.csv"]


@pytest.mark.parametrize("bad", [{"slides": 6}, {"steps": 0}, {"seed": -1}])
def test_a_demo_that_could_not_be_measured_is_refused(bad, tmp_path):
    with pytest.raises(UsageError, match=f"--{next(iter(bad))} "):
        run_demo(tmp_path / "out", DemoConfig(**bad))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A very small demo, run to its end."""
    output = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        assert main(["demo", "--output", str(output), "--slides", "12", "--steps", "2"]) == 0
    return output


def make_small(patch):
    patch.setattr(run, "SIDE_PX", 1024)
    patch.setattr(run, "BACKBONE", "test_resnet")
    patch.setattr(run, "BATCH_SIZE", 16)
    patch.setattr(run, "DRAWS", 1)


def test_the_whole_road_ends_in_a_report(finished):
    workspace = Workspace(finished / "workspace")
    assert workspace.archive_csv.exists()
    assert workspace.pretrain(run.NAME).backbone.exists()
    curve = workspace.finetune(run.NAME)
    assert curve.report.exists()
    with curve.points.open() as file:
        starts = {row["start"] for row in csv.DictReader(file)}
    assert starts == {"random", "adapted", "colour"}  # no ImageNet start that was not there


def test_the_second_time_nothing_is_done_twice(finished, cli, monkeypatch):
    make_small(monkeypatch)
    kept = [path for path in finished.rglob("*") if path.suffix in (".tif", ".zip", ".h5", ".safetensors")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert len(before) > 12 + 12
    told = cli("demo", "--output", finished, "--slides", 12, "--steps", 2)
    assert told.code == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert "painted before" in told.err
    assert "finished before" in told.err
    assert str(Workspace(finished / "workspace").finetune(run.NAME).report.resolve()) in told.err


def test_every_command_it_prints_is_one_that_does_the_same(finished, cli, monkeypatch):
    """Each stage prints its own command; run by hand in the same place, each finds its work done."""
    make_small(monkeypatch)
    told = cli("demo", "--output", finished, "--slides", 12, "--steps", 2)
    commands = [line.split(": histossl ", 1)[1] for line in told.err.splitlines() if line.startswith("[")]
    assert [command.split()[0] for command in commands] == ["demo", "scan", "tile", "pretrain", "finetune"]
    for command in commands:
        by_hand = cli(*command.split())
        assert by_hand.code == 0, (command, by_hand.err)


def test_another_demo_does_not_go_into_the_same_place(finished):
    with pytest.raises(MismatchError, match="--steps was 2, now 3"):
        run_demo(finished, DemoConfig(slides=12, steps=3))


@pytest.mark.slow
def test_a_killed_demo_goes_on(tmp_path):
    """SIGKILL in the middle of painting, tiling, pretraining and finetuning; the report equals the unbroken one's."""

    def start(output):
        code = "import sys; from histossl.demo import run; run.SIDE_PX = 1024; run.BATCH_SIZE = 16; run.DRAWS = 2; "
        code += "run.BACKBONE = 'test_resnet'; from histossl.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "demo", "--output", str(output), "--slides", "12", "--steps", "40"]
        return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)

    def reached(output: Path, pattern: str) -> bool:
        return any(output.glob(pattern))

    output = tmp_path / "killed"
    for moment in (
        "slides/*.tif",
        "workspace/tiles/*.zip",
        "workspace/pretrain/demo/log.jsonl",
        "workspace/finetune/demo/splits.json",
    ):
        process = start(output)
        while not reached(output, moment):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    process = start(output)
    _, told = process.communicate(timeout=500)
    assert process.returncode == 0, told
    process = start(tmp_path / "unbroken")
    _, told = process.communicate(timeout=500)
    assert process.returncode == 0, told

    def points(at):
        return (at / "workspace" / "finetune" / "demo" / "points.csv").read_text()

    assert points(output) == points(tmp_path / "unbroken")
    assert json.loads((output / "demo.json").read_text())["config"]["steps"] == 40
