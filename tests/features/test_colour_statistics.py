"""The colour floor says what its table says, and nothing about where in the tile a colour lies."""

import colorsys

import numpy as np
import torch

from histossl.features.colour_statistics import EVERY, NUM_STATISTICS, colour_statistics


def test_the_27_statistics_are_those_of_numpy_and_colorsys():
    rng = np.random.default_rng(0)
    tiles = rng.integers(1, 256, (2, 3, 32, 32), dtype=np.uint8)
    found = colour_statistics(torch.from_numpy(tiles)).numpy()
    assert found.shape == (2, NUM_STATISTICS)
    for tile, row in zip(tiles, found, strict=True):
        rgb = tile[:, ::EVERY, ::EVERY].reshape(3, -1) / 255
        hsv = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in rgb.T]).T
        hsv[0] = (hsv[0] + 0.5) % 1
        density = -np.log(rgb)
        expected = [rgb.mean(1), rgb.std(1, ddof=1), *np.quantile(rgb, [0.1, 0.5, 0.9], axis=1)]
        expected += [hsv.mean(1), hsv.std(1, ddof=1), density.mean(1), density.std(1, ddof=1)]
        np.testing.assert_allclose(row, np.concatenate(expected), atol=2e-5)


def test_black_white_and_grey_are_finite():
    flat = torch.tensor([0, 255, 128], dtype=torch.uint8)[:, None, None, None].expand(3, 3, 8, 8)
    assert torch.isfinite(colour_statistics(flat)).all()


def test_only_colour_counts_not_its_place():
    tile = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tile = tile.repeat_interleave(EVERY, 2).repeat_interleave(EVERY, 3)
    torch.testing.assert_close(colour_statistics(tile), colour_statistics(tile.flip(2, 3)))
