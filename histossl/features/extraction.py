"""All tiles of the labelled slides through a backbone, one HDF5 file per slide, as MIL tools read them.

WORKSPACE/embeddings/START-DIGEST-SIZEpx/SLIDE.h5
    features (N, D) float32, coords (N, 2) int64 level-0 pixels of each tile's upper left corner, mean (D,) float32
    attributes: backbone, backbone_digest, tiles_digest, timm_name, input_px, tile_px, mpp

A file is whole or absent. One made by another backbone or from other tiles is noticed and made anew.
Every start sees the same tiles at the same size, so a difference between starts is one of weights.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from histossl.backbones.loading import BackboneInfo, weights_digest
from histossl.core import console
from histossl.core.config import EmbedConfig
from histossl.core.errors import StoreError, UsageError, WeightsError
from histossl.core.workspace import Workspace, file_stem, written_aside
from histossl.features.colour_statistics import NUM_STATISTICS, colour_statistics
from histossl.tiles.store.index import TileIndex
from histossl.tiles.stream.loader import decode_tiles
from histossl.training.loop import has_bf16
from histossl.views.recipe import clean_view, resized

BATCHES_AHEAD = 4
COLOUR = "colour"


@dataclass(frozen=True)
class Embedder:
    """A start as a function: uint8 tiles (B, 3, H, W) on `device` -> features (B, D) float32."""

    name: str
    digest: str
    feature_dim: int
    input_px: int
    device: torch.device
    embed: Callable[[Tensor], Tensor]
    timm_name: str = ""

    @property
    def folder(self) -> str:
        """Its directory below embeddings/: starts never share files, nor do sizes."""
        return f"{self.name}-{self.digest[:8]}-{self.input_px}px"


def backbone_embedder(
    name: str, backbone: nn.Module, info: BackboneInfo, input_px: int, device: torch.device
) -> Embedder:
    """Eval mode, the backbone's own normalisation, bf16 on GPUs that have it, else fp32."""
    digest = weights_digest(backbone)
    backbone = backbone.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    low = has_bf16(device)

    def embed(tiles: Tensor) -> Tensor:
        x = clean_view(tiles, input_px, (info.mean, info.std))  # the whole tile: nothing of the tissue is cut off
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            features: Tensor = backbone(x)
        return features.float()

    return Embedder(name, digest, info.feature_dim, input_px, device, embed, info.timm_name)


def colour_embedder(tile_px: int, device: torch.device) -> Embedder:
    digest = hashlib.sha256(f"27 colour statistics, version 1, {tile_px}".encode()).hexdigest()[:16]
    return Embedder(COLOUR, digest, NUM_STATISTICS, tile_px, device, colour_statistics)


