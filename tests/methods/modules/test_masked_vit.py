"""A ViT as tokens: what comes out is timm's own, at any size; masked patches are not seen."""

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from histossl.core.errors import UsageError
from histossl.methods import classes_of
from histossl.methods.modules.masked_vit import Tokens, patch_px
from histossl.views.recipe import recipe_named

NAMES = ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch14_dinov2", "deit_tiny_patch16_224"]


def vit(name: str = "vit_tiny_patch16_224") -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0, dynamic_img_size=True, depth=2).eval()


def images(side_px: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, side_px, side_px, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_pooled_feature_is_the_backbone_s_and_patches_are_its_grid(name: str) -> None:
    network = vit(name)
    tokens = Tokens(network, "dinov2")
    side = 4 * patch_px(network)
    with torch.no_grad():
        seen = tokens(images(side))
        torch.testing.assert_close(seen.pooled_BD, network(images(side)))
    assert seen.patches_BND.shape[1] == 16


def test_small_crops_of_patch_14_are_seven_by_seven() -> None:
    assert Tokens(vit(NAMES[1]), "dinov2")(images(98)).patches_BND.shape[1] == 49


def test_what_lies_under_a_mask_is_not_seen() -> None:
    tokens = Tokens(vit(), "ibot").eval()
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 5] = True  # second row, second column
    first, second = images(64), images(64)
    second[0, :, 16:32, 16:32] = 9.0
    with torch.no_grad():
        for a, b in zip(tokens(first, mask), tokens(second, mask), strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(tokens(first).pooled_BD, tokens(second).pooled_BD)


def test_mask_token_has_a_gradient_if_and_only_if_something_is_masked() -> None:
    tokens = Tokens(vit(), "ibot")
    mask = torch.zeros(2, 16, dtype=torch.bool)
    for masked in (False, True):
        mask[0, 3] = masked
        tokens.zero_grad()
        tokens(images(64), mask).pooled_BD[:, 0].sum().backward()
        assert bool(tokens.mask_token.grad.abs().sum() > 0) is masked


def test_position_grid_is_its_own_at_its_own_size_and_bicubic_at_another() -> None:
    network = vit(NAMES[1])
    grid = network.pos_embed.detach()
    assert resample_abs_pos_embed(grid, [37, 37], num_prefix_tokens=0) is grid
    ours = resample_abs_pos_embed(grid, [16, 16], num_prefix_tokens=0)
    square = grid.view(1, 37, 37, -1).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(square, (16, 16), mode="bicubic", antialias=True)
    torch.testing.assert_close(ours, theirs.permute(0, 2, 3, 1).reshape(1, 256, -1), rtol=1e-4, atol=1e-6)


def test_a_cnn_is_refused_with_what_to_take() -> None:
    with pytest.raises(UsageError, match=r"--method ibot: .*ResNet has none.*--backbone vit_small"):
        Tokens(timm.create_model("resnet10t", num_classes=0), "ibot")


@pytest.mark.parametrize("name", ["ibot", "dinov2"])
def test_a_backbone_without_patches_is_refused_by_the_name_of_the_method(name: str) -> None:
    method_class, config = classes_of(name)
    with pytest.raises(UsageError, match=f"--method {name}: learns from masked patch tokens"):
        method_class(
            timm.create_model("resnet10t", num_classes=0), 512, recipe_named("dino", 64), config(prototypes=16)
        )
