"""Regions drawn by hand: a GeoJSON as QuPath exports it restricts tiling to its polygons, and names each tile's class.

`A1.geojson` beside A1.svs, or in a folder given with --regions. Coordinates are level-0 pixels, counted as QuPath does:
of a slide that tells its bounds (MIRAX, Leica), from their corner. Polygons, also with holes and in several parts;
points and lines enclose nothing. A class whose name ends in * is QuPath's way of saying "ignore": it is cut out of the
others.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histossl.core import console
from histossl.core.errors import SlideError, UsageError
from histossl.slides.archive import SlideFile

Ring = NDArray[np.float64]  # (n, 2): x, y in level-0 pixels
NAMELESS = ""
MAX_BYTES = 512 << 20
MIN_INSIDE = 0.5  # share of a tile that must lie in drawn regions, where there are any
# What QuPath finds by itself; regions are annotations. Version 0.2 says it in the id: PathDetectionObject.
NOT_DRAWN = ("detection", "cell", "tile", "tmacore", "root")


@dataclass(frozen=True)
class Region:
    """One area: all its rings, outer and inner; a point is inside if an odd number of rings surround it."""

    name: str  # its class, derived ones as QuPath shows them ("Tumor: Positive"); empty if it has none
    rings: tuple[Ring, ...]

    @property
    def ignored(self) -> bool:
        return any(part.endswith("*") for part in self.name.split(": "))


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
                label[rasterised(one.rings, shape, downsample)] = names.index(one.name) + 1
        for one in self.regions:
            if one.ignored:
                label[rasterised(one.rings, shape, downsample)] = 0
        return {name: label == number for number, name in enumerate(names, start=1)}


def match_regions(slides: Iterable[SlideFile], directory: Path | None = None) -> dict[Path, Path | None]:
    """The GeoJSON of each slide of an archive, by the slide's path; from `directory`, or beside the slides.

    Files of `directory` that no slide answers to, and slides without one, are told; if no slide has one at all, that
    is an error.
    """
    slides = [one for one in slides if not one.problem]
    if directory is None:
        return _regions_beside(slides)
    matched = regions_in(directory.absolute(), slides)
    _tell_unmatched(directory.absolute(), slides, matched)
    return matched


def _regions_beside(slides: Sequence[SlideFile]) -> dict[Path, Path | None]:
    matched = {one.path: find_regions(one.path.absolute(), one.slide) for one in slides}
    claimants: dict[Path, list[str]] = defaultdict(list)
    for path, file in matched.items():
        if file is not None:
            claimants[file].append(path.name)
    for file, names in claimants.items():
        if len(names) > 1:
            raise UsageError(
                f"{file}: could be of {_some(names, ' or ')} beside it; name it by the whole file name, "
                f"like {names[0]}.geojson"
            )
    return matched


def regions_in(directory: Path, slides: Sequence[SlideFile]) -> dict[Path, Path | None]:
    """The GeoJSON of each slide in a folder.

    A name without its folder (A1.geojson) is taken only if one slide alone answers to it: the regions of one slide on
    another of the same name would be wrong labels without a word.
    """
    matched = {one.path: _first_file(directory, _own_names(one.path, one.slide)) for one in slides}
    owned = set(matched.values())
    claims: dict[Path, list[SlideFile]] = defaultdict(list)
    for one in slides:
        file = _first_file(directory, _bare_names(one.path, one.slide)) if matched[one.path] is None else None
        if file is not None and file not in owned:
            claims[file].append(one)
    for file, claimants in claims.items():
        if len(claimants) > 1:
            names = [one.slide for one in claimants]
            raise UsageError(
                f"--regions {directory}: {file.name} could be of {_some(names, ' or ')}; name it by the slide's path, "
                f"like {directory / names[0]}.geojson"
            )
        matched[claimants[0].path] = file
    return matched


def _tell_unmatched(directory: Path, slides: Sequence[SlideFile], matched: Mapping[Path, Path | None]) -> None:
    files = sorted(directory.rglob("*.geojson"))
    used = set(matched.values())
    unused = [file.relative_to(directory).as_posix() for file in files if file not in used]
    whole = [one.slide for one in slides if matched[one.path] is None]
    if slides and len(whole) == len(slides):
        told = f"its {_some(unused)}" if unused else "it holds no .geojson"
        raise UsageError(
            f"--regions {directory}: none of it is named after a slide here ({told}; the slides: {_some(whole)}); "
            "case1/A1.svs goes with case1/A1.geojson or A1.geojson"
        )
    if unused:
        console.warn(f"--regions {directory}: no slide here answers to {_some(unused)}")
    if whole:
        console.warn(
            f"--regions {directory}: no file there for {console.count(len(whole), 'slide')}, "
            f"taken whole: {_some(whole)}"
        )


def _some(names: Sequence[str], between: str = ", ") -> str:
    return between.join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _own_names(path: Path, slide: str) -> tuple[str, ...]:
    return slide, f"{slide}{path.suffix}"


def _bare_names(path: Path, slide: str) -> tuple[str, ...]:
    return PurePosixPath(slide).name, path.stem, path.name


def _first_file(directory: Path, names: Iterable[str]) -> Path | None:
    candidates = [directory / f"{name}.geojson" for name in names]
    return next((one for one in candidates if one.is_file()), None)


def find_regions(path: Path, slide: str, directory: Path | None = None) -> Path | None:
    """The GeoJSON of one slide, if there is one: in `directory` (by the slide's id or name), or beside the slide.

    Of an archive, `regions_in` finds them all, and sees where one name could be of several slides.
    """
    if directory is not None:
        return _first_file(directory, (*_own_names(path, slide), *_bare_names(path, slide)))
    candidates = [path.with_name(f"{path.name}.geojson"), path.with_suffix(".geojson")]
    return next((one for one in candidates if one.is_file()), None)


def read_regions(path: Path, size_l0: tuple[int, int], bounds_l0: tuple[int, int] = (0, 0)) -> Regions:
    """The regions of a slide of size_l0 (width, height), whose coordinates are counted from `bounds_l0`.

    SlideError if there is nothing to restrict tiling to.
    """
    features = _features(path)
    found = [region for one in features if _kind(one) not in NOT_DRAWN for region in _regions(path, one)]
    regions = tuple(replace(one, rings=tuple(ring + bounds_l0 for ring in one.rings)) for one in found)
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
    every = np.concatenate([ring for one in drawn for ring in one.rings])
    (left, top), (right, bottom) = every.min(axis=0), every.max(axis=0)
    if right <= 0 or bottom <= 0 or left >= size_l0[0] or top >= size_l0[1]:
        raise SlideError(
            f"{path.name}: its regions (x {left:.0f} to {right:.0f}, y {top:.0f} to {bottom:.0f}) lie outside the "
            f"slide of {size_l0[0]} x {size_l0[1]} px; drawn on another slide, or exported at another resolution?"
        )
    return Regions(path, regions)


def _features(path: Path) -> list[dict[str, Any]]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SlideError(
                f"{path.name}: {path.stat().st_size / 1e6:,.0f} MB; export the annotations only, not the cells"
            )
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SlideError(f"{path.name}: cannot be read ({error.strerror})") from error
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
    """An export of QuPath's hierarchy nests the objects that lie in others."""
    yield feature
    for children in (feature.get("childObjects"), _properties(feature).get("childObjects")):
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


def _regions(path: Path, feature: dict[str, Any]) -> list[Region]:
    properties = _properties(feature)
    classification = properties.get("classification")
    name = classification
    if isinstance(classification, dict):
        name = classification.get("name")
        names = classification.get("names")  # since 0.4, of a derived class
        if name is None and isinstance(names, list):
            name = ": ".join(str(one) for one in names)
    name = name.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(name, str) else NAMELESS
    geometry = feature.get("geometry") if "geometry" in feature else feature
    return [Region(name, rings) for rings in _polygons(path, geometry)]


def _polygons(path: Path, geometry: Any) -> list[tuple[Ring, ...]]:
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


def _rings(path: Path, coordinates: Any) -> tuple[Ring, ...]:
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
