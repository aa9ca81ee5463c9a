"""Masks: how many crops, how much of each, blocks within their target, the same on any number of processes."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from histossl.methods.method import Views
from histossl.methods.modules.masking import block_masks, masked_shares, random_masks
from histossl.runtime import collectives

GRID = (7, 7)


def views(first: int = 0, count: int = 16, seed: int = 0) -> Views:
    numbers = torch.arange(count)
    return Views([], numbers, numbers, 0, positions_B=torch.arange(first, first + count), seed=seed)


def shares(batch: Views) -> NDArray[np.float64]:
    return masked_shares(batch, 2, 0.5, 0.1, 0.5)


def test_half_of_the_crops_are_masked_and_their_shares_cover_the_range_evenly() -> None:
    drawn = shares(views())
    masked = np.sort(drawn[drawn > 0])
    assert len(masked) == 16
    edges = np.linspace(0.1, 0.5, 17)
    assert ((edges[:-1] <= masked) & (masked <= edges[1:])).all()  # one in each stratum


@pytest.mark.parametrize("draw", [block_masks, random_masks])
def test_as_many_patches_as_wanted_and_none_in_whole_crops(draw) -> None:
    drawn = shares(views())
    masks = draw(views(), drawn, GRID)
    assert masks.shape == (2, 16, 49)
    np.testing.assert_array_equal(masks.sum(-1), np.round(drawn * 49))


def test_blocks_hang_together_more_than_random_patches() -> None:
    drawn = np.full((2, 16), 0.3)

    def neighbours(masks: NDArray[np.bool_]) -> float:
        grid = masks.reshape(-1, *GRID)
        return float((grid[:, 1:] & grid[:, :-1]).sum() / grid.sum())

    assert neighbours(block_masks(views(), drawn, GRID)) > 1.5 * neighbours(random_masks(views(), drawn, GRID))


@pytest.mark.parametrize("draw", [block_masks, random_masks])
def test_masks_belong_to_the_tile_s_place_in_the_stream(draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with half of the batch each draw what one process draws; another batch and seed draw others."""
    whole = draw(views(), shares(views()), GRID)
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    halves = [draw(part, shares(part), GRID) for part in (views(0, 8), views(8, 8))]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), whole)
    monkeypatch.undo()
    for other in (views(16), views(seed=1)):
        assert (draw(other, shares(other), GRID) != whole).any()
