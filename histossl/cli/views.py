"""`histossl views`: a contact sheet of what the model will see."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from histossl.cli.from_config import LOOK, command
from histossl.core import console
from histossl.core.config import SEED, SLIDES_HELP, TileConfig
from histossl.core.errors import SlideError, StoreError, UsageError
from histossl.core.options import Checked, between, option
from histossl.core.workspace import Workspace, written_aside

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


MOST_TILES = 64


@dataclass(frozen=True)
class Sheet(Checked):
    slides: Path | None = option(None, SLIDES_HELP, metavar="DIR")
    recipe: str = option(
        "mocov2-histology",
        "mocov1, mocov2, mocov3, simclr, dino, dinov2, dinov2-released, rotation, context, jigsaw, colorization; with "
        '"-histology" as tissue wants.',
    )
    view_set: tuple[str, ...] = option(
        (), "A setting of every view, over the recipe's; as for `pretrain`.", metavar="KEY=VALUE"
    )
    output: Path = option(Path("views.png"), "Where to write the sheet.", metavar="FILE.png")
    view_px: int = option(
        224, "Side of the (global) views in pixels.", check=between(8, 1024, "a side of 8 to 1024 pixels")
    )
    tiles: int = option(8, f"How many tiles to show, 1-{MOST_TILES}.", check=between(1, MOST_TILES))
    draws: int = option(2, "How often each tile's views are made, 1-8.", check=between(1, 8))
    seed: int = option(0, "Of the choice of tiles and of the views.", check=SEED)
    tile_px: int = option(
        256, "With --slides: side of a tile in pixels.", check=between(16, 4096, "a side of 16 to 4096 pixels")
    )
    mpp: float = option(
        0.5,
        "With --slides: microns per pixel of the tiles.",
        check=between(0.05, 100, "microns per pixel between 0.05 and 100"),
    )
    slide_mpp: float | None = option(
        None,
        "With --slides: microns per pixel of slides that do not say it themselves.",
        check=between(0.05, 5, "microns per pixel between 0.05 and 5"),
    )


def register(app: typer.Typer) -> None:
    command(
        app,
        group=LOOK,
        epilog="Example: histossl views --recipe mocov2-histology --output views.png\n\n"
        "Before tiling: histossl views --slides /data/slides --recipe dinov2-histology --output views.png",
    )(views)


def views(workspace: Workspace, sheet: Sheet) -> None:
    """Draw some tiles and write them with their augmented views as a picture, one row per tile.

    Tiles come from the workspace, or straight from the slides with --slides, before anything is tiled.
    """
    import torch

    from histossl.views.contact_sheet import contact_sheet
    from histossl.views.recipe import make_views, recipe_named, with_settings

    if sheet.output.suffix.lower() != ".png":
        raise UsageError(f"--output {sheet.output}: must be a .png file")
    if not sheet.output.parent.is_dir():
        raise UsageError(f"--output {sheet.output}: there is no folder {sheet.output.parent}")
    chosen = with_settings(recipe_named(sheet.recipe, sheet.view_px), sheet.view_set)
    if sheet.slides is None:
        names, pixels = _from_store(workspace, sheet.tiles, sheet.seed)
    else:
        tiling = TileConfig(tile_px=sheet.tile_px, mpp=sheet.mpp)
        names, pixels = _from_slides(sheet.slides, sheet.tiles, sheet.seed, tiling, sheet.slide_mpp)
    columns = []
    for draw in range(sheet.draws):
        # A tile comes again, an epoch later, at another place of the stream: other views.
        made = make_views(pixels, chosen, sheet.seed, torch.arange(len(pixels)) + draw * len(pixels))
        columns += [(f"{draw + 1}: view {number + 1}", view) for number, view in enumerate(made)]
    title = f"{chosen.name}: {len(chosen.views)} views, seed {sheet.seed}"
    page = contact_sheet(title, names, pixels, columns)
    with written_aside(sheet.output) as aside:
        page.save(aside, "PNG")
    rows, each = console.count(len(names), "tile"), console.count(len(chosen.views), "view")
    console.say(f"{sheet.output}: {rows}, {each} each, {console.count(sheet.draws, 'time')} ({chosen.name})")


def _from_store(at: Workspace, count: int, seed: int) -> tuple[list[str], Tensor]:
    """Tiles of the workspace, every slide as likely as any other."""
    from histossl.tiles.store.index import TileIndex
    from histossl.tiles.stream.loader import decode_good_tiles
    from histossl.tiles.stream.sampler import TileOrder

    index = TileIndex.open(at)
    order = TileOrder(index, seed, slide_balance=1.0)
    numbers = order.tile_numbers(0, min(count, order.num_tiles))
    pixels, good = decode_good_tiles(index, numbers)
    if len(good) < len(numbers):
        console.warn(f"{len(numbers) - len(good)} of {len(numbers)} tiles are damaged and left out")
    if not len(good):
        raise StoreError(f"{at.tiles}: none of the tiles that were looked at is whole; run `histossl tile` again")
    return [index.slides[slide] for slide in index.slide_of(good)], pixels


def _from_slides(
    directory: Path, count: int, seed: int, config: TileConfig, slide_mpp: float | None
) -> tuple[list[str], Tensor]:
    """Tiles cut on the spot: a few slides at random, a few places of each that are tissue."""
    import numpy as np
    import torch

    from histossl.slides.archive import walk

    files = walk(directory).found
    chance = np.random.default_rng(seed)
    names: list[str] = []
    pixels: list[np.ndarray] = []
    for looked_at, number in enumerate(chance.permutation(len(files))):
        file = files[number]
        wanted = -(-(count - len(pixels)) // (len(files) - looked_at))  # of this slide, so that the last ones suffice
        if not wanted:
            break
        try:
            cut = _cut(file.path, wanted, chance, config, slide_mpp)
        except SlideError as error:
            console.warn(str(error))
            continue
        pixels += cut
        names += [file.slide] * len(cut)
    if not pixels:
        raise StoreError(f"{directory}: no slide in it gave a tile of {config.tile_px} px at {config.mpp:g} mpp")
    return names, torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def _cut(
    path: Path, count: int, chance: np.random.Generator, config: TileConfig, slide_mpp: float | None
) -> list[np.ndarray]:
    import numpy as np

    from histossl.slides.grid import physical_grid
    from histossl.slides.quality.tissue import find_tissue
    from histossl.slides.reading.slide import open_slide

    with open_slide(path, slide_mpp) as slide:
        grid = physical_grid(slide, config.tile_px, config.mpp)
        x_l0, y_l0 = grid.corners_l0(np.arange(grid.num_places))
        share = find_tissue(slide, config.tissue).share(x_l0, y_l0, grid.side_l0)
        places = chance.permutation(np.flatnonzero(share >= config.tissue.min_tissue))[:count]
        side = round(grid.side_l0)
        return [
            slide.read_region_l0(int(x_l0[place]), int(y_l0[place]), side, side, config.tile_px, config.tile_px)
            for place in places
        ]
