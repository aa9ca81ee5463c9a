"""Every stage's knobs as frozen dataclasses, and how a run remembers them in run.json.

A config refuses what no run could use (UsageError, exit 2) when it is made, before any work starts.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from histossl import __version__
from histossl.core.anonymous import names_above
from histossl.core.errors import MismatchError, UsageError
from histossl.core.options import (
    REQUIRED,
    Check,
    Checked,
    above,
    between,
    nearest,
    numbers,
    one_of,
    option,
    option_of,
    read_list,
    show_list,
)
from histossl.core.text_files import read_text
from histossl.core.workspace import VARIABLE, written_aside

# ---- refusing


def require(holds: bool, option: str, value: object, wanted: str) -> None:
    """One wording for a setting that cannot be used."""
    if not holds:
        raise UsageError(f"--{option} {value}: must be {wanted}")


# ---- scan and tile

GRIDS = ("auto", "native", "physical")
JPEG_QUALITY = 90  # of tiles that are encoded again
TILE_PX, MPP = 256, 0.5
MOST_SCALES = 16
SLIDE_MPP = between(0.05, 5, "microns per pixel between 0.05 and 5 (0.25 is a 40x scan, 0.5 a 20x scan)")
TILE_SIDE = between(16, 4096, "a side of 16 to 4096 pixels")
TILE_MPP = between(0.05, 100, "microns per pixel between 0.05 and 100 (0.5 is a 20x scan)")
LENGTH_UM = between(0, 1e6, "a length in microns, 0 to 1000000")
SHARE = between(0, 1, "a share between 0 and 1")
SHARE_OFF = between(0, 1, "a share between 0 and 1 (off)")
SLIDES_HELP = "Folder with the slides (searched through all its subfolders)."
SLIDE_MPP_HELP = "Microns per pixel of all slides here, over what they say; those that say otherwise get a warning."
MPP_CSV_HELP = "The same slide by slide: columns slide,mpp."
ANONYMIZE_HELP = (
    "Make a new workspace anonymous: slides, files, folders and patients have pseudonyms (keyed hashes) in all that is "
    "written below it. The names are in one private file next to it, see --names."
)
NAMES_HELP = (
    "Of an anonymous workspace: the private file that says whose its pseudonyms are. Default: where it was last, at "
    "first WORKSPACE-names.csv next to the workspace."
)
FILTERS = "Filters"  # a panel of help
read_scales = numbers(float, "a number of microns per pixel, or several, finest first, as 0.5,1,2")


def check_scales(mpps: tuple[float, ...]) -> None:
    """UsageError unless these are the scales of a store: each possible, finest first, not too many."""
    for mpp in mpps:
        require(TILE_MPP.holds(mpp), "mpp", mpp, TILE_MPP.words)
    given = show_list(mpps)
    rising = all(finer < coarser for finer, coarser in itertools.pairwise(mpps))
    require(bool(mpps) and rising, "mpp", given, "different scales, finest first (0.5,1,2)")
    require(len(mpps) <= MOST_SCALES, "mpp", given, f"{MOST_SCALES} scales at most")


@dataclass(frozen=True)
class TissueConfig(Checked):
    """What counts as tissue, and which tiles are too poor to train on. 0 (or 1 for a `max_`) turns a filter off."""

    min_tissue: float = option(0.5, "Share of a tile that must be tissue.", FILTERS, check=SHARE)
    tissue_um: float = option(
        8.0,
        "Microns per pixel of the thumbnail on which tissue is sought; finer on small slides.",
        FILTERS,
        check=between(0.5, 100, "0.5 to 100 microns per thumbnail pixel"),
    )
    tissue_threshold: float = option(
        0.0,
        "Optical density that divides tissue from glass. 0: found by Otsu's method, within sane bounds.",
        FILTERS,
        check=between(0, 2, "an optical density, 0 to 2"),
    )
    min_speck_um: float = option(100.0, "Tissue smaller than a square of this side is dust.", FILTERS, check=LENGTH_UM)
    max_hole_um: float = option(
        150.0,
        "A hole smaller than a square of this side (a gland's lumen, fat) belongs to the tissue.",
        FILTERS,
        check=LENGTH_UM,
    )
    reject_pen: bool = option(
        True,
        "Count pen ink, dirt and the edges of cover slips, grey or coloured, as no tissue. What ink a tile may hold "
        "next to enough tissue is --max-ink.",
    )
    min_sharpness: float = option(
        0.15,
        "Tiles less sharp are out of focus: share of contrast in detail of 3-7 px; in focus 0.3 and more, 3 px blurred "
        "0.12. 0: off.",
        FILTERS,
        check=between(0, 1, "between 0 (off) and 1"),
    )
    max_fold: float = option(0.5, "Share of a tile that may be folded tissue.", FILTERS, check=SHARE_OFF)
    max_ink: float = option(
        0.01,
        "Share of a tile that pen ink may cover, by the thumbnail and, where a tile is decoded, by its own pixels, "
        "which show thin strokes. Copied tiles are decoded for it on slides whose thumbnail has ink. 1, or "
        "--no-reject-pen: off.",
        FILTERS,
        check=SHARE_OFF,
    )
    min_saturation: float = option(
        0.02,
        "Mean colour saturation that a tile must have (0 grey, 1 pure colour). 0: off.",
        FILTERS,
        check=between(0, 1, "between 0 (off) and 1"),
    )


GRID_HELP = (
    "physical: exactly --tile-px at --mpp. native: the slide's own JPEG tiles, copied, where their scale is within 5 % "
    "of --mpp. auto: copied where they also have --tile-px; else physical, but at the slide's own scale where that is "
    "within 0.5 % of --mpp."
)


@dataclass(frozen=True)
class ScanConfig(Checked):
    """How an archive is looked through: where scale comes from, how long one file may take, what tiling would do."""

    tile_px: int = option(TILE_PX, "Side in pixels of the tiles to expect.", check=TILE_SIDE)
    mpp: float = MPP
    coarser_mpp: tuple[float, ...] = ()  # further scales
    slide_mpp: float | None = option(None, SLIDE_MPP_HELP, check=SLIDE_MPP)
    mpp_csv: str | None = option(None, MPP_CSV_HELP, metavar="FILE.csv")
    time_limit_s: float = option(
        120.0,
        "Seconds that the whole check of one file may take (opening, thumbnail, tissue, sample tiles); then it is "
        "stopped, and its row says unreadable.",
        flag="--time-limit",
        check=between(1e-3, 1e6, "seconds, more than 0 and at most 1000000"),
    )
    jpeg_quality: int = option(JPEG_QUALITY, "JPEG quality (1-100) of the tiles to expect.", check=between(1, 100))
    grid: str = option("auto", GRID_HELP, metavar="|".join(GRIDS), check=one_of(*GRIDS))
    tissue: TissueConfig = field(default_factory=TissueConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "coarser_mpp", tuple(self.coarser_mpp))
        super().__post_init__()
        check_scales(self.mpps)

    @property
    def mpps(self) -> tuple[float, ...]:
        return (self.mpp, *self.coarser_mpp)


@dataclass(frozen=True)
class TileConfig(Checked):
    """How slides become tiles. Only physical scale decides: a tile is `tile_px` wide at `mpp` microns per pixel.

    One store holds tiles of one config. What belongs to a slide (its scale, say) is kept with the slide instead.
    """

    tile_px: int = option(TILE_PX, "Side of a tile in pixels.", check=TILE_SIDE)
    mpp: float = MPP  # of the finest tiles
    coarser_mpp: tuple[float, ...] = ()  # further scales, each with its own grid
    grid: str = option("auto", GRID_HELP, metavar="|".join(GRIDS), check=one_of(*GRIDS))
    jpeg_quality: int = option(
        JPEG_QUALITY,
        "Of tiles that are encoded again, 1-100. Their colour is kept at half the resolution (4:2:0), as most scanners "
        "do, also where the slide's is not.",
        check=between(1, 100),
    )
    anonymize: bool = option(False, ANONYMIZE_HELP)
    tissue: TissueConfig = field(default_factory=TissueConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "coarser_mpp", tuple(self.coarser_mpp))
        super().__post_init__()
        check_scales(self.mpps)

    @property
    def mpps(self) -> tuple[float, ...]:
        return (self.mpp, *self.coarser_mpp)


# ---- pretrain

OPTIMIZERS = ("sgd", "adamw", "lars")


DATA, METHOD, LENGTH, MACHINE, WATCHING = "Data", "Method", "Length and batch", "Machine", "Watching"  # panels of help
METHODS = "the method's own (histossl methods NAME)"
SEED = between(0, 2**32 - 1, f"a whole number from 0 to {2**32 - 1}")
MOST = 1e38  # what float32 holds


def read_batch_size(text: str) -> int:
    """'auto' is 0: worked out from the tiles and the GPU's memory."""
    if text == "auto":
        return 0
    if not text.isdecimal() or not int(text):
        raise ValueError(BATCH_SIZE.words)
    return int(text)


