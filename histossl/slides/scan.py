"""Stage `scan`: look through an archive before any GPU time is spent on it.

    histossl scan DIR

Every file is opened in a worker process with a time limit: one that makes a library crash or hang costs its own row of
archive.csv, never the run.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import tempfile
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from histossl import __version__
from histossl.core import console
from histossl.core.anonymous import settle
from histossl.core.config import ScanConfig, plain
from histossl.core.errors import HistosslError, SlideError
from histossl.core.units import um_from_l0
from histossl.core.workspace import Workspace
from histossl.runtime.locks import alone_in_workspace
from histossl.runtime.process_pool import Job, Report, num_cores, run_jobs
from histossl.slides.annotation_files import NONE, Annotations, match_regions
from histossl.slides.archive import SlideFile, Walk, find_slides, relative, walk
from histossl.slides.content import Files, contents, files_of, sampled
from histossl.slides.grid import Grid, enlargement, grid_of
from histossl.slides.ledger import OK, UNREADABLE, WARNING, LedgerRow, read_ledger, write_ledger
from histossl.slides.quality.places import PlaceFilter, Wanted, left_out
from histossl.slides.quality.stain import OTHER, Stain, stain_of
from histossl.slides.quality.tissue import TissueMask
from histossl.slides.reading.mpp import MppTable, read_mpp_csv
from histossl.slides.reading.slide import Slide, open_slide

__all__ = ["Preview", "Scanned", "SlideFile", "find_slides", "scan"]

NUM_PROBES = 9  # tiles read as tiling would, to find damage and to learn how large tiles get
MORE = 27  # further ones, where filters turn some of these down: their share is to be known
NEARLY_ALL = 0.9  # of them turned down is worth a warning
PREVIEW_PX = 360
BLUE = (11, 95, 214)
PREVIEWS_BYTES = 16 << 20  # held in memory; more goes to disk
NOT_AGAIN = (
    "took too long before, and has not changed since: not tried again; histossl scan --retry or tile --retry tries it, "
    "with --time-limit for longer"
)
GONE = "not in the folder any more; its tiles are still in the workspace"
LEDGER_EVERY_S = 10.0


@dataclass(frozen=True)
class Preview:
    """What the contact sheet shows of a slide: pictures as base64, some 25 kB however many tiles the slide has."""

    jpeg: str
    mask_png: str  # veils what is not tissue; empty if that is not known
    grid_png: str  # one pixel per place of the grid, coloured if it has enough tissue; empty if there is no place
    grid_size: tuple[float, float]  # width and height that the grid covers, in shares of the picture's
    width_px: int
    height_px: int


class Previews(Mapping[str, Preview]):
    """Previews by file, kept on disk: those of a large archive are more than memory should hold."""

    def __init__(self, directory: Path) -> None:
        self._file = tempfile.SpooledTemporaryFile(PREVIEWS_BYTES, dir=str(directory))  # noqa: SIM115  (closed by finalize)
        self._at: dict[str, int] = {}
        weakref.finalize(self, self._file.close)

    def add(self, file: str, preview: Preview) -> None:
        self._at[file] = self._file.seek(0, os.SEEK_END)
        pickle.dump(preview, self._file)

    def __getitem__(self, file: str) -> Preview:
        self._file.seek(self._at[file])
        preview = pickle.load(self._file)
        assert isinstance(preview, Preview)
        return preview

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def __len__(self) -> int:
        return len(self._at)


@dataclass(frozen=True)
class Scanned:
    """What scan found: this archive's rows, and what it passed by."""

    rows: list[LedgerRow]
    ignored: dict[str, int]
    previews: Mapping[str, Preview] = field(default_factory=dict)  # by file

    @property
    def num_readable(self) -> int:
        return sum(row.readable for row in self.rows)


@dataclass(frozen=True)
class ScanJob:
    """One file to look at, with all that another process needs to know."""

    path: Path
    row: LedgerRow  # what is known of the file before it is opened
    config: ScanConfig
    mpp: float | None
    mpp_source: str
    note: str = ""
    regions: Path | None = None
    preview: bool = False
    parts: tuple[Path, ...] = ()  # all files of a slide that is several


# ---- the stage


