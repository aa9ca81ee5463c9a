"""A run that is made to collapse is named while it runs, whatever the method: whole runs, on timm's smallest models."""

from pathlib import Path

import pytest
from methods.test_every_method import needs_vit, set_of
from synthetic_store import write_synthetic_store

from histossl.core import console
from histossl.core.config import PretrainConfig, RuntimeConfig
from histossl.core.errors import TrainingError
from histossl.core.workspace import PretrainDir, Workspace
from histossl.methods import REGISTRY, TAUGHT
from histossl.methods.pretext import base
from histossl.tiles.store.index import TileIndex
from histossl.training.monitoring.diagnostics import UNMOVED
from histossl.training.pretrain import pretrain

NAMES = [name for name in REGISTRY if name not in TAUGHT]
DISTILLED = ("dino", "ibot", "dinov2")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> TileIndex:
    workspace = Workspace(tmp_path_factory.mktemp("store"))
    return write_synthetic_store(workspace, slides=("A1", "A2", "B1", "B2"), tiles_per_slide=16, tile_px=40)


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr(console, "warn", told.append)
    return told


def carried_out(index: TileIndex, root: Path, name: str, lr: float, *knobs: str) -> None:
    backbone, view_px = ("test_vit", 32) if name in DISTILLED or needs_vit(name) else ("test_resnet", 48)
    config = PretrainConfig(
        method=name, backbone=backbone, weights="random", steps=30, batch_size=8, view_px=view_px, lr=lr,
        set=(*set_of(name), *knobs),
    )  # fmt: skip
    pretrain(index, PretrainDir(root / name), config, RuntimeConfig(num_workers=0, log_every=3, monitor_every=10))


@pytest.mark.parametrize("name", NAMES)
def test_a_rate_far_too_high_is_named_and_stops_the_run(
    name: str, index: TileIndex, tmp_path: Path, warned: list[str]
) -> None:
    with pytest.raises(TrainingError, match=r"collapse|not finite"):
        carried_out(index, tmp_path, name, 1e4)
    assert any("collapse" in told or "not finite" in told for told in warned)


@pytest.mark.parametrize("name", DISTILLED)
def test_a_student_that_dies_under_a_teacher_that_rests_is_named(
    name: str, index: TileIndex, tmp_path: Path, warned: list[str]
) -> None:
    carried_out(index, tmp_path, name, 3.0, "momentum=1")
    told = "\n".join(warned)
    assert "the student, whom the exported teacher follows: complete collapse" in told
    assert UNMOVED in told


def test_an_ailment_that_lasts_is_told_once_though_its_figures_change(
    index: TileIndex, tmp_path: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "AT_CHANCE_AFTER", 1)
    monkeypatch.setattr(base, "AT_CHANCE", 100.0)  # any accuracy is no better than so many guesses
    carried_out(index, tmp_path, "rotation", 1e-3)  # logged ten times
    assert sum("is no better than chance" in told for told in warned) == 1


@pytest.mark.parametrize("name", DISTILLED)
def test_a_run_as_planned_is_left_alone(name: str, index: TileIndex, tmp_path: Path, warned: list[str]) -> None:
    carried_out(index, tmp_path, name, 3e-4)
    assert not warned
