"""Every stage's knobs as frozen dataclasses, and how a run remembers them in run.json.

A config refuses what no run could use (UsageError, exit 2) when it is made, before any work starts.
"""

from __future__ import annotations

import csv
import difflib
import itertools
import json
import math
import os
import platform
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from histossl import __version__
from histossl.core.anonymous import names_above
from histossl.core.errors import MismatchError, UsageError
from histossl.core.workspace import VARIABLE, written_aside

# ---- refusing


def require(holds: bool, option: str, value: object, wanted: str) -> None:
    """One wording for a setting that cannot be used."""
    if not holds:
        raise UsageError(f"--{option} {value}: must be {wanted}")


def nearest(name: str, known: Iterable[str]) -> str:
    """', did you mean X?' for a mistyped name, with X as it is spelt, or nothing. Small letters and large are alike."""
    spelt = {each.casefold(): each for each in known}
    close = difflib.get_close_matches(name.casefold(), list(spelt), n=1, cutoff=0.5)
    return f", did you mean {spelt[close[0]]!r}?" if close else ""


SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}


def separator_of(first_line: str, fits: Callable[[set[str]], bool]) -> str:
    """What parts the columns of a table: a comma, else a semicolon or a tab, as spreadsheets save in many languages.

    `fits` says of the columns' names, in small letters, whether they are the table's. Another mark than the comma is
    taken only where no name holds any mark, so that nothing else can be meant.
    """

    def names(mark: str) -> set[str]:
        return {name.strip().lower() for name in next(csv.reader([first_line], delimiter=mark), [])}

    if fits(names(",")):
        return ","
    others = [mark for mark in ";\t" if fits(names(mark)) and not any({*name} & {*SEPARATORS} for name in names(mark))]
    return others[0] if len(others) == 1 else ","


def refuse_separator(path: Path | str, header: Iterable[str], error: type[UsageError] = UsageError) -> None:
    """Of a table whose columns were not found, for all `separator_of` could do."""
    for mark, name in SEPARATORS.items():
        if mark != "," and any(mark in column for column in header):
            raise error(f"{path}: columns are separated by {name}s; save it with commas")


# ---- scan and tile

GRIDS = ("auto", "native", "physical")
JPEG_QUALITY = 90  # of tiles that are encoded anew


def _require_tiles(tile_px: int, mpps: tuple[float, ...], jpeg_quality: int) -> None:
    """What scan and tile ask of tiles alike."""
    require(16 <= tile_px <= 4096, "tile-px", tile_px, "a side of 16 to 4096 pixels")
    for mpp in mpps:
        require(0.05 <= mpp <= 100, "mpp", mpp, "microns per pixel between 0.05 and 100 (0.5 is a 20x scan)")
    given = ",".join(f"{mpp:g}" for mpp in mpps)
    require(
        all(finer < coarser for finer, coarser in itertools.pairwise(mpps)),
        "mpp",
        given,
        "different scales, finest first (0.5,1,2)",
    )
    require(len(mpps) <= 16, "mpp", given, "16 scales at most")
    require(1 <= jpeg_quality <= 100, "jpeg-quality", jpeg_quality, "1 to 100")


