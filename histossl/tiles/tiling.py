"""Stage `tile`: an archive of slides becomes one zip of JPEG tiles per slide.

    histossl tile --slides DIR

Each slide is a job of its own in a process of its own: whatever it does, it costs only its own row of the ledger.
A zip is whole or absent, so the same command again goes on with the slides that have none.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from histossl import console
from histossl.config import TileConfig, TissueConfig, plain, require
from histossl.errors import HistosslError, MismatchError, SlideError, StoreError, UsageError
from histossl.slides.files import SlideFile, relative, walk
from histossl.slides.ledger import OK, UNREADABLE, WARNING, LedgerRow, merged, read_ledger, write_ledger
from histossl.slides.reader import open_slide
from histossl.slides.regions import match_regions
from histossl.slides.scale import PLAUSIBLE_MPP, read_mpp_csv
from histossl.slides.scan import resolved, stamp
from histossl.tiles.cutting import native_side_px
from histossl.tiles.index import find_zips
from histossl.tiles.names import Names
from histossl.tiles.one_slide import (
    SPOTS,
    NotOpened,
    SlideOutcome,
    StoreFull,
    TileJob,
    fingerprint,
    prints_of,
    regions_fingerprint,
    size_mark,
    tile_slide,
)
from histossl.tiles.store import new_store, read_store, read_tiling
from histossl.units import um_from_l0
from histossl.workers import Event, Report, num_cores, run_jobs
from histossl.workspace import Workspace, alone_in

TILED, NO_TILES, FAILED = "tiled", "no tiles", "failed"
SILENCE_S = 300.0  # a slide that gives nothing for so long is taken for hung
LEDGER_EVERY_S = 10.0
INDEX_PART = ".index.npy."
INDEX_YOUNG_S = 3600.0  # an index that was written to within this time may still be in the making


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
    verify: bool = False,
) -> list[LedgerRow]:
    """Tile what is not tiled yet; returns this archive's rows of the ledger, one per file.

    `num_workers` processes (default: one per core; 0: none, here), or a Dask cluster's. `retry` tries again what
    failed or was replaced. `regions` is a folder of GeoJSON files; those beside the slides are found without it.
    `verify` decodes every tile that is copied, to find flipped bits; else a sample of each slide is decoded.
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
    with alone_in(workspace, "tile"):
        _sweep(workspace.tiles)
        refuse_other_settings(workspace, config)
        plan = _plan(directory, workspace, files, config, slide_mpp, mpp_csv, regions, retry, verify)
        ledger = _Ledger(workspace.archive_csv, plan.rows, plan.unknown)
        try:
            if not plan.jobs:
                console.say("nothing new to tile: what became of each slide is known from before")
            else:
                _run(plan, ledger, num_workers, dask, silence_s)
        finally:
            ledger.write()
            _sweep(workspace.tiles)
    return ledger.rows_of([relative(each.path, directory) for each in files])


def stored_config(workspace: Workspace) -> TileConfig | None:
    """The config of the tiles that a workspace holds; None if it holds none."""
    for path in find_zips(workspace.tiles):
        try:
            return _config_from(read_tiling(path)["config"])
        except (StoreError, TypeError, KeyError):
            continue  # a damaged zip: `tile` will make it anew
    return None


def _config_from(stored: Mapping[str, Any]) -> TileConfig:
    values = dict(stored)
    older = {"max_ink": 1.0}  # a store from before this filter has tiles with ink
    return TileConfig(**{**values, "tissue": TissueConfig(**{**older, **values["tissue"]})})


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
    # As the options say it: --mpp names all scales.
    old, new = ({**asdict(config), **asdict(config.tissue), "mpp": _told(config.mpps)} for config in (before, now))
    return [
        f"{name.replace('_', '-')} was {old[name]!r}, now {new[name]!r}"
        for name in new
        if name not in ("tissue", "coarser_mpp") and old[name] != new[name]
    ]


