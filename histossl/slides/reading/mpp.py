"""Microns per pixel: where a slide says it, whether that can be true, and how a lab supplies what is missing.

Nothing here guesses. Magnification ("40x") is a hint in an error's text, never a scale.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histossl.core import console
from histossl.core.errors import UsageError
from histossl.core.text_files import read_table, refuse_separator
from histossl.slides.lookup import NameFinder

PLAUSIBLE_MPP = (0.05, 5.0)  # 200x oil to 2x: nothing outside is a microscope's
MAX_ANISOTROPY = 0.02
UM_PER_UNIT = {
    "m": 1e6,
    "cm": 1e4,
    "mm": 1e3,
    "µm": 1.0,  # micro sign
    "μm": 1.0,  # Greek mu
    "um": 1.0,
    "micron": 1.0,
    "nm": 1e-3,
    "pm": 1e-6,
    "Å": 1e-4,
    "inch": 25400.0,
    "in": 25400.0,
}
CONTRADICTION = 0.02
REMEDY = (
    "list the slide in a CSV (slide,mpp) for histossl tile --mpp-csv, or where no slide of the folder says it, pass "
    "--slide-mpp, which goes before what any says (0.25 is a 40x scan, 0.5 a 20x scan)"
)


@dataclass(frozen=True)
class Scale:
    """What a file says about its scale, before anybody believes it. `hint` may name the objective."""

    x_mpp: float
    y_mpp: float
    source: str
    hint: str = ""

    @property
    def mpp(self) -> float:
        return (self.x_mpp + self.y_mpp) / 2

    def problem(self) -> str:
        """Why it cannot be used, with the way out; empty if it can."""
        low, high = PLAUSIBLE_MPP
        if not (low <= self.x_mpp <= high and low <= self.y_mpp <= high):
            return (
                f"its {self.source} says {self.mpp:.4g} microns per pixel, which is implausible "
                f"(outside {low:g}-{high:g}); {REMEDY}{self.hint}"
            )
        return ""

    def warning(self) -> str:
        if abs(self.x_mpp - self.y_mpp) > MAX_ANISOTROPY * min(self.x_mpp, self.y_mpp):
            return (
                f"microns per pixel differ between x ({self.x_mpp:.4g}) and y ({self.y_mpp:.4g}) by more than "
                f"{MAX_ANISOTROPY:.0%}; their mean is used, unless --slide-mpp or --mpp-csv says better"
            )
        return ""

    def contradiction(self, mpp: float, source: str) -> str:
        """What a person should know who says `mpp` of a slide that says something else."""
        low, high = sorted((self.x_mpp, self.y_mpp))
        if self.problem() or low * (1 - CONTRADICTION) <= mpp <= high * (1 + CONTRADICTION):
            return ""
        return f"its {self.source} says {self.mpp:.4g} microns per pixel, {source} says {mpp:.4g}, which is used"


def missing(hint: str) -> str:
    return f"no microns-per-pixel in its metadata; {REMEDY}{hint}"


def scale_from(x_text: Any, y_text: Any, source: str, hint: str = "") -> Scale | None:
    """A scale from two texts or numbers; one may be missing. None if there is no number."""
    x_mpp, y_mpp = _number(x_text), _number(y_text)
    if x_mpp is None and y_mpp is None:
        return None
    x_mpp = y_mpp if x_mpp is None else x_mpp
    y_mpp = x_mpp if y_mpp is None else y_mpp
    assert x_mpp is not None
    assert y_mpp is not None
    return Scale(x_mpp, y_mpp, source, hint)


def scale_from_resolution(x: Any, y: Any, unit: int) -> Scale | None:
    """From TIFF's XResolution, YResolution and ResolutionUnit. 1 pixel per unit is the tag's way of saying nothing."""
    um = {2: 25400.0, 3: 10000.0}.get(int(unit))
    x, y = _ratio(x), _ratio(y)
    if um is None or x is None or y is None or x <= 1 or y <= 1:
        return None
    return Scale(um / x, um / y, "TIFF resolution tag")


def scale_from_imagej(x: Any, y: Any, unit: str) -> Scale | None:
    """From XResolution and YResolution where ImageJ's header names the unit: pixels per micron, mostly."""
    um = UM_PER_UNIT.get(unit.replace("\\u00B5", "µ"))
    x, y = _ratio(x), _ratio(y)
    return Scale(um / x, um / y, "ImageJ header") if um and x and y else None


def scale_from_ome(xml: str, width: int, height: int, page: int = 0) -> Scale | None:
    """PhysicalSizeX/Y, in an OME-XML header, of the image of this size in pixels that page number `page` holds."""
    for one in ome_pixels(xml, width, height, page):
        size_px = (_number(one.get("SizeX")), _number(one.get("SizeY")))
        x_um, y_um = (
            um * (whole or px) / px if um is not None else None
            for um, whole, px in zip((_length(one, "X"), _length(one, "Y")), size_px, (width, height), strict=True)
        )
        if x_um or y_um:
            return scale_from(x_um, y_um, "OME-XML")
    return None


