"""Finds a slide by the name that a person gave it: its path below the slides folder, its file name, a TCGA barcode."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cached_property

from histossl.core.names import folded, path_key
from histossl.core.workspace import Workspace
from histossl.slides.ledger import read_ledger
from histossl.slides.lookup import NameFinder, without_type
from histossl.tiles.store.anonymisation import holders
from histossl.tiles.store.index import TileIndex

TCGA_CASE = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?![A-Z0-9])", re.IGNORECASE)
TCGA_SAMPLE = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}-[0-9]{2}", re.IGNORECASE)
TCGA_NORMAL = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}-1[0-9]", re.IGNORECASE)  # samples 10 to 19
NAMELESS = "tiled under a pseudonym that is not known; name the file of names with --names FILE"
NO_TILES = "no tiles: "  # how a hint begins that is about a slide of the archive


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
        self._finder = NameFinder({**self.others, **{slide: slide for slide in self.slides}})
        self._cases: dict[str, set[str]] = defaultdict(set)
        self._slides_of_case: dict[str, list[str]] = defaultdict(list)
        for slide, holder in self._finder.holder_of.items():
            barcode = TCGA_CASE.search(path_key(slide)[-1]) or TCGA_CASE.search(slide)
            self._cases[holder] |= {barcode.group().upper()} if barcode else set()
            for case in cases_in(slide):
                self._slides_of_case[case].append(slide)

    @classmethod
    def of(cls, index: TileIndex) -> SlideNames:
        """Of an archive's tiles: also by names that an anonymous store hides, or that the same content has twice."""
        return cls(index.slides, holders(Workspace.holding(index.path), index.slides), _without_tiles(index))

    def find(self, name: str) -> tuple[str, ...]:
        """The slides meant by `name`: none, one, or (a TCGA case barcode, an ambiguous file name) several."""
        return self._holders(self._named(name))

    def _holders(self, named: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted({self._finder.holder_of[own] for own in named}))

    def is_untiled(self, name: str) -> bool:
        """Whether `name` is a slide of the archive that has no tiles."""
        return bool(self._untiled.find(name))

    @cached_property
    def _untiled(self) -> SlideNames:
        return SlideNames(self.without_tiles)

    def cases(self, slide: str) -> set[str]:
        """TCGA barcodes of the case that the slide's names tell: one, none, or where names contradict, several."""
        return self._cases[slide]

    def _named(self, name: str) -> tuple[str, ...]:
        return self._finder.named(name) or self._barcode(name)

    def labelled_by(self, name: str) -> tuple[str, ...]:
        """The slides whose label is that of `name`: a case's is its tumour's, not that of normal tissue beside it."""
        named = self._named(name)
        if is_case_barcode(name):
            named = tuple(own for own in named if not TCGA_NORMAL.match(path_key(own)[-1])) or named
        return self._holders(named)

    def hint(self, name: str) -> str:
        """Why `name` finds nothing: that slide has no tiles, or it is spelt otherwise here.

        Never another number or letter: that would be another person's slide. Of a TCGA barcode, what its case has.
        """
        untiled = self._untiled.find(name)
        if untiled:
            return NO_TILES + self.without_tiles[untiled[0]]
        suggestion = self._finder.suggestion(name)
        case = min(cases_in(name), default="")
        if suggestion or not case:
            return suggestion or "no slide has this name"
        own = self._slides_of_case.get(case, [])
        if not own:
            return f"no slide of the case {case}"
        more = f" and {len(own) - 3} more" if len(own) > 3 else ""
        return f"no slide has this name; of the case {case} there is {', '.join(own[:3])}{more}"

    def _barcode(self, name: str) -> tuple[str, ...]:
        """By the first fields of a barcode. One that ends in a sample's two digits leaves out the vial's letter."""
        stem = path_key(without_type(name), loose=True)[-1]
        if not TCGA_CASE.match(stem):
            return ()
        vial = "[a-z]?" if TCGA_SAMPLE.fullmatch(stem) else ""
        meant = re.compile(rf"{re.escape(stem)}{vial}(?:$|[-._])")
        return tuple(own for own in self._finder.holder_of if meant.match(path_key(own)[-1]))


def cases_in(name: str) -> set[str]:
    """The TCGA cases that a name tells, in capital letters."""
    return {case.upper() for case in TCGA_CASE.findall(folded(name, loose=True))}


def is_case_barcode(name: str) -> bool:
    """Whether a name is that of a TCGA case, which may have several slides."""
    return TCGA_CASE.fullmatch(path_key(name, loose=True)[-1]) is not None