def _told(mpps: Sequence[float]) -> str:
    return ",".join(f"{mpp:g}" for mpp in mpps)


# ---- what is to do


@dataclass
class _Plan:
    rows: list[LedgerRow]
    jobs: list[TileJob] = field(default_factory=list)
    files: list[str] = field(default_factory=list)  # the ledger's file of each job
    identities: list[str] = field(default_factory=list)  # of each job, before it runs
    unknown: set[str] = field(default_factory=set)  # files with a job of which the ledger says nothing yet


def _plan(
    directory: Path,
    workspace: Workspace,
    files: Sequence[SlideFile],
    config: TileConfig,
    slide_mpp: float | None,
    mpp_csv: Path | None,
    regions: Path | None,
    retry: bool,
    verify: bool,
) -> _Plan:
    """Which slides are done, which are to do, and which failed before and are left alone."""
    known = {row.file: row for row in read_ledger(workspace.archive_csv)}
    table = read_mpp_csv(mpp_csv) if mpp_csv else None
    given: dict[str, float] = {}
    if table:
        pairs = [(relative(each.path, directory), each.slide) for each in files]
        given, unused = table.among(pairs), table.unused(pairs)
        if unused:
            console.warn(f"--mpp-csv {mpp_csv}: no slide here answers to {', '.join(unused[:5])}")
    drawn = match_regions(files, regions)
    names = Names(workspace, config)
    jobs: dict[str, TileJob] = {}
    plan = _Plan(rows=[])
    for each in files:
        file = relative(each.path, directory)
        row = replace(known.get(file, LedgerRow(file)), slide=each.slide, archive=resolved(directory))
        if each.problem:
            plan.rows.append(replace(row, status=UNREADABLE, reason=each.problem, tile_status=FAILED))
            continue
        mpp = given.get(file)
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
            regions=drawn[each.path],
            parts=tuple(part.absolute() for part in each.parts),
            verify=verify,
        )
        plan.rows.append(row)
    names.write()
    _refuse_same_zip(jobs)
    with ThreadPoolExecutor(8) as pool:  # reading the ends of thousands of zips is waiting, not work
        zips = [path.absolute() for path in find_zips(workspace.tiles)]
        stored = dict(zip(zips, pool.map(lambda path: _outcome(path, whole=retry), zips), strict=True))
        arguments = [(job, known.get(file), stored.get(job.zip_path)) for file, job in jobs.items()]
        states = dict(zip(jobs, pool.map(lambda each: _state(*each), arguments), strict=True))
        files_of = {path: _file_of(path, outcome, workspace, names) for path, outcome in stored.items()}
        twins = _find_twins(directory, workspace.tiles, jobs, states, stored, files_of, pool)
    for file, old in twins.moved.items():
        outcome = _move(old, jobs[file])
        if outcome is not None:
            console.say(f"{old.name} is now {jobs[file].zip_path.name}: the same content is {file} now")
            states[file] = _State(outcome)
            stored.pop(old)
            before = known.get(files_of[old])
            if before is not None and before.file not in jobs:
                reason, holder = f"its content and its tiles are {file}'s now", jobs[file].slide
                plan.rows.append(replace(_untiled(before), status=WARNING, reason=reason, tile_twin=holder))
    _tell_strays(workspace, directory, stored, jobs)
    replaced = [file for file, state in states.items() if state.replaced]
    if replaced and not retry:
        told = "; ".join(f"{file} ({states[file].replaced})" for file in replaced[:5])
        more = f" and {len(replaced) - 5} more" if len(replaced) > 5 else ""
        raise MismatchError(
            f"{len(replaced)} slide(s) are not what they were when they were tiled: {told}{more}. "
            "histossl tile --retry tiles them anew; another --workspace keeps the old tiles"
        )
    for position, row in enumerate(plan.rows):
        job = jobs.get(row.file)
        if job is None:
            continue
        state, identity = states[row.file], _identity(job)
        damaged = state.outcome is not None and state.outcome.tiling["counts"]["damaged"] > 0
        mended = damaged and (retry or (row.tile_status == TILED and row.tile_settings != identity))
        if row.file in twins.of:
            plan.rows[position] = _twin_row(row, *twins.of[row.file])
        elif state.outcome is not None and not state.replaced and not mended:
            plan.rows[position] = _tiled_row(row, state.outcome, identity)
        elif row.tile_status == FAILED and row.tile_settings == identity and not retry:
            continue
        else:
            plan.jobs.append(job)
            plan.files.append(row.file)
            plan.identities.append(identity)
            if row.file not in known:
                plan.unknown.add(row.file)
    return plan


