"""A backbone that keeps the first layer of its pretraining head: saved, loaded, finetuned, and timm's file still."""

from pathlib import Path

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay

from histossl.backbones.loading import Projected, create_backbone, load_backbone, save_backbone, weights_digest
from histossl.core.errors import WeightsError
from histossl.methods.simclrv2 import SimCLRv2, SimCLRv2Config
from histossl.views.recipe import recipe_named


def made(name: str, layers: int = 1) -> tuple[SimCLRv2, Projected, object]:
    """A method whose norms have seen something, and what it would export."""
    backbone, info = create_backbone(name, "random", 1)
    config = SimCLRv2Config(finetune_from_layer=layers)
    method = SimCLRv2(backbone, info.feature_dim, recipe_named("simclr", 32), config).train()
    method.head(method.backbone(torch.randn(8, 3, 32, 32)))
    projection = method.projection()
    assert projection is not None
    return method.eval(), Projected(method.backbone, projection).eval(), info


@pytest.mark.parametrize(("name", "layers"), [("test_resnet", 1), ("test_vit", 2)])
def test_saved_and_loaded_features_are_the_head_s_middle_layer(tmp_path: Path, name: str, layers: int) -> None:
    method, projected, info = made(name, layers)
    path = tmp_path / "backbone.safetensors"
    save_backbone(path, projected, info)
    again, told = load_backbone(path)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        middle = method.head[: 3 * layers](method.backbone(x))
        features = again.eval()(x)
    torch.testing.assert_close(features, middle)
    assert told.feature_dim == features.shape[1] == projected.feature_dim
    assert weights_digest(again) == weights_digest(projected)
    plain = (
        timm.create_model(name, checkpoint_path=str(path), num_classes=0, dynamic_img_size=True)
        if (name == "test_vit")
        else timm.create_model(name, checkpoint_path=str(path), num_classes=0)
    )
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(x), method.backbone(x))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_its_layers_learn_as_the_backbone_s_last_group(name: str) -> None:
    _, projected, _ = made(name)
    inner = projected.backbone
    for coarse in (False, True):
        own = group_parameters(inner, inner.group_matcher(coarse=coarse), reverse=True)
        ours = group_parameters(projected, projected.group_matcher(coarse=coarse), reverse=True)
        last = max(own.values())
        for key, group in ours.items():
            assert group == own.get(key.removeprefix("backbone."), last), key
    scale_of = {
        id(parameter): group["lr_scale"]
        for group in param_groups_layer_decay(projected, layer_decay=0.5)
        for parameter in group["params"]
    }
    assert scale_of[id(projected.projection[0].weight)] == 1
    assert len(scale_of) == len(list(projected.parameters()))
    assert min(scale_of.values()) < 0.5


def test_a_plain_backbone_leaves_no_second_file(tmp_path: Path) -> None:
    backbone, info = create_backbone("test_resnet", "random")
    save_backbone(tmp_path / "b.safetensors", backbone, info)
    assert load_backbone(tmp_path / "b.safetensors")[1].projection is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json", "b.safetensors"]


def test_a_second_file_that_is_missing_or_does_not_fit_is_named(tmp_path: Path) -> None:
    _, projected, info = made("test_resnet")
    path = tmp_path / "backbone.safetensors"
    save_backbone(path, projected, info)
    behind = tmp_path / "backbone.projection.safetensors"
    behind.unlink()
    with pytest.raises(WeightsError, match=r"backbone\.projection\.safetensors"):
        load_backbone(path)
    behind.write_bytes(path.read_bytes())
    with pytest.raises(WeightsError, match="holds no layers that fit"):
        load_backbone(path)
