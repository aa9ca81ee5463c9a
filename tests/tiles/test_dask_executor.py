"""Slides sent to a Dask cluster: the same zips as made here, also when a worker is killed midway."""

import gc
import os
import signal
import threading
import time

import pytest

from histossl.core.config import TileConfig
from histossl.core.errors import HistosslError
from histossl.core.workspace import Workspace
from histossl.tiles.store.index import TileIndex, find_zips
from histossl.tiles.tiling import tile_archive

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def cluster():
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None, silence_logs=50
    ) as cluster:
        yield cluster


def zips(workspace):
    return {path.name: path.read_bytes() for path in find_zips(workspace.tiles)}


def test_cluster_makes_the_same_zips_though_a_worker_is_killed(tmp_path, painted_archive, cluster):
    here, there = Workspace(tmp_path / "here"), Workspace(tmp_path / "there")
    rows = tile_archive(painted_archive.directory, here, TileConfig(), 0)
    with distributed.Client(cluster, set_as_default=False) as client:
        pids = list(client.run(os.getpid).values())
    assert len(pids) == 2

    def kill_one():
        until_s = time.monotonic() + 60
        while not find_zips(there.tiles) and time.monotonic() < until_s:
            time.sleep(0.005)
        os.kill(pids[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    told = tile_archive(painted_archive.directory, there, TileConfig(), dask=cluster.scheduler_address)
    killer.join()
    assert told == rows
    assert zips(there) == zips(here)
    assert TileIndex.open(there).digest == TileIndex.open(here).digest
    assert list(there.tiles.rglob("*.part")) == []


def test_a_bad_slide_costs_its_row_on_a_cluster_too(workspace, paint, cluster):
    directory = paint("good.tif", width_px=512, height_px=512).path.parent
    (directory / "bad.svs").write_bytes(b"no slide" * 1000)
    rows = tile_archive(directory, workspace, TileConfig(), dask=cluster.scheduler_address)
    assert [row.tile_status for row in rows] == ["failed", "tiled"]
    assert "not a slide" in rows[0].reason


def test_no_scheduler_is_one_clear_error_and_nothing_hangs_on(workspace, painted_slide, monkeypatch):
    monkeypatch.setattr(distributed, "Client", lambda *_, **__: pytest.fail("its client tries for a minute"))
    with pytest.raises(HistosslError, match=r"--dask tcp://127.0.0.1:1: no Dask scheduler answers"):
        tile_archive(painted_slide.path.parent, workspace, TileConfig(), dask="tcp://127.0.0.1:1")


def test_an_address_that_is_none_is_one_clear_error(workspace, painted_slide):
    with pytest.raises(HistosslError, match="--dask nonsense://x"):
        tile_archive(painted_slide.path.parent, workspace, TileConfig(), dask="nonsense://x")
    with pytest.raises(HistosslError, match=r"--dask foo: no Dask scheduler answers there .*HOST:PORT"):
        tile_archive(painted_slide.path.parent, workspace, TileConfig(), dask="foo")


def test_a_cluster_without_workers_is_told(workspace, painted_slide, capsys):
    gc.collect()  # clients of the tests before that never connected: Dask closes them where they are collected, and in
    # the loop of this test's worker, which is of the same process, that would be for ever
    with distributed.LocalCluster(
        n_workers=0,
        threads_per_worker=1,
        protocol="tcp://",
        processes=False,
        host="127.0.0.1",
        dashboard_address=None,
        silence_logs=50,
    ) as empty:
        timer = threading.Timer(1.0, empty.scale, [1])
        timer.start()
        tile_archive(painted_slide.path.parent, workspace, TileConfig(), dask=empty.scheduler_address)
        timer.join()
    assert "0 workers, waiting" in capsys.readouterr().err
