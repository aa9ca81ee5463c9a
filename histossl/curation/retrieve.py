"""The tiles of the pool that are most like some examples: self-supervised image retrieval (DINOv2, section 3).

Every example ranks the pool by cosine. Tiles are taken in turns: the first of every example, then the second of every
one, and so on, so that examples of a rare kind get as many tiles as those of a common one. Within a turn the most alike
come first. Without a wanted number each example gives its 4 nearest, as in the paper.

Many examples say little more than some: at most EXAMPLES_MOST are asked, chosen by chance, slide by slide alike.
10,000 examples against 10 million tiles of D = 384: exact search, 7.7e13 flops, 80 s on 16 cores; the pool streams by
in pieces, memory is 10,000 x ranks x 12 bytes, at most 120 MB, and 0.7 GB while pieces are merged and put in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from histossl.core.config import NEIGHBOURS
from histossl.curation.faiss_kmeans import nearest
from histossl.curation.features import PIECE, Floats, pieces
from histossl.curation.hierarchical_kmeans import water_filled
from histossl.tiles.stream.sampler import Ints, keys

EXAMPLES_MOST = 10_000
RANKS_MOST = 1000


@dataclass(frozen=True)
class Retrieved:
    """Places in the pool, and for the eyes which example brought each."""

    places: Ints  # in the order in which they were taken
    asked: Ints  # place of the example that brought it
    cosines: Floats


def thinned(numbers: Ints, owner: Ints, seed: int, most: int = EXAMPLES_MOST) -> Ints:
    """At most `most` of `numbers`, as many from each owner as it has, by chance but always the same."""
    _, owner, room = np.unique(owner, return_inverse=True, return_counts=True)
    share = water_filled(most, room, np.random.default_rng(seed))
    order = np.lexsort((keys(seed, numbers), owner))
    rank = np.arange(len(order)) - np.searchsorted(owner[order], owner[order])
    kept: Ints = numbers[np.sort(order[rank < share[owner[order]]])]
    return kept


def retrieve(
    vectors: Callable[[Ints], Floats],
    examples: Ints,
    pool: Ints,
    wanted: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Retrieved:
    """The `wanted` tiles of `pool` most like `examples`, in turns; 0: the NEIGHBOURS nearest of each example.

    Fewer, where the examples agree so much that RANKS_MOST of each do not reach so many different tiles.
    """
    ranks = NEIGHBOURS if not wanted else min(RANKS_MOST, max(2 * NEIGHBOURS, -(-4 * wanted // len(examples))))
    asked = vectors(examples)
    while True:
        cosine_QR, place_QR = _ranked(vectors, asked, pool, ranks, advance)
        turn, example = np.meshgrid(np.arange(cosine_QR.shape[1]), np.arange(len(examples)))
        order = np.lexsort((place_QR.ravel(), -cosine_QR.ravel(), turn.ravel()))
        place = place_QR.ravel()[order]
        first = np.sort(np.unique(place, return_index=True)[1])
        enough = not wanted or len(first) >= wanted
        if enough or ranks >= min(RANKS_MOST, len(pool)):
            break
        ranks = min(RANKS_MOST, 4 * ranks)
    taken = order[first[: wanted or None]]
    return Retrieved(place_QR.ravel()[taken], example.ravel()[taken], cosine_QR.ravel()[taken])


def _ranked(
    vectors: Callable[[Ints], Floats], asked_QD: Floats, pool: Ints, ranks: int, advance: Callable[[int], None]
) -> tuple[Floats, Ints]:
    """(cosines (Q, R), places in the pool (Q, R)), nearest first."""
    cosine_QR = np.zeros((len(asked_QD), 0), np.float32)
    place_QR = np.zeros((len(asked_QD), 0), np.int64)
    for count, piece in enumerate(pieces(pool)):
        cosine, place = nearest(asked_QD, vectors(piece), ranks)
        cosine = np.concatenate([cosine_QR, cosine], axis=1)
        place = np.concatenate([place_QR, place + count * PIECE], axis=1)
        order = np.argsort(-cosine, axis=1, kind="stable")[:, :ranks]
        cosine_QR = np.take_along_axis(cosine, order, axis=1)
        place_QR = np.take_along_axis(place, order, axis=1)
        advance(len(piece))
    return cosine_QR, place_QR