def _outcome(path: Path, whole: bool) -> SlideOutcome | StoreError:
    """What a zip says. `whole` checks its table of tiles, too; else the index does that, before a tile is used."""
    try:
        tiling = read_store(path).tiling if whole else read_tiling(path)
        return SlideOutcome(tiling, path.stat().st_size)
    except StoreError as error:
        return error
    except OSError as error:
        return StoreError(f"{path}: cannot be read ({error.strerror}); it is made anew")


# ---- one content, one zip


@dataclass
class _Twins:
    # file: what has the same content, in words, and the slide that has or gets the tiles
    of: dict[str, tuple[str, str]] = field(default_factory=dict)
    moved: dict[str, Path] = field(default_factory=dict)  # file: the zip of its content, under the name of a gone file


def _find_twins(
    directory: Path,
    tiles: Path,
    jobs: Mapping[str, TileJob],
    states: Mapping[str, _State],
    stored: Mapping[Path, SlideOutcome | StoreError],
    files_of: Mapping[Path, str],
    pool: ThreadPoolExecutor,
) -> _Twins:
    """Of the files without a zip, those whose content has one under another name, or is there twice."""
    owners = {job.zip_path: file for file, job in jobs.items()}
    holders: dict[str, list[tuple[str | None, Path, str]]] = {}  # fingerprint: spots, zip, file of this archive
    sizes: Counter[int | str | None] = Counter()
    for path, outcome in stored.items():
        owner = owners.get(path, "")
        if isinstance(outcome, SlideOutcome) and not (owner and states[owner].replaced):
            facts = outcome.tiling["slide"]
            holders.setdefault(facts["fingerprint"], []).append((facts.get("spots"), path, owner))
            sizes[facts["bytes"]] += 1
    # Links last: of a file and a link to it, the file is tiled.
    new = sorted((file for file in jobs if states[file].outcome is None), key=lambda file: jobs[file].path.is_symlink())
    size_of = dict(zip(new, pool.map(lambda file: _size(jobs[file]), new), strict=True))
    sizes.update(size for size in size_of.values() if size is not None)
    alike = [file for file in new if sizes[size_of[file]] > 1]
    twins, taken = _Twins(), dict[Path, str]()
    for file, prints in zip(alike, pool.map(lambda file: _prints(jobs[file]), alike), strict=True):
        if prints is None:
            continue
        sampled, spots = prints
        for known_spots, path, owner in holders.get(sampled, ()):
            if known_spots not in (None, spots):
                continue
            owner = owner or taken.get(path, "")
            if owner:
                twins.of[file] = owner, jobs[owner].slide
            elif _still_there(directory, files_of[path], jobs[file].path):
                twins.of[file] = f"{files_of[path]}, which is tiled as {path.name}", _name_of(path, tiles)
            else:
                taken[path] = file
                twins.moved[file] = path
            break
        else:
            holders.setdefault(sampled, []).append((spots, jobs[file].zip_path, file))
    return twins


def _size(job: TileJob) -> int | str | None:
    try:
        return size_mark(job.path.stat().st_size, job.key)
    except OSError:
        return None


def _prints(job: TileJob) -> tuple[str, str] | None:
    try:
        return prints_of(job)
    except OSError:
        return None


