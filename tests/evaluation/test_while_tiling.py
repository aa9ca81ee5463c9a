"""Part of an archive is not taken for all of it: what reads its tiles waits until they are made."""

import os
import subprocess
import sys
import threading

import pytest
from synthetic_store import write_synthetic_store

from histossl.core.config import FinetuneConfig
from histossl.core.errors import StoreError
from histossl.core.workspace import alone_in, locked, refuse_while_tiling
from histossl.evaluation.finetune import embed_start, finetune
from histossl.evaluation.suggest import suggest

HOLDER = """
import sys
from pathlib import Path
from histossl.core.workspace import Workspace, alone_in
with alone_in(Workspace(Path(sys.argv[1])), "tile"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def tiled(workspace):
    write_synthetic_store(workspace, [f"s{number}" for number in range(6)], tiles_per_slide=4, tile_px=32)
    lines = [f"s{number},{'high' if number % 2 else 'low'}" for number in range(6)]
    (workspace.root / "labels.csv").write_text("\n".join(["slide,label", *lines]) + "\n")
    return workspace


def test_what_reads_all_tiles_is_refused_while_tile_is_at_work(tiled, cli):
    labels = tiled.root / "labels.csv"
    config = FinetuneConfig(labels=str(labels), starts=("random",), backbone="test_vit", input_px=32)
    with alone_in(tiled, "tile"):
        for stage in (
            lambda: finetune(tiled, "a", config),
            lambda: finetune(tiled, "a", config, dry_run=True),
            lambda: embed_start(tiled, config),
            lambda: suggest(tiled, config),
        ):
            with pytest.raises(
                StoreError, match=rf"`histossl tile` \(process {os.getpid()}\) is at work in it, and has"
            ):
                stage()
        told = cli("pretrain", "-w", tiled.root, "--backbone", "test_vit", "--weights", "random", "--steps", 1)
        assert told.code == 1
        assert "is at work in it, and has not tiled every slide yet" in " ".join(told.err.split())
    finetune(tiled, "a", config, dry_run=True)


def test_predict_is_refused_too(tiled, cli):
    labels = tiled.root / "labels.csv"
    config = FinetuneConfig(
        labels=str(labels), starts=("random",), backbone="test_vit", input_px=32, draws=1, budgets=(1,)
    )
    finetune(tiled, "a", config)
    with alone_in(tiled, "tile"):
        told = cli("predict", "--model", tiled.finetune("a").model, "-w", tiled.root, "--no-heatmaps")
    assert told.code == 1
    assert "is at work in it, and has not tiled every slide yet" in " ".join(told.err.split())
    assert not tiled.predictions("default").root.exists()


def test_the_lock_file_of_a_tile_that_was_killed_refuses_nobody(tiled):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tiled.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match=rf"process {holder.pid}\) is at work"):
            refuse_while_tiling(tiled)
        holder.kill()
    assert f"process {holder.pid}" in (tiled.root / ".lock").read_text()
    refuse_while_tiling(tiled)


def test_scan_makes_no_tiles_and_refuses_nobody(tiled):
    with alone_in(tiled, "scan"):
        refuse_while_tiling(tiled)


def test_to_look_is_not_to_be_at_work(tiled):
    """Two may look at once, and a `tile` that starts meanwhile is not refused for it."""
    (tiled.root / ".lock").write_text("`histossl tile` (process 1)\n")
    looking = (tiled.root / ".lock").open("rb")
    assert locked(looking.fileno(), shared=True)
    refuse_while_tiling(tiled)
    threading.Timer(0.02, looking.close).start()
    with alone_in(tiled, "tile"), pytest.raises(StoreError, match="is at work in it, and has"):
        refuse_while_tiling(tiled)
