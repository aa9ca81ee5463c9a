"""What the launcher of several processes promises: time to save, and no quiet end where nothing was saved."""

import signal

import pytest
import torch.distributed.launcher.api as launcher
from torch.distributed.elastic.multiprocessing.api import SignalException

from histossl import launched
from histossl.errors import TrainingError
from histossl.training.distributed import launch


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
