"""Random numbers that belong to the sample: each is a function of (seed, position, view, what it is for).

Nothing here has a state, so a tile's views are the same in any batch, on any process, before and after a resume, and
leaving one op out changes no other. They are drawn on the CPU, a few numbers a tile, so that the GPU sees the same
ones and is never waited for to learn which samples an op applies to.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from histossl.tiles.stream.sampler import Ints, Keys, keys

Floats = NDArray[np.float64]


class Draws:
    """The random numbers of one view of the tiles at `positions` (B,) of the stream."""

    def __init__(self, seed: int, positions: Ints, view: int) -> None:
        self.count = len(positions)
        self._keys: Keys = keys(seed, positions, np.int64(view))

    def uniform(self, purpose: str, low: float = 0.0, high: float = 1.0, times: int = 1) -> Floats:
        """(B, times) numbers in [low, high)."""
        # A name's checksum, not its place in a list: a new op must not change the draws of the old ones.
        number = np.uint64(zlib.crc32(purpose.encode()) << 16) + np.arange(times, dtype=np.uint64)
        bits = _spread(self._keys[:, None] ^ number)
        return low + (high - low) * ((bits >> np.uint64(11)).astype(np.float64) / 2.0**53)

    def one(self, purpose: str, low: float = 0.0, high: float = 1.0) -> Floats:
        """(B,) numbers in [low, high)."""
        return self.uniform(purpose, low, high)[:, 0]

    def happens(self, purpose: str, probability: float) -> NDArray[np.bool_]:
        """(B,) coins."""
        return self.one(f"{purpose}?") < probability

    def whole(self, purpose: str, limit: int) -> Ints:
        """(B,) whole numbers in 0..limit-1."""
        return np.minimum((self.one(purpose) * limit).astype(np.int64), limit - 1)

    def normal(self, purpose: str, times: int) -> Floats:
        """(B, times) standard normal numbers (Box and Muller)."""
        pairs = self.uniform(purpose, times=2 * times)
        radius: Floats = np.sqrt(-2 * np.log1p(-pairs[:, :times]))
        return radius * np.cos(2 * np.pi * pairs[:, times:])


def _spread(bits: Keys) -> Keys:
    return keys(0, bits)
