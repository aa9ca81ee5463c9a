"""Find each labelled slide in the archive, so that every contradiction in the labels shows before anything runs.

A slide is named by its path below the slides folder, by its file name (with or without extension) or by its TCGA
barcode. What is learnt from is an *item*: a bag of tiles with one label and one patient. It is a whole slide, or a
region of one (columns x,y,width,height, or QuPath annotations), or a single tile.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from histossl.core.console import count
from histossl.core.errors import LabelsError
from histossl.core.names import differs_unseen, path_key, same_to_a_reader
from histossl.core.options import nearest
from histossl.labels.label_csv import NO_SURVIVAL, Box, Row
from histossl.labels.slide_lookup import TCGA_CASE, SlideNames
from histossl.labels.spelling import maybe_one_person

MOST_NUMBERS = 10  # as labels; grades are fewer
Unit = Literal["slide", "region", "tile"]


@dataclass(frozen=True)
class Item:
    """What carries one label: a bag of tiles of one slide, and the patient who must stay on one side of a split."""

    name: str
    slide: str
    label: str
    patient: str
    site: str = ""
    split: str = ""
    tiles: NDArray[np.int64] | None = field(default=None, compare=False)  # positions among the slide's tiles; None: all
    boxes: tuple[Box, ...] = ()

    @property
    def place(self) -> str:
        """Where on the slide, for a region's name is only its number; empty: all of it."""
        return "" if self.tiles is None else repr((self.boxes, self.tiles.tolist()))


@dataclass(frozen=True)
class LabelTable:
    """Labels that found their slides, and everything a person should know before trusting them."""

    items: tuple[Item, ...]
    classes: tuple[str, ...]
    unit: Unit = "slide"
    num_named: int = 0  # slides named in the file
    missing: tuple[tuple[str, str], ...] = ()  # (name as written, why or the nearest slide)
    unlabelled: tuple[str, ...] = ()
    patients_from: str = "the patient column"
    notes: tuple[str, ...] = ()
    patients_beside: tuple[tuple[str, str], ...] = ()  # (slide, patient) of slides named without a label

    @property
    def has_split(self) -> bool:
        return any(item.split for item in self.items)

    @property
    def patients(self) -> tuple[str, ...]:
        return tuple(sorted({item.patient for item in self.items}))

    @property
    def slides(self) -> tuple[str, ...]:
        return tuple(sorted({item.slide for item in self.items}))

    @property
    def digest(self) -> str:
        """Changes when an item, its label, patient, site, split or place does; the order of lines does not matter."""
        hashed = hashlib.sha256()
        for item in sorted(self.items, key=lambda item: item.name):
            hashed.update("\x1f".join((item.name, item.label, item.patient, item.site, item.split, "\n")).encode())
            hashed.update(item.place.encode())
        return hashed.hexdigest()[:16]

    def label_numbers(self) -> NDArray[np.int64]:
        number = {label: position for position, label in enumerate(self.classes)}
        return np.array([number[item.label] for item in self.items], dtype=np.int64)


# ---- labels to items


def match_labels(
    rows: Sequence[Row],
    slides: Iterable[str] | SlideNames,
    *,
    reasons: Mapping[str, str] | None = None,
    classes: Sequence[str] = (),
    mixed_patients: bool = False,
    source: str = "labels.csv",
    where: str = "this workspace",
) -> LabelTable:
    """Items of `rows` whose slides are among `slides`.

    `reasons` says why a slide of the archive has no tiles, where `slides` is a plain list.

    `classes` keeps only these. Refuses contradictions: a slide with two labels, a patient in both splits, and,
    unless `mixed_patients` or labels of regions, a patient with slides of two classes.
    """
    names = slides if isinstance(slides, SlideNames) else SlideNames(slides, without_tiles=reasons)
    known_labels = sorted({row.label for row in rows if row.label})
    wanted = class_names("--classes", classes, known_labels, source)
    named = [row for row in rows if row.label and (not classes or row.label in wanted)]
    if len(known_labels) > MOST_NUMBERS and all(_is_number(label) for label in known_labels):
        raise LabelsError(f"{source}: its labels are {len(known_labels)} different numbers, which {NO_SURVIVAL}")
    regions = any(row.box for row in named)
    missing: dict[str, str] = {}
    notes: list[str] = []
    found: dict[str, list[Row]] = defaultdict(list)
    for row in named:
        hits = names.labelled_by(row.slide)
        if not hits:
            missing[row.slide] = names.hint(row.slide)
        _refuse_several(source, row, hits, cases=not regions)
        for slide in hits:
            found[slide].append(row)
    if not found:
        raise LabelsError(_none_found(source, where, named, missing))
    patient_of, patients_from = _patients(found, names)
    items = []
    for slide in sorted(found):
        items += _items_of(source, slide, found[slide], patient_of[slide], regions, notes)
    present = tuple(sorted({item.label for item in items}, key=natural))
    if len(present) < 2:
        raise LabelsError(_one_class(source, where, present[0], named, missing))
    refuse_split_patients(source, items)
    refuse_parted_cases(source, items, names)
    if not regions and not mixed_patients:
        _refuse_mixed_patients(source, items)
    notes += patients_notes(items, patients_from)
    return LabelTable(
        items=tuple(items),
        classes=present,
        unit="region" if regions else "slide",
        num_named=len({row.slide for row in named}),
        missing=tuple(sorted(missing.items())),
        unlabelled=tuple(sorted(set(names.slides) - set(found))),
        patients_from=patients_from,
        notes=tuple(notes),
        patients_beside=tuple(sorted(_patients_beside(rows, names, set(found)).items())),
    )


