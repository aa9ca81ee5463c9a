"""Read a weights file for what it is, and make its tensors those of a timm model, or say what does not fit.

A file is judged by its content, never by its name. Nothing in it is run: safetensors, or torch with `weights_only`.
What is renamed, left out, converted or resized on the way is reported; what would make another model of it is refused.
"""

from __future__ import annotations

import errno
import pickle
import re
import sys
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from histossl.core.errors import WeightsError

# Where checkpoints of the field keep the part that we want, outermost first.
WRAPPERS = ("state_dict", "model", "teacher", "student", "model_ema")
PREFIXES = ("module.", "teacher.", "student.", "encoder_q.", "base_encoder.", "backbone.", "_orig_mod.")
MASK_TOKENS = ("mask_token", "masked_embed")  # DINOv2's name, iBOT's
IN_CHUNKS = re.compile(r"^blocks\.\d+\.(?=\d+\.)")  # DINOv2's blocks.CHUNK.BLOCK., blocks counted through all chunks
# What torch and safetensors raise on files that are something else, or half of something.
UNREADABLE = (
    OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, SafetensorError,
    zipfile.BadZipFile,
)  # fmt: skip
GIVE = "give a .safetensors file, or what torch.save wrote of a state_dict"
NO_WEIGHTS = f"is no weights file, or is truncated; {GIVE}"
SAFETENSORS_HEADER = 100_000_000  # bytes at most, by its specification


# ---- the file


def read_weights(path: Path) -> Mapping[str, Any]:
    """The content of a weights file, without running any code in it. WeightsError says what the file is instead."""
    try:
        head, size = _head(path)
        if _is_safetensors(head):
            return load_file(str(path))
        if other := _what_else(head, size) or _other_zip(path, head):
            raise WeightsError(f"{path}: {other}")
        # DINO's and iBOT's checkpoints hold their arguments. The open file, since torch, too, goes by a path's suffix.
        with torch.serialization.safe_globals([Namespace]), path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bytes that happen to look like a pickle: what comes of it says more
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: refused, it is not a plain set of tensors (pickled code or not a torch file); "
            "save its state_dict alone, or convert it to safetensors"
        ) from error
    except UNREADABLE as error:
        # EINVAL is torch's, which looks for more of a short zip than there is.
        if isinstance(error, OSError) and error.strerror and error.errno != errno.EINVAL:
            raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error
        raise WeightsError(f"{path}: {NO_WEIGHTS}") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content


def _head(path: Path) -> tuple[bytes, int]:
    with path.open("rb") as file:
        return file.read(512), path.stat().st_size


