"""A weights file is judged by its content, and what a loader changes is reported, or refused."""

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save
from torch import Tensor

from histossl.backbones.loading import create_backbone, load_backbone, save_backbone, weights_told
from histossl.backbones.weight_files import read_weights
from histossl.core.errors import WeightsError

SMALL = "test_vit"  # patches of 16 px, 160 px views
CNN = "resnet10t"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return timm.create_model(SMALL, num_classes=0).state_dict()


def torch_bytes(content: object, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def said_of(path: Path, name: str = SMALL) -> str:
    with pytest.raises(WeightsError) as refused:
        create_backbone(name, path)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", ["w.safetensors", "w.SAFETENSORS", "w.bin", "w.pth", "w", "w.pt.txt"])
@pytest.mark.parametrize("kind", ["safetensors", "torch", "legacy torch"])
def test_the_name_of_a_file_says_nothing_about_its_content(tmp_path: Path, state, name: str, kind: str) -> None:
    content = save(dict(state)) if kind == "safetensors" else torch_bytes(dict(state), zipped=kind == "torch")
    (tmp_path / name).write_bytes(content)
    found = read_weights(tmp_path / name)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


def packed_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))
    return buffer.getvalue()


def packed_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("weights.npy", b"1")
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty (0 bytes)"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"<html>404", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 100\n", "git lfs pull"),
        (b"Entry not found", "text file"),
        (b'{"weight_map": {}}', "text file"),
        (gzip.compress(bytes(1000)), "packed (gzip)"),
        (packed_tar(), "tar archive"),
        (packed_zip(), "holds weights.npy"),
        (b"\x89HDF\r\n\x1a\n" + bytes(600), "HDF5"),
        (bytes(range(128, 256)) * 8, "is no weights file"),
    ],
)
def test_what_is_taken_for_weights_is_named_for_what_it_is(
    tmp_path: Path, suffix: str, content: bytes, said: str
) -> None:
    (tmp_path / f"w{suffix}").write_bytes(content)
    assert said in said_of(tmp_path / f"w{suffix}")


def test_a_torchscript_program_is_refused_as_one(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        for name in ("w/data.pkl", "w/constants.pkl", "w/code/__torch__.py"):
            archive.writestr(name, b"x")
    assert "TorchScript" in said_of(tmp_path / "w.pt")


def test_pickled_code_is_still_refused_whatever_the_name(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self):
            return print, ("run",)

    (tmp_path / "w.safetensors").write_bytes(torch_bytes({"a": Code()}))
    assert "pickled code" in said_of(tmp_path / "w.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("name", "key"), [(SMALL, "blocks.1.attn.qkv.weight"), (CNN, "layer2.0.bn1.running_var")])
def test_values_that_are_no_numbers_are_refused_by_the_name_of_their_tensor(
    tmp_path: Path, name: str, key: str, value: float
) -> None:
    spoilt = timm.create_model(name, num_classes=0).state_dict()
    spoilt[key].view(-1)[3] = value
    torch.save(spoilt, tmp_path / "w.pth")
    told = said_of(tmp_path / "w.pth", name)
    assert f"1 of {spoilt[key].numel():,} in {key}" in told
    assert "--lr" not in told


def test_a_backbone_of_histossl_with_nan_is_refused_too(tmp_path: Path) -> None:
    backbone, info = create_backbone(SMALL, "random")
    with torch.no_grad():
        next(iter(backbone.parameters())).fill_(float("nan"))
    save_backbone(tmp_path / "backbone.safetensors", backbone, info)
    with pytest.raises(WeightsError, match="no finite numbers"):
        load_backbone(tmp_path / "backbone.safetensors")


@pytest.mark.parametrize("wrapped", [False, True])
def test_another_patch_size_is_refused_and_both_are_named(tmp_path: Path, state, wrapped: bool) -> None:
    other = {**state, "patch_embed.proj.weight": torch.randn(64, 3, 8, 8)}
    torch.save(
        {"teacher": {f"backbone.{key}": value for key, value in other.items()}} if wrapped else other,
        tmp_path / "w.pth",
    )
    assert "patches of 8 px, test_vit of 16" in said_of(tmp_path / "w.pth")
    larger = {**other, "pos_embed": torch.randn(1, 1 + 400, 64)}  # as such a model of 160 px has
    torch.save(larger, tmp_path / "w.pth")
    assert "patches of 8 px" in said_of(tmp_path / "w.pth")


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(("name", "key"), [(SMALL, "patch_embed.proj.weight"), (CNN, "conv1.0.weight")])
def test_other_input_channels_are_refused(tmp_path: Path, name: str, key: str, channels: int) -> None:
    other = timm.create_model(name, num_classes=0).state_dict()
    other[key] = other[key][:, :1].repeat(1, channels, 1, 1)
    torch.save(other, tmp_path / "w.pth")
    assert f"{key} {tuple(other[key].shape)}" in said_of(tmp_path / "w.pth", name)


def _without(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if part not in key}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: _without(state, "cls_token"), "1 keys missing (cls_token)"),
        (lambda state: {**state, "reg_token": torch.zeros(1, 4, 64)}, "1 not known (reg_token)"),
        (lambda state: _without(state, "blocks.5."), "keys missing (blocks.5."),
        (lambda state: {**state, "blocks.6.norm1.weight": torch.ones(64)}, "not known (blocks.6.norm1.weight)"),
        (lambda state: _without(state, "qkv.bias"), "6 keys missing (blocks.0.attn.qkv.bias"),
        (lambda state: {**state, "blocks.0.ls3.gamma": torch.ones(64)}, "not known (blocks.0.ls3.gamma)"),
        (lambda state: {**state, "norm.weight": torch.ones(32)}, "norm.weight (32,) instead of (64,)"),
        (lambda state: {**state, "norm.weight": torch.ones(64, dtype=torch.int8)}, "norm.weight is int8"),
    ],
)
def test_a_file_of_another_shape_is_refused_and_its_keys_are_named(tmp_path: Path, state, change, named: str) -> None:
    torch.save(change(dict(state)), tmp_path / "w.pth")
    assert named in said_of(tmp_path / "w.pth")


