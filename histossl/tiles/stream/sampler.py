"""Which tile is drawn when: seeded, slide-balanced, resumable, and the same on any number of processes.

The stream of tiles is endless and every place in it can be asked for by its number (its *position*): position p is
the same tile whoever asks, so a resumed run, or one on another number of GPUs, goes on in the same order. Nothing is
stored per tile: an epoch's order is a keyed permutation, worked out for the positions that are asked for. 100 million
tiles cost the memory of their slides' counts.

    order = TileOrder(index, seed=0, slide_balance=0.5)
    order.tile_numbers(start=0, count=256)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from histossl.core.errors import UsageError

Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]

# Of the Feistel network. Two places of a size of 5 fall on all 20 pairs alike from 10 rounds on (chi-square over 60,000
# keys; 6 rounds miss by 35 standard deviations). It costs 2 microseconds a tile.
ROUNDS = 12
FRACTION_BITS = 20  # a slide's draws per epoch, as a fixed-point number: exact, and the same on every machine


class Slides(Protocol):
    """What the order needs to know of a TileIndex: which tile numbers belong to which slide."""

    @property
    def slides(self) -> Sequence[str]: ...

    def tiles_of(self, slide: str) -> range: ...


class TileOrder:
    """The endless stream of tile numbers.

    `slide_balance` a in 0..1: a slide of n tiles is drawn in proportion to n^(1-a). 0: every tile equally often, an
    epoch is each tile exactly once. 1: every slide equally often. An epoch is always `num_tiles` positions; a slide's
    share of it is kept to within two draws, and its own tiles are gone through completely before any comes again.

    `keep` narrows the pool to slides: one bool per slide of the index (patients left out). `tiles` narrows it to the
    tiles of a subset, by their numbers; sorted and memory-mapped (`tiles/store/subset.py`) they are read where they
    lie.
    """

    def __init__(
        self,
        index: Slides,
        seed: int,
        slide_balance: float = 0.0,
        keep: NDArray[np.bool_] | None = None,
        tiles: Ints | None = None,
    ) -> None:
        if not 0.0 <= slide_balance <= 1.0:
            raise UsageError(f"--slide-balance {slide_balance}: must be between 0 (tiles alike) and 1 (slides alike)")
        self.seed, self.slide_balance = seed, slide_balance
        ranges = [index.tiles_of(slide) for slide in index.slides]
        starts = np.array([tiles.start for tiles in ranges], dtype=np.int64)
        counts = np.array([len(tiles) for tiles in ranges], dtype=np.int64)
        self._tiles: Ints | None = None  # only for a pool given tile by tile
        if tiles is not None:
            self._tiles = tiles if _rises(tiles) else np.unique(tiles.astype(np.int64))
            first, last = (np.searchsorted(self._tiles, edge) for edge in (starts, starts + counts))
            starts, counts = first.astype(np.int64), (last - first).astype(np.int64)
            if counts.sum() != len(self._tiles):
                raise ValueError("tiles names tiles that are not in the index")
        if keep is not None:
            if len(keep) != len(counts):
                raise ValueError(f"keep has {len(keep)} values for {len(counts)} slides")
            counts = np.where(keep, counts, 0)
        self._slide = np.flatnonzero(counts)  # slides with nothing left take no part
        self._starts, self._counts = starts[self._slide], counts[self._slide]
        self.num_tiles = int(self._counts.sum())
        if self.num_tiles == 0:
            raise UsageError("no tiles to draw from: every slide is excluded or empty")
        self._drawn_fixed = _cumulative_draws(self._counts, slide_balance)

    @property
    def num_slides(self) -> int:
        return len(self._slide)

    def company(self) -> tuple[float, float]:
        """How likely two draws are of one slide, and of one tile: sums of squared shares."""
        share_S = np.diff(self._drawn_fixed) / self._drawn_fixed[-1]
        return float((share_S**2).sum()), float((share_S**2 / self._counts).sum())

    def epoch_of(self, position: int) -> int:
        return position // self.num_tiles

    def tile_numbers(self, start: int, count: int) -> Ints:
        """The tiles at positions start, start + 1, ... (count,) int64."""
        return self.tiles_at(np.arange(start, start + count, dtype=np.int64))

    def tiles_at(self, positions: Ints) -> Ints:
        """The tile at each of any positions, in any order."""
        epoch, place = np.divmod(positions, self.num_tiles)
        ticket = permuted(place, np.full_like(place, self.num_tiles), keys(self.seed, epoch, np.int64(-1)))
        if len(positions) and epoch.min() == epoch.max():
            owner, draw = self._owner(ticket, int(epoch[0]))
        else:
            owner, draw = np.empty_like(ticket), np.empty_like(ticket)
            for each in np.unique(epoch):
                here = epoch == each
                owner[here], draw[here] = self._owner(ticket[here], int(each))
        # A slide's tiles: through all of them in a shuffled order, then again in another one.
        cycle, place = np.divmod(draw, self._counts[owner])
        within = permuted(place, self._counts[owner], keys(self.seed, cycle, self._slide[owner]))
        pool = self._starts[owner] + within
        return pool if self._tiles is None else np.asarray(self._tiles[pool])

    def _owner(self, ticket: Ints, epoch: int) -> tuple[Ints, Ints]:
        """The slide that owns each of the epoch's tickets, and how often that slide was drawn before it, ever."""
        before = (epoch * self._drawn_fixed) >> FRACTION_BITS  # draws of slides 0..s in earlier epochs, floored
        in_epoch = (((epoch + 1) * self._drawn_fixed) >> FRACTION_BITS) - before
        owner = np.searchsorted(in_epoch[1:], ticket, side="right")
        earlier = before[owner + 1] - before[owner]
        return owner, earlier + ticket - in_epoch[owner]


