"""Follow a TIFF's directories (IFDs) before any library does: some go round in a circle and never come back."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MAX_DIRECTORIES = 65_535  # of a slide: a dozen
CLASSIC_END = 1 << 32  # a classic TIFF that is longer is Hamamatsu's, which keeps its offsets in a way of its own
SUB_IFDS = 330
OFFSET_TYPES = {4: "I", 13: "I", 16: "Q", 18: "Q"}  # LONG, IFD, LONG8, IFD8
MAX_TAGS = 4096  # of one directory: more, and it is none


@dataclass(frozen=True)
class _Layout:
    """How this TIFF writes numbers."""

    order: str  # of struct: < or >
    big: bool

    @property
    def count(self) -> struct.Struct:
        return struct.Struct(self.order + ("Q" if self.big else "H"))

    @property
    def offset(self) -> struct.Struct:
        return struct.Struct(self.order + ("Q" if self.big else "I"))

    @property
    def tag(self) -> struct.Struct:
        """Number, type, how many values, and the values or where they lie."""
        return struct.Struct(self.order + ("HHQ8s" if self.big else "HHI4s"))


def directory_damage(path: Path) -> str:
    """Why this TIFF's directories cannot be followed to an end; empty if they can, or if it is no TIFF.

    What points nowhere (a file cut short) is for the libraries to report: they stop there.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        head = file.read(16)
        if len(head) < 8 or head[:2] not in (b"II", b"MM"):
            return ""
        order = "<" if head[:2] == b"II" else ">"
        magic = struct.unpack(order + "H", head[2:4])[0]
        layout = _Layout(order, magic == 43)
        if magic not in (42, 43) or len(head) < 16 or (magic == 42 and size > CLASSIC_END):
            return ""
        (first,) = layout.offset.unpack_from(head, 8 if layout.big else 4)
        return _followed(file, layout, first, size)


def _followed(file: BinaryIO, layout: _Layout, first: int, size: int) -> str:
    """Depth first. A directory that leads back to one on the way to it closes a circle; two ways to one do not."""
    on_the_way: set[int] = set()
    done: set[int] = set()
    waiting: list[tuple[int, Iterator[int]]] = [(0, iter([first]))]
    while waiting:
        at, following = waiting[-1]
        offset = next(following, None)
        if offset is None:
            waiting.pop()
            on_the_way.discard(at)
            done.add(at)
            continue
        if offset in on_the_way:
            return f"damaged: its directories (IFDs) go round in a circle, back to byte {offset}; export it again"
        if offset in done or not 0 < offset < size:
            continue
        if len(done) + len(on_the_way) >= MAX_DIRECTORIES:
            return f"damaged: it lists more than {MAX_DIRECTORIES:,} directories (IFDs); export it again"
        on_the_way.add(offset)
        waiting.append((offset, iter(_next(file, layout, offset))))
    return ""


def _next(file: BinaryIO, layout: _Layout, offset: int) -> list[int]:
    """Where a directory leads: its sub-directories, then the one after it."""
    file.seek(offset)
    head = file.read(layout.count.size)
    if len(head) < layout.count.size:
        return []
    (count,) = layout.count.unpack(head)
    if count > MAX_TAGS:
        return []
    table = file.read(count * layout.tag.size + layout.offset.size)
    if len(table) < count * layout.tag.size + layout.offset.size:
        return []
    found: list[int] = []
    for number, kind, values, content in layout.tag.iter_unpack(table[: count * layout.tag.size]):
        if number == SUB_IFDS and kind in OFFSET_TYPES and values:
            found += _values(file, layout, kind, min(values, MAX_DIRECTORIES), content)
    return [*found, layout.offset.unpack_from(table, count * layout.tag.size)[0]]


def _values(file: BinaryIO, layout: _Layout, kind: int, count: int, content: bytes) -> list[int]:
    one = struct.Struct(layout.order + OFFSET_TYPES[kind])
    if count * one.size > len(content):
        file.seek(layout.offset.unpack(content)[0])
        content = file.read(count * one.size)
    whole = len(content) // one.size
    return [value for (value,) in one.iter_unpack(content[: min(count, whole) * one.size])]
