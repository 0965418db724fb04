"""What people see while they wait."""

from __future__ import annotations

import pytest

from sedimo.cli import console


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_lines_tell_the_time_left_by_the_trials_done_so_far(clock, capsys):
    progress = console.ConsoleProgress()
    progress.start(40, "measuring")
    for seconds in (4.0, 7.0, 9.0):
        clock[0] += seconds
        progress.advance(1)
    assert capsys.readouterr().err.splitlines() == ["measuring: 40 steps", "measuring: 2 of 40, about 3 min left"]
    clock[0] += 2.0
    progress.advance(37)
    assert capsys.readouterr().err.splitlines() == ["measuring: 40 of 40, about 0 s left"]
    progress.done()
    assert capsys.readouterr().err == "measuring: done\n"


def test_a_new_stage_begins_its_own_estimate(clock, capsys):
    progress = console.ConsoleProgress()
    progress.start(10, "fitting")
    clock[0] += 1000
    progress.start(4, "measuring")
    clock[0] += 20
    progress.advance(2)
    assert capsys.readouterr().err.splitlines()[-1] == "measuring: 2 of 4, about 20 s left"


def test_durations_are_told_in_the_units_people_use():
    assert [console.duration(s) for s in (0.4, 89, 90, 3700)] == ["0 s", "89 s", "2 min", "1 h 02 min"]
