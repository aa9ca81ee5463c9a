"""Where on a slide a model sees what: a picture beside the tissue, and the same for QuPath.

The tissue is put together from the tiles themselves, so that neither needs the slide at hand.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from histossl.core.text import shown
from histossl.core.workspace import written_aside
from histossl.tiles.store.index import TileIndex
from histossl.tiles.stream.loader import decode_tiles
from histossl.views.recipe import clean_view

MAP = "viridis"
OPACITY = 0.55
MOST_PX = 1400  # longer side of one of the two pictures
TILE_PX = 32  # a tile in the picture at most
GAP_PX, BAR_PX, TEXT_PX = 24, 14, 34
# Okabe and Ito's colours: the colour-blind tell them apart.
CLASS_COLOURS = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))


def draw_heatmap(
    path: Path,
    index: TileIndex,
    numbers: NDArray[np.int64],
    side_l0: float,
    values: NDArray[np.floating],
    caption: str,
    low: float,
    high: float,
) -> None:
    """PNG: the tissue, and the tissue under `values` (one per tile) in colours from `low` to `high`."""
    coords = index.coords_l0(numbers).astype(np.float64)
    origin = coords.min(0)
    extent = coords.max(0) - origin + side_l0
    scale = min(MOST_PX / extent.max(), TILE_PX / side_l0)
    width, height = (max(1, int(np.ceil(length * scale))) for length in extent)
    tissue = np.full((height, width, 3), 255, dtype=np.uint8)
    cover = np.zeros((height, width, 1), dtype=np.float32)
    colours = np.full((height, width, 3), 255, dtype=np.float32)
    shades = 255 * colormaps[MAP](np.clip((values - low) / max(high - low, 1e-12), 0, 1))[:, :3]
    left = np.floor((coords - origin) * scale).astype(int)
    right = np.maximum(np.floor((coords - origin + side_l0) * scale).astype(int), left + 1)
    side_px = max(1, round(side_l0 * scale))
    for first in range(0, len(numbers), 256):
        tiles = decode_tiles(index.read_many(numbers[first : first + 256]), index.tile_px)
        small = (clean_view(tiles, side_px) * 255).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)
        for place, tile in enumerate(small, start=first):
            (x0, y0), (x1, y1) = left[place], right[place]
            tissue[y0:y1, x0:x1] = np.asarray(Image.fromarray(tile).resize((x1 - x0, y1 - y0)))[
                : height - y0, : width - x0
            ]
            colours[y0:y1, x0:x1] = shades[place]
            cover[y0:y1, x0:x1] = OPACITY
    under = (tissue * (1 - cover) + colours * cover).round().astype(np.uint8)
    page = Image.new("RGB", (2 * width + GAP_PX, height + TEXT_PX), "white")
    page.paste(Image.fromarray(tissue), (0, 0))
    page.paste(Image.fromarray(under), (width + GAP_PX, 0))
    _legend(page, width + GAP_PX, height, width, caption, low, high)
    with written_aside(path) as aside:
        page.save(aside, format="PNG")


def _legend(page: Image.Image, x: int, y: int, width: int, caption: str, low: float, high: float) -> None:
    bar = 255 * colormaps[MAP](np.linspace(0, 1, max(2, min(width, 160))))[None, :, :3]
    page.paste(Image.fromarray(np.repeat(bar, BAR_PX - 4, 0).astype(np.uint8)), (x, y + 4))
    ImageDraw.Draw(page).text((x, y + BAR_PX + 4), f"{low:.2g} to {high:.2g}: {shown(caption)}", fill="black")


def qupath_corners(index: TileIndex, slide: str, numbers: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """(n, 2) tiles' corners in level-0 pixels, as QuPath counts them: from the corner of the slide's bounds."""
    corner: NDArray[np.int64] = np.array(index.facts(slide).get("bounds_l0", (0, 0)), dtype=np.int64)
    return index.coords_l0(numbers) - corner


def write_qupath(
    path: Path,
    corners: NDArray[np.int64],
    side_l0: float,
    shares: NDArray[np.floating],
    classes: Sequence[str],
    attention: NDArray[np.floating] | None = None,
) -> None:
    """GeoJSON that QuPath imports: a square per tile with its most probable class and its measurements."""
    features = []
    for number, ((x, y), row) in enumerate(zip(corners.tolist(), shares, strict=True)):
        right, bottom = x + side_l0, y + side_l0
        best = int(row.argmax())
        measurements = {f"probability {name}": round(float(value), 4) for name, value in zip(classes, row, strict=True)}
        if attention is not None:
            measurements["attention"] = float(f"{attention[number]:.4g}")
        features.append(
            {
                "type": "Feature",
                "geometry": {
                    "type": "Polygon",
                    "coordinates": [[[x, y], [right, y], [right, bottom], [x, bottom], [x, y]]],
                },
                "properties": {
                    "objectType": "detection",
                    "classification": {"name": classes[best], "color": CLASS_COLOURS[best % len(CLASS_COLOURS)]},
                    "measurements": measurements,
                },
            }
        )
    with written_aside(path) as aside:
        aside.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")