def scan(
    directory: Path,
    workspace: Workspace,
    config: ScanConfig,
    num_workers: int | None = None,
    *,
    regions: Path | None = None,
    previews: bool = False,
    again: bool = False,
    retry: bool = False,
    anonymize: bool = False,
    names_file: Path | None = None,
) -> Scanned:
    """Look at every file and write archive.csv. Rows of files unchanged since the last scan are taken from there.

    `num_workers` processes (default: one per core). `again` opens every file anew, but not those that hung before and
    have not changed: `retry` opens these. `previews` makes the pictures of the contact sheet. `regions` is a folder of
    GeoJSON files; those beside the slides are found without it. `anonymize` makes a new workspace anonymous;
    `names_file` is where its names lie (default: beside it).
    """
    directory = Path(directory)
    walked = walk(directory)
    if not walked.found:
        raise HistosslError(f"{directory}: no slides in it or its subfolders{_told(walked)}")
    table = read_mpp_csv(Path(config.mpp_csv)) if config.mpp_csv else None
    if table:
        _tell_unused(table, walked)
    given = table.among([(relative(one.path, directory), one.slide) for one in walked.found]) if table else {}
    drawn = match_regions(walked.found, regions)
    with alone_in_workspace(workspace, "scan"):
        names = settle(workspace, anonymize, names_file)
        known = {row.file: row for row in read_ledger(workspace.archive_csv)}
        rows: dict[str, LedgerRow] = {}
        jobs: list[ScanJob] = []
        for one in walked.found:
            job = _job(one, directory, config, given, drawn.get(one.path, NONE), previews, known, names.key)
            before = known.get(job.row.file)
            if one.problem:
                rows[job.row.file] = replace(job.row, status=UNREADABLE, reason=one.problem)
            elif before is not None and not retry and still_hung(before, one.path, one.parts):
                rows[job.row.file] = replace(job.row, status=UNREADABLE, reason=NOT_AGAIN, hung=before.hung)
            elif before is not None and not again and not previews and _still_speaks(before, job.row):
                rows[job.row.file] = before
            else:
                jobs.append(job)
        shown = Previews(workspace.root)
        # Slow files first would be better still, but a file's size says little about how long it takes to look at.
        all_seen = False
        written_s = time.monotonic()
        try:
            with console.progress("scanning", len(jobs), "files") as bar:
                for row, preview in _looked_at(jobs, num_workers, config.time_limit_s):
                    rows[row.file] = row
                    if preview is not None:
                        shown.add(row.file, preview)
                    bar.advance(note=row.file if row.status == UNREADABLE else "")
                    if time.monotonic() - written_s > LEDGER_EVERY_S:  # a killed process gets no chance to
                        write_ledger(workspace.archive_csv, list({**known, **rows}.values()))
                        written_s = time.monotonic()
            found = [rows[relative(one.path, directory)] for one in walked.found]
            files = {relative(one.path, directory): files_of(one.path, one.parts) for one in walked.found}
            found = _with_duplicates(found, files, num_workers, config.time_limit_s)
            all_seen = True
        finally:
            if not all_seen:  # Ctrl-C: what was looked at need not be opened again
                write_ledger(workspace.archive_csv, list({**known, **rows}.values()))
        missing = [row for file, row in known.items() if file not in rows]
        elsewhere = [row for row in missing if row.archive not in ("", resolved(directory))]
        gone = [_gone(row) for row in missing if row not in elsewhere and row.tile_status]
        write_ledger(workspace.archive_csv, [*found, *elsewhere, *gone])
        here = directory.absolute()
        used = (one.path for one in drawn.values() if one.path is not None and one.path.is_relative_to(here))
        passed = walked.ignored - Counter(path.suffix.lower() for path in used)
        return Scanned(found, dict(names.kinds(passed).most_common()), shown)


def _job(
    one: SlideFile,
    directory: Path,
    config: ScanConfig,
    given: Mapping[str, float],
    drawn: Annotations,
    preview: bool,
    known: dict[str, LedgerRow],
    key: bytes,
) -> ScanJob:
    file = relative(one.path, directory)
    mpp = given.get(file)
    source = "--mpp-csv" if mpp is not None else "--slide-mpp"
    mpp = config.slide_mpp if mpp is None else mpp
    size, modified_s = stamp(one.path, one.parts)
    told = plain([__version__, asdict(replace(config, slide_mpp=None, mpp_csv=None, time_limit_s=1.0)), mpp, source])
    told.append([str(drawn.path), *stamp(drawn.path)] if drawn.path else None)
    told += [drawn.note] if drawn.note else []
    before = known.get(file, LedgerRow(file))
    row = replace(
        LedgerRow(file, slide=one.slide, bytes=size, modified_s=modified_s, archive=resolved(directory)),
        settings=hashlib.sha256(key + json.dumps(told, sort_keys=True).encode()).hexdigest()[:12],
        extra=before.extra,
        **{name: getattr(before, name) for name in TILE_COLUMNS},
    )
    note = "; ".join(filter(None, (one.note, drawn.note)))
    return ScanJob(one.path.absolute(), row, config, mpp, source, note, drawn.path, preview, one.parts)


