"""A timm model from ImageNet weights, from a file, or random; saved so that timm loads it again.

A backbone maps normalised views (B, 3, h, w) to pooled features (B, D): `timm.create_model(name, num_classes=0)`.
Some have layers of their pretraining head behind it (SimCLR v2): a second file, which timm need not know.
Weights are read as safetensors or with `weights_only=True`: a file with pickled code in it is refused.
A mask token that a file brings (iBOT, DINOv2) is no key of timm's: it lies as `given_mask_token` on the backbone, for
methods that mask.
"""

from __future__ import annotations

import difflib
import errno
import functools
import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import group_parameters
from torch import Tensor, nn

from histossl.backbones.weight_files import fitted, read_weights, refuse_non_finite
from histossl.core import console
from histossl.core.anonymous import names_above
from histossl.core.errors import UsageError, WeightsError
from histossl.core.workspace import written_aside

ALIKE = 0.6  # a mistyped name is at least so much like one that is meant


@dataclass(frozen=True)
class BackboneInfo:
    """What must be known to use a backbone: kept as backbone.json beside the weights."""

    timm_name: str
    mean: tuple[float, float, float]  # of RGB in [0, 1]; the start's own, kept when continuing
    std: tuple[float, float, float]
    feature_dim: int
    input_px: int  # side of the images it was last trained on
    mpp: float | None = None  # microns per pixel of the tiles it was adapted to
    method: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    projection: str | None = None  # file beside the weights with the layers behind the backbone, whose output D is


class Projected(nn.Module):
    """A backbone with the first layers of its pretraining head behind it: features = relu(bn(linear(...))).

    Chen et al. 2020b (SimCLR v2, arXiv 2006.10029) finetune from there. For timm's layer decay the layers belong to
    the backbone's last group, as if they had always been its end.
    """

    def __init__(self, backbone: nn.Module, projection: Mapping[str, Tensor]) -> None:
        """`projection`: the state of Linear, BatchNorm, ReLU, Linear, ... as numbered in an nn.Sequential."""
        super().__init__()
        self.backbone = backbone
        layers: list[nn.Module] = []
        while (weight := projection.get(f"{len(layers)}.weight")) is not None:
            layers += [nn.Linear(weight.shape[1], weight.shape[0], bias=False), nn.BatchNorm1d(len(weight)), nn.ReLU()]
        self.projection = nn.Sequential(*layers)
        self.projection.load_state_dict(projection)
        self.feature_dim = int(projection[f"{len(layers) - 3}.weight"].shape[0])

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.projection(self.backbone(x))
        return features

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        inner = cast(Any, self.backbone)
        group_of: dict[str, int] = group_parameters(inner, inner.group_matcher(coarse=coarse), reverse=True)
        last = max(group_of.values())
        return lambda name: group_of.get(name.removeprefix("backbone."), last)


def create_backbone(
    timm_name: str, weights: str | Path, seed: int = 0, drop_path: float = 0.0
) -> tuple[nn.Module, BackboneInfo]:
    """A fresh backbone. `weights`: 'imagenet' (timm's cache, else the hub), 'random', or a file.

    `drop_path` is the rate of stochastic depth while training (Huang et al. 2016), where the architecture knows it.

    Refuses an unknown name (UsageError), and weights that do not fit in every key (WeightsError): nothing is
    ever loaded in part.
    """
    if str(weights) not in ("imagenet", "random"):
        path = Path(weights)
        if path.is_file():
            backbone, info = _empty(timm_name, seed, drop_path)
            provenance = {**_load_into(backbone, path), "start_weights_digest": file_digest(path)}
            return backbone, replace(info, provenance=provenance)
        raise UsageError(f"--weights {weights}: no such file, and neither 'imagenet' nor 'random'")
    backbone, info = _empty(timm_name, seed, drop_path)
    if str(weights) == "random":
        return backbone, replace(info, provenance={"start_weights": "random", "seed": seed})
    cached = _cached_by_timm(backbone)
    if cached is not None:
        provenance = _load_into(backbone, cached)
    else:
        _require_hub(timm_name, backbone)
        downloaded = timm.create_model(timm_name, pretrained=True, num_classes=0)
        backbone.load_state_dict(downloaded.state_dict())
        provenance = {}
    source = _timm_config(backbone).get("hf_hub_id") or _timm_config(backbone).get("url")
    return backbone, replace(info, provenance={**provenance, "start_weights": f"imagenet ({source})"})