@dataclass(frozen=True)
class TissueConfig:
    """What counts as tissue, and which tiles are too poor to learn from. 0 (or 1 for a `max_`) turns a filter off."""

    min_tissue: float = 0.5  # share of a tile that must be tissue
    tissue_um: float = 8.0  # microns per pixel of the thumbnail on which tissue is sought; finer on small slides
    tissue_threshold: float = 0.0  # optical density that divides tissue from glass; 0: Otsu, kept within sane bounds
    min_speck_um: float = 100.0  # tissue smaller than a square of this side is dust
    max_hole_um: float = 150.0  # a hole smaller than a square of this side (a gland's lumen, fat) belongs to the tissue
    reject_pen: bool = True  # blue, green, red and black ink, and grey: cover-slip edges, dirt
    min_sharpness: float = 0.15  # blur: share of contrast in detail of 3-7 px; in focus 0.3 and more, 3 px blurred 0.12
    max_fold: float = 0.5  # share of a tile that may be folded tissue
    max_ink: float = 0.01  # share of a tile that pen ink may cover; looked for only with reject_pen
    min_saturation: float = 0.02  # mean colour saturation (0 grey, 1 pure colour)

    def __post_init__(self) -> None:
        require(0 <= self.min_tissue <= 1, "min-tissue", self.min_tissue, "a share between 0 and 1")
        require(0.5 <= self.tissue_um <= 100, "tissue-um", self.tissue_um, "0.5 to 100 microns per thumbnail pixel")
        require(
            0 <= self.tissue_threshold <= 2, "tissue-threshold", self.tissue_threshold, "an optical density, 0 to 2"
        )
        require(self.min_speck_um >= 0, "min-speck-um", self.min_speck_um, "a length in microns, 0 or more")
        require(self.max_hole_um >= 0, "max-hole-um", self.max_hole_um, "a length in microns, 0 or more")
        require(0 <= self.min_sharpness <= 1, "min-sharpness", self.min_sharpness, "between 0 (off) and 1")
        require(0 <= self.max_fold <= 1, "max-fold", self.max_fold, "a share between 0 and 1 (off)")
        require(0 <= self.max_ink <= 1, "max-ink", self.max_ink, "a share between 0 and 1 (off)")
        require(0 <= self.min_saturation <= 1, "min-saturation", self.min_saturation, "between 0 (off) and 1")


@dataclass(frozen=True)
class ScanConfig:
    """How an archive is looked through: where scale comes from, how long one file may take, what tiling would ask."""

    tile_px: int = 256
    mpp: float = 0.5
    coarser_mpp: tuple[float, ...] = ()  # further scales
    slide_mpp: float | None = None  # microns per pixel of every slide, over what the files say
    mpp_csv: str | None = None  # columns slide,mpp: the same, slide by slide
    time_limit_s: float = 120.0
    jpeg_quality: int = JPEG_QUALITY
    tissue: TissueConfig = field(default_factory=TissueConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "coarser_mpp", tuple(self.coarser_mpp))
        _require_tiles(self.tile_px, self.mpps, self.jpeg_quality)
        require(
            self.slide_mpp is None or 0.05 <= self.slide_mpp <= 5,
            "slide-mpp",
            self.slide_mpp,
            "microns per pixel between 0.05 and 5 (0.25 is a 40x scan, 0.5 a 20x scan)",
        )
        require(0 < self.time_limit_s < 1e6, "time-limit", self.time_limit_s, "seconds, more than 0")

    @property
    def mpps(self) -> tuple[float, ...]:
        return (self.mpp, *self.coarser_mpp)


@dataclass(frozen=True)
class TileConfig:
    """How slides become tiles. Only physical scale decides: a tile is `tile_px` wide at `mpp` microns per pixel.

    One store holds tiles of one config. What belongs to a slide (its scale, say) is kept with the slide instead.
    """

    tile_px: int = 256
    mpp: float = 0.5  # of the finest tiles
    coarser_mpp: tuple[float, ...] = ()  # further scales, each with its own grid
    grid: str = "auto"  # auto, native, physical: whether the slide's own JPEG tiles are copied
    jpeg_quality: int = JPEG_QUALITY  # copied tiles keep the scanner's
    anonymize: bool = False  # name zips by a keyed hash
    tissue: TissueConfig = field(default_factory=TissueConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "coarser_mpp", tuple(self.coarser_mpp))
        _require_tiles(self.tile_px, self.mpps, self.jpeg_quality)
        require(self.grid in GRIDS, "grid", self.grid, f"one of {', '.join(GRIDS)}{nearest(self.grid, GRIDS)}")

    @property
    def mpps(self) -> tuple[float, ...]:
        return (self.mpp, *self.coarser_mpp)


# ---- pretrain

OPTIMIZERS = ("sgd", "adamw", "lars")


