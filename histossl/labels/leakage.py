"""Were tested slides in the pretraining pool of a start? Counted, and said in words, from the backbones' provenance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from histossl.core.console import count
from histossl.features.initialisations import Start
from histossl.labels.label_table import LabelTable
from histossl.labels.slide_lookup import SlideNames, cases_in
from histossl.labels.splits import Splits
from histossl.labels.training_slides import slides_learnt
from histossl.tiles.store.index import TileIndex


def leak_statement(
    table: LabelTable, splits: Splits, starts: Sequence[Start], here: SlideNames, index: TileIndex
) -> dict[str, Any]:
    """Whether tested patients were in the pretraining pool of any start: in tested items per start, and in words.

    A tested slide may have been left out while another of its patient was shown: that counts, and is told apart.
    """
    items = [table.items[item] for item in splits.tested]
    tested = {item.slide for item in items}
    patients = _Patients(table, here)
    seen: dict[str, int | None] = {}
    only_beside: dict[str, int] = {}
    words: dict[str, str] = {}
    for name in dict.fromkeys(start.name for start in starts if start.exported is not None):
        of_name = [start.provenance for start in starts if start.name == name]
        pools = [provenance.get("pretraining_slides") for provenance in of_name]
        known = [_slides_of(here, pool or ()) for pool in pools]
        shown = set().union(*known)
        of_patients = patients.of_slides(shown) | _cases_in(pool or () for pool in pools)
        beside = {item.patient for item in items if item.slide not in shown and of_patients & patients.of(item.slide)}
        untold = any(pool is None for pool in pools)
        strange = any(pool and not found for pool, found in zip(pools, known, strict=True)) and not beside
        only_beside[name] = sum(
            item.slide not in shown and bool(of_patients & patients.of(item.slide)) for item in items
        )
        itself = sum(item.slide in shown for item in items)
        seen[name] = None if untold or strange else itself + only_beside[name]
        any_of = "" if len(pools) == 1 else f" of any of its {len(pools)} runs"
        taught = tested & set().union(*(slides_learnt(one.get("teacher", {}), index).slides for one in of_name))
        if taught:
            words[name] = (
                f"its teacher had learnt the labels of {len(taught)} of {len(tested)} tested slides, so what "
                "it scores on them is no measure of it"
            )
        elif untold:
            words[name] = "its file does not say which slides it was pretrained on"
        elif strange:
            words[name] = (
                f"none of the slides in its pretraining pool{any_of} has a name that is known here, so whether tested "
                "slides were among them cannot be told"
            )
        else:
            words[name] = _seen_in_words(len(tested & shown), len(tested), len(beside), any_of)
    return {
        "statement": _leaks_in_words(words),
        "words": words,
        "seen": seen,
        "only_beside": only_beside,
        "num_tested_slides": len(tested),
    }


def _seen_in_words(num_shown: int, num_tested: int, num_beside: int, any_of: str) -> str:
    transductive = "without their labels (transductive)"
    others = f"other slides of {count(num_beside, 'tested patient')}"
    if num_shown:
        more = f", and {others}" if num_beside else ""
        return f"{num_shown} of {num_tested} tested slides were in its pretraining pool{any_of}{more}, {transductive}"
    none = f"none of the {num_tested} tested slides was in its pretraining pool{any_of}"
    return f"{none}, but {others} were, {transductive}" if num_beside else none


class _Patients:
    """Whose a slide is: by the labels file, also of slides without a label, and by TCGA barcode."""

    def __init__(self, table: LabelTable, here: SlideNames) -> None:
        self._named = dict(table.patients_beside) | {item.slide: item.patient for item in table.items}
        self._here = here

    def of(self, slide: str) -> set[str]:
        """One patient may have two names here, that of the labels and a barcode."""
        named = self._named.get(slide)
        return self._here.cases(slide) | ({named} if named else set())

    def of_slides(self, slides: Iterable[str]) -> set[str]:
        return {name for slide in slides for name in self.of(slide)}


def _cases_in(pools: Iterable[Iterable[str]]) -> set[str]:
    """TCGA cases in the names of slides that may lie in another workspace."""
    return {case for pool in pools for name in pool for case in cases_in(name)}


def leaks_together(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Of every start on the curve, those of earlier commands too."""
    together = {what: {**before.get(what, {}), **now[what]} for what in ("words", "seen", "only_beside")}
    return {**now, **together, "statement": _leaks_in_words(together["words"])}


def _leaks_in_words(words: Mapping[str, str]) -> str:
    told = "; ".join(f"{name}: {what}" for name, what in words.items())
    return told or "no start was pretrained on slides of this workspace"


def _slides_of(here: SlideNames, names: Iterable[str]) -> set[str]:
    """Slides of this workspace that another one may call otherwise (folders above, file types)."""
    return {slide for name in names for slide in here.find(name)}
