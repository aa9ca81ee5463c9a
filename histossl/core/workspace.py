"""Where things lie on disk. Nobody else joins path strings.

WORKSPACE/
    archive.csv                 the ledger: one row per file of the archive
    checksums.csv               of the archive's files, by `histossl scan --verify`
    anonymous.json              where its names are, if it is anonymous
    tile-commands.json          how `histossl tile` was called, for the report
    tiles/                      one zip per slide, and index.npy
    pretrain/NAME/              run.json, log.jsonl, checkpoint.pt, backbone.safetensors, backbone.json
    embeddings/BACKBONE/        one HDF5 file per slide
    finetune/NAME/              points.csv, summary.csv, predictions.csv, curve.png, model/, report.html
    predictions/NAME/           predictions.csv, heatmaps/
    curation/BACKBONE/          features of all tiles in one file, shared by the subsets made with them
    subsets/NAME/               run.json, ledger.json, sheet.html, tiles.npy: tile numbers, sorted
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from histossl.core.errors import HistosslError, UsageError

DEFAULT = "histossl-workspace"
VARIABLE = "HISTOSSL_WORKSPACE"
LONGEST_NAME = 200  # bytes of it in the name of the file that is written aside: file systems allow 255 in all
LONGEST_STEM = 247  # bytes of a slide's name in the name of a file of its own, with room for ".geojson"
LONGEST_FOLDER = 255
LONGEST_PATH = 2000  # bytes of a slide's id with its folders: a path may have 4,095 in all
DIGEST_LENGTH = 16


@dataclass(frozen=True)
class PretrainDir:
    root: Path

    @property
    def run_json(self) -> Path:
        return self.root / "run.json"

    @property
    def log(self) -> Path:
        return self.root / "log.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint.pt"

    @property
    def previous_checkpoint(self) -> Path:
        return self.root / "checkpoint.previous.pt"

    @property
    def damaged_checkpoint(self) -> Path:
        return self.root / "checkpoint.damaged.pt"

    @property
    def backbone(self) -> Path:
        """Its presence means that the run is finished."""
        return self.root / "backbone.safetensors"

    @property
    def head(self) -> Path:
        """What of a method's heads is of use after the run; with the backbone or absent."""
        return self.root / "head.safetensors"

    @property
    def model(self) -> Path:
        """A student's model folder, for `histossl predict`."""
        return self.root / "model"

    @property
    def healthy_backbone(self) -> Path:
        """As of the last look that found nothing wrong: what is left when a run collapses."""
        return self.root / "healthy" / "backbone.safetensors"

    @property
    def best_backbone(self) -> Path:
        """The best by the probe on the training slides, kept beside the last."""
        return self.root / "best" / "backbone.safetensors"


@dataclass(frozen=True)
class FinetuneDir:
    root: Path

    @property
    def run_json(self) -> Path:
        return self.root / "run.json"

    @property
    def splits(self) -> Path:
        return self.root / "splits.json"

    @property
    def points(self) -> Path:
        return self.root / "points.csv"

    @property
    def summary(self) -> Path:
        return self.root / "summary.csv"

    def journal(self, start: str) -> Path:
        """What a start has predicted so far, appended piece by piece; predictions.csv is made from it."""
        return self.root / "journal" / f"{_safe(start)}.jsonl"

    @property
    def predictions(self) -> Path:
        return self.root / "predictions.csv"

    @property
    def curve_png(self) -> Path:
        return self.root / "curve.png"

    @property
    def curve_svg(self) -> Path:
        return self.root / "curve.svg"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def report(self) -> Path:
        return self.root / "report.html"


@dataclass(frozen=True)
class PredictionDir:
    """What a saved model said of slides."""

    root: Path

    @property
    def run_json(self) -> Path:
        return self.root / "run.json"

    @property
    def table(self) -> Path:
        return self.root / "predictions.csv"

    def heatmap(self, slide: str) -> Path:
        return self.root / "heatmaps" / f"{file_stem(slide)}.png"

    def qupath(self, slide: str) -> Path:
        return self.root / "heatmaps" / f"{file_stem(slide)}.geojson"


@dataclass(frozen=True)
class SubsetDir:
    """A named part of the tiles."""

    root: Path

    @property
    def run_json(self) -> Path:
        return self.root / "run.json"

    @property
    def ledger(self) -> Path:
        """What was embedded, dropped, grouped and kept."""
        return self.root / "ledger.json"

    @property
    def sheet(self) -> Path:
        return self.root / "sheet.html"

    @property
    def copies(self) -> Path:
        """Which tile stands for which: kept until the subset is finished, so that a killed run goes on from here."""
        return self.root / "copies.npz"

    @property
    def tiles(self) -> Path:
        """Its presence means that the subset is finished."""
        return self.root / "tiles.npy"


