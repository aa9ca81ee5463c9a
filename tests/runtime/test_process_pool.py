"""One job's crash or hang costs that job and nothing else."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from histossl.core.errors import SlideError
from histossl.runtime.process_pool import Report, run_jobs


def work(job: Any, report: Report) -> str:
    if job == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if job == "exit":
        os._exit(3)
    if job == "hang":
        time.sleep(600)
    if job == "ours":
        raise SlideError("A1.svs: no")
    if job == "theirs":
        raise KeyError("x")
    if job == "slow":
        for _ in range(6):
            time.sleep(0.4)
            report(1)
    return str(job).upper()


def test_every_job_is_answered_once_whatever_the_others_do() -> None:
    jobs = ["a", "crash", "b", "exit", "ours", "theirs", "hang", "c", "d"]
    answers = {jobs[event.job]: event for event in run_jobs(work, jobs, 2, 1.5) if event.kind != "progress"}
    assert set(answers) == set(jobs)
    assert [answers[job].value for job in "abcd"] == ["A", "B", "C", "D"]
    assert "SIGSEGV" in answers["crash"].value
    assert "exit code 3" in answers["exit"].value
    assert "hung" in answers["hang"].value
    assert answers["hang"].hung
    assert isinstance(answers["ours"].error, SlideError)
    assert "KeyError" in answers["theirs"].value


def test_a_slow_job_that_reports_is_not_stopped() -> None:
    events = list(run_jobs(work, ["slow"], 1, 1.5))
    assert [event.value for event in events] == [0, 1, 1, 1, 1, 1, 1, "SLOW"]


def test_a_job_whose_process_dies_before_it_begins_is_given_to_another() -> None:
    jobs = ["dies afterwards", "b", "c"]
    done = []
    for event in run_jobs(die_afterwards, jobs, 1, 60):
        if event.kind != "progress":
            done.append((jobs[event.job], event.kind))
            time.sleep(0.6)  # meanwhile the process goes, and is then handed the next job
    assert done == [(job, "done") for job in jobs]


def die_afterwards(job: str, report: Report) -> str:
    if job == "dies afterwards":
        threading.Timer(0.2, os._exit, [7]).start()
    return job


def test_closing_early_leaves_no_process(tmp_path: Path) -> None:
    events = run_jobs(where, [str(tmp_path)] * 2, 2, 60)
    next(events)
    for _ in range(100):
        if len(list(tmp_path.iterdir())) == 2:
            break
        time.sleep(0.1)
    events.close()
    for one in tmp_path.iterdir():
        assert not Path(f"/proc/{one.name}").exists()


def where(folder: str, report: Report) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)
