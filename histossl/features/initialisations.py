"""Which weights a curve compares: random, imagenet, adapted, the colour floor, and any other backbone files.

random     the architecture, untrained
imagenet   what the pretraining run started from (or --weights)
adapted    the finished pretraining run of the workspace (or --adapted RUN or FILE)
colour     27 colour statistics, no network
RUN, FILE, NAME=FILE   another pretraining run, or a backbone.safetensors

A recipe is judged by several runs of it with different seeds, pooled into one start whose score is their mean and whose
intervals hold the spread between them:

--adapted s0,s1,s2,s3              the adapted start is these four runs
--starts imagenet,dino=d0+d1+d2    a start of another name, of three runs
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from histossl.backbones.loading import (
    BackboneInfo,
    create_backbone,
    file_digest,
    info_beside,
    load_backbone,
    recorded_with,
    report_weights,
)
from histossl.core.config import FinetuneConfig, PretrainConfig, plain, read_run
from histossl.core.errors import UsageError, WeightsError
from histossl.core.options import nearest
from histossl.core.workspace import Workspace
from histossl.features.extraction import COLOUR, Embedder, backbone_embedder, colour_embedder
from histossl.methods import TAUGHT

OTHER_SCALE = 0.05  # of microns per pixel: more is told
KNOWN = ("random", "imagenet", "adapted", COLOUR)


@dataclass(frozen=True)
class Start:
    """One initialisation, not loaded yet: `exported` (a backbone.safetensors of ours), or `weights` for `timm_name`."""

    name: str
    timm_name: str = ""
    weights: str = ""
    exported: Path | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    mpp: float | None = None  # microns per pixel of the tiles it was adapted to
    learnt_px: int = 0  # side at which it was shown them
    backbone: str = ""  # which of several pretraining runs, where the start is the mean of these

    @property
    def key(self) -> str:
        """What its own files are called; no start can be given a name with a +."""
        return f"{self.name}+{self.backbone}" if self.backbone else self.name

    @property
    def source(self) -> str:
        return str(self.exported or self.weights or "no network")

    def load(self, seed: int) -> tuple[nn.Module, BackboneInfo]:
        assert self.name != COLOUR
        if self.exported is not None:
            return load_backbone(self.exported)
        backbone, info = create_backbone(self.timm_name, self.weights, seed)
        report_weights(info)
        return backbone, info

    def embedder(self, *, seed: int, input_px: int, tile_px: int, device: torch.device) -> Embedder:
        if self.name == COLOUR:
            return colour_embedder(tile_px, device)
        backbone, info = self.load(seed)
        return backbone_embedder(self.name, backbone, info, input_px, device)


@dataclass(frozen=True)
class Starts:
    chosen: tuple[Start, ...]  # the runs of a pooled start stand side by side, under one name
    input_px: int  # tiles are shown to all of them at this size
    skipped: dict[str, str]  # name -> why it is not compared, of those nobody asked for by name
    notes: tuple[str, ...] = ()  # what else than the seed differs between runs that are pooled


def resolve_starts(workspace: Workspace, config: FinetuneConfig) -> Starts:
    """What config.starts names; without names, all that can be made. One that is asked for and missing is an error."""
    wanted = config.starts or KNOWN
    adapted, why_not = _adapted(workspace, config)
    others = {name: _other(workspace, name) for name in wanted if name not in KNOWN}
    # What random and imagenet are the random and the ImageNet weights of.
    model = next(iter([*adapted, *(one for pool in others.values() for one in pool)]), None)
    timm_name = config.backbone or (model.timm_name if model else "")
    model = model if model and model.timm_name == timm_name else None
    if adapted and "adapted" in wanted and config.backbone and config.backbone != adapted[0].timm_name:
        raise UsageError(
            f"--backbone {config.backbone}: the adapted backbone is a {adapted[0].timm_name}; starts are compared "
            "within one architecture, so leave --backbone out, or choose --starts without adapted"
        )
    if config.weights and "imagenet" not in wanted:
        raise UsageError(
            f"--weights {config.weights}: is the imagenet start, which --starts {','.join(wanted)} does not name"
        )
    # It also says of which architecture random and imagenet are.
    architecture_asked = not config.backbone and {"random", "imagenet"} & {*wanted}
    if config.adapted and "adapted" not in wanted and not architecture_asked:
        raise UsageError(
            f"--adapted {config.adapted}: is the adapted start, which --starts {','.join(wanted)} does not name"
        )
    chosen: list[Start] = []
    skipped: dict[str, str] = {}
    for name in wanted:
        if name == COLOUR:
            chosen.append(Start(COLOUR))
        elif name == "adapted":
            chosen += adapted
            if not adapted and (config.starts or config.adapted):
                raise UsageError(f"--starts adapted: {why_not}")
            if not adapted:
                skipped[name] = why_not
        elif name in ("random", "imagenet"):
            weights, why = ("random", "") if name == "random" else _imagenet_weights(config, model)
            if not timm_name:
                raise UsageError(
                    f"--starts {name}: of which architecture? Pass --backbone NAME (a timm name), or pretrain first: "
                    "histossl pretrain --slides DIR"
                )
            if weights:
                chosen.append(Start(name, timm_name, weights))
            elif config.starts:
                raise UsageError(f"--starts imagenet: {why}")
            else:
                skipped[name] = why
        else:
            chosen += others[name]
    names = [name for name, _ in groupby(chosen, key=lambda start: start.name)]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--starts: two of them are called {name!r}; name them with NAME=FILE")
    _refuse_other_architectures(chosen)
    notes = tuple(note for name in names for note in _pool_notes([one for one in chosen if one.name == name]))
    # Of adapted also where it is not measured yet: then it is measured as it learnt when it is added.
    return Starts(tuple(chosen), config.input_px or _common_size([*chosen, *adapted]), skipped, notes)


def _refuse_other_architectures(chosen: Sequence[Start]) -> None:
    networks = [start for start in chosen if start.timm_name]
    other = next((start for start in networks if start.timm_name != networks[0].timm_name), None)
    if other:
        raise UsageError(
            f"--starts: {networks[0].key} is a {networks[0].timm_name}, {other.key} a {other.timm_name}; starts are "
            "compared within one architecture, so give each its own --name"
        )


def refuse_unloadable(starts: Starts, seed: int) -> None:
    """Try to load every start before anything is written: a fault of the last would cost the others' hours."""
    for start in starts.chosen:
        if start.name != COLOUR:
            try:
                start.load(seed)
            except WeightsError as error:
                raise UsageError(f"start {start.key!r}: {error}") from error


