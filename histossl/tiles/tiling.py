"""Stage `tile`: an archive of slides becomes one zip of JPEG tiles per slide.

    histossl tile --slides DIR

Each slide is a job of its own in a process of its own: whatever it does, it costs only its own row of the ledger.
A zip is whole or absent, so the same command again goes on with the slides that have none.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import hmac
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from histossl import __version__, console
from histossl.config import TileConfig, TissueConfig, plain, require
from histossl.errors import HistosslError, MismatchError, SlideError, StoreError, UsageError
from histossl.slides.files import SlideFile, relative, walk
from histossl.slides.ledger import OK, UNREADABLE, WARNING, LedgerRow, merged, read_ledger, write_ledger
from histossl.slides.quality import saturation, sharpness
from histossl.slides.reader import Slide, open_slide
from histossl.slides.regions import find_regions, read_regions
from histossl.slides.scale import PLAUSIBLE_MPP, read_mpp_csv
from histossl.slides.tissue import TissueMask, fold_mask, thumbnail_um, tissue_mask, tissue_thumbnail
from histossl.tiles.cutting import Cutter, Pixels, agrees, cutter_for, encode, native_side_px, rgb
from histossl.tiles.index import find_zips
from histossl.tiles.native import NativeTiles
from histossl.tiles.store import StoreWriter, new_store, read_store, scale_name
from histossl.units import l0_from_um, um_from_l0
from histossl.workers import Event, Report, run_jobs
from histossl.workspace import Workspace, written_aside

Ints = npt.NDArray[np.int64]

TILED, NO_TILES, FAILED = "tiled", "no tiles", "failed"
MIN_INSIDE = 0.5  # share of a tile that must lie in drawn regions, where there are any
SILENCE_S = 300.0  # a slide that gives nothing for so long is taken for hung
REPORT_EVERY_S = 0.5
LEDGER_EVERY_S = 10.0
TOO_COARSE = 2.0  # enlarging a slide more than this invents most of its pixels
COARSE = 1.1
SAMPLE = 32  # tiles looked at, to know how large a blurred one is
SMALLEST_PIECE_PX = 32  # of a thumbnail, when damage makes reading it piece by piece
GIVE_UP_DAMAGED = 200  # damaged tiles, when they are also most of what was read


@dataclass(frozen=True)
class TileJob:
    """One slide to tile. It travels to other processes and machines, so it holds all that they need to know."""

    path: Path
    slide: str  # the name its zip gets; a hash if the store is anonymous
    file: str | None  # its path in the archive, kept in tiling.json; None if the store is anonymous
    zip_path: Path
    config: TileConfig
    slide_mpp: float | None = None
    mpp_source: str = "--slide-mpp"
    key: bytes = b""  # of an anonymous store
    regions: Path | None = None  # a GeoJSON that restricts tiling
    version: str = __version__


@dataclass
class Counts:
    """Places of the grid, and what became of them. Each place counts once, for the first filter that took it."""

    places: int = 0
    tiles: int = 0
    tissue: int = 0
    region: int = 0
    fold: int = 0
    saturation: int = 0
    blur: int = 0
    damaged: int = 0


@dataclass(frozen=True)
class SlideOutcome:
    """What tiling.json tells the ledger."""

    tiling: dict[str, Any]
    num_bytes: int
    warnings: list[str] = field(default_factory=list)


# ---- the stage


def tile_archive(
    directory: Path,
    workspace: Workspace,
    config: TileConfig,
    num_workers: int | None = None,
    *,
    slide_mpp: float | None = None,
    mpp_csv: Path | None = None,
    regions: Path | None = None,
    retry: bool = False,
    dask: str | None = None,
    silence_s: float = SILENCE_S,
) -> list[LedgerRow]:
    """Tile what is not tiled yet; returns this archive's rows of the ledger, one per file.

    `num_workers` processes (default: one per core; 0: none, here), or a Dask cluster's. `retry` tries again what
    failed or was replaced. `regions` is a folder of GeoJSON files; those beside the slides are found without it.
    A store has one config: another one is a MismatchError that names what differs.
    """
    require(
        slide_mpp is None or PLAUSIBLE_MPP[0] <= slide_mpp <= PLAUSIBLE_MPP[1],
        "slide-mpp",
        slide_mpp,
        "microns per pixel between 0.05 and 5 (0.25 is a 40x scan, 0.5 a 20x scan)",
    )
    directory = Path(directory)
    files = walk(directory).found
    if not files:
        raise HistosslError(f"{directory}: no slides in it or its subfolders; give the folder that holds the slides")
    with _alone_in(workspace):
        refuse_other_settings(workspace, config)
        plan = _plan(directory, workspace, files, config, slide_mpp, mpp_csv, regions, retry)
        ledger = _Ledger(workspace.archive_csv, plan.rows)
        try:
            if plan.jobs:
                _run(plan.jobs, plan.files, ledger, num_workers, dask, silence_s)
        finally:
            ledger.write()
            _sweep(workspace.tiles)
    return ledger.rows_of([relative(each.path, directory) for each in files])


def stored_config(workspace: Workspace) -> TileConfig | None:
    """The config of the tiles that a workspace holds; None if it holds none."""
    for path in find_zips(workspace.tiles):
        try:
            return _config_from(read_store(path).tiling["config"])
        except (StoreError, TypeError, KeyError):
            continue  # a damaged zip: `tile` will make it anew
    return None


def _config_from(stored: Mapping[str, Any]) -> TileConfig:
    values = dict(stored)
    return TileConfig(**{**values, "tissue": TissueConfig(**values["tissue"])})


def refuse_other_settings(workspace: Workspace, config: TileConfig) -> None:
    """MismatchError if the workspace holds tiles of another config."""
    before = stored_config(workspace)
    if before is None or before == config:
        return
    raise MismatchError(
        f"{workspace.tiles} holds tiles made with other settings: {'; '.join(_differences(before, config))}. "
        "Use the same settings to go on, or another --workspace"
    )


def _differences(before: TileConfig, now: TileConfig) -> list[str]:
    old, new = ({**asdict(config), **asdict(config.tissue)} for config in (before, now))
    return [
        f"{name.replace('_', '-')} was {old[name]!r}, now {new[name]!r}"
        for name in new
        if name != "tissue" and old[name] != new[name]
    ]


# ---- what is to do


@dataclass
class _Plan:
    rows: list[LedgerRow]
    jobs: list[TileJob] = field(default_factory=list)
    files: list[str] = field(default_factory=list)  # the ledger's file of each job


def _plan(
    directory: Path,
    workspace: Workspace,
    files: Sequence[SlideFile],
    config: TileConfig,
    slide_mpp: float | None,
    mpp_csv: Path | None,
    regions: Path | None,
    retry: bool,
) -> _Plan:
    """Which slides are done, which are to do, and which failed before and are left alone."""
    known = {row.file: row for row in read_ledger(workspace.archive_csv)}
    table = read_mpp_csv(mpp_csv) if mpp_csv else None
    if table:
        unused = table.unused([(relative(each.path, directory), each.slide) for each in files])
        if unused:
            console.warn(f"--mpp-csv {mpp_csv}: no slide here answers to {', '.join(unused[:5])}")
    names = _Names(workspace, config)
    jobs: dict[str, TileJob] = {}
    plan = _Plan(rows=[])
    for each in files:
        file = relative(each.path, directory)
        row = replace(known.get(file, LedgerRow(file)), slide=each.slide)
        if each.problem:
            plan.rows.append(replace(row, status=UNREADABLE, reason=each.problem, tile_status=FAILED))
            continue
        mpp = table.mpp_of(file, each.slide) if table else None
        source = "--mpp-csv" if mpp is not None else "--slide-mpp"
        name = names.of(each.slide, file)
        jobs[file] = TileJob(
            path=each.path.absolute(),
            slide=name,
            file=None if config.anonymize else file,
            zip_path=workspace.zip_of(name).absolute(),
            config=config,
            slide_mpp=mpp if mpp is not None else slide_mpp,
            mpp_source=source,
            key=names.key,
            regions=find_regions(each.path.absolute(), each.slide, regions),
        )
        plan.rows.append(row)
    names.write()
    _refuse_same_zip(jobs)
    with ThreadPoolExecutor(8) as pool:  # reading the ends of thousands of zips is waiting, not work
        states = dict(zip(jobs, pool.map(_state, jobs.values(), [known.get(file) for file in jobs]), strict=True))
    replaced = [file for file, state in states.items() if state.replaced]
    if replaced and not retry:
        told = "; ".join(f"{file} ({states[file].replaced})" for file in replaced[:5])
        more = f" and {len(replaced) - 5} more" if len(replaced) > 5 else ""
        raise MismatchError(
            f"{len(replaced)} slide(s) are not what they were when they were tiled: {told}{more}. "
            "--retry tiles them anew; another --workspace keeps the old tiles"
        )
    for position, row in enumerate(plan.rows):
        job = jobs.get(row.file)
        if job is None:
            continue
        state = states[row.file]
        if state.outcome is not None and not state.replaced:
            plan.rows[position] = _tiled_row(row, state.outcome, _identity(job))
        elif row.tile_status == FAILED and row.tile_settings == _identity(job) and not retry:
            continue
        else:
            plan.jobs.append(job)
            plan.files.append(row.file)
    return plan


@dataclass(frozen=True)
class _State:
    outcome: SlideOutcome | None = None
    replaced: str = ""  # what differs between the slide now and when it was tiled


def _state(job: TileJob, row: LedgerRow | None) -> _State:
    if not job.zip_path.exists():
        return _State()
    try:
        outcome = SlideOutcome(read_store(job.zip_path).tiling, job.zip_path.stat().st_size)
    except StoreError as error:
        console.warn(f"{error} Doing so now")
        return _State()
    facts = outcome.tiling["slide"]
    if job.slide_mpp is not None and not math.isclose(job.slide_mpp, facts["mpp_l0"], rel_tol=1e-6):
        return _State(outcome, f"{facts['mpp_l0']:g} microns per pixel then, {job.slide_mpp:g} now")
    if row is not None and row.tile_status in (TILED, NO_TILES) and row.tile_settings == _identity(job):
        return _State(outcome)  # same size and time as then: its content need not be read
    try:
        same = fingerprint(job.path, job.key) == facts["fingerprint"]
        if _regions_fingerprint(job) != facts["regions"]:
            return _State(outcome, f"its regions {'changed' if job.regions and facts['regions'] else 'came or went'}")
        size = job.path.stat().st_size
    except OSError as error:
        return _State(outcome, f"cannot be read now: {error.strerror}")
    if same:
        return _State(outcome)
    was = facts["bytes"]
    return _State(outcome, f"{was:,} bytes then, {size:,} now" if size != was else "same size, other content")


def _refuse_same_zip(jobs: Mapping[str, TileJob]) -> None:
    seen: dict[Path, str] = {}
    for file, job in jobs.items():
        if job.zip_path in seen:
            raise StoreError(f"{file} and {seen[job.zip_path]} would share {job.zip_path.name}; rename one of them")
        seen[job.zip_path] = file


def fingerprint(path: Path, key: bytes = b"") -> str:
    """Tells a slide from another, or from its replacement, by its size and 10 samples of its bytes; not by its name.

    Of a slide in several files (MIRAX, DICOM) the sizes of the others count too.
    """
    digest = hmac.new(key, digestmod=hashlib.sha256)
    size = path.stat().st_size
    digest.update(str(size).encode())
    with path.open("rb") as file:
        for sample in range(10):
            file.seek((size - min(size, 16384)) * sample // 9)
            digest.update(file.read(16384))
    others = {".mrxs": (path.with_suffix(""), "*"), ".dcm": (path.parent, "*.dcm")}.get(path.suffix.lower())
    if others is not None and others[0].is_dir():
        sizes = sorted((each.name, each.stat().st_size) for each in others[0].glob(others[1]) if each.is_file())
        digest.update(json.dumps(sizes).encode())
    return digest.hexdigest()[:32]


def _regions_fingerprint(job: TileJob) -> str | None:
    return None if job.regions is None else fingerprint(job.regions, job.key)


def _identity(job: TileJob) -> str:
    """Of a slide's file and all settings: what failed under it fails again, what was tiled under it is done."""
    stamps = []
    for path in (job.path, job.regions):
        try:
            stamps.append(_stamp(path) if path else None)
        except OSError:
            stamps.append(None)
    parts = [str(job.path.name), stamps, job.slide_mpp, plain(asdict(job.config))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


# ---- names of an anonymous store


class _Names:
    """Slide ids, or keyed hashes of them with the mapping in one file outside the store."""

    def __init__(self, workspace: Workspace, config: TileConfig) -> None:
        self._path = workspace.anonymous_names
        self._tiles = workspace.tiles
        self._given: dict[str, tuple[str, str]] = {}
        self._changed = False
        self.key = b""
        if config.anonymize:
            self._read()

    def of(self, slide: str, file: str) -> str:
        if not self.key:
            return slide
        name = hmac.new(self.key, slide.encode(), hashlib.sha256).hexdigest()[:16]
        if self._given.get(name) != (slide, file):
            self._given[name] = (slide, file)
            self._changed = True
        return name

    def _read(self) -> None:
        try:
            with self._path.open(encoding="utf-8", newline="") as text:
                first = text.readline().split()
                self.key = bytes.fromhex(first[-1])
                self._given = {row["name"]: (row["slide"], row["file"]) for row in csv.DictReader(text)}
        except FileNotFoundError as error:
            if find_zips(self._tiles):
                raise StoreError(
                    f"{self._path}: gone, and with it the key to the names of the tiles in {self._tiles}. "
                    "Restore it, or use another --workspace"
                ) from error
            self.key = secrets.token_bytes(32)
            self._changed = True
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise StoreError(
                f"{self._path}: cannot be read ({error}); without its key and names the tiles cannot be continued. "
                "Restore it, or use another --workspace"
            ) from error

    def write(self) -> None:
        """Before any tile is: no anonymous zip is ever without its entry here."""
        if not self._changed:
            return
        with written_aside(self._path) as aside, aside.open("w", encoding="utf-8", newline="") as text:
            aside.chmod(0o600)
            text.write(f"# keep this file private: it names the slides. key {self.key.hex()}\n")
            table = csv.writer(text, lineterminator="\n")
            table.writerow(["name", "slide", "file"])
            table.writerows([name, *given] for name, given in sorted(self._given.items()))


# ---- running


def _run(
    jobs: Sequence[TileJob],
    files: Sequence[str],
    ledger: _Ledger,
    num_workers: int | None,
    dask: str | None,
    silence_s: float,
) -> None:
    """All jobs, with a progress bar, each outcome into the ledger."""
    if num_workers is None:
        num_workers = min(
            len(jobs), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )
    if dask is not None:
        from histossl.tiles.cluster import run_on_dask

        events: Iterator[Event] = run_on_dask(dask, tile_slide, jobs)
    else:
        events = run_jobs(tile_slide, jobs, num_workers, silence_s)
    started_s, tiles = time.monotonic(), 0
    try:
        with console.progress("tiling", len(jobs), "slides") as bar:
            for event in events:
                if event.kind == "progress":
                    tiles += event.value
                    elapsed_s = max(time.monotonic() - started_s, 1e-3)
                    bar.advance(0, note=f"{tiles:,} tiles, {tiles / elapsed_s:,.0f} tiles/s")
                    continue
                job = jobs[event.job]
                row = ledger[files[event.job]]
                if event.kind == "done":
                    ledger.put(_tiled_row(row, event.value, _identity(job)))
                elif isinstance(event.error, StoreFull):
                    raise HistosslError(str(event.error))
                else:
                    reason = str(event.value).removeprefix(f"{job.path.name}: ")
                    ledger.put(_failed_row(row, reason, _identity(job)))
                bar.advance()
    finally:
        close = getattr(events, "close", None)
        if close is not None:
            close()


class StoreFull(StoreError):
    """The disk takes no more: the run ends, and what is finished stays."""


class _Ledger:
    """archive.csv in memory, written now and then: it can be told again from the zips, so little is lost."""

    def __init__(self, path: Path, rows: Sequence[LedgerRow]) -> None:
        self._path = path
        self._rows = {row.file: row for row in rows}
        self._written_s = time.monotonic()

    def __getitem__(self, file: str) -> LedgerRow:
        return self._rows[file]

    def put(self, row: LedgerRow) -> None:
        self._rows[row.file] = row
        if time.monotonic() - self._written_s > LEDGER_EVERY_S:
            self.write()

    def write(self) -> None:
        write_ledger(self._path, merged(read_ledger(self._path), self._rows.values()))
        self._written_s = time.monotonic()

    def rows_of(self, files: Sequence[str]) -> list[LedgerRow]:
        return [self._rows[file] for file in files]


def _tiled_row(row: LedgerRow, outcome: SlideOutcome, identity: str) -> LedgerRow:
    facts, counts = outcome.tiling["slide"], outcome.tiling["counts"]
    reason = why_none(outcome.tiling) if not counts["tiles"] else "; ".join(outcome.tiling["warnings"])
    return replace(
        row,
        # A slide that scan could not use (no scale, say) and that now gave tiles is usable after all.
        status=WARNING if reason and row.status != WARNING else OK if row.status == UNREADABLE else row.status,
        reason=reason if reason and row.status != WARNING else "" if row.status == UNREADABLE else row.reason,
        vendor=facts["vendor"],
        format=facts["format"],
        width_l0=facts["width_l0"],
        height_l0=facts["height_l0"],
        mpp=facts["mpp_l0"],
        mpp_source=facts["mpp_source"],
        num_tiles=counts["tiles"],
        tile_status=TILED if counts["tiles"] else NO_TILES,
        tile_reason=reason,
        tile_way="+".join(dict.fromkeys(scale["way"] for scale in outcome.tiling["scales"])),
        tile_settings=identity,
        rejected_tissue=counts["tissue"],
        rejected_region=counts["region"],
        rejected_blur=counts["blur"],
        rejected_fold=counts["fold"],
        rejected_saturation=counts["saturation"],
        rejected_damaged=counts["damaged"],
    )


def _failed_row(row: LedgerRow, reason: str, identity: str) -> LedgerRow:
    return replace(
        row,
        status=UNREADABLE,
        reason=reason,
        tile_status=FAILED,
        tile_reason=reason,
        tile_way="",
        tile_settings=identity,
        num_tiles=None,
        rejected_tissue=None,
        rejected_region=None,
        rejected_blur=None,
        rejected_fold=None,
        rejected_saturation=None,
        rejected_damaged=None,
    )


def why_none(tiling: Mapping[str, Any]) -> str:
    """Why a slide gave no tile, from its tiling.json."""
    counts, facts = tiling["counts"], tiling["slide"]
    if not counts["places"]:
        width_um, height_um = (um_from_l0(facts[side], facts["mpp_l0"]) for side in ("width_l0", "height_l0"))
        scale = tiling["scales"][0]
        side_um = um_from_l0(scale["side_l0"], facts["mpp_l0"])
        return (
            f"smaller than one tile: {width_um:.0f} x {height_um:.0f} microns, "
            f"a tile of {tiling['tile_px']} px at {scale['mpp']:g} covers {side_um:.0f}"
        )
    words = {
        "region": "lie outside the regions",
        "tissue": f"have less than {tiling['config']['tissue']['min_tissue']:.0%} tissue",
        "fold": "are folded",
        "saturation": "have no colour",
        "blur": "are out of focus",
        "damaged": "are damaged",
    }
    parts = [f"{counts[name]} {what}" for name, what in words.items() if counts[name]]
    return f"no tiles: of {counts['places']} places on the grid {', '.join(parts)}"


@contextmanager
def _alone_in(workspace: Workspace) -> Iterator[None]:
    """One `tile` at a time per workspace. The kernel lets go of the lock however the process ends."""
    workspace.make()
    path = workspace.tiles / ".lock"
    try:
        workspace.tiles.mkdir(exist_ok=True)
        lock = path.open("a+")
    except OSError as error:
        raise HistosslError(f"{workspace.tiles}: cannot be written ({error.strerror})") from error
    with lock:
        if not _locked(lock.fileno()):
            lock.seek(0)
            raise StoreError(f"{workspace.root}: another `histossl tile` is at work in it ({lock.read().strip()})")
        lock.truncate(0)
        lock.write(f"process {os.getpid()}\n")
        lock.flush()
        _sweep(workspace.tiles)
        yield


def _locked(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:
        return True  # not on this system: two runs at once then do the work twice, and harm nothing
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)  # else a file system without locks
    return True


def _sweep(tiles: Path) -> None:
    """Remove what killed runs left half-written."""
    for folder, _, names in os.walk(tiles):
        for name in names:
            if name.startswith(".") and name.endswith(".part"):
                Path(folder, name).unlink(missing_ok=True)


# ---- one slide


def tile_slide(job: TileJob, report: Report) -> SlideOutcome:
    """Make one slide's zip. SlideError if the slide cannot be used, StoreFull if the disk is full."""
    if job.version != __version__:
        raise StoreError(f"this worker runs histossl {__version__}, the command {job.version}; install the same")

    def open_again() -> Slide:
        return open_slide(job.path, job.slide_mpp, mpp_source=job.mpp_source)

    try:
        before = _stamp(job.path)
        with open_again() as slide:
            warnings = [*slide.warnings, *_too_coarse(slide, job.config)]
            with new_store(job.zip_path, job.config.mpps) as store:
                with closing(_Making(job, slide, open_again, store, report)) as making:
                    tiling = making.tiling(warnings, fingerprint(job.path, job.key))
                if _stamp(job.path) != before:
                    raise SlideError(f"{job.path.name}: changed while it was tiled; run the command again")
                store.finish(tiling)
    except FileNotFoundError as error:
        raise SlideError(f"{job.path.name}: vanished while it was tiled") from error
    except HistosslError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise StoreFull(
                f"{job.zip_path.parent}: {cause.strerror}; slides finished so far are kept. "
                "Make room, then the same command goes on"
            ) from error
        raise
    except OSError as error:
        raise SlideError(f"{job.path.name}: cannot be read ({error.strerror or error})") from error
    return SlideOutcome(tiling, job.zip_path.stat().st_size)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _too_coarse(slide: Slide, config: TileConfig) -> list[str]:
    enlarged = slide.mpp_l0 / config.mpp
    if enlarged > TOO_COARSE:
        raise SlideError(
            f"{slide.path.name}: scanned at {slide.mpp_l0:.4g} microns per pixel, too coarse for tiles at "
            f"{config.mpp:g}; tile this archive with --mpp {slide.mpp_l0:.2g} or coarser"
        )
    if enlarged > COARSE:
        return [f"scanned at {slide.mpp_l0:.4g} microns per pixel: its tiles at {config.mpp:g} are enlarged"]
    return []


@dataclass(frozen=True)
class _Wanted:
    """Places of a grid to be cut (columns of equal length), and how many others each filter turned down."""

    places: Ints
    x_l0: Ints
    y_l0: Ints
    tissue: npt.NDArray[np.float64]
    regions: npt.NDArray[np.uint16]
    rejected: dict[str, int]


class _Making:
    """Fills one zip: for each scale the grid, the filters, the tiles."""

    def __init__(
        self, job: TileJob, slide: Slide, open_again: Callable[[], Slide], store: StoreWriter, report: Report
    ) -> None:
        self._job, self._slide, self._open_again, self._store = job, slide, open_again, store
        self._report, self._config = report, job.config
        self._opened: Slide | None = None
        self._counts = Counts()
        self._unreported, self._reported_s = 0, time.monotonic()
        thumbnail, downsample, unreadable = _thumbnail(slide, open_again, job.config.tissue.tissue_um)
        # What the thumbnail could not show counts as tissue: cutting will tell exactly which tiles are damaged.
        mask = tissue_mask(thumbnail, um_from_l0(downsample, slide.mpp_l0), job.config.tissue) | unreadable
        self._tissue = TissueMask(mask, downsample)
        self._folds = TissueMask(fold_mask(thumbnail, mask), downsample)
        self._pale = TissueMask(_pale(thumbnail, 3 * job.config.tissue.min_saturation), downsample)
        self._region_names: list[str] = []
        self._regions: list[TissueMask] = []
        if job.regions is not None:
            drawn = read_regions(job.regions, slide.size_l0).masks(mask.shape, downsample)
            self._regions = [TissueMask(each, downsample) for each in drawn.values()]
            self._region_names = list(drawn)
        if unreadable.any():  # an OpenSlide handle that met damage reads nothing any more
            self._slide = self._opened = open_again()
        self._beat(0, force=True)

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()

    def tiling(self, warnings: list[str], slide_fingerprint: str) -> dict[str, Any]:
        """Tile all scales; returns what tiling.json says."""
        slide, job = self._slide, self._job
        scales = [self._one_scale(number, mpp) for number, mpp in enumerate(self._config.mpps)]
        self._beat(0, force=True)
        if self._counts.damaged:
            warnings.append(f"{self._counts.damaged} damaged tile(s) left out")
        return {
            "tile_px": self._config.tile_px,
            "scales": scales,
            "regions": self._region_names,
            "counts": asdict(self._counts),
            "warnings": warnings,
            "slide": {
                "file": job.file,
                "fingerprint": slide_fingerprint,
                "regions": _regions_fingerprint(job),
                "bytes": job.path.stat().st_size,
                "mpp_l0": slide.mpp_l0,
                "mpp_source": slide.mpp_source,
                "width_l0": slide.size_l0[0],
                "height_l0": slide.size_l0[1],
                "vendor": slide.vendor,
                "format": slide.format,
            },
            "config": plain(asdict(self._config)),
        }

    def _one_scale(self, number: int, mpp: float) -> dict[str, Any]:
        cutter = cutter_for(self._slide, mpp, self._config, self._open_again)
        try:
            wanted = self._wanted(cutter)
            if not agrees(cutter, self._open_again, wanted.places):
                cutter.source.close()
                cutter = cutter_for(self._slide, mpp, replace(self._config, grid="physical"), self._open_again, "read")
                wanted = self._wanted(cutter)
            self._fill(number, cutter, wanted)
        finally:
            cutter.source.close()
        grid = cutter.grid
        return {"name": scale_name(mpp), "mpp": grid.mpp, "side_l0": grid.side_l0, "way": cutter.way}

    def _wanted(self, cutter: Cutter) -> _Wanted:
        """What the filters of the thumbnail leave."""
        limits, side_l0 = self._config.tissue, cutter.grid.side_l0
        places = np.arange(cutter.grid.num_places)
        x_l0, y_l0 = cutter.grid.corners_l0(places)
        tissue = self._tissue.share(x_l0, y_l0, side_l0)
        regions = np.zeros(len(places), np.uint16)
        inside = np.ones(len(places), bool)
        if self._regions:
            shares = np.stack([each.share(x_l0, y_l0, side_l0) for each in self._regions])
            inside = shares.sum(axis=0) >= MIN_INSIDE
            regions = np.where(inside, shares.argmax(axis=0) + 1, 0).astype(np.uint16)
        enough = tissue >= limits.min_tissue
        flat = self._folds.share(x_l0, y_l0, side_l0) <= limits.max_fold
        kept = inside & enough & flat
        return _Wanted(
            places=places[kept],
            x_l0=x_l0[kept],
            y_l0=y_l0[kept],
            tissue=tissue[kept],
            regions=regions[kept],
            rejected={
                "region": int((~inside).sum()),
                "tissue": int((inside & ~enough).sum()),
                "fold": int((inside & enough & ~flat).sum()),
            },
        )

    def _fill(self, scale: int, cutter: Cutter, wanted: _Wanted) -> None:
        """Cut, judge, encode and store the wanted tiles."""
        counts, places = self._counts, wanted.places
        counts.places += cutter.grid.num_places
        counts.region += wanted.rejected["region"]
        counts.tissue += wanted.rejected["tissue"]
        counts.fold += wanted.rejected["fold"]
        damaged = seen = 0
        columns = (wanted.x_l0, wanted.y_l0, wanted.tissue, wanted.regions)
        facts = dict(zip(places.tolist(), zip(*(each.tolist() for each in columns), strict=True), strict=True))
        doubtful = self._doubtful(cutter, places)
        for tile in cutter.tiles(places):
            seen += 1
            jpeg, pixels = tile.jpeg, tile.pixels
            if jpeg is not None and tile.place in doubtful:
                pixels = cutter.pixels_or_none(tile.place)
                jpeg = jpeg if pixels is not None else None
            if jpeg is None and pixels is None:
                damaged += 1
                counts.damaged += 1
                if damaged >= GIVE_UP_DAMAGED and damaged > seen / 2:
                    raise SlideError(f"{self._slide.path.name}: damaged ({damaged} of the first {seen} tiles)")
                self._beat(0)
                continue
            if pixels is not None and not self._good(rgb(pixels)):
                self._beat(0)
                continue
            if jpeg is None:
                assert pixels is not None
                jpeg = encode(pixels, self._config.jpeg_quality)
            x_l0, y_l0, tissue, region = facts[tile.place]
            self._store.add(x_l0, y_l0, jpeg, tissue, scale, region)
            counts.tiles += 1
            self._beat(1)
        if seen and damaged == seen:
            raise SlideError(f"{self._slide.path.name}: damaged: none of its {seen} tiles can be read")

    def _good(self, pixels: Pixels) -> bool:
        """Whether a tile has colour and is in focus; counts it if not."""
        limits = self._config.tissue
        if limits.min_saturation > 0 and saturation(pixels[None])[0] < limits.min_saturation:
            self._counts.saturation += 1
            return False
        if limits.min_sharpness > 0 and sharpness(pixels[None])[0] < limits.min_sharpness:
            self._counts.blur += 1
            return False
        return True

    def _doubtful(self, cutter: Cutter, places: Ints) -> set[int]:
        """Of tiles that are copied unseen, those whose pixels must be looked at after all.

        A tile out of focus takes few bytes. How few is learnt from a sample, so that on a slide that is blurred
        throughout every tile is looked at. A tile without colour shows on the thumbnail.
        """
        limits = self._config.tissue
        if cutter.way != "copied" or not len(places):
            return set()
        assert isinstance(cutter.source, NativeTiles)
        doubt = np.zeros(len(places), bool)
        if limits.min_sharpness > 0:
            taken = cutter.source.byte_counts[cutter.native_numbers(places)]
            sample = np.unique(np.linspace(0, len(places) - 1, SAMPLE).astype(int))
            looks = [(number, cutter.pixels_or_none(int(places[number]))) for number in sample.tolist()]
            blurred = [
                taken[number]
                for number, pixels in looks
                if pixels is not None and sharpness(pixels[None])[0] < 1.2 * limits.min_sharpness
            ]
            doubt |= taken < max(0.7 * float(np.median(taken)), 1.3 * max(blurred, default=0))
        if limits.min_saturation > 0:
            x_l0, y_l0 = cutter.grid.corners_l0(places)
            doubt |= self._pale.share(x_l0, y_l0, cutter.grid.side_l0) > 0.5
        return set(places[doubt].tolist())

    def _beat(self, count: int, force: bool = False) -> None:
        """Tell the parent now and then that this slide is getting on."""
        self._unreported += count
        now_s = time.monotonic()
        if force or now_s - self._reported_s > REPORT_EVERY_S:
            self._report(self._unreported)
            self._unreported, self._reported_s = 0, now_s


def _thumbnail(
    slide: Slide, open_again: Callable[[], Slide], tissue_um: float
) -> tuple[Pixels, float, npt.NDArray[np.bool_]]:
    """The thumbnail of `tissue_thumbnail`, its downsample, and where damage left it white."""
    try:
        thumbnail, downsample = tissue_thumbnail(slide, tissue_um)
        return thumbnail, downsample, np.zeros(thumbnail.shape[:2], bool)
    except SlideError as error:
        first = error
    downsample = l0_from_um(thumbnail_um(slide, tissue_um), slide.mpp_l0)
    width, height = (max(1, math.ceil(side / downsample)) for side in slide.size_l0)
    thumbnail = np.full((height, width, 3), 255, np.uint8)
    unreadable = np.zeros((height, width), bool)
    waiting = [(0, 0, width, height)]
    failures = 0
    again = open_again()
    try:
        while waiting:
            x, y, w, h = waiting.pop()
            box = (x * downsample, y * downsample, w * downsample, h * downsample)
            try:
                thumbnail[y : y + h, x : x + w] = again.read_region_l0(*box, w, h)
                continue
            except SlideError:
                failures += 1
                if failures > GIVE_UP_DAMAGED:
                    raise SlideError(f"{slide.path.name}: damaged throughout ({first})") from first
                again.close()
                again = open_again()
            if max(w, h) <= SMALLEST_PIECE_PX:
                unreadable[y : y + h, x : x + w] = True
            elif w >= h:
                waiting += [(x, y, w // 2, h), (x + w // 2, y, w - w // 2, h)]
            else:
                waiting += [(x, y, w, h // 2), (x, y + h // 2, w, h - h // 2)]
    finally:
        again.close()
    if unreadable.all():
        raise first
    return thumbnail, downsample, unreadable


def _pale(thumbnail: Pixels, limit: float) -> npt.NDArray[np.bool_]:
    """Where colour saturation is below a limit."""
    red, green, blue = (thumbnail[..., channel].astype(np.float32) for channel in range(3))
    high, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    pale: npt.NDArray[np.bool_] = high - low < limit * np.maximum(high, 1)
    return pale


# ---- the store's own tile size, for --grid native


def common_native_px(directory: Path, mpp: float, slide_mpp: float | None = None) -> int:
    """The side that most slides' own JPEG tiles have at `mpp`. The first 50 slides are asked."""
    sides: dict[int, int] = {}
    for each in walk(directory).found[:50]:
        try:
            with open_slide(each.path, slide_mpp) as slide:
                side = native_side_px(slide, mpp)
        except SlideError:
            continue
        if side is not None and 224 <= side <= 512:
            sides[side] = sides.get(side, 0) + 1
    if not sides:
        raise UsageError(
            f"--grid native: no slide of {directory} has square JPEG tiles of its own (224 to 512 px) within 5 % of "
            f"{mpp:g} microns per pixel; use --grid physical, or the --mpp of its slides"
        )
    return max(sides, key=lambda side: (sides[side], side))
