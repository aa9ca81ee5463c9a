"""Microns per pixel: where a slide says it, whether that can be true, and how a lab supplies what is missing.

Nothing here guesses. Magnification ("40x") is a hint in an error's text, never a scale.
"""

from __future__ import annotations

import csv
import math
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from histossl.core import console
from histossl.core.config import SEPARATORS, refuse_separator, separator_of
from histossl.core.errors import UsageError
from histossl.core.text import from_cell

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


def scale_from_ome(xml: str, width: int, height: int) -> Scale | None:
    """PhysicalSizeX/Y of the image of this size in an OME-XML header."""
    try:
        root = ElementTree.fromstring(xml)
    except (ElementTree.ParseError, ValueError):
        return None
    pixels = [element for element in root.iter() if element.tag.rpartition("}")[2] == "Pixels"]
    same_size = [one for one in pixels if one.get("SizeX") == str(width) and one.get("SizeY") == str(height)]
    for one in same_size or pixels[:1]:
        x_um, y_um = _length(one, "X"), _length(one, "Y")
        if x_um or y_um:
            return scale_from(x_um, y_um, "OME-XML")
    return None


# ---- --mpp-csv


@dataclass(frozen=True)
class MppTable:
    """`slide,mpp` from a CSV. A slide may be named by its id, its path, its file name, with or without suffix."""

    path: Path
    mpp: Mapping[str, float]

    def among(self, slides: Sequence[tuple[str, str]]) -> dict[str, float]:
        """By file, of all (file, slide) of the archive. A name without its folder counts if one slide alone has it."""
        owner = {name: file for file, slide in slides for name in (slide, file) if name in self.mpp}
        found = {file: self.mpp[name] for name, file in owner.items()}
        claims: dict[str, list[str]] = defaultdict(list)
        for file, slide in slides:
            bare = next((name for name in _names(file, slide) if name in self.mpp), None)
            if file not in found and bare is not None and bare not in owner:
                claims[bare].append(file)
        for name, files in claims.items():
            if len(files) > 1:
                more = f" and {len(files) - 5} more" if len(files) > 5 else ""
                raise UsageError(
                    f"--mpp-csv {self.path}: {name!r} could be {' or '.join(files[:5])}{more}; name each by its path"
                )
            found[files[0]] = self.mpp[name]
        return found

    def unused(self, slides: list[tuple[str, str]]) -> list[str]:
        """Names of the CSV that no (file, slide) of the archive answers to."""
        known = {name for file, slide in slides for name in _names(file, slide)}
        return [name for name in self.mpp if name not in known]


def read_mpp_csv(path: Path) -> MppTable:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            separator = separator_of(file.readline(), _has_columns)
            file.seek(0)
            if separator != ",":
                console.say(f"--mpp-csv {path}: the columns are separated by {SEPARATORS[separator]}s, and read so")
            table = csv.DictReader(file, delimiter=separator)
            names = [name.strip().lower() for name in table.fieldnames or []]
            if not _has_columns({*names}):
                refuse_separator(f"--mpp-csv {path}", names)
                raise UsageError(f"--mpp-csv {path}: needs the columns slide,mpp; it has {','.join(names) or 'none'}")
            mpp: dict[str, float] = {}
            for values in table:
                row = {key.strip().lower(): from_cell((value or "").strip()) for key, value in values.items() if key}
                slide = row.get("slide") or row.get("wsi") or row.get("file") or ""
                value = _number(row.get("mpp"))
                if not slide or value is None or not PLAUSIBLE_MPP[0] <= value <= PLAUSIBLE_MPP[1]:
                    raise UsageError(
                        f"--mpp-csv {path}, line {table.line_num}: slide {slide!r}, mpp {row.get('mpp', '')!r}: "
                        f"must be a slide and a number of microns per pixel between {PLAUSIBLE_MPP[0]:g} and "
                        f"{PLAUSIBLE_MPP[1]:g}"
                    )
                if mpp.get(slide, value) != value:
                    raise UsageError(
                        f"--mpp-csv {path}, line {table.line_num}: slide {slide!r} is listed twice, "
                        f"with {mpp[slide]:g} and {value:g}"
                    )
                mpp[slide] = value
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"--mpp-csv {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    return MppTable(path, mpp)


def _has_columns(names: set[str]) -> bool:
    return "mpp" in names and bool({"slide", "wsi", "file"} & names)


def _names(file: str, slide: str) -> tuple[str, ...]:
    return slide, file, PurePosixPath(file).name, PurePosixPath(file).stem


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
