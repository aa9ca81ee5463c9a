"""Tiles to views, per core, beside Pillow and torchvision: a table for examples/LOG.md.

    OMP_NUM_THREADS=1 python tests/bench/bench_views.py [WORKSPACE]        # without one: synthetic tiles of 256 px

Two minutes. Targets on one core, ratios within a run: the loader's share (decoding) at least 50x the reference
pipeline of MoCo v2, and at least 2x with the views made on the same core. Last, JPEG jitter
beside simplejpeg and Pillow.
"""

import io
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import simplejpeg
import torch
from PIL import Image

from histossl.bench.view_rates import SyntheticStore, view_rates
from histossl.core.workspace import Workspace
from histossl.tiles.store.index import TileIndex
from histossl.tiles.stream.loader import decode_tiles
from histossl.views import jpeg
from histossl.views.recipe import recipe_named

CASES = [("mocov2", 224), ("mocov2-histology", 224), ("mocov2", 96), ("mocov2-histology", 96)]
REPEATS = 5
JPEG_TILES, QUALITY = 5, 60  # as many at once as `make_views` hands over on a CPU


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
    jpeg_jitter(store)


def jpeg_jitter(store: TileIndex | SyntheticStore) -> None:
    tiles = decode_tiles([store.read(number) for number in range(JPEG_TILES)], store.tile_px)
    pixels = list(tiles.permute(0, 2, 3, 1).contiguous().numpy())
    quality = np.full(JPEG_TILES, QUALITY)

    def by_simplejpeg() -> None:
        for each in pixels:
            simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(each, QUALITY, colorsubsampling="420"))

    def by_pillow() -> None:
        for each in pixels:
            file = io.BytesIO()
            Image.fromarray(each).save(file, "JPEG", quality=QUALITY, subsampling="4:2:0")
            np.asarray(Image.open(file))

    def ms(make: Callable[[], object]) -> float:
        began = time.thread_time()
        make()
        return (time.thread_time() - began) * 1000 / JPEG_TILES

    ways = (lambda: jpeg.recompressed(tiles, quality), by_simplejpeg, by_pillow)
    rounds = [[ms(way) for way in ways] for _ in range(5 * REPEATS)]
    ours, simple, pillow = (median(column) for column in zip(*rounds, strict=True))
    print(f"JPEG jitter: {ours:.2f} ms a tile, simplejpeg {simple:.2f}, Pillow {pillow:.2f}")


if __name__ == "__main__":
    main()
