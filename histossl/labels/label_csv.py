"""The lines of labels.csv as they are written, and every mistake in them that can be seen without the archive.

    slide,label,patient,site,split
    case1/A1.svs,tumour,P1,Bonn,train

`slide` and `label` are needed; labels are text: "1" stays "1". Columns x,y,width,height (level-0 pixels) label regions.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from histossl.core.config import SEPARATORS, refuse_separator, separator_of
from histossl.core.console import count
from histossl.core.errors import LabelsError
from histossl.core.text import from_cell
from histossl.labels.spelling import looks_like, reads_unknown, refuse_alike, unread_columns

BOX_COLUMNS = ("x", "y", "width", "height")
OPTIONAL_COLUMNS = {"patient": "the patients", "site": "the sites", "split": "train and test"}
KNOWN_COLUMNS = ("slide", "label", *OPTIONAL_COLUMNS, *BOX_COLUMNS)
SURVIVAL_COLUMNS = ("time", "event", "survival", "censored")
NO_SURVIVAL = (
    "looks like survival times or measurements; histossl learns classes only. Give a column 'label' of a few classes "
    "(for example: event within two years, yes or no)"
)


@dataclass(frozen=True)
class Box:
    """A rectangle on a slide, in level-0 pixels."""

    x_l0: float
    y_l0: float
    width_l0: float
    height_l0: float


@dataclass(frozen=True)
class Row:
    """One line of labels.csv, as written."""

    line: int
    slide: str
    label: str
    patient: str = ""
    site: str = ""
    split: str = ""
    box: Box | None = None


@dataclass(frozen=True)
class LabelFile:
    rows: list[Row]
    notes: list[str]  # what of it is not read, or not as a person may have meant it


def read_rows(path: Path, needs_label: bool = True) -> list[Row]:
    return read_labels(path, needs_label).rows


def read_labels(path: Path, needs_label: bool = True) -> LabelFile:
    """The lines of labels.csv. Refuses a file that a spreadsheet has saved as something else, and two spellings of one
    class, patient or site."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise LabelsError(f"--labels {path}: cannot be read ({error.strerror})") from error
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise LabelsError(f"{path}: is UTF-16 text; save it as 'CSV UTF-8'")
    if raw.startswith(b"PK"):
        raise LabelsError(f"{path}: is a spreadsheet or zip file; save it as 'CSV UTF-8'")
    if b"\0" in raw:
        raise LabelsError(f"{path}: is no text file; labels are a CSV file with the columns slide,label")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise LabelsError(f"{path}, line {line}: is not UTF-8 text; save it as 'CSV UTF-8'") from error
    needed = ("slide", "label") if needs_label else ("slide",)
    separator = separator_of(io.StringIO(text, newline="").readline(), {*needed}.issubset)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    columns = next(lines, [])
    header = [name.strip().lower() for name in columns]
    _check_header(path, columns, needed)
    rows = []
    unknown_sites: Counter[str] = Counter()
    for cells in lines:
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise LabelsError(
                f"{path}, line {lines.line_num}: {len(cells)} columns where the first line has {len(header)}; "
                f"put text that holds a {SEPARATORS[separator]} in double quotes"
            )
        if any(ends in cell.strip() for cell in cells for ends in "\r\n"):
            raise LabelsError(f"{path}, line {lines.line_num}: a cell holds a line break, or a quote is not closed")
        named = dict(zip(header, (from_cell(cell.strip()) for cell in cells), strict=True))
        if reads_unknown(named.get("site", "")):
            unknown_sites[named["site"]] += 1
            named["site"] = ""
        rows.append(_row(path, lines.line_num, named))
    if not rows:
        raise LabelsError(f"{path}: has a first line but no slides below it")
    for what in ("label", "patient", "site"):
        words = ((getattr(row, what), f"line {row.line}") for row in rows if getattr(row, what))
        refuse_alike(str(path), what, words)
    notes = [f"the columns are separated by {SEPARATORS[separator]}s, and read so"] if separator != "," else []
    notes += unread_columns(columns, OPTIONAL_COLUMNS, KNOWN_COLUMNS)
    if unlabelled := sum(not row.label for row in rows) if needs_label else 0:
        notes.append(
            f"{count(unlabelled, 'line')} without a label: {'it counts' if unlabelled == 1 else 'they count'} "
            "as unlabelled"
        )
    for label, number in sorted(Counter(row.label for row in rows if reads_unknown(row.label)).items()):
        notes.append(
            f"the label {label!r} ({count(number, 'line')}) is a class like any other; where it means that nobody "
            "knows, leave the cell empty"
        )
    for site, number in sorted(unknown_sites.items()):
        notes.append(f"the site {site!r} ({count(number, 'line')}) is read as not known")
    return LabelFile(rows, notes)


