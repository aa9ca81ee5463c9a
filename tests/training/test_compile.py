"""`--compile` changes speed and nothing else: the same losses, timm's own keys, and a run that goes on either way."""

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from synthetic_store import write_synthetic_store
from torch import nn

from histossl.core.config import PretrainConfig, RuntimeConfig
from histossl.core.errors import UsageError
from histossl.core.workspace import PretrainDir, Workspace
from histossl.tiles.store.index import TileIndex
from histossl.training.pretrain import pretrain
from histossl.training.run_files.checkpoint import load_checkpoint

pytestmark = [  # torch's tracer asks for .grad where there is none, and warns itself of it
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
TINY = PretrainConfig(backbone="test_vit", weights="random", steps=6, batch_size=8, view_px=32, optimizer="sgd")
EAGER = RuntimeConfig(num_workers=0, log_every=1, monitor_every=3)
COMPILED = replace(EAGER, compiled=True)

inductor = pytest.param(
    "inductor",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(
            shutil.which("g++") is None, reason="inductor writes C++, and there is no g++ to compile it"
        ),
    ],
)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> TileIndex:
    workspace = Workspace(tmp_path_factory.mktemp("store"))
    return write_synthetic_store(workspace, slides=("A1", "A2", "B1", "B2"), tiles_per_slide=16, tile_px=40)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that were compiled. `aot_eager` traces forward and backward as inductor does, and writes no C++."""
    compiled: list[nn.Module] = []
    compile_ = nn.Module.compile

    @functools.wraps(compile_)
    def noted(module: nn.Module) -> None:
        compiled.append(module)
        compile_(module, backend=request.param)

    monkeypatch.setattr(nn.Module, "compile", noted)
    monkeypatch.setenv("CXX", "g++")  # aot_eager needs none
    torch._dynamo.reset()
    return compiled


def losses(run: PretrainDir) -> list[float]:
    logged = [json.loads(line) for line in run.log.read_text().splitlines()]
    return [row["loss"] for row in logged if "loss" in row]


class Killed(Exception):
    pass


def killed_at_the_second_look() -> Callable[..., float]:
    """After step 3; the last checkpoint is then of step 2."""
    looks = iter([0.5])

    def probe(*_: object) -> float:
        if (score := next(looks, None)) is None:
            raise Killed
        return score

    return probe


@pytest.mark.parametrize("backend", ["aot_eager", inductor], indirect=True)
def test_compiled_is_eager_to_tolerance_with_timm_s_keys_and_goes_on_from_it(
    index: TileIndex, tmp_path: Path, backend: list[nn.Module]
) -> None:
    eager, compiled, mixed = (PretrainDir(tmp_path / name) for name in ("eager", "compiled", "mixed"))
    pretrain(index, eager, TINY, EAGER)
    assert not backend
    pretrain(index, compiled, TINY, COMPILED)
    assert len(backend) == 4  # both encoders and both heads
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-4)
    loaded = timm.create_model("test_vit", checkpoint_path=str(compiled.backbone), num_classes=0)
    assert not [name for name in loaded.state_dict() if "_orig_mod" in name]

    with pytest.raises(Killed):
        pretrain(index, mixed, TINY, replace(COMPILED, checkpoint_every="2"), probe=killed_at_the_second_look())
    state = load_checkpoint(mixed)
    assert state is not None
    assert state["step"] == 2
    assert not [name for name in state["method"] if "_orig_mod" in name]
    assert pretrain(index, mixed, TINY, EAGER).finished
    assert losses(mixed) == pytest.approx(losses(eager), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)
def test_a_run_that_was_begun_eager_goes_on_compiled(
    index: TileIndex, tmp_path: Path, backend: list[nn.Module]
) -> None:
    eager, mixed = PretrainDir(tmp_path / "eager"), PretrainDir(tmp_path / "mixed")
    config = replace(TINY, backbone="resnet10t", set=("batchnorm_group_tiles=4",))  # with BatchNorm groups
    pretrain(index, eager, config, EAGER)
    with pytest.raises(Killed):
        pretrain(index, mixed, config, replace(EAGER, checkpoint_every="2"), probe=killed_at_the_second_look())
    assert pretrain(index, mixed, config, COMPILED).finished
    assert backend
    assert losses(mixed) == pytest.approx(losses(eager), rel=1e-3)
    timm.create_model("resnet10t", checkpoint_path=str(mixed.backbone), num_classes=0)


def test_without_a_compiler_compile_is_refused_with_the_way_out(
    index: TileIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UsageError, match=r"--compile: needs a C\+\+ compiler.*apt-get install g\+\+.*leave it out"):
        pretrain(index, PretrainDir(tmp_path / "none"), TINY, COMPILED)
