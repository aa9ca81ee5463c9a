"""The queue rule, its reasons, and what is refused."""

import itertools
from functools import partial

import pytest

from histossl.core.config import PretrainConfig
from histossl.core.errors import UsageError
from histossl.methods.modules.batchnorm import group_of
from histossl.tiles.stream.sampler import TileOrder
from histossl.training.setup.planner import batch_bounds, plan


def planned(
    num_tiles: int, batch_size: int = 256, knobs: dict[str, object] | None = None, slides: int = 50, **config: object
):
    return plan(PretrainConfig(batch_size=batch_size, **config), num_tiles, slides, knobs or {})


@pytest.mark.parametrize(
    ("num_tiles", "batch", "queue"),
    [(20_000, 256, 2048), (100_000, 256, 7936), (1_000_000, 256, 65536), (50_000, 512, 4096), (10_000_000, 256, 65536)],
)
def test_queue_is_the_published_share_of_the_tiles(num_tiles: int, batch: int, queue: int) -> None:
    assert planned(num_tiles, batch).knobs["queue_size"] == queue


def test_few_tiles_get_a_quarter_of_them() -> None:
    assert planned(1000, 128).knobs["queue_size"] == 250


def test_queue_reason_states_age_share_and_own_slide() -> None:
    (reason,) = [line for line in planned(20_000).reasons if line.startswith("queue")]
    assert "8.0 steps old" in reason
    assert "10.2%" in reason
    assert "2.0% of it is of the query's own slide" in reason


def test_queue_by_hand_is_taken_and_one_as_large_as_the_data_refused() -> None:
    assert planned(5000, knobs={"queue_size": 777}).knobs["queue_size"] == 777
    with pytest.raises(UsageError, match=r"queue of 5000 keys: must be smaller than the 5000 tiles"):
        planned(5000, knobs={"queue_size": 5000})


def test_momentum_fits_the_tiles_and_the_length() -> None:
    assert planned(20_000, steps=10_000).knobs["momentum"] == 0.99
    assert planned(500_000, steps=10_000).knobs["momentum"] == 0.996
    assert planned(2_000_000, steps=100_000).knobs["momentum"] == 0.999
    assert planned(2_000_000, steps=1000).knobs["momentum"] == 0.98  # memory of 50 steps: a twentieth
    assert planned(2_000_000, steps=100).knobs["momentum"] == 0.98  # never shorter


def test_a_hundred_epochs_are_not_told_as_a_power_of_ten() -> None:
    def told(epochs: float) -> str:
        return planned(10_000, 100, epochs=epochs).reasons[0]

    assert "; 100 epochs of 10,000 tiles)" in told(100)
    assert "; 1,500 epochs of" in told(1500)
    assert "; 2.5 epochs of" in told(2.5)


def test_epochs_become_steps() -> None:
    assert planned(10_000, 100, epochs=3).num_steps == 300
    assert planned(10_000, 100, steps=7).num_steps == 7


def test_default_length_shows_a_million_tiles_or_each_a_hundred_times() -> None:
    assert planned(2_000, 100).num_steps == 2_000
    assert planned(100_000, 100).num_steps == 10_000
    assert planned(5_000_000, 100).num_steps == 50_000


def test_batch_that_cannot_be_shared_or_filled_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--batch-size 256: cannot be shared by 3 processes.*255 or 258"):
        plan(PretrainConfig(), 20_000, 10, {}, num_processes=3)
    with pytest.raises(UsageError, match="only 100 tiles"):
        planned(100)


@pytest.mark.parametrize(
    ("num_tiles", "processes", "usual", "most"),
    [(64, 1, 8, 8), (6_000, 1, 32, 32), (20_000, 1, 128, 128), (1_000_000, 1, 256, 1024), (1_000_000, 3, 192, 768)],
)
def test_auto_batch_is_a_hundredth_of_the_tiles_within_bounds(
    num_tiles: int, processes: int, usual: int, most: int
) -> None:
    assert batch_bounds(num_tiles, processes) == (usual, most)


def test_continuing_takes_a_third_of_the_rate_of_scratch() -> None:
    assert planned(20_000).lr == pytest.approx(0.01)
    assert planned(20_000, weights="random").lr == pytest.approx(0.03)
    adamw = plan(PretrainConfig(batch_size=128), 20_000, 10, {}, batchnorm=False)
    assert (adamw.optimizer, adamw.lr, adamw.layer_decay) == ("adamw", pytest.approx(3e-4), 0.75)


@pytest.mark.parametrize(("batch", "group"), [(32, 16), (100, 25), (96, 32)])
def test_one_process_always_has_two_batchnorm_groups_and_the_plan_says_of_how_many(batch: int, group: int) -> None:
    assert group_of(batch, 32, 1) == group
    told = [line for line in planned(20_000, batch).reasons if "BatchNorm takes" in line]
    assert told == (
        [] if group == 32 else [f"BatchNorm takes groups of {group} tiles: a batch of {batch} is not two or more of 32"]
    )


