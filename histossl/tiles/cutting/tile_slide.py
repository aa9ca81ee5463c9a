"""One slide of an archive: its grid, its filters, its tiles, its zip. Runs in a process of its own.

A place of the grid is judged on the thumbnail first (regions, tissue, folds), which costs nothing; what is left is cut,
judged by its pixels (colour, focus), and stored.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from histossl import __version__
from histossl.core.anonymous import Names
from histossl.core.config import TileConfig, plain
from histossl.core.errors import HistosslError, SlideError, StoreError
from histossl.core.workspace import file_stem
from histossl.runtime.process_pool import Report
from histossl.slides.content import SPOTS, fingerprint
from histossl.slides.grid import enlargement
from histossl.slides.quality.focus import surely_in_focus
from histossl.slides.quality.places import PlaceFilter, Wanted
from histossl.slides.quality.tissue import INK_UM, TissueMask
from histossl.slides.reading.slide import Slide, open_slide
from histossl.slides.scan import stamp
from histossl.tiles.cutting.comparison import Comparison, verified
from histossl.tiles.cutting.cutter import Cutter, Pixels, agrees, cutter_for, cutter_of_level, encode, other_levels, rgb
from histossl.tiles.cutting.native_jpeg import DamagedTile, NativeTiles, decoded
from histossl.tiles.store.zip_store import StoreWriter, new_store, read_tiling, scale_name

Ints = npt.NDArray[np.int64]

REPORT_EVERY_S = 0.5
SAMPLE = 32  # native tiles looked at, to know how large a blurred one is, and whether the slide is damaged
FEW_PLACES, FEW_SAMPLE = 256, 16  # of a slide of fewer tiles, fewer are looked at
PALE_POINTS = 8  # across a tile, to tell from the thumbnail whether it may have no colour
JUDGED_PX = 112  # a smaller one is too small to be judged for focus
GLANCE_SHRINK = 8  # the smallest picture a decoder makes: it reads all of a tile's bytes for it
SMALL = 0.7  # of the usual bytes of a copied tile: less may be blur
GLASS_BYTES = 0.25  # of what tissue takes, glass does, at most
SMALL_BLURRED = 1.3  # of the bytes of a tile that is blurred: less may be blur, too
GIVE_UP_DAMAGED = 200  # damaged tiles, when they are also most of what was read


@dataclass(frozen=True)
class Claim:
    """A zip of a slide of the same size and samples, whose file cannot be compared: it is gone, or has changed.

    Cutting the slide decides: only where it gives the same tiles, byte for byte, is it the same slide. Then `zip_path`
    is `then`: "replaced" by this slide's (its file is gone), or "kept", and this one's is not written (its file may
    come back, or it is this very slide's).
    """

    zip_path: Path
    tiles: str  # digest of its tiles
    then: str


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
    note: str = ""  # of annotations that are not read
    parts: tuple[Path, ...] = ()  # all files of a slide that is several
    claim: Claim | None = None  # tiles that were perhaps cut from this very content
    verify: bool = True  # compare tiles with the next coarser level; decode every tile that is copied, not only some
    version: str = __version__


@dataclass
class Counts:
    """Places of the grid, and what became of them. Each place counts once, for the first filter that took it."""

    places: int = 0
    tiles: int = 0
    tissue: int = 0
    region: int = 0
    fold: int = 0
    ink: int = 0
    saturation: int = 0
    blur: int = 0
    damaged: int = 0
    rescued: int = 0  # of the tiles: read from another level than theirs, which is damaged there


@dataclass(frozen=True)
class SlideOutcome:
    """What tiling.json tells the ledger."""

    tiling: dict[str, Any]
    num_bytes: int
    warnings: list[str] = field(default_factory=list)
    claimed: bool = False  # the job's claim is true


class StoreFull(StoreError):
    """The disk takes no more: the run ends, and what is finished stays."""


class _Kept(Exception):
    """The tiles are those of a zip that stays: this one's is not written."""


class NotOpened(SlideError):
    """The slide cannot be opened at all; any other SlideError is of a slide that scan may well have praised."""


def size_mark(size: int, key: bytes = b"") -> int | str:
    """A file's size; in an anonymous store a keyed hash of it, since sizes tell which file a zip is of."""
    return hmac.new(key, str(size).encode(), hashlib.sha256).hexdigest()[:16] if key else size


def whole_name(slide: str) -> dict[str, str]:
    """What tiling.json says of a slide whose zip cannot carry its whole id."""
    return {} if file_stem(slide) == slide else {"name": slide}


def prints_of(job: TileJob) -> tuple[str, str]:
    """Of few samples, and of many."""
    few, many = (fingerprint(job.path, job.key, spots, job.parts) for spots in (10, SPOTS))
    return few, many


def without_names(reason: str, job: TileJob) -> str:
    """What a zip of an anonymous store may say of its slide."""
    if not job.key:
        return reason
    names = Names(job.zip_path.parent, key=job.key)
    names.take({job.slide: (str(job.path), "")})
    return names.reason(reason)


def regions_fingerprint(job: TileJob) -> str | None:
    return None if job.regions is None else fingerprint(job.regions, job.key)


def written_stamp(size: int | None, modified_s: float | None) -> str:
    return "" if size is None else f"{size}@{modified_s}"


def stamp_of(job: TileJob) -> str:
    """Size and time of all its files, for the ledger: as long as they are, its content is taken to be."""
    return written_stamp(*stamp(job.path, job.parts))


def identity_of(job: TileJob) -> str:
    """Of a slide's file and all settings: what failed under it fails again, what was tiled under it is done."""
    stamps = [stamp(job.path, job.parts), stamp(job.regions) if job.regions else None]
    parts = [str(job.path.name), stamps, job.slide_mpp, plain(asdict(job.config))]
    return hashlib.sha256(job.key + json.dumps(parts).encode()).hexdigest()[:16]  # no guess at a name can be checked


def tile_slide(job: TileJob, report: Report) -> SlideOutcome:
    """Make one slide's zip. SlideError if the slide cannot be used, StoreFull if the disk is full."""
    if job.version != __version__:
        raise StoreError(f"this worker runs histossl {__version__}, the command {job.version}; install the same")

    def open_again() -> Slide:
        slide = open_slide(job.path, job.slide_mpp, mpp_source=job.mpp_source)
        slide.beat = lambda: report(0)
        return slide

    before = stamp(job.path, job.parts)
    if before == (None, None):
        link = "a link to a file that is not there" if job.path.is_symlink() else "not there any more"
        raise NotOpened(f"{job.path.name}: {link}")
    try:
        try:
            own_mpp = _own_mpp(job)
            opened = open_again()
        except SlideError as error:
            raise NotOpened(str(error)) from error.__cause__
        with opened as slide:
            warnings = [*slide.warnings, *_too_coarse(slide, job.config), *([job.note] if job.note else [])]
            prints = prints_of(job)
            with new_store(job.zip_path, job.config.mpps) as store:
                with _vanishing(job), closing(Making(job, slide, open_again, store, report)) as making:
                    tiling = making.tiling(warnings, *prints, own_mpp)
                if stamp(job.path, job.parts) != before:
                    raise SlideError(f"{job.path.name}: changed while it was tiled; run the command again")
                claimed = _is_true(job, store)
                store.finish(tiling)
    except _Kept:
        assert job.claim is not None
        return SlideOutcome(read_tiling(job.claim.zip_path), job.claim.zip_path.stat().st_size, claimed=True)
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
        # No SlideError: the disk's fault may be over when the command runs again.
        raise HistosslError(f"{job.path.name}: cannot be read ({error.strerror or error})") from error
    return SlideOutcome(tiling, job.zip_path.stat().st_size, claimed=claimed)


def _is_true(job: TileJob, store: StoreWriter) -> bool:
    """Whether the tiles are those of the job's claim. SlideError if its own tiles are another slide's."""
    claim = job.claim
    if claim is None:
        return False
    own = claim.zip_path == job.zip_path
    # Two slides without tiles are not one for that.
    same = store.digest() == claim.tiles and (own or store.num_tiles > 0)
    if own and not same:
        raise SlideError(
            f"{job.path.name}: same size, other content than when it was tiled; histossl tile --retry tiles it anew, "
            "another --workspace keeps the old tiles"
        )
    if same and claim.then == "kept":
        raise _Kept
    if same:  # first, so that a kill in between leaves no slide twice
        claim.zip_path.unlink(missing_ok=True)
    return same


@contextmanager
def _vanishing(job: TileJob) -> Iterator[None]:
    """Errors of opening the slide's own files stay the slide's: they must not be taken for the store's."""
    try:
        yield
    except OSError as error:
        if error.filename is None or Path(error.filename).is_relative_to(job.zip_path.parent):
            raise
        name = job.path.name
        if isinstance(error, FileNotFoundError):
            raise SlideError(f"{name}: vanished while it was tiled") from None
        raise HistosslError(f"{name}: cannot be read ({error.strerror})") from None


def _own_mpp(job: TileJob) -> float | None:
    """What the slide says of its scale, where an option says something else."""
    if job.slide_mpp is None:
        return None
    with open_slide(job.path, need_mpp=False) as slide:
        return slide.mpp_l0 if not slide.mpp_problem else None


def _too_coarse(slide: Slide, config: TileConfig) -> list[str]:
    said, too_much = enlargement(slide.mpp_l0, config.mpp)
    if too_much:
        raise SlideError(f"{slide.path.name}: {said}")
    return [said] if said else []


@dataclass(frozen=True)
class _Doubts:
    """Places of tiles to be looked at for focus and for colour; `damage`: copied tiles are all decoded, too."""

    focus: frozenset[int] = frozenset()
    colour: frozenset[int] = frozenset()
    damage: bool = True


class _Rescue:
    """Tiles that are damaged on their own level, from another one: a finer one first, it shows the same."""

    def __init__(self, slide: Slide, damaged: Cutter, open_again: Callable[[], Slide]) -> None:
        self._slide, self._damaged, self._open_again = slide, damaged, open_again
        self._cutters: list[Cutter] | None = None

    def pixels(self, place: int, comparison: Comparison) -> Pixels | None:
        if self._cutters is None:  # most slides never need them
            grid = self._damaged.grid
            self._cutters = [
                cutter_of_level(self._slide, grid, level, self._open_again) for level in other_levels(self._slide, grid)
            ]
        for cutter in self._cutters:
            with suppress(DamagedTile):
                pixels = cutter.pixels(place)
                if not comparison.differs(place, pixels):
                    return pixels
        return None

    def close(self) -> None:
        for cutter in self._cutters or ():
            cutter.source.close()


class Making:
    """Fills one zip: for each scale the grid, the filters, the tiles."""

    def __init__(
        self, job: TileJob, slide: Slide, open_again: Callable[[], Slide], store: StoreWriter, report: Report
    ) -> None:
        self._job, self._slide, self._open_again, self._store = job, slide, open_again, store
        self._report, self._config = report, job.config
        self._opened: Slide | None = None
        self._counts = Counts()
        self._verified: list[str] = []
        self._unreported, self._reported_s = 0, time.monotonic()
        self._filter = PlaceFilter(slide, open_again, job.config.tissue, job.regions)
        if self._filter.handle_spent:
            self._slide = self._opened = open_again()
        self._beat(0, force=True)

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()

    def tiling(self, warnings: list[str], sampled: str, spots: str, own_mpp: float | None) -> dict[str, Any]:
        """Tile all scales; returns what tiling.json says."""
        slide, job = self._slide, self._job
        scales = [self._one_scale(number, mpp) for number, mpp in enumerate(self._config.mpps)]
        self._beat(0, force=True)
        if self._counts.damaged:
            warnings.append(f"{self._counts.damaged} damaged tile(s) left out")
        if self._counts.rescued:
            warnings.append(
                f"{self._counts.rescued} tile(s) read from another level of the slide, being damaged on their own"
            )
        return {
            "tile_px": self._config.tile_px,
            "scales": scales,
            "regions": self._filter.region_names,
            "counts": asdict(self._counts),
            "verified": ", ".join(dict.fromkeys(self._verified)),
            "warnings": [without_names(one, job) for one in warnings],
            "slide": {
                "file": job.file,
                **whole_name(job.slide),
                "fingerprint": sampled,
                "spots": spots,
                "regions": regions_fingerprint(job),
                "bytes": size_mark(job.path.stat().st_size, job.key),
                "mpp_l0": slide.mpp_l0,
                "mpp_source": slide.mpp_source,
                "own_mpp": own_mpp,
                "width_l0": slide.size_l0[0],
                "height_l0": slide.size_l0[1],
                "bounds_l0": list(slide.bounds_l0),
                "vendor": slide.vendor,
                "format": slide.format,
            },
            "config": plain(asdict(self._config)),
        }

    def _one_scale(self, number: int, mpp: float) -> dict[str, Any]:
        cutter = cutter_for(self._slide, mpp, self._config, self._open_again)
        try:
            wanted = self._filter.wanted(cutter.grid)
            same, spent = agrees(cutter, self._slide, self._open_again, wanted.places)
            if spent:
                self.close()
                self._slide = self._opened = self._open_again()
            if not same:
                cutter.source.close()
                cutter = cutter_for(self._slide, mpp, replace(self._config, grid="physical"), self._open_again, "read")
                wanted = self._filter.wanted(cutter.grid)
            self.fill(number, cutter, wanted)
        finally:
            cutter.source.close()
        grid = cutter.grid
        return {"name": scale_name(mpp), "mpp": grid.mpp, "side_l0": grid.side_l0, "way": cutter.way}

    def fill(self, scale: int, cutter: Cutter, wanted: Wanted) -> None:
        """Cut, judge, encode and store the wanted tiles."""
        counts, places = self._counts, wanted.places
        counts.places += cutter.grid.num_places
        counts.region += wanted.rejected["region"]
        counts.tissue += wanted.rejected["tissue"]
        counts.fold += wanted.rejected["fold"]
        counts.ink += wanted.rejected["ink"]
        damaged = seen = 0
        columns = (wanted.x_l0, wanted.y_l0, wanted.tissue, wanted.regions)
        facts = dict(zip(places.tolist(), zip(*(each.tolist() for each in columns), strict=True), strict=True))
        doubts = self._doubts(cutter, places, wanted.tissue)
        compared = Comparison(self._slide, cutter, self._open_again, places, self._job.verify)
        with closing(compared) as comparison, closing(_Rescue(self._slide, cutter, self._open_again)) as rescue:
            for tile in cutter.tiles(places):
                seen += 1
                if tile.glass:
                    counts.tissue += 1
                    continue
                jpeg, pixels = tile.jpeg, tile.pixels
                good = doubts is not None and tile.place not in doubts.focus and tile.place not in doubts.colour
                inked = False
                try:
                    if jpeg is not None and doubts is not None:
                        good = self._good_copy(jpeg, tile.place, doubts, cutter, comparison)
                        inked = good and self._inked_copy(jpeg, cutter)
                    elif pixels is not None and comparison.differs(tile.place, pixels):
                        pixels = None
                except DamagedTile:
                    jpeg = None
                rescued = jpeg is None and pixels is None
                if rescued:
                    pixels = rescue.pixels(tile.place, comparison)
                    if pixels is None:
                        damaged += 1
                        counts.damaged += 1
                        if damaged >= GIVE_UP_DAMAGED and damaged > seen / 2:
                            raise SlideError(f"{self._slide.path.name}: damaged ({damaged} of the first {seen} tiles)")
                        self._beat(0)
                        continue
                if pixels is not None and (rescued or not good):
                    good = self._good(rgb(pixels))
                if not good:
                    self._beat(0)
                    continue
                if inked or (pixels is not None and self._filter.inked(rgb(pixels), cutter.grid.mpp)):
                    counts.ink += 1
                    self._beat(0)
                    continue
                if jpeg is None:
                    assert pixels is not None
                    jpeg = encode(pixels, self._config.jpeg_quality)
                x_l0, y_l0, tissue, region = facts[tile.place]
                self._store.add(x_l0, y_l0, jpeg, tissue, scale, region)
                counts.tiles += 1
                counts.rescued += rescued
                self._beat(1)
        if seen and damaged == seen:
            raise SlideError(f"{self._slide.path.name}: damaged: none of its {seen} tiles can be read")
        self._verified += verified(self._slide, comparison, decoded=doubts is None or doubts.damage)

    def _good(self, pixels: Pixels) -> bool:
        """Whether a tile has colour and is in focus; counts it if not."""
        poor = self._filter.poor(pixels)
        self._counts.saturation += poor == "saturation"
        self._counts.blur += poor == "blur"
        return not poor

    def _inked_copy(self, jpeg: bytes, cutter: Cutter) -> bool:
        """The same of a tile that is copied: decoded only where the slide's thumbnail shows some ink."""
        if self._filter.ink is None or self._filter.ink_finder is None:
            return False
        grid = cutter.grid
        shrink = next((each for each in (4, 2) if grid.mpp * each <= INK_UM and grid.tile_px % each == 0), 1)
        return self._filter.inked(decoded(jpeg, (grid.tile_px, grid.tile_px), shrink), grid.mpp * shrink)

    def _good_copy(self, jpeg: bytes, place: int, doubts: _Doubts, cutter: Cutter, comparison: Comparison) -> bool:
        """The same of a tile that is copied, looked at only where there is doubt. DamagedTile if it is not whole."""
        size = (cutter.grid.tile_px, cutter.grid.tile_px)
        if doubts.damage and comparison.differs(place, decoded(jpeg, size, GLANCE_SHRINK)):
            raise DamagedTile("differs from the next coarser level")
        if place in doubts.colour:
            return self._good(decoded(jpeg, size))
        if place in doubts.focus:
            grey = decoded(jpeg, size, grey=True)
            return surely_in_focus(grey, self._config.tissue.min_sharpness) or self._good(decoded(jpeg, size))
        return True

    def _doubts(self, cutter: Cutter, places: Ints, tissue: npt.NDArray[np.float64]) -> _Doubts | None:
        """Of tiles made from the slide's own, those that must be looked at; None: all of them.

        A tile out of focus takes few bytes. How few is learnt from a sample, so that on a slide that is blurred
        throughout every tile is looked at. A tile without colour shows on the thumbnail. Flipped bits show only when
        decoded: where the sample has some, all copied tiles are.
        """
        limits, source = self._config.tissue, cutter.source
        if not len(places) or not isinstance(source, NativeTiles):
            return None
        if cutter.way != "copied" and min(source.tile_width_px, source.tile_height_px) < JUDGED_PX:
            return None
        # Glass takes few bytes in any focus: a tile is compared by what its tissue takes.
        share = tissue + GLASS_BYTES * (1 - tissue)
        taken = cutter.native_bytes(places) / share
        focus = taken < SMALL * float(np.median(taken))
        whole = True
        for number in np.unique(
            np.linspace(0, len(places) - 1, SAMPLE if len(places) >= FEW_PLACES else FEW_SAMPLE).astype(int)
        ).tolist():
            column, row = cutter.native_middle(int(places[number]))
            try:
                grey = source.grey(column, row)
            except DamagedTile:
                whole = False
                continue
            if grey is not None and not surely_in_focus(grey, limits.min_sharpness):
                own = source.byte_counts[row * source.level.tiles_across + column] / share[number]
                focus |= taken < SMALL_BLURRED * own
        colour = np.zeros(len(places), bool)
        if limits.min_saturation > 0:
            x_l0, y_l0 = cutter.grid.corners_l0(places)
            # Of each tile so many points: adding up all of the thumbnail would take longer than copying the tiles.
            downsample = self._filter.tissue.downsample
            apart = max(1, int(cutter.grid.side_l0 / downsample / PALE_POINTS))
            pale = TissueMask(self._filter.pale[::apart, ::apart], downsample * apart)
            colour = pale.share(x_l0, y_l0, cutter.grid.side_l0) > 0.5
        return _Doubts(
            focus=frozenset(places[focus].tolist() if limits.min_sharpness > 0 else ()),
            colour=frozenset(places[colour].tolist()),
            damage=self._job.verify or not whole,
        )

    def _beat(self, count: int, force: bool = False) -> None:
        """Tell the parent now and then that this slide is getting on."""
        self._unreported += count
        now_s = time.monotonic()
        if force or now_s - self._reported_s > REPORT_EVERY_S:
            self._report(self._unreported)
            self._unreported, self._reported_s = 0, now_s
