"""What the launcher of several processes promises: time to save, and no quiet end where nothing was saved."""

import os
import signal

import pytest
import torch.distributed.launcher.api as launcher
from torch.distributed.elastic.multiprocessing.api import SignalException

from histossl import launched
from histossl.errors import TrainingError, UsageError
from histossl.training.distributed import gpu_of, is_worker, launch


def stopped_workers(monkeypatch: pytest.MonkeyPatch, *, saved: bool) -> list[launcher.LaunchConfig]:
    """The launcher is told to stop; its workers save, or are killed before they could."""
    seen: list[launcher.LaunchConfig] = []

    def elastic_launch(config: launcher.LaunchConfig, _: str):
        def run(*_: str) -> None:
            seen.append(config)
            if saved:
                launched.tell_end()
            raise SignalException("asked to stop", signal.SIGTERM)

        return run

    monkeypatch.setattr(launcher, "elastic_launch", elastic_launch)
    return seen


def test_processes_that_are_asked_to_stop_have_minutes_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = stopped_workers(monkeypatch, saved=True)
    assert launch(2, [], 0) == 0
    assert seen[0].shutdown_timeout is not None
    assert seen[0].shutdown_timeout >= 300


def test_a_signal_that_ends_processes_before_they_saved_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_workers(monkeypatch, saved=False)
    with pytest.raises(TrainingError, match="SIGTERM ended the processes before they had saved"):
        launch(2, [], 0)


def test_a_batch_script_is_no_worker_before_srun_has_started_any(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what is_worker sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert not is_worker()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert is_worker()
    assert os.environ["WORLD_SIZE"] == "4"


def test_a_task_that_sees_one_gpu_takes_it_whatever_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    assert gpu_of(2, 4) == 2
    with pytest.raises(UsageError, match="process 1 of this machine has no GPU: it shows 1"):
        gpu_of(1, 1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert gpu_of(1, 1) == 0
