"""All tiles of an archive through a backbone into one memory-mapped file: streamed, and resumable row by row.

`WORKSPACE/curation/BACKBONE/features-TILES.npy` is (N, D + 256) float16, row n for tile n of the index:

    D     the backbone's features, unit length: what the tile shows
    256   the tile as 16 x 16 grey means, without its mean, unit length: where it shows it. Brightness and contrast are
          divided out, so a copy that was encoded anew, moved by a few pixels or exposed otherwise keeps it

A row of zeros is not embedded yet and a row of NaN is a damaged tile, so the file itself says where to go on: nothing
else is written, and whatever kills us costs the batches in flight. Excluded slides are never embedded; their rows stay
holes that take no disk.

10 million tiles and D = 384: 12.8 GB of file. Memory is that of the batches in flight; pages are given back.

Shapes: N tiles, D features, P = 256 picture cells.
"""

from __future__ import annotations

import math
import mmap
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from histossl.core import console
from histossl.core.config import EmbedConfig
from histossl.core.errors import StoreError, WeightsError
from histossl.features.extraction import Embedder
from histossl.tiles.store.index import TileIndex
from histossl.tiles.stream.loader import tile_batches
from histossl.tiles.stream.sampler import Ints

SHOWN_SHARE = 0.1  # of the backbone in how much two tiles are copies; see duplicates.py
PICTURE_SIDE = 16
PICTURE = PICTURE_SIDE**2
PIECE = 65_536  # rows looked at in one go: 84 MB of float16 at D = 384
RELEASE_EVERY = 200  # batches
UNIT = 0.05  # a whole row's squared length is 2, give or take the rounding of float16; half a row's is not

Floats = NDArray[np.float32]


@dataclass
class Features:
    """The file, for reading. Vectors come as float32, by tile number."""

    table: NDArray[np.float16]  # memory-mapped (N, D + P)
    centre_D: Floats  # mean of what the pool shows

    @property
    def dim(self) -> int:
        return int(self.table.shape[1]) - PICTURE

    def shown(self, numbers: Ints) -> Floats:
        """(n, D) what tiles show: unit length, the pool's mean taken out, so that 0 means 'as alike as any two'.

        Features of a backbone share a large mean (the cosine of two tiles drawn at random is 0.56 for an ImageNet
        DeiT-tiny, 0.98 for a random ResNet); without it one threshold means the same for all of them.
        """
        rows = self._rows(numbers, slice(self.dim))
        rows -= self.centre_D
        return _unit(rows)

    def as_given(self, numbers: Ints) -> Floats:
        """(n, D) what tiles show: unit length, the pool's mean left in. For clusters: an archive's mean lies amid its
        commonest tissue, and seen from there that tissue fills the sphere."""
        return self._rows(numbers, slice(self.dim))

    def shown_and_where(self, numbers: Ints) -> Floats:
        """(n, D + P) unit length: the dot product of two is a weighted mean of the cosines of both parts."""
        both = np.empty((len(numbers), self.table.shape[1]), np.float32)
        both[:, : self.dim] = self.shown(numbers)
        both[:, : self.dim] *= np.float32(math.sqrt(SHOWN_SHARE))
        both[:, self.dim :] = _unit(self._rows(numbers, slice(self.dim, None)))
        both[:, self.dim :] *= np.float32(math.sqrt(1 - SHOWN_SHARE))
        return both

    def _rows(self, numbers: Ints, columns: slice) -> Floats:
        rows: Floats = self.table[:, columns][numbers].astype(np.float32)
        return rows

    def release(self) -> None:
        """Give the pages back to the kernel. Their content stays cached as long as memory allows."""
        release(self.table)


def pieces(numbers: Ints, size: int = PIECE) -> Iterator[Ints]:
    for first in range(0, len(numbers), size):
        yield numbers[first : first + size]


def embed_tiles(
    path: Path, index: TileIndex, numbers: Ints, embedder: Embedder, config: EmbedConfig
) -> tuple[Features, Ints]:
    """(the features, those of `numbers` that are whole), computed where they are not in the file yet."""
    table = _opened(path, len(index), embedder.feature_dim + PICTURE)
    todo = numbers[_state(table, numbers) == TO_DO]
    _refuse_full_disk(path, len(todo) * table.shape[1] * 2)
    if len(todo):
        if len(todo) < len(numbers):
            console.say(f"going on: {len(numbers) - len(todo):,} of {len(numbers):,} tiles are embedded")
        _fill(table, index, todo, embedder, config)
        table.flush()  # type: ignore[attr-defined]
    whole = numbers[_state(table, numbers) == WHOLE]
    if not len(whole):
        raise StoreError(f"{path}: none of {len(numbers)} tiles could be embedded; the tiles are damaged")
    return features_of(table, whole), whole


