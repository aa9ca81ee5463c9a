"""`histossl tile`: an archive of slides becomes a store of tiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from histossl.cli.from_config import TILES, Given, command
from histossl.cli.options import archive_of
from histossl.core import console
from histossl.core.config import (
    MACHINE,
    MPP,
    MPP_CSV_HELP,
    NAMES_HELP,
    SLIDE_MPP,
    SLIDE_MPP_HELP,
    SLIDES_HELP,
    TILE_PX,
    TILE_SIDE,
    TileConfig,
    check_scales,
    note_command,
    read_scales,
)
from histossl.core.errors import HistosslError, StoreError, UsageError
from histossl.core.options import Checked, between, option, show_list
from histossl.core.workspace import Workspace

if TYPE_CHECKING:
    from histossl.slides.ledger import LedgerRow

SHOWN_REASONS = 8
SAME_SCALE = 0.005  # what slides differ by is not worth a line
SILENCE_S = 300.0  # a slide that gives nothing for so long is taken for hung


@dataclass(frozen=True)
class Tiling(Checked):
    """What one call of `tile` is asked for, besides what its tiles are."""

    directory: Path | None = option(None, "The same as --slides DIR.", metavar="DIR", positional=True)
    slides: Path | None = option(None, SLIDES_HELP, metavar="DIR")
    tile_px: int | None = option(
        None,
        f"Side of a tile in pixels. Default: as tiled, else {TILE_PX}, or the slides' own with --grid native.",
        check=TILE_SIDE,
    )
    mpp: tuple[float, ...] = option(
        (MPP,),
        "Microns per pixel of the tiles (0.5 is 20x); several, finest first, as 0.5,1,2.",
        read=read_scales,
        show=show_list,
    )
    slide_mpp: float | None = option(None, SLIDE_MPP_HELP, check=SLIDE_MPP)
    mpp_csv: Path | None = option(None, MPP_CSV_HELP, metavar="FILE.csv")
    regions: Path | None = option(
        None,
        "Folder with QuPath GeoJSON files (A1.geojson for A1.svs) that restrict tiling to their areas. Default: those "
        "next to the slides. Of MIRAX and Leica slides, coordinates count from the scanned area's corner, as QuPath "
        "counts without its --no-crop.",
        metavar="DIR",
    )
    workers: int | None = option(
        None,
        "Processes, each with one slide at a time. Default: one per core.",
        MACHINE,
        check=between(1, 1024, "1 to 1024"),
    )
    dask: str | None = option(
        None,
        "Send the slides to this Dask scheduler (tcp://host:8786) instead. Needs the extra `dask`.",
        MACHINE,
        metavar="ADDRESS",
    )
    names: Path | None = option(None, NAMES_HELP, metavar="FILE.csv")
    retry: bool = option(
        False,
        "Try again what failed or hung before, and tile replaced slides again. Zips are not read through: `unzip -t` "
        "tests one, and one that you delete is made again.",
    )
    verify: bool = option(
        True,
        "Decode every tile that is copied, and compare each tile with the next coarser level of its slide, to find "
        "flipped bits and other damage that gives no error. Without it, copying is several times as fast: of each "
        "slide's copied tiles a sample is decoded.",
    )
    time_limit: float | None = option(
        None,
        f"Seconds without a tile after which a slide is taken for hung and given up. Default: {SILENCE_S:.0f}. Not "
        "with --dask, whose cluster decides when a job has taken too long.",
        MACHINE,
        check=between(1e-3, 1e6, "seconds, more than 0 and at most 1000000"),
    )


def register(app: typer.Typer) -> None:
    command(
        app,
        group=TILES,
        epilog="Example: histossl tile --slides /data/slides --workers 8\n\n"
        "Several scales: histossl tile --slides /data/slides --mpp 0.5,1,2 -w multiscale\n\n"
        "As the scanner tiled: histossl tile --slides /data/slides --grid native",
    )(tile)


def tile(workspace: Workspace, asked: Tiling, config: TileConfig, given: Given) -> None:
    """Cut the tissue of an archive's slides into JPEG tiles: one zip per slide, in WORKSPACE/tiles.

    The same command again goes on where it stopped. Each file's row in WORKSPACE/archive.csv says what became of it.
    In a workspace that has tiles, options that are left out are as these were cut; what is given must be so, too.
    """
    from histossl.slides.ledger import read_ledger
    from histossl.tiles.tiling import as_tiled, common_native_px, stored_config, tile_archive

    check_scales(asked.mpp)
    slides = archive_of(asked.directory, asked.slides)
    if asked.dask is not None and asked.workers is not None:
        raise UsageError("--workers and --dask: the Dask cluster has its own workers; give one of the two")
    if asked.dask is not None and asked.time_limit is not None:
        raise UsageError("--time-limit and --dask: a slide on a cluster is the cluster's to stop; give one of the two")
    if asked.regions is not None and not asked.regions.is_dir():
        raise UsageError(f"--regions {asked.regions}: no such folder")
    mpp, *coarser = asked.mpp
    silence_s = SILENCE_S if asked.time_limit is None else asked.time_limit
    before, tile_px = stored_config(workspace), asked.tile_px
    if tile_px is None and config.grid == "native" and before is None:
        known = read_ledger(workspace.archive_csv)
        tile_px = common_native_px(slides, mpp, asked.slide_mpp, asked.mpp_csv, asked.workers or 2, silence_s, known)
    config = replace(config, tile_px=TILE_PX if tile_px is None else tile_px, mpp=mpp, coarser_mpp=tuple(coarser))
    if before is not None:
        config = as_tiled(before, config, given)
    rows = tile_archive(
        slides,
        workspace,
        config,
        asked.workers,
        slide_mpp=asked.slide_mpp,
        mpp_csv=asked.mpp_csv,
        regions=asked.regions,
        retry=asked.retry,
        dask=asked.dask,
        silence_s=silence_s,
        verify=asked.verify,
        names_file=asked.names,
    )
    note_command(workspace.tile_commands)
    tell_tiled(rows, workspace, config.mpps)


def _scale_obtained(rows: Sequence[LedgerRow], mpps: Sequence[float]) -> str:
    """What copied tiles, which keep the scanner's scale, have in place of what was asked; empty if that is the same."""
    told = []
    for number, asked in enumerate(mpps):
        real = [float(row.tile_mpp.split("+")[number]) for row in rows if row.tile_mpp]
        if any(abs(mpp / asked - 1) > SAME_SCALE for mpp in real):
            low, high = f"{min(real):.4g}", f"{max(real):.4g}"
            told.append(f"{low if low == high else f'{low} to {high}'} microns per pixel, where {asked:g} was asked")
    return "; ".join(told)