def _file_of(path: Path, outcome: SlideOutcome | StoreError, workspace: Workspace, names: Names) -> str:
    """The file that a zip was made of, relative to the archive of then."""
    name = _name_of(path, workspace.tiles)
    told = outcome.tiling["slide"]["file"] if isinstance(outcome, SlideOutcome) else None
    return str(told or names.file_of(name) or name)


def _name_of(path: Path, tiles: Path) -> str:
    return path.relative_to(tiles.absolute()).as_posix().removesuffix(".zip")


def _still_there(directory: Path, file: str, now: Path) -> bool:
    """Whether the file that a zip was made of still stands: here, or seen from a folder that holds this one."""
    here = directory.absolute()
    if any((folder / file).exists() for folder in here.parents):
        return True
    return (here / file).exists() and (here / file) != now


def _move(old: Path, job: TileJob) -> SlideOutcome | None:
    """Give a zip another name, inside too. None if it is damaged: then its slide is tiled."""
    try:
        store = read_store(old)
        tiling = {key: value for key, value in store.tiling.items() if key not in ("format", "digest")}
        tiling["slide"] = {**tiling["slide"], "file": job.file}
        with old.open("rb") as source, new_store(job.zip_path, job.config.mpps) as writer:
            for row in np.sort(store.table, order="offset"):
                source.seek(int(row["offset"]))
                jpeg = source.read(int(row["length"]))
                if zlib.crc32(jpeg) != row["crc"]:
                    raise StoreError(f"{old}: damaged")
                place = (int(row["x_l0"]), int(row["y_l0"]))
                writer.add(*place, jpeg, float(row["tissue"]), int(row["scale"]), int(row["region"]))
            writer.finish(tiling)
        old.unlink()
    except (StoreError, OSError):
        return None
    return SlideOutcome(tiling, job.zip_path.stat().st_size)


def _tell_strays(
    workspace: Workspace, directory: Path, stored: Mapping[Path, object], jobs: Mapping[str, TileJob]
) -> None:
    mine = {job.zip_path for job in jobs.values()}
    strays = [path.relative_to(workspace.tiles.absolute()).as_posix() for path in stored if path not in mine]
    if strays:
        more = f" and {len(strays) - 5} more" if len(strays) > 5 else ""
        console.warn(f"{workspace.tiles}: of no file in {directory}, and kept: {', '.join(strays[:5])}{more}")


@dataclass(frozen=True)
class _State:
    outcome: SlideOutcome | None = None
    replaced: str = ""  # what differs between the slide now and when it was tiled


def _state(job: TileJob, row: LedgerRow | None, outcome: SlideOutcome | StoreError | None) -> _State:
    if outcome is None:
        return _State()
    if isinstance(outcome, StoreError):
        console.warn(f"{outcome}. Doing so now")
        return _State()
    facts = outcome.tiling["slide"]
    if job.slide_mpp is not None and not math.isclose(job.slide_mpp, facts["mpp_l0"], rel_tol=1e-6):
        return _State(outcome, f"{facts['mpp_l0']:g} microns per pixel then, {job.slide_mpp:g} now")
    own = facts.get("own_mpp")  # what the slide says, where an option said something else
    if job.slide_mpp is None and own is not None and not math.isclose(own, facts["mpp_l0"], rel_tol=1e-6):
        by = facts["mpp_source"]
        return _State(outcome, f"{facts['mpp_l0']:g} microns per pixel by {by} then, {own:g} by itself now")
    if row is not None and row.tile_status in (TILED, NO_TILES) and row.tile_settings == _identity(job):
        return _State(outcome)  # same size and time as then: its content need not be read
    try:
        same = fingerprint(job.path, job.key, parts=job.parts) == facts["fingerprint"]
        if same and "spots" in facts:
            same = fingerprint(job.path, job.key, SPOTS, job.parts) == facts["spots"]
        if regions_fingerprint(job) != facts["regions"]:
            return _State(outcome, f"its regions {'changed' if job.regions and facts['regions'] else 'came or went'}")
        size = job.path.stat().st_size
    except OSError as error:
        return _State(outcome, f"cannot be read now: {error.strerror}")
    if same:
        return _State(outcome)
    was = facts["bytes"]
    if job.key:
        return _State(outcome, "other content")
    return _State(outcome, f"{was:,} bytes then, {size:,} now" if size != was else "same size, other content")


