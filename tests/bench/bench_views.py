"""Tiles to views, per core, beside Pillow and torchvision: a table for examples/LOG.md.

    OMP_NUM_THREADS=1 python tests/bench/bench_views.py [WORKSPACE]        # without one: synthetic tiles of 256 px

Two minutes. Targets on one core, ratios within a run: the loader's share (decoding) at least 50x the reference
pipeline of MoCo v2, and at least 2x with the views made on the same core.
"""

import platform
import sys
from pathlib import Path

import torch

from histossl.tiles.index import TileIndex
from histossl.views.bench import SyntheticStore, view_rates
from histossl.views.recipe import recipe_named
from histossl.workspace import Workspace

CASES = [("mocov2", 224), ("mocov2-histology", 224), ("mocov2", 96), ("mocov2-histology", 96)]
REPEATS = 5


def main() -> None:
    given = sys.argv[1:]
    store = TileIndex.open(Workspace(Path(given[0]))) if given else SyntheticStore(256)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, tiles of {store.tile_px} px")
    print("| recipe | px | decode ms | views ms | reference ms | loader's share | with views |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, size_px in CASES:
        rates = view_rates(store, recipe_named(name, size_px), num_workers=2, num_tiles=192, repeats=REPEATS)
        cells = [f"{each.ms:.2f} ({each.spread})" for each in (rates.decode, rates.views, rates.reference)]
        print(
            f"| {name} | {size_px} | {' | '.join(cells)} | {rates.loader_gain:.0f}x | {rates.gain:.1f}x |", flush=True
        )


if __name__ == "__main__":
    main()