def test_groups_fall_alike_on_one_process_and_on_two() -> None:
    for batch in (16, 32, 48, 64, 100, 256):
        assert group_of(batch, 32, 1) == group_of(batch // 2, 32, 2), batch


@pytest.mark.parametrize(
    ("batch", "processes", "pieces", "group"), [(96, 2, 1, 24), (64, 4, 1, 16), (256, 1, 8, 16), (256, 4, 2, 32)]
)
def test_groups_that_parts_of_a_batch_make_smaller_are_a_warning_with_a_way_out(
    batch: int, processes: int, pieces: int, group: int
) -> None:
    parts = partial(plan, PretrainConfig(batch_size=batch), 20_000, 50, {}, processes, pieces)
    told = [line for line in parts().reasons if "BatchNorm" in line]
    assert parts().knobs["batchnorm_group_tiles"] == group
    if group == 32:
        assert told == []
        return
    (line,) = told
    assert line.startswith(f"warning: BatchNorm takes groups of {group} tiles, not 32")
    assert f"--set batchnorm_group_tiles={group}" in line
    assert not any("BatchNorm" in line for line in parts(batchnorm_group=group).reasons)
    assert group_of(batch, group, 1) == group  # so a pass of the whole batch takes them, too


def test_keys_of_both_views_make_the_queue_half_as_old() -> None:
    (one,), (both,) = (
        [line for line in planned(20_000, knobs={"symmetric": way}).reasons if line.startswith("queue")]
        for way in (False, True)
    )
    assert "8.0 steps old; 10.2% of the tiles" in one
    assert "4.0 steps old; 5.1% of the tiles" in both


def test_a_pass_that_no_group_divides_is_a_warning() -> None:
    assert any("warning: BatchNorm takes one statistic" in line for line in planned(20_000, 97).reasons)


def test_no_negatives_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match="all tiles are of one slide, so no negative would be left"):
        planned(5000, knobs={"same_slide_weight": 0.0}, slides=1)


def test_own_slide_and_own_tile_are_counted_as_they_are_drawn() -> None:
    """A slide of 900 tiles among five of 20: of it are four pairs of draws in five, or one in six."""
    index = Archive({"large": 900, **{f"small{number}": 20 for number in range(5)}})
    for balance, slide, tile in ((0.0, 0.812, 1 / 1000), (1.0, 1 / 6, (1 / 900 + 5 / 20) / 36)):
        assert TileOrder(index, 0, balance).company() == pytest.approx((slide, tile), rel=1e-3)
    config = PretrainConfig(batch_size=10)
    (told,) = [line for line in plan(config, 1000, 6, {}, company=(0.812, 0.001)).reasons if line.startswith("queue")]
    assert "81.2% of it is of the query's own slide" in told
    assert "8.0% of the tiles shown are in it" in told


def test_momentum_and_warm_up_are_planned_for_the_steps_that_hours_come_to() -> None:
    config, same = PretrainConfig(hours=1.0), PretrainConfig(steps=400)
    fitted, plain = plan(config, 500_000, 50, {}, num_steps=400), plan(same, 500_000, 50, {})
    assert (fitted.num_steps, fitted.warmup_steps, fitted.knobs) == (400, plain.warmup_steps, plain.knobs)
    assert fitted.reasons[0].startswith("steps 400 (--hours 1;")


class Archive:
    """Slides by their numbers of tiles."""

    def __init__(self, counts: dict[str, int]) -> None:
        self.slides = list(counts)
        ends = list(itertools.accumulate(counts.values()))
        self._ranges = {name: range(end - counts[name], end) for name, end in zip(counts, ends, strict=True)}

    def tiles_of(self, slide: str) -> range:
        return self._ranges[slide]


@pytest.mark.parametrize(("tiles", "processes", "least"), [(0, 1, 2), (1, 1, 2), (1, 2, 2), (3, 4, 4), (2, 3, 3)])
def test_too_few_tiles_for_any_step_are_said_to_be_that(tiles: int, processes: int, least: int) -> None:
    """No batch size helps: with one tile the advice once was to use what was used."""
    for batch in (2, 12, 256):
        with pytest.raises(UsageError) as refused:
            plan(PretrainConfig(batch_size=batch), tiles, 1, {}, processes, batchnorm=False)
        said = str(refused.value)
        assert f"{tiles} tile" in said
        assert f"takes {least} at least" in said
        assert "--batch-size" not in said


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("tiles", [3, 4, 5, 17, 100])
def test_the_batch_size_that_is_advised_is_one_that_can_be_used(tiles: int, processes: int) -> None:
    with pytest.raises(UsageError, match="only") as refused:
        plan(PretrainConfig(batch_size=258), tiles, 1, {}, processes, batchnorm=False)
    advised = int(str(refused.value).split("use ")[1].split()[0])
    assert plan(PretrainConfig(batch_size=advised), tiles, 1, {}, processes, batchnorm=False).batch_size == advised