def class_names(option: str, asked: Sequence[str], known: Sequence[str], source: str) -> set[str]:
    """The classes `asked` for as `source` spells them; LabelsError for one that it does not have."""
    spelt = {same_to_a_reader(label): label for label in known}
    for name in asked:
        if same_to_a_reader(name) not in spelt:
            close = nearest(name, [label for label in known if _digits(label) == _digits(name)])  # T2 is no slip of T1
            raise LabelsError(f"{option} {name}: {source} has no such class{close} ({_some(known)})")
    return {spelt[same_to_a_reader(name)] for name in asked}


def _digits(name: str) -> list[str]:
    return re.findall(r"\d+", name)


def _patients_beside(rows: Sequence[Row], names: SlideNames, labelled: set[str]) -> dict[str, str]:
    """Of slides that the file names without a label: not tested on, but a backbone may have been shown them."""
    patient_of = {slide: row.patient for row in rows if row.patient for slide in names.find(row.slide)}
    return {slide: patient for slide, patient in patient_of.items() if slide not in labelled}


def rows_by_slide(source: str, rows: Sequence[Row], names: SlideNames) -> dict[str, Row]:
    """What a file without labels says of each slide it names; refuses contradictions as `match_labels` does."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        hits = names.find(row.slide)
        _refuse_several(source, row, hits, cases=True)
        for slide in hits:
            found[slide].append(row)
    for same in found.values():
        _refuse_contradictions(source, same, ("patient", "site", "split"))
    return {slide: same[0] for slide, same in found.items()}


def patients_notes(items: Sequence[Item], patients_from: str) -> list[str]:
    """What makes figures too good if it is so: several slides or several names of one patient that count as several."""
    if "own patient" not in patients_from:
        return [
            f"the patients {' and '.join(map(repr, names))} may be one, spelt twice; then it may be trained on and "
            "tested, and the figures are too good: spell them alike"
            for names in maybe_one_person(item.patient for item in items)
        ]
    return [
        "no patient column: each slide counts as its own patient. If some patients have several slides, "
        "the figures are too good; add a column 'patient'"
    ]


def _refuse_several(source: str, row: Row, hits: Sequence[str], cases: bool) -> None:
    """One name may mean several slides only where it is the barcode of their case, and `cases` may be named."""
    if len(hits) > 1 and not (cases and TCGA_CASE.match(path_key(row.slide, loose=True)[-1])):
        alike = any(differs_unseen(hits[0], other) for other in hits)
        way_out = "they differ only in how letters are coded, so rename one file and tile again" if alike else ""
        raise LabelsError(
            f"{source}, line {row.line}: {row.slide!r} may be {_some(hits)}; "
            f"{way_out or 'write its path below the slides folder'}"
        )


def _refuse_contradictions(source: str, rows: Sequence[Row], about: Sequence[str]) -> None:
    first = rows[0]
    for row in rows[1:]:
        for what in about:
            if getattr(row, what) != getattr(first, what):
                same = f": {row.slide}, the same slide" if row.slide != first.slide else ""
                raise LabelsError(
                    f"{source}: {first.slide} is listed twice with different {what}: {getattr(first, what)!r} "
                    f"(line {first.line}) and {getattr(row, what)!r} (line {row.line}{same})"
                )


def _is_number(label: str) -> bool:
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False


def _one_class(source: str, where: str, label: str, named: Sequence[Row], missing: Mapping[str, str]) -> str:
    num_named = len({row.slide for row in named})
    said = f"{source}: every labelled slide that was found is {label!r}; two classes at least are needed"
    if not missing or len({row.label for row in named}) < 2:
        return said
    first = next(iter(missing))
    have = "has" if len(missing) == 1 else "have"
    return (
        f"{said}. {len(missing):,} of its {count(num_named, 'slide')} {have} no tiles in {where}, the first {first!r} "
        f"({missing[first]}); is that the workspace of these labels?"
    )


def _none_found(source: str, where: str, named: Sequence[Row], missing: Mapping[str, str]) -> str:
    if not named:
        return f"{source}: no line has a label"
    first = next(iter(missing))
    return (
        f"{source}: none of its {len(missing)} slides has tiles in {where}; the first is {first!r} "
        f"({missing[first]}). Names must be those of the slide files; histossl tile --slides DIR makes the tiles"
    )


def _patients(found: Mapping[str, Sequence[Row]], names: SlideNames) -> tuple[dict[str, str], str]:
    """Each slide's patient, and where it comes from."""
    if any(row.patient for rows in found.values() for row in rows):
        return {slide: rows[0].patient for slide, rows in found.items()}, "the patient column"
    for slide, rows in found.items():
        refuse_two_cases(rows[0].slide, names.cases(slide))
    return patients_by_name(found, names)


