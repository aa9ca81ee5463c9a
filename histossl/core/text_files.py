"""Text that a person gives: tables, lists of names, settings. One way to read it, whatever program saved it.

Spreadsheets write byte order marks, UTF-16, semicolons and a first line `sep=;`; all of that says what it is, and is
read. What could be one thing or another (Windows-1252) is refused with the line it stands in.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from histossl.core.errors import HistosslError, UsageError
from histossl.core.names import trimmed
from histossl.core.text import from_cell

CSV_UTF8 = "'CSV UTF-8'"
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
SEPARATOR_LINE = re.compile(r'\ufeff?"?sep=(.)"?[,;\t|]*\s*', re.IGNORECASE)  # for Excel, which shows no line of it
MARKS = (  # the longer ones first: that of UTF-32 begins like that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
NO_TEXT = (
    (b"PK\x03\x04", "a spreadsheet or zip file"),
    (b"\xd0\xcf\x11\xe0", "a spreadsheet of an old Excel"),
    (b"\x1f\x8b", "a compressed file"),
    (b"%PDF", "a PDF"),
)


def read_text(path: Path, where: str, error: type[HistosslError] = UsageError, save_as: str = "UTF-8") -> str:
    """The text of a file. `where` begins what is said if it cannot be read, `save_as` ends it."""
    try:
        raw = path.read_bytes()
    except OSError as cause:
        raise error(f"{where}: cannot be read ({cause.strerror})") from cause
    return decoded(raw, where, error, save_as)


def decoded(raw: bytes, where: str, error: type[HistosslError] = UsageError, save_as: str = "UTF-8") -> str:
    """Bytes as text: by their byte order mark, else UTF-8. Raises `error` on anything else."""
    for begin, what in NO_TEXT:
        if raw.startswith(begin):
            raise error(f"{where}: is {what}; save it as {save_as}")
    coding = next((name for mark, name in MARKS if raw.startswith(mark)), "utf-8")
    if coding.startswith("utf-8") and b"\0" in raw:
        wide = max(raw[::2].count(0), raw[1::2].count(0)) * 4 > len(raw)
        what = "UTF-16 text without a byte order mark" if wide else "no text file"
        raise error(f"{where}: is {what}; save it as {save_as}")
    try:
        return raw.decode(coding).lstrip("\ufeff")
    except UnicodeDecodeError as cause:
        if coding.startswith("utf-8"):
            line = len(re.findall(rb"\r\n|\r|\n", raw[: cause.start])) + 1
            raise error(f"{where}, line {line}: is not UTF-8 text; save it as {save_as}") from cause
        raise error(f"{where}: is damaged {coding.upper()} text; save it as {save_as}") from cause


def read_lines(path: Path, where: str) -> list[tuple[int, str]]:
    """The lines that are not empty, trimmed, with their numbers. UsageError if it is no text."""
    lines = re.split(r"\r\n|\r|\n", read_text(path, where))
    return [(number, trimmed(line)) for number, line in enumerate(lines, start=1) if trimmed(line)]


# ---- tables


@dataclass(frozen=True)
class Table:
    """A CSV: its columns as written, and for each line that is not empty its number and trimmed cells."""

    columns: tuple[str, ...]
    rows: tuple[tuple[int, tuple[str, ...]], ...]
    separator: str

    @property
    def header(self) -> tuple[str, ...]:
        return tuple(name.lower() for name in self.columns)

    @property
    def note(self) -> str:
        """What a person should know of how it was read; empty for commas."""
        name = SEPARATORS.get(self.separator, repr(self.separator))
        return "" if self.separator == "," else f"the columns are separated by {name}s, and read so"


def read_table(
    path: Path, where: str, fits: Callable[[set[str]], bool], error: type[HistosslError] = UsageError
) -> Table:
    """A table that a person made. `fits` says of the columns' names, in small letters, whether they are the table's.

    Raises `error` on a row of another length than the first, and on a cell with a line break: at the line where it
    begins, since a quote that is not closed takes in all lines up to the next quote.
    """
    file = io.StringIO(read_text(path, where, error, CSV_UTF8), newline="")
    separator = separator_in(file, fits)
    lines = file.getvalue()[: file.tell()]
    skipped = len(re.findall(r"\r\n|\r|\n", lines))
    records = _records(list(file), separator, skipped, where, error)
    columns = records[0][1] if records else ()
    rows = [(line, cells) for line, cells in records[1:] if any(cells)]
    for line, cells in rows:
        if len(cells) != len(columns):
            raise error(
                f"{where}, line {line}: {len(cells)} columns where the first line has {len(columns)}; "
                f"put text that holds a {SEPARATORS.get(separator, separator)} in double quotes"
            )
    return Table(columns, tuple(rows), separator)


def _records(
    lines: list[str], separator: str, skipped: int, where: str, error: type[HistosslError]
) -> list[tuple[int, tuple[str, ...]]]:
    """Each row's first line and its trimmed cells."""
    records: list[tuple[int, tuple[str, ...]]] = []
    reader = csv.reader(lines, delimiter=separator)
    while reader.line_num < len(lines):
        begins = reader.line_num
        try:
            cells = tuple(trimmed(cell) for cell in next(reader, []))
            whole = not any(ends in cell for cell in cells for ends in "\r\n")
            cells = tuple(map(from_cell, cells))
        except csv.Error:  # more text than a cell may hold
            cells, whole = (), False
        at_end = reader.line_num == len(lines)
        if not whole or (at_end and _ends_in_quotes(lines[begins:], separator)):
            raise error(
                f"{where}, line {skipped + begins + 1}: a quote opens here and is not closed, or a cell holds a line "
                "break; each row must be one line"
            )
        records.append((skipped + begins + 1, cells))
    return records


def _ends_in_quotes(lines: list[str], separator: str) -> bool:
    """Whether a quote of a file's last row is not closed."""
    try:
        list(csv.reader(lines, delimiter=separator, strict=True))
    except csv.Error as cause:
        return "unexpected end of data" in str(cause)
    return False


def separator_in(file: TextIO, fits: Callable[[set[str]], bool]) -> str:
    """What parts the columns of a table: what a first line `sep=;` says, else a comma, semicolon or tab.

    Leaves `file` at the line with the columns' names. Another mark than the comma is taken only where no name holds any
    mark, so that nothing else can be meant; of any table that we write and a spreadsheet saved again, too.
    """
    start = file.tell()
    first_line = file.readline()
    named = SEPARATOR_LINE.fullmatch(first_line)
    if named:
        return named[1]
    file.seek(start)

    def names(mark: str) -> set[str]:
        return {trimmed(name).lower() for name in next(csv.reader([first_line], delimiter=mark), [])}

    if fits(names(",")):
        return ","
    others = [mark for mark in ";\t" if fits(names(mark)) and not any({*name} & {*SEPARATORS} for name in names(mark))]
    return others[0] if len(others) == 1 else ","


def refuse_separator(where: Path | str, header: Iterable[str], error: type[UsageError] = UsageError) -> None:
    """Of a table whose columns were not found, for all `separator_in` could do."""
    for mark, name in SEPARATORS.items():
        if mark != "," and any(mark in column for column in header):
            raise error(f"{where}: columns are separated by {name}s; save it with commas")