@dataclass(frozen=True)
class Workspace:
    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))  # in a notebook people write "my-workspace"

    @classmethod
    def at(cls, given: Path | None) -> Workspace:
        """--workspace, or $HISTOSSL_WORKSPACE, or ./histossl-workspace."""
        return cls(Path(given or os.environ.get(VARIABLE) or DEFAULT))

    @classmethod
    def holding(cls, index: Path) -> Workspace:
        """The workspace whose `index` this is."""
        return cls(index.parents[1])

    @property
    def archive_csv(self) -> Path:
        return self.root / "archive.csv"

    @property
    def checksums(self) -> Path:
        """Of the archive's files, as they were when `scan --verify` read them."""
        return self.root / "checksums.csv"

    @property
    def tile_commands(self) -> Path:
        return self.root / "tile-commands.json"

    @property
    def contact_sheet(self) -> Path:
        return self.root / "contact-sheet.html"

    @property
    def tiles(self) -> Path:
        return self.root / "tiles"

    @property
    def index(self) -> Path:
        return self.tiles / "index.npy"

    @property
    def pretrain_root(self) -> Path:
        return self.root / "pretrain"

    @property
    def finetune_root(self) -> Path:
        return self.root / "finetune"

    def zip_of(self, slide: str) -> Path:
        return self.tiles / f"{file_stem(slide)}.zip"

    def pretrain(self, name: str) -> PretrainDir:
        return PretrainDir(self.pretrain_root / _safe(name))

    def finetune(self, name: str) -> FinetuneDir:
        return FinetuneDir(self.finetune_root / _safe(name))

    def embeddings(self, backbone: str) -> Path:
        return self.root / "embeddings" / _safe(backbone)

    @property
    def subsets_root(self) -> Path:
        return self.root / "subsets"

    def subset(self, name: str) -> SubsetDir:
        return SubsetDir(self.subsets_root / _safe(name))

    def features(self, backbone: str, tiles_digest: str) -> Path:
        """One row per tile of the index. The name says of which weights and which tiles."""
        return self.root / "curation" / _safe(backbone) / f"features-{tiles_digest[:16]}.npy"

    def predictions(self, name: str) -> PredictionDir:
        return PredictionDir(self.root / "predictions" / _safe(name))

    @property
    def suggestions(self) -> Path:
        """Which slides to label next."""
        return self.root / "suggestions.csv"

    def make(self, remedy: str = f"pass --workspace DIR, or set ${VARIABLE}") -> Workspace:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            in_the_way = isinstance(error, (FileExistsError, NotADirectoryError))  # a file: that is no workspace's name
            raise (UsageError if in_the_way else HistosslError)(
                f"workspace {self.root}: cannot be made ({error.strerror}); {remedy}"
            ) from error
        return self


def file_stem(slide: str) -> str:
    """A slide's id as the files made of it are named, without suffix: the id itself, unless a disk allows no such name.

    What is too long for a name of its own ends in a digest of the whole id. Bytes count, not letters.
    """
    *folders, name = slide.split("/")
    too_long = [len(os.fsencode(one)) > LONGEST_FOLDER for one in folders]
    if len(os.fsencode(name)) <= LONGEST_STEM and not any(too_long) and len(os.fsencode(slide)) <= LONGEST_PATH:
        return slide
    digest = hashlib.sha256(slide.encode("utf-8", "surrogateescape")).hexdigest()[:DIGEST_LENGTH]
    start = os.fsencode(name)[: LONGEST_NAME - len(digest) - 1].decode(errors="ignore")
    short = f"{start}~{digest}"
    kept = "" if any(too_long) or len(os.fsencode(slide)) > LONGEST_PATH else "".join(f"{one}/" for one in folders)
    return kept + short


def _safe(name: str) -> str:
    if not name.isprintable() or not name or name.startswith(".") or "/" in name or "\\" in name:
        raise UsageError(
            f"run name {name!r}: must be one plain directory name, without /, a leading dot or control characters"
        )
    return name


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Write to a neighbour, flush it to disk, rename over `path`: the file is whole or absent, whatever kills us.

    Yields the path to write to. On an error the half-written neighbour is removed and `path` is untouched.
    """
    name = os.fsencode(path.name)[:LONGEST_NAME].decode(errors="ignore")
    aside = path.with_name(f".{name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise HistosslError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):  # of a read-only disk, say: what went wrong there is told already
            aside.unlink(missing_ok=True)


def locked(descriptor: int, shared: bool = False) -> bool:
    """Whether this process now holds the lock of an open file, until it closes it or ends; `shared`: with others."""
    try:
        import fcntl
    except ImportError:
        return True  # not on this system: nobody is kept out
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)  # else a file system without locks
    return True
