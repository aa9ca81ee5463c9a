"""Which images a TIFF holds, and which of them is the slide: the largest that is no label or macro picture.

The order of pages says nothing: converters put the overview first, or last. Neither does a page's claim to be a level
(NewSubfileType, a SubIFD, the vendor's list): here a claim makes a candidate, and `levels.py` compares its pixels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np
import tifffile

from histossl.core.errors import SlideError

Size = tuple[int, int]  # width, height

# Whole names, as scanners and Bio-Formats write them; never a part of a name: 'CD68 macrophages' is a slide.
PRIVATE = frozenset(f"{name}{image}" for name in ("label", "macro", "barcode") for image in ("", " image"))
VIEWS = frozenset(
    f"{name}{image}" for name in ("thumbnail", "overview", "map", "probability") for image in ("", " image")
)
NAMED_IMAGES = ("ome", "shaped")  # series whose name is metadata; of other formats tifffile counts pages
# Formats of scanners: what lies next to their levels is known, and nothing to warn of.
SCANNERS = frozenset(("svs", "scn", "qpi", "ndpi", "bif", "avs", "philips"))
APERIO_ASIDE = re.compile(r"Aperio[^\n]*\n(label|macro) \d+x\d+", re.IGNORECASE)
PHILIPS_ASIDE = re.compile(r"(label|macro)\b", re.IGNORECASE)
QPI_TYPE = re.compile(r"<ImageType>\s*(\w+)\s*</ImageType>")
NDPI_LENS, PAGE_NAME = 65421, 285
STACKS = {"Z": ("z-stack", "plane"), "T": ("time series", "time point"), "C": ("stack of colour images", "channel")}
CHANNELS = ("red", "green", "blue")
NUMBERED_CHANNEL = re.compile(r"(c|ch|channel)?[\s:_-]*[\d:]*", re.IGNORECASE)  # a name that says nothing
MAX_SAME = 16  # pages of one size that are told apart, where nothing calls them a stack
ROUNDING_PX = 1.0  # by which a level's side may be rounded, up or down


@dataclass(frozen=True)
class TiffImage:
    """One plane of a TIFF, its `pages` one or three (a page per colour). Reads like one of tifffile's levels."""

    pages: tuple[Any, ...]
    axes: str
    shape: tuple[int, ...]
    kind: str  # of the series, as tifffile says
    series: int
    level: int  # in the series; 0 is its own image
    name: str = ""
    depth: tuple[tuple[str, int], ...] = ()  # what the series holds besides this plane: axes and their lengths
    place: tuple[int, ...] = ()  # of this plane on these axes
    elsewhere: str = ""  # the other file that holds its pixels

    @property
    def page(self) -> Any:
        return self.pages[0]

    @property
    def size(self) -> Size:
        sizes = dict(zip(self.axes, self.shape, strict=True))
        return int(sizes.get("X", 0)), int(sizes.get("Y", 0))

    @property
    def claims(self) -> bool:
        """Whether the file says that it is a level."""
        return self.page is not None and bool(self.page.is_reduced or self.page.is_subifd or self.level > 0)

    @property
    def grey(self) -> bool:
        return dict(zip(self.axes, self.shape, strict=True)).get("S", 1) < 3

    @property
    def stack(self) -> str:
        """What a person should know of the planes that are not read."""
        said = []
        for (axis, count), at in zip(self.depth, self.place, strict=True):
            whole, one = STACKS.get(axis, ("stack", "image"))
            used = f"{one} {at + 1} is used" if self.kind != "ndpi" else f"one {one} is used"
            said.append(f"{whole} of {count} {one}s: {used}")
        return ", ".join(said)

    @property
    def told(self) -> str:
        name = f"{self.name!r} " if self.name and self.kind in NAMED_IMAGES else ""
        return f"{name}{self.size[0]} x {self.size[1]} px"


