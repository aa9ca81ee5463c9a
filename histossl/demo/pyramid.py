"""A picture as a pyramidal TIFF, laid out as scanners do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from histossl.demo.layout import Pixels

JPEG_QUALITY = 85


def write_pyramid(
    path: Path,
    rgb: Pixels,
    mpp: float | None,
    tile_px: int,
    compression: str,
    subsampling: tuple[int, int],
    pyramid: bool,
) -> None:
    """Tiled TIFF; each level half of the one before, down to about one tile."""
    with tifffile.TiffWriter(path, bigtiff=rgb.nbytes > 2**31) as tiff:
        level, level_rgb = 0, rgb
        while True:
            height_px, width_px = level_rgb.shape[:2]
            tiff.write(
                level_rgb,
                **level_options(level, mpp, tile_px, compression, subsampling, (width_px, height_px)),
            )
            if not pyramid or max(height_px, width_px) <= max(tile_px, 128):
                return
            level_rgb, level = halved(level_rgb), level + 1


def level_options(
    level: int,
    mpp: float | None,
    tile_px: int,
    compression: str,
    subsampling: tuple[int, int],
    size: tuple[int, int],
) -> dict[str, Any]:
    options: dict[str, Any] = {
        "tile": (tile_px, tile_px),
        "photometric": "rgb",
        "metadata": None,
        "software": "histossl",
        "subfiletype": 1 if level else 0,
    }
    if compression == "jpeg":
        options.update(compression="jpeg", subsampling=subsampling)  # stored as YCbCr
        options.update(compressionargs={"level": JPEG_QUALITY})
    elif compression == "deflate":
        options.update(compression="deflate", predictor=True)
    else:
        # 33005 is Aperio's own tag for JPEG 2000; OpenSlide finds the scale in Aperio's description.
        description = f"Aperio painted by histossl\n{size[0]}x{size[1]} ({tile_px}x{tile_px}) J2K/RGB Q=70"
        if mpp is not None:
            description += f"|MPP = {mpp * 2**level:.6f}"
        options.update(compression=33005, compressionargs={"level": 40}, description=description)
    if mpp is not None:
        per_cm = 10_000 / (mpp * 2**level)
        options.update(resolution=(per_cm, per_cm), resolutionunit="CENTIMETER")
    return options


def halved(rgb: Pixels) -> Pixels:
    """Half the size, each pixel the mean of four; an odd last row or column counts twice."""
    height_px, width_px = rgb.shape[:2]
    rgb = np.pad(rgb, ((0, height_px % 2), (0, width_px % 2), (0, 0)), mode="edge")
    total = rgb[0::2, 0::2].astype(np.uint16) + rgb[1::2, 0::2] + rgb[0::2, 1::2] + rgb[1::2, 1::2]
    return ((total + 2) // 4).astype(np.uint8)
