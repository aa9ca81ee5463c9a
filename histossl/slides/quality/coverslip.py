"""Tell the edge of a cover slip from tissue: light is bent there, which leaves a long, thin, coloured line on the scan.

Bluish on one side and yellowish on the other, it passes for stained. It is told by hue and shape together: not the hue
of eosin or haematoxylin, far longer than wide, straight or evenly bent, as wide and as dark at one end as at the other.
Where it has a prism's colours, red absorbed along one side and blue along the other, a short stretch is enough: no
strip of tissue is stained like that. A strip of tissue is ragged, holds nuclei, and in H&E absorbs green most; a
needle's core is half a millimetre wide.

Frames: `_um` microns; `_px` thumbnail pixels; `along` and `across` are a line's own axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

MAX_WIDTH_UM = 130.0
MIN_LENGTH_UM, MIN_LENGTH_PX = 300.0, 40
MIN_ELONGATION = 8.0
MIN_PRISM = 0.4  # red less blue on either side of a line, with opposite signs, in parts of the density there
OF_FRINGE = 0.8  # green lies between red and blue there; a blue counterstain absorbs as much of it as of red
MIN_PRISM_LENGTH_UM, MIN_PRISM_LENGTH_PX, MIN_PRISM_ELONGATION = 80.0, 24, 2.0  # of a stretch of such a line
PRISM_PARTS = 4  # of the shortest stretch, each of which must be one
MAX_UNEVEN_STRETCH = 0.35  # how far width and density of a stretch may be from the line's usual ones
GAP_UM = 24.0  # between the pieces of a line that the threshold has cut
FRINGE_UM = 16.0  # how far beside the line its paler colours still count as tissue
OF_STAIN = 0.97  # green is what eosin and haematoxylin absorb most; the noise of a pale stain is allowed for
AMID_STAIN = 0.25  # share of stained pixels around, above which it is tissue that the line crosses: that stays
MAX_BESIDE, MAX_BESIDE_PRISM = 0.35, 0.55  # of the ground beside a line that is tissue, too; all of one side may be
MIN_SEEN = 0.7  # of a line's length
MAX_BOW = 0.12  # in lengths
MAX_WANDER = 0.16  # of its middle around an even bend, in widths
MAX_UNEVEN_WIDTH, MAX_UNEVEN_DENSITY = 0.25, 0.3  # spread along the line, in means

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]


def edge_mask(mask: Mask, density: NDArray[np.float32], um_per_px: float) -> Mask:
    """The parts of a tissue mask that are a cover slip's edge; `density` is the thumbnail's, (h, w, 3)."""
    edges = np.zeros_like(mask)
    red, green, blue = (density[..., channel] for channel in range(3))
    odd = mask & (green < OF_STAIN * np.maximum(red, blue))
    max_width_px = max(3, round(MAX_WIDTH_UM / um_per_px))
    if not odd.any():
        return edges
    stained = ndimage.uniform_filter((mask & ~odd).astype(np.float32), 2 * max_width_px + 1, mode="nearest")
    fringe_px = max(1, round(FRINGE_UM / um_per_px))
    shortest_px = max(MIN_PRISM_LENGTH_PX, MIN_PRISM_LENGTH_UM / um_per_px)
    for some in (odd, odd & (stained < AMID_STAIN)):
        for narrow in (_narrow(some, max_width_px), _narrow(some.T, max_width_px).T):  # upright lines, then lying ones
            for box, part in _pieces(narrow, max(1, round(GAP_UM / um_per_px / 2)), shortest_px):
                for edge, max_beside in _lines(part, density[box], um_per_px):
                    if _on_glass(edge, mask, box, fringe_px, max_beside):
                        edges[box] |= edge
    if edges.any():
        near = ndimage.distance_transform_edt(~edges) <= fringe_px + 1
        edges = near & mask & (odd | _narrow(mask, 2 * max_width_px) | _narrow(mask.T, 2 * max_width_px).T)
    return edges


def _narrow(mask: Mask, max_px: int) -> Mask:
    """Pixels whose run along the row is at most max_px long."""
    framed = np.pad(mask, ((0, 0), (1, 1))).astype(np.int8)
    turns = np.diff(framed, axis=1)
    rows, starts = np.nonzero(turns == 1)
    ends = np.nonzero(turns == -1)[1]  # row by row, as the starts are
    few = ends - starts <= max_px
    marks = np.zeros((mask.shape[0], mask.shape[1] + 1), np.int8)
    marks[rows[few], starts[few]] = 1
    marks[rows[few], ends[few]] -= 1
    narrow: Mask = np.cumsum(marks, axis=1, dtype=np.int8)[:, :-1] > 0
    return narrow


def _pieces(mask: Mask, reach_px: int, min_length_px: float) -> Iterator[tuple[tuple[slice, slice], Mask]]:
    """What belongs together over small gaps and is long enough."""
    labels, count = ndimage.label(ndimage.binary_dilation(mask, np.ones((3, 3), bool), iterations=reach_px))
    if not count:
        return
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        rows, columns = box
        if math.hypot(rows.stop - rows.start, columns.stop - columns.start) >= min_length_px:
            yield (rows, columns), mask[box] & (labels[box] == number)


@dataclass(frozen=True)
class _Line:
    """Pixels of a piece that lie on one line: where (of the piece's own array), along and beside it, how dense.

    `bins` are whole pixels along it; `bow` is of its middle, in lengths.
    """

    rows: NDArray[np.intp]
    columns: NDArray[np.intp]
    bins: NDArray[np.intp]
    beside_px: Floats
    density: NDArray[np.float32]  # (n, 3)
    length_px: float
    bow: float


def _lines(part: Mask, density: NDArray[np.float32], um_per_px: float) -> Iterator[tuple[Mask, float]]:
    """What of a piece is a cover slip's edge, as a whole or in stretches, and how much tissue may be beside it."""
    min_length_px = max(MIN_LENGTH_PX, MIN_LENGTH_UM / um_per_px)
    shortest_px = max(MIN_PRISM_LENGTH_PX, MIN_PRISM_LENGTH_UM / um_per_px)
    line = _fitted(part, density, shortest_px)
    if line is None or line.bow > MAX_BOW:
        return
    if line.length_px >= min_length_px and _even(line):
        yield _drawn(part, line, np.ones(len(line.rows), bool)), MAX_BESIDE
    else:
        for stretch in _stretches(line, shortest_px):
            yield _drawn(part, line, stretch), MAX_BESIDE_PRISM


def _drawn(part: Mask, line: _Line, some: Mask) -> Mask:
    mask = np.zeros_like(part)
    mask[line.rows[some], line.columns[some]] = True
    return mask


def _fitted(part: Mask, density: NDArray[np.float32], shortest_px: float) -> _Line | None:
    """The evenly bent line on which most of a piece lies; None if there is none."""
    rows, columns = np.nonzero(part)
    if len(rows) < shortest_px:
        return None
    points = np.stack([columns, rows]).astype(np.float64)
    points -= points.mean(axis=1, keepdims=True)
    _, axes = np.linalg.eigh(np.cov(points))  # the longest last
    across, along = axes.T @ points
    bins = (along - along.min()).astype(np.intp)
    width_px = float(np.median(np.bincount(bins)[np.unique(bins)]))
    on = np.ones(len(along), bool)
    for _ in range(3):  # what hangs on to it, dirt or the rim of tissue, must not bend it
        bend = np.polynomial.Polynomial.fit(along[on], across[on], 2)
        off = across - bend(along)
        on = np.abs(off) <= max(1.5, 0.75 * width_px)
        if on.sum() < max(shortest_px, 0.6 * len(on)):
            return None
    length_px = float(np.ptp(along[on]))
    first, middle, last = bend(np.array([along[on].min(), along[on].mean(), along[on].max()]))
    bow = abs(first + last - 2 * middle) / 2 / max(length_px, 1.0)
    rows, columns = rows[on], columns[on]
    return _Line(rows, columns, bins[on], off[on], density[rows, columns], length_px, float(bow))


def _even(line: _Line) -> bool:
    """Far longer than wide, without gaps, as wide and as dark at one end as at the other, on its course."""
    count = np.bincount(line.bins).astype(np.float64)
    seen = np.flatnonzero(count)
    if len(seen) < MIN_SEEN * line.length_px:
        return False
    dark = np.bincount(line.bins, line.density.mean(axis=1))
    centre = np.bincount(line.bins, line.beside_px)
    inner = seen[2:-2]  # the ends are cut by a border or by tissue
    width_px = float(np.median(count[inner]))
    return (
        line.length_px >= MIN_ELONGATION * width_px
        and float(np.std(centre[inner] / count[inner])) <= 0.35 + MAX_WANDER * width_px
        and _uneven(count[inner], 1.0) <= MAX_UNEVEN_WIDTH
        and _uneven(dark[inner] / count[inner], 0.0) <= MAX_UNEVEN_DENSITY
    )


def _prism(line: _Line, some: Mask) -> bool:
    """Whether red is absorbed on one side of some of a line and blue on the other."""
    beside_px, density = line.beside_px[some], line.density[some]
    if not len(beside_px):
        return False
    outer_px = float(np.median(np.abs(beside_px)))  # between the fringes it is dark and grey
    over, under = density[beside_px > outer_px], density[beside_px < -outer_px]
    if not (len(over) and len(under)):
        return False
    (red, green, blue), (other_red, other_green, other_blue) = (side.mean(axis=0).tolist() for side in (over, under))
    if red < blue:  # the other side's
        red, green, blue, other_red, other_green, other_blue = other_red, other_green, other_blue, red, green, blue
    return bool(
        red - blue >= MIN_PRISM * (red + green + blue) / 3
        and other_blue - other_red >= MIN_PRISM * (other_red + other_green + other_blue) / 3
        and green <= OF_FRINGE * red
        and other_green <= OF_FRINGE * other_blue
    )


def _stretches(line: _Line, shortest_px: float) -> Iterator[Mask]:
    """Where a line is as wide and as dark as it usually is, for long enough, and a prism there too."""
    count = np.bincount(line.bins).astype(np.float64)
    dark = np.bincount(line.bins, line.density.mean(axis=1)) / np.maximum(count, 1)
    centre = np.bincount(line.bins, line.beside_px) / np.maximum(count, 1)
    usual_px, usual_dark = float(np.median(count[count > 0])), float(np.median(dark[count > 0]))
    even = (np.abs(count - usual_px) <= max(1.5, MAX_UNEVEN_STRETCH * usual_px)) & (
        np.abs(dark - usual_dark) <= MAX_UNEVEN_STRETCH * usual_dark
    )
    even = ndimage.binary_closing(np.pad(even, 2), np.ones(4, bool))[2:-2]
    # Stained blue and brown, a strip of tissue may look like a prism here and there, but not part after part.
    part_px = round(shortest_px / PRISM_PARTS)
    for start in range(0, len(even), part_px):
        even[start : start + part_px] &= _prism(line, line.bins // part_px == start // part_px)
    labels, found = ndimage.label(even)
    for number in range(1, found + 1):
        bins = np.flatnonzero(labels == number)
        wander_px = float(np.std(centre[bins][count[bins] > 0]))
        if len(bins) >= max(shortest_px, MIN_PRISM_ELONGATION * usual_px) and wander_px <= 0.35 + MAX_WANDER * usual_px:
            yield labels[line.bins] == number


def _on_glass(edge: Mask, mask: Mask, box: tuple[slice, slice], fringe_px: int, max_beside: float) -> bool:
    """Whether most of the ground beside a line, past its fringes, is glass: a strip of tissue lies among tissue."""
    width_px = 2 * float(ndimage.distance_transform_edt(np.pad(edge, 1)).max())
    reach_px = fringe_px + math.ceil(width_px) + 2
    wider = tuple(slice(max(0, side.start - reach_px), side.stop + reach_px) for side in box)
    ground = mask[wider]
    before = [side.start - wide.start for side, wide in zip(box, wider, strict=True)]
    after = [whole - start - part for whole, start, part in zip(ground.shape, before, edge.shape, strict=True)]
    away_px = ndimage.distance_transform_edt(~np.pad(edge, list(zip(before, after, strict=True))))
    beside = (away_px > fringe_px + 2) & (away_px <= reach_px)
    return not beside.any() or bool(ground[beside].mean() <= max_beside)


def _uneven(values: Floats, grain: float) -> float:
    """Spread over mean; `grain` is the spread that comes of counting whole pixels."""
    low, high = np.percentile(values, (16, 84))
    return float(max(0.0, high - low - grain) / 2 / values.mean())
