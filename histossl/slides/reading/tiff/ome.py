"""Which part of an OME-XML header speaks of one image of its file, and what it calls that image's channels."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from contextlib import suppress

RGB = ("red", "green", "blue")
NUMBERED = re.compile(r"(c|ch|channel)?[\s:_-]*[\d:]*", re.IGNORECASE)  # a name that says nothing


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


def channel_names(pixels: list[ElementTree.Element]) -> list[str]:
    """Of the first image; empty where its channels have no names, or but numbers."""
    names = [str(one.get("Name", "")).strip() for each in pixels[:1] for one in each if _tag(one) == "Channel"]
    return [] if all(NUMBERED.fullmatch(name) for name in names) else names


def rgb_order(names: list[str]) -> list[int] | None:
    """Where red, green and blue are among channels of these names; None if they are other channels."""
    said = [name.casefold() for name in names]
    for colours in (RGB, tuple(colour[0] for colour in RGB)):
        if sorted(said) == sorted(colours):
            return [said.index(colour) for colour in colours]
    return None


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