def with_floor(starts: Starts) -> Starts:
    """The same and the colour floor: every curve has it, asked for or not, and it costs seconds."""
    if any(start.name == COLOUR for start in starts.chosen):
        return starts
    return replace(starts, chosen=(*starts.chosen, Start(COLOUR)))


def scale_notes(starts: Starts, mpp: float) -> list[str]:
    """Starts that learnt from tiles of another scale, or shown at another size, than those here."""
    sizes = [
        f"{start.key} learnt from tiles shown at {start.learnt_px} px, and all starts are shown them at "
        f"{starts.input_px} px here: it is judged at a size that it was not adapted to"
        for start in starts.chosen
        if start.learnt_px and start.learnt_px != starts.input_px
    ]
    return sizes + [
        f"{start.key} learnt from tiles at {start.mpp:g} microns per pixel, those here are at {mpp:g}: it is judged at "
        "a scale that it was not adapted to"
        for start in starts.chosen
        if start.mpp and abs(mpp / start.mpp - 1) > OTHER_SCALE
    ]


def _adapted(workspace: Workspace, config: FinetuneConfig) -> tuple[list[Start], str]:
    """The adapted start, of one or several runs; or none, and why."""
    if config.adapted:
        places = [config.adapted] if Path(config.adapted).is_file() else config.adapted.split(",")
        return _pool("adapted", [_adapted_file(workspace, place.strip()) for place in places], "--adapted"), ""
    runs = [run for run in _finished_runs(workspace) if not _is_taught(workspace.pretrain(run).backbone)]
    if len(runs) == 1:
        return [_from_file("adapted", workspace.pretrain(runs[0]).backbone)], ""
    if runs:
        if not config.starts or "adapted" in config.starts:
            raise UsageError(
                f"several finished pretraining runs ({', '.join(runs)}); choose one with --adapted RUN, or pool runs "
                "that differ in their seed with --adapted RUN,RUN"
            )
        return [], "several runs"
    return [], (
        f"{workspace.pretrain_root} holds no finished pretraining run; "
        "make one with histossl pretrain --slides DIR, or pass --adapted FILE"
    )


