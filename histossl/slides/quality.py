"""Is a tile worth learning from: in focus, coloured? Pure functions of pixels; the thresholds are TissueConfig's.

Folds are sought on the thumbnail (tissue.py), where they show as a whole. Tiles are judged at their own scale, so a
figure means the same on every scanner. Shapes: B tiles, H W pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FINE_PX, MIDDLE_PX, COARSE_PX = 3, 7, 31
LINES_APART, POINTS_APART = 8, 4  # so few rows, columns and pixels are enough to tell, and many times faster
FAINT = 0.5  # grey levels: contrast below is noise


def sharpness(tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    """How much of the contrast of tiles (B, H, W, 3) or (B, H, W) lies in detail of 3-7 px rather than coarser, (B,).

    Tissue in focus has 0.3 to 0.5 whatever its stain and contrast; out of focus by 2 px (sigma) about 0.17, by 3 px
    0.12. Detail below 3 px is left out: there sits the noise, which a blurred tile has too. An empty tile has 0.
    """
    green = tiles[..., 1] if tiles.ndim == 4 else tiles  # haematoxylin and eosin both absorb green
    assert green.ndim == 3, tiles.shape
    fine = np.zeros(len(green))
    whole = np.zeros(len(green))
    for some in (green[:, ::LINES_APART], green[:, :, ::LINES_APART].transpose(0, 2, 1)):
        lines = np.ascontiguousarray(some, dtype=np.int32)
        smooth = _boxed(lines, FINE_PX)
        fine += (smooth - _boxed(lines, MIDDLE_PX)).var(axis=(1, 2))
        whole += (smooth - _boxed(lines, COARSE_PX)).var(axis=(1, 2))
    fine, whole = np.sqrt(fine / 2), np.sqrt(whole / 2)
    return np.where(whole > FAINT, fine / np.maximum(whole, FAINT), 0).astype(np.float32)


def saturation(tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Mean colour saturation of tiles (B, H, W, 3), (B,): 0 grey, 1 a pure colour."""
    assert tiles.ndim == 4, tiles.shape
    red, green, blue = (tiles[:, ::POINTS_APART, ::POINTS_APART, channel].astype(np.float32) for channel in range(3))
    high = np.maximum(np.maximum(red, green), blue)
    low = np.minimum(np.minimum(red, green), blue)
    mean: NDArray[np.float32] = ((high - low) / np.maximum(high, 1)).mean(axis=(1, 2))
    return mean


def _boxed(lines: NDArray[np.int32], width: int) -> NDArray[np.float32]:
    """Running mean along the last axis, its ends repeated."""
    width = min(width, (lines.shape[-1] - 1) // 2 * 2 + 1)
    half = width // 2
    padded = np.pad(lines, ((0, 0), (0, 0), (half + 1, half)), mode="edge")
    padded[..., 0] = 0
    total = padded.cumsum(axis=-1, dtype=np.int32)
    mean: NDArray[np.float32] = ((total[..., width:] - total[..., :-width]) / np.float32(width)).astype(np.float32)
    return mean
