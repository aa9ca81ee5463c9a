"""The model that a finetuning leaves to be used: one folder that loads without the workspace it came from.

model/
    backbone.safetensors, backbone.json    as timm and load_backbone read them
    head.safetensors                       the head's arrays, and the training items' mean features
    model.json                             classes, head, physical scale, sizes, provenance; written last
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn

from histossl.backbones import BackboneInfo, load_backbone, save_backbone
from histossl.config import plain
from histossl.errors import WeightsError
from histossl.evaluation.embed import Embedder, backbone_embedder
from histossl.evaluation.heads import HEADS, Fitted, Floats, load_head
from histossl.workspace import written_aside

FORMAT = 1
TRAINING = "training_features"


@dataclass(frozen=True)
class ModelInfo:
    """model.json."""

    classes: tuple[str, ...]
    head: str
    unit: str  # what carried the labels: slide, region or tile
    start: str
    mpp: float  # microns per pixel of the tiles it knows
    tile_px: int
    input_px: int
    num_items: int
    num_patients: int
    provenance: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True)
class Model:
    folder: Path
    info: ModelInfo
    fitted: Fitted
    training_D: Floats  # (items, D) mean features of what it was trained on

    def embedder(self, device: torch.device) -> Embedder:
        backbone, info = load_backbone(self.folder / "backbone.safetensors")
        return backbone_embedder(self.info.start, backbone, info, self.info.input_px, device)


def save_model(
    folder: Path,
    backbone: nn.Module,
    backbone_info: BackboneInfo,
    fitted: Fitted,
    training_features: NDArray[np.floating[Any]],
    info: ModelInfo,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").unlink(missing_ok=True)
    save_backbone(folder / "backbone.safetensors", backbone, backbone_info)
    arrays = {name: np.array(value, order="C") for name, value in fitted.arrays().items()}  # keeps a scalar a scalar
    arrays[TRAINING] = np.array(training_features, dtype=np.float64, order="C")
    with written_aside(folder / "head.safetensors") as aside:
        save_file(arrays, aside)
    with written_aside(folder / "model.json") as aside:
        aside.write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")


def load_model(folder: Path) -> Model:
    path = folder / "model.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        info = ModelInfo(**{**stored, "classes": tuple(stored["classes"])})
        arrays = load_file(folder / "head.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise WeightsError(
            f"--model {folder}: is not a model that histossl finetune wrote "
            f"({type(error).__name__}: {error}); it lies in WORKSPACE/finetune/NAME/model"
        ) from error
    if info.format != FORMAT or info.head not in HEADS:
        raise WeightsError(f"--model {folder}: was written by another version of histossl (format {info.format})")
    training = arrays.pop(TRAINING)
    return Model(folder, info, load_head(info.head, arrays), training)


def is_model_of(folder: Path, info: ModelInfo) -> bool:
    """Whether the folder already holds the model that `info` describes."""
    try:
        stored = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(stored == plain(asdict(info)))


def distances(training: Floats, x: Floats) -> tuple[Floats, float]:
    """How far each row of `x` lies from its nearest training item, and how far these lie from each other at most.

    Euclidean in standardised features over sqrt(D), as the `mean` head sees them. The bound is the 95th percentile of
    the training items' distances to their nearest neighbour; nan with fewer than three of them.
    """
    centre, std = training.mean(0), training.std(0)
    scale = np.where(std > 1e-8 * max(1.0, float(np.abs(training).max())), std, np.inf) * np.sqrt(training.shape[1])
    known, new = (training - centre) / scale, (x - centre) / scale
    found = np.sqrt(_squared(new, known).min(1))
    if len(known) < 3:
        return found, float("nan")
    among = _squared(known, known)
    np.fill_diagonal(among, np.inf)
    return found, float(np.quantile(np.sqrt(among.min(1)), 0.95))


def _squared(a: Floats, b: Floats) -> Floats:
    found: Floats = np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T, 0)
    return found
