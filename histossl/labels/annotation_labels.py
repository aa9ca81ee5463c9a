"""Labels drawn on slides: a folder of QuPath GeoJSON files, one per slide, whose annotations' classes are the labels.

    histossl finetune --labels annotations/                              patients from barcodes, else slide by slide
    histossl finetune --labels patients.csv --regions annotations/       patients, sites and split from a CSV

Each annotation is an item; its tiles are those whose centre it surrounds and no annotation "Ignore*" does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import LabelsError, SlideError
from histossl.core.names import same_to_a_reader
from histossl.features.extraction import slide_tiles
from histossl.labels.label_csv import Row
from histossl.labels.label_table import (
    Item,
    LabelTable,
    natural,
    patients_by_name,
    patients_notes,
    refuse_parted_cases,
    refuse_split_patients,
    refuse_two_cases,
    rows_by_slide,
)
from histossl.labels.slide_lookup import SlideNames
from histossl.labels.spelling import refuse_alike
from histossl.slides.annotation_files import annotation_files, regions_in
from histossl.slides.annotations import Region, Ring, read_regions
from histossl.slides.archive import SlideFile
from histossl.tiles.store.index import TileIndex


def drawn_items(
    index: TileIndex,
    directory: Path,
    rows: Sequence[Row] = (),
    classes: Sequence[str] = (),
    *,
    option: str = "--regions",
    source: str = "labels.csv",
) -> LabelTable:
    """Items of every annotation with a class, on the slides of `index`.

    `rows`, read from `source`, say whose slide it is, and its side; `option` is what named the directory.
    """
    if not directory.is_dir():
        raise LabelsError(f"{option} {directory}: no such folder")
    files = annotation_files(directory)
    if not files:
        raise LabelsError(f"{option} {directory}: holds no .geojson file; export annotations from QuPath as GeoJSON")
    names = SlideNames.of(index)
    about = rows_by_slide(source, rows, names)
    notes: list[str] = []
    unread: list[tuple[str, str]] = []
    found: list[Item] = []
    used: set[Path] = set()
    without_class = empty = 0
    own_patient, patients_from = patients_by_name(index.slides, names)
    files_of = [SlideFile(Path(str(index.facts(slide).get("file") or slide)), slide) for slide in index.slides]
    files_of += [SlideFile(Path(name), name) for name in names.others]
    matched = regions_in(directory, files_of, files)
    drawn: set[str] = set()
    named: list[tuple[str, str]] = []  # each annotation's class, and its slide
    wanted = {same_to_a_reader(name) for name in classes}
    for one in files_of:
        slide, path = names.others.get(one.slide, one.slide), matched[one.path].path
        used |= {*matched[one.path].unread}
        if path is None:
            unread += [(one.slide, matched[one.path].note)] if matched[one.path].note else []
            continue
        used.add(path)
        notes += [f"{one.slide}: {matched[one.path].note}"] if matched[one.path].note else []
        if slide in drawn:
            unread.append((one.slide, f"the same slide as {slide}, which has annotations under that name"))
            continue
        drawn.add(slide)
        if rows and slide not in about:
            unread.append((slide, "has annotations, but no line in the labels file"))
            continue
        try:
            facts = index.facts(slide)
            size_l0 = (facts.get("width_l0", 2**31), facts.get("height_l0", 2**31))
            regions = read_regions(path, size_l0, facts.get("bounds_l0", (0, 0)))
        except SlideError as error:
            unread.append((slide, str(error)))
            continue
        row = about.get(slide)
        centres = _centres_l0(index, slide)
        ignored = np.zeros(len(centres), dtype=bool)
        for region in regions.regions:
            if region.ignored:
                ignored |= in_region(region, centres)
        for number, region in enumerate(regions.regions, start=1):
            if region.ignored or (wanted and same_to_a_reader(region.name) not in wanted):
                continue
            named.append((region.name, slide))
            if not region.name:
                without_class += 1
                continue
            tiles = np.flatnonzero(in_region(region, centres) & ~ignored).astype(np.int64)
            empty += not len(tiles)
            if len(tiles):
                patient = row.patient if row and row.patient else own_patient[slide]
                site, split = (row.site, row.split) if row else ("", "")
                found.append(Item(f"{slide}#{number}", slide, region.name, patient, site, split, tiles))
    refuse_alike(str(directory), "class", (pair for pair in named if pair[0]))
    unread += [(one.path.name, "no tiled slide of this name") for one in files if one.path not in used]
    if without_class:
        notes.append(f"{without_class} annotations have no class; they are left out")
    if empty:
        notes.append(f"{empty} annotations hold no tile's centre; they are left out")
    present = tuple(sorted({item.label for item in found}, key=natural))
    if len(present) < 2:
        only = f"only {present[0]!r}" if present else "no class"
        why = f" ({unread[0][0]}: {unread[0][1]})" if unread else ""
        raise LabelsError(f"{option} {directory}: tiles lie in {only}; two classes at least are needed{why}")
    refuse_split_patients(source if rows else directory.name, found)
    refuse_parted_cases(source if rows else directory.name, found, names)
    patients_from = "the patient column" if any(row.patient for row in about.values()) else patients_from
    if patients_from != "the patient column":
        for item in found:
            refuse_two_cases(item.slide, names.cases(item.slide))
    labelled = {item.slide for item in found}
    return LabelTable(
        items=tuple(found),
        classes=present,
        unit="region",
        num_named=len(labelled) + len(unread),
        missing=tuple(sorted(unread)),
        unlabelled=tuple(sorted(set(index.slides) - labelled)),
        patients_from=patients_from,
        notes=(*notes, *patients_notes(found, patients_from)),
        patients_beside=tuple((slide, row.patient) for slide, row in about.items() if row.patient),
    )


def _centres_l0(index: TileIndex, slide: str) -> NDArray[np.float64]:
    side_l0 = index.facts(slide)["scales"][0]["side_l0"]
    return np.asarray(index.coords_l0(slide_tiles(index, slide)) + side_l0 / 2, dtype=np.float64)


def in_region(region: Region, points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points (n, 2) lie in any polygon of a region."""
    inside = np.zeros(len(points), dtype=bool)
    for rings in region.polygons:
        inside |= surrounded(rings, points)
    return inside


def surrounded(rings: Sequence[Ring], points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points an odd number of rings surround (even-odd rule: a ring inside a ring is a hole)."""
    inside = np.zeros(len(points), dtype=bool)
    x, y = points[:, 0], points[:, 1]
    for ring in rings:
        for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            if y0 != y1:
                crosses = (y0 > y) != (y1 > y)
                inside ^= crosses & (x < x0 + (y - y0) * ((x1 - x0) / (y1 - y0)))
    return inside