# What `tile` wrote stays: it knows by tile_settings whether that still speaks of the file.
TILE_COLUMNS = tuple(
    name
    for name in LedgerRow.__dataclass_fields__
    if name.startswith(("tile_", "rejected_")) or name in ("num_tiles", "verified")
)


def _still_speaks(before: LedgerRow, now: LedgerRow) -> bool:
    """The row is of the same file, under the same settings. What was unreadable is always tried again."""
    return (
        before.readable
        and not before.tile_reason.startswith("damaged")
        and before.slide == now.slide
        and before.archive == now.archive
        and before.reason != GONE
        and before.settings == now.settings
        and before.bytes == now.bytes
        and before.modified_s == now.modified_s
    )


def stamp(path: Path, parts: Sequence[Path] = ()) -> tuple[int | None, float | None]:
    """Size and latest change of a slide: of all its files, where it is made of several."""
    try:
        states = [one.stat() for one in files_of(path, parts)]
    except OSError:
        return None, None
    return sum(one.st_size for one in states), round(max(one.st_mtime for one in states), 3)


def hung_mark(path: Path, parts: Sequence[Path] = ()) -> str:
    """Tells a file that hung from one that was changed since."""
    return "{}@{}".format(*stamp(path, parts))


def still_hung(row: LedgerRow, path: Path, parts: Sequence[Path] = ()) -> bool:
    """Whether this file, as it is now, once took too long: trying it again costs the time limit each time."""
    return bool(row.hung) and row.hung == hung_mark(path, parts)


def resolved(directory: Path) -> str:
    return str(directory.resolve()).encode("utf-8", "backslashreplace").decode()  # the ledger is UTF-8


def _gone(row: LedgerRow) -> LedgerRow:
    return replace(row, status=WARNING, reason=GONE)


def _told(walked: Walk) -> str:
    if not walked.ignored:
        return ": it is empty; give the folder that holds the slides"
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in walked.ignored.most_common(5))
    return f" (only {kinds}); give the folder that holds the slides"


def _tell_unused(table: MppTable, walked: Walk) -> None:
    unused = table.unused([(relative(one.path, walked.root), one.slide) for one in walked.found])
    if unused:
        more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
        console.warn(f"--mpp-csv {table.path}: no slide here answers to {', '.join(unused[:5])}{more}")


def _looked_at(
    jobs: Sequence[ScanJob], num_workers: int | None, time_limit_s: float
) -> Iterator[tuple[LedgerRow, Preview | None]]:
    for event in run_jobs(look_at, jobs, _num_workers(jobs, num_workers), time_limit_s) if jobs else ():
        if event.kind == "done":
            yield event.value
        elif event.kind == "failed":
            job, reason = jobs[event.job], event.value
            if reason.startswith("hung"):
                reason = (
                    f"took longer than {time_limit_s:g} s to look at, and was stopped: a damaged file, a slow disk, or "
                    "a huge image without smaller levels; --retry --time-limit gives it longer"
                )
            hung = hung_mark(job.path, job.parts) if event.hung else ""
            yield replace(job.row, status=UNREADABLE, reason=reason, hung=hung), None


def _num_workers(jobs: Sequence[object], asked: int | None) -> int:
    return max(1, min(len(jobs), asked if asked is not None else num_cores()))


# ---- one file, in a worker


def look_at(job: ScanJob, report: Report) -> tuple[LedgerRow, Preview | None]:
    """The file's row, complete. A file that cannot be used gets a row with the reason, whatever went wrong."""
    look = _Look(job)
    try:
        preview = look.run()
    except SlideError as error:
        return look.failed(_without_name(str(error), job.path)), look.picture
    except Exception as error:  # one slide's trouble, told in its row
        said = " ".join(str(error).split())[:200]
        return look.failed(f"unexpected {type(error).__name__} ({said})"), None
    report(0)
    return look.row, preview


def _without_name(reason: str, path: Path) -> str:
    return reason.removeprefix(f"{path.name}: ")


