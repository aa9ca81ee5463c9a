"""Finds a slide by the name that a person gave it: its path below the slides folder, its file name, a TCGA barcode."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import PurePosixPath

from histossl.core.config import nearest
from histossl.core.workspace import Workspace
from histossl.slides.archive import SUFFIXES
from histossl.slides.ledger import read_ledger
from histossl.tiles.store.anonymisation import holders
from histossl.tiles.store.index import TileIndex

TCGA_CASE = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?![A-Z0-9])", re.IGNORECASE)
TCGA_SAMPLE = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}-[0-9]{2}", re.IGNORECASE)
TCGA_NORMAL = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}-1[0-9]", re.IGNORECASE)  # samples 10 to 19
NOT_READ = ("isyntax", "kfb", "lif", "sdpc", "tron", "vsi", "zarr", "zip", "zvi")  # but named so before conversion
TYPES = sorted({*NOT_READ, *(suffix.removeprefix(".") for suffix in SUFFIXES)})
NAMELESS = "tiled under a pseudonym that is not known; name the file of names with --names FILE"
NO_TILES = "no tiles: "  # how a hint begins that is about a slide of the archive
FILE_TYPE = re.compile(rf"(?:\.ome)?\.(?:{'|'.join(TYPES)})$|\.ome$", re.IGNORECASE)


def _without_tiles(index: TileIndex) -> dict[str, str]:
    """Slides that the archive's ledger knows and that have no tiles, and why."""
    known = set(index.slides)
    return {
        row.slide or row.file: _why(row.tile_reason or row.reason, row.tile_status)
        for row in read_ledger(Workspace.holding(index.path).archive_csv)
        if (row.slide or row.file) not in known
    }


def _why(told: str, tile_status: str) -> str:
    return told.removeprefix(NO_TILES) or (NAMELESS if tile_status == "tiled" else "not tiled yet")


class SlideNames:
    """Finds a slide by the name a person gave it. `others`: further names, and the slide that holds the tiles.

    `without_tiles`: slides of the archive that have none, and why.
    """

    def __init__(
        self,
        slides: Iterable[str],
        others: Mapping[str, str] | None = None,
        without_tiles: Mapping[str, str] | None = None,
    ) -> None:
        self.slides = tuple(slides)
        self.others = dict(others or {})
        self.without_tiles = dict(without_tiles or {})
        self._holder = {**self.others, **{slide: slide for slide in self.slides}}
        self._cases: dict[str, set[str]] = defaultdict(set)
        for slide, holder in self._holder.items():
            barcode = TCGA_CASE.search(PurePosixPath(slide).name) or TCGA_CASE.search(slide)
            self._cases[holder] |= {barcode.group().upper()} if barcode else set()
        self._last = [(slide, _parts(slide)[-1]) for slide in self._holder]
        self._slides_of_case: dict[str, list[str]] = defaultdict(list)
        for slide in self._holder:
            for case in TCGA_CASE.findall(slide):
                self._slides_of_case[case.upper()].append(slide)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for slide in self._holder:
            for stem in {_parts(slide)[-1], _parts(_without_suffix(slide))[-1]}:
                self._by_stem[stem].append(slide)

    @classmethod
    def of(cls, index: TileIndex) -> SlideNames:
        """Of an archive's tiles: also by names that an anonymous store hides, or that the same content has twice."""
        return cls(index.slides, holders(Workspace.holding(index.path), index.slides), _without_tiles(index))

    def find(self, name: str) -> tuple[str, ...]:
        """The slides meant by `name`: none, one, or (a TCGA case barcode, an ambiguous file name) several."""
        return tuple(sorted({self._holder[own] for own in self._named(name)}))

    @cached_property
    def _untiled(self) -> SlideNames:
        return SlideNames(self.without_tiles)

    def cases(self, slide: str) -> set[str]:
        """TCGA barcodes of the case that the slide's names tell: one, none, or where names contradict, several."""
        return self._cases[slide]

    def _named(self, name: str) -> tuple[str, ...]:
        name = name.replace("\\", "/").removeprefix("./")
        if name in self._holder:
            return (name,)
        for spelling in (name, _without_suffix(name)):
            found = self._same_ending(spelling)
            if found:
                return found
        return self._barcode(name)

    def labelled_by(self, name: str) -> tuple[str, ...]:
        """The slides whose label is that of `name`: a case's is its tumour's, not that of normal tissue beside it."""
        named = self._named(name)
        if self.is_case_barcode(PurePosixPath(name).name):
            named = tuple(own for own in named if not TCGA_NORMAL.match(PurePosixPath(own).name)) or named
        return tuple(sorted({self._holder[own] for own in named}))

    def is_case_barcode(self, name: str) -> bool:
        return TCGA_CASE.fullmatch(name) is not None

    def hint(self, name: str) -> str:
        """Why `name` finds nothing: that slide has no tiles, or another name was meant.

        Of a TCGA barcode only slides of its case may have been, for other cases are other people.
        """
        untiled = self._untiled.find(name)
        if untiled:
            return NO_TILES + self.without_tiles[untiled[0]]
        case = TCGA_CASE.search(name)
        among: Iterable[str] = self._slides_of_case.get(case.group().upper(), ()) if case else self._holder
        stem = _parts(_without_suffix(name.replace("\\", "/")))[-1]
        close = nearest(stem, [_without_suffix(PurePosixPath(slide).name) for slide in among])
        none = f"no slide of the case {case.group().upper()}" if case and not among else "no slide has a similar name"
        return close.removeprefix(", ") if close else none

    def _same_ending(self, name: str) -> tuple[str, ...]:
        """Slides whose path, read from its end, agrees with `name` as far as both go."""
        parts = _parts(name)
        found = []
        for slide in self._by_stem.get(parts[-1], ()):
            others = _parts(slide)
            shared = min(len(parts), len(others)) - 1
            if shared == 0 or parts[:-1][-shared:] == others[:-1][-shared:]:
                found.append(slide)
        return tuple(sorted(found))

    def _barcode(self, name: str) -> tuple[str, ...]:
        """By the first fields of a barcode. One that ends in a sample's two digits leaves out the vial's letter."""
        stem = _without_suffix(PurePosixPath(name).name).casefold()
        if not TCGA_CASE.match(stem):
            return ()
        vial = "[a-z]?" if TCGA_SAMPLE.fullmatch(stem) else ""
        meant = re.compile(rf"{re.escape(stem)}{vial}(?:$|[-._])")
        return tuple(sorted(slide for slide, own in self._last if meant.match(own)))


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.casefold().split("/") if part) or ("",)


def _without_suffix(name: str) -> str:
    """A1.svs -> A1, A1.ome.tif -> A1, A1.v2 -> A1.v2, S7.HE -> S7.HE: only what is a slide's file type goes."""
    return FILE_TYPE.sub("", name)
