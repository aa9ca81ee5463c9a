"""Near-duplicate tiles, within a slide and across slides: scans made twice, overlaps, files exported again.

Two tiles are copies when their cosine reaches the threshold; whoever is joined by copies is one group, and the first
tile of a group stands for it. The cosine is nine tenths that of two 16 x 16 pictures and one tenth that of what the
backbone sees, for what a backbone has learnt to overlook is what tells a copy from more of the same tissue. Measured
with DeiT-tiny of ImageNet (examples/LOG.md, 2026-11-25): on colon tiles moved by 2 px the backbone's cosine is 0.73 to
0.86 (5 %, median), while 10 % of *different* tiles have a neighbour above 0.87; the pictures' is 0.93 to 0.97, and no
two of 4,949 different tiles come above 0.83. Half and half found 92 % of the copies planted among painted tiles at 1 %
false, nine to one 99 %. The tenth keeps tiles of one outline and other content apart. Hence the default threshold of
0.9: between the copies and the others on real tissue, with most of the gap on the side of the others.

How: k-means cuts the vectors into about 2 sqrt(N) cells; a tile lives in its nearest cell and is a guest in the next
two; within a cell every inhabitant is compared with every inhabitant and guest, exactly, and without a limit on the
number of neighbours (a thousand copies of one tile are one group). Links are merged as they come, so pairs are never
held all at once. A pair is missed only if neither is a guest of the other.

10 million tiles, D + P = 640, 6,300 cells: 8.1e13 flops to find the cells and 1e14 to compare (cells of uneven size
included): 4 minutes on 16 cores, seconds on a GPU. Memory: 24 bytes a tile for cells, 16 for groups, 0.4 GB in all; one
cell's vectors; and before that the 316,000 that k-means sees, 0.8 GB, and twice that while they are read. Each tile's
vector is read from disk four times (to find its cells, at home and twice as a guest): 51 GB, mostly in scattered rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from histossl.curation.faiss_kmeans import centres_of, nearest
from histossl.curation.features import Features, Floats, pieces
from histossl.tiles.stream.sampler import Ints, keys

ONE_CELL = 4096  # so few tiles are all compared with each other
CELLS_PER_ROOT = 2.0
GUESTS = 2  # further cells in which a tile is a guest
TRAINING = 50  # vectors per cell that k-means sees
ROWS, COLUMNS = 1024, 8192  # of a block of cosines: 34 MB
LINKS_HELD = 1 << 22
EXAMPLES = 64  # pairs kept per band of cosines
FAR_BELOW = 0.15  # pairs so far below the threshold still become examples, where none is nearer
LOOKED_AT = 4096  # pairs of a block, at most, that may become examples


@dataclass(frozen=True)
class Copies:
    """Of n tiles, by their place among them."""

    stands_for: Ints  # (n,) place of the group's first tile; its own for who is in no group
    nearest: Floats  # (n,) cosine to the nearest other tile that it was compared with
    pairs: Ints = field(default_factory=lambda: np.zeros((0, 2), np.int64))  # examples, just above and below
    cosines: Floats = field(default_factory=lambda: np.zeros(0, np.float32))  # of the pairs

    @property
    def dropped(self) -> NDArray[np.bool_]:
        others: NDArray[np.bool_] = self.stands_for != np.arange(len(self.stands_for))
        return others


def bands_of(cosine: float) -> Floats:
    """Edges of the bands of cosines from which examples are shown: two below the threshold, two above."""
    step = min(0.02, (1 - cosine) / 2)
    return np.array([cosine - FAR_BELOW, cosine - step, cosine, cosine + step, 1.01], dtype=np.float32)


def find_copies(
    features: Features,
    numbers: Ints,
    cosine: float,
    seed: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda _: None,
) -> Copies:
    """Compare all of `numbers` with each other. `advance` is told how many more have been compared."""
    num = len(numbers)
    home, guests = _cells(features, numbers, seed)
    by_home = np.argsort(home, kind="stable")
    by_guest = np.argsort(guests.ravel(), kind="stable")
    num_cells = int(home.max()) + 1
    home_ends = np.searchsorted(home[by_home], np.arange(num_cells + 1))
    guest_ends = np.searchsorted(guests.ravel()[by_guest], np.arange(num_cells + 1))
    groups, examples = Groups(num), _Examples(bands_of(cosine))
    nearest_N = torch.full((num,), -1.0)
    for cell in range(num_cells):
        mine = by_home[home_ends[cell] : home_ends[cell + 1]]
        if not len(mine):
            continue
        visiting = by_guest[guest_ends[cell] : guest_ends[cell + 1]] // max(1, guests.shape[1])
        _compare(features, numbers, mine, visiting, cosine, device, groups, examples, nearest_N)
        features.release()
        advance(len(mine))
    pairs, cosines = examples.taken()
    return Copies(groups.first(), nearest_N.numpy(), pairs, cosines)


def _cells(features: Features, numbers: Ints, seed: int) -> tuple[Ints, NDArray[np.int32]]:
    """(home cell of each (n,), cells where it is a guest (n, GUESTS))."""
    num = len(numbers)
    if num <= ONE_CELL:
        return np.zeros(num, dtype=np.int64), np.zeros((num, 0), dtype=np.int32)
    count = round(CELLS_PER_ROOT * num**0.5)
    chosen = np.sort(np.random.default_rng(seed).choice(num, min(num, TRAINING * count), replace=False))
    centres = centres_of(features.shown_and_where(numbers[chosen]), count, seed)
    found = []
    for piece in pieces(numbers):
        found.append(nearest(features.shown_and_where(piece), centres, 1 + GUESTS)[1].astype(np.int32))
        features.release()
    cells = np.concatenate(found)
    return cells[:, 0].astype(np.int64), cells[:, 1:]


def _compare(
    features: Features,
    numbers: Ints,
    mine: Ints,
    visiting: Ints,
    cosine: float,
    device: torch.device,
    groups: Groups,
    examples: _Examples,
    nearest_N: torch.Tensor,
) -> None:
    """Everyone of `mine` with everyone of `mine` and of `visiting`: places among `numbers`."""
    places = np.concatenate([mine, visiting])
    vectors = torch.from_numpy(features.shown_and_where(numbers[places])).to(device)
    place_of = torch.from_numpy(places)
    for top in range(0, len(mine), ROWS):
        rows = slice(top, min(top + ROWS, len(mine)))
        for left in range(top, len(places), COLUMNS):  # what is left of `top` was compared from the other side
            columns = slice(left, left + COLUMNS)
            cosines_RC = vectors[rows] @ vectors[columns].T
            cosines_RC.diagonal(top - left).fill_(-1)  # with itself
            for dim, here in ((1, rows), (0, columns)):
                seen = place_of[here]
                nearest_N[seen] = torch.maximum(nearest_N[seen], cosines_RC.amax(dim).cpu())
            row, column = (cosines_RC >= examples.least).nonzero(as_tuple=True)
            found = cosines_RC[row, column].cpu().numpy()
            one, other = places[rows][row.cpu().numpy()], places[columns][column.cpu().numpy()]
            groups.link(one[found >= cosine], other[found >= cosine])
            examples.look_at(one, other, found)


class Groups:
    """Groups of 0 .. n-1 that links join, as they come. Each is called after its first member."""

    def __init__(self, num: int) -> None:
        self._first = np.arange(num, dtype=np.int64)
        self._held: list[tuple[Ints, Ints]] = []
        self._num_held = 0

    def link(self, one: Ints, other: Ints) -> None:
        if len(one):
            self._held.append((one, other))
            self._num_held += len(one)
            if self._num_held > LINKS_HELD:
                self._merge()

    def first(self) -> Ints:
        self._merge()
        return self._first

    def _merge(self) -> None:
        if not self._held:
            return
        num = len(self._first)
        one, other = (self._first[np.concatenate(side)] for side in zip(*self._held, strict=True))
        graph = coo_array((np.ones(len(one), dtype=np.uint8), (one, other)), shape=(num, num))
        _, group = connected_components(graph, directed=False)
        lowest = np.empty(num, dtype=np.int64)
        lowest[group[::-1]] = np.arange(num)[::-1]  # the last to be written is the first member
        self._first = lowest[group[self._first]]
        self._held, self._num_held = [], 0


class _Examples:
    """A few pairs from each band of cosines: those with the smallest hash, so chance alone chooses, the same always.

    Of the lowest band those nearest to the threshold.
    """

    def __init__(self, edges: Floats) -> None:
        self._edges = edges
        self.least = float(edges[0])
        self._pairs = np.zeros((0, 2), np.int64)
        self._cosines = np.zeros(0, np.float32)

    def look_at(self, one: Ints, other: Ints, cosines: Floats) -> None:
        if not len(one):
            return
        looked = np.unique(np.linspace(0, len(one) - 1, LOOKED_AT).astype(np.int64))
        found = np.sort(np.stack([one[looked], other[looked]], axis=1), axis=1)
        found, once = np.unique(np.concatenate([self._pairs, found]), axis=0, return_index=True)
        cosines = np.concatenate([self._cosines, cosines[looked]])[once]
        band = np.digitize(cosines, self._edges)
        chance = keys(0, found[:, 0], found[:, 1]) / 2.0**64
        order = np.lexsort((np.where(band == 1, 1 - cosines, chance), band))
        rank = np.arange(len(order)) - np.searchsorted(band[order], band[order])
        kept = order[rank < EXAMPLES]
        self._pairs, self._cosines = found[kept], cosines[kept]

    def taken(self) -> tuple[Ints, Floats]:
        return self._pairs, self._cosines
