"""A run that starts from a weights file finds it again, from wherever the command is given."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file
from synthetic_store import write_synthetic_store

from histossl.backbones.loading import create_backbone, info_beside
from histossl.core.config import PretrainConfig, RuntimeConfig
from histossl.core.errors import MismatchError
from histossl.core.workspace import PretrainDir, Workspace
from histossl.tiles.store.index import TileIndex
from histossl.training.pretrain import Result, pretrain

QUICK = RuntimeConfig(num_workers=0)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> TileIndex:
    workspace = Workspace(tmp_path_factory.mktemp("store"))
    return write_synthetic_store(workspace, slides=("A1", "A2"), tiles_per_slide=8, tile_px=40)


def write_weights(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(create_backbone("resnet10t", "random", seed)[0].state_dict(), str(path))
    return path


def run_from(index: TileIndex, run: PretrainDir, weights: str | Path) -> Result:
    config = PretrainConfig(
        backbone="resnet10t", weights=str(weights), steps=1, batch_size=4, view_px=32, set=("batchnorm_group_tiles=4",)
    )
    return pretrain(index, run, config, QUICK)


@pytest.fixture
def begun(index: TileIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PretrainDir:
    """A run from data/w.safetensors, as typed in tmp_path; the test itself stands in another directory."""
    write_weights(tmp_path / "data" / "w.safetensors")
    run = PretrainDir(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    run_from(index, run, "data/w.safetensors")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return run


def test_the_record_holds_a_path_that_is_right_anywhere(index: TileIndex, begun: PretrainDir, tmp_path: Path) -> None:
    path = str(tmp_path / "data" / "w.safetensors")
    assert json.loads(begun.run_json.read_text())["config"]["weights"] == path
    assert info_beside(begun.backbone).provenance["start_weights"] == path
    second = PretrainDir(tmp_path / "second")
    run_from(index, second, "../data/w.safetensors")
    assert json.loads(second.run_json.read_text())["config"]["weights"] == path


@pytest.mark.parametrize("place", ["../data/w.safetensors", "copied.safetensors"])
def test_the_same_content_is_the_same_start_however_its_path_is_written(
    index: TileIndex, begun: PretrainDir, tmp_path: Path, place: str
) -> None:
    shutil.copy(tmp_path / "data" / "w.safetensors", "copied.safetensors")
    assert "finished before" in run_from(index, begun, place).text
    assert "finished before" in run_from(index, begun, Path(place).resolve()).text


def test_other_weights_are_refused_also_under_the_same_path(
    index: TileIndex, begun: PretrainDir, tmp_path: Path
) -> None:
    other = write_weights(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(MismatchError, match=r"weights was '.*/data/w.safetensors', now '.*other.safetensors'"):
        run_from(index, begun, other)
    shutil.copy(other, tmp_path / "data" / "w.safetensors")
    with pytest.raises(MismatchError, match=r"was begun from .* when that had other content .*; put that file back"):
        run_from(index, begun, "../data/w.safetensors")


def test_a_finished_run_needs_its_file_no_more(index: TileIndex, begun: PretrainDir, tmp_path: Path) -> None:
    (tmp_path / "data" / "w.safetensors").unlink()
    assert "finished before" in run_from(index, begun, tmp_path / "data" / "w.safetensors").text
    assert "finished before" in run_from(index, begun, "/weights/w.safetensors").text  # as a container calls it
    with pytest.raises(MismatchError, match=r"now '/weights/other\.safetensors'"):
        run_from(index, begun, "/weights/other.safetensors")


def test_a_run_of_an_older_version_kept_the_path_as_it_was_typed(
    index: TileIndex, begun: PretrainDir, tmp_path: Path
) -> None:
    older = json.loads(begun.run_json.read_text())
    del older["weights_digest"]
    older["config"]["weights"] = "data/w.safetensors"
    begun.run_json.write_text(json.dumps(older))
    assert "finished before" in run_from(index, begun, tmp_path / "data" / "w.safetensors").text
    with pytest.raises(MismatchError, match=r"weights was 'data/w.safetensors'"):
        run_from(index, begun, write_weights(tmp_path / "other.safetensors", seed=1))
