"""Which levels of a slide are believed: those that look like level 0, whatever the file says of them.

Files keep macro pictures (which may show a patient's label) where levels belong. A few boxes of each level are compared
with the next finer believed one: some where there is much to see, some all over.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histossl.core.errors import SlideError
from histossl.slides.reading.tiff.series import Size, same_shape

BOX_PX, MIN_BOX_PX = 64, 16  # side of a box in the coarser level's pixels
FINE_PX = 192  # and in the finer one's, about
CELL_PX = 4  # compared are means of so many coarse pixels: JPEG, sharpening and a pixel's shift are no difference
GRID = 5  # boxes all over, along each side
WHOLE_PX = 1 << 20  # of the smallest level, which shows where there is something to see
NOISE, STRUCTURE = 3.0, 6.0  # grey levels: deviation of what is surely flat, and of what surely is not
ALIKE = 0.7  # correlation
GLASS = 255  # what readers show where a file leaves out a tile
FLAT_OFF, STRUCTURED_OFF = 30.0, 40.0  # grey levels between the means of boxes that show the same
COLOURS_OFF = 20.0  # of which the colours may differ so much: lighter or darker are all three
ENOUGH_SAME, ENOUGH_OTHER = 3, 6
KEPT_VERDICTS = 256

Pixels = NDArray[np.uint8]
Place = tuple[float, float]
Seen = Literal["same", "other", "missing", "nothing"]
Verdict = tuple[tuple[int, ...], tuple[int, ...]]  # levels believed, and those that show something else


class Checkable(Protocol):
    """Levels of a file, level 0 first, that a reader can leave out."""

    path: Path
    sizes: tuple[Size, ...]
    shape_slack: float  # by which a level's sides may be off its shape, in parts

    def downsamples(self) -> tuple[float, ...]: ...
    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> Pixels: ...
    def recover(self) -> None: ...
    def keep(self, levels: Sequence[int], strange: Sequence[int]) -> None: ...


_verdicts: OrderedDict[tuple[object, ...], Verdict] = OrderedDict()
_lock = threading.Lock()


def believe(levels: Checkable, busy: Sequence[Place] = ()) -> None:
    """Leave out what is no level. `busy` is where level 0 has most to see, in shares of its sides.

    A file is compared once by a process: it is opened several times.
    """
    if len(levels.sizes) == 1:
        return
    state = levels.path.stat()
    key = (type(levels), str(levels.path), state.st_ino, state.st_size, state.st_mtime_ns, levels.sizes)
    with _lock:
        verdict = _verdicts.get(key)
    if verdict is None:
        verdict = _verdict(levels, busy)
        with _lock:
            _verdicts[key] = verdict
            if len(_verdicts) > KEPT_VERDICTS:
                _verdicts.popitem(last=False)
    kept, strange = verdict
    if len(kept) < len(levels.sizes):
        levels.keep(kept, strange)


def not_levels(images: Sequence[str]) -> str:
    """What a person should know of images that were no levels."""
    said = "listed as a level, but shows something else than the slide (a macro image?), so not read"
    return f"{said}: {', '.join(images)}"


def _verdict(levels: Checkable, busy: Sequence[Place]) -> Verdict:
    sizes = levels.sizes
    shaped = [level for level in range(1, len(sizes)) if same_shape(sizes[0], sizes[level], levels.shape_slack)]
    places = _Places(levels, shaped, busy)
    kept, strange = [0], [level for level in range(1, len(sizes)) if level not in shaped and sizes[level] != sizes[0]]
    for level in shaped:
        again = sizes[level] == sizes[kept[-1]]  # a further image of that size, not needed even if it is the same
        if not _shows(levels, kept[-2 if again else -1], level, places):
            strange.append(level)
        elif not again:
            kept.append(level)
    return tuple(kept), tuple(strange)


class _Places:
    """Middles of the boxes to compare, in shares of the slide's sides: where there is much to see, then all over."""

    def __init__(self, levels: Checkable, shaped: Sequence[int], busy: Sequence[Place]) -> None:
        self._levels, self._shaped, self._busy = levels, shaped, busy

    def __iter__(self) -> Iterator[Place]:
        yield from self._busy
        yield from self._busy_of_smallest
        for step in range(GRID * GRID):  # in an order that is soon all over the slide
            row, column = divmod(step * 7 % (GRID * GRID), GRID)
            yield (column + 0.5) / GRID, (row + 0.5) / GRID

    @cached_property
    def _busy_of_smallest(self) -> list[Place]:
        """Where the smallest level has most to see, if reading it is cheap."""
        sizes = self._levels.sizes
        smallest = min(self._shaped, key=lambda level: math.prod(sizes[level]))
        width, height = sizes[smallest]
        pixels = _read(self._levels, smallest, 0, 0, width, height) if width * height <= WHOLE_PX else None
        if pixels is None:
            return []
        grey = pixels.mean(axis=2)
        across, down = (min(8, max(1, side // MIN_BOX_PX)) for side in (width, height))
        blocks = [
            (float(np.std(block)), (column + 0.5) / across, (row + 0.5) / down)
            for row, band in enumerate(np.array_split(grey, down, axis=0))
            for column, block in enumerate(np.array_split(band, across, axis=1))
        ]
        return [(x, y) for _, x, y in sorted(blocks, reverse=True)[:ENOUGH_SAME]]


def _shows(levels: Checkable, fine: int, coarse: int, places: Iterable[Place]) -> bool:
    """Whether a level shows what a finer one shows. Boxes that are flat in both, or damaged, say nothing.

    Nor do tiles that one of them lacks, unless it lacks all that there is to see.
    """
    seen: Counter[Seen] = Counter()
    for place in places:
        seen[_compared(levels, fine, coarse, place)] += 1
        if (seen["same"] >= ENOUGH_SAME and not seen["other"]) or (seen["other"] >= ENOUGH_OTHER and not seen["same"]):
            break
    return seen["same"] > seen["other"] or not (seen["other"] or seen["missing"])


def _compared(levels: Checkable, fine: int, coarse: int, place: Place) -> Seen:
    """What a box of two levels says."""
    width, height = levels.sizes[coarse]
    step = levels.downsamples()[coarse] / levels.downsamples()[fine]
    side = int(np.clip(FINE_PX / step, MIN_BOX_PX, BOX_PX)) // CELL_PX * CELL_PX
    w, h = (min(side, max(1, px // CELL_PX * CELL_PX)) for px in (width, height))
    x, y = (round((px - box) * share) for px, box, share in zip((width, height), (w, h), place, strict=True))
    theirs = _read(levels, coarse, x, y, w, h)
    left, top = math.floor(x * step), math.floor(y * step)
    # A level may be rounded up: its last pixels then are made of less.
    right, bottom = (
        min(math.ceil((at + px) * step), end) for at, px, end in zip((x, y), (w, h), levels.sizes[fine], strict=True)
    )
    ours = _read(levels, fine, left, top, right - left, bottom - top)
    if theirs is None or ours is None:
        return "nothing"
    one = _cells(theirs)
    within = (x * step - left, y * step - top, min((x + w) * step, right) - left, min((y + h) * step, bottom) - top)
    averaged = Image.fromarray(ours).resize(one.shape[1::-1], Image.Resampling.BOX, box=within)
    verdict = _alike(one, np.asarray(averaged, np.float32))
    for phase in (0.0, 0.5):  # some programs leave pixels out instead of averaging
        if verdict != "other":
            break
        rows, columns = (
            np.minimum(((at + np.arange(px) + phase) * step).astype(int) - start, end - 1)
            for at, px, start, end in ((y, h, top, len(ours)), (x, w, left, ours.shape[1]))
        )
        verdict = _alike(one, _cells(ours[np.ix_(rows, columns)]))
    if verdict == "other" and (theirs.min() == GLASS) != (ours.min() == GLASS):
        return "missing"
    return verdict


def _read(levels: Checkable, level: int, x: int, y: int, width: int, height: int) -> Pixels | None:
    try:
        return levels.read_level(level, x, y, width, height)
    except SlideError:
        levels.recover()
        return None


def _cells(pixels: Pixels) -> NDArray[np.float32]:
    """Means of cells of CELL_PX."""
    return np.asarray(Image.fromarray(pixels).reduce(min(CELL_PX, *pixels.shape[:2])), np.float32)


def _alike(one: NDArray[np.float32], other: NDArray[np.float32]) -> Seen:
    """Of cells (h, w, 3) of two boxes."""
    means = one.mean(axis=(0, 1)), other.mean(axis=(0, 1))
    shift = means[0] - means[1]
    off, colours_off = float(np.abs(shift).max()), float(np.abs(shift - shift.mean()).max())
    a, b = one - means[0], other - means[1]
    deviations = math.sqrt(float((a * a).mean())), math.sqrt(float((b * b).mean()))
    if max(deviations) < NOISE:
        return "other" if off > FLAT_OFF else "nothing"
    correlation = float((a * b).mean()) / max(deviations[0] * deviations[1], 1e-9)
    if correlation >= ALIKE and off <= STRUCTURED_OFF and colours_off <= COLOURS_OFF:
        return "same"
    return "other" if max(deviations) >= STRUCTURE or off > STRUCTURED_OFF else "nothing"
