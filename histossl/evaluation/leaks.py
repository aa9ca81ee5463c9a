"""Were tested slides in the pretraining pool of a start? Counted, and said in words, from the backbones' provenance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from histossl.evaluation.labels import LabelTable
from histossl.evaluation.slide_names import SlideNames
from histossl.evaluation.splits import Splits
from histossl.evaluation.starts import Start


def leak_statement(table: LabelTable, splits: Splits, starts: Sequence[Start], here: SlideNames) -> dict[str, Any]:
    """Whether tested slides were in the pretraining pool of any start: in tested items per start, and in words."""
    items = [table.items[item].slide for item in splits.tested]
    tested = set(items)
    seen: dict[str, int | None] = {}
    words: dict[str, str] = {}
    for name in dict.fromkeys(start.name for start in starts if start.exported is not None):
        of_name = [start.provenance for start in starts if start.name == name]
        pools = [provenance.get("pretraining_slides") for provenance in of_name]
        known = [_slides_of(here, pool or ()) for pool in pools]
        shown = tested & set().union(*known)
        untold = any(pool is None for pool in pools)
        strange = any(pool and not found for pool, found in zip(pools, known, strict=True))
        seen[name] = None if untold or strange else sum(slide in shown for slide in items)
        any_of = "" if len(pools) == 1 else f" of any of its {len(pools)} runs"
        taught = tested & set().union(*(_slides_of(here, one.get("teacher", {}).get("slides", ())) for one in of_name))
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
        elif shown:
            words[name] = (
                f"{len(shown)} of {len(tested)} tested slides were in its pretraining pool{any_of}, "
                "without their labels (transductive)"
            )
        else:
            words[name] = f"none of the {len(tested)} tested slides was in its pretraining pool{any_of}"
    return {"statement": _leaks_in_words(words), "words": words, "seen": seen, "num_tested_slides": len(tested)}


def leaks_together(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Of every start on the curve, those of earlier commands too."""
    words, seen = ({**before.get(what, {}), **now[what]} for what in ("words", "seen"))
    return {**now, "statement": _leaks_in_words(words), "words": words, "seen": seen}


def _leaks_in_words(words: Mapping[str, str]) -> str:
    told = "; ".join(f"{name}: {what}" for name, what in words.items())
    return told or "no start was pretrained on slides of this workspace"


def _slides_of(here: SlideNames, names: Iterable[str]) -> set[str]:
    """Slides of this workspace that another one may call otherwise (folders above, file types)."""
    return {slide for name in names for slide in here.find(name)}
