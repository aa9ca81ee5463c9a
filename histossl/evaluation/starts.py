"""Which weights a curve compares: random, imagenet, adapted, the colour floor, and any other backbone files.

random     the architecture, untrained
imagenet   what the pretraining run started from (or --weights)
adapted    the finished pretraining run of the workspace (or --adapted RUN or FILE)
colour     27 colour statistics, no network
RUN, FILE, NAME=FILE   another pretraining run, or a backbone.safetensors
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from histossl.backbones import BackboneInfo, create_backbone, load_backbone
from histossl.config import FinetuneConfig, nearest, read_run
from histossl.errors import UsageError, WeightsError
from histossl.evaluation.embed import COLOUR, Embedder, backbone_embedder, colour_embedder
from histossl.workspace import Workspace

KNOWN = ("random", "imagenet", "adapted", COLOUR)


@dataclass(frozen=True)
class Start:
    """One initialisation, not loaded yet: `exported` (a backbone.safetensors of ours), or `weights` for `timm_name`."""

    name: str
    timm_name: str = ""
    weights: str = ""
    exported: Path | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        return str(self.exported or self.weights or "no network")

    def load(self, seed: int) -> tuple[nn.Module, BackboneInfo]:
        assert self.name != COLOUR
        if self.exported is not None:
            return load_backbone(self.exported)
        return create_backbone(self.timm_name, self.weights, seed)

    def embedder(self, *, seed: int, input_px: int, tile_px: int, device: torch.device) -> Embedder:
        if self.name == COLOUR:
            return colour_embedder(tile_px, device)
        backbone, info = self.load(seed)
        return backbone_embedder(self.name, backbone, info, input_px, device)


@dataclass(frozen=True)
class Starts:
    chosen: tuple[Start, ...]
    input_px: int  # tiles are shown to all of them at this size
    skipped: dict[str, str]  # name -> why it is not compared, of those nobody asked for by name


def resolve_starts(workspace: Workspace, config: FinetuneConfig) -> Starts:
    """What config.starts names; without names, all that can be made. One that is asked for and missing is an error."""
    wanted = config.starts or KNOWN
    exported, why_not = _adapted_file(workspace, config)
    adapted = None if exported is None else _from_file("adapted", exported)
    timm_name = config.backbone or (adapted.timm_name if adapted else "")
    if adapted and config.backbone and config.backbone != adapted.timm_name:
        raise UsageError(
            f"--backbone {config.backbone}: the adapted backbone is a {adapted.timm_name}; starts are compared "
            "within one architecture, so leave --backbone out, or choose --starts without adapted"
        )
    chosen: list[Start] = []
    skipped: dict[str, str] = {}
    for name in wanted:
        if name == COLOUR:
            chosen.append(Start(COLOUR))
        elif name == "adapted":
            if adapted is not None:
                chosen.append(adapted)
            elif config.starts or config.adapted:
                raise UsageError(f"--starts adapted: {why_not}")
            else:
                skipped[name] = why_not
        elif name in ("random", "imagenet"):
            weights, why = ("random", "") if name == "random" else _imagenet_weights(config, adapted)
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
            chosen.append(_other(workspace, name))
    names = [start.name for start in chosen]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--starts: two of them are called {name!r}; name them with NAME=FILE")
    return Starts(tuple(chosen), config.input_px or _common_size(chosen), skipped)


def _adapted_file(workspace: Workspace, config: FinetuneConfig) -> tuple[Path | None, str]:
    """The adapted backbone's file, or why there is none."""
    if config.adapted:
        given = Path(config.adapted)
        if given.is_file():
            return given, ""
        run = workspace.pretrain_root / config.adapted / "backbone.safetensors"
        if run.is_file():
            return run, ""
        runs = _finished_runs(workspace)
        if (workspace.pretrain_root / config.adapted).is_dir():
            raise UsageError(
                f"--adapted {config.adapted}: this run is not finished; the same histossl pretrain goes on"
            )
        there = f" Finished runs: {', '.join(runs)}" if runs else f" {workspace.pretrain_root} holds no finished run"
        raise UsageError(f"--adapted {config.adapted}: no such file or run{nearest(config.adapted, runs)}.{there}")
    runs = _finished_runs(workspace)
    if len(runs) == 1:
        return workspace.pretrain(runs[0]).backbone, ""
    if runs:
        if not config.starts or "adapted" in config.starts:
            raise UsageError(f"several finished pretraining runs ({', '.join(runs)}); choose one with --adapted RUN")
        return None, "several runs"
    return None, (
        f"{workspace.pretrain_root} holds no finished pretraining run; "
        "make one with histossl pretrain --slides DIR, or pass --adapted FILE"
    )


def _finished_runs(workspace: Workspace) -> list[str]:
    root = workspace.pretrain_root
    if not root.is_dir():
        return []
    return sorted(run.name for run in root.iterdir() if workspace.pretrain(run.name).backbone.is_file())


def _imagenet_weights(config: FinetuneConfig, adapted: Start | None) -> tuple[str, str]:
    """('imagenet' or a file, '') or ('', why there are none)."""
    if config.weights:
        return config.weights, ""
    if adapted is None:
        return "imagenet", ""
    begun = str(adapted.provenance.get("start_weights", ""))
    if begun == "random":
        return "", "pretraining began from random weights; pass --weights FILE for an ImageNet start to compare with"
    if not begun or begun.startswith("imagenet"):
        return "imagenet", ""
    if Path(begun).is_file():
        return begun, ""
    return "", f"pretraining began from {begun}, which is not there any more; pass --weights FILE"


def _from_file(name: str, path: Path) -> Start:
    beside = path.with_suffix(".json")
    try:
        stored = json.loads(beside.read_text(encoding="utf-8"))
        start = Start(name, stored["timm_name"], exported=path, provenance=dict(stored.get("provenance") or {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{path}: needs the {beside.name} that histossl writes beside it ({type(error).__name__}: {error})"
        ) from error
    run_json = path.parent / "run.json"
    if "start_weights" not in start.provenance and run_json.is_file():
        start.provenance["start_weights"] = str(read_run(run_json)["config"].get("weights", ""))
    return start


def _other(workspace: Workspace, text: str) -> Start:
    name, equals, place = text.partition("=")
    if not equals:
        name, place = "", text
    path = Path(place)
    if path.is_file():
        stem = path.parent.name if path.stem == "backbone" else path.stem
        return _from_file(_plain(name or stem), path)
    runs = _finished_runs(workspace)
    if place in runs:
        return _from_file(_plain(name or place), workspace.pretrain(place).backbone)
    known = [*KNOWN, *runs]
    raise UsageError(f"--starts {text}: neither a file nor one of {', '.join(known)}{nearest(place, known)}")


def _plain(name: str) -> str:
    """A name that can be a directory and a legend entry, and that is not one of the starts with a meaning."""
    clean = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name).strip(".-") or "backbone"
    return f"{clean}-file" if clean in KNOWN else clean


def _common_size(chosen: list[Start]) -> int:
    """The size that the adapted backbone learnt at; else of the first exported one, else the architecture's own."""
    for start in sorted(chosen, key=lambda one: one.name != "adapted"):
        if start.exported is not None:
            stored = json.loads(start.exported.with_suffix(".json").read_text(encoding="utf-8"))
            return int(stored["input_px"])
    for start in chosen:
        if start.timm_name:
            return create_backbone(start.timm_name, "random")[1].input_px
    return 0
