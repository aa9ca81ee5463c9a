"""Regions drawn by hand: a GeoJSON as QuPath exports it restricts tiling to its polygons, and names each tile's class.

Which file is a slide's is found by `annotations`. Coordinates are level-0 pixels, counted as QuPath does:
of a slide that tells its bounds (MIRAX, Leica), from their corner. Polygons, also with holes and in several parts;
points and lines enclose nothing. A class whose name ends in * is QuPath's way of saying "ignore": it is cut out of the
others.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import SlideError
from histossl.core.text_files import decoded

Ring = NDArray[np.float64]  # (n, 2): x, y in level-0 pixels
Polygon = tuple[Ring, ...]  # a point is inside if an odd number of them surround it
NAMELESS = ""
MAX_BYTES = 512 << 20
UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")  # as QuPath names each annotation
MIN_INSIDE = 0.5  # share of a tile that must lie in drawn regions, where there are any
# What QuPath finds by itself; regions are annotations. Version 0.2 says it in the id: PathDetectionObject.
NOT_DRAWN = ("detection", "cell", "tile", "tmacore", "root")


@dataclass(frozen=True)
class Region:
    """One annotation: the area of one or several polygons, each of an outer ring and its holes."""

    name: str  # its class, derived ones as QuPath shows them ("Tumor: Positive"); empty if it has none
    polygons: tuple[Polygon, ...]

    @property
    def ignored(self) -> bool:
        return any(part.endswith("*") for part in self.name.split(": "))

    def mask(self, shape: tuple[int, int], downsample: float) -> NDArray[np.bool_]:
        """Inside any of its polygons; (rows, columns) pixels of `downsample` level-0 pixels each."""
        inside: NDArray[np.bool_] = np.zeros(shape, dtype=bool)
        for rings in self.polygons:
            inside |= rasterised(rings, shape, downsample)
        return inside

    def shifted(self, offset_l0: tuple[int, int]) -> Region:
        return replace(self, polygons=tuple(tuple(ring + offset_l0 for ring in one) for one in self.polygons))


@dataclass(frozen=True)
class Regions:
    """The regions of one slide."""

    path: Path
    regions: tuple[Region, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one.name for one in self.regions if not one.ignored))

    def mask(self, shape: tuple[int, int], downsample: float) -> NDArray[np.bool_]:
        """Inside any region and no ignored one; (rows, columns) pixels of `downsample` level-0 pixels each."""
        masks = self.masks(shape, downsample)
        inside: NDArray[np.bool_] = np.zeros(shape, dtype=bool)
        for mask in masks.values():
            inside |= mask
        return inside

    def masks(self, shape: tuple[int, int], downsample: float) -> dict[str, NDArray[np.bool_]]:
        """The same, class by class. Where classes overlap, the one drawn last wins, as QuPath shows it."""
        label = np.zeros(shape, dtype=np.int32)
        names = self.classes
        for one in self.regions:
            if not one.ignored:
                label[one.mask(shape, downsample)] = names.index(one.name) + 1
        for one in self.regions:
            if one.ignored:
                label[one.mask(shape, downsample)] = 0
        return {name: label == number for number, name in enumerate(names, start=1)}


def read_regions(path: Path, size_l0: tuple[int, int], bounds_l0: tuple[int, int] = (0, 0)) -> Regions:
    """The regions of a slide of size_l0 (width, height), whose coordinates are counted from `bounds_l0`.

    SlideError if there is nothing to restrict tiling to.
    """
    features = _features(path)
    regions = tuple(one.shifted(bounds_l0) for one in _annotations(path, features))
    drawn = [one for one in regions if not one.ignored]
    detected = Counter(kind for one in features if (kind := _kind(one)) in NOT_DRAWN)
    if not regions and detected:
        kinds = ", ".join(f"{count:,} of kind {kind!r}" for kind, count in detected.most_common())
        raise SlideError(
            f"{path.name}: holds only what QuPath finds by itself ({kinds}), no drawn area; draw areas as annotations "
            "in QuPath and export those"
        )
    if not drawn:
        raise SlideError(f"{path.name}: holds no polygon; draw areas as annotations in QuPath and export them again")
    every = np.concatenate([ring for one in drawn for rings in one.polygons for ring in rings])
    (left, top), (right, bottom) = every.min(axis=0), every.max(axis=0)
    if right <= 0 or bottom <= 0 or left >= size_l0[0] or top >= size_l0[1]:
        raise SlideError(
            f"{path.name}: its regions (x {left:.0f} to {right:.0f}, y {top:.0f} to {bottom:.0f}) lie outside the "
            f"slide of {size_l0[0]} x {size_l0[1]} px; drawn on another slide, or exported at another resolution?"
        )
    return Regions(path, regions)


def _content(path: Path) -> bytes:
    """The bytes of a file, which may be compressed; SlideError above `MAX_BYTES`, before and after."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        if size <= MAX_BYTES:
            with gzip.open(path) if packed else path.open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
            size = len(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SlideError(f"{path.name}: damaged ({error}); export it from QuPath again") from error
    except OSError as error:
        raise SlideError(f"{path.name}: cannot be read ({error.strerror})") from error
    if size > MAX_BYTES:
        more = " or more, when it is unpacked" * packed
        raise SlideError(f"{path.name}: {size / 1e6:,.0f} MB{more}; export the annotations only, not the cells")
    return raw


def _features(path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(decoded(_content(path), path.name, SlideError))
    except (ValueError, RecursionError) as error:
        raise SlideError(f"{path.name}: not a GeoJSON ({error}); export it from QuPath again") from error
    if isinstance(content, dict) and isinstance(content.get("features"), list):
        content = content["features"]
    elif isinstance(content, dict) and "type" in content:
        content = [content]
    if not isinstance(content, list) or not all(isinstance(one, dict) for one in content):
        raise SlideError(f"{path.name}: JSON, but not a GeoJSON (no features); export it from QuPath again")
    return [one for top in content for one in _with_children(top)]


def _with_children(feature: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """An export of QuPath's hierarchy nests the objects that lie in others; a collection may hold collections."""
    yield feature
    nested = feature.get("childObjects"), _properties(feature).get("childObjects"), feature.get("features")
    for children in nested:
        for child in children if isinstance(children, list) else ():
            if isinstance(child, dict):
                yield from _with_children(child)


def _kind(feature: dict[str, Any]) -> str:
    kind, before = _properties(feature).get("objectType"), str(feature.get("id"))
    if kind is None and before.endswith("Object"):
        kind = before.removeprefix("Path").removesuffix("Object")
    return str(kind).lower()


def _properties(feature: dict[str, Any]) -> dict[str, Any]:
    properties = feature.get("properties")
    return properties if isinstance(properties, dict) else {}


def _annotations(path: Path, features: Sequence[dict[str, Any]]) -> list[Region]:
    """One region for each annotation, of however many parts; those exported apart share a class and a UUID."""
    found: dict[object, Region] = {}
    for number, feature in enumerate(features):
        if _kind(feature) in NOT_DRAWN:
            continue
        polygons = tuple(_polygons(path, feature.get("geometry") if "geometry" in feature else feature))
        if polygons:
            name, own = _class_of(feature), str(feature.get("id"))
            key = (own.lower(), name) if UUID.fullmatch(own) else number
            before = found[key].polygons if key in found else ()
            found[key] = Region(name, (*before, *polygons))
    return list(found.values())


def _class_of(feature: dict[str, Any]) -> str:
    classification = _properties(feature).get("classification")
    name = classification
    if isinstance(classification, dict):
        name = classification.get("name")
        names = classification.get("names")  # since 0.4, of a derived class
        if name is None and isinstance(names, list):
            name = ": ".join(str(one) for one in names)
    if not isinstance(name, str):
        return NAMELESS
    return unicodedata.normalize("NFC", name.strip().encode("utf-8", "backslashreplace").decode("utf-8"))


def _polygons(path: Path, geometry: Any) -> list[Polygon]:
    if not isinstance(geometry, dict):
        return []
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    if kind == "Polygon":
        return [_rings(path, coordinates)]
    if kind == "MultiPolygon" and isinstance(coordinates, list):
        return [_rings(path, one) for one in coordinates]
    if kind == "GeometryCollection" and isinstance(geometry.get("geometries"), list):
        return [polygon for one in geometry["geometries"] for polygon in _polygons(path, one)]
    return []


def _rings(path: Path, coordinates: Any) -> Polygon:
    rings: list[Ring] = []
    if not isinstance(coordinates, list) or not coordinates:
        raise SlideError(f"{path.name}: a polygon without corners")
    for ring in coordinates:
        try:
            points = np.array([(point[0], point[1]) for point in ring], dtype=np.float64)
        except (TypeError, ValueError, IndexError, KeyError) as error:
            raise SlideError(f"{path.name}: a polygon whose corners are not pairs of numbers") from error
        if len(points) < 3 or not np.isfinite(points).all():
            raise SlideError(f"{path.name}: a polygon with {len(points)} corners, or with corners that are not finite")
        rings.append(points)
    return tuple(rings)


def rasterised(rings: tuple[Ring, ...], shape: tuple[int, int], downsample: float) -> NDArray[np.bool_]:
    """Pixels whose centre an odd number of rings surround (even-odd rule: holes need no extra care)."""
    rows, columns = shape
    crossings = np.zeros((rows, columns + 1), dtype=np.int32)
    for ring in rings:
        start = ring / downsample - 0.5  # pixel centres become whole numbers
        for (x0, y0), (x1, y1) in zip(start, np.roll(start, -1, axis=0), strict=True):
            if y0 == y1:
                continue
            if y0 > y1:
                x0, y0, x1, y1 = x1, y1, x0, y0
            first, last = max(0, math.ceil(y0)), min(rows - 1, math.ceil(y1) - 1)
            if first > last:
                continue
            at = np.arange(first, last + 1)
            x = np.ceil(x0 + (at - y0) * ((x1 - x0) / (y1 - y0)))
            np.add.at(crossings, (at, np.clip(x, 0, columns).astype(np.int64)), 1)
    inside: NDArray[np.bool_] = crossings.cumsum(axis=1)[:, :columns] % 2 == 1
    return inside
