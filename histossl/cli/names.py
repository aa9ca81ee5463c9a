"""`histossl names`: a table of an anonymous workspace with the names in place of its pseudonyms."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import Annotated

import typer

from histossl.cli.options import NamesOption, WorkspaceOption, workspace_of
from histossl.core.anonymous import is_anonymous, names_of
from histossl.core.errors import UsageError
from histossl.core.text import CsvReader, shown, write_cells


def register(app: typer.Typer) -> None:
    app.command(
        epilog="Example: histossl names histossl-workspace/predictions/default/predictions.csv > with-names.csv"
    )(names)


def names(
    table: Annotated[Path, typer.Argument(metavar="FILE.csv", help="A table of the workspace.", show_default=False)],
    workspace: WorkspaceOption = None,
    names: NamesOption = None,
) -> None:
    """Print a table of an anonymous workspace with the names of slides, files and patients, to standard output."""
    at = workspace_of(workspace, names)
    if not is_anonymous(at):
        raise UsageError(f"--workspace {at.root}: is not anonymous, so its tables hold the names themselves")
    known = names_of(at)
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
