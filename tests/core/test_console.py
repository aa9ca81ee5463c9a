"""What a log file and a narrow terminal show can be read."""

from __future__ import annotations

import os
import subprocess
import sys
import types

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


def test_within_muted_nothing_is_printed_and_the_work_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with console.muted():
        console.say("said")
        console.warn("warned")
        console.table("a table", ["a"], [[1]])
        with console.progress("tiling", 3, "slides") as bar:
            bar.advance(3)
    assert (bar.done, *capsys.readouterr()) == (3, "", "")
    console.say("said again")
    assert capsys.readouterr().err == "said again\n"


class Shown:
    """What IPython's display gives back: it remembers what a notebook would show in its place."""

    def __init__(self, first: str) -> None:
        self.drawn = [first]

    def update(self, html: str) -> None:
        self.drawn.append(html)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> list[Shown]:
    """IPython as a kernel has it, which the tests do without."""
    shown: list[Shown] = []

    def display(html: str, display_id: bool) -> Shown:
        assert display_id
        shown.append(Shown(html))
        return shown[-1]

    module = types.ModuleType("IPython.display")
    module.__dict__.update(HTML=str, display=display)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(console.console, "is_jupyter", True)
    return shown


def test_in_a_notebook_progress_is_one_bar_drawn_again_in_its_place(
    notebook: list[Shown], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now_s[0])
    with console.progress("tiling <A&B>", 100, "slides") as bar:
        for _ in range(100):
            now_s[0] += 0.05
            bar.advance()
    (shown,) = notebook
    assert '<progress value="0" max="100">' in shown.drawn[0]
    assert '<progress value="100" max="100">' in shown.drawn[-1]
    assert "tiling &lt;A&amp;B&gt;: 100/100 slides" in shown.drawn[-1]
    assert 20 <= len(shown.drawn) <= 30  # a page is drawn five times a second, not with every tile
    assert capsys.readouterr() == ("", "")


def test_muted_draws_no_bar_in_a_notebook(notebook: list[Shown]) -> None:
    with console.muted(), console.progress("tiling", 3, "slides") as bar:
        bar.advance(3)
    assert not notebook
