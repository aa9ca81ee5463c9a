"""The model that a finetuning leaves to be used: one folder that loads without the workspace it came from.

model/
    backbone.safetensors, backbone.json    as timm and load_backbone read them
    head.safetensors                       the head's arrays, and the mean features and patients of the training slides
    model.json                             classes, head, physical scale, sizes, provenance; written last
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn

from histossl.backbones.loading import BackboneInfo, load_backbone, save_backbone
from histossl.core.anonymous import names_above
from histossl.core.config import plain
from histossl.core.errors import UsageError, WeightsError
from histossl.core.workspace import written_aside
from histossl.features.extraction import Embedder, backbone_embedder
from histossl.heads.feature_heads import HEADS, Fitted, Floats, Ints, load_head

FORMAT = 2
TRAINING, PATIENTS = "training_features", "training_patients"
FEWEST_TO_BE_USUAL = 3  # patients that say what is usual among patients


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
    training_ND: Floats  # mean features of the slides it was trained on
    patients_N: Ints  # whose slides they are

    def embedder(self, device: torch.device) -> Embedder:
        backbone, info = load_backbone(self.folder / "backbone.safetensors")
        return backbone_embedder(self.info.start, backbone, info, self.info.input_px, device)


def save_model(
    folder: Path,
    backbone: nn.Module,
    backbone_info: BackboneInfo,
    fitted: Fitted,
    training_features: NDArray[np.floating[Any]],
    training_patients: Ints,
    info: ModelInfo,
) -> None:
    """`training_features` (slides, D) and `training_patients` (slides,): a mean per slide, and whose it is."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").unlink(missing_ok=True)
    save_backbone(folder / "backbone.safetensors", backbone, backbone_info)
    arrays = {name: np.array(value, order="C") for name, value in fitted.arrays().items()}  # keeps a scalar a scalar
    arrays[TRAINING] = np.array(training_features, dtype=np.float64, order="C")
    arrays[PATIENTS] = np.array(training_patients, dtype=np.int64)
    with written_aside(folder / "head.safetensors") as aside:
        save_file(arrays, aside)
    with written_aside(folder / "model.json") as aside:
        record = names_above(folder).hidden(asdict(info))
        aside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_model(folder: Path, option: str = "--model") -> Model:
    path = folder / "model.json"
    if not path.is_file():
        raise UsageError(f"{option} {folder}: holds no model.json; a model lies in WORKSPACE/finetune/NAME/model")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        info = ModelInfo(**{**stored, "classes": tuple(stored["classes"])})
        arrays = load_file(folder / "head.safetensors")
    except FileNotFoundError as error:
        raise WeightsError(f"{option} {folder}: has no head.safetensors; copy the whole model folder again") from error
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise WeightsError(
            f"{option} {folder}: its model.json or head.safetensors is damaged or not histossl's; copy the whole model "
            "folder again (WORKSPACE/finetune/NAME/model)"
        ) from error
    # Infinite is the scale of a feature that never varied.
    wrong = [name for name, array in arrays.items() if np.isnan(array).any()]
    if wrong:
        raise WeightsError(f"{option} {folder}: {wrong[0]} in its head.safetensors holds values that are no numbers")
    if info.format != FORMAT or info.head not in HEADS:
        raise WeightsError(f"{option} {folder}: was written by another version of histossl (format {info.format})")
    training, patients = arrays.pop(TRAINING), arrays.pop(PATIENTS)
    return Model(folder, info, load_head(info.head, arrays), training, patients)


def is_model_of(folder: Path, info: ModelInfo) -> bool:
    """Whether the folder already holds the model that `info` describes."""
    return bool(_stored(folder) == names_above(folder).hidden(plain(asdict(info))))


def start_of_model(folder: Path) -> str:
    """Which start the folder's model began from; '' without a model."""
    return str(_stored(folder).get("start", ""))


def _stored(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "model.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def distances(training_ND: Floats, patients_N: Ints, x_XD: Floats) -> tuple[Floats, float]:
    """How far each row of `x` lies from its nearest training slide, and how far a patient's slide may usually lie.

    Usual is what the training patients themselves show: of each patient the slide that lies farthest from all slides of
    the others, and of these the largest. A slide from a new patient of the same kind goes beyond it about once in
    n + 1 times, n being the number of patients; nan with fewer than three. Euclidean in standardised features over
    sqrt(D), as the `mean` head sees them.
    """
    centre, std = training_ND.mean(0), training_ND.std(0)
    scale = np.where(std > 1e-8 * max(1.0, float(np.abs(training_ND).max())), std, np.inf)
    scale = scale * np.sqrt(training_ND.shape[1])
    known, new = (training_ND - centre) / scale, (x_XD - centre) / scale
    found = np.sqrt(_squared(new, known).min(1))
    if len(np.unique(patients_N)) < FEWEST_TO_BE_USUAL:
        return found, float("nan")
    among = _squared(known, known)
    among[patients_N[:, None] == patients_N[None]] = np.inf
    return found, float(np.sqrt(among.min(1).max()))


def slide_means(features: Floats, slides: Sequence[str], patients: Sequence[str]) -> tuple[Floats, Ints]:
    """(slides, D) and (slides,): the mean of each slide's items, and its patient by number."""
    names, slide = np.unique(slides, return_inverse=True)
    total = np.zeros((len(names), features.shape[1]))
    np.add.at(total, slide, features)
    first = np.unique(slide, return_index=True)[1]
    patient = np.unique(patients, return_inverse=True)[1].astype(np.int64)
    return total / np.bincount(slide)[:, None], patient[first]


def _squared(a: Floats, b: Floats) -> Floats:
    found: Floats = np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T, 0)
    return found
