"""Names are data: how a name is shown to a person, and how it goes into a table and comes back.

File names, labels and patients may hold anything: characters that move a terminal's cursor or write its clipboard,
characters that turn the text around them, cells that a spreadsheet would run.
"""

from __future__ import annotations

import csv
import html
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from histossl.core.workspace import written_aside

# ---- shown to a person

# Controls, format characters (direction, zero width), halves of a surrogate pair, line and paragraph separators.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def shown(text: str, lines: bool = False) -> str:
    r"""`text` with characters that are not seen, or that a terminal obeys, as escapes: \x1b, \u202e, \n.

    `lines`: line breaks stay.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(letter) if letter != "\n" or not lines else letter for letter in text)


def _escaped(letter: str) -> str:
    if unicodedata.category(letter) not in _UNSEEN:
        return letter
    return letter.encode("unicode_escape").decode("ascii")


def in_html(text: str) -> str:
    """The same, for a page."""
    return html.escape(shown(text, lines=True))


# ---- in a table

# A spreadsheet takes text that begins so for a formula, and runs it: in a cell's beginning, and behind other marks that
# it may part cells at. The last four are the same in Japanese and Chinese keyboards' width.
_RUN = "=+\\-@\t\r\uff1d\uff0b\uff0d\uff20"
_TO_MARK = re.compile(f"(^|[;\t\r\n])(?=['{_RUN}])")
_MARKED = re.compile(f"(^|[;\t\r\n])'(?=['{_RUN}])")
_HARMLESS = re.compile(r"[\w./][\w ./,:%()#=+@-]*", re.ASCII)  # most cells, to lose no time with them
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


def cell(value: object) -> str:
    """A value as a cell of a CSV: ' stands before text that a spreadsheet would run, and before a ' that is there.

    Numbers stay numbers (-0.5). `from_cell` undoes it exactly.
    """
    text = "" if value is None else str(value)
    if not text or _HARMLESS.fullmatch(text) or _NUMBER.fullmatch(text):
        return text
    return _TO_MARK.sub(r"\1'", text).encode("utf-8", "backslashreplace").decode("utf-8")


def from_cell(text: str) -> str:
    """What `cell` was given, as text. A cell that another program wrote stays as it is, but for such a mark."""
    return _MARKED.sub(r"\1", text) if "'" in text else text


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table, whole or not at all. Every CSV of ours is written here, and read by `CsvReader`."""
    with written_aside(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        write_cells(file, columns, rows)


def write_cells(file: TextIO, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    table = csv.writer(_Lines(file), lineterminator="\r\n")
    table.writerow(map(cell, columns))
    table.writerows(map(cell, row) for row in rows)


class _Lines:
    """Lines end in a line feed alone, and yet a carriage return in a cell is quoted: csv quotes what ends its lines."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, line: str) -> None:
        self._file.write(line.removesuffix("\r\n") + "\n")


class CsvReader:
    """A `csv.DictReader` of what `write_csv` wrote: names and values are those that were given to it."""

    def __init__(self, file: Iterable[str], separator: str = ",") -> None:
        self._table = csv.DictReader(file, delimiter=separator)

    @property
    def fieldnames(self) -> list[str] | None:
        names = self._table.fieldnames
        return None if names is None else [from_cell(name) for name in names]

    @property
    def line_num(self) -> int:
        return int(self._table.line_num)

    def __iter__(self) -> Iterator[dict[Any, Any]]:
        """A line of too many cells has the key None, one of too few the value None, as csv has it."""
        for row in self._table:
            yield {_as_given(name): _as_given(value) for name, value in row.items()}


def _as_given(value: Any) -> Any:
    return from_cell(value) if isinstance(value, str) else value