def _rises(tiles: Ints, piece: int = 1 << 20) -> bool:
    """Whether they are sorted and all different, looked at piece by piece: memory-mapped ones stay where they are."""
    return tiles.dtype == np.int64 and all(
        bool((np.diff(tiles[first : first + piece + 1]) > 0).all()) for first in range(0, len(tiles), piece)
    )


def _cumulative_draws(counts: Ints, slide_balance: float) -> Ints:
    """(S + 1,) draws per epoch of slides 0..s-1, in fixed point; the last is exactly the number of tiles.

    No slide falls below one draw per epoch: n^(1-a) <= n, so the total of the weights never exceeds that of the tiles.
    """
    num_tiles, one = int(counts.sum()), 1 << FRACTION_BITS
    if slide_balance == 0:
        draws = counts * one
    else:
        weights = counts.astype(np.float64) ** (1.0 - slide_balance)
        draws = np.maximum(np.floor(weights / weights.sum() * num_tiles * one), one).astype(np.int64)
        draws[np.argmax(draws)] += num_tiles * one - int(draws.sum())
    return np.concatenate([[0], np.cumsum(draws)])


# ---- keyed permutations


def keys(seed: int, *numbers: NDArray[np.integer[Any]] | np.integer[Any]) -> Keys:
    """A 64-bit key for each (seed, number, number, ...), elementwise."""
    state = _mixed(np.array([seed & (2**64 - 1)], dtype=np.uint64))  # before the first number, or 0, 1 is as 1, 0
    for number in numbers:
        state = _mixed(state ^ np.asarray(number).astype(np.uint64))
    return state


def _mixed(x: Keys) -> Keys:
    """splitmix64's step (Steele, Lea, Flood 2014): an add and a finaliser that spread every bit over all 64."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def permuted(places: Ints, sizes: Ints, key: Keys) -> Ints:
    """Each place p in 0..size-1 under the permutation of that size that the key picks. Elementwise, without a table.

    A Feistel network on a grid of about sqrt(size) rows and columns: each round shifts one coordinate by a keyed
    function of the other, modulo its side, which any key can undo. The grid holds at most sqrt(size) places too
    many; who lands on one of these walks on until inside (Black and Rogaway 2002).
    """
    rows = np.ceil(np.sqrt(sizes.astype(np.float64))).astype(np.int64)
    columns = -(-sizes // rows)
    out = places.astype(np.int64, copy=True)
    key = np.broadcast_to(key, out.shape)
    outside = np.arange(out.size)
    while outside.size:
        out[outside] = _rounds(out[outside], rows[outside], columns[outside], key[outside])
        outside = outside[out[outside] >= sizes[outside]]
    return out


def _rounds(places: Ints, rows: Ints, columns: Ints, key: Keys) -> Ints:
    row, column = np.divmod(places, columns)
    for number in range(ROUNDS):
        round_key = _mixed(key + np.uint64(number))
        if number % 2 == 0:
            row = (row + _below(_mixed(round_key ^ column.astype(np.uint64)), rows)) % rows
        else:
            column = (column + _below(_mixed(round_key ^ row.astype(np.uint64)), columns)) % columns
    return row * columns + column


def _below(bits: Keys, limit: Ints) -> Ints:
    """31 random bits, reduced to 0..limit-1 (the sides are below 2^31 for any number of tiles that fits on earth)."""
    return ((bits >> np.uint64(33)).astype(np.int64)) % limit