def _is_safetensors(head: bytes) -> bool:
    """Eight bytes with the length of a JSON header, and the header's brace."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= SAFETENSORS_HEADER


PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7-Zip",
    b"Rar!": "RAR",
}


def _what_else(head: bytes, size: int) -> str:
    """What a file is that is often taken for weights; empty if it may be torch's."""
    if not size:
        return "is empty (0 bytes), as a download or a copy leaves it that broke off; fetch it again"
    for magic, kind in PACKED.items():
        if head.startswith(magic):
            return f"is packed ({kind}); unpack it first"
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it, and give the weights file in it"
    if head.startswith(b"\x89HDF"):
        return "is HDF5, as Keras saves weights; convert it to safetensors with timm's names"
    if head.startswith(b"version https://git-lfs"):
        return "is git-lfs's stand-in for the weights, not the weights; fetch them with `git lfs pull`"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, not weights (a login or an error page was saved under this name); download it again"
    if head.isascii() and all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        return f"is a text file, not weights; {GIVE}"
    zip_or_pickle = head.startswith(b"PK") or (head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"))
    return "" if zip_or_pickle else NO_WEIGHTS


def _other_zip(path: Path, head: bytes) -> str:
    """What a whole zip holds in place of a state dict. torch.save writes zips, too, with a data.pkl in them."""
    if not head.startswith(b"PK\x03\x04") or not zipfile.is_zipfile(path):
        return ""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        return "is a TorchScript program; save the state_dict of the model it was made of"
    if "data.pkl" not in inner:
        return f"is a zip archive, but not one of torch.save (it holds {', '.join(names[:3]) or 'nothing'})"
    return ""


# ---- its tensors, under the names of a timm model


@dataclass(frozen=True)
class Fitted:
    """All tensors of a model, and what a person should know of how the file was read, a line each."""

    state: dict[str, Tensor]
    dropped: list[str]  # keys of the file that are no part of the backbone
    notes: list[str] = field(default_factory=list)
    mask_token: Tensor | None = None


def fitted(content: Mapping[str, Any], backbone: nn.Module, path: Path) -> Fitted:
    """The tensors of a file as `backbone` names them, each of its keys. WeightsError names what does not fit.

    Nothing is loaded in part, resized to another patch, padded, or not finite.
    """
    architecture = _config_of(backbone).get("architecture")
    given, dropped, notes = _unwrapped(content)
    own = backbone.state_dict()
    brought = [given[name] for name in MASK_TOKENS if name in given and name not in own]
    given.pop("masked_embed", None)  # mask_token stays until timm has known by it whose names these are
    adapted = _adapted(given, backbone)
    if brought:
        adapted.pop("mask_token", None)
    wanted = {key: value for key, value in own.items() if not key.endswith("num_batches_tracked")}
    classifier = _config_of(backbone).get("classifier") or ()
    classifier = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    heads = [key for key in adapted if key.startswith(tuple(f"{name}." for name in classifier)) and key not in wanted]
    unexpected = [
        key for key in adapted if key not in wanted and key not in heads and not key.endswith("num_batches_tracked")
    ]
    _refuse_unfit(path, architecture, wanted, adapted, unexpected)
    notes += _resized(path, architecture, given, adapted, wanted)
    taken = {key: adapted[key] for key in wanted} | dict(zip(("mask_token",), brought, strict=False))
    _refuse_values(path, taken)
    notes += _renamed_and_converted(given, adapted, wanted)
    state = {key: adapted.get(key, value) for key, value in own.items()}
    return Fitted(state, [*dropped, *heads], notes, brought[0].flatten() if brought else None)


def refuse_non_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A file with NaN or infinite values was damaged or made by a run that diverged: nothing can come of it."""
    wrong = [key for key, value in tensors.items() if not bool(torch.isfinite(value).all())]
    if wrong:
        count = int((~torch.isfinite(tensors[wrong[0]])).sum())
        more = f" and {len(wrong) - 1:,} more tensors" if len(wrong) > 1 else ""
        raise WeightsError(
            f"{path}: holds values that are no finite numbers: {count:,} of {tensors[wrong[0]].numel():,} in "
            f"{wrong[0]}{more}. It comes from a run that diverged, or is damaged; give another file"
        )


def _refuse_values(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for key, value in tensors.items():
        if not value.is_floating_point() or value.is_sparse:
            kind = "sparse" if value.is_sparse else str(value.dtype).removeprefix("torch.")
            raise WeightsError(f"{path}: {key} is {kind}; quantised or packed weights cannot be trained on")
    refuse_non_finite(path, tensors)


def _refuse_unfit(
    path: Path, architecture: object, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], unexpected: list[str]
) -> None:
    missing = [key for key in wanted if key not in given]
    misshapen = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in given and given[key].shape != value.shape
    ]
    if not (missing or unexpected or misshapen):
        return
    parts = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for keys, what in ((missing, "keys missing"), (unexpected, "not known"), (misshapen, "of another shape"))
        if keys
    ]
    raise WeightsError(
        f"{path}: does not fit {architecture}: {'; '.join(parts)}; "
        f"{len(wanted) - len(missing) - len(misshapen)} of {len(wanted)} keys fit. Is --backbone the right one?"
    )


def _resized(
    path: Path,
    architecture: object,
    given: Mapping[str, Tensor],
    adapted: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
) -> list[str]:
    """What timm resampled to make it fit: of position embeddings it is reported, of anything else refused.

    A resized tensor has other values than any of the file's, and another number of them. Tensors that were only
    renamed, reshaped, split or joined (qkv) are not resized.
    """
    kept = {value.untyped_storage().data_ptr() for value in adapted.values()}
    lost = {key: value for key, value in given.items() if value.untyped_storage().data_ptr() not in kept}
    notes = []
    for key, value in wanted.items():
        if adapted[key].untyped_storage().data_ptr() in {each.untyped_storage().data_ptr() for each in given.values()}:
            continue
        source = _source_of(key, value, lost)
        if source is None or lost[source].numel() == value.numel():
            continue
        before, after = tuple(lost[source].shape), tuple(value.shape)
        if not any(name in key for name in ("pos_embed", "rel_pos", "relative_position")):
            patches = "patch_embed" in key and len(before) == len(after) == 4
            what = f"patches of {before[-1]} px, {architecture} of {after[-1]}" if patches else f"{key} {before}"
            raise WeightsError(
                f"{path}: has {what}, and would be resampled into another model than the one that was trained; "
                f"is --backbone the right one? ({key} {before} instead of {after})"
            )
        notes.append(f"{key} interpolated from {_grid(before)} to {_grid(after)} places")
    return notes


def _source_of(key: str, value: Tensor, lost: Mapping[str, Tensor]) -> str | None:
    """Of the tensors that are not used as they are, the one that `key` was made of."""
    if key in lost:
        return key
    role = [each for each in lost if each.endswith(key)]
    if not role and "patch_embed" in key:  # under another name: CLIP's conv1, AIMv2's patchifier
        role = [each for each, one in lost.items() if one.ndim == value.ndim == 4 and len(one) == len(value)]
    if not role and key == "pos_embed":
        role = [each for each, one in lost.items() if "pos" in each and one.shape[-1] == value.shape[-1]]
    return role[0] if role else None


def _grid(shape: Sequence[int]) -> str:
    """1 + 14 x 14 tokens of a ViT as 14x14; other tables by their shape."""
    if len(shape) in (2, 3):
        tokens = shape[-2]
        for prefix in range(6):  # class and register tokens
            side = round((tokens - prefix) ** 0.5)
            if side > 1 and side * side == tokens - prefix:
                return f"{side}x{side}"
    return "x".join(map(str, shape))


def _renamed_and_converted(
    given: Mapping[str, Tensor], adapted: Mapping[str, Tensor], wanted: Iterable[str]
) -> list[str]:
    wanted = list(wanted)
    renamed = [key for key in wanted if key not in given]
    notes = [f"{len(renamed)} keys renamed to timm's ({', '.join(renamed[:2])}, ...)"] if renamed else []
    kinds = sorted({str(adapted[key].dtype).removeprefix("torch.") for key in wanted} - {"float32"})
    return notes + ([f"{', '.join(kinds)} values converted to float32"] if kinds else [])


def _unwrapped(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Down to the tensors: through {'state_dict': ...} and the like, and off prefixes like 'encoder_q.'.

    With the names of those that lay beside the ones taken: heads, queues, momentum encoders; and what was chosen.
    """
    beside: list[str] = []
    way: list[str] = []
    for _ in range(len(WRAPPERS)):
        inner = [name for name in WRAPPERS if isinstance(content.get(name), Mapping)]
        if not inner:
            break
        way.append(f"'{inner[0]}'")
        beside += [f"{name}.{key}" for name in inner[1:] for key in content[name]]
        content = content[inner[0]]
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    for prefix in PREFIXES * 2:
        inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if inside:
            way.append(f"'{prefix}'")
            beside += [key for key in tensors if not key.startswith(prefix)]
            tensors = inside
    return tensors, beside, [f"taken from {' '.join(way)} of the file"] if way else []


def _adapted(given: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Foreign key names (torchvision, DINOv2's hub, ...) and position grids made timm's own, by timm."""
    wanted = backbone.state_dict()
    if not any(IN_CHUNKS.match(key) for key in wanted):
        given = {IN_CHUNKS.sub("blocks.", key): value for key, value in given.items()}
    if given.keys() >= wanted.keys() and all(given[key].shape == value.shape for key, value in wanted.items()):
        return given
    filter_of_timm = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if filter_of_timm is None:
        return given
    try:
        return dict(filter_of_timm(dict(given), backbone))
    except (KeyError, ValueError, RuntimeError, AssertionError, IndexError, AttributeError):
        return given  # timm could make nothing of it; the key check that follows says what does not fit


def _config_of(backbone: nn.Module) -> dict[str, Any]:
    config: dict[str, Any] = backbone.pretrained_cfg  # type: ignore[assignment]
    return config