def features_of(table: NDArray[np.float16], pool: Ints) -> Features:
    """The rows of a file, seen from the mean of a pool."""
    dim = table.shape[1] - PICTURE
    total = np.zeros(dim)
    for piece in pieces(pool):
        total += table[piece][:, :dim].sum(0, dtype=np.float64)
        release(table)
    return Features(table, (total / len(pool)).astype(np.float32))


def _fill(table: NDArray[np.float16], index: TileIndex, todo: Ints, embedder: Embedder, config: EmbedConfig) -> None:
    cuda = embedder.device.type == "cuda"
    batch = min(config.batch_size or (256 if cuda else 64), len(todo))
    num_batches = -(-len(todo) // batch)
    loaded = tile_batches(
        index, InTurn(todo), batch, 0, num_batches, num_workers=config.num_workers or 2, pin_memory=cuda
    )
    bar_of = console.progress(f"embedding with {embedder.name}", len(todo), "tiles")
    with loaded, bar_of as bar, torch.inference_mode():
        for count, (tiles, found, _) in enumerate(loaded):
            on_device = tiles.to(embedder.device, non_blocking=True)
            shown_BD = F.normalize(embedder.embed(on_device), dim=1)
            rows = torch.cat([shown_BD, pictures(on_device)], dim=1).half().cpu().numpy()
            if not np.isfinite(rows).all():
                raise WeightsError(
                    f"{embedder.name}: gives features that are not finite; these weights are damaged (a diverged "
                    "run?); use another checkpoint"
                )
            table[found.numpy()] = rows
            table[list(loaded.damaged)] = np.nan
            if count % RELEASE_EVERY == 0:
                release(table)
            bar.advance(min(batch, len(todo) - count * batch))
    for number, what in loaded.damaged.items():
        console.warn(f"tile {number} was left out: {what}")


def pictures(tiles: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> (B, P) grey means of 16 x 16 cells, without their mean, unit length."""
    grey = F.adaptive_avg_pool2d(tiles.float().mean(1, keepdim=True), PICTURE_SIDE).flatten(1)
    grey = grey - grey.mean(1, keepdim=True)
    flat = grey.norm(dim=1, keepdim=True) < 1e-3  # one colour all over: any picture will do, as long as it is the same
    return F.normalize(torch.where(flat, torch.ones_like(grey), grey), dim=1)


@dataclass(frozen=True)
class InTurn:
    """An order for `tile_batches`: these tiles one after the other, as they lie on disk, then from the first again."""

    numbers: Ints

    @property
    def num_tiles(self) -> int:
        return len(self.numbers)

    def tiles_at(self, positions: Ints) -> Ints:
        found: Ints = self.numbers[positions % len(self.numbers)]
        return found


# ---- the file

TO_DO, WHOLE, DAMAGED = 0, 1, 2


def _opened(path: Path, num_tiles: int, width: int) -> NDArray[np.float16]:
    """The file as it is, or a new one of zeros that takes no disk yet. What is half made is made anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        try:
            table = np.lib.format.open_memmap(path, mode="r+")
            if table.shape == (num_tiles, width) and table.dtype == np.float16:
                return table
        except (ValueError, OSError, EOFError):
            pass
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(num_tiles, width))


def _state(table: NDArray[np.float16], numbers: Ints) -> NDArray[np.uint8]:
    """TO_DO, WHOLE or DAMAGED of each. A row that a power cut left half written has the wrong length: TO_DO."""
    state = np.empty(len(numbers), dtype=np.uint8)
    done = 0
    for piece in pieces(numbers):
        rows = table[piece].astype(np.float32)
        length = np.einsum("nd,nd->n", rows, rows)
        here = np.where(np.isnan(length), DAMAGED, np.where(abs(length - 2) < UNIT, WHOLE, TO_DO))
        state[done : done + len(piece)] = here
        done += len(piece)
        release(table)
    return state


def release(table: NDArray[np.float16]) -> None:
    mapped = getattr(table, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _refuse_full_disk(path: Path, needed: int) -> None:
    """A write through a memory map has no error for a full disk: the process would be killed."""
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise StoreError(
            f"{path}: needs {needed / 2**30:.1f} GB more and the disk has {free / 2**30:.1f} GB; make room, or use a "
            "--workspace elsewhere"
        )


def _unit(rows: Floats) -> Floats:
    """`rows` themselves, each made unit length: a second array of this size would be a third of the memory."""
    length = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    rows /= np.maximum(length, 1e-6)[:, None]
    return rows
