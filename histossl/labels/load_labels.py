"""What carries the labels of a command: slides, regions or single tiles of a workspace, shown before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from histossl.core import console
from histossl.core.anonymous import Names, names_of
from histossl.core.config import FinetuneConfig
from histossl.core.errors import LabelsError
from histossl.core.workspace import Workspace
from histossl.features.extraction import slide_tiles
from histossl.labels import label_table as labelling
from histossl.labels.annotation_labels import drawn_items
from histossl.labels.label_csv import LabelFile, read_labels
from histossl.labels.label_table import LabelTable
from histossl.labels.slide_lookup import NO_TILES, SlideNames
from histossl.tiles.store.index import TileIndex

MISSING_SHOWN = 5


def labelled_items(workspace: Workspace, index: TileIndex, config: FinetuneConfig) -> LabelTable:
    """The labels of `config` on the tiles of `index`, in the unit asked for; by pseudonyms, if the tiles are."""
    return by_pseudonyms(_labelled_items(workspace, index, config), names_of(workspace))


def by_pseudonyms(table: LabelTable, names: Names) -> LabelTable:
    """Slides' names were found in memory; what is written of them and their patients are pseudonyms."""
    if not names.key:
        return table
    named = replace(
        table,
        items=tuple(replace(item, patient=names.patient(item.patient)) for item in table.items),
        patients_beside=tuple((slide, names.patient(patient)) for slide, patient in table.patients_beside),
        missing=tuple((names.slide(slide), why) for slide, why in table.missing),
    )
    missing = tuple((slide, names.reason(why)) for slide, why in named.missing)
    named = replace(named, missing=missing, notes=tuple(map(names.sentence, table.notes)))
    names.write()
    return named


def _labelled_items(workspace: Workspace, index: TileIndex, config: FinetuneConfig) -> LabelTable:
    path = Path(config.labels)
    if config.regions or path.is_dir():
        file = LabelFile([], []) if path.is_dir() else read_labels(path, needs_label=False)
        option, folder = ("--regions", Path(config.regions)) if config.regions else ("--labels", path)
        table = drawn_items(index, folder, file.rows, config.classes, option=option, source=path.name)
        table = replace(table, notes=(*file.notes, *table.notes))
        if config.unit == "slide":
            raise LabelsError("--unit slide: annotations label regions; leave --unit out, or pass --unit tile")
        return _in_unit(table, index, config)
    file = read_labels(path)
    table = labelling.match_labels(
        file.rows,
        SlideNames.of(index),
        classes=config.classes,
        mixed_patients=config.mixed_patients,
        source=path.name,
        where=str(workspace.root),
    )
    table = replace(table, notes=(*file.notes, *table.notes))
    if table.unit == "region":
        if config.unit == "slide":
            raise LabelsError(f"--unit slide: {path.name} labels regions (x,y,width,height); leave --unit out")
        table = _regions_on_tiles(table, index)
    elif config.unit == "region":
        raise LabelsError(
            f"--unit region: {path.name} labels whole slides; add columns x,y,width,height, or --regions DIR"
        )
    return _in_unit(table, index, config)


def _in_unit(table: LabelTable, index: TileIndex, config: FinetuneConfig) -> LabelTable:
    if config.unit == "tile":
        counts = {slide: len(slide_tiles(index, slide)) for slide in table.slides}
        table = labelling.one_item_per_tile(table, counts, at_most=config.tiles_per_slide, seed=config.seed)
    return table


def _regions_on_tiles(table: LabelTable, index: TileIndex) -> LabelTable:
    """Each region with the tiles whose centre lies in it; regions without any are left out and counted."""
    items = []
    empty = 0
    for item in table.items:
        numbers = slide_tiles(index, item.slide)
        side_l0 = index.facts(item.slide)["scales"][0]["side_l0"]
        tiles = labelling.tiles_in_boxes(index.coords_l0(numbers), side_l0, item.boxes)
        if len(tiles):
            items.append(
                labelling.Item(
                    item.name, item.slide, item.label, item.patient, item.site, item.split, tiles, item.boxes
                )
            )
        empty += not len(tiles)
    notes = [f"{empty} regions hold no tile's centre; they are left out"] if empty else []
    return labelling.with_tiles(table, items, notes)


def show_labels(table: LabelTable, source: str, every_missing: bool = False) -> None:
    columns, rows = labelling.overview(table)
    console.table(f"labels: {Path(source).name}", columns, rows, right=columns[1:])
    found = table.num_named - len(table.missing)
    have = "has" if len(table.unlabelled) == 1 else "have"
    console.say(
        f"{table.num_named} slides named, {found} found, {len(table.missing)} missing; "
        f"{console.count(len(table.unlabelled), 'slide')} of the workspace {have} no label; "
        f"patients from {table.patients_from}"
    )
    show_missing(table.missing, len(table.missing) if every_missing else MISSING_SHOWN)
    for note in table.notes:
        console.warn(note)


def show_missing(missing: Sequence[tuple[str, str]], at_most: int | None = None) -> None:
    for name, why in missing[:at_most]:
        known = why.startswith(NO_TILES)  # a mistyped name has another remedy
        console.warn(f"{name}: in the archive, but it has {why}" if known else f"{name}: not found ({why})")
    if at_most is not None and len(missing) > at_most:
        console.warn(f"and {len(missing) - at_most} more that were not found: run.json names them, and --dry-run does")
