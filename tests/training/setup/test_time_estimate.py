"""The time that is told beforehand is the time that it takes."""

import time

import pytest

from histossl.training.setup.time_estimate import Expected, Pace, clock, duration, steps_within


def test_one_look_is_one_look() -> None:
    assert "(1 step of 2 s, 1 look of 3 s)" in str(Expected(2.0, 1, 3.0, 1))


def paced(num_steps: int, step_s: float, monkeypatch: pytest.MonkeyPatch, first: int = 0) -> tuple[int, Expected]:
    """A run whose first step takes ten seconds and the others `step_s`: (when it speaks, what it says)."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    pace, told = Pace(first, num_steps, look_every=50), []
    with pace.look():
        clock[0] += 7
    pace.resumed()
    for done in range(first + 1, num_steps + 1):
        clock[0] += 10 if done == first + 1 else step_s
        pace.stepped()
        if pace.is_look(done):
            with pace.look():
                clock[0] += 3
        if expected := pace.expected(done):
            told.append((done, expected))
        clock[0] += 100  # a checkpoint, say: no part of a step
        pace.resumed()
    (only,) = told
    return only


def test_it_speaks_once_after_twenty_steps_beside_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    done, expected = paced(1000, 0.5, monkeypatch)
    assert done == 21
    assert expected == Expected(pytest.approx(0.5), 979, pytest.approx(7), 20)
    assert expected.total_s == pytest.approx(979 * 0.5 + 20 * 7)


def test_slow_steps_and_short_runs_do_not_wait_for_twenty(monkeypatch: pytest.MonkeyPatch) -> None:
    assert paced(1000, 10.0, monkeypatch)[0] == 3
    assert paced(100, 0.5, monkeypatch)[0] == 11
    assert paced(8, 0.5, monkeypatch)[0] == 3


def test_a_run_that_goes_on_counts_from_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    done, expected = paced(1000, 0.5, monkeypatch, first=900)
    assert (done, expected.num_steps, expected.num_looks) == (911, 89, 2)


def test_looks_that_were_never_timed_are_told_as_such() -> None:
    """As in a run that goes on: its first look is still to come."""
    assert "1 look that is not timed yet" in str(Expected(2.0, 30, 0.0, 1))
    assert str(Expected(2.0, 30, 0.0, 2)) == "about 1.0 min (30 steps of 2 s, 2 looks that are not timed yet)"
    assert str(Expected(2.0, 30, 6.0, 2)) == "about 1.2 min (30 steps of 2 s, 2 looks of 6 s)"


def test_durations_read_as_people_say_them() -> None:
    assert [duration(s) for s in (0.25, 42, 90, 5400)] == ["0.25 s", "42 s", "1.5 min", "1 h 30 min"]


def test_the_end_is_a_time_of_day_and_a_day_where_it_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    noon_s = time.mktime((2026, 11, 25, 12, 0, 0, 0, 0, -1))
    monkeypatch.setattr("time.time", lambda: noon_s)
    monkeypatch.setattr("time.localtime", lambda s=noon_s, real=time.localtime: real(s))
    assert clock(90 * 60) == "13:30"
    assert clock(25 * 3600) == "13:00 on Thu 26 Nov"


def test_steps_of_a_number_of_hours_leave_time_for_looks_and_the_rest() -> None:
    num_steps = steps_within(3600, 0.5, 20, 100, 60)
    whole = Expected(0.5, num_steps, 20, 1 + num_steps // 100, 60)
    assert 3600 - 25 < whole.total_s <= 3600
    assert steps_within(10, 0.5, 20, 100, 60) == 1


def test_speed_is_that_of_steps_without_looks_and_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    pace = Pace(0, 5, look_every=2)
    pace.resumed()
    for _ in range(5):
        clock[0] += 0.5
        pace.stepped()
        clock[0] += 30
        pace.resumed()
    assert pace.stepped_s == pytest.approx(2.5)