def refuse_parted_cases(source: str, items: Sequence[Item], names: SlideNames) -> None:
    """A TCGA case is one patient, whatever a patient column says: sample barcodes in it would part a case's slides."""
    first: dict[str, Item] = {}
    for item in items:
        for case in names.cases(item.slide):
            before = first.setdefault(case, item)
            if before.patient != item.patient:
                raise LabelsError(
                    f"{source}: the slides of {case}, which is one patient, have the patients {before.patient!r} "
                    f"({before.slide}) and {item.patient!r} ({item.slide}); give them one (or leave out the patient "
                    "column: barcodes tell patients)"
                )


def refuse_two_cases(name: str, cases: set[str]) -> None:
    if len(cases) > 1:
        raise LabelsError(
            f"{name}: the same content is in the archive under names of several patients ({', '.join(sorted(cases))}); "
            "find out whose it is, and remove the others"
        )


def patients_by_name(slides: Iterable[str], names: SlideNames | None = None) -> tuple[dict[str, str], str]:
    """Patients by TCGA barcode where slides have one, else each slide its own; and where that comes from, in words."""
    slides = list(slides)
    names = names or SlideNames(slides)
    patients = {slide: min(names.cases(slide), default=slide) for slide in slides}
    own = sum(patients[slide] == slide for slide in patients)
    if own == 0:
        return patients, "TCGA barcodes"
    if own == len(patients):
        return patients, "no column: each slide is its own patient"
    return patients, f"TCGA barcodes; {own} slides without one are each their own patient"


def _items_of(
    source: str, slide: str, rows: Sequence[Row], patient: str, regions: bool, notes: list[str]
) -> list[Item]:
    first = rows[0]
    _refuse_contradictions(
        source, rows, ("patient", "site", "split") if regions else ("label", "patient", "site", "split")
    )
    if not regions:
        if len(rows) > 1:
            notes.append(f"{slide} is listed {len(rows)} times with the same label; it counts once")
        return [Item(slide, slide, first.label, patient, first.site, first.split)]
    items: list[Item] = []
    for row in rows:
        if row.box is None:
            raise LabelsError(f"{source}, line {row.line}: no region (x,y,width,height) though other lines have one")
        name = f"{slide}#{len(items) + 1}"
        items.append(Item(name, slide, row.label, patient, row.site, row.split, boxes=(row.box,)))
    return items


def refuse_split_patients(source: str, items: Sequence[Item]) -> None:
    sides: dict[str, dict[str, str]] = defaultdict(dict)
    for item in items:
        sides[item.patient].setdefault(item.split, item.slide)
    torn = {patient: slides for patient, slides in sides.items() if len(slides) > 1}
    for names in maybe_one_person(sides):
        if not torn and len({split for name in names for split in sides[name]}) > 1:
            raise LabelsError(
                f"{source}: the patients {' and '.join(map(repr, names))} are in train and test and may be one, spelt "
                "twice; spell them alike (or, if they are two, name them so that it shows)"
            )
    if torn:
        patient, slides = next(iter(sorted(torn.items())))
        raise LabelsError(
            f"{source}: {len(torn)} {'patient is' if len(torn) == 1 else 'patients are'} in both train and test, "
            f"the first {patient!r} (train {slides.get('train')}, test {slides.get('test')}); "
            "a patient must be on one side only"
        )


def _refuse_mixed_patients(source: str, items: Sequence[Item]) -> None:
    labels: dict[str, dict[str, str]] = defaultdict(dict)
    for item in items:
        labels[item.patient].setdefault(item.label, item.slide)
    mixed = {patient: of for patient, of in labels.items() if len(of) > 1}
    if mixed:
        patient, of = next(iter(sorted(mixed.items())))
        example = ", ".join(f"{slide} is {label!r}" for label, slide in sorted(of.items()))
        raise LabelsError(
            f"{source}: {len(mixed)} {'patient has' if len(mixed) == 1 else 'patients have'} slides of several "
            f"classes, the first {patient!r} ({example}); if that is meant (tumour and normal of one patient), "
            "pass --mixed-patients"
        )


