"""`histossl names`: a table of an anonymous workspace with the names in place of its pseudonyms."""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import typer

from histossl.cli.from_config import OTHER, command
from histossl.core.anonymous import is_anonymous, names_of
from histossl.core.errors import UsageError
from histossl.core.options import REQUIRED, Checked, option
from histossl.core.text import CsvReader, shown, write_cells
from histossl.core.workspace import Workspace


@dataclass(frozen=True)
class Which(Checked):
    table: Path = option(REQUIRED, "A table of the workspace.", metavar="FILE.csv", positional=True)


def register(app: typer.Typer) -> None:
    command(
        app,
        group=OTHER,
        toml=False,
        epilog="Example: histossl names histossl-workspace/predictions/default/predictions.csv > with-names.csv",
    )(names)


def names(workspace: Workspace, which: Which) -> None:
    """Print a table of an anonymous workspace with the names of slides, files and patients, to standard output."""
    table = which.table
    if not is_anonymous(workspace):
        raise UsageError(f"--workspace {workspace.root}: is not anonymous, so its tables hold the names themselves")
    known = names_of(workspace)
    try:
        with table.open(encoding="utf-8", newline="") as file:
            reader = CsvReader(file)
            columns = list(reader.fieldnames or [])
            rows = [[known.with_names(row[name] or "") for name in columns] for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{table}: cannot be read as a table ({error})") from error
    text = io.StringIO()
    write_cells(text, columns, rows)
    sys.stdout.write(shown(text.getvalue(), lines=True) if sys.stdout.isatty() else text.getvalue())
