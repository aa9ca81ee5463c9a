"""`histossl views`: a contact sheet of what the model will see."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from histossl.cli.options import ConfigOption, SlidesOption, WorkspaceOption
from histossl.core import console
from histossl.core.config import TileConfig
from histossl.core.errors import SlideError, StoreError, UsageError
from histossl.core.workspace import Workspace, written_aside

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


DEFAULTS = TileConfig()
MOST_TILES = 64


def register(app: typer.Typer) -> None:
    app.command(
        epilog="Example: histossl views --recipe mocov2-histology --output views.png\n\n"
        "Before tiling: histossl views --slides /data/slides --recipe dinov2-histology --output views.png"
    )(views)


def views(
    slides: SlidesOption = None,
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,  # noqa: ARG001  (its callback has turned it into defaults)
    recipe: Annotated[
        str,
        typer.Option(
            help="mocov1, mocov2, mocov3, simclr, dino, dinov2, dinov2-released, rotation, context, jigsaw, "
            'colorization; with "-histology" as tissue wants.'
        ),
    ] = "mocov2-histology",
    view_set: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A setting of every view, over the recipe's; as for `pretrain`."),
    ] = None,
    output: Annotated[Path, typer.Option(metavar="FILE.png", help="Where to write the sheet.")] = Path("views.png"),
    view_px: Annotated[int, typer.Option(help="Side of the (global) views in pixels.")] = 224,
    tiles: Annotated[int, typer.Option(help=f"How many tiles to show, 1-{MOST_TILES}.")] = 8,
    draws: Annotated[int, typer.Option(help="How often each tile's views are made, 1-8.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the choice of tiles and of the views.")] = 0,
    tile_px: Annotated[int, typer.Option(help="With --slides: side of a tile in pixels.")] = DEFAULTS.tile_px,
    mpp: Annotated[float, typer.Option(help="With --slides: microns per pixel of the tiles.")] = DEFAULTS.mpp,
    slide_mpp: Annotated[
        float | None, typer.Option(help="With --slides: microns per pixel of slides that do not say it themselves.")
    ] = None,
) -> None:
    """Draw some tiles and write them with their augmented views as a picture, one row per tile.

    Tiles come from the workspace, or straight from the slides with --slides, before anything is tiled.
    """
    import torch

    from histossl.views.contact_sheet import contact_sheet
    from histossl.views.recipe import make_views, recipe_named, with_settings

    if not 1 <= tiles <= MOST_TILES:
        raise UsageError(f"--tiles {tiles}: must be 1 to {MOST_TILES}")
    if not 1 <= draws <= 8:
        raise UsageError(f"--draws {draws}: must be 1 to 8")
    if output.suffix.lower() != ".png":
        raise UsageError(f"--output {output}: must be a .png file")
    if not output.parent.is_dir():
        raise UsageError(f"--output {output}: there is no folder {output.parent}")
    chosen = with_settings(recipe_named(recipe, view_px), view_set or ())
    if slides is None:
        names, pixels = _from_store(Workspace.at(workspace), tiles, seed)
    else:
        names, pixels = _from_slides(slides, tiles, seed, TileConfig(tile_px=tile_px, mpp=mpp), slide_mpp)
    columns = []
    for draw in range(draws):
        # A tile comes again, an epoch later, at another place of the stream: other views.
        made = make_views(pixels, chosen, seed, torch.arange(len(pixels)) + draw * len(pixels))
        columns += [(f"{draw + 1}: view {number + 1}", view) for number, view in enumerate(made)]
    title = f"{chosen.name}: {len(chosen.views)} views, seed {seed}"
    sheet = contact_sheet(title, names, pixels, columns)
    with written_aside(output) as aside:
        sheet.save(aside, "PNG")
    rows, each = console.count(len(names), "tile"), console.count(len(chosen.views), "view")
    console.say(f"{output}: {rows}, {each} each, {console.count(draws, 'time')} ({chosen.name})")


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