def load_backbone(path: Path) -> tuple[nn.Module, BackboneInfo]:
    """A backbone that `save_backbone` wrote: `path` is the safetensors file, its JSON lies beside it."""
    info = info_beside(path)
    backbone, _ = _empty(info.timm_name, seed=0)
    _load_into(backbone, path)
    if info.projection is None:
        return backbone, info
    behind = path.with_name(info.projection)
    try:
        layers = read_weights(behind)
        refuse_non_finite(behind, layers)
        return Projected(backbone, layers), info
    except (KeyError, RuntimeError) as error:
        raise WeightsError(f"{behind}: holds no layers that fit behind {path.name} ({error})") from error


def info_beside(path: Path) -> BackboneInfo:
    """What the JSON says that `save_backbone` wrote beside the weights at `path`."""
    beside = path.with_suffix(".json")
    ways_out = (
        "copy both files together; for weights that histossl did not write give --weights FILE with --backbone NAME "
        "(as the start imagenet)"
    )
    try:
        stored = json.loads(beside.read_text(encoding="utf-8"))
        return BackboneInfo(**{**stored, "mean": tuple(stored["mean"]), "std": tuple(stored["std"])})
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: there is no {beside.name} beside it, as histossl writes; {ways_out}") from error
    except OSError as error:
        raise WeightsError(f"{beside}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path}: the {beside.name} beside it is not one that histossl wrote; {ways_out}") from error


def recorded_with(weights: str | Path) -> dict[str, Any] | None:
    """What `save_backbone` wrote beside these weights of where they come from; None for weights from elsewhere."""
    beside = Path(weights).with_suffix(".json")
    try:
        stored = json.loads(beside.read_text(encoding="utf-8")) if Path(weights).is_file() else {}
        return dict(stored["provenance"]) if "timm_name" in stored else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_backbone(path: Path, backbone: nn.Module, info: BackboneInfo) -> None:
    """Weights with timm's own key names, and the rest first: the weights' presence means that all are there."""
    info = replace(info, projection=None)
    if isinstance(backbone, Projected):
        behind = path.with_suffix(".projection.safetensors")
        _save_weights(behind, backbone.projection)
        info = replace(info, projection=behind.name, feature_dim=backbone.feature_dim)
        backbone = backbone.backbone
    with written_aside(path.with_suffix(".json")) as aside:
        aside.write_text(json.dumps(names_above(path).hidden(asdict(info)), indent=2) + "\n", encoding="utf-8")
    _save_weights(path, backbone)


def _save_weights(path: Path, module: nn.Module) -> None:
    save_tensors(path, module.state_dict())


def _nearest_model(name: str) -> str:
    """', did you mean X?': of timm's names that begin most like it the shortest, for their ends are sizes and data."""

    def alike(model: str) -> tuple[float, int]:
        return difflib.SequenceMatcher(None, name.casefold(), model[: len(name)]).ratio(), -len(model)

    best = max(timm.list_models(), key=alike)
    return f", did you mean {best!r}?" if alike(best)[0] >= ALIKE else ""


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A .safetensors file that whoever may read the folder's other files may read."""
    state = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with written_aside(path) as aside:
        aside.touch()
        mode = aside.stat().st_mode  # as the umask has it; safetensors makes its files anew, for their owner alone
        try:
            save_file(state, str(aside), metadata={"format": "pt"})  # one entry: their order in the file is not fixed
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error)) from error
        aside.chmod(mode)


def from_anywhere(path: Path) -> Path:
    """Absolute, with the file's own name: what a cache's link points to may have no suffix."""
    return path.parent.resolve() / path.name