@dataclass(frozen=True)
class Choice:
    """`slide` is level 0, `candidates` may be its levels, large to small; `others` are neither, nor label or macro.

    `private` are label and macro images larger than the slide.
    """

    slide: TiffImage
    candidates: list[TiffImage]
    others: list[TiffImage]
    private: list[TiffImage]


def choose(path: Path, tiff: tifffile.TiffFile) -> Choice | None:
    """The slide among the images of a file; None if it holds no image. SlideError if none of them can be one."""
    found = [image for image in images(tiff) if min(image.size) >= 1 and not image.page.is_mask]
    found = [image for image in found if not image.elsewhere] or found
    usable = [image for image in found if not _is_named(image, PRIVATE)]
    if found and not usable:
        held = ", ".join(image.told for image in found[:4])
        raise SlideError(
            f"{path.name}: holds no slide, only label or macro images ({held}), which are never read; "
            "if it is a slide, give it another name in the file"
        )
    if not usable:
        return None
    views = [image for image in usable if _is_named(image, VIEWS)]
    slide = _largest([image for image in usable if image not in views] or usable)
    if views and prod(_largest(usable).size) > prod(slide.size):  # a name alone makes no thumbnail of the largest
        slide, views = _largest(usable), []
    if slide.elsewhere:
        raise SlideError(
            f"{path.name}: its OME-XML says that its pixels lie in {slide.elsewhere}; export it as one file"
        )
    if slide.grey and any(axis not in "ZT" for axis, _ in slide.depth):
        counts = "x".join(str(count) for _, count in slide.depth)
        raise SlideError(f"{path.name}: a stack of {counts} images; export one plane as RGB")
    rest = [image for image in usable if image not in views and not _beside(image, slide)]
    candidates = [image for image in rest if _may_be_level(image, slide)]
    candidates.sort(key=lambda image: (-prod(image.size), image.series != slide.series))
    # A label is smaller than a slide: one that is not may be a slide with an unlucky name.
    private = [image for image in found if image not in usable and prod(image.size) > prod(slide.size)]
    return Choice(slide, candidates, [image for image in rest if image not in candidates], private)


def _largest(images: Sequence[TiffImage]) -> TiffImage:
    """The first of the largest. A scanner's slide is tiled: a larger picture in strips is one if it has its shape."""
    largest = max(images, key=lambda image: prod(image.size))
    tiled = [image for image in images if image.page.is_tiled]
    if largest.page.is_tiled or not tiled:
        return largest
    first = max(tiled, key=lambda image: prod(image.size))
    return largest if same_shape(largest.size, first.size) else first


def _may_be_level(image: TiffImage, slide: TiffImage) -> bool:
    if not same_shape(slide.size, image.size):
        return False
    # Scanners keep thumbnails in strips next to tiled levels.
    return image.kind not in SCANNERS or bool(image.page.is_tiled or not slide.page.is_tiled)


def _beside(image: TiffImage, slide: TiffImage) -> bool:
    """A plane of the slide's own stack, or a level of another scene."""
    if (image.series, image.level) == (slide.series, slide.level):
        return True
    return image.kind == "ome" and image.level > 0 and image.series != slide.series


def same_shape(size_l0: Size, size: Size, slack: float = 0.0) -> bool:
    """Whether `size` is smaller and may be `size_l0` shrunk, each side rounded; `slack` allows so much more, in parts.

    Each side bounds the shrinking factor; both must allow the same one.
    """
    if size[0] >= size_l0[0] and size[1] >= size_l0[1]:
        return False
    rounding = [ROUNDING_PX + slack * px for px in size]
    low = max(whole / (px + off) for whole, px, off in zip(size_l0, size, rounding, strict=True))
    high = min(whole / max(px - off, 1e-9) for whole, px, off in zip(size_l0, size, rounding, strict=True))
    return low < high


