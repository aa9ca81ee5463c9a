"""The embedded default: paint a small archive and take it the whole road, so that a new install shows what it does.

    histossl demo                              everything, into ./histossl-demo
    histossl demo --only-paint my-archive      the slides and labels.csv alone

Each stage is the same plain function that its command calls, and prints that command. What a stage has finished is
never done twice, so the same command goes on after a kill. Every figure shown is computed here and now.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from histossl.core import console
from histossl.core.config import (
    DemoConfig,
    FinetuneConfig,
    PretrainConfig,
    ScanConfig,
    TileConfig,
    plain,
    read_run,
    require,
    write_run,
)
from histossl.core.errors import MismatchError, UsageError
from histossl.core.workspace import Workspace, written_aside
from histossl.demo.paint import CLASSES, paint_archive

SLIDES_PER_PATIENT = 2
SIDE_PX, SLIDE_MPP = 2048, 0.5  # of a painted slide
NAME = "demo"  # of the pretraining run and of the curve

# Small enough for two cores, large enough to learn from: a tile of 96 um holds about one gland.
TILE_PX, MPP, VIEW_PX = 96, 1.0, 64
BACKBONE = "test_resnet"  # timm's smallest ResNet, 0.4 million weights
BATCH_SIZE = 64
OPTIMIZER, LR = "adamw", 2e-3  # much for weights that already know something, right for random ones
QUEUE_SIZE = 6 * BATCH_SIZE  # the planned 8 batches are old before they leave, while random weights still run
DRAWS = 10


@dataclass(frozen=True)
class DemoDir:
    root: Path

    @property
    def run_json(self) -> Path:
        return self.root / "demo.json"

    @property
    def slides(self) -> Path:
        return self.root / "slides"

    @property
    def labels(self) -> Path:
        return self.slides / "labels.csv"

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.root / "workspace")


def run_demo(output: Path, config: DemoConfig = DemoConfig()) -> Path | int:
    """Paint, scan, tile, pretrain, finetune. The path of the report; the signal, if one stopped it on the way."""
    # These bring torch and scikit-learn, which painting alone does not need.
    from histossl.core.config import RuntimeConfig
    from histossl.evaluation.finetune import finetune
    from histossl.report.html import write_report
    from histossl.slides.scan import scan
    from histossl.tiles.store.index import TileIndex
    from histossl.tiles.tiling import tile_archive
    from histossl.training.pretrain import pretrain

    least = 2 * SLIDES_PER_PATIENT * len(CLASSES)
    wanted = f"{least} or more: {len(CLASSES)} classes, two patients each, {SLIDES_PER_PATIENT} slides a patient"
    require(config.slides >= least, "slides", config.slides, wanted)
    started_s = time.monotonic()
    at = DemoDir(output)
    workspace = at.workspace.make(remedy="pass --output DIR, a folder that can be written")
    _refuse_other_demo(at.run_json, config)
    write_run(at.run_json, config)
    where = f"-w {workspace.root}"
    grid = f"--tile-px {TILE_PX} --mpp {MPP:g}"

    # ---- an archive
    _heading(1, "paint", f"demo --only-paint {at.slides} --slides {config.slides} --seed {config.seed}")
    paint_into(at.slides, config.slides, config.seed)

    _heading(2, "scan", f"scan {at.slides} {grid} {where}")
    rows = scan(at.slides, workspace, ScanConfig(tile_px=TILE_PX, mpp=MPP)).rows
    statuses = sorted({row.status for row in rows})
    told = ", ".join(f"{sum(row.status == status for row in rows)} {status}" for status in statuses)
    console.say(f"{len(rows)} files: {told}; one row each in {workspace.archive_csv}")

    _heading(3, "tile", f"tile --slides {at.slides} {grid} {where}")
    tile_archive(at.slides, workspace, TileConfig(tile_px=TILE_PX, mpp=MPP))
    index = TileIndex.open(workspace)
    console.say(f"{len(index):,} tiles of {TILE_PX * MPP:g} um in {workspace.tiles}")

    # ---- without labels
    settings = pretraining(config, len(index))
    _heading(4, "pretrain", f"pretrain --name {NAME} {_options(settings)} {where}")
    if config.weights == "random":
        console.say(
            "The start is random weights, so that nothing is downloaded: the curve compares random with adapted. "
            "On your own slides the start is ImageNet weights unless you say otherwise (here too: --weights imagenet)."
        )
    trained = pretrain(index, workspace.pretrain(NAME), settings, RuntimeConfig(num_workers=1, checkpoint_every="30s"))
    console.say(*trained.text.split("\n"))
    if trained.stopped_by:
        return trained.stopped_by

    # ---- with labels
    _heading(5, "finetune", f"finetune --labels {at.labels} --name {NAME} --draws {DRAWS} --seed {config.seed} {where}")
    curve = finetune(workspace, NAME, FinetuneConfig(labels=str(at.labels), draws=DRAWS, seed=config.seed))
    report = write_report(curve.run, workspace).resolve()
    console.say(
        "",
        "The slides are painted: this shows that the full pipeline works here, and says nothing about your tissue.",
        f"{(time.monotonic() - started_s) / 60:.1f} minutes. The report: {report}",
    )
    return report


def pretraining(config: DemoConfig, num_tiles: int) -> PretrainConfig:
    """How the demo pretrains on its tiles of TILE_PX."""
    random = config.weights == "random"
    return PretrainConfig(
        backbone=BACKBONE,
        weights=config.weights,
        steps=config.steps,
        batch_size=BATCH_SIZE,
        view_px=VIEW_PX,
        optimizer=OPTIMIZER if random else "",
        lr=LR if random else 0.0,
        set=(f"queue_size={QUEUE_SIZE}",) if random and num_tiles > 4 * QUEUE_SIZE else (),
        seed=config.seed,
    )


def _heading(number: int, stage: str, command: str) -> None:
    console.say("", f"[{number}/5] {stage}: histossl {command}")


def _options(settings: PretrainConfig) -> str:
    """The options of `histossl pretrain` that give these settings: those that are not its defaults."""
    default = PretrainConfig()
    given = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value != getattr(default, field.name):
            given += [f"--{field.name.replace('_', '-')} {one}" for one in (value if field.name == "set" else [value])]
    return " ".join(given)


def _refuse_other_demo(path: Path, config: DemoConfig) -> None:
    if not path.exists():
        return
    before, now = read_run(path)["config"], plain(vars(config))
    differ = [
        f"--{name} was {before.get(name)}, now {value}" for name, value in now.items() if before.get(name) != value
    ]
    if differ:
        raise MismatchError(
            f"{path.parent} holds a demo made otherwise: {'; '.join(differ)}. "
            "Use the same options to go on, or another --output"
        )


# ---- painting, also alone


def paint_into(directory: Path, slides: int, seed: int) -> None:
    """Paint the demo's archive into `directory`, unless it is there whole; never over anything else."""
    require(slides >= 1, "slides", slides, "1 or more")
    require(seed >= 0, "seed", seed, "0 or more")
    settings = {"slides": slides, "seed": seed, "side_px": SIDE_PX, "mpp": SLIDE_MPP}
    claim = directory / "painted.json"
    if claim.exists():
        before = _read_claim(claim)
        differ = [
            f"{name} was {before.get(name)}, now {now}" for name, now in settings.items() if before.get(name) != now
        ]
        if differ:
            raise MismatchError(
                f"{directory} holds slides painted otherwise: {'; '.join(differ)}. Name another folder, or remove it"
            )
        if (directory / "labels.csv").exists():  # written last
            console.say(f"{directory}: painted before")
            return
    elif directory.is_dir() and any(directory.iterdir()):
        raise UsageError(f"{directory}: neither empty nor painted by histossl; name a new folder")
    try:
        with written_aside(claim) as aside:
            aside.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{directory}: cannot be made ({error.strerror}); name another folder") from error
    with console.progress("painting", slides, "slides") as bar:
        paint_archive(directory, slides, seed, SIDE_PX, SLIDE_MPP, on_painted=lambda _: bar.advance())
    console.say(f"{slides} slides of {-(-slides // SLIDES_PER_PATIENT)} patients, with labels.csv, in {directory}")


def _read_claim(claim: Path) -> dict[str, Any]:
    try:
        found = json.loads(claim.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{claim}: cannot be read ({error}); name another folder") from error
    return found if isinstance(found, dict) else {}
