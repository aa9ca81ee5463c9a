"""A refactor changes no figure: the whole pipeline on a painted archive leaves the same bytes as before.

    pytest -m slow tests/test_golden_run.py                             compare with tests/golden.json
    HISTOSSL_GOLDEN=write pytest -m slow tests/test_golden_run.py       write what this checkout gives

Floating point differs between processors and versions of torch, so the digests are kept per such environment; in one
that is not listed the test is skipped, and the second command lists it (run it on the commit before the change).
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PaintedArchive
from safetensors.numpy import load_file

from histossl.core.workspace import Workspace

GOLDEN = Path(__file__).with_name("golden.json")
# timm names, and the options that make them small: a CNN by contrast and a ViT by self-distillation.
RUNS: dict[str, tuple[str, ...]] = {
    "mocov2": ("--backbone", "resnet10t", "--set", "queue_size=64"),
    "dinov2": ("--backbone", "test_vit", "--set", "prototypes=64"),
}


def environment() -> str:
    return f"torch {torch.__version__}, numpy {np.__version__}, {torch.backends.cpu.get_cpu_capability()}"


def digest(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()[:16]


def zip_digest(path: Path) -> str:
    """Of the names and bytes of the tiles; what tiling.json says about them may gain fields."""
    with zipfile.ZipFile(path) as archive:
        tiles = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        return digest(part for name in tiles for part in (name.encode(), archive.read(name)))


def backbone_digest(path: Path) -> str:
    tensors = load_file(path)
    return digest(
        part for name in sorted(tensors) for part in (name.encode(), np.ascontiguousarray(tensors[name]).tobytes())
    )


@pytest.mark.slow
def test_pipeline_leaves_the_same_bytes_as_before(
    painted_archive: PaintedArchive, workspace: Workspace, cli: Callable[..., Any]
) -> None:
    at = ("-w", workspace.root)

    def run(*arguments: object) -> None:
        done = cli(*arguments)
        assert done.code == 0, done.err

    run("tile", "--slides", painted_archive.directory, "--tile-px", 64, "--mpp", 1, *at)
    run("curate", "--backbone", "test_resnet", "--weights", "random", "--tiles", 200, "--name", "few", *at)
    found: dict[str, str] = {path.stem: zip_digest(path) for path in sorted(workspace.tiles.glob("*.zip"))}
    found["subset"] = digest([workspace.subset("few").tiles.read_bytes()])
    for method, options in RUNS.items():
        length = ("--steps", 6, "--batch-size", 16, "--view-px", 64, "--workers", 1, "--deterministic")
        run("pretrain", "--method", method, "--weights", "random", "--subset", "few", *options, *length, *at)
        found[method] = backbone_digest(workspace.pretrain(method).backbone)
        curve = ("--labels", painted_archive.labels_csv, "--adapted", method, "--name", method, "--draws", 3)
        run("finetune", *curve, "--starts", "random,adapted,colour", "--device", "cpu", *at)
        for table in (workspace.finetune(method).points, workspace.finetune(method).predictions):
            found[f"{method} {table.stem}"] = digest([table.read_bytes()])
    run("predict", "--model", workspace.finetune("mocov2").model, "--name", "golden", "--device", "cpu", *at)
    found["predict"] = digest([workspace.predictions("golden").table.read_bytes()])
    known: dict[str, dict[str, str]] = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("HISTOSSL_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps({**known, environment(): found}, indent=1) + "\n")
    elif environment() not in known:
        pytest.skip(f"{GOLDEN.name} has no digests for {environment()}; write them on the commit before the change")
    else:
        assert found == known[environment()]