@dataclass(frozen=True)
class PretrainConfig:
    """What defines a pretraining run: change any of it and it is another run. 0 or '' means 'work it out' (planner)."""

    method: str = "mocov2"
    backbone: str = "resnet50"
    weights: str = "imagenet"  # imagenet, random, or a file
    steps: int = 0
    epochs: float = 0.0
    hours: float = 0.0
    batch_size: int = 256  # tiles per optimizer step, over all processes and micro-batches; 0: what fits
    view_px: int = 224
    recipe: str = ""  # '': the method's own with what tissue needs (mocov2-histology)
    optimizer: str = ""  # sgd, adamw, lars
    lr: float = 0.0
    weight_decay: float = -1.0  # -1: the method's
    layer_decay: float = 0.0  # learning rate falls by this factor from each block to the one before it
    warmup: float = -1.0  # share of the steps; -1: the method's
    final_lr: float = -1.0  # share of the peak at the end of the cosine; -1: the method's
    clip_norm: float = 3.0
    slide_balance: float = 0.0
    seed: int = 0
    set: tuple[str, ...] = ()  # KEY=VALUE of the method's own knobs
    excluded_slides: tuple[str, ...] = ()
    subset: str = ""  # of the tiles, by its name; '': all
    view_set: tuple[str, ...] = ()  # KEY=VALUE of every view, over the recipe's

    def __post_init__(self) -> None:
        object.__setattr__(self, "set", tuple(self.set))
        object.__setattr__(self, "view_set", tuple(self.view_set or ()))
        object.__setattr__(self, "excluded_slides", tuple(sorted(self.excluded_slides)))
        require(self.steps >= 0, "steps", self.steps, "1 or more")
        for name in ("epochs", "hours"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, value, "a number above 0")
        given = [name for name in ("steps", "epochs", "hours") if getattr(self, name)]
        if len(given) > 1:
            raise UsageError(f"--{' and --'.join(given)}: give only one of them; each sets the length")
        require(self.batch_size == 0 or self.batch_size >= 2, "batch-size", self.batch_size, "auto, or 2 or more tiles")
        require(16 <= self.view_px <= 1024, "view-px", self.view_px, "a side of 16 to 1024 pixels")
        require(self.optimizer in ("", *OPTIMIZERS), "optimizer", self.optimizer, f"one of {', '.join(OPTIMIZERS)}")
        require(0 <= self.lr < math.inf, "lr", self.lr, "a number above 0")
        decay = self.weight_decay
        require(decay == -1 or 0 <= decay < math.inf, "weight-decay", decay, "0 or more, or -1: the method's")
        require(0 <= self.layer_decay <= 1, "layer-decay", self.layer_decay, "between 0 and 1 (1: none)")
        require(self.warmup == -1 or 0 <= self.warmup < 1, "warmup", self.warmup, "a share of the steps, 0 to 1")
        require(self.final_lr == -1 or 0 <= self.final_lr <= 1, "final-lr", self.final_lr, "a share of --lr, 0 to 1")
        require(self.clip_norm > 0, "clip-norm", self.clip_norm, "more than 0")
        require(
            0 <= self.slide_balance <= 1, "slide-balance", self.slide_balance, "0 (tiles alike) to 1 (slides alike)"
        )


@dataclass(frozen=True)
class DistillConfig(PretrainConfig):
    """What defines a distillation: a pretraining run with a teacher. `backbone` and `weights` are the student's."""

    method: str = "distillation"
    teacher: str = ""  # digest of the model that teaches, wherever it lies


# ---- curate

NEIGHBOURS = 4  # per query tile, where no number of tiles is asked for: DINOv2's (Oquab et al. 2023, section 3)


