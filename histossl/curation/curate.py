"""Stage `curate`: all tiles of a workspace in, a named subset of them out, for `pretrain --subset NAME`.

    embed every tile -> drop near-duplicates -> balance to a number of tiles, or retrieve by example -> write the subset

DINOv2's curation (Oquab et al. 2023, arXiv 2304.07193, section 3) with the balancing of Vo et al. 2024. The same call
goes on where it was cut off: the embedding row by row, the search for copies as a whole. Excluded slides (test
patients) take no part: they are not looked at, so nothing of them decides about any other tile.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from histossl.backbones.loading import create_backbone, load_backbone, report_weights
from histossl.core import console
from histossl.core.config import CurateConfig, EmbedConfig, FinetuneConfig, read_run, refuse_other_config, write_run
from histossl.core.errors import LabelsError, MismatchError, UsageError
from histossl.core.workspace import SubsetDir, Workspace, written_aside
from histossl.curation.contact_sheet import Section, Strip, place_of, write_sheet
from histossl.curation.features import Features, embed_tiles
from histossl.curation.hierarchical_kmeans import Tree, balanced, clusters_for, tree_of
from histossl.curation.near_duplicates import ONE_CELL, Copies, bands_of, find_copies
from histossl.curation.retrieve import Retrieved, retrieve, thinned
from histossl.features.extraction import Embedder, backbone_embedder, device_of
from histossl.features.initialisations import resolve_starts
from histossl.labels.label_csv import read_rows
from histossl.labels.label_table import class_names
from histossl.labels.slide_lookup import SlideNames
from histossl.tiles.store.index import TileIndex
from histossl.tiles.store.subset import open_subset, tiles_per_slide, write_subset
from histossl.tiles.stream.sampler import Ints

PAIRS_SHOWN = 12  # of a band
CLUSTERS_SHOWN, TILES_SHOWN = 12, 8
LEVELS_TOLD = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
LARGE_GROUP = 0.05  # of all tiles: more than this in one group is no copy any more but a kind of tissue


@dataclass(frozen=True)
class Choice:
    """What is kept, by tile number, and how it came to be: for the ledger and for the eyes."""

    tiles: Ints  # rising
    facts: dict[str, Any]
    section: Section | None = None


def curate(
    workspace: Workspace,
    index: TileIndex,
    name: str,
    config: CurateConfig,
    embedder: Embedder,
    embed: EmbedConfig = EmbedConfig(),
) -> SubsetDir:
    """The subset `name`, made or finished. Raises MismatchError where it belongs to other settings or tiles."""
    config = replace(config, embedder=embedder.folder)
    place = workspace.subset(name)
    _refuse_other_subset(index, place, config)
    if place.tiles.exists():
        open_subset(index, name)
        _show(json.loads(place.ledger.read_text(encoding="utf-8")), place, "finished before")
        return place
    numbers = _pool(index, config)
    _refuse_impossible(index, numbers, config)
    write_run(place.run_json, config, tiles={"digest": index.digest, "num_tiles": len(index)})
    path = workspace.features(embedder.folder, index.digest)
    features, whole = embed_tiles(path, index, numbers, embedder, embed)
    copies = _copies(place, features, whole, config, embedder)
    kept = whole[~copies.dropped]
    try:
        choice = _choice(index, features, whole, kept, config)
    except UsageError:
        place.run_json.unlink()  # nothing came of these settings: the name is free for others
        raise
    ledger = {
        "tiles": {"of": len(index), "asked": len(numbers), "embedded": len(whole)},
        "slides": {"of": len(index.slides), "left_out": len(config.excluded_slides)},
        "backbone": embedder.folder,
        "features": str(path),
        "copies": _copies_told(index, whole, copies, config),
        **choice.facts,
        "kept": len(choice.tiles),
        "balance": {"before": _balance(index, whole), "after": _balance(index, choice.tiles)},
        "per_slide": _per_slide(index, whole, choice.tiles),
    }
    _write_sheet(place, index, name, whole, copies, choice, config)
    write_subset(place, choice.tiles, ledger)
    place.copies.unlink(missing_ok=True)
    _show(ledger, place, "made")
    return place


def _refuse_other_subset(index: TileIndex, place: SubsetDir, config: CurateConfig) -> None:
    refuse_other_config(place.run_json, config)
    if place.run_json.exists():
        before = read_run(place.run_json).get("tiles", {}).get("digest")
        if before != index.digest:
            raise MismatchError(
                f"{place.root} was begun on other tiles (set {before}, now {index.digest}); use another --name"
            )


def _pool(index: TileIndex, config: CurateConfig) -> Ints:
    excluded = set(config.excluded_slides)
    kept = [np.arange(*_ends(index.tiles_of(slide))) for slide in index.slides if slide not in excluded]
    if not kept:
        raise UsageError("no tiles to curate: every slide is left out by --labels or --exclude")
    return np.concatenate(kept).astype(np.int64)


def _refuse_impossible(index: TileIndex, numbers: Ints, config: CurateConfig) -> None:
    """Before hours of embedding."""
    if config.clusters and config.clusters[0] > len(numbers):
        raise UsageError(
            f"--clusters {config.clusters[0]}: more than the {len(numbers)} tiles; "
            f"use {clusters_for(len(numbers))[0]} or so"
        )
    if config.queries and _are_of(index, numbers, (*config.queries, *config.labelled_slides)).all():
        raise UsageError(
            "nothing to retrieve from: every slide that is not asked for has a label or is left out; tile unlabelled "
            "slides too, or, with --like-slides, name the test slides by --exclude instead of --labels"
        )


def _ends(tiles: range) -> tuple[int, int]:
    return tiles.start, tiles.stop


# ---- copies


def _copies(place: SubsetDir, features: Features, whole: Ints, config: CurateConfig, embedder: Embedder) -> Copies:
    """Found, or found before: the search is kept on disk until the subset is finished."""
    if config.duplicate_cosine >= 1:
        return Copies(np.arange(len(whole)), np.zeros(len(whole), np.float32))
    if place.copies.exists():
        try:
            with np.load(place.copies, allow_pickle=False) as stored:
                if np.array_equal(stored["whole"], whole):
                    return Copies(stored["stands_for"], stored["nearest"], stored["pairs"], stored["cosines"])
        except (ValueError, OSError, KeyError, EOFError):
            pass  # half written or of an older version: searched anew
    with console.progress("comparing", len(whole), "tiles") as bar:
        copies = find_copies(features, whole, config.duplicate_cosine, config.seed, embedder.device, bar.advance)
    with written_aside(place.copies) as aside, aside.open("wb") as file:
        np.savez(
            file,
            whole=whole,
            stands_for=copies.stands_for,
            nearest=copies.nearest,
            pairs=copies.pairs,
            cosines=copies.cosines,
        )
    return copies


def _copies_told(index: TileIndex, whole: Ints, copies: Copies, config: CurateConfig) -> dict[str, Any]:
    dropped = copies.dropped
    same_slide = index.slide_of(whole[dropped]) == index.slide_of(whole[copies.stands_for[dropped]])
    sizes = np.bincount(copies.stands_for)
    largest = int(sizes.argmax())
    told = {
        "cosine": config.duplicate_cosine,
        "within_slides": int(same_slide.sum()),
        "across_slides": int((~same_slide).sum()),
        "groups": int((sizes > 1).sum()),
        "largest_group": int(sizes[largest]),
        "largest_group_begins": place_of(index, int(whole[largest])),
        "tiles_with_a_neighbour_above": {f"{level:g}": int((copies.nearest >= level).sum()) for level in LEVELS_TOLD},
    }
    if sizes[largest] > max(10, LARGE_GROUP * len(whole)):
        console.warn(
            f"{sizes[largest]:,} of {len(whole):,} tiles hang together as one group of copies (it begins at "
            f"{told['largest_group_begins']}): that is rather a kind of tissue; see the sheet, and raise "
            f"--duplicate-cosine {config.duplicate_cosine:g}"
        )
    return told


# ---- what is kept


def _choice(index: TileIndex, features: Features, whole: Ints, kept: Ints, config: CurateConfig) -> Choice:
    if config.queries:
        return _retrieved(index, features, whole, kept, config)
    if not config.tiles:
        return Choice(kept, {})
    if config.tiles >= len(kept):
        console.warn(f"--tiles {config.tiles}: there are only {len(kept):,} without copies; all of them are kept")
        return Choice(kept, {})
    clusters = config.clusters or clusters_for(len(kept))
    with console.progress("clustering, each tile 4 times", 0, "tiles") as bar:
        bar.set_total(4 * len(kept))
        tree = tree_of(features.as_given, kept, clusters, config.seed, bar.advance)
    chosen = balanced(tree, kept, config.tiles, config.seed)
    top = np.bincount(tree.coarsest)
    after = np.bincount(tree.coarsest[chosen], minlength=len(top))
    facts = {
        "clusters": list(tree.sizes),
        "coarsest_clusters": {"before": top[top > 0].tolist(), "after": after[top > 0].tolist()},
    }
    return Choice(kept[chosen], facts, _clusters_section(tree, kept, chosen))


def _retrieved(index: TileIndex, features: Features, whole: Ints, kept: Ints, config: CurateConfig) -> Choice:
    queries = _are_of(index, whole, config.queries)
    own = kept[_are_of(index, kept, config.queries)]
    pool = kept[~_are_of(index, kept, (*config.queries, *config.labelled_slides))]
    wanted = config.tiles - len(own) if config.tiles else 0
    if config.tiles and wanted < 1:
        raise UsageError(
            f"--tiles {config.tiles}: the slides asked for hold {len(own)} tiles by themselves; give more, or leave "
            "--tiles out"
        )
    examples = thinned(whole[queries], index.slide_of(whole[queries]), config.seed)
    with console.progress("retrieving", len(pool), "tiles") as bar:
        found = retrieve(features.shown, examples, pool, wanted, bar.advance)
    if wanted > len(found.places):
        console.warn(f"--tiles {config.tiles}: the examples reach only {len(found.places):,} tiles of other slides")
    facts = {
        "retrieved": {
            "examples": len(examples),
            "own_tiles": len(own),
            "from_pool_of": len(pool),
            "tiles": len(found.places),
            "cosine_median": round(float(np.median(found.cosines)), 4),
            "cosine_least": round(float(found.cosines.min()), 4),
        }
    }
    section = _retrieved_section(index, examples, pool, found)
    return Choice(np.sort(np.concatenate([own, pool[found.places]])), facts, section)


def _are_of(index: TileIndex, numbers: Ints, slides: Sequence[str]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.isin(index.slide_of(numbers), [index.slide_number(slide) for slide in set(slides)])


# ---- what a person sees


def _balance(index: TileIndex, tiles: Ints) -> dict[str, Any]:
    """Slides that have any tile: the most and the fewest, and how many equal slides vary as much (exp of entropy)."""
    counts = tiles_per_slide(index, tiles)
    counts = counts[counts > 0]
    share = counts / counts.sum()
    return {
        "slides": len(counts),
        "most": int(counts.max()),
        "fewest": int(counts.min()),
        "effective_slides": round(float(np.exp(-(share * np.log(share)).sum())), 1),
    }


def _per_slide(index: TileIndex, before: Ints, after: Ints) -> dict[str, list[int]]:
    pairs = zip(tiles_per_slide(index, before).tolist(), tiles_per_slide(index, after).tolist(), strict=True)
    return {slide: list(pair) for slide, pair in zip(index.slides, pairs, strict=True) if pair[0]}


def _levels_told(clusters: list[int]) -> str:
    told = [f"{count:,}" for count in clusters]
    return " > ".join(told) if len(told) <= 4 else f"{told[0]} > {told[1]} > ... > {told[-1]} ({len(told)} levels)"


def _show(ledger: dict[str, Any], place: SubsetDir, how: str) -> None:
    tiles, copies, slides = ledger["tiles"], ledger["copies"], ledger["slides"]
    rows: list[tuple[str, str]] = [
        ("embedded", f"{tiles['embedded']:,} of {tiles['of']:,} tiles, with {ledger['backbone']}"),
    ]
    if slides["left_out"]:
        rows.append(("left out", f"{slides['left_out']} of {slides['of']} slides"))
    if tiles["asked"] > tiles["embedded"]:
        rows.append(("damaged", f"{tiles['asked'] - tiles['embedded']:,} tiles"))
    rows.append(("copies dropped", f"{copies['within_slides']:,} within a slide, {copies['across_slides']:,} across"))
    if copies["groups"]:
        rows.append(("groups of copies", f"{copies['groups']:,}, the largest of {copies['largest_group']:,} tiles"))
    if "clusters" in ledger:
        rows.append(("clusters", _levels_told(ledger["clusters"])))
        rows.append(("coarsest clusters", _ratio_told(ledger["coarsest_clusters"])))
    if "retrieved" in ledger:
        found = ledger["retrieved"]
        rows.append(("examples", f"{found['examples']:,} tiles asked, {found['own_tiles']:,} kept"))
        rows.append(
            ("retrieved", f"{found['tiles']:,} of {found['from_pool_of']:,}, cosine {found['cosine_median']:.2f}")
        )
    rows.append(("kept", f"{ledger['kept']:,} tiles"))
    for when in ("before", "after"):
        of = ledger["balance"][when]
        rows.append(
            (
                f"slides {when}",
                f"{of['slides']}, with {of['fewest']:,} to {of['most']:,} tiles ({of['most'] / of['fewest']:.1f}:1), "
                f"as varied as {of['effective_slides']:g} equal ones",
            )
        )
    console.table(f"subset {place.root.name} ({how})", ("what", "how many"), rows)
    console.say(f"look at {place.sheet}")
    said = ["histossl", "pretrain", "--subset", place.root.name, "-w", str(place.root.parents[1])]
    console.say(f"next: {shlex.join(said)}")


def _ratio_told(sizes: dict[str, list[int]]) -> str:
    def ratio(counts: list[int]) -> str:
        return f"{max(counts) / max(1, min(counts)):.1f}:1"

    return f"largest to smallest {ratio(sizes['before'])} before, {ratio(sizes['after'])} after"


def _write_sheet(
    place: SubsetDir, index: TileIndex, name: str, whole: Ints, copies: Copies, choice: Choice, config: CurateConfig
) -> None:
    sections = _pair_sections(index, whole, copies, config.duplicate_cosine) if config.duplicate_cosine < 1 else []
    if choice.section is not None:
        sections.append(choice.section)
    above = ", ".join(f"{int((copies.nearest >= level).sum()):,} at {level:g}" for level in LEVELS_TOLD)
    found = "at least " if len(whole) > ONE_CELL else ""  # not all pairs were compared
    about = (
        f"{len(whole):,} tiles, {int(copies.dropped.sum()):,} dropped as copies at a cosine of "
        f"{config.duplicate_cosine:g}, {len(choice.tiles):,} kept.\n"
        f"Tiles with a neighbour at least so much alike: {found}{above}."
    )
    write_sheet(place.sheet, index, f"Subset {name}", about, sections)


def _pair_sections(index: TileIndex, whole: Ints, copies: Copies, cosine: float) -> list[Section]:
    """From the most alike to the least: the threshold lies in the middle of the page."""
    edges = bands_of(cosine)
    sections = []
    for band in range(len(edges) - 2, -1, -1):
        low, high = float(edges[band]), min(1.0, float(edges[band + 1]))
        inside = np.flatnonzero((copies.cosines >= low) & (copies.cosines < edges[band + 1]))
        shown = _apart(copies.pairs[inside], copies.cosines[inside], nearest_first=low >= cosine - 1e-6)
        strips = [
            Strip(
                (int(whole[one]), int(whole[other])),
                f"{value:.3f}: {place_of(index, int(whole[one]))} | {place_of(index, int(whole[other]))}",
            )
            for (one, other), value in shown
        ]
        dropped = low >= cosine - 1e-6
        sections.append(
            Section(
                f"Cosine {low:.2f} to {high:.2f}: {'copies, one of each is dropped' if dropped else 'both are kept'}",
                "" if strips else "No such pair was seen.",
                strips,
                "dropped" if dropped else "kept",
            )
        )
    return sections


def _apart(pairs: Ints, cosines: np.ndarray[Any, Any], nearest_first: bool) -> list[tuple[tuple[int, int], float]]:
    """A few pairs, none of whose tiles comes twice; those nearest to the threshold first."""
    order = np.argsort(cosines if nearest_first else -cosines, kind="stable")
    seen: set[int] = set()
    found: list[tuple[tuple[int, int], float]] = []
    for number in order:
        one, other = (int(place) for place in pairs[number])
        if not seen & {one, other}:
            found.append(((one, other), float(cosines[number])))
            seen |= {one, other}
        if len(found) == PAIRS_SHOWN:
            break
    return found


def _clusters_section(tree: Tree, kept: Ints, chosen: Ints) -> Section:
    top = tree.coarsest
    strips = []
    before, after = np.bincount(top), np.bincount(top[chosen], minlength=int(top.max()) + 1)
    for cluster in np.argsort(-before, kind="stable")[:CLUSTERS_SHOWN]:
        here = chosen[top[chosen] == cluster]
        shown = (
            kept[here[np.unique(np.linspace(0, len(here) - 1, TILES_SHOWN).astype(np.int64))]] if len(here) else here
        )
        strips.append(Strip(tuple(map(int, shown)), f"{before[cluster]:,} tiles, {after[cluster]:,} kept"))
    return Section("The coarsest clusters, the largest first", "Some of the tiles kept from each.", strips)


def _retrieved_section(index: TileIndex, examples: Ints, pool: Ints, found: Retrieved) -> Section:
    strips = []
    asked = np.unique(found.asked)
    for example in asked[np.unique(np.linspace(0, len(asked) - 1, CLUSTERS_SHOWN).astype(np.int64))]:
        brought = np.flatnonzero(found.asked == example)[: TILES_SHOWN - 1]
        cosines = ", ".join(f"{value:.2f}" for value in found.cosines[brought])
        tiles = (int(examples[example]), *map(int, pool[found.places[brought]]))
        strips.append(Strip(tiles, f"{place_of(index, tiles[0])} brought these: {cosines}"))
    return Section("Examples, each with what it brought", "The example is on the left.", strips)


# ---- what the options mean


def embedder_for(
    workspace: Workspace, backbone: str, weights: str, adapted: str, input_px: int, seed: int, device: str
) -> Embedder:
    """What tiles are embedded with: `weights` of a timm `backbone`, else the workspace's adapted backbone."""
    if weights and not backbone:
        raise UsageError(f"--weights {weights}: of which architecture? Pass --backbone NAME (a timm name) too")
    if weights:
        name = Path(weights).stem.lstrip(".") or "weights"
        model, info = create_backbone(backbone, weights, seed)
        report_weights(info)
    else:
        try:
            settings = FinetuneConfig(labels="", starts=("adapted",), adapted=adapted, backbone=backbone)
            start = resolve_starts(workspace, settings).chosen[0]
        except UsageError as error:
            raise UsageError(
                f"nothing to embed with: {str(error).removeprefix('--starts adapted: ')}. Or embed with any weights: "
                "--backbone NAME --weights FILE (or imagenet)"
            ) from error
        assert start.exported is not None
        name = start.exported.parent.name
        model, info = load_backbone(start.exported)
    return backbone_embedder(name, model, info, input_px or info.input_px, device_of(device))