@pytest.mark.parametrize("part", ["running_mean", "running_var"])
def test_batchnorm_without_its_statistics_is_refused(tmp_path: Path, part: str) -> None:
    state = timm.create_model(CNN, num_classes=0).state_dict()
    torch.save(_without(state, part), tmp_path / "w.pth")
    assert "keys missing" in said_of(tmp_path / "w.pth", CNN)


def test_position_embeddings_of_another_grid_are_reported_with_both(tmp_path: Path, state) -> None:
    torch.save({**state, "pos_embed": torch.randn(1, 1 + 14 * 14, 64)}, tmp_path / "w.pth")
    _, info = create_backbone(SMALL, tmp_path / "w.pth")
    assert "pos_embed interpolated from 14x14 to 10x10 places" in weights_told(info, masks=False)


def test_weights_that_fit_as_they_are_get_no_note(tmp_path: Path, state) -> None:
    torch.save(state, tmp_path / "w.pth")
    backbone, info = create_backbone(SMALL, tmp_path / "w.pth")
    assert info.provenance["notes"] == []
    assert all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items())


def test_which_of_several_networks_was_taken_is_reported(tmp_path: Path, state) -> None:
    both = {
        "student": {f"module.backbone.{k}": v + 1 for k, v in state.items()},
        "teacher": {f"backbone.{k}": v for k, v in state.items()},
        "epoch": 99,
    }
    torch.save(both, tmp_path / "w.pth")
    backbone, info = create_backbone(SMALL, tmp_path / "w.pth")
    assert torch.equal(backbone.state_dict()["cls_token"], state["cls_token"])
    said = weights_told(info, masks=False)
    assert "taken from 'teacher' 'backbone.' of the file" in said
    assert f"left out: student ({len(state)} keys)" in said
    flat = {f"{who}.{k}": v for who, values in both.items() if who != "epoch" for k, v in values.items()}
    torch.save(flat, tmp_path / "flat.pth")
    backbone, info = create_backbone(SMALL, tmp_path / "flat.pth")
    assert torch.equal(backbone.state_dict()["cls_token"], state["cls_token"])
    assert "taken from 'teacher.' 'backbone.'" in weights_told(info, masks=False)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_another_precision_is_reported(tmp_path: Path, state, kind: torch.dtype) -> None:
    torch.save({key: value.to(kind) for key, value in state.items()}, tmp_path / "w.pth")
    backbone, info = create_backbone(SMALL, tmp_path / "w.pth")
    assert {value.dtype for value in backbone.parameters()} == {torch.float32}
    assert f"{str(kind)[6:]} values converted to float32" in weights_told(info, masks=False)


def test_keys_that_timm_renames_are_counted(tmp_path: Path) -> None:
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    chunked = {key.replace("blocks.", "blocks.0.") if key.startswith("blocks.") else key: v for key, v in state.items()}
    torch.save(chunked, tmp_path / "w.pth")
    _, info = create_backbone("vit_tiny_patch16_224", tmp_path / "w.pth")
    renamed = sum(key.startswith("blocks.") for key in state)
    assert f"{renamed} keys renamed to timm's (blocks.0.norm1.weight" in weights_told(info, masks=False)