class _Look:
    """Fills a row step by step, so that what was found before a failure stays in it."""

    def __init__(self, job: ScanJob) -> None:
        self.job, self.row = job, job.row
        self.warnings = [job.note] if job.note else []
        self.picture: Preview | None = None  # of a slide that gets no further, having no scale

    def failed(self, reason: str) -> LedgerRow:
        return replace(self.row, status=UNREADABLE, reason=reason)

    def _open(self) -> Slide:
        return open_slide(self.job.path, self.job.mpp, mpp_source=self.job.mpp_source, need_mpp=False)

    def run(self) -> Preview | None:
        job, config = self.job, self.job.config
        with self._open() as slide:
            self._describe(slide)
            if slide.mpp_problem:
                if job.preview:
                    with contextlib.suppress(SlideError):
                        self.picture = _picture(slide.thumbnail(PREVIEW_PX))
                raise SlideError(slide.mpp_problem)
            filters = PlaceFilter(slide, self._open, config.tissue, job.regions)
            if filters.handle_spent:
                missing = filters.unreadable_share
                what = f"{missing:.1%} of it cannot be read on any level" if missing else "a level of it cannot be read"
                self.warnings.append(f"damaged: {what}")
            stain = stain_of(filters.thumbnail, filters.seen.mask)
            self._warn_of(slide, filters.seen, stain)
            grids = [grid_of(slide, config.tile_px, mpp, config.grid) for mpp in config.mpps]
            wanted = [self._wanted(slide, filters, grid) for grid in grids]
            self._warn_of_places(slide, grids[0], wanted[0], filters)
            with self._open() as fresh:  # the first may have met damage, and then reads nothing any more
                probes = [self._probe(fresh, each, grid, filters) for each, grid in zip(wanted, grids, strict=True)]
            if not any(probe.sizes for probe in probes):
                raise SlideError(f"damaged: {probes[0].errors[0]}")
            tiles = [round(len(each.places) * probe.kept) for each, probe in zip(wanted, probes, strict=True)]
            num_bytes = sum(count * probe.tile_bytes for count, probe in zip(tiles, probes, strict=True))
            self.row = replace(
                self.row,
                stain=stain.family,
                stain_figures=stain.figures,
                verified=self.row.verified or "sample",
                tissue_mm2=round(filters.seen.area_um2(slide.mpp_l0) / 1e6, 3),
                expected_tiles=sum(tiles),
                expected_mb=round(num_bytes / 1e6, 3),
            )
            drawn = filters.drawn
            shown = filters.seen if drawn is None else replace(filters.seen, mask=filters.seen.mask & drawn)
            preview = _preview(filters.thumbnail, shown, wanted[0].places, grids[0]) if job.preview else None
        reason = "; ".join(self.warnings)
        self.row = replace(self.row, status=WARNING if reason else OK, reason=reason)
        return preview

    def _describe(self, slide: Slide) -> None:
        self.warnings += slide.warnings
        native = slide.native_tile
        self.row = replace(
            self.row,
            vendor=slide.vendor,
            format=slide.format,
            width_l0=slide.size_l0[0],
            height_l0=slide.size_l0[1],
            levels=" ".join(f"{width}x{height}" for width, height in slide.level_sizes),
            mpp=None if math.isnan(slide.mpp_l0) else slide.mpp_l0,
            mpp_source=slide.mpp_source or "missing",
            compression=slide.compression,
            native_tile=f"{native[0]}x{native[1]}" if native else "",
        )

    def _warn_of(self, slide: Slide, tissue: TissueMask, stain: Stain) -> None:
        config = self.job.config
        said, _ = enlargement(slide.mpp_l0, config.mpp)
        self.warnings += [said] if said else []
        if stain.family == OTHER:
            self.warnings.append(
                "bright on black: fluorescence, or an inverted image; histossl is made for stained slides"
            )
        if not tissue.mask.any():
            self.warnings.append("no tissue found: blank glass, ink only, or tissue smaller than --min-speck-um")

    def _wanted(self, slide: Slide, filters: PlaceFilter, grid: Grid) -> Wanted:
        """The places that tile would cut; none of a slide too coarse for any."""
        wanted = filters.wanted(grid)
        too_coarse = enlargement(slide.mpp_l0, self.job.config.mpp)[1]
        return replace(wanted, places=wanted.places[:0]) if too_coarse else wanted

    def _warn_of_places(self, slide: Slide, grid: Grid, wanted: Wanted, filters: PlaceFilter) -> None:
        config = self.job.config
        if not grid.num_places:
            width_um, height_um = (um_from_l0(side, slide.mpp_l0) for side in slide.size_l0)
            self.warnings.append(
                f"smaller than one tile: {width_um:.0f} x {height_um:.0f} microns, a tile of {config.tile_px} px at "
                f"{config.mpp:g} covers {config.tile_px * config.mpp:.0f}"
            )
        elif not len(wanted.places) and filters.seen.mask.any() and not enlargement(slide.mpp_l0, config.mpp)[1]:
            told = left_out(wanted.rejected, asdict(config.tissue))
            self.warnings.append(f"no tiles: of {grid.num_places} places on the grid {told}")

    def _probe(self, slide: Slide, wanted: Wanted, grid: Grid, filters: PlaceFilter) -> _Probe:
        """Read a few tiles and judge them as tiling would; of few all, and more where some are turned down.

        Warns where nearly all are.
        """
        corners = np.stack([each.astype(np.float64) for each in grid.corners_l0(wanted.places)], axis=1)
        if not len(corners):
            corners = np.array([[max(0.0, (side - grid.side_l0) / 2) for side in slide.size_l0]])
        seen = _spread(len(corners), NUM_PROBES)
        probe = _Probe()
        self._read(slide, corners[seen], grid, filters, probe)
        if any(probe.poor.values()) or len(corners) <= NUM_PROBES + MORE:
            self._read(
                slide, np.delete(corners, seen, 0)[_spread(len(corners) - len(seen), MORE)], grid, filters, probe
            )
        if probe.errors:
            looked = len(probe.errors) + len(probe.sizes)
            self.warnings.append(f"damaged: {len(probe.errors)} of {looked} places read cannot be ({probe.errors[0]})")
        if len(wanted.places) and probe.sizes and probe.kept <= 1 - NEARLY_ALL:
            told = left_out(probe.poor, asdict(self.job.config.tissue))
            self.warnings.append(f"few or no tiles: of {len(probe.sizes)} places with tissue that were read {told}")
        return probe

    def _read(
        self, slide: Slide, corners: NDArray[np.float64], grid: Grid, filters: PlaceFilter, probe: _Probe
    ) -> None:
        side_l0, tile_px = grid.side_l0, grid.tile_px
        for x_l0, y_l0 in corners:
            try:
                # Anew each time after a failure: OpenSlide answers nothing more once a read went wrong.
                if probe.errors:
                    with self._open() as fresh:
                        pixels = fresh.read_region_l0(x_l0, y_l0, side_l0, side_l0, tile_px, tile_px)
                else:
                    pixels = slide.read_region_l0(x_l0, y_l0, side_l0, side_l0, tile_px, tile_px)
            except SlideError as error:
                probe.errors.append(_without_name(str(error), self.job.path))
                continue
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=self.job.config.jpeg_quality)
            probe.sizes.append(buffer.tell())
            if why := filters.poor(pixels) or ("ink" if filters.inked(pixels, grid.mpp) else ""):
                probe.poor[why] += 1


