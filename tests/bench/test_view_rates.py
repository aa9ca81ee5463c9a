"""What `histossl bench views` says of this machine."""

import pytest
import simplejpeg
import torch

from histossl.bench.view_rates import (
    MEAN,
    STD,
    Figure,
    SyntheticStore,
    ViewRates,
    advice,
    reference_pipeline,
    view_rates,
)
from histossl.cli.bench import _step_advice
from histossl.views.recipe import recipe_named


def test_a_figure_is_the_median_of_its_repeats():
    figure = Figure("decode", (0.5, 0.2, 0.4))
    assert (figure.ms, figure.tiles_per_s, figure.spread) == (0.4, 2500, "0.200-0.500")


def test_the_reference_makes_mocos_two_views_of_a_tile():
    one, two = reference_pipeline(48)(SyntheticStore(64, 1).read(0))
    assert one.shape == two.shape == (3, 48, 48)
    assert not torch.equal(one, two)
    std, mean = (torch.tensor(values)[:, None, None] for values in (STD, MEAN))
    assert ((one * std + mean).clamp(0, 1) - (one * std + mean)).abs().max() < 1e-6  # normalised


def test_synthetic_tiles_are_as_heavy_as_tissue():
    """Real colon tiles of 224 px have 15.7 kB on average: 0.31 bytes a pixel."""
    store = SyntheticStore(224, 4)
    sizes = [len(store.read(number)) / 224**2 for number in store.tiles_of("synthetic")]
    assert all(0.2 < size < 0.5 for size in sizes)
    assert simplejpeg.decode_jpeg(store.read(0)).shape == (224, 224, 3)


def test_rates_are_measured_for_every_stage():
    rates = view_rates(SyntheticStore(64, 32), recipe_named("mocov2-histology", 32), 2, num_tiles=32, repeats=2)
    assert [len(figure.repeats_ms) for figure in rates.figures[:5]] == [2] * 5
    assert all(figure.ms > 0 for figure in rates.figures)
    assert rates.loader_gain > rates.gain > 0


@pytest.mark.slow
def test_views_on_the_cpu_beat_the_usual_pipeline_twice_and_the_loader_by_far():
    rates = view_rates(SyntheticStore(256), recipe_named("mocov2", 224), 2, num_tiles=192, repeats=5)
    assert rates.gain > 2
    assert rates.loader_gain > 15


@pytest.mark.parametrize(
    ("option", "value"), [("--tiles", 3), ("--repeats", 0), ("--workers", 0), ("--tile-px", 7), ("--recipe", "moco")]
)
def test_a_wrong_setting_is_one_clear_line(option, value, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    told = cli("bench", "views", option, value)
    assert told.code == 2
    assert f"{option} {value}: " in " ".join(told.err.split())


def rates_of(loaded_ms: float, views_ms: float, on_gpu_ms: float | None = None, decode_on_gpu_ms: float | None = None):
    def figure(ms: float | None) -> Figure | None:
        return None if ms is None else Figure("", (ms,))

    return ViewRates(
        *(Figure("", (ms,)) for ms in (0.01, 0.2, views_ms, 8.0, loaded_ms)),
        figure(on_gpu_ms),
        figure(decode_on_gpu_ms),
    )


def test_the_faster_way_to_decode_is_named_with_its_flag():
    assert advice(rates_of(0.1, 2.0))[0].startswith("limit: making views on the CPU")
    faster = advice(rates_of(0.1, 2.0, on_gpu_ms=0.03, decode_on_gpu_ms=0.04))
    assert "2.5x as fast on the GPU" in faster[0]
    assert "pass --decode-on-gpu" in faster[0]
    assert "limit: decoding on the GPU" in faster[1]
    slower = advice(rates_of(0.01, 2.0, on_gpu_ms=0.03, decode_on_gpu_ms=0.02))
    assert "leave --decode-on-gpu out" in slower[0]
    assert "limit: making views on the GPU" in slower[1]


def test_a_step_names_its_limit_and_the_faster_way_to_decode():
    assert _step_advice(1.0, 0.99) == ["as it runs: 99% of the rate with views at hand", _step_advice(1.0, 0.99)[-1]]
    assert "limit: the network itself" in _step_advice(1.0, 0.99)[-1]
    assert "limit: tiles and views" in _step_advice(1.0, 0.5)[-1]
    told = _step_advice(1.0, 0.5, gpu_decoding_s=0.52)
    assert "1.92x as fast with tiles decoded on the GPU: pass --decode-on-gpu" in told[1]
    assert "limit: the network itself" in told[2]
    assert "leave --decode-on-gpu out" in _step_advice(1.0, 0.5, gpu_decoding_s=0.99)[1]


def test_the_command_names_the_limit_and_what_to_change(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    told = cli("bench", "views", "--tile-px", 64, "--view-px", 32, "--tiles", 16, "--repeats", 1, "--workers", 1)
    assert told.code == 0, told.err
    assert "measuring with synthetic ones of 64 px" in told.err
    assert "limit: " in told.err
    assert "x the reference" in told.err
    missing = cli("bench", "views", "-w", tmp_path / "nothing")
    assert missing.code == 1
    assert "no tiles yet" in missing.err