def _adapted_file(workspace: Workspace, place: str) -> Path:
    given = Path(place)
    if given.is_file():
        return given
    run = workspace.pretrain_root / place / "backbone.safetensors"
    if place and run.is_file():
        return run
    runs = _finished_runs(workspace)
    if place and (workspace.pretrain_root / place).is_dir():
        raise UsageError(f"--adapted {place}: this run is not finished; the same histossl pretrain goes on")
    there = f"finished runs: {', '.join(runs)}" if runs else f"{workspace.pretrain_root} holds no finished run"
    raise UsageError(f"--adapted {place}: no such file or run{nearest(place, runs)}; {there}")


def _pool(name: str, files: Sequence[Path], option: str) -> list[Start]:
    """One start of one or several pretraining runs."""
    starts = [_from_file(name, file) for file in files]
    if len(starts) == 1:
        return starts
    names = [_plain(_run_of(file)) for file in files]
    if len(set(names)) < len(names):  # .../s0/best/backbone.safetensors: told apart by their number
        names = [f"{one}-{number}" if names.count(one) > 1 else one for number, one in enumerate(names)]
    for start, file in zip(starts, files, strict=True):
        if start.timm_name != starts[0].timm_name:
            raise UsageError(
                f"{option}: seeds of one start must be of one architecture; {files[0]} is a {starts[0].timm_name}, "
                f"{file} a {start.timm_name}"
            )
    contents = [file.read_bytes() for file in files]
    for number, content in enumerate(contents):
        if content in contents[:number]:
            same = files[contents.index(content)]
            raise UsageError(
                f"{option}: {files[number]} holds the same weights as {same}; a seed counts once, so leave one out"
            )
    return [replace(start, backbone=one) for start, one in zip(starts, names, strict=True)]


def _pool_notes(pool: Sequence[Start]) -> Iterator[str]:
    """Runs that differ in more than their seed do not show what a recipe's seeds do."""
    usual = plain(asdict(PretrainConfig()))
    configs = []
    for start in pool:
        run_json = start.exported.parent / "run.json" if start.exported else None
        if run_json is None or not run_json.is_file():
            return
        configs.append(usual | read_run(run_json)["config"])  # a younger setting was at its default
    for start, config in zip(pool[1:], configs[1:], strict=True):
        other = sorted(key for key in {*configs[0], *config} - {"seed"} if configs[0].get(key) != config.get(key))
        if not other and configs[0].get("seed") == config.get("seed"):
            yield (
                f"{start.name}: pooled runs {pool[0].backbone} and {start.backbone} have the same seed and settings, "
                "so they show less of what seeds do than their number says"
            )
        if other:
            yield (
                f"{start.name}: pooled runs {pool[0].backbone} and {start.backbone} differ in {', '.join(other)}, not "
                "only in their seed; their mean is that of several recipes"
            )


def _finished_runs(workspace: Workspace) -> list[str]:
    root = workspace.pretrain_root
    if not root.is_dir():
        return []
    return sorted(run.name for run in root.iterdir() if workspace.pretrain(run.name).backbone.is_file())


def _is_taught(backbone: Path) -> bool:
    """Whether a labelled-slide model taught it: then it is compared only where it is asked for by name."""
    try:
        method = json.loads(backbone.with_suffix(".json").read_text(encoding="utf-8")).get("method")
    except (OSError, ValueError):
        return False
    return method in TAUGHT


