"""The main job on the embedded model, small enough for a few minutes on two cores."""

from __future__ import annotations

from pathlib import Path

from sedimo.api.job import JobResult, run
from sedimo.api.order import BudgetOrder, Order, SamplingOrder
from sedimo.api.search_order import SearchOrder
from sedimo.bank import SILENT, Progress
from sedimo.errors import InputError

SOURCE = "zoo:cifar-dit"
SAMPLING = SamplingOrder(n_seeds=8, n_steps=10, n_check_seeds=16)
SEARCH = SearchOrder(n_trials=60, n_rounds=1)  # few: a serious run has 300
MARK = ".sedimo-demo"


def run_demo(out: Path, bits: float, progress: Progress = SILENT, *, command: str = "sedimo demo") -> JobResult:
    """Quantizes the embedded pipeline into `out`; the result of an earlier demo there is replaced.

    Raises:
        InputError: `out` holds something else, or a budget that cannot be kept.
        MissingExtraError: the embedded model is not installed.
    """
    is_used = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if is_used and not (out / MARK).is_file():
        raise InputError(f"{out} holds something that no demo wrote; choose another folder with -o")
    order = Order(SOURCE, out, BudgetOrder(bits=bits), "gnn", sampling=SAMPLING, overwrite=is_used, search=SEARCH)
    result = run(order, progress, command=command)
    (out / MARK).touch()
    return result
