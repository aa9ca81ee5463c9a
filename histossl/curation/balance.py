"""A balanced choice of tiles: hierarchical k-means with resampling, then sampling from the top of the tree downwards.

k-means puts its centres where the data is dense: most clusters of an archive are of the commonest tissue, so taking as
many tiles from each cluster balances nothing. Vo et al. 2024 (arXiv 2405.15613) flatten it in two ways, which are
written here from the paper:

* **Resampling.** Keep the few tiles nearest to each centre and run k-means on those alone: dense regions now weigh as
  much as their centres, no more. Repeated, the centres spread over the data's support whatever its density.
* **Levels.** The same again on the centres, and on the centres of those: a rare tissue that holds one fine cluster in a
  hundred holds one coarse cluster in ten.

What that flattens is density over what the features spread out, so **a rare kind gains only if it takes room of its
own there**. Kinds of vectors that lie apart go from 100:1 to under 10:1 (tests/curation/test_balance.py). The painter's
classes do not: to ImageNet's features a few tiles of carcinoma are among many of all sorts, and 109:1 stays above 60:1
(bench_curate.py painted; examples/LOG.md, 2026-11-25). A kind that is compact loses, even.
`--like-slides` is the way to have more of something rare that is known.

Then the wanted number is poured over the coarsest clusters like water (the same for each, a small one gives all it has
and the rest is shared by the others), each share over the finer clusters below, and in a finest cluster chance chooses.

Finest level: 4 sqrt(N) clusters, each further level a quarter, three levels; 10 million tiles: 12,649, 3,162, 790.
(With an eighth the top of a small archive has fewer clusters than there are kinds of tissue, and a rare one hides
beside a frequent one.) Assigning 10 million tiles of D = 384 takes 9.7e13 flops and is done RESAMPLINGS + 1 times,
k-means between them 6e13 in all: about 8 minutes on 16 cores (1 Tflop/s). Memory: 40 bytes a tile while they are
sorted, and the 632,000 vectors of the first k-means, 1 GB, and twice that while they are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from histossl.curation.features import PIECE, Floats, pieces
from histossl.curation.near import centres_of, nearest
from histossl.tiles.sampling import Ints, keys

LEVELS = 3
FEWER = 4  # clusters of a level for one of the next
CLUSTERS_PER_ROOT = 4.0
FEWEST = 4
RESAMPLINGS = 3  # of the finest level, where each one assigns all tiles anew
RESAMPLINGS_ABOVE = 10
RESAMPLED = 3  # tiles nearest to each centre that k-means sees again, or half of the cluster's mean size
TRAINING = 50  # vectors per centre in the first k-means


def _nobody(_: int) -> None:
    pass


@dataclass(frozen=True)
class Tree:
    """`parents[0][tile]` is its finest cluster, `parents[1][cluster]` that one's cluster, and so on, finest first."""

    parents: tuple[Ints, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Clusters of each level that hold a tile."""
        return tuple(len(np.unique(level)) for level in self._of_tiles())

    def _of_tiles(self) -> list[Ints]:
        """For each level: the cluster of each tile."""
        found = [self.parents[0]]
        for level in self.parents[1:]:
            found.append(level[found[-1]])
        return found

    @property
    def coarsest(self) -> Ints:
        """(n,) cluster of each tile at the top."""
        return self._of_tiles()[-1]


def clusters_for(num: int) -> tuple[int, ...]:
    """Clusters of each level, finest first."""
    counts = [max(FEWEST, round(CLUSTERS_PER_ROOT * num**0.5))]
    while len(counts) < LEVELS and counts[-1] // FEWER >= FEWEST:
        counts.append(counts[-1] // FEWER)
    return tuple(counts)


def tree_of(
    vectors: Callable[[Ints], Floats],
    numbers: Ints,
    clusters: tuple[int, ...],
    seed: int,
    advance: Callable[[int], None] = _nobody,
) -> Tree:
    """Cluster the unit-length `vectors` of `numbers`. `advance` is told of each tile that was assigned."""
    parents = []
    get, here = vectors, numbers
    for level, count in enumerate(clusters):
        turns, told = (RESAMPLINGS_ABOVE, _nobody) if level else (RESAMPLINGS, advance)
        assigned, centres = resampled_kmeans(get, here, count, turns, seed + level, told)
        parents.append(assigned)
        get, here = centres.__getitem__, np.arange(len(centres))
    return Tree(tuple(parents))


def resampled_kmeans(
    vectors: Callable[[Ints], Floats],
    numbers: Ints,
    count: int,
    turns: int,
    seed: int,
    advance: Callable[[int], None] = _nobody,
) -> tuple[Ints, Floats]:
    """(cluster of each (n,), centres (K, D)), where density has been flattened `turns` times."""
    num = len(numbers)
    count = min(count, num)
    sample = np.sort(np.random.default_rng(seed).choice(num, min(num, TRAINING * count), replace=False))
    centres = centres_of(vectors(numbers[sample]), count, seed)
    taken = max(1, min(RESAMPLED, num // count // 2))
    for turn in range(turns):
        cluster, cosine = _assigned(vectors, numbers, centres, advance)
        order = np.lexsort((-cosine, cluster))
        rank = np.arange(num) - np.searchsorted(cluster[order], cluster[order])
        kept = np.sort(order[rank < taken])
        centres = centres_of(vectors(numbers[kept]), min(count, len(kept)), seed + turn + 1)
    return _assigned(vectors, numbers, centres, advance)[0], centres


def _assigned(
    vectors: Callable[[Ints], Floats], numbers: Ints, centres: Floats, advance: Callable[[int], None]
) -> tuple[Ints, Floats]:
    """(nearest centre of each, its cosine), piece by piece."""
    cluster = np.empty(len(numbers), dtype=np.int64)
    cosine = np.empty(len(numbers), dtype=np.float32)
    for count, piece in enumerate(pieces(numbers)):
        here = slice(count * PIECE, count * PIECE + len(piece))
        best, place = nearest(vectors(piece), centres)
        cluster[here], cosine[here] = place[:, 0], best[:, 0]
        advance(len(piece))
    return cluster, cosine


# ---- from the top downwards


def water_filled(wanted: int, room: Ints) -> Ints:
    """`wanted` shared over places that hold `room` each: alike, as far as room goes. What cannot be shared alike goes
    to the largest."""
    share = np.zeros_like(room)
    left = min(wanted, int(room.sum()))
    for done, place in enumerate(np.argsort(room, kind="stable")):
        share[place] = min(int(room[place]), left // (len(room) - done))
        left -= int(share[place])
    return share


def balanced(tree: Tree, numbers: Ints, wanted: int, seed: int) -> Ints:
    """(wanted,) places of the chosen tiles, rising; all of them where there are fewer."""
    of_tiles = tree._of_tiles()
    room = [np.bincount(level).astype(np.int64) for level in of_tiles]
    share = water_filled(wanted, room[-1])
    for level in reversed(range(len(room) - 1)):
        finer: Ints = np.zeros(len(room[level]), dtype=np.int64)
        above = tree.parents[level + 1][: len(finer)]
        for cluster in np.flatnonzero(share):
            below = np.flatnonzero(above == cluster)
            finer[below] = water_filled(int(share[cluster]), room[level][below])
        share = finer
    of_finest = of_tiles[0]
    order = np.lexsort((keys(seed, numbers), of_finest))
    rank = np.arange(len(order)) - np.searchsorted(of_finest[order], of_finest[order])
    chosen: Ints = np.sort(order[rank < share[of_finest[order]]])
    return chosen
