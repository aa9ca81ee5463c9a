"""What a log file and a narrow terminal show can be read."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from rich.console import Console

from histossl.core import console


def test_off_a_terminal_progress_tells_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now_s[0])
    with console.progress("tiling", 100, "slides") as bar:
        bar.advance(20)  # of an earlier run
        for _ in range(5):
            now_s[0] += 12
            bar.advance(2, note="9 tiles/s")
    assert capsys.readouterr().err.splitlines()[-1] == "tiling: 30/100 slides, 60 s, about 7 min left  9 tiles/s"


@pytest.mark.parametrize("file", ["case1/TCGA-CR-7395-01A-01-TS1.0123456789.svs", "TCGA-CR-7395-01A-01-TS1.svs"])
def test_a_narrow_terminal_breaks_no_word_of_a_table(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    narrow = Console(width=80, record=True, stderr=True)
    monkeypatch.setattr(console, "console", narrow)
    columns = ("file", "status", "format", "size (px)", "mpp", "stain", "tiles")
    row = (file, "unreadable", "Hamamatsu NDPI/VMS", "139264x98304", "0.2527", "unknown", 54321)
    console.table("3 files", columns, [row] * 3)
    shown = narrow.export_text()
    for word in (file, "unreadable", "139264x98304", "0.2527", "unknown", "54321"):
        assert shown.count(word) == 3, shown
    assert max(map(len, shown.splitlines())) <= 80


def _commands() -> list[str]:
    import typer

    from histossl.cli import app

    every: list[str] = []
    for name, command in typer.main.get_command(app).commands.items():
        every += [name, *(f"{name} {part}" for part in getattr(command, "commands", {}))]
    return every


@pytest.mark.parametrize("command", _commands())
def test_help_is_whole_in_80_columns(command: str) -> None:
    """Names of options above all: cut, they cannot be typed."""
    line = [sys.executable, "-m", "histossl", *command.split(), "--help"]
    environment = {**os.environ, "COLUMNS": "80"}
    told = subprocess.run(line, capture_output=True, text=True, check=True, env=environment).stdout
    cut = [each for each in told.splitlines() if "…" in each]
    assert not [each for each in cut if each.lstrip("│ ").startswith("-")]
    assert len(cut) <= 1  # a long path in an explanation
