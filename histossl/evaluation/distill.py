"""Stage `distill`: a model of labelled slides teaches a student on all tiles (SimCLR v2's third act).

    model folder -> teacher -> the training loop of `pretrain` -> backbone, and the student's own model folder

What is the stage's own: whom the teacher was tested on (they stay out), what it says of the tiles before anything is
trained, and how well the student came to agree with it.

Shapes: N tiles, C classes that the teacher knows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor, nn

from histossl.backbones.loading import BackboneInfo, load_backbone
from histossl.core import console
from histossl.core.config import DistillConfig
from histossl.core.errors import TrainingError, UsageError
from histossl.core.workspace import PretrainDir
from histossl.features.extraction import slide_tiles
from histossl.heads.model_folder import Model, save_model
from histossl.heads.torch_heads import present_classes, student_head
from histossl.labels.slide_lookup import SlideNames
from histossl.methods.distillation import Teacher, entropy
from histossl.tiles.store.index import TileIndex
from histossl.tiles.store.subset import open_subset
from histossl.tiles.stream.loader import decode_good_tiles
from histossl.views.recipe import clean_view

SLIDES_LOOKED_AT, TILES_OF_EACH = 64, 16
NEARLY_HARD = 0.1  # of the entropy of a teacher that knows nothing, below which soft labels are hardly soft
HARDLY_VARIES = 1e-3  # standard deviation over tiles of a class probability
FEW_AGREE = 0.05  # above the agreement of two who guess with these shares


# ---- who stays out


def slides_held_out(model: Model, index: TileIndex) -> set[str]:
    """Slides here that the teacher was tested on: a student that saw them could not be tested fairly any more.

    By the model's own record, else by the splits that lie beside its folder; with a TCGA name, all of the case. After a
    cross-validation there are none: the model has learnt from every labelled slide.
    """
    names = model.info.provenance.get("tested_slides")
    if names is None:
        names = _tested_by_splits(model.folder.resolve().parent / "splits.json")
    here = SlideNames.of(index)
    # In older records a region or tile of a slide has a number after the slide's name.
    found = {slide for name in names for slide in here.find(name) or here.find(re.sub(r"[#@]\d+$", "", name))}
    cases = {case for slide in found for case in here.cases(slide)}
    return found | {slide for slide in index.slides if here.cases(slide) & cases}


def _tested_by_splits(path: Path) -> list[str]:
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))
        return [name for part in splits["parts"] for name in part["test"]] if splits["num_folds"] == 0 else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


# ---- what the teacher says, and whether the student says the same


@dataclass(frozen=True)
class Sample:
    """Some tiles of some slides of the pool, spread evenly; the same ones whenever asked."""

    index: TileIndex
    numbers: tuple[NDArray[np.int64], ...]  # of each slide

    def batches(self) -> Iterator[Tensor]:
        """One per slide; a damaged tile is passed over."""
        for numbers in self.numbers:
            pixels, good = decode_good_tiles(self.index, numbers)
            if len(good):
                yield pixels


def sample_of(index: TileIndex, config: DistillConfig) -> Sample:
    slides = sorted(set(index.slides) - set(config.excluded_slides))
    numbers = [slide_tiles(index, slide) for slide in slides]
    if config.subset:
        subset = open_subset(index, config.subset).tiles
        numbers = [np.intersect1d(own, subset, assume_unique=True) for own in numbers]
    numbers = [own for own in numbers if len(own)]
    if not numbers:
        raise UsageError(f"all {len(index.slides)} slides are left out: there are no tiles to learn from")
    chosen = [numbers[place] for place in _evenly(len(numbers), SLIDES_LOOKED_AT)]
    return Sample(index, tuple(own[_evenly(len(own), TILES_OF_EACH)] for own in chosen))


def _evenly(count: int, at_most: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(np.int64))


def look_at_teacher(sample: Sample, teacher: Teacher, info: BackboneInfo, config: DistillConfig) -> None:
    """Say what the teacher makes of the tiles, and refuse one from which nothing can be learnt."""
    settings = dict(assignment.split("=", 1) for assignment in config.set)
    temperature, targets = float(settings.get("temperature", "1")), settings.get("targets", "soft")
    logits_NC = torch.cat([one.cpu() for one in _teacher_logits(sample, teacher, info)])
    shares_NC = (logits_NC / temperature).softmax(1)
    choice_C = torch.bincount(logits_NC.argmax(1), minlength=len(teacher.classes)) / len(logits_NC)
    mean_entropy, most = float(entropy(shares_NC).mean()), float(np.log(len(teacher.classes)))
    said = ", ".join(f"{name} {share:.0%}" for name, share in zip(teacher.classes, choice_C.tolist(), strict=True))
    console.say(
        f"the teacher on {console.count(len(logits_NC), 'tile')}: {said}; "
        f"entropy of its labels {mean_entropy:.2f} nats of {most:.2f}"
    )
    first = teacher.classes[int(choice_C.argmax())]
    where = f"--teacher {teacher.facts['folder']}"
    if float(shares_NC.std(0).max()) < HARDLY_VARIES:
        raise UsageError(f"{where}: answers every tile alike ({first!r}); there is nothing to learn from it")
    if float(choice_C.max()) == 1:
        if targets == "hard":
            raise UsageError(f"{where}: calls every tile {first!r}; hard labels would teach that alone, use soft ones")
        console.warn(
            f"the teacher calls every tile {first!r}; only its probabilities vary, and the student learns these"
        )
    elif targets == "soft" and mean_entropy < NEARLY_HARD * most:
        softer = _softer(logits_NC, most)
        way_out = f"; --temperature {softer:g} would soften them" if softer else "; --targets hard says the same"
        console.warn(f"the teacher is nearly always sure, so its labels are almost hard{way_out}")


def _softer(logits_NC: Tensor, most: float) -> float | None:
    """The smallest power of two as temperature that makes labels soft."""
    for temperature in (2.0, 4.0, 8.0, 16.0, 32.0):
        if float(entropy((logits_NC / temperature).softmax(1)).mean()) >= NEARLY_HARD * most:
            return temperature
    return None


@torch.inference_mode()
def _teacher_logits(sample: Sample, teacher: Teacher, info: BackboneInfo) -> Iterator[Tensor]:
    for tiles in sample.batches():
        yield teacher(clean_view(tiles.to(teacher.scale.device), teacher.input_px, (info.mean, info.std)))


@torch.inference_mode()
def _features(sample: Sample, backbone: nn.Module, info: BackboneInfo, view_px: int) -> Iterator[Tensor]:
    device = next(backbone.parameters()).device
    for tiles in sample.batches():
        features: Tensor = backbone(clean_view(tiles.to(device), view_px, (info.mean, info.std)))
        yield features


def compared(teacher_NC: Tensor, student_NC: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Agreement of first choices, what guessing with the same shares would give, entropies and shares by class."""
    ours, theirs = student_NC.argmax(1), teacher_NC.argmax(1)
    shares = [torch.bincount(each, minlength=len(classes)).double() / len(each) for each in (theirs, ours)]
    by_class = {
        name: {
            "teacher_share": float(shares[0][number]),
            "student_share": float(shares[1][number]),
            "agreement": float((ours == theirs)[theirs == number].double().mean()) if shares[0][number] else None,
        }
        for number, name in enumerate(classes)
    }
    return {
        "num_tiles": len(ours),
        "agreement": float((ours == theirs).double().mean()),
        "agreement_by_chance": float((shares[0] * shares[1]).sum()),
        "teacher_entropy": float(entropy(teacher_NC.softmax(1)).mean()),
        "student_entropy": float(entropy(student_NC.softmax(1)).mean()),
        "classes": by_class,
    }