def tell_tiled(rows: Sequence[LedgerRow], at: Workspace, mpps: Sequence[float] = ()) -> None:
    """What every command says that has tiled. HistosslError where no slide gave a tile."""
    tell(rows, mpps)
    if not any(row.num_tiles or _twin_tiles(row, at) for row in rows):
        raise HistosslError(f"no slide gave a tile; {at.archive_csv} has the reason of each")


def _twin_tiles(row: LedgerRow, at: Workspace) -> int:
    """How many tiles the slide holds that has this one's content."""
    from histossl.tiles.store.zip_store import read_tiling

    try:
        return int(read_tiling(at.zip_of(row.tile_twin))["counts"]["tiles"]) if row.tile_twin else 0
    except StoreError:
        return 0


def tell(rows: Sequence[LedgerRow], mpps: Sequence[float] = ()) -> None:
    """What became of the slides, and why some gave nothing."""
    tiled = [row for row in rows if row.num_tiles]
    tiles = sum(row.num_tiles or 0 for row in tiled)
    ways = Counter(row.tile_way for row in tiled)
    told = ", ".join(f"{count:,} {way}" for way, count in ways.most_common())
    console.say(
        f"{console.count(tiles, 'tile')} of {len(tiled):,} of {console.count(len(rows), 'slide')}"
        + (f" ({told})" if told else "")
    )
    if obtained := _scale_obtained(tiled, mpps):
        console.say(f"the slides' own tiles are at {obtained}; --grid physical cuts at exactly that")
    filters = {
        "too little tissue": sum(row.rejected_tissue or 0 for row in rows),
        "outside the regions": sum(row.rejected_region or 0 for row in rows),
        "folded": sum(row.rejected_fold or 0 for row in rows),
        "pen ink": sum(row.rejected_ink or 0 for row in rows),
        "no colour": sum(row.rejected_saturation or 0 for row in rows),
        "out of focus": sum(row.rejected_blur or 0 for row in rows),
        "damaged": sum(row.rejected_damaged or 0 for row in rows),
    }
    left_out = ", ".join(f"{count:,} {name}" for name, count in filters.items() if count)
    if left_out:
        console.say(f"places of the grid left out: {left_out}")
    warnings: dict[str, list[str]] = {}
    for row in tiled:
        if row.tile_reason:
            warnings.setdefault(row.tile_reason, []).append(row.file)
    for reason, files in list(warnings.items())[:SHOWN_REASONS]:
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        console.warn(f"{', '.join(files[:3])}{more}: {reason}")
    if len(warnings) > SHOWN_REASONS:
        console.warn(f"and {len(warnings) - SHOWN_REASONS} more kinds of warning; archive.csv has them all")
    without = [row for row in rows if not row.num_tiles]
    for row in without[:SHOWN_REASONS]:
        console.warn(f"{row.file}: {row.tile_reason or row.reason}")
    if len(without) > SHOWN_REASONS:
        console.warn(f"and {len(without) - SHOWN_REASONS} more without tiles; archive.csv has the reason of each")
    if any(row.tile_status == "failed" for row in rows):
        console.say("histossl tile --retry tries the failed ones again")
