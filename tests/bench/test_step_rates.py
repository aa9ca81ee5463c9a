"""What `histossl bench` says of a machine: every rate in one table, which part is the limit, and what to change."""

import re

import pytest
from synthetic_store import write_synthetic_store

from histossl.bench.step_rates import Rates, advice, synthetic_tiles
from histossl.bench.view_rates import Figure, ViewRates
from histossl.core.workspace import Workspace


def rates(
    *,
    loaded: float = 0.1,
    views: float = 1.0,
    network: float = 5.0,
    as_it_runs: float | None = None,
    on_gpu: bool = False,
    read: float = 0.01,
    decode_on_gpu: float | None = None,
) -> Rates:
    def figure(ms: float) -> Figure:
        return Figure("", (ms,))

    seen = ViewRates(
        figure(read),
        figure(0.2),
        figure(views),
        figure(8.0),
        figure(loaded),
        figure(views) if on_gpu else None,
        None if decode_on_gpu is None else figure(decode_on_gpu),
    )
    return Rates(seen, figure(network), figure(as_it_runs or loaded + views + network), on_gpu)


def test_the_slowest_part_is_the_limit_and_each_has_its_own_remedy() -> None:
    assert rates().limit == "network"
    assert "a GPU; without one a smaller --backbone" in advice(rates())[0]
    assert "--compile" in advice(rates(on_gpu=True))[0]
    assert rates(views=9.0).limit == "views"
    assert "a smaller --view-px, or a GPU" in advice(rates(views=9.0))[0]
    assert rates(loaded=9.0).limit == "tiles"
    assert "more cores" in advice(rates(loaded=9.0))[0]
    assert "a faster disk" in advice(rates(loaded=9.0, read=8.0))[0]


def test_what_tiles_and_views_cost_of_a_step_is_told() -> None:
    told = advice(rates(views=1.0, network=4.0, as_it_runs=5.0))
    assert "tiles and views cost 20% of a step as it runs, making views most of it" in told[1]
    assert "a smaller --view-px" in told[1]
    assert "cost nothing" in advice(rates(network=4.0, as_it_runs=4.1))[1]


def test_a_gap_that_tiles_and_views_cannot_explain_is_not_blamed_on_them() -> None:
    told = advice(rates(loaded=0.6, views=3.5, network=555.0, as_it_runs=711.0))
    assert "28% longer than with views at hand, more than tiles and views explain" in told[1]
    assert "measure again when it is quiet" in told[1]


def test_decoding_on_the_gpu_is_advised_where_it_pays_and_takes_the_limit_away() -> None:
    paying = rates(loaded=9.0, decode_on_gpu=0.5, on_gpu=True)
    assert paying.limit == "network"
    assert "18.0x as fast as on the workers: pass --decode-on-gpu" in advice(paying)[2]
    assert "leave --decode-on-gpu out" in advice(rates(loaded=0.5, decode_on_gpu=0.5, on_gpu=True))[2]


def test_synthetic_tiles_are_a_store_like_any_other_and_leave_nothing() -> None:
    with synthetic_tiles(64) as index:
        assert (index.tile_px, len(index), len(index.slides)) == (64, 512, 2)
        assert index.read(0)[:2] == b"\xff\xd8"
        path = index.path
    assert not path.exists()


@pytest.mark.parametrize("own", [True, False])
def test_the_command_alone_measures_the_whole_road(tmp_path, monkeypatch, cli, own: bool) -> None:
    monkeypatch.chdir(tmp_path)
    more = ()
    if own:
        write_synthetic_store(Workspace(tmp_path / "w"), tiles_per_slide=16, tile_px=40)
        more = ("-w", tmp_path / "w")
    tiny = ("--backbone", "resnet10t", "--batch-size", 8, "--view-px", 32, "--tile-px", 64, "--steps", 1)
    told = cli("bench", *more, *tiny, "--workers", 1)
    assert told.code == 0, told.err
    assert ("48 of 40 px" if own else "synthetic ones of 64 px") in told.err
    for part in (
        "read ",
        "decode ",
        "read and decode",
        "views: mocov2-histology",
        "step, views at hand",
        "step, as it runs",
    ):
        assert re.search(rf"^ ?{part}", told.err, re.MULTILINE), part
    assert "limit: " in told.err
    assert not list(tmp_path.glob("histossl-workspace"))


def test_an_option_before_a_part_s_name_is_refused_not_ignored(cli) -> None:
    told = cli("bench", "--view-px", 64, "views")
    assert told.code == 2
    assert "--view-px: goes after `histossl bench views`" in told.err
    assert cli("bench", "-w", "/nowhere").code == 1