def ome_pixels(xml: str, width: int, height: int, page: int) -> list[ElementTree.Element]:
    """The Pixels of the image of this size in pixels that page number `page` holds, or that may be meant by them."""
    try:
        root = ElementTree.fromstring(xml)
    except (ElementTree.ParseError, ValueError):
        return []
    every = [element for element in root.iter() if _tag(element) == "Pixels"]
    same_size = [one for one in every if one.get("SizeX") == str(width) and one.get("SizeY") == str(height)]
    held = [one for one in every if page in _pages_of(one)]
    # Two images may have one size: then the page tells. Where none has it, a level larger than its image is meant.
    return [one for one in same_size if one in held] or same_size or held or every[: len(every) == 1]


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _pages_of(pixels: ElementTree.Element) -> set[int]:
    """Numbers of the pages that hold an OME image."""
    found: set[int] = set()
    for data in pixels:
        if _tag(data) == "TiffData":
            with suppress(ValueError):
                first, count = int(data.get("IFD") or 0), int(data.get("PlaneCount") or 1)
                found.update(range(first, first + (count or 1)))
    return found


# ---- --mpp-csv


@dataclass(frozen=True)
class MppTable:
    """`slide,mpp` from a CSV. A slide may be named by its id, its path, its file name, with or without suffix."""

    path: Path
    mpp: Mapping[str, float]

    def among(self, slides: Sequence[tuple[str, str]]) -> dict[str, float]:
        """By file, of all (file, slide) of the archive. A name without its folder counts if one slide alone has it."""
        meant = self._meant(slides)
        owned = {files[0] for files in meant.values() if len(files) == 1}
        named: dict[str, str] = {}
        for name, files in meant.items():
            left = files if len(files) == 1 else [file for file in files if file not in owned]
            if len(left) > 1:
                more = f" and {len(left) - 5} more" if len(left) > 5 else ""
                raise UsageError(
                    f"--mpp-csv {self.path}: {name!r} could be {' or '.join(left[:5])}{more}; name each by its path"
                )
            for file in left:
                before = named.setdefault(file, name)
                if self.mpp[before] != self.mpp[name]:
                    raise UsageError(
                        f"--mpp-csv {self.path}: {before!r} and {name!r} are one slide ({file}), "
                        f"with {self.mpp[before]:g} and {self.mpp[name]:g}; correct one of them"
                    )
        return {file: self.mpp[name] for file, name in named.items()}

    def unused(self, slides: Sequence[tuple[str, str]]) -> list[str]:
        """Names of the CSV that no (file, slide) of the archive answers to."""
        return [name for name, files in self._meant(slides).items() if not files]

    def _meant(self, slides: Sequence[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
        """The files that each name of the CSV may be."""
        finder = NameFinder({name: file for file, slide in slides for name in (slide, file)})
        return {name: finder.find(name) for name in self.mpp}


def read_mpp_csv(path: Path) -> MppTable:
    where = f"--mpp-csv {path}"
    table = read_table(path, where, _has_columns)
    if not _has_columns({*table.header}):
        refuse_separator(where, table.header)
        raise UsageError(f"{where}: needs the columns slide,mpp; it has {','.join(table.header) or 'none'}")
    if table.note:
        console.say(f"{where}: {table.note}")
    mpp: dict[str, float] = {}
    for line, cells in table.rows:
        row = dict(zip(table.header, cells, strict=True))
        slide = row.get("slide") or row.get("wsi") or row.get("file") or ""
        value = _number(row["mpp"])
        if not slide or value is None or not PLAUSIBLE_MPP[0] <= value <= PLAUSIBLE_MPP[1]:
            raise UsageError(
                f"{where}, line {line}: slide {slide!r}, mpp {row['mpp']!r}: must be a slide and a number of microns "
                f"per pixel between {PLAUSIBLE_MPP[0]:g} and {PLAUSIBLE_MPP[1]:g}"
            )
        if mpp.setdefault(slide, value) != value:
            raise UsageError(
                f"{where}, line {line}: slide {slide!r} is listed twice, with {mpp[slide]:g} and {value:g}"
            )
    return MppTable(path, mpp)


def _has_columns(names: set[str]) -> bool:
    return "mpp" in names and bool({"slide", "wsi", "file"} & names)


def _number(text: Any) -> float | None:
    try:
        number = float(str(text).strip().replace(",", "."))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _ratio(value: Any) -> float | None:
    if isinstance(value, tuple) and len(value) == 2:
        return value[0] / value[1] if value[1] else None
    return _number(value)


def _length(pixels: ElementTree.Element, axis: str) -> float | None:
    size = _number(pixels.get(f"PhysicalSize{axis}"))
    um = UM_PER_UNIT.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
    return size * um if size is not None and um is not None else None