def show_batch_size(value: int) -> str:
    return str(value) if value else "auto"


BATCH_SIZE = Check(lambda value: value == 0 or 2 <= value <= 10**6, "auto, or 2 or more tiles, at most 1000000")


@dataclass(frozen=True)
class PretrainConfig(Checked):
    """What defines a pretraining run: change any of it and it is another run."""

    backbone: str = option("resnet50", "Any timm model.")
    weights: str = option("imagenet", "Where to start: imagenet (timm's cache or the hub), random, or a weights file.")
    subset: str = option("", "Only the tiles of this subset; `histossl curate` makes them.", DATA, metavar="NAME")
    slide_balance: float = option(
        0.0,
        "0: every tile equally often; 1: every slide.",
        DATA,
        check=between(0, 1, "0 (every tile equally often) to 1 (every slide)"),
    )
    method: str = option("mocov2", "What the backbone is trained on; see `histossl methods`.", METHOD)
    recipe: str = option("", "Augmentation recipe; see `histossl views`.", METHOD, unset="the method's, for tissue")
    view_px: int = option(
        224, "Side of the views in pixels.", METHOD, check=between(16, 1024, "a side of 16 to 1024 pixels")
    )
    set: tuple[str, ...] = option((), "A setting of the method; repeat as needed.", METHOD, metavar="KEY=VALUE")
    view_set: tuple[str, ...] = option(
        (),
        "A setting of every view, over the recipe's: jpeg_p=0.5, rotation_deg=20, scale=0.4,1.",
        METHOD,
        metavar="KEY=VALUE",
    )
    optimizer: str = option(
        "",
        "sgd, adamw or lars.",
        METHOD,
        check=one_of(*OPTIMIZERS),
        unset="the method's; mostly sgd with BatchNorm, else adamw",
    )
    lr: float = option(
        0.0, "Peak learning rate.", METHOD, check=above(0, most=MOST), unset="worked out from the batch size"
    )
    weight_decay: float = option(-1.0, "Weight decay.", METHOD, check=between(0, MOST, "0 or more"), unset=METHODS)
    layer_decay: float = option(
        0.0,
        "Factor on the learning rate from block to block.",
        METHOD,
        check=above(0, "above 0 and at most 1 (1: none)", most=1),
        unset="the method's with adamw, else 1",
    )
    warmup: float = option(
        -1.0,
        "Share of the steps in which the learning rate rises.",
        METHOD,
        check=Check(lambda value: 0 <= value < 1, "a share of the steps, 0 to 1"),
        unset=METHODS,
    )
    final_lr: float = option(
        -1.0,
        "Share of the peak learning rate at the last step.",
        METHOD,
        check=between(0, 1, "a share of --lr, 0 to 1"),
        unset=METHODS,
    )
    clip_norm: float = option(
        3.0,
        "Gradients longer than this are shortened to it.",
        METHOD,
        check=above(0, "more than 0, and finite (1e9 shortens nothing)", most=MOST),
    )
    seed: int = option(0, "Of tile order, views and heads.", METHOD, check=SEED)
    steps: int = option(
        0,
        "Length in optimizer steps.",
        LENGTH,
        check=between(1, 10**9, "1 or more, at most 1000000000"),
        unset="worked out from the number of tiles",
    )
    epochs: float = option(
        0.0,
        "Length in passes over the tiles, instead of --steps.",
        LENGTH,
        check=above(0, "a number above 0, at most 1000000", most=1e6),
        unset="",
    )
    hours: float = option(
        0.0,
        "Length in hours, instead of --steps.",
        LENGTH,
        check=above(0, "a number above 0, at most 100000", most=1e5),
        unset="",
    )
    batch_size: int = option(
        256,
        "Tiles per optimizer step, over all GPUs and micro-batches. auto: by tiles and GPU memory.",
        LENGTH,
        metavar="N|auto",
        read=read_batch_size,
        show=show_batch_size,
        check=BATCH_SIZE,
    )
    excluded_slides: tuple[str, ...] = ()  # by test patients of --labels, and --exclude

    def __post_init__(self) -> None:
        object.__setattr__(self, "set", tuple(self.set))
        object.__setattr__(self, "view_set", tuple(self.view_set or ()))
        object.__setattr__(self, "excluded_slides", tuple(sorted(self.excluded_slides)))
        super().__post_init__()
        given = [name for name in ("steps", "epochs", "hours") if getattr(self, name)]
        if len(given) > 1:
            raise UsageError(f"--{' and --'.join(given)}: give only one of them; each sets the length")


SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
STEPS = between(1, 10**9, "1 or more steps, at most 1000000000")


def read_interval(text: str) -> tuple[float, int]:
    """'10m', '1h', '90s' or a number of steps -> (seconds, steps), the one that is not meant being inf or 0."""
    match = re.fullmatch(r"(\d{1,9})\s*([smh]?)", text.strip())
    if not match or int(match[1]) == 0:
        raise ValueError("like 10m, 1h, 90s, or a number of steps")
    number, unit = int(match[1]), match[2]
    return (number * SECONDS[unit], 0) if unit else (math.inf, number)


def _is_interval(text: str) -> bool:
    try:
        read_interval(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class RuntimeConfig(Checked):
    """None of it changes what is learned; all of it may change when a run goes on."""

    num_workers: int = option(
        -1,
        "Threads that read and decode tiles, per GPU. 0: none.",
        MACHINE,
        flag="--workers",
        check=between(0, 1024, "0 to 1024"),
        unset="all cores but one, shared among the processes",
    )
    precision: str = option(
        "auto",
        "auto: bf16 or fp16 on a GPU, fp32 on a CPU.",
        MACHINE,
        metavar="auto|fp32|bf16|fp16",
        check=one_of("auto", "fp32", "bf16", "fp16"),
    )
    micro_batches: int = option(
        0,
        "Micro-batches per step.",
        MACHINE,
        flag="--accumulate",
        check=between(1, 10**6, "1 or more micro-batches, at most 1000000"),
        unset="as few as GPU memory allows",
    )
    decode_on_gpu: bool = option(False, "Decode tiles on the GPU; `histossl bench views` says when it pays.", MACHINE)
    compiled: bool = option(False, "Compile the networks: minutes at first, faster after.", MACHINE, flag="--compile")
    recompute: bool = option(
        False,
        "Norms and GELU of a ViT twice, for less memory. By itself where a pass would not fit.",
        MACHINE,
    )
    deterministic: bool = option(False, "The same bits every time; slower on GPUs.", MACHINE)
    checkpoint_every: str = option(
        "10m",
        "Minutes (10m), hours (1h), seconds (90s), or steps (500).",
        WATCHING,
        check=Check(_is_interval, "like 10m, 1h, 90s, or a number of steps"),
    )
    log_every: int = option(10, "Steps between two lines of log.jsonl.", WATCHING, check=STEPS)
    monitor_every: int = option(100, "Steps between two checks of the features.", WATCHING, check=STEPS)
    stop_on_collapse: bool = option(
        True, "Stop when the features collapse, keeping the last healthy backbone.", WATCHING
    )

    @property
    def checkpoint_every_s(self) -> float:
        return read_interval(self.checkpoint_every)[0]

    @property
    def checkpoint_every_steps(self) -> int:
        """0: by time alone."""
        return read_interval(self.checkpoint_every)[1]


ALLOW_MISSING_HELP = "Go on though test slides of --labels are not in the workspace. Misspelt ones would be trained on."


@dataclass(frozen=True)
class PretrainData(Checked):
    """What a run is trained on, and what judges it."""

    slides: Path | None = option(None, SLIDES_HELP, metavar="DIR")
    labels: Path | None = option(
        None,
        "labels.csv: patients marked `test` are left out, and the rest judge the run as it goes.",
        metavar="FILE.csv",
    )
    name: str = option("", "Name of the run: its directory under WORKSPACE/pretrain.", unset="the method")
    allow_missing_test_slides: bool = option(False, ALLOW_MISSING_HELP, DATA)
    exclude: Path | None = option(None, "Slides to leave out: one name a line.", DATA, metavar="FILE")
    tile_px: int | None = option(
        None, "Side of the tiles in pixels. Default: as tiled, else 256.", DATA, check=TILE_SIDE
    )
    mpp: float | None = option(
        None, "Microns per pixel of the tiles. Default: as tiled, else 0.5.", DATA, check=TILE_MPP
    )
    slide_mpp: float | None = option(None, SLIDE_MPP_HELP, DATA, check=SLIDE_MPP)
    mpp_csv: Path | None = option(None, MPP_CSV_HELP, DATA, metavar="FILE.csv")
    anonymize: bool = option(False, ANONYMIZE_HELP, DATA)
    names: Path | None = option(None, NAMES_HELP, DATA, metavar="FILE.csv")


@dataclass(frozen=True)
class LaunchConfig(Checked):
    """How many processes carry out a run, and how often one that dies is replaced."""

    gpus: str = option("auto", "auto, or how many; on a machine without GPUs that many CPU processes.", MACHINE)
    max_restarts: int = option(
        3, "How often a dead GPU process is replaced.", MACHINE, check=between(0, 10**6, "0 to 1000000")
    )


@dataclass(frozen=True)
class DistillConfig(PretrainConfig):
    """What defines a distillation: a pretraining run with a teacher. `backbone` and `weights` are the student's."""

    method: str = "distillation"
    teacher: str = ""  # digest of the model that teaches, wherever it lies


# ---- curate

NEIGHBOURS = 4  # per query tile, where no number of tiles is asked for: DINOv2's (Oquab et al. 2023, section 3)


@dataclass(frozen=True)
class CurateConfig(Checked):
    """What defines a curated subset."""

    tiles: int = option(
        0,
        "Keep so many, balanced over kinds of tissue.",
        check=between(1, 10**12, "1 or more"),
        unset="all but copies",
    )
    duplicate_cosine: float = option(
        0.9,
        "Tiles with a higher cosine similarity are copies; the sheet shows pairs. 1: keep copies.",
        check=above(0, "above 0 and at most 1 (1: keep copies)", most=1),
    )
    like_slides: tuple[str, ...] = option(
        (),
        "Retrieve the tiles most like those of these slides, from the others; with --labels from slides without a "
        "label. Their own tiles are kept too.",
        metavar="A,B,...",
        read=read_list,
        show=show_list,
    )
    like_classes: tuple[str, ...] = option(
        (),
        "Retrieve the tiles most like those of the training slides of these classes, from slides without a label; "
        "needs --labels. Their own tiles are kept too.",
        metavar="A,B,...",
        read=read_list,
        show=show_list,
    )
    clusters: tuple[int, ...] = option(
        (),
        "Clusters of each level, finest first.",
        metavar="N,N,...",
        read=numbers(int, "whole numbers, finest first, like 1000,100,10"),
        show=show_list,
        unset="4 times the root of the tiles, then quarters of it",
    )
    seed: int = option(0, "Of clusters and of chance.", check=SEED)
    queries: tuple[str, ...] = ()  # the slides that like_slides and like_classes stand for
    labelled_slides: tuple[str, ...] = ()  # where labels are given: nothing is retrieved from these
    embedder: str = ""  # name, digest and input size of the backbone
    excluded_slides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("clusters", "like_slides", "like_classes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("queries", "labelled_slides", "excluded_slides"):
            object.__setattr__(self, name, tuple(sorted(getattr(self, name))))
        super().__post_init__()
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
class EmbedConfig(Checked):
    """How tiles go through a backbone. None of it changes what a run is; 0 means 'work it out'."""

    batch_size: int = option(
        0,
        "Tiles per forward pass.",
        MACHINE,
        flag="--embed-batch-size",
        check=between(1, 10**6, "1 or more tiles"),
        unset="256 on a GPU, 64 without",
    )
    num_workers: int = option(
        0,
        "Threads that read and decode tiles.",
        MACHINE,
        flag="--workers",
        check=between(1, 1024, "1 to 1024"),
        unset="2",
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N.", MACHINE)


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
            require(1 <= getattr(self, name) <= 10**9, f"tune {name}", getattr(self, name), "1 or more")
        require(0 < self.lr < math.inf, "tune lr", self.lr, "more than 0")
        require(0 < self.layer_decay <= 1, "tune layer_decay", self.layer_decay, "between 0 and 1 (1: none)")
        require(0 <= self.weight_decay < math.inf, "tune weight_decay", self.weight_decay, "0 or more")


STARTS, SPLITS, HEADS = "Starts", "Splits", "Heads"  # panels of help


def read_budgets(text: str) -> tuple[int | str, ...]:
    return tuple(int(piece) if piece.isdecimal() else piece for piece in read_list(text))


def _are_budgets(budgets: tuple[int | str, ...]) -> bool:
    return all(one == "all" or (isinstance(one, int) and 1 <= one <= 10**9) for one in budgets)


@dataclass(frozen=True)
class FinetuneConfig(Checked):
    """What defines a label-efficiency curve."""

    labels: str = option(
        REQUIRED,
        "Columns slide,label and, where known, patient, site, split (train or test); x,y,width,height (level-0 pixels) "
        "label regions instead of slides. Or a folder of QuPath GeoJSON files.",
        metavar="FILE.csv|DIR",
    )
    starts: tuple[str, ...] = option(
        (),
        "What to compare: random, imagenet, adapted, colour (27 colour statistics, no network), a pretraining run, "
        "FILE or NAME=FILE (a backbone.safetensors), NAME=RUN+RUN+... (pretraining seeds as one start). finetune adds "
        "colour to any: it is the floor of every curve.",
        metavar="A,B,...",
        read=read_list,
        show=show_list,
        unset="all of the first four that there are",
    )
    adapted: str = option(
        "",
        "The adapted start: a pretraining run, or a backbone.safetensors; several, separated by commas, are seeds of "
        "one start: its curve is their mean, its band holds their spread.",
        metavar="RUN|FILE,...",
        unset="the workspace's finished run",
    )
    budgets: tuple[int | str, ...] = option(
        (),
        "Labelled slides per class.",
        metavar="1,2,4,...,all",
        read=read_budgets,
        show=show_list,
        check=Check(_are_budgets, "numbers of labelled items per class, or all, like 1,2,4,8,all"),
        unset="doubling from 1 to what the smallest class has, and all",
    )
    backbone: str = option(
        "",
        "timm name of the random and imagenet starts.",
        STARTS,
        metavar="NAME",
        unset="that of the adapted backbone",
    )
    weights: str = option(
        "",
        "Weights of the imagenet start.",
        STARTS,
        metavar="FILE",
        unset="what the adapted backbone started from",
    )
    input_px: int = option(
        0,
        "Side at which tiles are shown to every start.",
        STARTS,
        check=between(16, 1024, "a side of 16 to 1024 pixels"),
        unset="the size that the adapted backbone was trained at",
    )
    head: str = option(
        "",
        "mean (pooled features, logistic regression), knn, simpleshot (nearest class mean) or abmil (gated attention "
        "over tiles).",
        HEADS,
        check=one_of("mean", "knn", "simpleshot", "abmil"),
        unset="mean, and abmil with --train last or all",
    )
    train: str = option(
        "head",
        "What is trained: head (on frozen features), last (with the last quarter of the backbone's blocks) or all (the "
        "whole backbone). The latter two take a GPU, or patience.",
        HEADS,
        check=one_of("head", "last", "all"),
    )
    tune: TuneConfig = field(default_factory=TuneConfig)
    unit: str = option(
        "",
        "What carries a label and is counted in budgets: slide, region or tile. tile: each tile of a labelled slide or "
        "region by itself.",
        SPLITS,
        check=one_of("slide", "region", "tile"),
        unset="what the labels are of",
    )
    regions: str = option(
        "",
        "The labels are the annotations in this folder (QuPath GeoJSON); --labels gives patient, site, split.",
        SPLITS,
        metavar="DIR",
    )
    tiles_per_slide: int = option(
        100,
        "With --unit tile: at most so many tiles of one slide and label.",
        SPLITS,
        check=between(1, 10**9, "1 or more"),
    )
    draws: int = option(10, "Random choices of the labelled slides at each budget.", SPLITS, check=between(1, 1000))
    folds: int = option(
        0,
        "Folds by patient where the labels have no split column.",
        SPLITS,
        check=between(2, 10**6, "2 or more"),
        unset="up to 5, as patients allow",
    )
    group: str = option(
        "patient",
        "What must not be parted between training and test: patient or site.",
        SPLITS,
        check=one_of("patient", "site"),
    )
    classes: tuple[str, ...] = option(
        (), "Only these labels.", SPLITS, metavar="A,B,...", read=read_list, show=show_list, unset="all"
    )
    mixed_patients: bool = option(False, "Allow patients with slides of several classes.", SPLITS)
    seed: int = option(0, "Of the splits, draws and heads.", SPLITS, check=SEED)

    def __post_init__(self) -> None:
        for name in ("starts", "budgets", "classes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.head:
            object.__setattr__(self, "head", "mean" if self.train == "head" else "abmil")
        super().__post_init__()
        end_to_end = f"abmil with --train {self.train}: only the attention head learns together with a backbone"
        require(self.train == "head" or self.head == "abmil", "head", self.head, end_to_end)
        twice = [name for name in self.starts if self.starts.count(name) > 1]
        require(not twice, "starts", ",".join(self.starts), "different starts")


# ---- demo


@dataclass(frozen=True)
class DemoConfig(Checked):
    slides: int = option(
        36, "How many slides: two a patient, three classes in turn.", check=between(1, 100_000, "1 to 100000")
    )
    seed: int = option(0, "Of the slides, the training and the splits.", check=SEED)
    steps: int = option(800, "Pretraining steps.", check=between(1, 10**9, "1 or more"))
    weights: str = option(
        "random", "Where pretraining starts: random (no download), imagenet (timm's cache or hub), or a file."
    )


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
        value: Any = kind(float(text)) if kind is int and float(text).is_integer() else kind(text)  # type: ignore[call-arg]
    except ValueError as error:
        raise UsageError(f"--set {assignment}: must be {'a whole' if kind is int else 'a'} number") from error
    most = {int: 10**9, float: MOST}.get(kind)
    if most is not None and not abs(value) <= most:  # nan is never within anything
        raise UsageError(f"--set {assignment}: must be a finite number, at most {most:g}")
    return value


def read_toml(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """A `--config FILE.toml`: option names (dashes or underscores) with values. Unknown keys are refused."""
    try:
        values = tomllib.loads(read_text(path, f"--config {path}"))
    except tomllib.TOMLDecodeError as error:
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
        _difference(field, before.get(field.name), now[field.name])
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


def _difference(field: Field[Any], before: object, now: object) -> str:
    """Of long lists, which may be hundreds of slides, what came and what went."""
    name = field.name
    said = f"{name} was {_short(field, before)}, now {_short(field, now)}"
    if isinstance(before, list) and isinstance(now, list) and max(len(before), len(now)) > SHORT_LIST:
        came, went = ([one for one in these if one not in those] for these, those in ((now, before), (before, now)))
        parts = [f"{what}: {_some(names)}" for what, names in (("new", came), ("gone", went)) if names]
        said += f" ({'; '.join(parts) or 'in another order'})"
    return f"{said}, {FROM[name]}" if name in FROM else said


def _some(names: Sequence[object], at_most: int = 5) -> str:
    more = f" and {len(names) - at_most:,} more" if len(names) > at_most else ""
    return ", ".join(str(name) for name in names[:at_most]) + more


def _short(field: Field[Any], value: object) -> str:
    """A long list by its length: the slides left out of a run may be hundreds."""
    found = option_of(field)
    if found is not None and found.unset is not None and value == _default_of(field):
        return "worked out"
    if isinstance(value, list) and len(value) > SHORT_LIST:
        return f"{len(value)} entries"
    return repr(value) if found is None or found.show is str else found.show(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
