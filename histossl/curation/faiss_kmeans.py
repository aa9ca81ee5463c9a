"""faiss, in what curation needs: k-means centres, and the nearest of some vectors.

On the CPU, or on the GPUs of a faiss that was built for them. faiss is imported when first needed: it brings its own
OpenMP beside torch's, so its threads are set to torch's number, and never run at the same time as torch's.

Time of one `nearest` is N x K x 2 D flops. On 16 cores (about 1 Tflop/s of single precision) with 10 million tiles,
D = 384 and 12,600 centres: 100 s.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
import torch

from histossl.curation.features import Floats
from histossl.tiles.stream.sampler import Ints

ITERATIONS = 10
ROUNDS = 8  # in which the first centres of `settled_centres_of` are drawn


@functools.cache
def _faiss() -> Any:
    with warnings.catch_warnings():  # SWIG's, about types of its own, on newer Pythons
        warnings.simplefilter("ignore", DeprecationWarning)
        import faiss
    return faiss


def _ready() -> tuple[Any, int]:
    """faiss with torch's number of threads, and how many GPUs it can use."""
    faiss = _faiss()
    faiss.omp_set_num_threads(torch.get_num_threads())
    gpus = int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0
    return faiss, gpus


def centres_of(x_ND: Floats, count: int, seed: int) -> Floats:
    """(K, D) unit-length centres of unit-length vectors: spherical k-means. K is `count`, or fewer for few vectors."""
    count = min(count, len(x_ND))
    if count == len(x_ND):
        return x_ND.copy()
    return _kmeans(x_ND, count, seed)[0]


def settled_centres_of(x_ND: Floats, count: int, seed: int, tries: int = 1) -> Floats:
    """As `centres_of`, begun far apart, and the best of some tries: the sum of cosines is largest."""
    count = min(count, len(x_ND))
    if count == len(x_ND):
        return x_ND.copy()
    found = []
    for number in range(tries):
        start_KD = x_ND[far_apart(x_ND, count, np.random.default_rng([seed, number]))]
        found.append(_kmeans(x_ND, count, seed, start_KD))
    return max(found, key=lambda one: one[1])[0]


def far_apart(x_ND: Floats, count: int, rng: np.random.Generator) -> Ints:
    """(count,) places, the first by chance, then in rounds: each by the square of its distance to those before.

    A round costs one comparison with its new centres, so all of them what one step of k-means costs. Drawing one at a
    time (k-means++) would read all vectors for every centre.
    """
    new = chosen = rng.choice(len(x_ND), 1)
    apart = np.full(len(x_ND), np.inf, np.float32)
    while len(chosen) < count:
        cosine = nearest(x_ND, x_ND[new])[0][:, 0]
        np.minimum(apart, np.maximum(2 - 2 * cosine, 0), out=apart)
        with np.errstate(divide="ignore", invalid="ignore"):
            turn = rng.standard_exponential(len(x_ND)) / apart  # the smallest: drawn in proportion, each once
        turn[chosen] = np.nan  # sorted behind all others, copies of chosen ones too
        new = np.argsort(turn)[: min(-(-count // ROUNDS), count - len(chosen))]
        chosen = np.concatenate([chosen, new])
    return chosen


def _kmeans(x_ND: Floats, count: int, seed: int, start_KD: Floats | None = None) -> tuple[Floats, float]:
    """(centres, sum of the cosines to them)."""
    faiss, gpus = _ready()
    kmeans = faiss.Kmeans(
        x_ND.shape[1],
        count,
        niter=ITERATIONS,
        spherical=True,
        seed=seed % 2**31,
        gpu=gpus > 0,
        min_points_per_centroid=1,
        max_points_per_centroid=len(x_ND),  # who calls has chosen the sample
    )
    kmeans.train(np.ascontiguousarray(x_ND), init_centroids=start_KD)
    return kmeans.centroids, float(kmeans.obj[-1])


def nearest(x_ND: Floats, among_KD: Floats, k: int = 1) -> tuple[Floats, Ints]:
    """(cosines (N, k), places among `among_KD` (N, k)) of the k nearest by dot product, nearest first."""
    faiss, gpus = _ready()
    k = min(k, len(among_KD))
    if gpus:
        cosine, place = faiss.knn_gpu(
            faiss.StandardGpuResources(), x_ND, among_KD, k, metric=faiss.METRIC_INNER_PRODUCT
        )
    else:
        cosine, place = faiss.knn(x_ND, among_KD, k, metric=faiss.METRIC_INNER_PRODUCT)
    return cosine, place.astype(np.int64)
