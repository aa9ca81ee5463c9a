"""Which slides stay out of pretraining: every slide of a patient who is tested later, and those that a file names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from histossl.core import console
from histossl.core.anonymous import names_above
from histossl.core.errors import LabelsError, UsageError
from histossl.core.text import from_cell
from histossl.core.text_files import read_lines
from histossl.labels.label_csv import Row, read_labels, read_rows
from histossl.labels.label_table import LabelTable, match_labels, refuse_two_cases
from histossl.labels.load_labels import by_pseudonyms
from histossl.labels.slide_lookup import SlideNames, cases_in
from histossl.tiles.store.index import TileIndex


def labelled_slides(path: Path, index: TileIndex) -> LabelTable | None:
    """What may judge the run as it goes; None, with the reason told, where the labels do not serve for that."""
    file = read_labels(path, needs_label=False)
    rows = file.rows
    for note in file.notes:
        console.warn(f"{path}: {note}")
    if not any(row.split for row in rows):
        console.warn(
            f"{path}: has no split column, so no slide is left out of pretraining; patients tested later will have "
            "been seen here (without their labels), and the report will say so"
        )
    try:
        table = match_labels(rows, SlideNames.of(index), source=str(path), mixed_patients=True)
        return by_pseudonyms(table, names_above(index.path))
    except LabelsError as error:
        names = SlideNames.of(index)
        if not any(names.find(row.slide) for row in rows):
            raise
        console.warn(f"no probe during the run: {error}")
        return None


def without(table: LabelTable, left_out: set[str]) -> LabelTable:
    """A slide that is left out of the run does not judge it either."""
    return replace(table, items=tuple(item for item in table.items if item.slide not in left_out))


def slides_of_test_patients(path: Path, index: TileIndex, allow_missing: bool = False) -> set[str]:
    """Every slide of every patient who has one marked `test`; by TCGA barcode also those that the file leaves out.

    LabelsError if one of them is not found in the archive, unless `allow_missing`: under another name it may lie among
    the tiles, and would be trained on.
    """
    rows, names = read_rows(path, needs_label=False), SlideNames.of(index)
    _refuse_two_sides(path, rows, names)
    marked = [row for row in rows if row.split == "test"]
    patients = {row.patient for row in marked if row.patient}
    cases = {case for row in marked for case in cases_in(row.slide)}
    tested = [row for row in rows if row.split == "test" or row.patient in patients]
    found = {slide for row in tested for slide in names.find(row.slide)}
    for slide in found:
        refuse_two_cases(slide, names.cases(slide))
        cases |= names.cases(slide)
    _check_missing(path, [row for row in tested if not names.find(row.slide)], names, allow_missing)
    return found | {slide for slide in index.slides if names.cases(slide) & cases}


def _check_missing(path: Path, missing: Sequence[Row], names: SlideNames, allowed: bool) -> None:
    """Test slides without tiles: a slide that the archive knows has none to train on, any other may be misspelt."""
    unknown = [row for row in missing if not names.is_untiled(row.slide)]
    shown = unknown or list(missing)
    if not shown:
        return
    have = "has" if len(shown) == 1 else "have"
    said = ", ".join(f"{row.slide} in line {row.line}: {names.hint(row.slide)}" for row in shown[:3])
    said += f", and {len(shown) - 3} more" * (len(shown) > 3)
    problem = f"{path}: {console.count(len(shown), 'test slide')} {have} no tiles here ({said})"
    if unknown and not allowed:
        raise LabelsError(
            f"{problem}. Under another name {'it' if len(unknown) == 1 else 'they'} would be trained on: write the "
            "names as the slide files have them, or if these slides are not in this workspace, pass "
            "--allow-missing-test-slides"
        )
    console.warn(problem)


def _refuse_two_sides(path: Path, rows: Sequence[Row], names: SlideNames) -> None:
    """One content under two names, of which only one is of a test patient: nobody can say on which side it is."""
    first: dict[tuple[str, str], Row] = {}
    for row in rows:
        for slide in names.find(row.slide):
            for what in ("split", "patient"):
                said = getattr(row, what)
                before = first.setdefault((slide, what), row) if said else row
                if getattr(before, what) != said:
                    raise LabelsError(
                        f"{path}: {before.slide} (line {before.line}) and {row.slide} (line {row.line}) name one "
                        f"slide, with {what} {getattr(before, what)!r} and {said!r}; correct one of them"
                    )


def read_exclusions(path: Path | None) -> list[tuple[int, str]]:
    """The names in a file with one on each line, and the numbers of the lines."""
    lines = [] if path is None else read_lines(path, f"--exclude {path}")
    return [(number, from_cell(line)) for number, line in lines]


def excluded_slides(path: Path | None, index: TileIndex) -> set[str]:
    if path is None:
        return set()
    slides: set[str] = set()
    known = SlideNames.of(index)
    for line, name in read_exclusions(path):
        found = known.find(name)
        if not found:
            raise UsageError(
                f"--exclude {path}, line {line}: {name!r} is none of the tiled slides ({known.hint(name)})"
            )
        slides.update(found)
    return slides