def _imagenet_weights(config: FinetuneConfig, model: Start | None) -> tuple[str, str]:
    """('imagenet' or a file, '') or ('', why there are none)."""
    if config.weights:
        if config.weights == "random":
            raise UsageError("--weights random: no ImageNet start; random weights are compared with --starts random")
        if recorded_with(config.weights) is not None:
            raise UsageError(
                f"--weights {config.weights}: histossl wrote this backbone, so it is no ImageNet start; "
                f"compare it as --starts NAME={config.weights}"
            )
        return config.weights, ""
    if model is None:
        return "imagenet", ""
    begun = str(model.provenance.get("start_weights", ""))
    if begun == "random":
        return "", "pretraining began from random weights; pass --weights FILE for an ImageNet start to compare with"
    if begun in ("", "imagenet") or begun.startswith("imagenet ("):  # with its source; imagenet.pth is a file
        return "imagenet", ""
    if recorded_with(begun) is not None:
        return "", (
            f"pretraining began from {begun}, a backbone that histossl wrote; compare it as --starts NAME={begun}, "
            "or pass --weights FILE for an ImageNet start"
        )
    digest = model.provenance.get("start_weights_digest")
    if Path(begun).is_file():
        if digest not in (None, file_digest(Path(begun))):
            return "", f"pretraining began from {begun}, whose content has changed since; pass --weights FILE"
        return begun, ""
    here = Path(Path(begun).name)  # where a container calls the same folder something else
    if digest is not None and here.is_file() and file_digest(here) == digest:
        return str(here), ""
    return "", f"pretraining began from {begun}, which is not there any more; pass --weights FILE"


def _from_file(name: str, path: Path) -> Start:
    info = info_beside(path)
    made_of = dict(info.provenance or {})
    start = Start(name, info.timm_name, exported=path, provenance=made_of, mpp=info.mpp, learnt_px=info.input_px)
    run_json = path.parent / "run.json"
    if "start_weights" not in start.provenance and run_json.is_file():
        start.provenance["start_weights"] = str(read_run(run_json)["config"].get("weights", ""))
    return start


def _other(workspace: Workspace, text: str) -> list[Start]:
    """RUN, FILE, NAME=RUN or FILE, NAME=RUN+RUN+...: one start, of one or several runs."""
    name, equals, place = text.partition("=")
    if not equals:
        name, place = "", text
    places = [place] if Path(place).is_file() or not name else place.split("+")
    files = [_run_or_file(workspace, text, one.strip()) for one in places]
    return _pool(_plain(name or _run_of(files[0])), files, f"--starts {text}")


def _run_or_file(workspace: Workspace, text: str, place: str) -> Path:
    path = Path(place)
    if path.is_file():
        return path
    runs = _finished_runs(workspace)
    if place in runs:
        return workspace.pretrain(place).backbone
    known = [*KNOWN, *runs]
    if place and (workspace.pretrain_root / place).is_dir() and "/" not in place:
        raise UsageError(f"--starts {text}: run {place} is not finished; the same histossl pretrain goes on")
    raise UsageError(
        f"--starts {text}: {place!r} is neither a file nor one of {', '.join(known)}{nearest(place, known)}"
    )


def _run_of(path: Path) -> str:
    """A backbone file's run (or its own name, where it lies somewhere by itself)."""
    if path.stem != "backbone":
        return path.stem
    folder = path.resolve().parent
    return folder.parent.name if folder.name in ("best", "healthy") else folder.name


def _plain(name: str) -> str:
    """A name that can be a directory and a legend entry, and that is not one of the starts with a meaning."""
    clean = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name).strip(".-") or "backbone"
    return f"{clean}-file" if clean in KNOWN else clean


def _common_size(chosen: list[Start]) -> int:
    """The size that the adapted backbone learnt at; else of the first exported one, else the architecture's own."""
    for start in sorted(chosen, key=lambda one: one.name != "adapted"):
        if start.learnt_px:
            return start.learnt_px
    for start in chosen:
        if start.timm_name:
            return create_backbone(start.timm_name, "random")[1].input_px
    return 0
