"""`histossl tile`: an archive of slides becomes a store of tiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from histossl.cli.options import (
    AnonymizeOption,
    ConfigOption,
    DirectoryArgument,
    MaxHoleOption,
    MinSpeckOption,
    MinTissueOption,
    MppCsvOption,
    NamesOption,
    RejectPenOption,
    SlideMppOption,
    SlidesOption,
    TissueThresholdOption,
    TissueUmOption,
    WorkspaceOption,
    archive_of,
)
from histossl.core import console
from histossl.core.config import GRIDS, TileConfig, TissueConfig, note_command
from histossl.core.errors import HistosslError, StoreError, UsageError
from histossl.core.workspace import Workspace

if TYPE_CHECKING:
    from histossl.slides.ledger import LedgerRow

DEFAULTS, TISSUE = TileConfig(), TissueConfig()
SHOWN_REASONS = 8
SAME_SCALE = 0.005  # what slides differ by is not worth a line
SILENCE_S = 300.0  # a slide that gives nothing for so long is taken for hung


def register(app: typer.Typer) -> None:
    app.command(
        epilog="Example: histossl tile --slides /data/slides --workers 8\n\n"
        "Several scales: histossl tile --slides /data/slides --mpp 0.5,1,2 -w multiscale\n\n"
        "As the scanner tiled: histossl tile --slides /data/slides --grid native"
    )(tile)


def tile(
    context: typer.Context,
    directory: DirectoryArgument = None,
    slides: SlidesOption = None,
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,  # noqa: ARG001  (its callback has turned it into defaults)
    tile_px: Annotated[
        int | None,
        typer.Option(
            help=f"Side of a tile in pixels. Default: as tiled, else {DEFAULTS.tile_px}, or the slides' own with "
            "--grid native.",
            show_default=False,
        ),
    ] = None,
    mpp: Annotated[
        str,
        typer.Option(help="Microns per pixel of the tiles (0.5 is 20x); several, finest first, as 0.5,1,2."),
    ] = f"{DEFAULTS.mpp:g}",
    grid: Annotated[
        str,
        typer.Option(
            metavar="|".join(GRIDS),
            help="physical: exactly --tile-px at --mpp. native: the slide's own JPEG tiles, copied, where their "
            "scale is within 5 % of --mpp. auto: copied where they also have --tile-px; else physical, but at the "
            "slide's own scale where that is within 0.5 % of --mpp.",
        ),
    ] = DEFAULTS.grid,
    jpeg_quality: Annotated[
        int,
        typer.Option(
            help="Of tiles that are encoded anew, 1-100. Their colour is kept at half the resolution (4:2:0), as most "
            "scanners do, also where the slide's is not."
        ),
    ] = DEFAULTS.jpeg_quality,
    slide_mpp: SlideMppOption = None,
    mpp_csv: MppCsvOption = None,
    min_tissue: MinTissueOption = TISSUE.min_tissue,
    tissue_um: TissueUmOption = TISSUE.tissue_um,
    tissue_threshold: TissueThresholdOption = TISSUE.tissue_threshold,
    min_speck_um: MinSpeckOption = TISSUE.min_speck_um,
    max_hole_um: MaxHoleOption = TISSUE.max_hole_um,
    reject_pen: RejectPenOption = TISSUE.reject_pen,
    min_sharpness: Annotated[
        float, typer.Option(help="Tiles less sharp are out of focus. 0: not looked at.")
    ] = TISSUE.min_sharpness,
    max_fold: Annotated[float, typer.Option(help="Share of a tile that may be folded tissue.")] = TISSUE.max_fold,
    max_ink: Annotated[
        float,
        typer.Option(
            help="Share of a tile that pen ink may cover, by the thumbnail and, where a tile is decoded, by its own "
            "pixels: thin strokes show there. Copied tiles are decoded for it on slides whose thumbnail has ink. "
            "1, or --no-reject-pen: off."
        ),
    ] = TISSUE.max_ink,
    min_saturation: Annotated[
        float, typer.Option(help="Mean colour saturation that a tile must have. 0: not looked at.")
    ] = TISSUE.min_saturation,
    regions: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder with QuPath GeoJSON files (A1.geojson for A1.svs) that restrict tiling to their areas. "
            "Default: those beside the slides. Of MIRAX and Leica slides, coordinates count from the scanned area's "
            "corner, as QuPath counts without its --no-crop.",
            show_default=False,
        ),
    ] = None,
    anonymize: AnonymizeOption = False,
    names: NamesOption = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes, each with one slide at a time. Default: one per core.", show_default=False),
    ] = None,
    dask: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Send the slides to this Dask scheduler (tcp://host:8786) instead. Needs the extra `dask`.",
            show_default=False,
        ),
    ] = None,
    retry: Annotated[
        bool,
        typer.Option(
            "--retry",
            help="Try again what failed before, and tile replaced slides anew. Zips are not read through: `unzip -t` "
            "tests one, and one that you delete is made anew.",
        ),
    ] = False,
    verify_copies: Annotated[
        bool,
        typer.Option(
            "--verify-copies",
            help="Decode every tile that is copied, to find flipped bits. Default: of each slide a sample; all, if "
            "one of the sample is damaged.",
        ),
    ] = False,
    time_limit: Annotated[
        float | None,
        typer.Option(
            help="Seconds without a tile after which a slide is taken for hung and given up. Default: "
            f"{SILENCE_S:.0f}. Not with --dask, whose cluster decides when a job has taken too long.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Cut the tissue of an archive's slides into JPEG tiles: one zip per slide, in WORKSPACE/tiles.

    The same command again goes on where it stopped. Each file's row in WORKSPACE/archive.csv says what became of it.
    In a workspace that has tiles, options that are left out are as these were cut; what is given must be so, too.
    """
    from histossl.tiles.tiling import as_tiled, common_native_px, stored_config, tile_archive

    slides = archive_of(directory, slides)
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: must be 1 or more")
    if dask is not None and workers is not None:
        raise UsageError("--workers and --dask: the Dask cluster has its own workers; give one of the two")
    if dask is not None and time_limit is not None:
        raise UsageError("--time-limit and --dask: a slide on a cluster is the cluster's to stop; give one of the two")
    silence_s = SILENCE_S if time_limit is None else time_limit
    if time_limit is not None and time_limit <= 0:
        raise UsageError(f"--time-limit {time_limit:g}: must be seconds, more than 0")
    if regions is not None and not regions.is_dir():
        raise UsageError(f"--regions {regions}: no such folder")
    at = Workspace.at(workspace)
    finest, *coarser = _scales(mpp)
    before = stored_config(at)
    if tile_px is None and grid == "native" and before is None:
        tile_px = common_native_px(slides, finest, slide_mpp, mpp_csv, workers or 2, silence_s)
    settings = TileConfig(
        tile_px=DEFAULTS.tile_px if tile_px is None else tile_px,
        mpp=finest,
        coarser_mpp=tuple(coarser),
        grid=grid,
        jpeg_quality=jpeg_quality,
        anonymize=anonymize,
        tissue=TissueConfig(
            min_tissue=min_tissue,
            tissue_um=tissue_um,
            tissue_threshold=tissue_threshold,
            min_speck_um=min_speck_um,
            max_hole_um=max_hole_um,
            reject_pen=reject_pen,
            min_sharpness=min_sharpness,
            max_fold=max_fold,
            max_ink=max_ink,
            min_saturation=min_saturation,
        ),
    )
    if before is not None:
        settings = as_tiled(before, settings, _given(context))
    rows = tile_archive(
        slides,
        at,
        settings,
        workers,
        slide_mpp=slide_mpp,
        mpp_csv=mpp_csv,
        regions=regions,
        retry=retry,
        dask=dask,
        silence_s=silence_s,
        verify=verify_copies,
        names_file=names,
    )
    note_command(at.tile_commands)
    tell_tiled(rows, at, settings.mpps)


def _given(context: typer.Context) -> set[str]:
    """The options that stand on the command line or in the file of --config."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}


def _scales(text: str) -> list[float]:
    try:
        return [float(part) for part in str(text).split(",")]
    except ValueError as error:
        raise UsageError(f"--mpp {text}: must be microns per pixel (0.5), or several of them (0.5,1,2)") from error


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