def _refuse_same_zip(jobs: Mapping[str, TileJob]) -> None:
    seen: dict[Path, str] = {}
    for file, job in jobs.items():
        if job.zip_path in seen:
            raise StoreError(f"{file} and {seen[job.zip_path]} would share {job.zip_path.name}; rename one of them")
        seen[job.zip_path] = file


def _identity(job: TileJob) -> str:
    """Of a slide's file and all settings: what failed under it fails again, what was tiled under it is done."""
    stamps = [stamp(job.path, job.parts), stamp(job.regions) if job.regions else None]
    parts = [str(job.path.name), stamps, job.slide_mpp, plain(asdict(job.config))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


# ---- running


def _run(
    plan: _Plan,
    ledger: _Ledger,
    num_workers: int | None,
    dask: str | None,
    silence_s: float,
) -> None:
    """All jobs, with a progress bar, each outcome into the ledger."""
    jobs = plan.jobs
    if num_workers is None:
        num_workers = min(len(jobs), num_cores())
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
                job, identity = jobs[event.job], plan.identities[event.job]
                row = ledger[plan.files[event.job]]
                if event.kind == "done":
                    ledger.put(_tiled_row(row, event.value, identity))
                elif isinstance(event.error, StoreFull):
                    raise HistosslError(str(event.error))
                else:
                    reason = str(event.value).removeprefix(f"{job.path.name}: ")
                    reason += "; --time-limit gives it longer" if reason.startswith("hung") else ""
                    # Only what is the slide's own fault fails again for sure; the rest is tried again by itself.
                    identity = identity if isinstance(event.error, SlideError) else ""
                    opened = event.error is not None and not isinstance(event.error, NotOpened)
                    ledger.put(_failed_row(row, reason, identity, opened))
                bar.advance()
    finally:
        close = getattr(events, "close", None)
        if close is not None:
            close()


class _Ledger:
    """archive.csv in memory, written now and then: it can be told again from the zips, so little is lost."""

    def __init__(self, path: Path, rows: Sequence[LedgerRow], unseen: Iterable[str] = ()) -> None:
        self._path = path
        self._unseen = set(unseen)  # not written before they are looked at: nobody knows yet whether they are ok
        self._rows = {row.file: row for row in rows}
        self._written_s = time.monotonic()

    def __getitem__(self, file: str) -> LedgerRow:
        return self._rows[file]

    def put(self, row: LedgerRow) -> None:
        self._rows[row.file] = row
        self._unseen.discard(row.file)
        if time.monotonic() - self._written_s > LEDGER_EVERY_S:
            self.write()

    def write(self) -> None:
        seen = [row for file, row in self._rows.items() if file not in self._unseen]
        write_ledger(self._path, merged(read_ledger(self._path), seen))
        self._written_s = time.monotonic()

    def rows_of(self, files: Sequence[str]) -> list[LedgerRow]:
        return [self._rows[file] for file in files]


def _tiled_row(row: LedgerRow, outcome: SlideOutcome, identity: str) -> LedgerRow:
    facts, counts = outcome.tiling["slide"], outcome.tiling["counts"]
    reason = why_none(outcome.tiling) if not counts["tiles"] else "; ".join(outcome.tiling["warnings"])
    return replace(
        row,
        **_verdict(row, reason),
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
        tile_mpp="+".join(f"{scale['mpp']:.4g}" for scale in outcome.tiling["scales"]),
        tile_settings=identity,
        tile_twin="",
        rejected_tissue=counts["tissue"],
        rejected_region=counts["region"],
        rejected_blur=counts["blur"],
        rejected_fold=counts["fold"],
        rejected_ink=counts.get("ink", 0),  # no zip of before 2026-11-25 says it
        rejected_saturation=counts["saturation"],
        rejected_damaged=counts["damaged"],
    )


def _verdict(row: LedgerRow, reason: str) -> dict[str, Any]:
    """Status and reason of a slide that could be read. What scan warns of stays; what tile said before does not.

    A slide that scan could not use (no scale, say) and that now gave tiles is usable after all.
    """
    if row.status == WARNING and row.reason != row.tile_reason:
        return {"status": row.status, "reason": row.reason}
    return {"status": WARNING if reason else OK, "reason": reason}


def _twin_row(row: LedgerRow, twin: str, holder: str) -> LedgerRow:
    reason = f"same content as {twin}"
    told = _verdict(row, reason)
    return replace(_untiled(row), tile_status=NO_TILES, tile_reason=reason, tile_twin=holder, num_tiles=0, **told)


def _failed_row(row: LedgerRow, reason: str, identity: str, opened: bool) -> LedgerRow:
    return replace(
        _untiled(row),
        status=WARNING if opened else UNREADABLE,
        reason=reason,
        tile_status=FAILED,
        tile_reason=reason,
        tile_settings=identity,
    )


def _untiled(row: LedgerRow) -> LedgerRow:
    return replace(
        row,
        tile_status="",
        tile_reason="",
        tile_way="",
        tile_mpp="",
        tile_settings="",
        tile_twin="",
        num_tiles=None,
        rejected_tissue=None,
        rejected_region=None,
        rejected_blur=None,
        rejected_fold=None,
        rejected_ink=None,
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
        "ink": f"have more than {tiling['config']['tissue'].get('max_ink', 1):.0%} pen ink",
        "saturation": "have no colour",
        "blur": "are out of focus",
        "damaged": "are damaged",
    }
    parts = [f"{counts[name]} {what}" for name, what in words.items() if counts.get(name)]
    return f"no tiles: of {counts['places']} places on the grid {', '.join(parts)}"


def _sweep(tiles: Path) -> None:
    """Remove what killed runs left half-written; of the index only what is old, since other commands write it, too."""
    for folder, _, names in os.walk(tiles):
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") and name.endswith(".part") and not (name.startswith(INDEX_PART) and _young(path)):
                path.unlink(missing_ok=True)


def _young(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime < INDEX_YOUNG_S
    except OSError:
        return False


# ---- the store's own tile size, for --grid native


def common_native_px(
    directory: Path,
    mpp: float,
    slide_mpp: float | None = None,
    mpp_csv: Path | None = None,
    num_workers: int = 1,
    silence_s: float = SILENCE_S,
) -> int:
    """The side that most slides' own JPEG tiles have at `mpp`. The first 50 slides are asked, in processes."""
    found = walk(directory).found
    files = [(relative(each.path, directory), each.slide) for each in found]
    given = read_mpp_csv(mpp_csv).among(files) if mpp_csv else {}
    jobs = []
    for each in found[:50]:
        own = given.get(relative(each.path, directory))
        jobs.append((each.path, slide_mpp if own is None else own, mpp))
    sides: dict[int, int] = {}
    for event in run_jobs(_native_side_px, jobs, num_workers, silence_s):
        side = event.value if event.kind == "done" else None
        if side is not None and 224 <= side <= 512:
            sides[side] = sides.get(side, 0) + 1
    if not sides:
        raise UsageError(
            f"--grid native: no slide of {directory} has square JPEG tiles of its own (224 to 512 px) within 5 % of "
            f"{mpp:g} microns per pixel; use --grid physical, or the --mpp of its slides"
        )
    return max(sides, key=lambda side: (sides[side], side))


def _native_side_px(job: tuple[Path, float | None, float], _: Report) -> int | None:
    path, slide_mpp, mpp = job
    with open_slide(path, slide_mpp) as slide:
        return native_side_px(slide, mpp)
