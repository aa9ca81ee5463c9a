"""Tell the edge of a cover slip from tissue: light is bent there, which leaves a long, thin, coloured line on the scan.

Bluish on one side and yellowish on the other, it passes for stained. It is told by hue and shape together: not the hue
of eosin or haematoxylin, far longer than wide, straight or evenly bent, as wide and as dark at one end as at the other.
A strip of tissue is ragged, holds nuclei, and in H&E absorbs green most; a needle's core is half a millimetre wide.

Frames: `_um` microns; `_px` thumbnail pixels; `along` and `across` are a line's own axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

MAX_WIDTH_UM = 130.0
MIN_LENGTH_UM, MIN_LENGTH_PX = 300.0, 40
MIN_ELONGATION = 8.0
GAP_UM = 24.0  # between the pieces of a line that the threshold has cut
FRINGE_UM = 16.0  # how far beside the line its paler colours still count as tissue
OF_STAIN = 0.97  # green is what eosin and haematoxylin absorb most; the noise of a pale stain is allowed for
AMID_STAIN = 0.25  # share of stained pixels around, above which it is tissue that the line crosses: that stays
MAX_BESIDE = 0.35  # of the ground beside a line that is tissue, too
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
    min_length_px = max(MIN_LENGTH_PX, MIN_LENGTH_UM / um_per_px)
    for some in (odd, odd & (stained < AMID_STAIN)):
        for narrow in (_narrow(some, max_width_px), _narrow(some.T, max_width_px).T):  # upright lines, then lying ones
            for box, part in _pieces(narrow, max(1, round(GAP_UM / um_per_px / 2)), min_length_px):
                edge = _line(part, density[box], min_length_px)
                if edge.any() and _on_glass(edge, mask, box, fringe_px):
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


def _line(part: Mask, density: NDArray[np.float32], min_length_px: float) -> Mask:
    """Of a piece what lies on one line, if that is a cover slip's edge; else nothing."""
    nothing = np.zeros_like(part)
    rows, columns = np.nonzero(part)
    points = np.stack([columns, rows]).astype(np.float64)
    points -= points.mean(axis=1, keepdims=True)
    _, axes = np.linalg.eigh(np.cov(points))  # the longest last
    across, along = axes.T @ points
    bins = (along - along.min()).astype(np.intp)
    width_px = float(np.median(np.bincount(bins)[np.unique(bins)]))
    on = np.ones(len(along), bool)
    for _ in range(3):  # what hangs on to it, dirt or the rim of tissue, must not bend it
        bend = np.polynomial.Polynomial.fit(along[on], across[on], 2)
        off = np.abs(across - bend(along))
        on = off <= max(1.5, 0.75 * width_px)
        if on.sum() < max(min_length_px, 0.6 * len(on)):
            return nothing
    count = np.bincount(bins[on]).astype(np.float64)
    seen = np.flatnonzero(count)
    length_px = float(np.ptp(along[on]))
    first, middle, last = bend(np.array([along[on].min(), along[on].mean(), along[on].max()]))
    dark = np.bincount(bins[on], density[rows[on], columns[on]].mean(axis=1))
    centre = np.bincount(bins[on], (across - bend(along))[on])
    inner = seen[2:-2]  # the ends are cut by a border or by tissue
    width_px = float(np.median(count[inner]))
    is_edge = (
        length_px >= max(min_length_px, MIN_ELONGATION * width_px)
        and len(seen) >= MIN_SEEN * length_px
        and abs(first + last - 2 * middle) / 2 <= MAX_BOW * length_px
        and float(np.std(centre[inner] / count[inner])) <= 0.35 + MAX_WANDER * width_px
        and _uneven(count[inner], 1.0) <= MAX_UNEVEN_WIDTH
        and _uneven(dark[inner] / count[inner], 0.0) <= MAX_UNEVEN_DENSITY
    )
    if is_edge:
        nothing[rows[on], columns[on]] = True
    return nothing


def _on_glass(edge: Mask, mask: Mask, box: tuple[slice, slice], fringe_px: int) -> bool:
    """Whether most of the ground beside a line, past its fringes, is glass: a strip of tissue lies among tissue."""
    width_px = 2 * float(ndimage.distance_transform_edt(np.pad(edge, 1)).max())
    reach_px = fringe_px + math.ceil(width_px) + 2
    wider = tuple(slice(max(0, side.start - reach_px), side.stop + reach_px) for side in box)
    ground = mask[wider]
    before = [side.start - wide.start for side, wide in zip(box, wider, strict=True)]
    after = [whole - start - part for whole, start, part in zip(ground.shape, before, edge.shape, strict=True)]
    away_px = ndimage.distance_transform_edt(~np.pad(edge, list(zip(before, after, strict=True))))
    beside = (away_px > fringe_px + 2) & (away_px <= reach_px)
    return not beside.any() or bool(ground[beside].mean() <= MAX_BESIDE)


def _uneven(values: Floats, grain: float) -> float:
    """Spread over mean; `grain` is the spread that comes of counting whole pixels."""
    low, high = np.percentile(values, (16, 84))
    return float(max(0.0, high - low - grain) / 2 / values.mean())
