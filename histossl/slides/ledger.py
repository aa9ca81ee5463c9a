"""The ledger archive.csv: one row per file of the archive, so that no slide is ever left out without a reason.

`scan` writes what a file is and what is wrong with it; `tile` fills in what became of it.
Columns that this version does not know are kept: a lab may add its own.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from histossl.core.anonymous import Names, names_above
from histossl.core.errors import StoreError
from histossl.core.text import CsvReader, write_csv
from histossl.core.text_files import separator_in

OK, WARNING, UNREADABLE = "ok", "warning", "unreadable"


@dataclass(frozen=True)
class LedgerRow:
    """One file. Numbers are None where they are not known. `reason` is never empty when `status` is not ok."""

    file: str  # path relative to the archive, with /
    status: str = OK  # ok, warning, unreadable
    reason: str = ""
    slide: str = ""  # the slide's id: what tiles, labels and embeddings are named by

    # what scan finds
    vendor: str = ""
    format: str = ""
    width_l0: int | None = None
    height_l0: int | None = None
    levels: str = ""  # "40000x30000 10000x7500"
    mpp: float | None = None
    mpp_source: str = ""
    compression: str = ""
    native_tile: str = ""  # "256x256"
    bytes: int | None = None
    modified_s: float | None = None  # with `bytes`, tells whether the row still speaks of this file
    duplicate_of: str = ""  # a file with the same content
    hung: str = ""  # size and time of the file that was stopped for taking too long, as `hung_mark` writes them
    stain: str = ""  # H&E, IHC, fluorescence/other, unknown
    stain_figures: str = ""
    tissue_mm2: float | None = None
    expected_tiles: int | None = None
    expected_mb: float | None = None

    # what tile does; rejected_* count the grid's places that each filter turned down
    num_tiles: int | None = None
    tile_status: str = ""  # tiled, no tiles, failed; empty: not yet
    tile_reason: str = ""
    tile_way: str = ""  # copied, stitched, read
    verified: str = ""  # how far its pixels are known to be whole: sample, decoded, checksums, against level 2
    tile_mpp: str = ""  # that its tiles really have, scale by scale: "0.5013+1.003"
    rejected_tissue: int | None = None
    rejected_region: int | None = None
    rejected_blur: int | None = None
    rejected_fold: int | None = None
    rejected_ink: int | None = None
    rejected_saturation: int | None = None
    rejected_damaged: int | None = None
    tile_settings: str = ""  # of file and settings behind tile_status
    tile_stamp: str = ""  # size and time of the file that was tiled
    tile_twin: str = ""  # the slide that holds the tiles, where it is another one of the same content

    settings: str = ""  # digest of the settings behind the figures above
    archive: str = ""  # the folder that `file` lies in
    extra: dict[str, str] = field(default_factory=dict)  # columns that others added

    @property
    def readable(self) -> bool:
        return self.status != UNREADABLE


ONE_LINE = ("reason", "tile_reason")  # what a library said may run over several lines
KNOWN = tuple(one for one in fields(LedgerRow) if one.name != "extra")


def read_ledger(path: Path, with_names: bool = True) -> list[LedgerRow]:
    """The rows of archive.csv in its order; none if there is no such file yet.

    Of an anonymous workspace with the names that its pseudonyms stand for, unless for a page that lies in it.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = CsvReader(file, separator_in(file, {"file"}.issubset))
            if table.fieldnames is not None and "file" not in table.fieldnames:
                raise StoreError(f"{path}: has no column 'file'; move it aside and run histossl scan again")
            rows = [_row(path, table.line_num, values) for values in table]
            names = names_above(path)
            if with_names and names.key:
                rows = sorted((_revealed(row, names) for row in rows), key=lambda row: row.file)
            return rows
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise StoreError(f"{path}: cannot be read ({error}); move it aside and run histossl scan again") from error


def write_ledger(path: Path, rows: Iterable[LedgerRow]) -> None:
    """All rows, sorted by file, whole or not at all; in an anonymous workspace by pseudonyms."""
    names, rows = names_above(path), list(rows)
    if names.key:
        for row in rows:  # a reason may speak of any other file
            hidden(replace(row, reason="", tile_reason=""), names)
        rows = [hidden(row, names) for row in rows]
        names.write()
    rows.sort(key=lambda row: row.file)
    added = sorted({name for row in rows for name in row.extra})
    cells = (
        [_text(getattr(row, one.name), one.name in ONE_LINE) for one in KNOWN] + [row.extra.get(name) for name in added]
        for row in rows
    )
    write_csv(path, [*(one.name for one in KNOWN), *added], cells)


def hidden(row: LedgerRow, names: Names) -> LedgerRow:
    """A row as it may be written into an anonymous workspace; `names` learns what it hides, and is to be written."""
    if not names.key:
        return row
    return replace(
        row,
        file=names.file(row.file),
        slide=names.slide(row.slide, row.file),
        archive=names.place(row.archive),
        duplicate_of=names.file(row.duplicate_of),
        reason=names.reason(row.reason),
        tile_reason=names.reason(row.tile_reason),
    )


def _revealed(row: LedgerRow, names: Names) -> LedgerRow:
    columns = ("file", "slide", "archive", "duplicate_of", "reason", "tile_reason")
    found: dict[str, Any] = {name: names.with_names(getattr(row, name)) for name in columns}
    return replace(row, **found)


def merged(before: Iterable[LedgerRow], now: Iterable[LedgerRow]) -> list[LedgerRow]:
    """`now` wins, file by file; files that only `before` knows stay, and so do the columns that others added."""
    rows = {row.file: row for row in before}
    for row in now:
        known = rows.get(row.file)
        rows[row.file] = replace(row, extra={**known.extra, **row.extra}) if known else row
    return list(rows.values())


def _row(path: Path, line: int, values: dict[str, str | None]) -> LedgerRow:
    known = {one.name: _value(path, line, one, values.get(one.name) or "") for one in KNOWN}
    names = {one.name for one in KNOWN}
    extra = {name: value or "" for name, value in values.items() if name and name not in names}
    return LedgerRow(**known, extra=extra)  # type: ignore[arg-type]


def _value(path: Path, line: int, column: Field[object], text: str) -> object:
    kind = str(column.type)
    if not text:
        return column.default if column.default is not MISSING else ""
    try:
        if kind.startswith("int"):
            return int(text)
        if kind.startswith("float"):
            return float(text)
    except ValueError as error:
        raise StoreError(
            f"{path}, line {line}: {column.name} is {text!r}, not a number; mend it or scan anew"
        ) from error
    return text


def _text(value: object, one_line: bool) -> object:
    if isinstance(value, float):
        return f"{value:.6f}".rstrip("0").rstrip(".")
    return " ".join(str(value).split()) if one_line else value  # two blanks in a file's name are part of it
