"""Weights as they are published, under other names and in other boxes, become timm's; what is not taken is told."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from histossl.backbones.loading import create_backbone, weights_told
from histossl.core.errors import UsageError
from histossl.methods.modules.masked_vit import Tokens

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return timm.create_model(NAME, num_classes=0).state_dict()


def loaded(tmp_path: Path, content: dict[str, Any], state: dict[str, Tensor]) -> tuple[Tokens, list[str]]:
    """Tokens of the weights as they come out of a file, all equal to `state`, and what of the file was left out."""
    torch.save(content, tmp_path / "weights.pth")
    backbone, info = create_backbone(NAME, tmp_path / "weights.pth")
    assert info.provenance["keys_loaded"] == len(state)
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, state[key]), key
    return Tokens(backbone, "ibot"), info.provenance["keys_dropped"]


def inside(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def in_chunks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's names with block_chunks=4: blocks.CHUNK.BLOCK."""
    renamed = {}
    for key, value in state.items():
        parts = key.split(".")
        chunk = [str(int(parts[1]) // 3)] if parts[0] == "blocks" else []
        renamed[".".join([parts[0], *chunk, *parts[1:]])] = value
    return renamed


@pytest.mark.parametrize("name", ["masked_embed", "mask_token"])
def test_a_mask_token_that_the_weights_bring_is_taken(name: str, tmp_path: Path, state: dict[str, Tensor]) -> None:
    token = torch.randn(1, 192)
    tokens, _ = loaded(tmp_path, {"teacher": inside("backbone.", {**state, name: token})}, state)
    assert torch.equal(tokens.mask_token, token)
    tokens, _ = loaded(tmp_path, state, state)
    assert not tokens.mask_token.any()


def test_blocks_in_chunks_are_the_blocks(tmp_path: Path, state: dict[str, Tensor]) -> None:
    teacher = {**inside("backbone.", in_chunks(state)), "dino_head.mlp.0.weight": torch.zeros(2, 2)}
    _, dropped = loaded(tmp_path, {"teacher": teacher}, state)
    assert dropped == ["dino_head.mlp.0.weight"]


def test_a_whole_checkpoint_with_its_arguments_is_read(tmp_path: Path, state: dict[str, Tensor]) -> None:
    content = {"student": {"head.x": torch.zeros(1)}, "teacher": inside("backbone.", state), "args": Namespace(lr=1.0)}
    loaded(tmp_path, content, state)


def test_what_lay_beside_the_weights_is_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    moco = {**inside("module.encoder_q.", state), **inside("module.encoder_k.", state), "module.queue": torch.zeros(2)}
    _, dropped = loaded(tmp_path, {"state_dict": moco}, state)
    assert sorted(dropped) == sorted([*inside("encoder_k.", state), "queue"])


def test_a_run_says_in_a_line_what_it_left_out(tmp_path: Path, state: dict[str, Tensor]) -> None:
    teacher = {**inside("backbone.", {**state, "mask_token": torch.ones(1, 192)}), "head.w": torch.ones(1)}
    torch.save({"teacher": {**teacher, "head.b": torch.ones(1)}}, tmp_path / "weights.pth")
    _, info = create_backbone(NAME, tmp_path / "weights.pth")
    said = weights_told(info, masks=True)
    assert "all 150 keys of the backbone and its mask token loaded; taken from 'teacher' 'backbone.' of" in said
    assert said.endswith("; left out: head (2 keys)")
    assert weights_told(info, masks=False).endswith("; left out: head (2 keys), mask_token")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("deit_tinny", "deit_tiny_patch16_224"),
        ("resnet5", "resnet50"),
        ("vit_smal_patch16", "vit_small_patch16_224"),
        ("convnext-tiny", "convnext_tiny"),
    ],
)
def test_a_mistyped_backbone_is_met_with_the_one_that_begins_most_like_it(typed: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{meant}'"):
        create_backbone(typed, "random")


def test_a_name_like_none_of_timms_gets_no_advice() -> None:
    with pytest.raises(UsageError) as refused:
        create_backbone("qqqqqqqq", "random")
    assert "did you mean" not in str(refused.value)