def collapsed_to(found: dict[str, Any]) -> str | None:
    """The class that the student calls every tile, where its teacher tells several apart."""
    one = next((name for name, row in found["classes"].items() if row["student_share"] == 1), None)
    return one if one is not None and found["classes"][one]["teacher_share"] < 1 else None


def verdict(found: dict[str, Any]) -> str:
    """One sentence on what the figures of `compared` mean; empty where all is well."""
    one = collapsed_to(found)
    if one is not None:
        return (
            f"collapse to one class: the student calls every tile {one!r}. Likely causes: --lr too high, too few steps"
        )
    if found["agreement"] < found["agreement_by_chance"] + FEW_AGREE:
        return "the student has not learnt the teacher's classes: it agrees as often as guessing would; train it longer"
    lost = [name for name, row in found["classes"].items() if row["teacher_share"] > 0 and row["student_share"] == 0]
    if lost:
        return f"the student never says {', '.join(lost)}, which the teacher does; train it longer"
    return ""


# ---- what is left


def leave_model(
    index: TileIndex, run: PretrainDir, model: Model, teacher: Teacher, config: DistillConfig
) -> tuple[str, bool]:
    """The student's model folder, from a finished run; what came of it, in words, and whether it is fit for use.

    Made anew whenever asked. A student that collapsed to one class leaves none: TrainingError.
    """
    backbone, info = load_backbone(run.backbone)
    device = teacher.scale.device
    backbone = backbone.to(device).eval()
    head = load_file(run.head)
    sample = sample_of(index, config)
    features = [one.float().cpu() for one in _features(sample, backbone, info, config.view_px)]
    weight, bias = (torch.from_numpy(head[name]) for name in ("weight", "bias"))
    teacher_NC = torch.cat([one.cpu() for one in _teacher_logits(sample, teacher, info)])
    found = compared(teacher_NC, torch.cat(features) @ weight.T + bias, teacher.classes)
    fitted = student_head(head["weight"], head["bias"], present_classes(model.fitted), len(model.info.classes))
    _show(found)
    said = verdict(found)
    if collapsed_to(found) is not None:
        raise TrainingError(
            f"{run.root}: {said}. No model is left for predict; begin again with other settings under another --name"
        )
    # What new slides are compared with, to warn of those unlike them; whose these are is not known: each its own.
    known = torch.stack([one.mean(0) for one in features]).double().numpy()
    save_model(run.model, backbone, info, fitted, known, np.arange(len(known)), _info_of(model, run, config, found))
    if said:
        console.warn(said)
    text = (
        f"the student agrees with its teacher on {found['agreement']:.1%} of {found['num_tiles']:,} tiles "
        f"({found['agreement_by_chance']:.0%} by chance)\nmodel for use: {run.model}"
    )
    return text, not said


