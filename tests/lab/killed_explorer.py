"""A nursery: once ready it says `ready`, then forks a process that explores a toy pipeline for each line it reads.

A line is `FOLDER N_TRIALS EXECUTOR`. The nursery writes `begin PID`, `trial` for each saved trial, and `end STATUS`.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from pathlib import Path

import torch

from sedimo.bank import fit_bank
from sedimo.lab.exploration import Exploration
from sedimo.lab.measuring import TrialWorker, run_trials
from sedimo.lab.study import Study
from sedimo.pipelines.adapter import Sampling
from toy_pipeline import ToyAdapter, ToyWeights, toy_space

FORMATS = "uaq2,uaq3,uaq4,uaq5,uaq6,uaq7,uaq8"
SAMPLING = Sampling(seeds=(1, 2, 3), n_steps=2, batch_size=2)


class Telling:
    """Says each saved trial at once."""

    def start(self, total, label):
        pass

    def advance(self, n=1):
        os.write(1, b"trial\n" * n)

    def done(self):
        pass


def toy_worker(cache):
    adapter = ToyAdapter()
    bank = fit_bank(ToyWeights(adapter.denoiser), toy_space(adapter.denoiser, FORMATS), cache=cache)
    return TrialWorker(adapter, bank, SAMPLING, objective="final_latents")


def explore(study, exploration, *, n_trials, **how):
    study.claim("exploration", exploration)
    return run_trials(study, [exploration.recipe(index) for index in range(n_trials)], **how)


def explore_toy(folder, n_trials, executor):
    space = toy_space(ToyAdapter().denoiser, FORMATS)
    with Study(folder) as study:
        explore(
            study,
            Exploration(7, space),
            n_trials=n_trials,
            setting=toy_worker(folder).setting,
            make_worker=functools.partial(toy_worker, folder),
            n_processes=2 if executor == "process" else 0,
            progress=Telling(),
        )


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        explore_toy(Path(folder), 1, "serial")  # what is loaded late is loaded before the forks
    os.write(1, b"ready\n")
    for line in sys.stdin:
        folder, n_trials, executor = line.split()
        pid = os.fork()
        if pid == 0:
            os.write(1, f"begin {os.getpid()}\n".encode())
            explore_toy(Path(folder), int(n_trials), executor)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        os.write(1, f"end {os.waitstatus_to_exitcode(status)}\n".encode())


def dying_worker():
    os._exit(9)
