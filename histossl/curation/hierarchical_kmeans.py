"""A balanced choice of tiles: hierarchical k-means with resampling, then sampling from the top of the tree downwards.

k-means puts its centres where the data is dense: most clusters of an archive are of the commonest tissue, so taking as
many tiles from each cluster balances nothing. Vo et al. 2024 (arXiv 2405.15613) flatten it in two ways, which are
written here from the paper:

* **Resampling.** Keep the few tiles nearest to each centre and run k-means on those alone: dense regions now weigh as
  much as their centres, no more. Repeated, the centres spread over the data's support whatever its density.
* **Levels.** The same again on the centres, and on the centres of those: a rare tissue that holds one fine cluster in a
  hundred holds one coarse cluster in ten.

What it needs besides, each measured by taking it away (examples/LOG.md, 2026-11-25), on painted kinds that anyone can
tell apart and that come out at 2 to 8:1 of 108:1 with all of it:

* The features as the backbone gives them. Taking the pool's mean out before they are made unit length, as the search
  for copies does, blows up the commonest kind, for the mean lies in its midst: 23 to 158:1.
* Centres that begin far apart (k-means++, in rounds: Bahmani et al. 2012, arXiv 1203.6402). Begun at random, a kind of
  one tile in a hundred has no centre of its own, and Lloyd's steps do not find it: 15 to 58:1.
* Small steps from level to level. Where four clusters become one, a rare kind, which is one point there, sooner goes
  with its neighbours than they with each other: 5 to 96:1.

What is flattened is density over what the features spread out. **A kind gains as far as it lies outside of what the
common kind spreads over**; one that is labelled by slide, and whose tiles are mostly the stroma of all slides, cannot
(bench_curate.py painted; LOG). `--like-slides` is the way to have more of something rare that is known.

Then the wanted number is poured over the coarsest clusters like water (the same for each, a small one gives all it has
and the rest is shared by the others), each share over the finer clusters below, and in a finest cluster chance chooses.
Chance also gives out what cannot be shared alike, as in the paper: to the largest would be to the frequent.

Unlike the paper's, centres are made unit length. Plain means of many rare kinds lie near the origin, close to all, and
one such cluster swallows them: 2,000 kinds of vectors by Zipf's law became less even instead of more.

Finest level: 4 sqrt(N) clusters, each further level five sixths, 17 levels; 10 million tiles: 12,649 to 682. Levels
so close leave nothing to resample (two clusters for each of the next would be the least), so that works on the finest.
Assigning 10 million tiles of D = 384 takes 9.7e13 flops and is done RESAMPLINGS + 1 times,
k-means between them 1e14 in all: about 9 minutes on 16 cores (1 Tflop/s). Memory: 40 bytes a tile while they are
sorted, and the 632,000 vectors of the first k-means, 1 GB, and twice that while they are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from histossl.curation.faiss_kmeans import nearest, settled_centres_of
from histossl.curation.features import PIECE, Floats, pieces
from histossl.tiles.stream.sampler import Ints, keys

LEVELS = 17
FEWER = 1.2  # clusters of a level for one of the next
CLUSTERS_PER_ROOT = 4.0
FEWEST = 4
RESAMPLINGS = 3  # of the finest level, where each one assigns all tiles anew
RESAMPLINGS_ABOVE = 10  # where clusters are given that hold four of the level below; the default's do not
RESAMPLED = 3  # tiles nearest to each centre that k-means sees again, or half of the cluster's mean size if it is 2
TRAINING = 50  # vectors per centre in the first k-means
TRIES_ABOVE = 10  # of k-means above the finest level


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
    while len(counts) < LEVELS and int(counts[-1] / FEWER) >= FEWEST:
        counts.append(int(counts[-1] / FEWER))
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
        turns, tries, told = (RESAMPLINGS_ABOVE, TRIES_ABOVE, _nobody) if level else (RESAMPLINGS, 1, advance)
        assigned, centres = resampled_kmeans(get, here, count, turns, tries, seed + level, told)
        parents.append(assigned)
        get, here = centres.__getitem__, np.arange(len(centres))
    return Tree(tuple(parents))


def resampled_kmeans(
    vectors: Callable[[Ints], Floats],
    numbers: Ints,
    count: int,
    turns: int,
    tries: int,
    seed: int,
    advance: Callable[[int], None] = _nobody,
) -> tuple[Ints, Floats]:
    """(cluster of each (n,), centres (K, D)), where density has been flattened `turns` times."""
    num = len(numbers)
    count = min(count, num)
    sample = np.sort(np.random.default_rng(seed).choice(num, min(num, TRAINING * count), replace=False))
    centres = settled_centres_of(vectors(numbers[sample]), count, seed, tries)
    taken = min(RESAMPLED, num // count // 2)
    for turn in range(turns if taken > 1 else 0):  # one tile of each says no more than its centre, as in the paper
        cluster, cosine = _assigned(vectors, numbers, centres, advance)
        order = np.lexsort((-cosine, cluster))
        rank = np.arange(num) - np.searchsorted(cluster[order], cluster[order])
        kept = np.sort(order[rank < taken])
        centres = settled_centres_of(vectors(numbers[kept]), count, seed + turn + 1, tries)
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


def water_filled(wanted: int, room: Ints, rng: np.random.Generator) -> Ints:
    """`wanted` shared over places that hold `room` each: alike, as far as room goes. Chance gives out the rest, one to
    a place that has room."""
    left = min(wanted, int(room.sum()))
    share = np.zeros_like(room)
    for done, place in enumerate(np.argsort(room, kind="stable")):
        level = (left - int(share.sum())) // (len(room) - done)
        if room[place] > level:  # and so is every further one
            share = np.minimum(room, level)
            break
        share[place] = room[place]
    open_places = np.flatnonzero(room > share)
    share[rng.choice(open_places, left - int(share.sum()), replace=False)] += 1
    return share


def balanced(tree: Tree, numbers: Ints, wanted: int, seed: int) -> Ints:
    """(wanted,) places of the chosen tiles, rising; all of them where there are fewer."""
    of_tiles = tree._of_tiles()
    room = [np.bincount(level).astype(np.int64) for level in of_tiles]
    rng = np.random.default_rng(seed)
    share = water_filled(wanted, room[-1], rng)
    for level in reversed(range(len(room) - 1)):
        finer: Ints = np.zeros(len(room[level]), dtype=np.int64)
        above = tree.parents[level + 1][: len(finer)]
        for cluster in np.flatnonzero(share):
            below = np.flatnonzero(above == cluster)
            finer[below] = water_filled(int(share[cluster]), room[level][below], rng)
        share = finer
    of_finest = of_tiles[0]
    order = np.lexsort((keys(seed, numbers), of_finest))
    rank = np.arange(len(order)) - np.searchsorted(of_finest[order], of_finest[order])
    chosen: Ints = np.sort(order[rank < share[of_finest[order]]])
    return chosen
