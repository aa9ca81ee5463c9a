"""How fast tiles become views on this machine, stage by stage, beside the pipeline that most people run.

The reference is MoCo v2's own: Pillow and torchvision, a tile at a time, in a worker process. Rates "per core" are CPU
time of one thread, so they hold on a busy machine as well; a ratio is always of two figures of the same run.
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from histossl.core.errors import UsageError
from histossl.tiles.stream.loader import Store, decode_tiles, tile_batches
from histossl.tiles.stream.sampler import Ints, Slides, TileOrder
from histossl.views.recipe import ViewRecipe, make_views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SYNTHETIC_TILES = 256


class TileStore(Store, Slides, Protocol):
    """A TileIndex, or something like it."""


@dataclass(frozen=True)
class Figure:
    """Milliseconds per tile, one value per repeat."""

    name: str
    repeats_ms: tuple[float, ...]
    note: str = ""

    @property
    def ms(self) -> float:
        return median(self.repeats_ms)

    @property
    def tiles_per_s(self) -> float:
        return 1000 / self.ms

    @property
    def rate(self) -> str:
        """Tiles a second for a person."""
        return f"{self.tiles_per_s:,.0f}" if self.tiles_per_s >= 10 else f"{self.tiles_per_s:.2g}"

    @property
    def spread(self) -> str:
        return f"{min(self.repeats_ms):.3f}-{max(self.repeats_ms):.3f}"


@dataclass(frozen=True)
class ViewRates:
    """What one core, and all workers together, do with a tile."""

    read: Figure
    decode: Figure
    views: Figure
    reference: Figure
    loaded: Figure  # wall time, all workers
    on_gpu: Figure | None = None  # wall time: to the device, and views there
    decode_on_gpu: Figure | None = None

    @property
    def loader_gain(self) -> float:
        """How often the reference's work of a tile fits into the loader's (decoding alone)."""
        return self.reference.ms / self.decode.ms

    @property
    def gain(self) -> float:
        """The same when the views are made on the same core."""
        return self.reference.ms / (self.decode.ms + self.views.ms)

    @property
    def figures(self) -> list[Figure]:
        every = (
            self.read,
            self.decode,
            self.views,
            self.reference,
            self.loaded,
            self.decode_on_gpu,
            self.on_gpu,
        )
        return [figure for figure in every if figure is not None]


def advice(rates: ViewRates) -> list[str]:
    """Which stage limits, and what to change, a line each."""
    loaded, made = rates.loaded, rates.on_gpu or rates.views
    lines, way = [], "reading and decoding"
    if rates.decode_on_gpu is not None:
        # Decoded there, tiles queue behind the model's own work: it must be clearly faster to be worth it.
        faster, ratio = rates.decode_on_gpu, loaded.ms / rates.decode_on_gpu.ms
        if ratio > 1.2:
            lines.append(
                f"decoding: {ratio:.1f}x as fast on the GPU as on the workers here; pass --decode-on-gpu to pretrain"
            )
            loaded, way = faster, "decoding on the GPU"
        else:
            lines.append(f"decoding: {1 / ratio:.1f}x as fast on the workers as on the GPU; leave --decode-on-gpu out")
    if loaded.ms > made.ms:
        lines.append(f"limit: {way}; give --workers more cores, or put the workspace on a faster disk")
    elif rates.on_gpu is None:
        lines.append(
            "limit: making views on the CPU; smaller --view-px, or a GPU, where they are made beside the model"
        )
    else:
        lines.append("limit: making views on the GPU; the loader keeps up, fewer --workers would do as well")
    return lines


def view_rates(
    store: TileStore, recipe: ViewRecipe, num_workers: int, num_tiles: int = 256, repeats: int = 3
) -> ViewRates:
    """Measure on `num_tiles` tiles, `repeats` times. One intra-op thread for what is said per core."""
    order = TileOrder(store, seed=0)
    num_tiles = min(num_tiles, order.num_tiles)
    numbers = order.tile_numbers(0, num_tiles)
    jpegs = store.read_many(numbers)
    tiles = decode_tiles(jpegs, store.tile_px)
    positions = torch.arange(num_tiles)
    some, reference = min(num_tiles, 64), reference_pipeline(recipe.views[0].size_px)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # As in a training process, which has freed larger arrays: the C library then keeps memory for the next ones.
    torch.ones(24 << 20, dtype=torch.uint8)
    try:
        read = _timed("read", num_tiles, repeats, lambda: store.read_many(numbers), "on one core")
        decode = _timed("decode", num_tiles, repeats, lambda: decode_tiles(jpegs, store.tile_px), "on one core")
        views = _timed(
            f"views: {recipe.name}", num_tiles, repeats, lambda: _views(tiles, recipe, positions), "on one core"
        )
        theirs = _timed(
            "reference: Pillow and torchvision",
            some,
            repeats,
            lambda: [reference(jpeg) for jpeg in jpegs[:some]],
            f"MoCo v2's two views of {recipe.views[0].size_px} px, on one core",
        )
        loaded = _timed(
            "read and decode, all workers",
            4 * num_tiles,
            repeats,
            lambda: _load(store, order, num_tiles, num_workers),
            f"{num_workers} workers, wall time",
            wall=True,
        )
        gpu = _on_gpu(jpegs, tiles, store.tile_px, recipe, positions, repeats) if torch.cuda.is_available() else None
    finally:
        torch.set_num_threads(threads)
    on_gpu, decode_on_gpu = gpu or (None, None)
    return ViewRates(read, decode, views, theirs, loaded, on_gpu, decode_on_gpu)


def reference_pipeline(size_px: int) -> Callable[[bytes], tuple[Tensor, Tensor]]:
    """A JPEG to two normalised views as facebookresearch/moco's loader does it with --aug-plus."""
    from torchvision import transforms

    def blur(picture: Image.Image) -> Image.Image:
        return picture.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))

    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(size_px, scale=(0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([transforms.Lambda(blur)], p=0.5),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )

    def views_of(jpeg: bytes) -> tuple[Tensor, Tensor]:
        picture = Image.open(io.BytesIO(jpeg)).convert("RGB")
        return augment(picture), augment(picture)

    return views_of


class SyntheticStore:
    """Tiles to measure with where nothing is tiled yet: coloured noise at two grains, as hard to decode as tissue."""

    def __init__(self, tile_px: int, num_tiles: int = SYNTHETIC_TILES) -> None:
        self.tile_px, self.slides = tile_px, ["synthetic"]
        chance = np.random.default_rng(0)
        self._jpegs = [_tissue_like(chance, tile_px) for _ in range(num_tiles)]

    def tiles_of(self, slide: str) -> range:
        return range(len(self._jpegs) if slide == "synthetic" else 0)

    def read(self, number: int) -> bytes:
        return self._jpegs[number]

    def read_many(self, numbers: Ints) -> list[bytes]:
        return [self._jpegs[number] for number in numbers]


def _tissue_like(chance: np.random.Generator, tile_px: int) -> bytes:
    coarse = chance.normal(0, 35, (-(-tile_px // 8), -(-tile_px // 8), 3)).repeat(8, 0).repeat(8, 1)
    fine = chance.normal(0, 4.5, (tile_px, tile_px, 1))
    pixels = np.clip((185, 130, 175) + coarse[:tile_px, :tile_px] + fine, 0, 255).astype(np.uint8)
    jpeg: bytes = simplejpeg.encode_jpeg(pixels, 90, colorsubsampling="420")
    return jpeg


# ---- the clock


def _timed(
    name: str, num_tiles: int, repeats: int, work: Callable[[], object], note: str = "", wall: bool = False
) -> Figure:
    clock = time.perf_counter if wall else time.thread_time
    work()
    taken_ms = []
    for _ in range(repeats):
        began_s = clock()
        work()
        taken_ms.append((clock() - began_s) * 1000 / num_tiles)
    return Figure(name, tuple(taken_ms), note)


def _views(tiles: Tensor, recipe: ViewRecipe, positions: Tensor) -> list[Tensor]:
    return make_views(tiles, recipe, 0, positions, (MEAN, STD))


def _load(store: TileStore, order: TileOrder, batch: int, num_workers: int) -> None:
    with tile_batches(store, order, batch, 0, 4, num_workers=num_workers) as batches:
        for _ in batches:
            pass


def _on_gpu(
    jpegs: Sequence[bytes], tiles: Tensor, tile_px: int, recipe: ViewRecipe, positions: Tensor, repeats: int
) -> tuple[Figure, Figure | None]:
    """Views made there, and decoding there where that works at all."""
    device = torch.device("cuda")
    pinned = tiles.permute(0, 2, 3, 1).contiguous().pin_memory().permute(0, 3, 1, 2)

    def waited(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            work()
            torch.cuda.synchronize()

        return run

    views = waited(lambda: _views(pinned.to(device, non_blocking=True), recipe, positions))
    decode = waited(lambda: decode_tiles(jpegs, tile_px, device))
    count, note = len(jpegs), "wall time"
    made = _timed(f"views: {recipe.name}, on the GPU", count, repeats, views, note, wall=True)
    try:
        return made, _timed("decode on the GPU", count, repeats, decode, note, wall=True)
    except UsageError:
        return made, None
