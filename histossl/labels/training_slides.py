"""Which slides here a saved model has learnt the labels of: by their content, since a name proves nothing.

A file may be copied under another name, and another slide may bear a training slide's name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from histossl.labels.slide_lookup import SlideNames
from histossl.tiles.store.index import TileIndex

Contents = dict[str, list[str]]  # slide: its fingerprints of few and of many samples; "" where a zip has none


@dataclass(frozen=True)
class Learnt:
    slides: frozenset[str]
    by_name: str = ""  # why only names were compared; empty where contents were


def contents_of(index: TileIndex, slides: Iterable[str]) -> Contents:
    """What a model keeps of the slides it was trained on, to know them again."""
    facts = {slide: index.facts(slide) for slide in slides}
    return {slide: [one.get("fingerprint") or "", one.get("spots") or ""] for slide, one in facts.items()}


def slides_learnt(record: Mapping[str, Any], index: TileIndex) -> Learnt:
    """Slides here whose labels a model was trained with (a student: its teacher), by its own record.

    The record is a saved model's provenance, or what a distilled backbone keeps of its teacher.

    Fingerprints of an anonymous store are keyed, so that those of another store never equal them: there a name counts
    too, as it does where the model was made before models kept fingerprints.

    Equal samples count as the same slide here, without a comparison of all bytes: the training slide need not be at
    hand. It is the safe side. Nothing is attributed or left out by it; a slide that is counted wrongly only loses its
    mark as a test of the model, while one that is missed would be reported as a test that it is not.
    """
    contents: Contents = record.get("contents", {})
    known = defaultdict(list)
    for few, many in contents.values():
        known[few].append(many)
    found = {
        slide
        for slide, (few, many) in contents_of(index, index.slides).items()
        if few and any(not many or not other or many == other for other in known.get(few, ()))
    }
    why = ""
    if record.get("slides") and not contents:
        why = "the model was made by an older histossl, which kept no fingerprints of its training slides"
    elif index.config.get("anonymize") or record.get("tiling", {}).get("anonymize"):
        why = "an anonymous store's fingerprints are its own"
    if why:
        here = SlideNames.of(index)
        found |= {slide for name in record.get("slides", ()) for slide in here.find(name)}
    return Learnt(frozenset(found), why)
