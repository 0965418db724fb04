"""The main job on the embedded model, small enough for a few minutes on two cores."""

from __future__ import annotations

import shutil
from pathlib import Path

from sedimo.api.job import JobResult, run
from sedimo.api.order import BudgetOrder, Order, SamplingOrder
from sedimo.bank import SILENT, Progress
from sedimo.errors import InputError

SOURCE = "zoo:cifar-dit"
MARK = "sedimo_recipe.json"  # every folder that we wrote has it


def run_demo(out: Path, bits: float, progress: Progress = SILENT, *, command: str = "sedimo demo") -> JobResult:
    """Quantizes the embedded pipeline into `out`; the result of an earlier demo there is replaced.

    Raises:
        InputError: `out` holds something else, or a budget that cannot be kept.
        MissingExtraError: the embedded model is not installed.
    """
    if out.exists() and any(out.iterdir()):
        if not (out / MARK).is_file():
            raise InputError(f"{out} holds something that no demo wrote; choose another folder with -o")
        shutil.rmtree(out)
    sampling = SamplingOrder(n_seeds=8, n_steps=10, n_check_seeds=32)
    return run(Order(SOURCE, out, BudgetOrder(bits=bits), sampling=sampling), progress, command=command)
