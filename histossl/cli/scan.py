"""`histossl scan`: what an archive holds, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from histossl.cli.from_config import LOOK, Given, command
from histossl.cli.options import archive_of
from histossl.core import console
from histossl.core.anonymous import is_anonymous, settle
from histossl.core.config import (
    ANONYMIZE_HELP,
    MPP,
    NAMES_HELP,
    SLIDES_HELP,
    ScanConfig,
    TileConfig,
    check_scales,
    read_scales,
)
from histossl.core.errors import UsageError
from histossl.core.options import Checked, between, option, show_list
from histossl.core.workspace import Workspace

if TYPE_CHECKING:
    from histossl.slides.ledger import LedgerRow
    from histossl.slides.scan import Scanned

SHOWN_ROWS = 40
OWN_PX = (224, 512)  # sides of tiles that --grid native takes


@dataclass(frozen=True)
class Scan(Checked):
    """What one look through an archive is asked for, besides what it expects of tiles."""

    directory: Path | None = option(None, "The same as --slides DIR.", metavar="DIR", positional=True)
    slides: Path | None = option(None, SLIDES_HELP, metavar="DIR")
    mpp: tuple[float, ...] = option(
        (MPP,),
        "Microns per pixel of the tiles to expect (0.5 is 20x); several as 0.5,1,2.",
        read=read_scales,
        show=show_list,
    )
    regions: Path | None = option(
        None,
        "Folder with QuPath GeoJSON files (A1.geojson for A1.svs). Default: those next to the slides.",
        metavar="DIR",
    )
    contact_sheet: bool = option(
        False,
        "Write WORKSPACE/contact-sheet.html: every thumbnail, its tissue, its tiles; of many slides in pages.",
    )
    again: bool = option(False, "Open every file again, also those known from before; not those that hung (--retry).")
    retry: bool = option(False, "Try again the files that once took longer than --time-limit.")
    verify: bool = option(
        False,
        "Then read every file once, and keep its checksum in WORKSPACE/checksums.csv. Goes on where it stopped; with "
        "--again reads all of them.",
    )
    check: bool = option(
        False,
        "Only read every file again, and list those whose content changed while size and time did not (a failing "
        "disk): exit code 1. Goes on where it stopped.",
    )
    anonymize: bool = option(False, ANONYMIZE_HELP)
    names: Path | None = option(None, NAMES_HELP, metavar="FILE.csv")
    workers: int | None = option(
        None, "Processes, one file each. Default: one per core.", check=between(1, 1024, "1 to 1024")
    )


def register(app: typer.Typer) -> None:
    command(
        app,
        group=LOOK,
        epilog="Example: histossl scan /data/slides\n\n"
        "With pictures: histossl scan /data/slides --contact-sheet\n\n"
        "Scale missing: histossl scan /data/slides --mpp-csv mpp.csv",
    )(scan)


def scan(workspace: Workspace, asked: Scan, config: ScanConfig, given: Given) -> int:
    """Look through an archive: which slides can be read, at which scale, with how much tissue, and what is wrong.

    In a workspace that has tiles, options that are left out are as these were cut.

    Writes WORKSPACE/archive.csv with one row per file. Exit code 0 also with warnings, 1 if nothing can be read.

    Tiles are counted by tile's own grid and filters: on the thumbnail all places (regions, tissue, folds, ink), by
    their pixels a few (colour, focus, thin ink), from which the share of the rest is estimated. Disk is an estimate,
    too: tile copies a slide's own JPEG tiles where it can, in the scanner's quality.
    """
    from histossl.slides.scan import scan as scan_archive
    from histossl.tiles.tiling import as_tiled, other_than_stored, stored_config

    check_scales(asked.mpp)
    if asked.regions is not None and not asked.regions.is_dir():
        raise UsageError(f"--regions {asked.regions}: no such folder")
    if asked.check and (asked.verify or asked.again or asked.retry or asked.contact_sheet):
        raise UsageError("--check reads files again and does nothing else; run it without the other options")
    directory = archive_of(asked.directory, asked.slides)
    if is_anonymous(workspace):
        settle(workspace, given=asked.names)
    if asked.check:
        return _checksums(directory, workspace, asked.workers, config.time_limit_s, check=True)
    mpp, *coarser = asked.mpp
    config = replace(config, mpp=mpp, coarser_mpp=tuple(coarser))
    names = ("tile_px", "mpp", "coarser_mpp", "grid", "jpeg_quality", "tissue")
    tiling = TileConfig(**{name: getattr(config, name) for name in names})
    before = stored_config(workspace)
    if before is not None:  # as `tile` would go on there
        tiling = as_tiled(before, tiling, given)
    config = replace(config, **{name: getattr(tiling, name) for name in names})
    scanned = scan_archive(
        directory,
        workspace,
        config,
        asked.workers,
        regions=asked.regions,
        previews=asked.contact_sheet,
        again=asked.again,
        retry=asked.retry,
        anonymize=asked.anonymize,
        names_file=asked.names,
    )
    _show(scanned)
    console.say(*_totals(scanned, config).split("\n"))
    if differ := other_than_stored(workspace, tiling):
        console.say(
            f"{workspace.tiles} was tiled with other settings than this estimate is for: {differ}; pass scan the ones "
            "of then to estimate what tile would add there"
        )
    if copied := copies_at_other_size(scanned.rows, config):
        console.say(copied)
    console.say(f"one row per file: {workspace.archive_csv}")
    if asked.contact_sheet:
        from histossl.slides.contact_sheet import PAGE_FILES, write_contact_sheet

        files = console.count(len(scanned.rows), "file")
        title = files if is_anonymous(workspace) else f"{directory.resolve().name}: {files}"
        told = _totals(scanned, config)
        pages = write_contact_sheet(workspace.contact_sheet, title, scanned.rows, scanned.previews, told)
        more = f" (links to {len(pages)} pages of up to {PAGE_FILES} files)" if len(pages) > 1 else ""
        console.say(f"contact sheet: {workspace.contact_sheet}{more}")
    damaged = (
        _checksums(directory, workspace, asked.workers, config.time_limit_s, again=asked.again) if asked.verify else 0
    )
    if not scanned.num_readable:
        files = console.count(len(scanned.rows), "file")
        console.fail(f"{directory}: none of its {files} can be used; archive.csv says why for each")
        return 1
    return damaged


def _checksums(
    directory: Path,
    workspace: Workspace,
    workers: int | None,
    time_limit_s: float,
    *,
    check: bool = False,
    again: bool = False,
) -> int:
    """Read all files, print what was found; exit code 1 where one has other content than before, or cannot be read."""
    from histossl.slides import checksums

    if check:
        found = checksums.check(directory, workspace, workers, time_limit_s)
    else:
        found = checksums.verify(directory, workspace, workers, time_limit_s, again)
    for line in found.described():
        console.say(line)
    if found.changed or found.failed:
        wrong = console.count(len(found.changed) + len(found.failed), "file")
        console.fail(f"{directory}: {wrong} damaged or not readable")
        return 1
    return 0


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


def _totals(scanned: Scanned, config: ScanConfig) -> str:
    rows, tile_px = scanned.rows, config.tile_px
    mpp = ",".join(f"{each:g}" for each in config.mpps)
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
    if row.compression != "JPEG" or row.vendor not in vendors or not width or width != height or not row.mpp:
        return None  # strips are no tiles
    widths = [int(level.partition("x")[0]) for level in row.levels.split()]
    near = any(abs(row.mpp * widths[0] / each / mpp - 1) <= NATIVE_TOLERANCE for each in widths)
    return int(width) if near and OWN_PX[0] <= int(width) <= OWN_PX[1] else None


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
