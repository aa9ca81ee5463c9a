"""A field of a config is an option of the command line, of TOML and of run.json, by one edit."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from histossl.cli.from_config import Given, command
from histossl.core.config import write_run
from histossl.core.errors import UsageError
from histossl.core.options import REQUIRED, Checked, above, between, numbers, one_of, option, read_list, show_list


@dataclass(frozen=True)
class Inner(Checked):
    share: float = option(0.5, "Share of a tile.", check=between(0, 1, "a share between 0 and 1"))


@dataclass(frozen=True)
class Dummy(Checked):
    labels: Path = option(REQUIRED, "A table.", metavar="FILE.csv")
    tile_px: int = option(256, "Side in pixels.", "Data", check=between(16, 4096))
    lr: float = option(0.0, "Peak learning rate.", "Method", check=above(0), unset="from the batch size")
    mpp: tuple[float, ...] = option((0.5,), "Scales.", read=numbers(float, "numbers like 0.5,1"), show=show_list)
    starts: tuple[str, ...] = option((), "Starts.", read=read_list, show=show_list)
    set: tuple[str, ...] = option((), "A knob.", metavar="KEY=VALUE")
    grid: str = option("auto", "How.", check=one_of("auto", "native"))
    pen: bool = option(True, "Reject pen.")
    again: bool = option(False, "Once more.")
    inner: Inner = field(default_factory=Inner)
    digest: str = ""  # what a stage fills in is no option


@pytest.fixture
def run():
    app, got = typer.Typer(), []

    @command(app, group="Dummies", epilog="", without=("again",), change={"grid": {"help": "Another grid."}})
    def dummy(config: Dummy, given: Given) -> None:
        """What it does."""
        got.append((config, given))

    app.command("other")(lambda: None)

    def go(*arguments: str) -> Any:
        told = CliRunner().invoke(app, ["dummy", *arguments], env={"COLUMNS": "120", "NO_COLOR": "1"})
        if isinstance(told.exception, UsageError):
            raise told.exception
        assert told.exit_code == 0, told.output
        return got[-1] if got else told.output

    return go


def test_defaults_are_the_fields(run) -> None:
    config, given = run("--labels", "a.csv")
    assert config == Dummy(Path("a.csv"))
    assert "labels" in given
    assert "lr" not in given


def test_options_fill_the_fields(run) -> None:
    config, _ = run(
        *("--labels", "a.csv", "--tile-px", "64", "--lr", "1e-3", "--mpp", "0.5,1", "--starts", "a, b"),
        *("--set", "x=1", "--set", "y=2", "--grid", "native", "--no-pen", "--share", "0.1"),
    )
    assert config == Dummy(
        Path("a.csv"), 64, 1e-3, (0.5, 1.0), ("a", "b"), ("x=1", "y=2"), "native", pen=False, inner=Inner(0.1)
    )


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--tile-px", "8", "must be 16 to 4096"),
        ("--share", "1.5", "must be a share between 0 and 1"),
        ("--share", "nan", "must be a share between 0 and 1"),
        ("--lr", "0", "must be a number above 0; leave it out for the default"),
        ("--lr", "inf", "must be a number above 0"),
        ("--mpp", "0.5,x", "must be numbers like 0.5,1"),
        ("--grid", "natve", "must be one of auto, native, did you mean 'native'?"),
    ],
)
def test_a_value_out_of_range_is_one_line(run, option: str, value: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        run("--labels", "a.csv", option, value)
    assert str(error.value) == f"{option} {value}: {words}"


def test_a_config_made_in_python_is_checked_too() -> None:
    with pytest.raises(UsageError, match="--share 2: must be"):
        Inner(2.0)


def test_help_shows_panels_defaults_and_what_is_worked_out(run) -> None:
    told = run("--help")
    for said in (
        "Side in pixels. [default: 256]",
        "Default: from the batch size.",
        "Data",
        "--no-pen",
        "Another grid.",
    ):
        assert said in told, said
    assert "--digest" not in told
    assert "--again" not in told


def test_a_toml_file_says_the_same_and_the_command_line_wins(run, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('tile-px = 64\nlr = 0.0\nmpp = "0.5,1"\nset = ["x=1"]\npen = false\n')
    config, given = run("--labels", "a.csv", "--config", str(tmp_path / "a.toml"), "--tile-px", "32")
    assert config == Dummy(Path("a.csv"), 32, mpp=(0.5, 1.0), set=("x=1",), pen=False)
    assert "pen" in given


def test_a_new_field_is_in_run_json(run, tmp_path: Path) -> None:
    config, _ = run("--labels", "a.csv")
    write_run(tmp_path / "run.json", config)
    assert json.loads((tmp_path / "run.json").read_text())["config"]["tile_px"] == 256
