"""Where tissue, fat and glands lie on a painted slide: fields over a coarse grid, in microns.

Frames: `_um` microns; `_cells` cells of the layout grid, `LAYOUT_UM` wide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import distance_transform_edt, gaussian_filter

LAYOUT_UM = 2.0  # a layout cell; a small nucleus is three of them wide
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Architecture:
    """What makes a class: glands and nuclei, in microns."""

    spacing: float  # between gland centres
    half_width: tuple[float, float]  # of a gland, drawn between
    elongation: tuple[float, float]
    wobble: float  # of the gland's outline
    epithelium: float  # its height from the basement membrane to the lumen
    nuclei_at: tuple[float, ...]  # depths of the rows of nuclei
    nuclei_every: float
    nucleus: tuple[float, float, float]  # short radius, its relative spread, elongation
    goblets: bool = False


ARCHITECTURES = {
    "normal": Architecture(94, (36, 43), (1.0, 1.18), 0.03, 21, (5.0,), 6.6, (2.7, 0.08, 1.35), goblets=True),
    "adenoma": Architecture(84, (32, 39), (1.8, 2.9), 0.08, 22, (4.5, 9.5, 14.5), 6.0, (2.05, 0.10, 2.3)),
    "carcinoma": Architecture(0, (0, 0), (0, 0), 0, 0, (), 9.2, (4.1, 0.26, 1.3)),  # nests: see _nests
}


def outline_um(rng: Generator, rows: int, columns: int) -> Floats:
    """Microns inside (positive) or outside (negative) the tissue's ragged edge; one or two pieces."""
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32)
    y, x = 2 * y / rows - 1, 2 * x / columns - 1
    best = np.full((rows, columns), -9, np.float32)
    turn = rng.uniform(0, np.pi)
    pieces = 2 if rng.random() < 0.35 else 1
    for piece in range(pieces):
        off = 0.0 if pieces == 1 else (0.46 if piece else -0.46)
        centre_x, centre_y = (
            off * np.cos(turn) + rng.uniform(-0.06, 0.06),
            off * np.sin(turn) + rng.uniform(-0.06, 0.06),
        )
        along = rng.uniform(0.78, 0.9) if pieces == 1 else rng.uniform(0.42, 0.5)
        across = rng.uniform(0.7, 0.85)
        u = (x - centre_x) * np.cos(turn) + (y - centre_y) * np.sin(turn)
        v = -(x - centre_x) * np.sin(turn) + (y - centre_y) * np.cos(turn)
        best = np.maximum(best, 1 - (np.abs(u / along) ** 2.4 + np.abs(v / across) ** 2.4) ** (1 / 2.4))
    ragged = best + 0.11 * fractal(rng, rows, columns, 0.28 * LAYOUT_UM * min(rows, columns), 4)
    inside = ragged > 0
    inside[[0, -1]] = False
    inside[:, [0, -1]] = False
    return _signed_distance_um(inside)


def fat_um(rng: Generator, rows: int, columns: int, share: float) -> Floats:
    """Microns inside a fat cell's empty vacuole (negative outside); vacuoles cover about `share` of the field."""
    where = fractal(rng, rows, columns, 170, 2)
    region = where > np.quantile(where, 1 - share)
    centres = jittered(rng, rows, columns, 46, 0.55)
    shapes = [(y, x, r, r * 1.12, a) for (y, x), r, a in zip(
        centres, rng.uniform(22, 30, len(centres)), rng.uniform(0, np.pi, len(centres)), strict=True)]  # fmt: skip
    inside = _ellipses(rng, rows, columns, shapes, 0.05) & region
    return _signed_distance_um(inside)


def glands_um(rng: Generator, rows: int, columns: int, label: str, scale: float, own: Bools) -> Floats:
    """Microns below the basement membrane of the nearest gland or nest; negative in the stroma."""
    if label == "carcinoma":
        return _nests(rng, rows, columns, scale, own)
    form = ARCHITECTURES[label]
    centres = jittered(rng, rows, columns, form.spacing * scale, 0.32)
    # Neighbouring glands run alike: their direction is a slow field.
    direction = fractal(rng, rows, columns, 260 * scale, 1) * 1.1 + rng.uniform(0, np.pi)
    shapes = []
    for y, x in centres:
        row, column = (int(np.clip(at / LAYOUT_UM, 0, last - 1)) for at, last in ((y, rows), (x, columns)))
        short = rng.uniform(*form.half_width) * scale
        long = short * rng.uniform(*form.elongation)
        if own[row, column]:
            shapes.append((y, x, short, long, float(direction[row, column]) + rng.normal(0, 0.2)))
    inside = _ellipses(rng, rows, columns, shapes, form.wobble)
    inside &= own
    return _signed_distance_um(inside)


