"""What goes wrong on a painted slide's glass: folds, pen ink, edges of cover slips, blur."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from histossl.demo.layout import LAYOUT_UM, Bools, Floats, Pixels, fractal

# Optical densities in R, G, B: the fringes of a cover slip's edge, and four felt pens.
EDGE_OD = ((0.44, 0.25, 0.07), (0.5, 0.5, 0.55), (0.07, 0.18, 0.44))  # a prism's: bluish, dark, yellowish
PEN_OD = {"blue": (1.7, 1.0, 0.2), "green": (1.6, 0.45, 1.0), "red": (0.15, 1.5, 1.2), "black": (2.0, 2.0, 1.9)}


def folded(rng: Generator, outline: Floats) -> Bools:
    """A curved band where the section lies double."""
    rows, columns = outline.shape
    path = _curve(rng, rows, columns, outline, bend=0.6, reach=0.35)
    image = Image.new("1", (columns, rows))
    ImageDraw.Draw(image).line(path, fill=1, width=max(3, int(min(26 / LAYOUT_UM, 0.03 * min(rows, columns)))))
    return np.asarray(image, bool) & (outline > 0)


def pen_strokes(
    rng: Generator, rows: int, columns: int, outline: Floats, pens: Sequence[str]
) -> tuple[Floats, list[tuple[float, float, float]]]:
    """Opacity of each stroke (P, rows, columns) and its colour: strokes run round and over the tissue's edge."""
    strokes = []
    for _ in pens:
        width_cells = max(3, int(0.035 * min(rows, columns) * rng.uniform(0.8, 1.3)))
        image = Image.new("L", (columns, rows))
        draw = ImageDraw.Draw(image)
        path = _curve(rng, rows, columns, outline, bend=1.6, reach=0.55, on_edge=True)
        draw.line(path, fill=255, width=width_cells, joint="curve")
        for x, y in (path[0], path[-1]):
            r = width_cells / 2
            draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        opacity = gaussian_filter(np.asarray(image, np.float32) / 255, 0.8)
        strokes.append(opacity)
    ink = np.stack(strokes) if strokes else np.zeros((0, rows, columns), np.float32)
    return ink.astype(np.float32), [PEN_OD[pen] for pen in pens]


def cover_slip_edge(rng: Generator, rows: int, columns: int) -> list[Floats]:
    """Where a cover slip ends: a straight or slightly bowed line from side to side, its fringes beside each other."""
    upright, far = rng.random() < 0.5, rng.random() < 0.5
    length, depth = (rows, columns) if upright else (columns, rows)
    inset = depth * rng.uniform(0.02, 0.1)
    along = np.arange(length, dtype=np.float32)
    lean, bow = rng.uniform(-0.04, 0.04) * length, rng.uniform(-0.02, 0.02) * length
    share = along / length
    middle = inset + lean * share + bow * 4 * share * (1 - share)
    fringe_cells = rng.uniform(6, 14) / LAYOUT_UM
    strength = np.clip(1 + 0.15 * fractal(rng, 1, length, 400, 1)[0], 0.5, 1.5)
    away = np.arange(depth, dtype=np.float32)[None] - middle[:, None]
    fringes = []
    for side in (-1, 0, 1):
        fringe = np.exp(-(((away - side * fringe_cells) / fringe_cells) ** 2)) * strength[:, None]
        fringe = fringe[:, ::-1] if far else fringe
        fringes.append(np.ascontiguousarray(fringe if upright else fringe.T, np.float32))
    return fringes


def _curve(
    rng: Generator, rows: int, columns: int, outline: Floats, bend: float, reach: float, on_edge: bool = False
) -> list[tuple[float, float]]:
    """A bent line (x, y in cells) through a point of the tissue, or of its edge."""
    near = np.argwhere(np.abs(outline) < 8 if on_edge else outline > 0.1 * LAYOUT_UM * min(rows, columns))
    y, x = near[rng.integers(len(near))].astype(float) if len(near) else (rows / 2, columns / 2)
    heading, turn = rng.uniform(0, 2 * np.pi), bend * rng.choice([-1, 1]) * rng.uniform(0.7, 1.3)
    length = reach * min(rows, columns)
    steps = np.linspace(-0.5, 0.5, 40)
    headings = heading + turn * steps
    xs, ys = np.cumsum(np.cos(headings)) * length / 40, np.cumsum(np.sin(headings)) * length / 40
    return list(zip((xs - xs[20] + x).tolist(), (ys - ys[20] + y).tolist(), strict=True))


def blurred(rng: Generator, rgb: Pixels, tissue: Bools, mpp: float) -> Bools:
    """Put a round patch of the picture out of focus, in place; returns where, on the layout grid."""
    rows, columns = tissue.shape
    middle = np.argwhere(tissue)
    if not len(middle):
        return np.zeros_like(tissue)
    row, column = middle[rng.integers(len(middle))]
    radius_um = 0.16 * LAYOUT_UM * min(rows, columns) * rng.uniform(0.9, 1.2)
    y, x = row * LAYOUT_UM / mpp, column * LAYOUT_UM / mpp
    radius_px = radius_um / mpp
    top, bottom = max(0, int(y - radius_px)), min(rgb.shape[0], int(y + radius_px) + 1)
    left, right = max(0, int(x - radius_px)), min(rgb.shape[1], int(x + radius_px) + 1)
    spot = rgb[top:bottom, left:right].astype(np.float32)
    soft = gaussian_filter(spot, (4.5 / mpp, 4.5 / mpp, 0))
    dy, dx = np.arange(top, bottom)[:, None] - y, np.arange(left, right)[None] - x
    weight = np.clip((1 - np.hypot(dy, dx) / radius_px) * 8, 0, 1)[..., None]
    rgb[top:bottom, left:right] = np.round(spot * (1 - weight) + soft * weight).astype(np.uint8)
    cells = np.hypot(np.arange(rows)[:, None] - row, np.arange(columns)[None] - column) * LAYOUT_UM
    return np.asarray(cells < radius_um * 0.9)
