"""Slides of one common kind of tissue and four rare ones that look nothing like it: is imbalance cut where it is a
question that features can answer?

The demo's classes (histossl.demo.paint) do not ask it: most tiles of a carcinoma slide are the stroma that any slide
has. Here a slide is a sheet of cells, each exactly one tile, each painted anew as one kind with its own directions,
densities and sizes, and every slide holds every kind under its own stain. So a tile's kind is known, and a rare kind
varies as the common one does, laboratory and all. A slide of 225 cells, two of each rare kind: 108 to 1.

    stroma         wavy parallel eosin fibres and a few spindle nuclei; the common kind
    lymphocytes    dense small round nuclei
    blood          dense eosin discs with no nuclei
    mucin          pale, smooth, faintly blue
    keratin        eosin rings about a point
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
from scipy.ndimage import gaussian_filter

from histossl.demo.paint import Stain
from histossl.tiles.store.index import TileIndex

KINDS = ("stroma", "lymphocytes", "blood", "mucin", "keratin")
CELL_PX, SIDE_CELLS, MPP = 64, 17, 0.5
PATCH = SIDE_CELLS - 2  # a margin of glass around it


def kind_of_tiles(index: TileIndex, of_cell: dict[str, np.ndarray]) -> np.ndarray:
    """(N,) kind of each tile of the index, which must be cut at CELL_PX and MPP. `of_cell` goes by slide."""
    numbers = np.arange(len(index))
    columns, rows = np.divmod(index.coords_l0(numbers), CELL_PX)[0].T
    slides = np.array(index.slides)[index.slide_of(numbers)]
    return np.array([of_cell[slide][row, column] for slide, row, column in zip(slides, rows, columns, strict=True)])


def paint_kinds(path: Path, seed: int, rare: int, compression: str = "jpeg") -> np.ndarray:
    """Paint one slide with `rare` cells of each rare kind, and return the kind of each (row, column); -1: glass."""
    rng = np.random.default_rng([seed, 0])
    kinds = np.zeros(PATCH**2, dtype=np.int64)
    kinds[: rare * (len(KINDS) - 1)] = np.repeat(np.arange(1, len(KINDS)), rare)
    of_cell = np.full((SIDE_CELLS, SIDE_CELLS), -1)
    of_cell[1:-1, 1:-1] = rng.permutation(kinds).reshape(PATCH, PATCH)
    dyes = np.zeros((2, SIDE_CELLS * CELL_PX, SIDE_CELLS * CELL_PX), np.float32)
    for row, column in np.argwhere(of_cell >= 0):
        here = np.s_[:, row * CELL_PX : (row + 1) * CELL_PX, column * CELL_PX : (column + 1) * CELL_PX]
        dyes[here] = _PAINTERS[of_cell[row, column]](rng)
    stain = Stain.drawn(np.random.default_rng([seed, 1]))
    dyes *= np.array([stain.haematoxylin, stain.eosin], np.float32)[:, None, None] / 0.35
    od = np.einsum("dhw,dc->hwc", dyes, np.array([stain.haematoxylin_od, stain.eosin_od], np.float32))
    light = np.array(stain.glass) * 10**-od + rng.normal(0, 2, size=od.shape)
    tifffile.imwrite(
        path,
        np.clip(light, 0, 255).astype(np.uint8),
        photometric="rgb",
        tile=(256, 256),
        compression=compression,
        compressionargs={"level": 85} if compression == "jpeg" else None,
        resolution=(1e4 / MPP, 1e4 / MPP),
        resolutionunit="CENTIMETER",
    )
    return of_cell


# ---- one cell: (haematoxylin, eosin), each (CELL_PX, CELL_PX)

_Y, _X = np.mgrid[0:CELL_PX, 0:CELL_PX].astype(np.float32)


def _clouds(rng: np.random.Generator, size_px: float) -> np.ndarray:
    """Smooth noise of mean 0 and deviation 1."""
    noise = gaussian_filter(rng.normal(size=(CELL_PX, CELL_PX)), size_px, mode="wrap")
    return noise / noise.std()


def _discs(rng: np.random.Generator, count: int, radius_px: float, long: float = 1.0, turn: float = 0.0) -> np.ndarray:
    """How much of a pixel lies under one of `count` ellipses, which keep apart as well as chance lets them."""
    found = np.zeros((CELL_PX, CELL_PX), np.float32)
    centres = rng.uniform(0, CELL_PX, size=(4 * count, 2))
    taken: list[np.ndarray] = []
    for centre in centres:
        if len(taken) < count and all(np.hypot(*(centre - other)) > 1.7 * radius_px for other in taken):
            taken.append(centre)
    for y, x in taken:
        along = (_X - x) * np.cos(turn) + (_Y - y) * np.sin(turn)
        across = (_Y - y) * np.cos(turn) - (_X - x) * np.sin(turn)
        radius = radius_px * rng.uniform(0.85, 1.15)
        found = np.maximum(found, np.clip(radius + 0.5 - np.hypot(along / long, across), 0, 1))
    return found


def _stroma(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    turn, period_px = rng.uniform(0, np.pi), rng.uniform(5, 9)
    across = _Y * np.cos(turn) - _X * np.sin(turn) + 3 * _clouds(rng, 10)
    nuclei = _discs(rng, int(rng.integers(1, 6)), 2.5, 3.5, turn)
    return 0.08 + 0.6 * nuclei, 0.35 + 0.15 * np.sin(2 * np.pi * across / period_px) * (1 - nuclei)


def _lymphocytes(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    nuclei = _discs(rng, int(rng.integers(35, 60)), rng.uniform(3.8, 4.8))
    return 0.05 + 0.75 * nuclei, 0.12 + 0.03 * _clouds(rng, 4)


def _blood(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    cells = _discs(rng, int(rng.integers(25, 45)), rng.uniform(4.8, 6))
    return np.full_like(cells, 0.03), 0.05 + 0.6 * cells


def _mucin(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return 0.16 + 0.05 * _clouds(rng, rng.uniform(3, 7)), np.full_like(_X, rng.uniform(0.02, 0.07))


def _keratin(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    y, x = rng.uniform(0.25, 0.75, 2) * CELL_PX
    out = np.hypot(_Y - y, _X - x) + 1.0 * _clouds(rng, 8)
    return np.full_like(_X, 0.03), 0.55 + 0.3 * np.sin(2 * np.pi * out / rng.uniform(8, 14))


_PAINTERS = (_stroma, _lymphocytes, _blood, _mucin, _keratin)
