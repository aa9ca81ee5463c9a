"""A tile store without slides: tiles of flat colour with a gradient, whose colour tells slide and tile number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import simplejpeg

from histossl.core.config import TileConfig
from histossl.core.workspace import Workspace
from histossl.tiles.store.index import TileIndex
from histossl.tiles.store.zip_store import new_store, scale_name


def synthetic_tile(slide: int, tile: int, tile_px: int) -> np.ndarray:
    """uint8 (tile_px, tile_px, 3): red says the slide, green the tile, blue runs from left to right."""
    image = np.empty((tile_px, tile_px, 3), np.uint8)
    image[..., 0] = 40 + slide * 37 % 200
    image[..., 1] = 40 + tile * 13 % 200
    image[..., 2] = np.linspace(40, 220, tile_px).astype(np.uint8)
    return image


def write_synthetic_store(
    workspace: Workspace,
    slides: Sequence[str] = ("A1", "A2", "case2/B1"),
    tiles_per_slide: int | Sequence[int] = 12,
    tile_px: int = 64,
    mpp: float = 0.5,
    mpp_l0: float = 0.25,
    picture: Callable[[int, int, int], np.ndarray] = synthetic_tile,
) -> TileIndex:
    """Zips for `slides` (tiles in rows of ten, tissue share rising from 0.5 to 1), and their index."""
    counts = [tiles_per_slide] * len(slides) if isinstance(tiles_per_slide, int) else list(tiles_per_slide)
    config = TileConfig(tile_px=tile_px, mpp=mpp)
    side_l0 = round(tile_px * mpp / mpp_l0)
    for number, (slide, count) in enumerate(zip(slides, counts, strict=True)):
        with new_store(workspace.zip_of(slide), [mpp]) as store:
            for tile in range(count):
                jpeg = simplejpeg.encode_jpeg(picture(number, tile, tile_px), quality=95, colorsubsampling="444")
                tissue = 0.5 + 0.5 * tile / max(1, count - 1)
                store.add(tile % 10 * side_l0, tile // 10 * side_l0, jpeg, tissue)
            store.finish(
                {
                    "tile_px": tile_px,
                    "scales": [{"name": scale_name(mpp), "mpp": mpp, "side_l0": side_l0}],
                    "regions": [],
                    "slide": {"file": f"{slide}.svs", "fingerprint": f"{number:032x}", "mpp_l0": mpp_l0},
                    "config": asdict(config),
                }
            )
    return TileIndex.open(workspace)
