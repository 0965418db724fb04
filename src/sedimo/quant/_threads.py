"""Rows of a weight, shared out to as many threads as torch may use."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_CHUNK = 1 << 17  # weights per task: independent of the threads, so that results are too


def over_rows(n_rows: int, n_inputs: int, task: Callable[[int, int], None]) -> None:
    """Calls task(start, stop) for consecutive ranges of rows; the task must release the interpreter's lock."""
    step = max(1, _CHUNK // max(n_inputs, 1))
    ranges = [(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]
    n_threads = min(torch.get_num_threads(), len(ranges))
    if n_threads <= 1:
        for start, stop in ranges:
            task(start, stop)
        return
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in pool.map(lambda pair: task(*pair), ranges):
            pass