def device_of(wanted: str) -> torch.device:
    """'auto', 'cpu', 'cuda' or 'cuda:1'."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {wanted}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu or auto"
        )
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # events and streams are made on the current one
    return device


# ---- which tiles


def slide_tiles(index: TileIndex, slide: str) -> NDArray[np.int64]:
    """Numbers of a slide's tiles at the finest scale: the ones that are embedded, in the order of the file's rows."""
    tiles = index.tiles_of(slide)
    numbers = np.arange(tiles.start, tiles.stop, dtype=np.int64)
    finest: NDArray[np.int64] = numbers[index.rows(numbers)["scale"] == 0]
    return finest


def tiles_digest(index: TileIndex, numbers: NDArray[np.int64]) -> str:
    """Changes when this slide is tiled otherwise; other slides of the archive may come and go."""
    rows = index.rows(numbers)
    hashed = hashlib.sha256(json.dumps([index.tile_px, index.mpp]).encode())
    for column in ("x_l0", "y_l0", "length"):
        hashed.update(np.ascontiguousarray(rows[column]).tobytes())
    return hashed.hexdigest()[:16]


# ---- the stage


def embed_slides(
    workspace: Workspace,
    index: TileIndex,
    slides: Sequence[str],
    embedder: Embedder,
    config: EmbedConfig,
) -> dict[str, Path]:
    """The HDF5 file of each slide, computed where it is missing or stale. Resumes slide by slide."""
    folder = workspace.embeddings(embedder.folder)
    paths = {slide: folder / f"{file_stem(slide)}.h5" for slide in slides}
    todo: list[tuple[str, NDArray[np.int64], dict[str, Any]]] = []
    num_stale = 0
    for slide in slides:
        numbers = slide_tiles(index, slide)
        if not len(numbers):
            raise StoreError(f"slide {slide!r} has no tiles to embed; leave it out of the labels, or tile it anew")
        facts = {
            "backbone": embedder.name,
            "backbone_digest": embedder.digest,
            "timm_name": embedder.timm_name,
            "input_px": embedder.input_px,
            "tile_px": index.tile_px,
            "mpp": index.mpp,
            "tiles_digest": tiles_digest(index, numbers),
        }
        state = _state(paths[slide], facts)
        num_stale += state == "stale"
        if state != "ready":
            todo.append((slide, numbers, facts))
    if num_stale:
        console.say(f"{embedder.name}: {num_stale} embeddings were made from other tiles or weights; making them anew")
    if not todo:
        return paths
    total = sum(len(numbers) for _, numbers, _ in todo)
    damaged: dict[str, str] = {}
    with console.progress(f"embedding with {embedder.name}", total, "tiles") as bar, torch.inference_mode():
        for slide, numbers, facts, features in _features(index, todo, embedder, config, bar.advance):
            if isinstance(features, StoreError):
                damaged[slide] = str(features)
                continue
            if not np.isfinite(features).all():
                bad = int((~np.isfinite(features).all(1)).sum())
                raise WeightsError(
                    f"{embedder.name}: {bad} of {len(features)} tiles of {slide} give features that are not finite; "
                    "these weights are damaged (a diverged run?); use another checkpoint"
                )
            _write(paths[slide], features, index.coords_l0(numbers), facts)
    if damaged:
        first = next(iter(damaged))
        raise StoreError(
            f"{len(damaged)} of {len(slides)} slides have damaged tiles, the first {first}: {damaged[first]}. "
            "The others are embedded; the same command goes on from there"
        )
    return paths


def _state(path: Path, facts: dict[str, Any]) -> str:
    """ready, stale or absent."""
    if not path.exists():
        return "absent"
    with suppress(OSError, KeyError), h5py.File(path, "r") as file:
        same = all(file.attrs.get(name) == value for name, value in facts.items())
        if same and {"features", "coords", "mean"} <= set(file):
            return "ready"
    return "stale"


_Todo = tuple[str, NDArray[np.int64], dict[str, Any]]


def _features(
    index: TileIndex,
    todo: Sequence[_Todo],
    embedder: Embedder,
    config: EmbedConfig,
    advance: Callable[[int], None],
) -> Iterator[tuple[str, NDArray[np.int64], dict[str, Any], NDArray[np.float32] | StoreError]]:
    """Slide by slide. Reading and decoding run ahead in threads, over the slides' borders.

    A batch never holds tiles of two slides, so a slide's features do not depend on what was embedded before it.
    """
    batch = config.batch_size or (256 if embedder.device.type == "cuda" else 64)
    work = (
        (slide, numbers[first : first + batch]) for slide, numbers, _ in todo for first in range(0, len(numbers), batch)
    )
    with ThreadPoolExecutor(config.num_workers or 2, "embed") as pool:
        ahead = _run_ahead(pool, index, work, embedder, BATCHES_AHEAD + (config.num_workers or 2))
        for slide, numbers, facts in todo:
            features = np.empty((len(numbers), embedder.feature_dim), dtype=np.float32)
            damage: StoreError | None = None
            for first in range(0, len(numbers), batch):
                try:
                    tiles = next(ahead).result()
                except StoreError as error:
                    damage = error
                    continue
                if damage is None:
                    on_device = tiles.to(embedder.device, non_blocking=True)
                    features[first : first + len(tiles)] = embedder.embed(on_device).cpu().numpy()
                advance(len(numbers[first : first + batch]))
            yield slide, numbers, facts, features if damage is None else damage


def _run_ahead(
    pool: ThreadPoolExecutor,
    index: TileIndex,
    work: Iterable[tuple[str, NDArray[np.int64]]],
    embedder: Embedder,
    depth: int,
) -> Iterator[Future[Tensor]]:
    def load(numbers: NDArray[np.int64]) -> Tensor:
        tiles = decode_tiles(index.read_many(numbers), index.tile_px)
        return resized(tiles, embedder.input_px) if embedder.device.type == "cpu" else tiles

    pending: deque[Future[Tensor]] = deque()
    for _, numbers in work:
        pending.append(pool.submit(load, numbers))
        if len(pending) > depth:
            yield pending.popleft()
    while pending:
        yield pending.popleft()


def _write(path: Path, features: NDArray[np.float32], coords: NDArray[np.int64], facts: dict[str, Any]) -> None:
    with written_aside(path) as aside, h5py.File(aside, "w") as file:
        file.create_dataset("features", data=features)
        file.create_dataset("coords", data=coords)
        file.create_dataset("mean", data=features.mean(0, dtype=np.float64).astype(np.float32))
        for name, value in facts.items():
            file.attrs[name] = value


# ---- bags


class Bags:
    """The items' features: a mean per item at hand, all tiles of an item on request."""

    def __init__(self, files: Sequence[tuple[Path, NDArray[np.int64] | None]]) -> None:
        """`files`: per item its HDF5 file and which rows are its tiles (None: all)."""
        self._files = list(files)
        self._mapped: dict[Path, NDArray[np.float32]] = {}
        self._pooled: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self._files)

    @property
    def pooled(self) -> NDArray[np.float64]:
        """(items, D) mean features."""
        if self._pooled is None:
            self._pooled = self._read_pooled()
        return self._pooled

    def tiles(self, item: int) -> NDArray[np.float32]:
        """(N, D) features of one item's tiles."""
        path, rows = self._files[item]
        if path not in self._mapped:
            self._mapped[path] = _mapped(path)
        return self._mapped[path] if rows is None else self._mapped[path][rows]

    def _read_pooled(self) -> NDArray[np.float64]:
        """Each file is opened once, whatever the number of its items."""
        by_file: dict[Path, list[int]] = {}
        for item, (path, _) in enumerate(self._files):
            by_file.setdefault(path, []).append(item)
        means: dict[int, NDArray[np.float64]] = {}
        for path, items in by_file.items():
            with h5py.File(path, "r") as file:
                whole = None
                for item in items:
                    rows = self._files[item][1]
                    if rows is None:
                        means[item] = file["mean"][:].astype(np.float64)
                    else:
                        whole = file["features"][:] if whole is None else whole
                        means[item] = whole[rows].mean(0, dtype=np.float64)
        return np.stack([means[item] for item in range(len(self._files))])


def _mapped(path: Path) -> NDArray[np.float32]:
    """A file's features where they lie: the system reads the rows that are asked for, and gives their memory back.

    Held in memory, 200 slides of 10,000 tiles and 1,024 features are 8 GB for each start.
    """
    with h5py.File(path, "r") as file:
        stored = file["features"]
        offset, shape, dtype = stored.id.get_offset(), stored.shape, stored.dtype
        if offset is None:  # in chunks, or empty
            whole: NDArray[np.float32] = stored[:]
            return whole
    return np.memmap(path, dtype, "c", offset, shape)  # "c": writable for torch, and never written back
