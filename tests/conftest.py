"""What every test may ask for: painted slides with their truth, a workspace, the command line, the real data.

    painted_slide      one slide of 1024 px with a blue stroke, for reading only (session)
    painted_archive    12 slides of 1024 px, 6 patients, 3 classes, labels.csv; for reading only (session)
    paint              paint("name.tif", label=..., pens=("red",), ...) -> PaintedSlide in this test's own folder
    workspace          an empty workspace in this test's own folder
    cli                cli("scan", directory) -> code, out, err of the command line, in this process
    real_data          the folder of $HISTOSSL_TEST_DATA; the test is skipped where it is absent

Nothing here is downloaded, and nothing may be: the hub is switched off.
"""

# ruff: noqa: E402  (the environment is set before numpy and torch are imported)

from __future__ import annotations

import os
import sys

# Before numpy or torch are imported. Every process keeps to one thread, or they fight for the cores.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
# The suite's truths (the same bits, two processes on no GPU) are of a CPU; `-m gpu` is for what only a GPU can show.
if not any("gpu" in argument for argument in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["NO_COLOR"] = "1"
os.environ["COLUMNS"] = "120"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("HISTOSSL_WORKSPACE", None)
os.environ.pop("FORCE_COLOR", None)

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch

from histossl.cli import main
from histossl.core.workspace import Workspace
from histossl.demo.paint import PaintedSlide, paint_archive, paint_slide

DATA = Path(os.environ.get("HISTOSSL_TEST_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


GIB_A_WORKER = 4


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The whole suite on all cores that memory allows; chosen files, and what is about one GPU, in this process."""
    chosen = config.args_source is not pytest.Config.ArgsSource.TESTPATHS or "not gpu" not in config.option.markexpr
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, psutil.virtual_memory().available // (GIB_A_WORKER << 30))
    return 0 if chosen or workers < 2 else workers


@dataclass(frozen=True)
class PaintedArchive:
    directory: Path
    slides: list[PaintedSlide]

    @property
    def labels_csv(self) -> Path:
        return self.directory / "labels.csv"

    def __getitem__(self, name: str) -> PaintedSlide:
        return next(slide for slide in self.slides if slide.path.stem == name)


class Told(NamedTuple):
    """What a command answered."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def painted_slide(tmp_path_factory: pytest.TempPathFactory) -> PaintedSlide:
    path = tmp_path_factory.mktemp("painted-slide") / "A1.tif"
    return paint_slide(path, width_px=1024, height_px=1024, mpp=0.5, label="normal", seed=11, pens=("blue",))


@pytest.fixture(scope="session")
def painted_archive(tmp_path_factory: pytest.TempPathFactory) -> PaintedArchive:
    directory = tmp_path_factory.mktemp("painted-archive")
    return PaintedArchive(directory, paint_archive(directory, num_slides=12, seed=5, side_px=1024, num_workers=1))


@pytest.fixture
def paint(tmp_path: Path) -> Callable[..., PaintedSlide]:
    def painter(name: str = "A1.tif", **options: Any) -> PaintedSlide:
        path = tmp_path / "slides" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return paint_slide(path, **{"width_px": 1024, "height_px": 1024, **options})

    return painter


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.at(tmp_path / "workspace").make()


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Told]:
    def run(*arguments: object) -> Told:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Told(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not DATA.is_dir():
        pytest.skip("no real data: set HISTOSSL_TEST_DATA to its folder")
    return DATA.resolve()