def _is_named(image: TiffImage, names: frozenset[str]) -> bool:
    """Whether a scanner's format, or a whole name, says that an image is no slide."""
    page = image.page
    description = str(page.description or "").strip()
    said = {description, str(page.tags.valueof(PAGE_NAME) or "")}
    if image.kind in NAMED_IMAGES and image.level == 0:
        said.add(image.name)
    if page.is_qpi or image.kind == "qpi":
        said.update(QPI_TYPE.findall(description))
    for pattern, applies in ((APERIO_ASIDE, True), (PHILIPS_ASIDE, image.kind == "philips")):
        match = pattern.match(description) if applies else None
        said.update([match[1]] if match else [])
    if image.kind == "ndpi":
        said.add({-1.0: "macro", -2.0: "map"}.get(page.tags.valueof(NDPI_LENS), ""))
    return any(" ".join(one.replace("_", " ").split()).casefold() in names for one in said)


# ---- channels and planes


def channel_names(pixels: Sequence[Element]) -> list[str]:
    """Of the first image; empty where its channels have no names, or but numbers."""
    names = [str(one.get("Name", "")).strip() for each in pixels[:1] for one in each if one.tag.endswith("Channel")]
    return [] if all(NUMBERED_CHANNEL.fullmatch(name) for name in names) else names


def rgb_order(names: list[str]) -> list[int] | None:
    """Where red, green and blue are among channels of these names; None if they are other channels."""
    said = [name.casefold() for name in names]
    for colours in (CHANNELS, tuple(name[0] for name in CHANNELS)):
        if sorted(said) == sorted(colours):
            return [said.index(colour) for colour in colours]
    return None


def images(tiff: tifffile.TiffFile) -> Iterator[TiffImage]:
    """Every image of a file; of a stack the first plane."""
    for number, series in enumerate(tiff.series):
        for level, one in enumerate(series.levels):
            if "X" in one.axes and "Y" in one.axes:
                yield from _planes(tiff, one, number, level, str(series.name or ""))


def _planes(tiff: tifffile.TiffFile, one: Any, series: int, level: int, name: str) -> Iterator[TiffImage]:
    axes, shape = one.axes, tuple(int(side) for side in one.shape)
    outer = next(cut for cut in range(len(shape) + 1) if prod(shape[cut:]) <= one.keyframe.size)  # axes over pages
    colours = dict(zip(axes, shape, strict=True)).get("S", 1) >= 3
    # Three grey planes are an RGB image; any other number is refused for what it is.
    channel = [at for at in range(outer) if axes[at] == "C" and not colours]
    depth = [at for at in range(outer) if at not in channel and shape[at] > 1]
    kept = [*channel, *range(outer, len(axes))]
    whole = TiffImage(
        pages=(),
        axes="".join(axes[at] for at in kept),
        shape=tuple(shape[at] for at in kept),
        kind=str(one.kind),
        series=series,
        level=level,
        name=name,
        depth=tuple((axes[at], shape[at]) for at in depth),
    )
    numbers = np.arange(prod(shape[:outer])).reshape(shape[:outer])
    numbers = np.moveaxis(numbers, [*depth, *channel], range(len(depth) + len(channel)))
    numbers = numbers.reshape(*(shape[at] for at in depth), -1)
    apart = one.kind in (*SCANNERS, "generic") and not channel  # pages of one size, each for itself
    found: list[TiffImage] = []
    for place in islice(np.ndindex(*numbers.shape[:-1]), MAX_SAME if apart else None):
        pages = tuple(_page(one, int(number)) for number in numbers[place])
        if pages and all(page is not None for page in pages):
            elsewhere = next((str(page.parent.filename) for page in pages if page.parent is not tiff), "")
            found.append(replace(whole, pages=pages, place=place, elsewhere=elsewhere))
            if not apart and not elsewhere:
                break
    here = [image for image in found if not image.elsewhere]
    yield from here if apart else (here or found)[:1]


def _page(one: Any, number: int) -> Any:
    """A page of a series, with its own tags; None if the file lacks it."""
    try:
        page = one.pages[number]
    except IndexError:
        return None
    if page is None or getattr(page, "is_virtual", False):
        return None
    return page if isinstance(page, tifffile.TiffPage) or page.parent.filehandle.closed else page.aspage()
