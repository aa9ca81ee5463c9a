"""Stage `tile`: an archive of slides becomes one zip of JPEG tiles per slide.

    histossl tile --slides DIR

Each slide is a job of its own in a process of its own: whatever it does, it costs only its own row of the ledger.
A zip is whole or absent, so the same command again goes on with the slides that have none.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from histossl.core import console
from histossl.core.anonymous import Names, is_anonymous, settle
from histossl.core.config import SLIDE_MPP, TileConfig, TissueConfig, require
from histossl.core.errors import HistosslError, MismatchError, SlideError, StoreError, UsageError
from histossl.core.workspace import Workspace
from histossl.runtime.locks import alone_in_workspace
from histossl.runtime.process_pool import Event, Report, num_cores, run_jobs
from histossl.slides.annotation_files import match_regions
from histossl.slides.archive import SlideFile, relative, walk
from histossl.slides.content import SPOTS, fingerprint, samples_are_all
from histossl.slides.grid import native_side_px
from histossl.slides.ledger import UNREADABLE, WARNING, LedgerRow, read_ledger
from histossl.slides.reading.mpp import read_mpp_csv
from histossl.slides.reading.slide import open_slide
from histossl.slides.scan import NOT_AGAIN, hung_mark, resolved, still_hung
from histossl.tiles.cutting.tile_slide import (
    Claim,
    NotOpened,
    SlideOutcome,
    StoreFull,
    TileJob,
    identity_of,
    regions_fingerprint,
    stamp_of,
    tile_slide,
)
from histossl.tiles.ledger_rows import FAILED, NO_TILES, TILED, Ledger, failed_row, tiled_row, twin_row, untiled
from histossl.tiles.store.duplicate_slides import Twin, file_of, find_twins, moved_store
from histossl.tiles.store.index import find_zips
from histossl.tiles.store.zip_store import read_store, read_tiling

SILENCE_S = 300.0  # a slide that gives nothing for so long is taken for hung
MOVED_TOLD = 5  # zips whose slides were moved, by name
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
    verify: bool = True,
    names_file: Path | None = None,
) -> list[LedgerRow]:
    """Tile what is not tiled yet; returns this archive's rows of the ledger, one per file.

    `num_workers` processes (default: one per core; 0: none, here), or a Dask cluster's. `retry` tries again what
    failed or was replaced. `regions` is a folder of GeoJSON files; those beside the slides are found without it.
    `verify` decodes every tile that is copied, and compares each tile with the next coarser level of its slide, to find
    damage that gives no error; without it a sample of each slide's copied tiles is decoded.
    A store has one config: another one is a MismatchError that names what differs. `names_file`: where an anonymous
    workspace keeps its names (default: beside it).
    """
    require(slide_mpp is None or SLIDE_MPP.holds(slide_mpp), "slide-mpp", slide_mpp, SLIDE_MPP.words)
    directory = Path(directory)
    files = walk(directory).found
    if not files:
        raise HistosslError(f"{directory}: no slides in it or its subfolders; give the folder that holds the slides")
    with alone_in_workspace(workspace, "tile"):
        _sweep(workspace.tiles)
        config = replace(config, anonymize=config.anonymize or is_anonymous(workspace))
        names = settle(workspace, config.anonymize, names_file)
        refuse_other_settings(workspace, config)
        plan = _plan(
            *(directory, workspace, files, config, names, slide_mpp, mpp_csv, regions, retry, verify),
            num_workers,
            silence_s,
        )
        ledger = Ledger(workspace.archive_csv, plan.rows, plan.unknown)
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


def as_tiled(before: TileConfig, asked: TileConfig, given: Container[str]) -> TileConfig:
    """The settings of the tiles that a workspace holds, but for those of `asked` that are among the options `given`.

    What is given and differs stays, to be refused.
    """
    names = [one.name for one in fields(TileConfig) if one.name in given]
    names += ["coarser_mpp"] if "mpp" in given else []  # --mpp names all scales
    own: dict[str, Any] = {name: getattr(asked, name) for name in names}
    tissue = {one.name: getattr(asked.tissue, one.name) for one in fields(TissueConfig) if one.name in given}
    return replace(before, **{**own, "tissue": replace(before.tissue, **tissue)})


def refuse_other_settings(workspace: Workspace, config: TileConfig) -> None:
    """MismatchError if the workspace holds tiles of another config."""
    before = stored_config(workspace)
    if before is None or before == config:
        return
    raise MismatchError(
        f"{workspace.tiles} holds tiles made with other settings: {'; '.join(_differences(before, config))}. "
        "Use the same settings to go on, or another --workspace"
    )


def other_than_stored(workspace: Workspace, config: TileConfig) -> str:
    """What of a config is not how the tiles of a workspace were made; empty without tiles or a difference."""
    before = stored_config(workspace)
    return "" if before is None else "; ".join(_differences(before, config))


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
    stamps: list[str] = field(default_factory=list)  # of each job's file, before it runs
    claims: dict[str, Twin] = field(default_factory=dict)  # what a file with a claim is, if that is true
    gone: dict[str, LedgerRow] = field(default_factory=dict)  # row of the file whose tiles it then has


def _plan(
    directory: Path,
    workspace: Workspace,
    files: Sequence[SlideFile],
    config: TileConfig,
    names: Names,
    slide_mpp: float | None,
    mpp_csv: Path | None,
    regions: Path | None,
    retry: bool,
    verify: bool,
    num_workers: int | None,
    silence_s: float,
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
        name = names.slide(each.slide, file)
        jobs[file] = TileJob(
            path=each.path.absolute(),
            slide=name,
            file=None if config.anonymize else file,
            zip_path=workspace.zip_of(name).absolute(),
            config=config,
            slide_mpp=mpp if mpp is not None else slide_mpp,
            mpp_source=source,
            key=names.key,
            regions=drawn[each.path].path,
            note=drawn[each.path].note,
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
        files_of = {path: file_of(path, outcome, workspace, names) for path, outcome in stored.items()}
        new = [file for file, state in states.items() if state.outcome is None]
        replaced = [file for file, state in states.items() if state.replaced]
        workers = num_cores() if num_workers is None else num_workers
        twins = find_twins(
            *(resolved(directory), workspace.tiles, known, jobs, new, replaced, stored, files_of),
            *(pool, workers, silence_s),
        )
    moved = 0
    for file, (claim, twin) in twins.claims.items():
        jobs[file] = replace(jobs[file], claim=claim)
        plan.claims[file] = twin
        before = known.get(files_of[claim.zip_path])
        stored.pop(claim.zip_path, None)  # no stray, as far as is known
        if claim.then == "replaced" and before is not None and before.file not in jobs:
            plan.gone[file] = _given_away(before, file, jobs[file])
    for file, old in twins.renamed.items():
        outcome = moved_store(old, jobs[file])
        if outcome is not None:
            moved += 1
            new_name = jobs[file].zip_path.name
            renamed = "keeps its name" if old.name == new_name else f"is now {new_name}"
            if moved <= MOVED_TOLD:
                console.say(f"{old.name} {renamed}: the same content is {file} now")
            states[file] = _State(outcome)
            stored.pop(old)
            before = known.get(files_of[old])
            if before is not None and before.file not in jobs:
                plan.rows.append(_given_away(before, file, jobs[file]))
    if moved > MOVED_TOLD:
        console.say(f"and {moved - MOVED_TOLD:,} more zips whose slides were moved; archive.csv says where they are")
    _tell_strays(workspace, directory, stored, jobs)
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
        state, identity = states[row.file], identity_of(job)
        damaged = state.outcome is not None and state.outcome.tiling["counts"]["damaged"] > 0
        mended = damaged and (retry or (row.tile_status == TILED and row.tile_settings != identity))
        if row.file in twins.of:
            twin = twins.of[row.file]
            plan.rows[position] = twin_row(row, twin.of, twin.holder, twin.settings)
            continue
        if state.outcome is not None and not state.replaced and not mended:
            if not state.unsure:
                plan.rows[position] = tiled_row(row, state.outcome, identity, stamp_of(job))
                continue
            if not retry:
                job = replace(job, claim=Claim(job.zip_path, str(state.outcome.tiling["digest"]), "kept"))
        if row.tile_status == FAILED and row.tile_settings == identity and not retry:
            continue
        if still_hung(row, job.path, job.parts) and not retry:
            plan.rows[position] = replace(failed_row(row, NOT_AGAIN, "", opened=False), hung=row.hung)
            continue
        plan.jobs.append(job)
        plan.files.append(row.file)
        plan.identities.append(identity)
        plan.stamps.append(stamp_of(job))
        if row.file not in known:
            plan.unknown.add(row.file)
    return plan


def _given_away(before: LedgerRow, file: str, job: TileJob) -> LedgerRow:
    reason = f"its content and its tiles are {file}'s now"
    return replace(untiled(before), status=WARNING, reason=reason, tile_twin=job.slide)


def _outcome(path: Path, whole: bool) -> SlideOutcome | StoreError:
    """What a zip says. `whole` checks its table of tiles, too; else the index does that, before a tile is used."""
    try:
        tiling = read_store(path).tiling if whole else read_tiling(path)
        return SlideOutcome(tiling, path.stat().st_size)
    except StoreError as error:
        return error
    except OSError as error:
        return StoreError(f"{path}: cannot be read ({error.strerror}); it is made anew")


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
    unsure: bool = (
        False  # written to since, with equal size and samples: only its tiles will show whether it is another
    )


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
    if row is not None and row.tile_status in (TILED, NO_TILES) and row.tile_settings == identity_of(job):
        return _State(outcome)  # same size and time as then: its content need not be read
    # Samples alone are believed only where no time says otherwise: in a workspace whose archive.csv was lost, or is of
    # before 2026-12. To cut everything once more there, for a slide that nobody exchanged, would cost too much.
    then = row.tile_stamp if row is not None else ""
    try:
        unsure = then not in ("", stamp_of(job)) and not samples_are_all(job.path, job.parts)
        same = fingerprint(job.path, job.key, parts=job.parts) == facts["fingerprint"]
        if same and "spots" in facts:
            same = fingerprint(job.path, job.key, SPOTS, job.parts) == facts["spots"]
        if regions_fingerprint(job) != facts["regions"]:
            return _State(outcome, f"its regions {'changed' if job.regions and facts['regions'] else 'came or went'}")
        size = job.path.stat().st_size
    except OSError as error:
        return _State(outcome, f"cannot be read now: {error.strerror}")
    if same:
        return _State(outcome, unsure=unsure)
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


# ---- running


def _run(
    plan: _Plan,
    ledger: Ledger,
    num_workers: int | None,
    dask: str | None,
    silence_s: float,
) -> None:
    """All jobs, with a progress bar, each outcome into the ledger."""
    jobs = plan.jobs
    if num_workers is None:
        num_workers = min(len(jobs), num_cores())
    if dask is not None:
        from histossl.tiles.dask_executor import run_on_dask

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
                    _put(plan, ledger, event.job, event.value)
                elif isinstance(event.error, StoreFull):
                    raise HistosslError(str(event.error))
                else:
                    reason = str(event.value).removeprefix(f"{job.path.name}: ")
                    reason += "; --retry --time-limit gives it longer" if reason.startswith("hung") else ""
                    # Only what is the slide's own fault fails again for sure; the rest is tried again by itself.
                    identity = identity if isinstance(event.error, SlideError) else ""
                    opened = event.error is not None and not isinstance(event.error, NotOpened)
                    hung = hung_mark(job.path, job.parts) if event.hung else ""
                    ledger.put(replace(failed_row(row, reason, identity, opened), hung=hung))
                bar.advance()
    finally:
        close = getattr(events, "close", None)
        if close is not None:
            close()


def _put(plan: _Plan, ledger: Ledger, number: int, outcome: SlideOutcome) -> None:
    """A finished slide into the ledger; where its claim came true, as the duplicate or the successor that it is."""
    file, claim = plan.files[number], plan.jobs[number].claim
    twin = plan.claims.get(file) if outcome.claimed else None
    if claim is not None and claim.then == "kept" and twin is not None:
        ledger.put(twin_row(ledger[file], twin.of, twin.holder, twin.settings))
        return
    ledger.put(tiled_row(ledger[file], outcome, plan.identities[number], plan.stamps[number]))
    if twin is not None and file in plan.gone:
        ledger.put(plan.gone[file])


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
    known: Iterable[LedgerRow] = (),
) -> int:
    """The side that most slides' own JPEG tiles have at `mpp`. The first 50 slides are asked, in processes.

    Those that hung before, by the rows `known` of the ledger, are left out.
    """
    rows = {row.file: row for row in known}
    found = [
        each
        for each in walk(directory).found
        if not still_hung(rows.get(relative(each.path, directory), LedgerRow("")), each.path, each.parts)
    ]
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
