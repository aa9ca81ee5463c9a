"""What the README says is true: every command is in it, and every command line in it runs."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from histossl.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
# Small stand-ins for what a lab has: a tiny network, few steps. They are added to the README's own words.
SMALL = {
    "pretrain": "--backbone resnet10t --weights random --steps 2 --batch-size 8 --view-px 32",
    "plan": "--backbone resnet10t --weights random --steps 2 --batch-size 8 --view-px 32",
    "finetune": "--draws 2 --folds 2 --budgets 1,2 --starts random,adapted,colour",
    "demo": "--slides 12 --steps 2",
    "views": "--tiles 2",
    "bench": "--backbone resnet10t --batch-size 8 --view-px 32 --steps 1",
}
COMMAND_LINES = sorted(
    {
        line.replace(".venv/bin/", "").split("&& ")[-1].strip()
        for language, text in FENCES
        if language == "bash"
        for line in text.replace("\\\n", " ").splitlines()
        if re.search(r"(^|/)histossl [a-z]", line.split("&& ")[-1].strip()) and "docker" not in line
    }
)


def test_every_command_is_documented_and_every_documented_command_exists() -> None:
    there = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    told = set(re.findall(r"^\| `histossl (\w+)` \|", README, re.MULTILINE))
    assert told == there


def test_every_option_that_it_names_exists() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    known = {
        name
        for command in commands.values()
        for option in command.params
        for name in (*option.opts, *option.secondary_opts)
    }
    known |= {"--help", "--gpus", "--rm", "--shm-size", "--user", "--build-arg", "--workspace"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, painted_archive) -> Path:
    """A working directory with the painted archive where the README has its slides."""
    directory = tmp_path_factory.mktemp("lab")
    (directory / "slides").symlink_to(painted_archive.directory)
    (directory / "labels.csv").write_text(painted_archive.labels_csv.read_text())
    return directory


def test_there_are_command_lines_to_try() -> None:
    assert {"histossl demo", "histossl scan /data/slides --contact-sheet"} <= set(COMMAND_LINES)
    assert len(COMMAND_LINES) >= 7


def test_command_lines_run_as_written(lab: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab)
    order = ("scan", "tile", "views", "bench", "plan", "pretrain", "finetune", "demo")
    lines = sorted(COMMAND_LINES, key=lambda line: (order.index(shlex.split(line)[1]), line))
    for line in lines:
        name, *rest = shlex.split(line.replace("/data/slides", "slides"))[1:]
        if name == "finetune" and not list(lab.glob("histossl-workspace/pretrain/*/backbone.safetensors")):
            raise AssertionError("pretrain left no backbone")
        told = cli(name, *rest, *shlex.split(SMALL.get(name, "")))
        assert told.code == 0, f"{line}\n{told.err}"
    assert (lab / "histossl-workspace/finetune/default/report.html").exists()
    assert (lab / "histossl-demo").exists()


def test_the_two_commands_are_what_ci_runs() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "pip\" install --quiet --disable-pip-version-check -e '.[test]'" in ci
    assert '"$venv/bin/pytest"' in ci
    assert "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest" in README