# ---- from slides to regions and tiles


def tiles_in_boxes(coords_l0: NDArray[np.integer], tile_side_l0: float, boxes: Sequence[Box]) -> NDArray[np.int64]:
    """Positions of the tiles whose centre lies in one of `boxes`. coords_l0 (n, 2) are top left corners."""
    centre = np.asarray(coords_l0, dtype=np.float64) + tile_side_l0 / 2
    inside = np.zeros(len(centre), dtype=bool)
    for box in boxes:
        inside |= (
            (centre[:, 0] >= box.x_l0)
            & (centre[:, 0] < box.x_l0 + box.width_l0)
            & (centre[:, 1] >= box.y_l0)
            & (centre[:, 1] < box.y_l0 + box.height_l0)
        )
    return np.flatnonzero(inside).astype(np.int64)


def one_item_per_tile(table: LabelTable, num_tiles: Mapping[str, int], *, at_most: int, seed: int) -> LabelTable:
    """Each tile of each item becomes an item of its own, `at_most` of one slide and label, chosen by `seed`.

    A tile inside regions of two labels has no label of its own and is left out.
    """
    of_slide: dict[str, list[Item]] = defaultdict(list)
    for item in table.items:
        of_slide[item.slide].append(item)
    items: list[Item] = []
    contradicted = 0
    for slide, whole in sorted(of_slide.items()):
        label_of: dict[int, Item | None] = {}
        for item in whole:
            tiles = np.arange(num_tiles[slide]) if item.tiles is None else item.tiles
            for tile in tiles.tolist():
                before = label_of.setdefault(tile, item)
                if before is None or before.label != item.label:
                    label_of[tile] = None
        contradicted += sum(item is None for item in label_of.values())
        by_label: dict[str, list[int]] = defaultdict(list)
        for tile, owner in sorted(label_of.items()):
            if owner is not None:
                by_label[owner.label].append(tile)
        for label, tiles_of_label in sorted(by_label.items()):
            rng = np.random.default_rng([seed, int.from_bytes(hashlib.sha256(slide.encode()).digest()[:4])])
            kept = np.sort(rng.permutation(tiles_of_label)[:at_most])
            for tile in kept.tolist():
                owner = label_of[tile]
                assert owner is not None
                items.append(
                    Item(
                        f"{slide}@{tile}", slide, label, owner.patient, owner.site, owner.split,
                        tiles=np.array([tile], dtype=np.int64),
                    )
                )  # fmt: skip
    notes = list(table.notes)
    if contradicted:
        notes.append(f"{contradicted} tiles lie in regions of two labels; they are left out")
    return _with_items(table, items, "tile", notes)


def with_tiles(table: LabelTable, items: Iterable[Item], notes: Iterable[str] = ()) -> LabelTable:
    """The same table after its regions have found their tiles."""
    return _with_items(table, list(items), table.unit, [*table.notes, *notes])


def _with_items(table: LabelTable, items: list[Item], unit: Unit, notes: list[str]) -> LabelTable:
    present = tuple(sorted({item.label for item in items}, key=natural))
    if len(present) < 2:
        lost = [label for label in table.classes if label not in present]
        raise LabelsError(f"no tile carries the label {_some(lost)}; two classes at least are needed")
    return replace(table, items=tuple(items), classes=present, unit=unit, notes=tuple(notes))


# ---- what a person sees first


def overview(table: LabelTable) -> tuple[list[str], list[list[object]]]:
    """Columns and rows of the table that is shown before anything runs: per class (and split) items and patients."""
    splits = [split for split in ("train", "test") if any(item.split == split for item in table.items)]
    unit = f"{table.unit}s"
    with_sites = any(item.site for item in table.items)
    columns = ["class", unit, "patients", *(["sites"] if with_sites else [])]
    columns += [f"{split} {what}" for split in splits for what in (unit, "patients")]
    rows: list[list[object]] = []
    for label in (*table.classes, None):
        chosen = [item for item in table.items if label is None or item.label == label]
        row: list[object] = ["all" if label is None else label, len(chosen), len({item.patient for item in chosen})]
        row += [len({item.site for item in chosen if item.site})] if with_sites else []
        for split in splits:
            part = [item for item in chosen if item.split == split]
            row += [len(part), len({item.patient for item in part})]
        rows.append(row)
    return columns, rows


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts 'grade 2' before 'grade 10', so that ordinal labels stand in their order."""
    pieces = re.split(r"(\d+)", text)
    return tuple((1, int(piece), "") if piece.isdecimal() else (0, 0, piece) for piece in pieces if piece)


def _some(names: Sequence[str], at_most: int = 4) -> str:
    shown = ", ".join(repr(name) for name in list(names)[:at_most])
    return shown if len(names) <= at_most else f"{shown} and {len(names) - at_most} more"
