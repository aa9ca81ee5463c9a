"""`histossl bench ...`: what this machine does per second, what limits it, and what to change."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from histossl.cli.options import CheckedGroup, WorkspaceOption, above_0
from histossl.core import console
from histossl.core.errors import StoreError, UsageError
from histossl.core.workspace import Workspace

if TYPE_CHECKING:
    from histossl.tiles.store.index import TileIndex

bench = typer.Typer(
    help="Measure this machine: how fast tiles are read, decoded, made into views and learnt from, what limits, and "
    "what to change. Alone all of it in a minute or two; each command below measures one part closer.",
    epilog="Example: histossl bench -w WORKSPACE\n\nWith a part alone: histossl bench views",
    invoke_without_command=True,
    cls=CheckedGroup,
)
STEPS_CPU, STEPS_GPU = 2, 10


def register(app: typer.Typer) -> None:
    bench.command(
        epilog="Example: histossl bench views -w WORKSPACE --recipe dinov2-histology\n\n"
        "Without tiles, on synthetic ones: histossl bench views --tile-px 256"
    )(views)
    bench.command(epilog="Example: histossl bench train -w WORKSPACE --backbone resnet50 --batch-size 256")(train)
    bench.command(epilog="Example: histossl bench tile /data/slides/A1.svs")(tile)
    app.add_typer(bench, name="bench")


@bench.callback()
def whole(
    context: typer.Context,
    workspace: WorkspaceOption = None,
    backbone: Annotated[
        str, typer.Option(help="Any timm model. Default: resnet50 on a GPU, resnet18 without.", show_default=False)
    ] = "",
    method: Annotated[str, typer.Option(help="See `histossl methods`.")] = "mocov2",
    batch_size: Annotated[
        int,
        typer.Option(help="Tiles per step. Default: 64 on a GPU, 16 without.", show_default=False, callback=above_0),
    ] = 0,
    view_px: Annotated[int, typer.Option(help="Side of the views in pixels.")] = 224,
    tile_px: Annotated[int, typer.Option(help="Side of synthetic tiles, where the workspace has none.")] = 256,
    steps: Annotated[
        int,
        typer.Option(
            help="Steps to time, twice. Default: 10 on a GPU, 2 without.", show_default=False, callback=above_0
        ),
    ] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that read and decode. Default: one per core.", show_default=False)
    ] = None,
) -> None:
    """Read, decode, view and step rates of this machine in one table, which is the limit, and what to change."""
    given = [
        option.opts[0]
        for option in context.command.params
        if option.name and getattr(context.get_parameter_source(option.name), "name", "") == "COMMANDLINE"
    ]
    if context.invoked_subcommand is not None:
        if given:
            raise UsageError(f"{given[0]}: goes after `histossl bench {context.invoked_subcommand}`, not before it")
        return
    if not 32 <= tile_px <= 4096:
        raise UsageError(f"--tile-px {tile_px}: must be 32 to 4096")
    import torch

    from histossl.bench.step_rates import advice, measure
    from histossl.core.config import PretrainConfig
    from histossl.training.setup.run_options import Operation

    gpu = torch.cuda.is_available()
    config = PretrainConfig(
        method=method,
        backbone=backbone or ("resnet50" if gpu else "resnet18"),
        weights="random",
        steps=1000,
        batch_size=batch_size or (64 if gpu else 16),
        view_px=view_px,
    )
    operation = Operation(num_workers=workers or _cores())
    with _tiles(workspace, tile_px) as index:
        rates = measure(index, config, operation, steps or (STEPS_GPU if gpu else STEPS_CPU))
    console.table(
        f"{method} on {torch.cuda.get_device_name() if gpu else f'{_cores()} CPU cores'}",
        ("part", "ms per tile", "tiles/s", ""),
        [(each.name, f"{each.ms:.3f}", each.rate, each.note) for each in rates.figures],
        right=("ms per tile", "tiles/s"),
    )
    for line in advice(rates):
        console.say(line)


@contextmanager
def _tiles(workspace: Path | None, tile_px: int) -> Iterator[TileIndex]:
    """Those of the workspace; synthetic ones where it was not named and has none."""
    from histossl.bench.step_rates import synthetic_tiles
    from histossl.tiles.store.index import TileIndex

    at = Workspace.at(workspace)
    try:
        index = TileIndex.open(at)
    except StoreError:
        if workspace is not None:
            raise
        console.say(f"no tiles in {at.root}: measuring with synthetic ones of {tile_px} px")
        with synthetic_tiles(tile_px) as index:
            yield index
        return
    console.say(f"tiles of {at.root}: {len(index):,} of {index.tile_px} px")
    yield index


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def views(
    workspace: WorkspaceOption = None,
    recipe: Annotated[str, typer.Option(help="Whose views to make; see `histossl views`.")] = "mocov2-histology",
    view_px: Annotated[int, typer.Option(help="Side of the (global) views in pixels.")] = 224,
    tile_px: Annotated[int, typer.Option(help="Side of synthetic tiles, where the workspace has none.")] = 256,
    tiles: Annotated[int, typer.Option(help="How many tiles each repeat handles, 16-4096.")] = 256,
    repeats: Annotated[int, typer.Option(help="How often each figure is measured, 1-50.")] = 3,
    workers: Annotated[
        int | None, typer.Option(help="Threads that read and decode. Default: one per core.", show_default=False)
    ] = None,
) -> None:
    """Read, decode and augment tiles, and say how many a second that makes, beside Pillow and torchvision."""
    from histossl.bench.view_rates import SyntheticStore, TileStore, advice, view_rates
    from histossl.tiles.store.index import TileIndex
    from histossl.views.recipe import recipe_named

    if not 16 <= tiles <= 4096:
        raise UsageError(f"--tiles {tiles}: must be 16 to 4096")
    if not 1 <= repeats <= 50:
        raise UsageError(f"--repeats {repeats}: must be 1 to 50")
    if not 32 <= tile_px <= 4096:
        raise UsageError(f"--tile-px {tile_px}: must be 32 to 4096")
    if workers is not None and not 1 <= workers <= 256:
        raise UsageError(f"--workers {workers}: must be 1 to 256")
    chosen = recipe_named(recipe, view_px)
    num_workers = workers or _cores()
    at = Workspace.at(workspace)
    store: TileStore
    try:
        store = TileIndex.open(at)
        console.say(f"tiles of {at.root}: {len(store):,} of {store.tile_px} px")
    except StoreError:
        if workspace is not None:
            raise
        store = SyntheticStore(tile_px)
        console.say(f"no tiles in {at.root}: measuring with synthetic ones of {tile_px} px")
    rates = view_rates(store, chosen, num_workers, tiles, repeats)
    console.table(
        f"a tile of {store.tile_px} px, {repeats} repeats",
        ("stage", "ms per tile", "range", "tiles/s", ""),
        [(each.name, f"{each.ms:.3f}", each.spread, f"{each.tiles_per_s:,.0f}", each.note) for each in rates.figures],
        right=("ms per tile", "range", "tiles/s"),
    )
    console.say(f"loader alone: {rates.loader_gain:.0f}x the reference; with views on the same core: {rates.gain:.1f}x")
    for line in advice(rates):
        console.say(line)


def train(
    workspace: WorkspaceOption = None,
    backbone: Annotated[str, typer.Option(help="Any timm model; its weights do not matter here.")] = "resnet50",
    method: Annotated[str, typer.Option(help="See `histossl methods`.")] = "mocov2",
    batch_size: Annotated[int, typer.Option(help="Tiles per step.")] = 64,
    view_px: Annotated[int, typer.Option(help="Side of the views in pixels.")] = 224,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the networks first.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps to time.")] = 10,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read and decode.")] = 2,
) -> None:
    """Time training steps as they run, and with views that never leave the device: the gap is what loading costs."""
    import contextlib
    import tempfile

    import torch

    from histossl.core.config import PretrainConfig
    from histossl.tiles.store.index import TileIndex
    from histossl.training.plan import step_times_s
    from histossl.training.setup.run_options import Operation

    at = Workspace.at(workspace)
    index = TileIndex.open(at)
    config = PretrainConfig(method=method, backbone=backbone, weights="random", batch_size=batch_size, view_px=view_px)
    operation = Operation(num_workers=workers, precision=precision, compiled=compiled)
    with tempfile.TemporaryDirectory() as nowhere:
        run = Workspace(Path(nowhere)).pretrain("bench")
        loop_s, resident_s = step_times_s(index, run, config, operation, steps)
        seconds = {"as it runs": loop_s, "views at hand": resident_s}
        if torch.cuda.is_available():
            on_the_gpu = replace(operation, decode_on_gpu=True)
            with contextlib.suppress(UsageError):  # where it does not work
                seconds["as it runs, --decode-on-gpu"] = step_times_s(index, run, config, on_the_gpu, steps)[0]
    console.table(
        f"{method}, {backbone}, {batch_size} tiles of {view_px} px",
        ("step", "s", "tiles/s"),
        [(name, f"{s:.3f}", f"{batch_size / s:,.0f}") for name, s in seconds.items()],
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


def tile(
    slide: Annotated[Path, typer.Argument(metavar="SLIDE", help="One of your own slides.")],
    tile_px: Annotated[int, typer.Option(help="Side of a tile in pixels.")] = 256,
    mpp: Annotated[float, typer.Option(help="Microns per pixel of the tiles.")] = 0.5,
    slide_mpp: Annotated[
        float | None, typer.Option(help="Microns per pixel of the slide, over what it says.", show_default=False)
    ] = None,
    tiles: Annotated[int, typer.Option(help="How many tiles each repeat cuts, 1-100000.")] = 400,
    repeats: Annotated[int, typer.Option(help="How often each figure is measured, 1-50.")] = 3,
) -> None:
    """Cut one slide into tiles in each way it allows, and by the usual loop (openslide-python and Pillow) beside it."""
    from histossl.bench.tiling_rates import measure_tiling
    from histossl.core.config import TileConfig

    if not 1 <= tiles <= 100_000:
        raise UsageError(f"--tiles {tiles}: must be 1 to 100000")
    if not 1 <= repeats <= 50:
        raise UsageError(f"--repeats {repeats}: must be 1 to 50")
    figures = measure_tiling(slide, TileConfig(tile_px=tile_px, mpp=mpp), slide_mpp, tiles, repeats)
    console.table(
        f"{slide.name}: CPU time on one core, {repeats} repeats",
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
