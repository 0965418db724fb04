"""What people see while they wait."""

from __future__ import annotations

import sys
import threading

import pytest
import tqdm.std

from sedimo.cli import console


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    return now


def test_lines_tell_the_time_left_by_the_steps_done_so_far(clock, capsys):
    progress = console.ConsoleProgress()
    progress.start(40, "measuring")
    for seconds in (4.0, 7.0, 9.0):
        clock[0] += seconds
        progress.advance(1)
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [
        "measuring: 0 of 40, about ? left",
        "measuring: 2 of 40, about 03:29 left",
    ]
    clock[0] += 2.0
    progress.advance(37)
    progress.done()
    progress.done()
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "measuring: 40 of 40, about 00:00 left\n")


def test_a_new_stage_begins_its_own_estimate(clock, capsys):
    progress = console.ConsoleProgress()
    progress.start(10, "fitting")
    clock[0] += 1000
    progress.start(4, "measuring")
    clock[0] += 20
    progress.advance(2)
    assert capsys.readouterr().err.splitlines()[-1] == "measuring: 2 of 4, about 00:20 left"
    progress.done()


def test_the_bar_of_a_terminal_is_on_standard_error_and_starts_no_thread(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    threads = threading.active_count()
    progress = console.ConsoleProgress()
    progress.start(2, "measuring")
    assert threading.active_count() == threads
    progress.advance(2)
    progress.done()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "measuring: 100%" in shown.err
