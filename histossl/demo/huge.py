"""A very large painted slide in little memory, for what must not grow with the slide."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile

from histossl.core.errors import UsageError
from histossl.demo.layout import Bools, Pixels
from histossl.demo.paint import paint_pixels, refuse_unpaintable
from histossl.demo.pyramid import JPEG_QUALITY, halved, level_options


def paint_huge_slide(
    path: Path,
    *,
    width_px: int = 100_000,
    height_px: int = 100_000,
    mpp: float = 0.25,
    label: str = "adenoma",
    seed: int = 0,
    tile_px: int = 256,
    block_px: int = 2048,
) -> Path:
    """Write a very large slide in little memory: one painted block, repeated inside a round outline on empty glass.

    Every tile is encoded once and its bytes are written again and again, so 100,000 x 100,000 px take a minute or two
    and a few GB. `block_px` must be `tile_px` times a power of two.
    """
    ratio = block_px / tile_px
    if ratio < 1 or ratio != 2 ** round(math.log2(ratio)):
        raise UsageError(f"block_px {block_px}: must be tile_px {tile_px} times a power of two")
    refuse_unpaintable(label, (), "plain", "jpeg", tile_px, width_px, height_px, mpp)
    levels_in_block = round(math.log2(ratio))
    tissue = _full_block(block_px, mpp, label, seed)
    blocks = _round_outline(math.ceil(height_px / block_px), math.ceil(width_px / block_px))
    num_levels = 1 + max(0, math.ceil(math.log2(max(width_px, height_px) / (2 * tile_px))))
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with tifffile.TiffWriter(aside, bigtiff=True) as tiff:
            for level in range(num_levels):
                level_width, level_height = -(-width_px // 2**level), -(-height_px // 2**level)
                tiff.write(
                    _repeated_tiles(tissue, blocks, level, levels_in_block, level_width, level_height, tile_px),
                    shape=(level_height, level_width, 3),
                    dtype=np.uint8,
                    **level_options(level, mpp, tile_px, "jpeg", (2, 2), (level_width, level_height)),
                )
                if tissue.shape[0] > 1:
                    tissue = halved(tissue)
        aside.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error}); name another folder") from error
    finally:
        aside.unlink(missing_ok=True)
    return path


def _full_block(block_px: int, mpp: float, label: str, seed: int) -> Pixels:
    """A square of tissue without glass: the middle of a painted slide twice as wide."""
    rgb, _ = paint_pixels(2 * block_px, 2 * block_px, mpp, label, seed, None, 1.0, (), "plain", 0, 0, 0)
    start = block_px // 2
    return np.ascontiguousarray(rgb[start : start + block_px, start : start + block_px])


def _round_outline(rows: int, columns: int) -> Bools:
    """Which blocks are tissue: an ellipse over most of the slide."""
    y = (np.arange(rows)[:, None] + 0.5) / rows * 2 - 1
    x = (np.arange(columns)[None] + 0.5) / columns * 2 - 1
    return np.asarray(np.hypot(y, x) < 0.88)


def _repeated_tiles(
    tissue: Pixels, blocks: Bools, level: int, levels_in_block: int, width_px: int, height_px: int, tile_px: int
) -> Iterator[bytes]:
    """The encoded tiles of one level, row by row. `tissue` is the block at this level."""
    glass = np.full_like(tissue, 243)
    cache: dict[tuple[bytes, int, int], bytes] = {}
    per_block = max(1, tissue.shape[0] // tile_px)  # tiles across a block
    span = 2 ** max(0, level - levels_in_block)  # blocks across a tile
    for tile_row in range(math.ceil(height_px / tile_px)):
        for tile_column in range(math.ceil(width_px / tile_px)):
            first_row, first_column = tile_row * span // per_block, tile_column * span // per_block
            if span > 1:
                first_row, first_column = tile_row * span, tile_column * span
            here = blocks[first_row : first_row + span, first_column : first_column + span]
            sub_row, sub_column = tile_row % per_block, tile_column % per_block
            key = (here.tobytes() + bytes(here.shape), sub_row, sub_column)
            if key not in cache:
                padded = np.zeros((span, span), bool)
                padded[: here.shape[0], : here.shape[1]] = here
                if per_block > 1:
                    source = tissue if here.all() else glass
                    y, x = sub_row * tile_px, sub_column * tile_px
                    tile = source[y : y + tile_px, x : x + tile_px]
                else:
                    tile = np.concatenate(
                        [np.concatenate([tissue if wet else glass for wet in row], 1) for row in padded], 0
                    )
                cache[key] = _jpeg(tile)
            yield cache[key]


def _jpeg(tile: Pixels) -> bytes:
    encoded = imagecodecs.jpeg8_encode(
        np.ascontiguousarray(tile), level=JPEG_QUALITY, colorspace="RGB", outcolorspace="YCBCR", subsampling=(2, 2)
    )
    return bytes(encoded)