def _info_of(model: Model, run: PretrainDir, config: DistillConfig, found: dict[str, Any]) -> Any:
    """A student judges a slide as its teacher did: by the mean of its tiles' logits where that learnt from slides, else
    by the mean of their probabilities."""
    return replace(
        model.info,
        head="mean",
        start=run.root.name,
        input_px=config.view_px,
        provenance={
            "tiling": model.info.provenance["tiling"],
            "slides": model.info.provenance.get("slides", []),
            "contents": model.info.provenance.get("contents", {}),
            "config": json.loads(json.dumps(asdict(config), default=str)),
            "teacher": {"folder": str(model.folder), "digest": config.teacher},
            "distillation": found,
        },
    )


def _show(found: dict[str, Any]) -> None:
    rows = [
        [
            name,
            f"{row['teacher_share']:.1%}",
            f"{row['student_share']:.1%}",
            "" if row["agreement"] is None else f"{row['agreement']:.1%}",
        ]
        for name, row in found["classes"].items()
    ]
    console.table(
        f"{found['num_tiles']:,} whole tiles of the pool, as teacher and student see them",
        ["class", "teacher", "student", "agreement"],
        rows,
        right=["teacher", "student", "agreement"],
    )
    console.say(
        f"mean entropy: teacher {found['teacher_entropy']:.2f} nats, student {found['student_entropy']:.2f} nats"
    )