@dataclass
class _Probe:
    """What became of the tiles that were read on trial."""

    sizes: list[int] = field(default_factory=list)  # bytes of each
    poor: Counter[str] = field(default_factory=Counter)  # filters that turned some down
    errors: list[str] = field(default_factory=list)

    @property
    def kept(self) -> float:
        """Share that all filters pass; none where no tile can be read."""
        return 1 - sum(self.poor.values()) / len(self.sizes) if self.sizes else 0.0

    @property
    def tile_bytes(self) -> float:
        return float(np.mean(self.sizes)) if self.sizes else 0.0


def _spread(count: int, at_most: int) -> NDArray[np.int64]:
    """So many numbers below `count`, evenly apart."""
    return np.unique(np.linspace(0, count - 1, at_most).astype(np.int64)) if count else np.zeros(0, np.int64)


def _preview(
    thumbnail: NDArray[np.uint8],
    tissue: TissueMask,
    wanted: NDArray[np.int64],
    places: Grid,
) -> Preview:
    plain_picture = _picture(thumbnail)
    size = (plain_picture.width_px, plain_picture.height_px)
    shrunk = Image.fromarray(tissue.mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)
    inside = np.asarray(shrunk) >= 128
    rim = inside & ~ndimage.binary_erosion(inside, border_value=1)
    painted = Image.fromarray(np.where(rim, 2, np.where(inside, 0, 1)).astype(np.uint8), "P")
    painted.putpalette([0, 0, 0, 90, 90, 110, 0, 190, 80])  # tissue clear, all else veiled, a green line between
    overlay = io.BytesIO()
    painted.save(overlay, "PNG", transparency=bytes([0, 150, 255]), bits=2)
    row, column = np.divmod(wanted, max(1, places.columns))
    grid = np.zeros((places.rows, places.columns), np.uint8)
    grid[row, column] = 1 + (row + column) % 2  # two blues by turns, one paler, to tell tiles apart
    tiles = io.BytesIO()
    if grid.size:
        squares = Image.fromarray(grid, "P")
        squares.putpalette([0, 0, 0, *BLUE, *BLUE])
        squares.save(tiles, "PNG", transparency=bytes([0, 45, 95]), bits=2)
    covered_l0 = [side * tissue.downsample for side in (thumbnail.shape[1], thumbnail.shape[0])]
    return replace(
        plain_picture,
        mask_png=base64.b64encode(overlay.getvalue()).decode(),
        grid_png=base64.b64encode(tiles.getvalue()).decode(),
        grid_size=(places.columns * places.side_l0 / covered_l0[0], places.rows * places.side_l0 / covered_l0[1]),
    )