def file_digest(path: Path) -> str:
    """16 hex digits of a file's content, wherever it lies."""
    status = path.stat()
    return _digest_of(path.absolute(), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _digest_of(path: Path, size: int, mtime_ns: int) -> str:  # noqa: ARG001  (a file that changed is read again)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def weights_digest(backbone: nn.Module) -> str:
    """16 hex digits that change when any weight or buffer does."""
    digest = hashlib.sha256()
    for key, value in sorted(backbone.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- making the empty model


def _empty(timm_name: str, seed: int, drop_path: float = 0.0) -> tuple[nn.Module, BackboneInfo]:
    if not timm.is_model(timm_name):
        raise UsageError(f"--backbone {timm_name}: timm has no such model{_nearest_model(timm_name)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        depth: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
        try:  # ViTs take any view size, with position embeddings interpolated on the fly and stored on their own grid
            backbone: nn.Module = timm.create_model(
                timm_name, pretrained=False, num_classes=0, dynamic_img_size=True, **depth
            )
        except TypeError:
            try:
                backbone = timm.create_model(timm_name, pretrained=False, num_classes=0, **depth)
            except TypeError:  # knows no stochastic depth
                backbone = timm.create_model(timm_name, pretrained=False, num_classes=0)
    config = _timm_config(backbone)
    info = BackboneInfo(
        timm_name=timm_name,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        feature_dim=cast(int, getattr(backbone, "head_hidden_size", None) or backbone.num_features),
        input_px=int(config["input_size"][-1]),
    )
    return backbone, info


def _timm_config(backbone: nn.Module) -> dict[str, Any]:
    return cast(dict[str, Any], backbone.pretrained_cfg)


# ---- the hub


def _cached_by_timm(backbone: nn.Module) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    repo_id = _timm_config(backbone).get("hf_hub_id")
    for name in ("model.safetensors", "pytorch_model.bin"):
        found = try_to_load_from_cache(repo_id, name) if repo_id else None
        if isinstance(found, str):
            return Path(found)
    return None


def _require_hub(timm_name: str, backbone: nn.Module) -> None:
    """Ask once whether the hub can be reached: its client would retry for most of a minute before it says no."""
    from huggingface_hub import constants

    if not _timm_config(backbone).get("hf_hub_id") and not _timm_config(backbone).get("url"):
        raise WeightsError(
            f"{timm_name}: timm has no pretrained weights for it; pass --weights FILE, or --weights random"
        )
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return
    host = urlsplit(constants.ENDPOINT).hostname or ""
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        socket.create_connection((host, 443), timeout=5).close()
    except OSError as error:
        raise WeightsError(
            f"ImageNet weights of {timm_name} are not in timm's cache and {host} cannot be reached ({error}). "
            "Three ways out: copy a weights file here and pass --weights FILE; set HF_HOME to a cache copied from a "
            "machine with internet; or go without them (pretrain: --weights random; finetune: no imagenet in --starts)"
        ) from error


# ---- reading weights


def _load_into(backbone: nn.Module, path: Path) -> dict[str, Any]:
    """Fill every key of `backbone` from `path`, or raise a WeightsError that names what does not fit."""
    found = fitted(read_weights(path), backbone, path)
    backbone.load_state_dict(found.state)
    told: dict[str, Any] = {
        "start_weights": str(from_anywhere(path)),
        "keys_loaded": sum(not key.endswith("num_batches_tracked") for key in found.state),
        "keys_dropped": found.dropped,
        "notes": found.notes,
    }
    if found.mask_token is not None:
        cast(Any, backbone).given_mask_token = found.mask_token
        told["mask_token"] = True
    return told


def weights_told(info: BackboneInfo, masks: bool) -> str:
    """Where weights come from, that every key was filled, how, and what else of the file was (not) taken.

    `masks`: whether the mask token that a file may bring is used.
    """
    begun = info.provenance.get("start_weights", "")
    if "keys_loaded" not in info.provenance:
        return f"start: {begun}"
    brought = info.provenance.get("mask_token", False)
    also = " and its mask token" if brought and masks else ""
    dropped = Counter(key.partition(".")[0] for key in info.provenance["keys_dropped"])
    if brought and not masks:
        dropped["mask_token"] = 1
    names = [f"{name} ({keys} keys)" if keys > 1 else name for name, keys in dropped.items()]
    rest = [*info.provenance.get("notes", ()), *([f"left out: {', '.join(names)}"] if names else [])]
    keys = f"all {info.provenance['keys_loaded']} keys of the backbone{also} loaded"
    return "; ".join([f"start: {begun}, {keys}", *rest])


@functools.lru_cache(maxsize=64)
def _say_once(text: str) -> None:
    console.say(text)


def report_weights(info: BackboneInfo) -> None:
    """Print once how a weights file of other makers was read; histossl's own files are read as they are."""
    if "keys_loaded" in info.provenance:
        _say_once(weights_told(info, masks=False))
