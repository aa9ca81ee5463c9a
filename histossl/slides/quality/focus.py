"""Is a tile worth learning from: in focus, coloured? Pure functions of pixels; the thresholds are TissueConfig's.

Folds are sought on the thumbnail (tissue.py), where they show as a whole. Tiles are judged at their own scale, so a
figure means the same on every scanner. Shapes: B tiles, H W pixels.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

HALF_COARSE_PX = 15  # contrast is measured against the mean of 31 px, detail between those of 3 and of 7
LINES_APART, POINTS_APART = 8, 4  # so few rows, columns and pixels are enough to tell, and many times faster
SURE = 1.5  # half of the lines, and grey for green, are off by up to a quarter: below this all lines are asked
PALE = 2.0  # the same for a quarter of the points
FAINT = 0.5  # grey levels: contrast below is noise


def sharpness(tiles: NDArray[np.uint8], lines_apart: int = LINES_APART) -> NDArray[np.float32]:
    """How much of the contrast of tiles (B, H, W, 3) or (B, H, W) lies in detail of 3-7 px rather than coarser, (B,).

    Tissue in focus has 0.3 to 0.5 whatever its stain and contrast; out of focus by 2 px (sigma) about 0.17, by 3 px
    0.12. Detail below 3 px is left out: there sits the noise, which a blurred tile has too. An empty tile has 0.
    """
    green = tiles[..., 1] if tiles.ndim == 4 else tiles  # haematoxylin and eosin both absorb green
    assert green.ndim == 3, tiles.shape
    return np.array([_sharpness(one, lines_apart) for one in green], np.float32)


def out_of_focus(tile: NDArray[np.uint8], limit: float) -> bool:
    """Whether the sharpness of one tile (H, W, 3) is below a limit."""
    return not surely_in_focus(tile, limit) and float(sharpness(tile[None])[0]) < limit


def surely_in_focus(tile: NDArray[np.uint8], limit: float) -> bool:
    """Whether half of the lines of a tile, in colour (H, W, 3) or grey (H, W), leave no doubt that it is in focus."""
    return float(sharpness(tile[None], 2 * LINES_APART)[0]) >= limit * SURE


def without_colour(tile: NDArray[np.uint8], limit: float) -> bool:
    """Whether the saturation of one tile (H, W, 3) is below a limit; a quarter of the points are asked first."""
    quick = float(saturation(tile[None], 2 * POINTS_APART)[0])
    return quick < limit * PALE and float(saturation(tile[None])[0]) < limit


def saturation(tiles: NDArray[np.uint8], points_apart: int = POINTS_APART) -> NDArray[np.float32]:
    """Mean colour saturation of tiles (B, H, W, 3), (B,): 0 grey, 1 a pure colour."""
    assert tiles.ndim == 4, tiles.shape
    planes = np.ascontiguousarray(tiles[:, ::points_apart, ::points_apart].transpose(3, 0, 1, 2))
    high = np.maximum.reduce(planes)
    spread = high - np.minimum.reduce(planes)
    share = spread / np.maximum(high, 1).astype(np.float32)
    mean: NDArray[np.float32] = np.add.reduce(share, axis=(1, 2)) / np.float32(max(1, high[0].size))
    return mean


def _sharpness(green: NDArray[np.uint8], lines_apart: int) -> float:
    rows, columns = green[::lines_apart], green[:, ::lines_apart].T
    height, width = green.shape
    # Rows and columns of a square tile together: the arithmetic takes less time than calling NumPy does.
    parts = [_lines(width, rows, columns)] if width == height else [_lines(width, rows), _lines(height, columns)]
    fine = whole = 0.0
    for lines in parts:
        of_3, of_7, of_31 = _sums(lines)
        fine += _variance(7 * of_3 - 3 * of_7) / (3 * 7) ** 2
        whole += _variance(31 * of_3 - 3 * of_31) / (3 * 31) ** 2
    fine, whole = math.sqrt(fine / len(parts)), math.sqrt(whole / len(parts))
    return fine / whole if whole > FAINT else 0.0


def _lines(length: int, *parts: NDArray[np.uint8]) -> NDArray[np.int16]:
    """Lines of pixels one below the other, their ends repeated; 16 bits, with which a processor is fastest."""
    lines = np.empty((sum(len(part) for part in parts), length + 2 * HALF_COARSE_PX), np.int16)
    start = 0
    for part in parts:
        lines[start : start + len(part), HALF_COARSE_PX:-HALF_COARSE_PX] = part
        start += len(part)
    lines[:, :HALF_COARSE_PX] = lines[:, HALF_COARSE_PX : HALF_COARSE_PX + 1]
    lines[:, -HALF_COARSE_PX:] = lines[:, -HALF_COARSE_PX - 1 : -HALF_COARSE_PX]
    return lines


def _sums(lines: NDArray[np.int16]) -> tuple[NDArray[np.int16], NDArray[np.int16], NDArray[np.int16]]:
    """Running sums of 3, 7 and 31 pixels around each pixel but the 15 at either end: at most 31 x 255."""
    threes = lines[:, :-2] + lines[:, 1:-1] + lines[:, 2:]  # around pixel 1, 2, ...
    nines = threes[:, :-6] + threes[:, 3:-3] + threes[:, 6:]  # around pixel 4
    many = nines[:, :-18] + nines[:, 9:-9] + nines[:, 18:]  # 27, around pixel 13
    length = lines.shape[1] - 2 * HALF_COARSE_PX
    of_3, here = threes[:, 14 : 14 + length], lines[:, 15 : 15 + length]
    of_7 = threes[:, 12 : 12 + length] + here + threes[:, 16 : 16 + length]
    of_31 = many[:, 2 : 2 + length] + lines[:, :length] + lines[:, 1 : 1 + length]
    of_31 += lines[:, 29 : 29 + length]
    of_31 += lines[:, 30 : 30 + length]
    return of_3, of_7, of_31


def _variance(values: NDArray[np.int16]) -> float:
    flat = values.ravel().astype(np.float32)
    mean = float(np.add.reduce(flat)) / flat.size
    return float(flat @ flat) / flat.size - mean * mean