def _picture(thumbnail: NDArray[np.uint8]) -> Preview:
    """The slide alone, without mask and grid."""
    shrink = min(1.0, PREVIEW_PX / max(thumbnail.shape[:2]))
    width, height = (max(1, round(side * shrink)) for side in thumbnail.shape[1::-1])
    picture = io.BytesIO()
    Image.fromarray(thumbnail).resize((width, height), Image.Resampling.BOX).save(picture, "JPEG", quality=80)
    return Preview(base64.b64encode(picture.getvalue()).decode(), "", "", (0.0, 0.0), width, height)


# ---- the same content under two names


def _with_duplicates(
    rows: list[LedgerRow], files: Mapping[str, Files], num_workers: int | None, time_limit_s: float
) -> list[LedgerRow]:
    """Mark slides whose content an earlier one has: of those of one size and equal samples all bytes are compared.

    `files` of each row are all that its slide is made of. As `tile` chooses: the one that has the tiles, else the first
    that is no link.
    """
    first = sorted(rows, key=lambda row: (not row.num_tiles, files[row.file][0].is_symlink()))
    groups = _grouped(first, {row.file: None if row.hung else row.bytes for row in rows})
    # In workers, as all that opens a slide: a disk that does not answer costs a file its duplicate, not the scan.
    jobs = [files[row.file] for group in groups for row in group]
    samples = dict(_results(sampled, jobs, num_workers, time_limit_s))
    groups = [same for group in groups for same in _grouped(group, {r.file: samples.get(files[r.file]) for r in group})]
    compared = [[files[row.file] for row in group] for group in groups]
    whole = contents(compared, _num_workers(compared, num_workers), time_limit_s)
    groups = [same for group in groups for same in _grouped(group, {r.file: whole.get(files[r.file]) for r in group})]
    twins = {row.file: group[0].file for group in groups for row in group[1:]}
    return [_as_duplicate(row, twins.get(row.file, "")) for row in rows]


def _results(
    function: Job, jobs: Sequence[Files], num_workers: int | None, time_limit_s: float
) -> Iterator[tuple[Files, Any]]:
    for event in run_jobs(function, jobs, _num_workers(jobs, num_workers), time_limit_s) if jobs else ():
        if event.kind == "done":
            yield jobs[event.job], event.value


def _grouped(rows: Sequence[LedgerRow], keys: Mapping[str, object]) -> list[list[LedgerRow]]:
    groups: dict[object, list[LedgerRow]] = defaultdict(list)
    for row in rows:
        value = keys[row.file]
        if value:  # nothing is known of a file that cannot be read
            groups[value].append(row)
    return [group for group in groups.values() if len(group) > 1]


def _as_duplicate(row: LedgerRow, twin: str) -> LedgerRow:
    if row.duplicate_of == twin:
        return row
    # A row from an earlier scan may still speak of a twin that is gone.
    reasons = [one for one in row.reason.split("; ") if one and not one.startswith("same content as ")]
    if twin:
        reasons.append(f"same content as {twin}")
    status = row.status if row.status == UNREADABLE else (WARNING if reasons else OK)
    return replace(row, duplicate_of=twin, reason="; ".join(reasons), status=status)
