"""Time and peak memory of curating ready features: copies, balance and retrieval. Random clustered vectors.

    python tests/bench/bench_curate.py [TILES] [--tmp DIR]        default: 1,000,000 tiles of 384 features

2,000 kinds whose frequency falls like a Zipf law; 2 % of the tiles are copies of others with noise. The features' file
(1.3 GB for a million) is written first, and neither its time nor its memory is counted. Peak memory is that of the
process (VmHWM), mapped pages of the file included.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from histossl.curation.balance import balanced, clusters_for, tree_of
from histossl.curation.duplicates import find_copies
from histossl.curation.features import PICTURE, features_of, release
from histossl.curation.retrieve import retrieve

DIM, KINDS, COPIED, PIECE = 384, 2000, 0.02, 50_000


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def written(path: Path, num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(the file, kind of each tile, what each copy is a copy of). The last 2 % are copies of the first."""
    rng = np.random.default_rng(0)
    kinds = unit(rng.normal(size=(KINDS, DIM))).astype(np.float32)
    frequency = 1 / np.arange(1, KINDS + 1)
    of_kind = rng.choice(KINDS, num, p=frequency / frequency.sum())
    copied = int(COPIED * num)
    originals = rng.choice(num - copied, copied, replace=False)
    of_kind[num - copied :] = of_kind[originals]
    table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(num, DIM + PICTURE))
    for first in range(0, num, PIECE):
        size = min(PIECE, num - first)
        shown = kinds[of_kind[first : first + size]] + rng.normal(size=(size, DIM)).astype(np.float32) * 0.7 / DIM**0.5
        table[first : first + size, :DIM] = unit(shown)
        table[first : first + size, DIM:] = unit(rng.normal(size=(size, PICTURE)).astype(np.float32))
    for first in range(0, copied, PIECE):
        source = table[originals[first : first + PIECE]].astype(np.float32)
        noise = rng.normal(size=source.shape).astype(np.float32) * 0.01
        here = slice(num - copied + first, num - copied + first + len(source))
        table[here, :DIM], table[here, DIM:] = unit((source + noise)[:, :DIM]), unit((source + noise)[:, DIM:])
    table.flush()
    release(table)
    return table, of_kind, originals


def peak_gb() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def timed(what: str, function: Callable[[], object]) -> object:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    began_s, cpu_s = time.perf_counter(), time.process_time()
    found = function()
    took_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    print(f"{what}: {took_s:.0f} s, {cpu_s:.0f} s of CPU, peak {peak_gb():.2f} GB", flush=True)
    return found


def main() -> None:
    given = [word for word in sys.argv[1:] if word.isdecimal()]
    num = int(given[0]) if given else 1_000_000
    where = sys.argv[sys.argv.index("--tmp") + 1] if "--tmp" in sys.argv else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        table, of_kind, originals = written(Path(folder) / "features.npy", num)
        numbers = np.arange(num)
        features = features_of(table, numbers)
        print(f"{num:,} tiles, {DIM} + {PICTURE} values, {torch.get_num_threads()} threads", flush=True)
        copies = timed("copies", lambda: find_copies(features, numbers, 0.9, 0, torch.device("cpu")))
        planted = np.arange(num - len(originals), num)
        found = (copies.stands_for[planted] == copies.stands_for[originals]).mean()
        false = copies.dropped.sum() - copies.dropped[planted].sum()
        print(f"  {found:.2%} of {len(planted):,} planted copies found, {false} others dropped")
        kept = numbers[~copies.dropped]
        clusters = clusters_for(len(kept))
        tree = timed(f"balance {clusters}", lambda: tree_of(features.shown, kept, clusters, 0))
        chosen = kept[balanced(tree, kept, num // 10, 0)]
        for when, tiles in (("before", kept), ("after", chosen)):
            counts = np.bincount(of_kind[tiles], minlength=KINDS)
            print(
                f"  {when}: the most frequent kind holds {counts.max() / counts.sum():.2%} of the tiles,"
                f" the rarer half of the kinds {counts[KINDS // 2 :].sum() / counts.sum():.2%}"
            )
        timed("retrieve 1,000 examples", lambda: retrieve(features.shown, kept[:1000], kept[1000:], num // 20))


if __name__ == "__main__":
    main()
