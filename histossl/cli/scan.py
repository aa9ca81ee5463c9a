"""`histossl scan`: what an archive holds, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from histossl.core.anonymous import is_anonymous
from histossl.core.config import ScanConfig, TissueConfig
from histossl.core.errors import UsageError
from histossl.core.workspace import Workspace

if TYPE_CHECKING:
    from histossl.slides.ledger import LedgerRow
    from histossl.slides.scan import Scanned

DEFAULTS, TISSUE = ScanConfig(), TissueConfig()
SHOWN_ROWS = 40
OWN_PX = (224, 512)  # sides of tiles that --grid native takes


def register(app: typer.Typer) -> None:
    app.command(
        epilog="Example: histossl scan /data/slides\n\n"
        "With pictures: histossl scan /data/slides --contact-sheet\n\n"
        "Scale missing: histossl scan /data/slides --mpp-csv mpp.csv"
    )(scan)


def scan(
    directory: DirectoryArgument = None,
    slides: SlidesOption = None,
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,  # noqa: ARG001  (its callback has turned it into defaults)
    tile_px: Annotated[int, typer.Option(help="Side in pixels of the tiles to expect.")] = DEFAULTS.tile_px,
    mpp: Annotated[
        str, typer.Option(help="Microns per pixel of the tiles to expect (0.5 is 20x); several as 0.5,1,2.")
    ] = f"{DEFAULTS.mpp:g}",
    slide_mpp: SlideMppOption = None,
    mpp_csv: MppCsvOption = None,
    min_tissue: MinTissueOption = TISSUE.min_tissue,
    tissue_um: TissueUmOption = TISSUE.tissue_um,
    tissue_threshold: TissueThresholdOption = TISSUE.tissue_threshold,
    min_speck_um: MinSpeckOption = TISSUE.min_speck_um,
    max_hole_um: MaxHoleOption = TISSUE.max_hole_um,
    reject_pen: RejectPenOption = TISSUE.reject_pen,
    jpeg_quality: Annotated[
        int, typer.Option(help="JPEG quality (1-100) of the tiles to expect.")
    ] = DEFAULTS.jpeg_quality,
    regions: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder with QuPath GeoJSON files (A1.geojson for A1.svs). Default: those beside the slides.",
            show_default=False,
        ),
    ] = None,
    contact_sheet: Annotated[
        bool,
        typer.Option(
            "--contact-sheet",
            help="Write WORKSPACE/contact-sheet.html: every thumbnail, its tissue, its tiles; of many slides in pages.",
        ),
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Open every file anew, also those known from before.")] = False,
    anonymize: AnonymizeOption = False,
    names: NamesOption = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes, one file each. Default: one per core.", show_default=False)
    ] = None,
    time_limit: Annotated[
        float,
        typer.Option(
            help="Seconds that the whole look at one file may take (opening, thumbnail, tissue, sample tiles); then it "
            "is stopped, and told as unreadable."
        ),
    ] = DEFAULTS.time_limit_s,
) -> None:
    """Look through an archive: which slides can be read, at which scale, with how much tissue, and what is wrong.

    Writes WORKSPACE/archive.csv with one row per file. Exit code 0 also with warnings, 1 if nothing can be read.

    Tiles and disk are an estimate by tissue and regions. It leaves out what tile sees only when it cuts (blur, folds,
    ink, pale tiles), and that tile copies a slide's own JPEG tiles where it can, on the scanner's grid and in its
    quality.
    """
    from histossl.slides.scan import scan as scan_archive
    from histossl.tiles.tiling import other_than_stored

    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: must be 1 or more")
    if regions is not None and not regions.is_dir():
        raise UsageError(f"--regions {regions}: no such folder")
    finest, *coarser = _scales(mpp)
    tissue: dict[str, Any] = {
        "min_tissue": min_tissue,
        "tissue_um": tissue_um,
        "tissue_threshold": tissue_threshold,
        "min_speck_um": min_speck_um,
        "max_hole_um": max_hole_um,
        "reject_pen": reject_pen,
    }
    settings = ScanConfig(
        tile_px=tile_px,
        mpp=finest,
        coarser_mpp=tuple(coarser),
        slide_mpp=slide_mpp,
        mpp_csv=str(mpp_csv) if mpp_csv else None,
        time_limit_s=time_limit,
        jpeg_quality=jpeg_quality,
        tissue=TissueConfig(**tissue),
    )
    place = Workspace.at(workspace)
    directory = archive_of(directory, slides)
    scanned = scan_archive(
        directory,
        place,
        settings,
        workers,
        regions=regions,
        previews=contact_sheet,
        again=again,
        anonymize=anonymize,
        names_file=names,
    )
    _show(scanned)
    console.say(*_totals(scanned, mpp, tile_px).split("\n"))
    if differ := other_than_stored(place, tile_px, settings.mpps, tissue):
        console.say(
            f"{place.tiles} was tiled with other settings than this estimate is for: {differ}; pass scan the ones of "
            "then to estimate what tile would add there"
        )
    if copied := copies_at_other_size(scanned.rows, settings):
        console.say(copied)
    console.say(f"one row per file: {place.archive_csv}")
    if contact_sheet:
        from histossl.slides.contact_sheet import PAGE_FILES, write_contact_sheet

        files = console.count(len(scanned.rows), "file")
        title = files if is_anonymous(place) else f"{directory.resolve().name}: {files}"
        told = _totals(scanned, mpp, tile_px)
        pages = write_contact_sheet(place.contact_sheet, title, scanned.rows, scanned.previews, told)
        more = f" (links to {len(pages)} pages of up to {PAGE_FILES} files)" if len(pages) > 1 else ""
        console.say(f"contact sheet: {place.contact_sheet}{more}")
    if not scanned.num_readable:
        files = console.count(len(scanned.rows), "file")
        console.fail(f"{directory}: none of its {files} can be used; archive.csv says why for each")
        raise typer.Exit(1)


def _scales(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--mpp {text}: must be a number of microns per pixel, or several as 0.5,1,2") from error


def _show(scanned: Scanned) -> None:
    """A table of all rows (of a large archive, of those that are not ok), then each reason once with its files."""
    rows, what = scanned.rows, ""
    if len(rows) > SHOWN_ROWS:
        rows, what = [row for row in rows if row.status != "ok"], " with something to say"
    if rows:
        console.table(
            console.count(len(rows), "file") + what,
            ("file", "status", "format", "size (px)", "mpp", "stain", "tiles"),
            [_cells(row) for row in rows[:SHOWN_ROWS]],
            right=("mpp", "tiles"),
        )
    if len(rows) > SHOWN_ROWS:
        console.say(f"and {len(rows) - SHOWN_ROWS:,} more in archive.csv")
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.reason:
            reasons.setdefault((row.status, row.reason), []).append(row.file)
    for (status, reason), files in list(reasons.items())[:SHOWN_ROWS]:
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        console.say(f"{status}: {', '.join(files[:3])}{more}: {reason}")


def _cells(row: LedgerRow) -> tuple[object, ...]:
    size = f"{row.width_l0}x{row.height_l0}" if row.width_l0 else ""
    scale = f"{row.mpp:.4g}" if row.mpp is not None else ""
    return row.file, row.status, row.format, size, scale, row.stain, row.expected_tiles


def _totals(scanned: Scanned, mpp: str, tile_px: int) -> str:
    rows = scanned.rows
    counts = Counter(row.status for row in rows)
    tiled = [row for row in rows if not row.duplicate_of]  # one content is tiled once
    tiles = sum(row.expected_tiles or 0 for row in tiled)
    tissue_mm2 = sum(row.tissue_mm2 or 0 for row in tiled)
    lines = [
        f"{console.count(len(rows), 'file')}, {_size(sum(row.bytes or 0 for row in rows))}: "
        + ", ".join(f"{counts[status]:,} {status}" for status in ("ok", "warning", "unreadable") if counts[status]),
        f"{tissue_mm2:,.1f} mm² of tissue: about {tiles:,} tiles of {tile_px} px at {mpp} microns per pixel, "
        f"{_size(sum(row.expected_mb or 0 for row in tiled) * 1e6)} on disk",
    ]
    stains = Counter(row.stain for row in rows if row.stain)
    if len(stains) > 1:
        lines.append("stains: " + ", ".join(f"{count:,} {stain}" for stain, count in stains.most_common()))
    if scanned.ignored:
        passed = ", ".join(f"{count:,} {suffix}" for suffix, count in list(scanned.ignored.items())[:6])
        lines.append(f"not slides, passed by: {passed}")
    return "\n".join(lines)


def copies_at_other_size(rows: Sequence[LedgerRow], config: ScanConfig) -> str:
    """Which --tile-px could let `tile` copy the slides' own JPEG tiles instead of encoding them anew; empty if none."""
    sides = Counter(side for row in rows if (side := _copied_side_px(row, config.mpp)))
    if config.coarser_mpp or not sides:
        return ""
    side, count = max(sides.items(), key=lambda item: (item[1], item[0]))
    if side == config.tile_px:
        return ""  # copied as it is
    return (
        f"{count:,} of the slides {'has' if count == 1 else 'have'} JPEG tiles of {side} px at this scale: "
        f"tile --grid native --tile-px {side} "
        f"could copy them, unchanged and fastest; {config.tile_px} px are cut from them and encoded anew"
    )


def _copied_side_px(row: LedgerRow, mpp: float) -> int | None:
    """Side of a slide's own tiles, where they are JPEG, square and of about this scale."""
    from histossl.slides.grid import NATIVE_TOLERANCE
    from histossl.slides.reading.slide import NATIVE_VENDORS

    vendors = (*NATIVE_VENDORS, "ome", "plain-tiff", "perkinelmer")
    width, _, height = row.native_tile.partition("x")
    if row.compression != "JPEG" or row.vendor not in vendors or width != height or not row.mpp:
        return None
    widths = [int(level.partition("x")[0]) for level in row.levels.split()]
    near = any(abs(row.mpp * widths[0] / each / mpp - 1) <= NATIVE_TOLERANCE for each in widths)
    return int(width) if near and OWN_PX[0] <= int(width) <= OWN_PX[1] else None


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
