"""Names are data: no command prints one that a terminal obeys, and none writes one that a spreadsheet runs."""

import csv
import io
import random
import sys
import unicodedata
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import tifffile
from rich.console import Console
from synthetic_store import write_synthetic_store

from histossl import cli as commands
from histossl.core import console
from histossl.core.errors import UsageError
from histossl.core.text import CsvReader, cell, from_cell, in_html, shown, write_cells
from histossl.core.workspace import Workspace
from histossl.demo.paint import paint_pixels
from histossl.labels.label_csv import read_rows
from histossl.report import plots
from histossl.slides.ledger import LedgerRow, read_ledger, write_ledger

# Writes the clipboard, clears the screen (as one character, too), turns the text, hides in it, and is rich's markup.
OBEYED = "\x1b]52;c;aGk=\x07\x1b[2J\x9b2J\u202e\u2066\u200b\u2028\x7f[bold]x[/bold][link=file:a]:skull:\\"
RUN = "=cmd|' C'!A0"


def unseen(text: str) -> set[str]:
    """Characters that a terminal may obey, or that nobody sees."""
    return {one for one in text if one != "\n" and unicodedata.category(one) in ("Cc", "Cf", "Cs", "Zl", "Zp")}


def cells(path: Path) -> list[list[str]]:
    """As a spreadsheet reads them."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def is_run(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.startswith(("=", "+", "-", "@", "\t", "\r"))
    return False


# ---- a text, a cell


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("Köln 7.svs", "Köln 7.svs"),
        ("a\N{NO-BREAK SPACE}b", "a\N{NO-BREAK SPACE}b"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\x9b", r"\x9b"),
        ("a\r\n\tb", r"a\r\n\tb"),
        ("\u202eb\u2069", r"\u202eb\u2069"),
        ("\u200b\ufeff\xad", r"\u200b\ufeff\xad"),
        ("\u2028\udce9\x7f\0", r"\u2028\udce9\x7f\x00"),
    ],
)
def test_what_a_terminal_obeys_is_shown_as_an_escape(name, seen):
    assert shown(name) == seen
    assert shown(f"{name}", lines=True) == seen.replace(r"\n", "\n")
    assert not unseen(shown(name))


def test_every_character_is_shown_or_escaped():
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    assert not unseen(shown(everything))
    assert in_html("<\x1b>") == "&lt;\\x1b&gt;"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (RUN, f"'{RUN}"),
        ("+49", "+49"),
        (-0.5, "-0.5"),
        ("-0.5", "-0.5"),
        ("-1e-07", "-1e-07"),
        ("-inf", "'-inf"),
        ("-A1", "'-A1"),
        ("@sum", "'@sum"),
        ("\t=1", "'\t'=1"),
        ("\r=1", "'\r'=1"),
        ("\uff1d1", "'\uff1d1"),
        ("'=1", "''=1"),
        ("O'Brien", "O'Brien"),
        ("a;=1", "a;'=1"),
        ("a; -b", "a; -b"),
        (None, ""),
    ],
)
def test_a_cell_is_text_for_a_spreadsheet_and_itself_for_us(value, written):
    assert cell(value) == written
    assert from_cell(written) == ("" if value is None else str(value))


def test_any_table_comes_back_as_it_was():
    rng = random.Random(0)
    letters = "='+-@;,\t\r\n a1\"\u2028\x1b\uff1d"
    names = [f"{number}{''.join(rng.choices(letters, k=3))}" for number in range(4)]
    rows = [["".join(rng.choices(letters, k=rng.randrange(6))) for _ in names] for _ in range(2000)]
    file = io.StringIO(newline="")
    write_cells(file, ["=a", *names], [["x", *row] for row in rows])
    file.seek(0)
    reader = CsvReader(file)
    assert [list(row.values())[1:] for row in reader] == rows
    assert reader.fieldnames == ["=a", *names]
    file.seek(0)
    assert not any(is_run(one) for row in csv.reader(file) for one in row)


@pytest.mark.parametrize("name", [RUN, "'=1", "-A", "@b", "'quoted'", "a\x1bb"])
def test_the_ledger_and_the_labels_give_back_any_name(workspace, tmp_path, name):
    row = LedgerRow(f"{name}.tif", "warning", f"same as {name}", name, archive=name, extra={"=lab": name})
    write_ledger(workspace.archive_csv, [row])
    assert read_ledger(workspace.archive_csv) == [row]
    assert not any(is_run(one) for line in cells(workspace.archive_csv) for one in line)
    file = io.StringIO(newline="")
    write_cells(file, ["slide", "label", "patient"], [[name, name, name]])
    (tmp_path / "labels.csv").write_text(file.getvalue(), encoding="utf-8")
    read = read_rows(tmp_path / "labels.csv")[0]
    assert (read.slide, read.label, read.patient) == (name, name, name)


# ---- the terminal


@pytest.mark.parametrize("terminal", [False, True])
def test_whatever_the_console_prints_is_data(monkeypatch, terminal):
    out = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=out, force_terminal=terminal, width=400, color_system=None))
    name = f"a{OBEYED}b"
    console.say(name, f"{name}\nerror: forged")
    console.warn(name)
    console.fail(name)
    console.panel(name, [name, name])
    console.table(name, [name, "n"], [[name, 1], [name, None]], right=[name])
    with console.progress(name, 2, name) as bar:
        bar.advance(note=name)
    with console.progress(name, 2, name, framed=True) as bar:
        bar.advance(note=f"{name}, {name}")
    told = out.getvalue()
    assert "]52;c;aGk=\x07" not in told
    assert not {"\x9b", "\u202e", "\u2066", "\u200b", "\u2028", "\x7f"} & {*told}
    assert r"\x1b]52;c;aGk=\x07" in told
    assert "[bold]x[/bold][link=file:a]:skull:" in told
    assert "\nerror: forged" not in told
    if not terminal:  # where rich itself moves no cursor
        assert not unseen(told)


def test_a_traceback_and_a_warning_are_data_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(commands.warnings, "formatwarning", commands.warnings.formatwarning)
    commands._show_names_as_data()
    error = ValueError(OBEYED)
    sys.excepthook(ValueError, error, None)
    assert not unseen(capsys.readouterr().err)
    assert not unseen(commands.warnings.formatwarning(OBEYED, UserWarning, "a\x1b.py", 1))


def test_a_figure_is_xml_whatever_a_class_is_called():
    classes = ["$x_\x1b\x9b$", "_\u202e<"]
    figure = plots.confusion({"adapted": np.eye(2)}, classes)
    drawn = plots.svg(figure, "a", OBEYED)
    assert not unseen(drawn)
    assert r"$x_\x1b\x9b$" in drawn
    ElementTree.fromstring(drawn)
    coloured = {"class": np.array(classes)}
    drawn = plots.svg(plots.feature_map({"adapted": np.eye(2)}, coloured), "a")
    assert not unseen(drawn)
    assert all(shown(one).replace("<", "&lt;") in drawn for one in classes)


@pytest.mark.parametrize("name", ["", "..", ".a", "a/b", "a\\b", "a\x1b", "a\nb", "a\u202eb"])
def test_a_run_has_a_name_that_a_folder_can_have(workspace, name):
    for make in (workspace.pretrain, workspace.finetune, workspace.subset, workspace.predictions):
        with pytest.raises(UsageError, match="one plain directory name"):
            make(name)


# ---- the commands


@pytest.fixture
def store(workspace: Workspace, tmp_path: Path) -> Path:
    """Tiles of slides with such names, and labels, patients and sites with others; the path of labels.csv."""
    obeyed = OBEYED.replace("/", "").replace("\\", "")
    slides = [f"{RUN}{obeyed}{number:02d}" for number in range(12)]
    write_synthetic_store(workspace, slides, tiles_per_slide=6, tile_px=32)
    rows = [[one, f"-{'ab'[n % 2]}\x1b[2J", f"@{OBEYED}{n}", "+x\x9b"] for n, one in enumerate(slides[:10])]
    file = io.StringIO(newline="")
    write_cells(file, ["slide", "label", "patient", "site"], rows)
    labels = tmp_path / "labels.csv"
    labels.write_text(file.getvalue(), encoding="utf-8")
    return labels


def test_no_command_on_tiles_prints_or_writes_a_name_that_is_obeyed(cli, workspace, store):
    tiny = ["--backbone", "test_vit", "--weights", "random"]
    for command in (
        ["curate", "--name", "few", "--tiles", 40, *tiny],
        ["plan", "--labels", store, "--view-px", 32, "--batch-size", 4, "--steps", 1, *tiny],
        ["pretrain", "--labels", store, "--view-px", 32, "--batch-size", 4, "--steps", 1, *tiny],
        ["embed", "--labels", store],
        ["finetune", "--labels", store, "--draws", 1, "--budgets", 1, "--folds", 2, "--starts", "adapted,random"],
        ["finetune", "--labels", store, "--dry-run", "--classes", f"-a{OBEYED}"],
        ["predict", "--model", workspace.finetune("default").model],
        ["suggest", "--labels", store, "--number", 2],
        ["report"],
        ["report", "--name", f"x{OBEYED}"],
    ):
        told = cli(*command, "-w", workspace.root)
        assert told.code == (2 if any(OBEYED in str(word) for word in command) else 0), told.err
        assert not unseen(told.out + told.err), command[0]
    tables = sorted(workspace.root.rglob("*.csv"))
    assert {path.name for path in tables} == {"points.csv", "predictions.csv", "summary.csv", "suggestions.csv"}
    for path in tables:
        assert not [one for line in cells(path) for one in line if is_run(one)], path
    for path in (*workspace.root.rglob("*.html"), *workspace.root.rglob("*.svg")):
        assert not unseen(path.read_text(encoding="utf-8")), path
    for path in workspace.root.rglob("*.json*"):
        assert not unseen(path.read_text(encoding="utf-8")), path


def test_neither_scan_nor_tile_prints_or_writes_a_name_that_is_obeyed(cli, workspace, tmp_path):
    slides = tmp_path / "slides" / OBEYED.replace("/", "")
    slides.mkdir(parents=True)
    pixels = paint_pixels(256, 256, 0.5, "normal", 0, None, 1.0, (), "plain", 0, 0, 0)[0]
    scale = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER", "metadata": None}
    tifffile.imwrite(slides / f"{RUN}.tif", pixels, tile=(128, 128), photometric="rgb", **scale)
    (slides / f"broken {OBEYED.replace('/', '')}.tif").write_bytes(b"II*\0" + bytes(40))
    for command in (
        ["scan", slides.parent, "--contact-sheet", "--tile-px", 64, "--workers", 1],
        ["tile", slides.parent, "--tile-px", 64, "--workers", 1],
        ["tile", slides.parent, "--tile-px", 64, "--workers", 1, "--mpp-csv", f"none{OBEYED}"],
        [f"no command {OBEYED}"],
        ["scan", f"--{OBEYED}"],
    ):
        told = cli(*command, *(["-w", workspace.root] if len(command) > 2 else []))
        assert told.code == (0 if slides.parent in command and "--mpp-csv" not in command else 2), told.err
        assert not unseen(told.out + told.err), command[0]
    assert not unseen((workspace.root / "contact-sheet.html").read_text(encoding="utf-8"))
    assert {row.file for row in read_ledger(workspace.archive_csv)} == {
        path.relative_to(slides.parent).as_posix() for path in slides.iterdir()
    }
