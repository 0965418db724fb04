"""A study whose process is killed again and again ends like one that was left alone, byte for byte."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from killed_explorer import dying_worker

from sedimo.errors import StateError
from sedimo.lab.measuring import StopRequest, in_processes
from sedimo.lab.study import FILE_NAME, Study, export_trials
from sedimo.space import Recipe
from tolerances import FLOAT32_SAMPLING

N_KILLS = 20
N_TRIALS = 400
PAUSE_SECONDS = 0.02  # a few trials long: kills reach every moment of a trial
OPENING_SECONDS = 0.2  # about what opening the study and fitting the bank take

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills by SIGKILL")


class Nursery:
    """Starts processes that explore, one at a time."""

    def __init__(self, process):
        self._process = process
        while self._word() != ["ready"]:
            pass

    def begin(self, folder, n_trials=N_TRIALS, executor="serial"):
        self._process.stdin.write(f"{folder} {n_trials} {executor}\n")
        self._process.stdin.flush()
        word, pid = self._word()
        assert word == "begin"
        return int(pid)

    def wait_for_trials(self, n):
        for _ in range(n):
            assert self._word() == ["trial"]

    def end(self):
        """Trials told until the end, and the exit status."""
        told = 0
        while (words := self._word()) == ["trial"]:
            told += 1
        assert words[0] == "end"
        return told, int(words[1])

    def run(self, folder, n_trials=N_TRIALS):
        self.begin(folder, n_trials)
        told, status = self.end()
        assert status == 0
        return told

    def _word(self):
        line = self._process.stdout.readline()
        assert line, "the nursery ended"
        return line.split()


@pytest.fixture(scope="module")
def nursery():
    here = Path(__file__).parent
    folders = [str(here), str(here.parent)]  # the latter for `toy_pipeline`
    code = f"import sys; sys.path[:0] = {folders!r}; import killed_explorer; killed_explorer.main()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Nursery(process)
        process.stdin.close()


@contextmanager
def looked_at(folder, tmp_path):
    """The study as its file is now, in a copy, so that looking repairs nothing."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    try:
        with Study(copy) as study:
            yield study
    finally:
        shutil.rmtree(copy)


def test_a_study_killed_twenty_times_ends_like_one_left_alone(nursery, tmp_path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    nursery.run(alone)
    killed.mkdir()
    uniform, saved, statuses = random.Random(20), [0], []
    for kill in range(N_KILLS):
        is_early = kill % 4 == 0  # while the study is opened or the bank is fitted
        pid = nursery.begin(killed)
        n_awaited = 0 if is_early else uniform.randint(1, 6)
        nursery.wait_for_trials(n_awaited)
        time.sleep(uniform.uniform(0, OPENING_SECONDS if is_early else PAUSE_SECONDS))
        os.kill(pid, signal.SIGKILL)
        told, status = nursery.end()
        statuses.append(status)
        with looked_at(killed, tmp_path) as study:
            saved.append(len(study.trial_keys()))
        assert saved[-1] >= saved[-2] + n_awaited + told  # what was told is saved
    with Study(alone, create=False) as study:
        expected, n_trials = export_trials(study), len(study.trial_keys())
    gains = np.diff(saved)
    assert statuses.count(-signal.SIGKILL) >= 0.9 * N_KILLS
    assert (gains > 0).sum() >= N_KILLS // 2
    assert saved[-1] < n_trials
    assert nursery.run(killed) == n_trials - saved[-1]  # nothing is measured twice
    with Study(killed, create=False) as study:
        assert export_trials(study) == expected


def test_workers_end_with_a_killed_driver_and_the_study_goes_on(nursery, tmp_path):
    n_trials = 60
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    nursery.run(alone, n_trials)
    pid = nursery.begin(killed, n_trials, "process")
    nursery.wait_for_trials(2)
    workers = psutil.Process(pid).children(recursive=True)
    os.kill(pid, signal.SIGKILL)
    told, status = nursery.end()
    assert (status, len(workers) >= 2) == (-signal.SIGKILL, True)
    _, alive = psutil.wait_procs(workers, timeout=120)
    assert alive == []
    with looked_at(killed, tmp_path) as study:
        n_saved = len(study.trial_keys())
    n_left = nursery.run(killed, n_trials)
    assert 2 + told <= n_saved
    exports = [_exported(folder) for folder in (alone, killed)]
    assert [t["key"] for t in exports[0]] == [t["key"] for t in exports[1]]
    assert n_saved + n_left == len(exports[0])
    for one, other in zip(*exports, strict=True):
        assert np.allclose(one["powers"]["noise"], other["powers"]["noise"], rtol=FLOAT32_SAMPLING)


def test_a_worker_that_dies_is_a_clear_error():
    with pytest.raises(StateError, match="a worker process died"):
        list(in_processes(dying_worker, [Recipe({})], StopRequest(), 1))


def _exported(folder):
    with Study(folder / FILE_NAME, create=False) as study:
        return json.loads(export_trials(study))["trials"]
