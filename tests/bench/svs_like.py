"""A large slide laid out as Aperio lays them out: 0.25 mpp, 256 px JPEG tiles, levels at 1, 4 and 16, none at 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import tifffile

from histossl.demo.paint import paint_slide
from histossl.slides.reading.slide import open_slide
from histossl.slides.reading.tifffile_backend import NativeLevel


def write_svs_like(path: Path, side_px: int = 4096, repeats: int = 4, seed: int = 3) -> Path:
    """A painted square of side_px, repeated; its tiles are written as they are, so that size costs no time."""
    painted = paint_slide(path.with_name("painted.tif"), width_px=side_px, height_px=side_px, mpp=0.25, seed=seed)
    with open_slide(painted.path) as slide, tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for level in (one for one in slide.native or () if one is not None and one.downsample in (1, 4, 16)):
            tiff.write(
                _repeated(painted.path, level, repeats),
                shape=(level.height_px * repeats, level.width_px * repeats, 3),
                dtype="uint8",
                tile=(level.tile_height_px, level.tile_width_px),
                photometric="ycbcr",
                subsampling=level.subsampling,
                compression="jpeg",
                resolution=(40000 / level.downsample, 40000 / level.downsample),
                resolutionunit="CENTIMETER",
                subfiletype=0 if level.downsample == 1 else 1,
                metadata=None,
            )
    painted.path.unlink()
    return path


def _repeated(path: Path, level: NativeLevel, repeats: int) -> Iterator[bytes]:
    raw = path.read_bytes()
    across, down = level.tiles_across, level.tiles_down
    assert level.width_px == across * level.tile_width_px, "only whole tiles can be repeated"
    for row in range(down * repeats):
        for column in range(across * repeats):
            number = row % down * across + column % across
            yield raw[level.offsets[number] : level.offsets[number] + level.byte_counts[number]]
