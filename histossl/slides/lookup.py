"""Finds a slide by a name that a person wrote: its path below the slides folder, or its file name, however spelt."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property

from histossl.core.names import exact_key, letters, path_key
from histossl.slides.archive import SUFFIXES

NOT_READ = ("isyntax", "kfb", "lif", "sdpc", "tron", "vsi", "zarr", "zip", "zvi")  # but named so before conversion
TYPES = sorted({*NOT_READ, *(suffix.removeprefix(".") for suffix in SUFFIXES)})
FILE_TYPE = re.compile(rf"(?:\.ome)?\.(?:{'|'.join(TYPES)})$|\.ome$", re.IGNORECASE)
MADE_OF_SLIDES = re.compile(r"\.(?:h5|hdf5|pt|pth|npy|npz|pkl|csv|txt|xml|json|geojson|gz)$", re.IGNORECASE)
Key = tuple[str, ...]


class NameFinder:
    """Finds what is meant by a name. `holder_of`: every name there is (a path with /), and what it stands for.

    A name is compared as it is written first, then in any Unicode form and case, then loosely (`path_key`); each time
    with its file type and without.
    """

    def __init__(self, holder_of: Mapping[str, str]) -> None:
        self.holder_of = dict(holder_of)
        self._exact: dict[str, list[str]] = defaultdict(list)
        for own in self.holder_of:
            self._exact[exact_key(own)].append(own)
        self._by_last = {loose: self._last_parts(loose) for loose in (False, True)}

    def _last_parts(self, loose: bool) -> dict[str, list[tuple[str, Key]]]:
        by_last: dict[str, list[tuple[str, Key]]] = defaultdict(list)
        for own in self.holder_of:
            key = path_key(own, loose)
            for last in {key[-1], path_key(without_type(own), loose)[-1]}:
                by_last[last].append((own, key))
        return by_last

    def find(self, name: str) -> tuple[str, ...]:
        """What `name` stands for: nothing, one, or, where it is ambiguous, several."""
        return tuple(sorted({self.holder_of[own] for own in self.named(name)}))

    def named(self, name: str) -> tuple[str, ...]:
        """The names among `holder_of` that are meant by `name`."""
        exact = self._exact.get(exact_key(name))
        if exact:
            return tuple(sorted(exact))
        for loose in (False, True):
            for key in (path_key(name, loose), path_key(without_type(name), loose)):
                found = {own for own, other in self._by_last[loose].get(key[-1], ()) if _agree(key[:-1], other[:-1])}
                if found:
                    return tuple(sorted(found))
        return ()

    @cached_property
    def _by_letters(self) -> dict[str, list[tuple[str, Key]]]:
        by_letters: dict[str, list[tuple[str, Key]]] = defaultdict(list)
        for own in self.holder_of:
            key = tuple(letters(part) for part in path_key(without_type(own), loose=True))
            by_letters[key[-1]].append((own, key))
        return by_letters

    def suggestion(self, name: str) -> str:
        """'did you mean X?' of a name that differs in what is no identity: case, dashes, spaces, the kind of file.

        Never one with another number or letter, for that is another slide, and mostly another patient's.
        """
        plain = without_type(name)
        while plain != (shorter := without_type(MADE_OF_SLIDES.sub("", plain))):
            plain = shorter
        key = tuple(letters(part) for part in path_key(plain, loose=True))
        close = sorted(own for own, other in self._by_letters.get(key[-1], ()) if _agree(key[:-1], other[:-1]))
        return f"did you mean {' or '.join(map(repr, close[:3]))}?" if close else ""


def without_type(name: str) -> str:
    """A1.svs -> A1, A1.ome.tif -> A1, A1.v2 -> A1.v2, S7.HE -> S7.HE: only what is a slide's file type goes."""
    return FILE_TYPE.sub("", exact_key(name))


def _agree(folders: Key, others: Key) -> bool:
    """Whether two paths to a file, read from their ends, are the same as far as both go."""
    shared = min(len(folders), len(others))
    return shared == 0 or folders[-shared:] == others[-shared:]