@dataclass(frozen=True)
class CurateConfig:
    """What defines a curated subset. 0 and () mean 'none' or 'work it out'."""

    duplicate_cosine: float = 0.9  # more alike than this are copies; 1: copies are not sought
    tiles: int = 0  # keep about so many, balanced; 0: all but the copies
    clusters: tuple[int, ...] = ()  # of the levels, finest first; (): worked out from the number of tiles
    like_slides: tuple[str, ...] = ()  # retrieve what is most like these
    like_classes: tuple[str, ...] = ()  # retrieve what is most like the training slides of these
    queries: tuple[str, ...] = ()  # the slides that these two stand for
    labelled_slides: tuple[str, ...] = ()  # where labels are given: nothing is retrieved from these
    embedder: str = ""  # name, digest and input size of the backbone
    seed: int = 0
    excluded_slides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("clusters", "like_slides", "like_classes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("queries", "labelled_slides", "excluded_slides"):
            object.__setattr__(self, name, tuple(sorted(getattr(self, name))))
        cosine = self.duplicate_cosine
        require(0 < cosine <= 1, "duplicate-cosine", cosine, "above 0 and at most 1 (1: keep copies)")
        require(self.tiles >= 0, "tiles", self.tiles, "1 or more")
        given = ",".join(map(str, self.clusters))
        require(all(count >= 1 for count in self.clusters), "clusters", given, "numbers of 1 or more, like 1000,100,10")
        falling = all(finer > coarser for finer, coarser in itertools.pairwise(self.clusters))
        require(falling, "clusters", given, "finest first, each level smaller than the one before it")
        retrieving = bool(self.like_slides or self.like_classes)
        require(not (self.clusters and retrieving), "clusters", given, "left out where tiles are retrieved by example")
        require(bool(self.tiles) or not self.clusters, "clusters", given, "together with --tiles: how many to keep")

    def with_slides(self, queries: Iterable[str], labelled: Iterable[str], excluded: Iterable[str]) -> CurateConfig:
        return replace(self, queries=tuple(queries), labelled_slides=tuple(labelled), excluded_slides=tuple(excluded))


# ---- embed and finetune


@dataclass(frozen=True)
class EmbedConfig:
    """How tiles go through a backbone. None of it changes what a run is; 0 means 'work it out'."""

    batch_size: int = 0
    num_workers: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        require(self.batch_size >= 0, "embed-batch-size", self.batch_size, "1 or more tiles")
        require(self.num_workers >= 0, "workers", self.num_workers, "1 or more")


@dataclass(frozen=True)
class TuneConfig:
    """End-to-end training (`--train last` and `all`), the same for every start."""

    steps: int = 100
    lr: float = 1e-4  # of the last block; the head learns ten times faster
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    bags_per_step: int = 8
    tiles_per_bag: int = 16
    test_tiles: int = 256  # of a slide, when it is tested

    def __post_init__(self) -> None:
        for name in ("steps", "bags_per_step", "tiles_per_bag", "test_tiles"):
            require(getattr(self, name) >= 1, f"tune {name}", getattr(self, name), "1 or more")
        require(self.lr > 0, "tune lr", self.lr, "more than 0")
        require(0 < self.layer_decay <= 1, "tune layer_decay", self.layer_decay, "between 0 and 1 (1: none)")
        require(self.weight_decay >= 0, "tune weight_decay", self.weight_decay, "0 or more")


@dataclass(frozen=True)
class FinetuneConfig:
    """What defines a label-efficiency curve. '' and 0 mean 'work it out'."""

    labels: str
    starts: tuple[str, ...] = ()  # random, imagenet, adapted, colour, runs or files; (): those that can be made
    backbone: str = ""  # timm name of random and imagenet; '': that of adapted
    weights: str = ""  # of the imagenet start; '': what adapted started from
    adapted: str = ""  # a pretraining run or a file; '': the workspace's finished run
    input_px: int = 0  # tiles are shown at this size to every start; 0: the size the adapted backbone learnt at
    head: str = ""  # mean, knn, simpleshot, abmil; '': mean, or abmil when the backbone learns too
    train: str = "head"  # head: frozen features; last, all: end to end
    tune: TuneConfig = field(default_factory=TuneConfig)
    unit: str = ""  # what carries a label: slide, region, tile; '': what the labels are of
    regions: str = ""  # a folder of QuPath GeoJSON files: labels of regions
    tiles_per_slide: int = 100  # with unit tile: at most so many of a slide and label
    budgets: tuple[int | str, ...] = ()
    draws: int = 10
    folds: int = 0
    group: str = "patient"
    classes: tuple[str, ...] = ()
    mixed_patients: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("starts", "budgets", "classes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.head:
            object.__setattr__(self, "head", "mean" if self.train == "head" else "abmil")
        for name, known in (
            ("head", ("mean", "knn", "simpleshot", "abmil")),
            ("train", ("head", "last", "all")),
            ("unit", ("", "slide", "region", "tile")),
            ("group", ("patient", "site")),
        ):
            value = getattr(self, name)
            require(value in known, name, value, f"one of {', '.join(filter(None, known))}{nearest(value, known)}")
        end_to_end = f"abmil with --train {self.train}: only the attention head learns together with a backbone"
        require(self.train == "head" or self.head == "abmil", "head", self.head, end_to_end)
        for budget in self.budgets:
            right = budget == "all" or (isinstance(budget, int) and budget >= 1)
            require(right, "budgets", budget, "numbers of labelled items per class, or all, like 1,2,4,8,all")
        require(1 <= self.draws <= 1000, "draws", self.draws, "1 to 1000")
        require(self.folds == 0 or self.folds >= 2, "folds", self.folds, "2 or more")
        require(self.tiles_per_slide >= 1, "tiles-per-slide", self.tiles_per_slide, "1 or more")
        require(
            self.input_px == 0 or 16 <= self.input_px <= 1024, "input-px", self.input_px, "a side of 16 to 1024 pixels"
        )
        twice = [name for name in self.starts if self.starts.count(name) > 1]
        require(not twice, "starts", ",".join(self.starts), "different starts")


# ---- shared by all stages


def knob(default: Any, meaning: str, paper: str = "", source: str = "") -> Any:
    """A field of a method's config, with what `histossl methods NAME` tells of it and of the paper's value."""
    return field(default=default, metadata={"meaning": meaning, "paper": paper, "source": source})


def with_overrides(config: Any, assignments: Iterable[str]) -> Any:
    """Apply `--set key=value` to a dataclass. Values are read as the type of the default; unknown keys are refused."""
    known = {field.name: getattr(config, field.name) for field in fields(config)}
    changes: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise UsageError(f"--set {assignment}: must be KEY=VALUE")
        if key not in known:
            raise UsageError(
                f"--set {assignment}: unknown key {key!r}{nearest(key, known) or '.'} Known: {', '.join(sorted(known))}"
            )
        changes[key] = _as_type_of(known[key], text.strip(), assignment)
    return replace(config, **changes)


def _as_type_of(default: object, text: str, assignment: str) -> object:
    kind = type(default)
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no", "on", "off"):
            raise UsageError(f"--set {assignment}: must be true or false")
        return text.lower() in ("true", "1", "yes", "on")
    try:
        return kind(float(text)) if kind is int and float(text).is_integer() else kind(text)  # type: ignore[call-arg]
    except ValueError as error:
        raise UsageError(f"--set {assignment}: must be {'a whole' if kind is int else 'a'} number") from error


def read_toml(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """A `--config FILE.toml`: option names (dashes or underscores) with values. Unknown keys are refused."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not a TOML file ({error})") from error
    known = set(known)
    settings = {key.replace("-", "_"): value for key, value in values.items()}
    for key in settings:
        if key not in known:
            raise UsageError(f"--config {path}: unknown setting {key!r}{nearest(key, known)}")
    return settings


# ---- run.json

SHORT_LIST = 3  # told as it is
FROM = {"excluded_slides": "which come from the test patients of --labels and from --exclude"}
WORKED_OUT = (  # where they are 0, -1 or empty
    *("steps", "epochs", "hours", "batch_size", "recipe", "optimizer", "lr", "weight_decay", "layer_decay", "warmup"),
    *("final_lr", "input_px", "folds", "unit", "budgets", "clusters"),
)


def plain(value: Any) -> Any:
    """A config as it comes back from JSON: paths as text, tuples as lists."""
    return json.loads(json.dumps(value, default=str))


def write_run(path: Path, config: Any, **derived: Any) -> None:
    """run.json: what was asked for, on what, with which versions, and what was worked out from it."""
    run = {
        "config": plain(asdict(config)),
        "command": called(),
        "histossl": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in ("torch", "torchvision", "timm", "openslide-python", "tifffile")},
        **plain(derived),
    }
    run = names_above(path).hidden(run)
    with written_aside(path) as aside:
        aside.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def note_command(path: Path) -> None:
    """Add this process's command to those that `path` remembers, for the page's "To reproduce"."""
    before, names = noted_commands(path), names_above(path)
    now = names.command(called())
    names.write()
    if now not in before:
        with written_aside(path) as aside:
            aside.write_text(json.dumps([*before, now], indent=1) + "\n", encoding="utf-8")


def commands_with(before: Mapping[str, Any]) -> list[list[str]]:
    """The commands of an earlier run.json and this one."""
    earlier = before.get("commands") or [before["command"]] if before else []
    return [*[one for one in earlier if one != called()], called()]


def called() -> list[str]:
    """This process's command as it can be given elsewhere: with the workspace that the environment named."""
    given = any(word == "-w" or word.startswith(("-w=", "--workspace")) for word in sys.argv)
    named = "" if sys.argv[1:2] == ["demo"] else os.environ.get(VARIABLE, "")  # which has a workspace of its own
    return [*sys.argv, "-w", named] if named and not given else list(sys.argv)


def noted_commands(path: Path) -> list[list[str]]:
    """Empty where none was noted; the file is a convenience, so what cannot be read is begun anew."""
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [[str(word) for word in one] for one in noted] if isinstance(noted, list) else []


def read_run(path: Path, with_names: bool = True) -> dict[str, Any]:
    """run.json; of an anonymous workspace with the paths that were given, unless for a page that lies in it."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MismatchError(
            f"{path}: not readable as JSON ({error}); move the directory aside, or use another --name"
        ) from error
    if not isinstance(run, dict) or not isinstance(run.get("config"), dict):
        raise MismatchError(f"{path}: holds no 'config'; move the directory aside, or use another --name")
    return dict(names_above(path).revealed(run)) if with_names else run


def refuse_other_config(path: Path, config: Any, may_change: Iterable[str] = ()) -> None:
    """The directory of `path` (a run.json) belongs to `config`, or an error lists the fields that differ."""
    if not path.exists():
        return
    before: Mapping[str, Any] = read_run(path)["config"]
    now = plain(asdict(config))
    free = set(may_change)
    differ = [
        _difference(field.name, before.get(field.name), now[field.name])
        for field in fields(config)
        if field.name not in free and before.get(field.name, _default_of(field)) != now[field.name]
    ]
    if differ:
        raise MismatchError(
            f"{path.parent} was made with other settings: {'; '.join(differ)}. "
            "Use the same settings to go on, or another --name"
        )


def _default_of(field: Field[Any]) -> object:
    """What a run had that was begun before the knob was there."""
    return None if field.default is MISSING else plain(field.default)


def _difference(name: str, before: object, now: object) -> str:
    """Of long lists, which may be hundreds of slides, what came and what went."""
    said = f"{name} was {_short(name, before)}, now {_short(name, now)}"
    if isinstance(before, list) and isinstance(now, list) and max(len(before), len(now)) > SHORT_LIST:
        came, went = ([one for one in these if one not in those] for these, those in ((now, before), (before, now)))
        parts = [f"{what}: {_some(names)}" for what, names in (("new", came), ("gone", went)) if names]
        said += f" ({'; '.join(parts) or 'in another order'})"
    return f"{said}, {FROM[name]}" if name in FROM else said


def _some(names: Sequence[object], at_most: int = 5) -> str:
    more = f" and {len(names) - at_most:,} more" if len(names) > at_most else ""
    return ", ".join(str(name) for name in names[:at_most]) + more


def _short(name: str, value: object) -> str:
    """A long list by its length: the slides left out of a run may be hundreds."""
    if name in WORKED_OUT and value in (0, -1, "", []):
        return "worked out"
    return f"{len(value)} entries" if isinstance(value, list) and len(value) > SHORT_LIST else repr(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
