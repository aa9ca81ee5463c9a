"""`histossl bench ...`: what this machine does per second, what limits it, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from histossl.cli.from_config import OTHER, Given, command
from histossl.core import console
from histossl.core.errors import StoreError, UsageError
from histossl.core.options import REQUIRED, Checked, between, one_of, option
from histossl.core.workspace import Workspace
from histossl.runtime.process_pool import num_cores

if TYPE_CHECKING:
    from histossl.tiles.store.index import TileIndex

bench = typer.Typer(invoke_without_command=True)
STEPS_CPU, STEPS_GPU = 2, 10
TILE_PX = between(32, 4096)
REPEATS = between(1, 50)


@dataclass(frozen=True)
class Run(Checked):
    """What every measurement of training needs."""

    backbone: str = option("", "Any timm model.", unset="resnet50 on a GPU, resnet18 without")
    method: str = option("mocov2", "See `histossl methods`.")
    batch_size: int = option(
        0, "Tiles per step.", check=between(2, 10**6, "2 or more"), unset="64 on a GPU, 16 without"
    )
    view_px: int = option(224, "Side of the views in pixels.", check=between(16, 1024, "a side of 16 to 1024 pixels"))
    tile_px: int = option(256, "Side of synthetic tiles, where the workspace has none.", check=TILE_PX)
    steps: int = option(
        0,
        "Steps to time, twice.",
        check=between(1, 10**6, "1 or more"),
        unset="10 on a GPU, 2 without",
    )
    workers: int = option(0, "Threads that read and decode.", check=between(1, 1024, "1 to 1024"), unset="one per core")
    precision: str = option("auto", "auto, fp32, bf16 or fp16.", check=one_of("auto", "fp32", "bf16", "fp16"))
    compiled: bool = option(False, "Compile the networks first.", flag="--compile")


@dataclass(frozen=True)
class ViewsRun(Checked):
    recipe: str = option("mocov2-histology", "Whose views to make; see `histossl views`.")
    view_px: int = option(
        224, "Side of the (global) views in pixels.", check=between(8, 1024, "a side of 8 to 1024 pixels")
    )
    tile_px: int = option(256, "Side of synthetic tiles, where the workspace has none.", check=TILE_PX)
    tiles: int = option(256, "How many tiles each repeat handles, 16-4096.", check=between(16, 4096))
    repeats: int = option(3, "How often each figure is measured, 1-50.", check=REPEATS)
    workers: int = option(0, "Threads that read and decode.", check=between(1, 1024, "1 to 1024"), unset="one per core")


@dataclass(frozen=True)
class TileRun(Checked):
    slide: Path = option(REQUIRED, "One of your own slides.", metavar="SLIDE", positional=True)
    tile_px: int = option(256, "Side of a tile in pixels.", check=between(16, 4096, "a side of 16 to 4096 pixels"))
    mpp: float = option(
        0.5, "Microns per pixel of the tiles.", check=between(0.05, 100, "microns per pixel between 0.05 and 100")
    )
    slide_mpp: float | None = option(
        None,
        "Microns per pixel of the slide, over what it says.",
        check=between(0.05, 5, "microns per pixel between 0.05 and 5"),
    )
    tiles: int = option(400, "How many tiles each repeat cuts, 1-100000.", check=between(1, 100_000, "1 to 100000"))
    repeats: int = option(3, "How often each figure is measured, 1-50.", check=REPEATS)


def register(app: typer.Typer) -> None:
    command(bench, callback=True, without=("precision", "compiled"))(whole)
    command(
        bench,
        name="views",
        epilog="Example: histossl bench views -w WORKSPACE --recipe dinov2-histology\n\n"
        "Without tiles, on synthetic ones: histossl bench views --tile-px 256",
    )(views)
    command(
        bench,
        name="train",
        epilog="Example: histossl bench train -w WORKSPACE --backbone resnet50 --batch-size 256",
        without=("tile_px",),
    )(train)
    command(bench, name="tile", epilog="Example: histossl bench tile /data/slides/A1.svs")(tile)
    app.add_typer(
        bench,
        name="bench",
        help="Measure this machine: how fast tiles are read, decoded, made into views and trained on, what limits, and "
        "what to change. Alone all of it in a minute or two; each command below measures one part closer.",
        epilog="Example: histossl bench -w WORKSPACE\n\nWith a part alone: histossl bench views",
        rich_help_panel=OTHER,
    )


def whole(context: typer.Context, workspace: Workspace, asked: Run, given: Given) -> None:
    """Read, decode, view and step rates of this machine in one table, which is the limit, and what to change."""
    if context.invoked_subcommand is not None:
        if given.command_line:
            flag = f"--{min(given.command_line).replace('_', '-')}"
            raise UsageError(f"{flag}: goes after `histossl bench {context.invoked_subcommand}`, not before it")
        return
    import torch

    from histossl.bench.step_rates import advice, measure
    from histossl.core.config import PretrainConfig, RuntimeConfig

    gpu = torch.cuda.is_available()
    config = PretrainConfig(
        method=asked.method,
        backbone=asked.backbone or ("resnet50" if gpu else "resnet18"),
        weights="random",
        steps=1000,
        batch_size=asked.batch_size or (64 if gpu else 16),
        view_px=asked.view_px,
    )
    runtime = RuntimeConfig(num_workers=asked.workers or num_cores())
    with _tiles(workspace, asked.tile_px, "workspace" in given) as index:
        rates = measure(index, config, runtime, asked.steps or (STEPS_GPU if gpu else STEPS_CPU))
    console.table(
        f"{asked.method} on {torch.cuda.get_device_name() if gpu else f'{num_cores()} CPU cores'}",
        ("part", "ms per tile", "tiles/s", ""),
        [(each.name, f"{each.ms:.3f}", each.rate, each.note) for each in rates.figures],
        right=("ms per tile", "tiles/s"),
    )
    for line in advice(rates):
        console.say(line)


@contextmanager
def _tiles(at: Workspace, tile_px: int, named: bool) -> Iterator[TileIndex]:
    """Those of the workspace; synthetic ones where it was not named and has none."""
    from histossl.bench.step_rates import synthetic_tiles
    from histossl.tiles.store.index import TileIndex

    try:
        index = TileIndex.open(at)
    except StoreError:
        if named:
            raise
        console.say(f"no tiles in {at.root}: measuring with synthetic ones of {tile_px} px")
        with synthetic_tiles(tile_px) as index:
            yield index
        return
    console.say(f"tiles of {at.root}: {len(index):,} of {index.tile_px} px")
    yield index


def views(workspace: Workspace, asked: ViewsRun, given: Given) -> None:
    """Read, decode and augment tiles, and say how many a second that makes, beside Pillow and torchvision."""
    from histossl.bench.view_rates import SyntheticStore, TileStore, advice, view_rates
    from histossl.tiles.store.index import TileIndex
    from histossl.views.recipe import recipe_named

    chosen = recipe_named(asked.recipe, asked.view_px)
    store: TileStore
    try:
        store = TileIndex.open(workspace)
        console.say(f"tiles of {workspace.root}: {len(store):,} of {store.tile_px} px")
    except StoreError:
        if "workspace" in given:
            raise
        store = SyntheticStore(asked.tile_px)
        console.say(f"no tiles in {workspace.root}: measuring with synthetic ones of {asked.tile_px} px")
    rates = view_rates(store, chosen, asked.workers or num_cores(), asked.tiles, asked.repeats)
    console.table(
        f"a tile of {store.tile_px} px, {asked.repeats} repeats",
        ("stage", "ms per tile", "range", "tiles/s", ""),
        [(each.name, f"{each.ms:.3f}", each.spread, f"{each.tiles_per_s:,.0f}", each.note) for each in rates.figures],
        right=("ms per tile", "range", "tiles/s"),
    )
    console.say(f"loader alone: {rates.loader_gain:.0f}x the reference; with views on the same core: {rates.gain:.1f}x")
    for line in advice(rates):
        console.say(line)


def train(workspace: Workspace, asked: Run) -> None:
    """Time training steps as they run, and with views that never leave the device: the gap is what loading costs."""
    import contextlib
    import tempfile

    import torch

    from histossl.core.config import PretrainConfig, RuntimeConfig
    from histossl.tiles.store.index import TileIndex
    from histossl.training.plan import step_times_s

    index = TileIndex.open(workspace)
    gpu = torch.cuda.is_available()
    config = PretrainConfig(
        method=asked.method,
        backbone=asked.backbone or ("resnet50" if gpu else "resnet18"),
        weights="random",
        batch_size=asked.batch_size or (64 if gpu else 16),
        view_px=asked.view_px,
    )
    runtime = RuntimeConfig(
        num_workers=asked.workers or num_cores(), precision=asked.precision, compiled=asked.compiled
    )
    steps = asked.steps or STEPS_GPU
    with tempfile.TemporaryDirectory() as nowhere:
        run = Workspace(Path(nowhere)).pretrain("bench")
        loop_s, resident_s = step_times_s(index, run, config, runtime, steps)
        seconds = {"as it runs": loop_s, "views at hand": resident_s}
        if torch.cuda.is_available():
            on_the_gpu = replace(runtime, decode_on_gpu=True)
            with contextlib.suppress(UsageError):  # where it does not work
                seconds["as it runs, --decode-on-gpu"] = step_times_s(index, run, config, on_the_gpu, steps)[0]
    console.table(
        f"{config.method}, {config.backbone}, {config.batch_size} tiles of {config.view_px} px",
        ("step", "s", "tiles/s"),
        [(name, f"{s:.3f}", f"{config.batch_size / s:,.0f}") for name, s in seconds.items()],
        right=("s", "tiles/s"),
    )
    for line in _step_advice(loop_s, resident_s, seconds.get("as it runs, --decode-on-gpu")):
        console.say(line)


def _step_advice(loop_s: float, resident_s: float, gpu_decoding_s: float | None = None) -> list[str]:
    """What limits a step, and what to change, a line each. Two ways within 3 % of each other are the same."""
    lines = [f"as it runs: {resident_s / loop_s:.0%} of the rate with views at hand"]
    if gpu_decoding_s is not None and gpu_decoding_s < 0.97 * loop_s:
        lines.append(f"{loop_s / gpu_decoding_s:.2f}x as fast with tiles decoded on the GPU: pass --decode-on-gpu")
        loop_s = gpu_decoding_s
    elif gpu_decoding_s is not None:
        lines.append("tiles decoded on the GPU are no faster: leave --decode-on-gpu out")
    if resident_s / loop_s < 0.95:
        lines.append("limit: tiles and views; see histossl bench views, give --workers more cores")
    else:
        lines.append("limit: the network itself; a smaller --backbone or --view-px, --compile, or more GPUs")
    return lines


def tile(asked: TileRun) -> None:
    """Cut one slide into tiles in each way it allows, and by the usual loop (openslide-python and Pillow) beside it."""
    from histossl.bench.tiling_rates import measure_tiling
    from histossl.core.config import TileConfig

    figures = measure_tiling(
        asked.slide, TileConfig(tile_px=asked.tile_px, mpp=asked.mpp), asked.slide_mpp, asked.tiles, asked.repeats
    )
    console.table(
        f"{asked.slide.name}: CPU time on one core, {asked.repeats} repeats",
        ("way", "tile", "tiles", "ms per tile", "usual loop", "times faster", "range"),
        [
            (
                one.way if one.filters else f"{one.way}, no filters",
                f"{one.tile_px} px at {one.mpp:.4g}",
                one.num_tiles,
                f"{one.own_ms:.3f}",
                f"{one.loop_ms:.2f}",
                f"{one.ratio:.1f}",
                f"{min(one.ratios):.1f}-{max(one.ratios):.1f}",
            )
            for one in figures
        ],
        right=("tiles", "ms per tile", "usual loop", "times faster", "range"),
    )
    console.say("copied: its own JPEG tiles as bytes; stitched: each of them decoded once; read: through OpenSlide")
    console.say("filters (focus, colour, ink) are on by default and the usual loop has none: compare like with like")
    console.say("both sides open the slide anew in each repeat: neither finds it in OpenSlide's cache")