def _nests(rng: Generator, rows: int, columns: int, scale: float, own: Bools) -> Floats:
    """Irregular cords and sheets: two noises of different grain, one threshold."""
    coarse = fractal(rng, rows, columns, 62 * scale, 3)
    inside = own & (coarse > -0.45)
    holes = fractal(rng, rows, columns, 26 * scale, 1) > 2.05  # small ragged lumina and necrosis
    return _signed_distance_um(inside & ~holes)


def _ellipses(
    rng: Generator, rows: int, columns: int, shapes: Sequence[tuple[float, float, float, float, float]], wobble: float
) -> Bools:
    """The union of wobbly ellipses (y, x, short, long in microns, angle) with a gap kept between neighbours."""
    nearness = np.full((rows, columns), -1, np.float32)
    owner = np.full((rows, columns), -1, np.int32)
    for number, (y_um, x_um, short, long, angle) in enumerate(shapes):
        reach = long * (1 + 2 * wobble) / LAYOUT_UM
        y, x = y_um / LAYOUT_UM, x_um / LAYOUT_UM
        top, bottom = max(0, int(y - reach)), min(rows, int(y + reach) + 2)
        left, right = max(0, int(x - reach)), min(columns, int(x + reach) + 2)
        phase = rng.uniform(0, 2 * np.pi, 3)
        if top >= bottom or left >= right:
            continue
        dy = (np.arange(top, bottom, dtype=np.float32)[:, None] - y) * LAYOUT_UM
        dx = (np.arange(left, right, dtype=np.float32)[None] - x) * LAYOUT_UM
        u = (dx * np.cos(angle) + dy * np.sin(angle)) / long
        v = (dy * np.cos(angle) - dx * np.sin(angle)) / short
        theta = np.arctan2(v, u)
        edge = 1 + wobble * (np.cos(2 * theta + phase[0]) + np.cos(3 * theta + phase[1]) + np.cos(5 * theta + phase[2]))
        near = 1 - np.hypot(u, v) / edge
        here = nearness[top:bottom, left:right]
        closer = near > here
        owner[top:bottom, left:right][closer & (near > 0)] = number
        np.maximum(here, near, out=here)
    inside = nearness > 0
    # Where two glands meet there is always a thin septum.
    meets = np.zeros_like(inside)
    meets[:, 1:] |= owner[:, 1:] != owner[:, :-1]
    meets[1:] |= owner[1:] != owner[:-1]
    return inside & ~meets


def _signed_distance_um(inside: Bools) -> Floats:
    if inside.all() or not inside.any():
        return np.where(inside, 1e3, -1e3).astype(np.float32)
    signed = distance_transform_edt(inside) - distance_transform_edt(~inside)
    signed -= np.sign(signed) * 0.5
    return (gaussian_filter(signed.astype(np.float32), 0.7) * LAYOUT_UM).astype(np.float32)


def jittered(rng: Generator, rows: int, columns: int, spacing_um: float, jitter: float) -> NDArray[np.float64]:
    """Points (y, x) in microns on a staggered grid, each moved by up to `jitter` spacings."""
    height_um, width_um = rows * LAYOUT_UM, columns * LAYOUT_UM
    y, x = np.mgrid[-1 : height_um / (spacing_um * 0.87) + 1, -1 : width_um / spacing_um + 1]
    x = x + 0.5 * (y % 2)
    points = np.stack([y.ravel() * 0.87, x.ravel()], 1) * spacing_um
    points += rng.uniform(-jitter, jitter, points.shape) * spacing_um
    return points


def resized(field_cells: Floats, rows: int, columns: int, how: Image.Resampling) -> Floats:
    image = Image.fromarray(np.ascontiguousarray(field_cells, np.float32))
    return np.asarray(image.resize((columns, rows), how), np.float32)


def fractal(rng: Generator, rows: int, columns: int, size_um: float, octaves: int) -> Floats:
    """Smooth noise of about unit variance whose largest blobs are `size_um` wide; each octave is half as wide."""
    total = np.zeros((rows, columns), np.float32)
    weight, power = 1.0, 0.0
    for octave in range(octaves):
        cells = max(size_um / LAYOUT_UM / 2**octave, 2.0)
        coarse = rng.standard_normal((math.ceil(rows / cells) + 3, math.ceil(columns / cells) + 3)).astype(np.float32)
        box = (1.0, 1.0, 1.0 + columns / cells, 1.0 + rows / cells)
        image = Image.fromarray(coarse).resize((columns, rows), Image.Resampling.BICUBIC, box=box)
        total += weight * np.asarray(image, np.float32)
        power += weight**2 * 0.55  # bicubic interpolation keeps about this share of the variance
        weight *= 0.55
    return (total / math.sqrt(power)).astype(np.float32)


def smooth_step(value: Floats, low: float, high: float) -> Floats:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((value - np.float32(low)) / np.float32(high - low), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)