def example_slides(
    index: TileIndex, slides: Sequence[str], classes: Sequence[str], labels: Path | None, excluded: set[str]
) -> tuple[set[str], set[str]]:
    """(slides whose tiles are the examples, slides with a label: not of the pool). Test patients are neither.

    `excluded` holds the test patients. A line of labels.csv whose label is empty is an unlabelled slide.
    """
    names = SlideNames.of(index)
    examples: set[str] = set()
    for name in slides:
        found = names.find(name)
        if not found:
            raise UsageError(f"--like-slides {name}: is none of the tiled slides ({names.hint(name)})")
        if set(found) <= excluded:
            raise UsageError(f"--like-slides {name}: is left out (a test patient, or --exclude), so it is no example")
        examples |= set(found) - excluded
    if classes and labels is None:
        raise UsageError(f"--like-classes {','.join(classes)}: needs --labels FILE.csv, which says what is of them")
    if labels is None or not (slides or classes):
        return examples, set()
    rows = [row for row in read_rows(labels) if row.label]
    known = sorted({row.label for row in rows})
    labelled = {slide for row in rows for slide in names.find(row.slide)} - excluded
    for label in sorted(class_names("--like-classes", classes, known, str(labels))):
        of_class = [row for row in rows if row.label == label and row.split != "test"]
        if any(row.box is not None for row in of_class):
            raise LabelsError(f"{labels}: labels regions; --like-classes takes labels of whole slides")
        found_slides = {slide for row in of_class for slide in names.labelled_by(row.slide)} - excluded
        if not found_slides:
            raise UsageError(f"--like-classes {label}: {labels} has no tiled training slide of it")
        examples |= found_slides
    return examples, labelled
