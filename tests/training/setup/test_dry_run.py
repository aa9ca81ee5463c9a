"""Trying a run out: in how many passes a batch fits memory."""

import pytest

from histossl.core.errors import TrainingError
from histossl.training.setup.dry_run import fewest_pieces


def test_micro_batches_double_until_a_pass_fits() -> None:
    asked: list[int] = []

    def fits(tiles: int) -> bool:
        asked.append(tiles)
        return tiles <= 20

    assert fewest_pieces(fits, 256, 2) == 8
    assert asked == [128, 64, 32, 16]
    with pytest.raises(TrainingError, match="out of memory even with 3 tiles a pass"):
        fewest_pieces(lambda _: False, 12, 2)