def _check_header(path: Path, columns: Sequence[str], needed: Sequence[str]) -> None:
    header = [name.strip().lower() for name in columns]
    wanted = "the first line must name the columns, like: slide,label,patient"
    if not any(header):
        raise LabelsError(f"{path}: is empty; {wanted}")
    if not {*needed} <= {*header}:
        refuse_separator(path, header, LabelsError)
    lacking = [column for column in needed if column not in header]
    if "label" in lacking and {*SURVIVAL_COLUMNS} & {*header}:
        raise LabelsError(f"{path}: {NO_SURVIVAL}")
    if lacking:
        like = {column: looks_like(column, columns, KNOWN_COLUMNS) for column in lacking}
        renamed = " and ".join(f"{one!r} to {column!r}" for column, one in like.items() if one)
        named = ", ".join(repr(name.strip()) for name in columns)
        raise LabelsError(
            f"{path}: no column {' and none '.join(map(repr, lacking))} among {named}"
            + (f"; rename {renamed}" if renamed else "")
            + ("" if all(like.values()) else f"; {wanted}")
        )
    twice = [name for name, count in Counter(name for name in header if name).items() if count > 1]
    if twice:
        raise LabelsError(f"{path}: column {twice[0]!r} stands twice in the first line")
    boxes = [name for name in BOX_COLUMNS if name in header]
    if boxes and len(boxes) < len(BOX_COLUMNS):
        absent = ", ".join(name for name in BOX_COLUMNS if name not in header)
        raise LabelsError(f"{path}: region columns {', '.join(boxes)} without {absent}; x,y,width,height go together")


def _row(path: Path, line: int, cells: Mapping[str, str]) -> Row:
    where = f"{path}, line {line}"
    if not cells["slide"]:
        raise LabelsError(f"{where}: the slide's name is empty")
    labelled = bool(cells.get("label", "-"))
    if "patient" in cells and not cells["patient"] and labelled:
        raise LabelsError(f"{where}: {cells['slide']} has no patient; fill it in, or remove the whole column")
    if reads_unknown(cells.get("patient", "")) and labelled:
        raise LabelsError(
            f"{where}: {cells['slide']} has the patient {cells['patient']!r}, and all slides with it would count as "
            "one patient's; fill in whose it is, or leave its label empty"
        )
    split = cells.get("split", "").lower()
    if "split" in cells and (labelled or split) and split not in ("train", "test"):
        raise LabelsError(f"{where}: split {cells['split']!r} must be train or test")
    box = None
    if "x" in cells:
        try:
            box = Box(*(float(cells[name]) for name in BOX_COLUMNS))
        except ValueError as error:
            raise LabelsError(f"{where}: x,y,width,height must be numbers in level-0 pixels ({error})") from error
        if not all(math.isfinite(float(cells[name])) for name in BOX_COLUMNS):
            raise LabelsError(f"{where}: x,y,width,height must be finite numbers in level-0 pixels")
        if not (box.width_l0 > 0 and box.height_l0 > 0):
            raise LabelsError(f"{where}: a region of {box.width_l0:g} x {box.height_l0:g} pixels holds nothing")
    return Row(
        line, cells["slide"], cells.get("label", ""), cells.get("patient", ""), cells.get("site", ""), split, box
    )
