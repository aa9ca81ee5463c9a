"""Colour as one matrix, stain in optical density, against torchvision's ops and closed forms."""

import itertools

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as TF

from histossl.views import colour

LEVEL = 1 / 255


def tissue(count=4, side=32, low=0.3, high=0.7, seed=0):
    """Mid-tone colours: no op below pushes one past black or white, where torchvision clamps after each op."""
    return low + (high - low) * torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def jittered(x, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0):
    factors = (np.full(len(x), value) for value in (brightness, contrast, saturation, hue))
    matrices = colour.jitter_matrices(*factors)
    return colour.recoloured(x, torch.from_numpy(matrices).float())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"brightness": 0.7}, lambda x: TF.adjust_brightness(x, 0.7)),
        ({"brightness": 1.3}, lambda x: TF.adjust_brightness(x, 1.3)),
        ({"contrast": 0.6}, lambda x: TF.adjust_contrast(x, 0.6)),
        ({"contrast": 1.4}, lambda x: TF.adjust_contrast(x, 1.4)),
        ({"saturation": 0.6}, lambda x: TF.adjust_saturation(x, 0.6)),
        ({"saturation": 1.3}, lambda x: TF.adjust_saturation(x, 1.3)),
        ({"saturation": 0.0}, lambda x: TF.rgb_to_grayscale(x, 3)),
    ],
)
def test_an_op_is_torchvisions(ours, theirs):
    x = tissue()
    assert (jittered(x, **ours) - theirs(x)).abs().max() < 0.1 * LEVEL


def test_one_matrix_is_torchvisions_ops_in_any_order():
    x = tissue()
    ours = jittered(x, 1.15, 0.7, 1.2)
    ops = (
        lambda x: TF.adjust_brightness(x, 1.15),
        lambda x: TF.adjust_contrast(x, 0.7),
        lambda x: TF.adjust_saturation(x, 1.2),
    )
    for order in itertools.permutations(ops):
        theirs = x
        for op in order:
            theirs = op(theirs)
        assert (ours - theirs).abs().max() < 0.1 * LEVEL
    assert (ours - x).abs().mean() > 5 * LEVEL


def test_the_end_is_clamped_and_nothing_before_it():
    white = torch.ones(1, 3, 8, 8)
    assert jittered(white, brightness=1.4).max() == 1
    # White brightened to 1.4 and pulled half-way to the mean of 1.05 is 1.225; the dark half 0.5 * 0.7 + 0.5 * 1.05.
    half = torch.cat([white, 0.5 * white], 3)
    ours = jittered(half, brightness=1.4, contrast=0.5)
    assert ours[0, 0, 0, 0] == 1
    assert ours[0, 0, 0, -1] == pytest.approx(0.875)


def test_hue_keeps_greys_and_luma_and_turns_stained_tissue_as_torchvisions_does():
    grey = torch.linspace(0, 1, 11).expand(1, 3, 1, 11).contiguous()
    assert (jittered(grey, hue=0.3) - grey).abs().max() < 1e-5
    luma = torch.tensor(colour.LUMA, dtype=torch.float32)
    x = tissue()
    turned = jittered(x, hue=0.05)
    assert (torch.einsum("c,bchw->bhw", luma, turned - x)).abs().max() < 1e-5
    assert (turned - x).abs().mean() > 2 * LEVEL
    pink_and_violet = torch.tensor([[0.85, 0.62, 0.78], [0.48, 0.33, 0.62]]).view(2, 3, 1, 1).expand(-1, -1, 4, 4)
    for hue in (-0.05, 0.05):
        ours, theirs = jittered(pink_and_violet, hue=hue), TF.adjust_hue(pink_and_violet, hue)
        assert (ours - theirs).abs().mean() < 8 * LEVEL
        moves = (ours - pink_and_violet, theirs - pink_and_violet)
        one, other = ((move - TF.rgb_to_grayscale(move, 3))[:, :, 0, 0] for move in moves)
        assert (torch.cosine_similarity(one, other) > 0.75).all()  # the same way round, once luma is taken out


def test_grey_before_the_jitter_is_grey_after_it():
    """What makes one order serve for MoCo v1, which greys first, and v2, which greys last."""
    x = tissue()
    factors = [np.array([value] * 4) for value in (1.2, 0.8, 1.3, 0.1)]
    jitter = colour.jitter_matrices(*factors)
    after = colour.recoloured(x, torch.from_numpy(colour.greyscale(jitter, np.arange(4))).float())
    before = colour.recoloured(TF.rgb_to_grayscale(x, 3), torch.from_numpy(jitter).float())
    assert (after - before).abs().max() < 0.1 * LEVEL
    assert (after - after[:, :1]).abs().max() < 1e-6


def test_only_the_chosen_samples_become_grey():
    matrices = colour.jitter_matrices(*(np.ones(3),) * 3, np.zeros(3))
    grey = colour.recoloured(tissue(3), torch.from_numpy(colour.greyscale(matrices, np.array([1]))).float())
    spread = (grey - grey[:, :1]).abs().amax((1, 2, 3))
    assert spread[1] < 1e-6
    assert spread[[0, 2]].min() > 0.1


# ---- stain


def restained(x, scale=(0, 0, 0), shift=(0, 0, 0)):
    A, b = colour.stain_matrices(*(np.tile(np.array(value, float), (len(x), 1)) for value in (scale, shift)))
    return colour.restained(x.clone(), torch.from_numpy(A).float(), torch.from_numpy(b).float())


def test_no_stain_jitter_is_the_identity_for_every_colour():
    """Where others clamp the stains, colours outside the cone of H, E and DAB change even at sigma 0."""
    values = torch.linspace(0, 1, 18)
    every = torch.cartesian_prod(values, values, values).T.reshape(1, 3, 18, -1)
    assert (restained(every) - every).abs().max() <= LEVEL + 1e-6
    assert (restained(every) - every).abs().mean() < 0.1 * LEVEL


def test_a_shift_of_haematoxylin_moves_log_rgb_by_its_optical_density():
    x = tissue()
    moved = restained(x, shift=(0.2, 0, 0)).log() - x.log()
    for channel, density in enumerate((0.65, 0.70, 0.29)):
        assert moved[:, channel].numpy() == pytest.approx(-0.2 * density, abs=1e-5)


def test_a_scale_multiplies_a_stain_and_leaves_the_others():
    stains = torch.tensor([0.8, 0.5, 0.1])
    mixed = torch.exp(-(stains @ torch.tensor(colour.OD_FROM_HED).float())).view(1, 3, 1, 1)
    wanted = torch.exp(-(stains * torch.tensor([1.0, 1.3, 1.0]) @ torch.tensor(colour.OD_FROM_HED).float()))
    assert restained(mixed, scale=(0, 0.3, 0)).flatten().numpy() == pytest.approx(wanted.numpy(), abs=1e-5)
    assert (restained(torch.ones(1, 3, 2, 2), scale=(0.3, 0.3, 0.3)) == 1).all()  # glass holds no stain


# ---- the rest


def test_solarize_is_torchvisions():
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    theirs = TF.solarize(levels, 128).float() / 255
    assert (colour.solarized(levels.float() / 255, 128 / 255) - theirs).abs().max() < 1e-6
