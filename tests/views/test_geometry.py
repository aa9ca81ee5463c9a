"""One resampling, against torchvision's own crops, turns, rotations and blurs at the same parameters."""

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy import stats
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

from histossl.views import geometry
from histossl.views.geometry import Placement, blurred, matrices, random_boxes, resampled
from histossl.views.rng import Draws

LEVEL = 1 / 255


def texture(count=6, side=64, grain=1, seed=0):
    """Noise, grain pixels coarse: the hardest picture there is for a resampling."""
    small = torch.rand(count, 3, side // grain, side // grain, generator=torch.Generator().manual_seed(seed))
    return small.repeat_interleave(grain, 2).repeat_interleave(grain, 3)


def placed(count, top=0.0, left=0.0, height=64.0, width=64.0, mirror=False, flip=False, turns=0, angle=0.0):
    def many(value, dtype):
        return np.broadcast_to(np.asarray(value, dtype), (count,))

    boxes = (many(value, float) for value in (top, left, height, width))
    return Placement(*boxes, many(mirror, bool), many(flip, bool), many(turns, int), many(angle, float))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size_px", [24, 64, 96])
def test_a_crop_is_torchvisions_antialiased_resized_crop(interpolation, size_px):
    tiles = texture(40)
    boxes = random_boxes(Draws(0, np.arange(40), 0), 64, (0.05, 1.0), (0.75, 4 / 3))
    ours = resampled(tiles, placed(40, *boxes), size_px, interpolation)
    for number, (top, left, height, width) in enumerate(zip(*boxes, strict=True)):
        box = [int(edge) for edge in (top, left, height, width)]
        mode = InterpolationMode(interpolation)
        theirs = TF.resized_crop(tiles[number], *box, [size_px, size_px], mode, antialias=True)
        assert (ours[number] - theirs).abs().mean() < 0.01 * LEVEL
        assert (ours[number] - theirs).abs().max() < LEVEL


def test_a_crop_is_pillows_up_to_its_rounding_to_bytes():
    picture = (texture(1, grain=4)[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    theirs = Image.fromarray(picture).resize((40, 40), Image.Resampling.BILINEAR, box=(5, 3, 60, 61))
    tile = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    ours = resampled(tile, placed(1, 3, 5, 58, 55), 40)[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - np.asarray(theirs) / 255).mean() < LEVEL  # Pillow rounds twice


def test_a_fine_pattern_becomes_grey_when_it_shrinks_and_not_another_pattern():
    checks = ((torch.arange(64)[:, None] + torch.arange(64)) % 2).float().expand(1, 3, 64, 64).contiguous()
    # Not antialiased, sampling each third pixel would give full-contrast checks again.
    assert resampled(checks, placed(1), 24).std() < 0.05
    assert resampled(checks, placed(1, angle=0.3), 24)[..., 6:18, 6:18].std() < 0.05


def test_mirror_flip_and_turns_come_after_the_crop_in_this_order():
    for mirror, flip, turns in itertools.product((False, True), (False, True), range(4)):
        tile = texture(1)
        box = {"top": 5, "left": 20, "height": 30, "width": 40}
        ours = resampled(tile, placed(1, **box, mirror=mirror, flip=flip, turns=turns), 48)[0]
        theirs = TF.resized_crop(tile[0], *box.values(), [48, 48], antialias=True)
        theirs = TF.hflip(theirs) if mirror else theirs
        theirs = TF.vflip(theirs) if flip else theirs
        theirs = torch.rot90(theirs, turns, (1, 2))
        assert (ours - theirs).abs().max() < 1e-5, (mirror, flip, turns)


def test_each_sample_of_a_mixed_batch_is_what_it_is_alone():
    tiles = texture(8)
    mixed = placed(
        8,
        top=np.arange(8),
        height=np.array([56, 20, 33, 41, 9, 50, 56, 12]),
        turns=np.array([0, 1, 2, 3, 0, 1, 2, 3]),
        mirror=np.array([True, False] * 4),
        angle=np.array([0, 0, 0.4, 0, 0, -0.9, 0, 0]),
    )
    together = resampled(tiles, mixed, 32)
    for number in range(8):
        one = slice(number, number + 1)
        assert torch.equal(together[one], resampled(tiles[one], mixed.of(one), 32))


def test_the_matrix_says_where_each_output_pixel_lies():
    """Rows and columns, and the grid that follows the matrix, are two ways to the same picture."""
    tiles = texture(1, grain=2)
    for mirror, flip, turns in itertools.product((False, True), (False, True), range(4)):
        where = placed(1, 8, 4, 40, 48, mirror, flip, turns)
        one, other = geometry._by_rows_and_columns(tiles, where, 64, "bilinear"), geometry._by_grid(tiles, where, 64)
        assert (one - other).abs().max() < 1e-4, (mirror, flip, turns)
    corner = matrices(placed(1, 8, 4, 40, 48), 64)[0] @ [0, 0, 1]
    assert corner == pytest.approx([4, 8])
    corner = matrices(placed(1, 8, 4, 40, 48, turns=1), 64)[0] @ [0, 0, 1]  # turned left: top right comes first
    assert corner == pytest.approx([52, 8])


@pytest.mark.parametrize("degrees", [-120, -20, 7, 45, 90])
def test_a_free_rotation_is_torchvisions(degrees):
    tiles = texture(1, grain=4)
    ours = resampled(tiles, placed(1, angle=math.radians(degrees)), 64)
    theirs = TF.rotate(tiles, degrees, InterpolationMode.BILINEAR)
    y, x = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij")
    inside = (x**2 + y**2) < 30**2  # the corners are black there, mirrored tissue here
    assert (ours - theirs).abs()[..., inside].mean() < LEVEL


def test_boxes_are_distributed_as_torchvisions():
    count, side, scale, ratio = 4000, 96, (0.2, 1.0), (0.75, 4 / 3)
    top, left, height, width = random_boxes(Draws(0, np.arange(count), 0), side, scale, ratio)
    torch.manual_seed(0)
    image = torch.empty(3, side, side)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(count)], dtype=float).T
    for mine, yours in zip((top, left, height, width), theirs, strict=True):
        assert (mine == np.round(mine)).all()
        assert stats.ks_2samp(mine, yours).pvalue > 1e-3
    assert stats.ks_2samp(height * width, theirs[2] * theirs[3]).pvalue > 1e-3
    assert stats.ks_2samp(width / height, theirs[3] / theirs[2]).pvalue > 1e-3
    assert (top >= 0).all()
    assert (top + height <= side).all()
    assert (left + width <= side).all()


@pytest.mark.parametrize("ratio", [(2.0, 2.0), (0.5, 0.5)])
def test_a_crop_that_never_fits_is_torchvisions_middle(ratio):
    ours = random_boxes(Draws(0, np.arange(3), 0), 96, (1.0, 1.0), ratio)
    theirs = RandomResizedCrop.get_params(torch.empty(3, 96, 96), (1.0, 1.0), ratio)
    assert [list(edge) for edge in ours] == [[edge] * 3 for edge in theirs]


def test_blur_is_torchvisions_at_each_samples_own_width():
    x, sigma = texture(5), np.array([0.1, 0.4, 1.0, 2.0, 0.0])
    ours = blurred(x, sigma)
    for number, width in enumerate(sigma[:4]):
        wide = TF.gaussian_blur(x[number], 2 * math.ceil(3 * width) + 1, float(width))
        assert (ours[number] - wide).abs().max() < 1e-5
        as_simclr = TF.gaussian_blur(x[number], 23, float(width))  # a tenth of 224 px
        assert (ours[number] - as_simclr).abs().mean() < 0.1 * LEVEL
    assert torch.equal(ours[4], x[4])


def test_blur_stands_for_pillows_three_boxes():
    picture = (texture(1, grain=4)[0] * 255).round().to(torch.uint8)
    for sigma in (0.5, 1.0, 2.0):
        boxes = Image.fromarray(picture.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(sigma))
        ours = blurred(picture[None].float() / 255, np.array([sigma]))[0].permute(1, 2, 0).numpy()
        inner = slice(8, -8)  # at the edge Pillow repeats the last pixel, torchvision and we mirror
        assert np.abs(ours - np.asarray(boxes) / 255)[inner, inner].mean() < 2 * LEVEL


def test_blur_does_not_depend_on_the_rest_of_the_batch():
    x, sigma = texture(4), np.array([0.3, 1.9, 0.7, 1.2])
    together = blurred(x, sigma)
    for number in range(4):
        one = slice(number, number + 1)
        assert torch.equal(together[one], blurred(x[one], sigma[one]))
