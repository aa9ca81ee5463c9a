"""A curve's folder belongs to one set of weights, tiles and runs: what would change what was measured is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from histossl.core.errors import MismatchError, UsageError
from histossl.core.workspace import FinetuneDir
from histossl.features.extraction import Embedder, slide_tiles, tiles_digest
from histossl.features.initialisations import Start, Starts
from histossl.labels.label_table import LabelTable
from histossl.tiles.store.index import TileIndex


def refuse_other_weights(
    run: FinetuneDir, start: Start, embedder: Embedder, before: Mapping[str, Mapping[str, Any]]
) -> None:
    seeds = before.get(start.name, {}).get("seeds") or [before.get(start.name)]
    known = next((one for one in seeds if one and one.get("backbone", "") == start.backbone), None)
    if known and (known["digest"], known["input_px"]) != (embedder.digest, embedder.input_px):
        raise MismatchError(
            f"{run.root}: start {start.key!r} was measured with other weights or at another size (digest "
            f"{known['digest']} at {known['input_px']} px, now {embedder.digest} at {embedder.input_px} px); "
            "use another --name"
        )


def take_up_lone_run(
    run: FinetuneDir, before: Mapping[str, Any], starts: Starts, digest_of: Callable[[Start], str]
) -> dict[str, Any]:
    """What was measured as one backbone without a name is one of the runs that are pooled now, if its weights are."""
    taken = dict(before)
    for name, facts in before.items():
        seeds, pooled = facts.get("seeds", []), [one for one in starts.chosen if one.name == name and one.backbone]
        if len(seeds) != 1 or seeds[0]["backbone"] or not pooled:
            continue
        same = next((one for one in pooled if digest_of(one) == seeds[0]["digest"]), None)
        if same is None:
            raise MismatchError(
                f"{run.root}: start {name!r} was measured with other weights than those of "
                f"{', '.join(one.backbone for one in pooled)}; name that run too, or use another --name"
            )
        taken[name] = {**facts, "backbone": same.backbone, "seeds": [{**seeds[0], "backbone": same.backbone}]}
    return taken


def rename_lone_run(run: FinetuneDir, before: Mapping[str, Any], taken: Mapping[str, Any]) -> None:
    """Its journal gets the name that it has among several."""
    for name, facts in taken.items():
        if facts.get("backbone") and not before[name].get("backbone") and run.journal(name).exists():
            run.journal(name).replace(run.journal(f"{name}+{facts['backbone']}"))


def refuse_other_runs(run: FinetuneDir, before: Mapping[str, Mapping[str, Any]], starts: Starts) -> None:
    """A start that was measured may gain pretraining runs, and lose none: what was said of them would silently go."""
    for name in dict.fromkeys(start.name for start in starts.chosen):
        was = [str(one["backbone"]) for one in before.get(name, {}).get("seeds", [])]
        now = [start.backbone for start in starts.chosen if start.name == name]
        if not set(was) <= set(now):
            before_it, after_it = (", ".join(runs) if any(runs) else "one backbone" for runs in (was, now))
            raise MismatchError(
                f"{run.root}: start {name!r} was measured as {before_it}, and is now {after_it}; "
                "name all earlier runs too, or use another --name"
            )


def labelled_digest(index: TileIndex, table: LabelTable) -> str:
    """Changes when a labelled slide is tiled otherwise; other slides of the archive may come and go."""
    each = [(slide, tiles_digest(index, slide_tiles(index, slide))) for slide in table.slides]
    return hashlib.sha256(json.dumps(each).encode()).hexdigest()[:16]


def refuse_other_architecture(run: FinetuneDir, before: Mapping[str, Mapping[str, Any]], starts: Starts) -> None:
    known = {name: str(one["timm_name"]) for name, one in before.items() if one.get("timm_name")}
    for start in starts.chosen:
        for name, timm_name in known.items():
            if start.timm_name and start.timm_name != timm_name:
                raise UsageError(
                    f"--starts: {run.root} has {name}, a {timm_name}; {start.key} is a {start.timm_name}, and starts "
                    "are compared within one architecture; use another --name"
                )


def refuse_other_tiles(run: FinetuneDir, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if before.get("labelled_digest", now["labelled_digest"]) != now["labelled_digest"]:
        was, has = (f"{one['tile_px']} px at {one['mpp']:g} microns per pixel" for one in (before, now))
        raise MismatchError(
            f"{run.root} was measured on other tiles of these slides ({was}, now {has}); use another --name"
        )
