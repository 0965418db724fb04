"""Who measures trials: this process, or several that each hold a pipeline of their own.

Workers compute, the driver writes: an executor hands trials back and never touches a study. When a stop is
requested it starts nothing new, and hands back what is running.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from typing import Protocol

import torch

from sedimo.errors import InputError, StateError
from sedimo.lab.interrupt import StopRequest
from sedimo.lab.trial import Trial
from sedimo.space import Recipe


class Worker(Protocol):
    """Measures one recipe at a time; `close` gives its denoiser back as it was."""

    def measure(self, recipe: Recipe) -> Trial:
        """The trial of a recipe."""

    def close(self) -> None:
        """Ends the work."""


MakeWorker = Callable[[], Worker]


class Executor(Protocol):
    """Measures recipes with workers that it makes."""

    def run(self, make_worker: MakeWorker, recipes: Sequence[Recipe], stop: StopRequest) -> Iterator[Trial]:
        """Trials of the recipes, as they are finished, in any order; fewer when a stop is requested."""


class SerialExecutor:
    """One worker in this process, with all threads."""

    def run(self, make_worker: MakeWorker, recipes: Sequence[Recipe], stop: StopRequest) -> Iterator[Trial]:
        """Trials in the order of the recipes."""
        if not recipes:
            return
        worker = make_worker()
        try:
            for recipe in recipes:
                if stop.is_set:
                    return
                yield worker.measure(recipe)
        finally:
            worker.close()


class ProcessExecutor:
    """Several processes, each with its own worker and cores / workers threads.

    `make_worker` must be something a process can be started with: a module-level function, or a
    `functools.partial` of one whose arguments are records and paths.
    """

    def __init__(self, n_workers: int) -> None:
        """Raises InputError unless there is at least one worker."""
        if n_workers < 1:
            raise InputError(f"there must be at least one worker, got {n_workers}")
        self._n_workers = n_workers

    def run(self, make_worker: MakeWorker, recipes: Sequence[Recipe], stop: StopRequest) -> Iterator[Trial]:
        """Trials as they are finished.

        Raises:
            StateError: a worker died.
        """
        n_workers = min(self._n_workers, len(recipes))
        if n_workers == 0:
            return
        threads = max(1, (os.cpu_count() or 1) // n_workers)
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(n_workers, context, initializer=_begin, initargs=(make_worker, threads))
        waiting, running = list(reversed(recipes)), set[Future[Trial]]()
        try:
            while running or (waiting and not stop.is_set):
                while waiting and len(running) < n_workers and not stop.is_set:
                    running.add(pool.submit(_measure, waiting.pop()))
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        except BrokenExecutor as error:
            if not stop.is_set:  # else Ctrl-C reached a worker that had not begun yet
                raise StateError(
                    "a worker process died, perhaps for lack of memory; finished trials are saved. Take fewer workers"
                ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_workers: list[Worker] = []  # the one worker of a started process; stays empty in the driver


def _begin(make_worker: MakeWorker, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides when to stop
    threading.Thread(target=_end_with_driver, daemon=True).start()
    torch.set_num_threads(threads)
    _workers.append(make_worker())


def _end_with_driver() -> None:
    """Ends this process once the driver is gone: one that was killed cannot say so, and a pool would wait for ever."""
    driver = multiprocessing.parent_process()
    if driver is not None:
        driver.join()
        os._exit(1)


def _measure(recipe: Recipe) -> Trial:
    return _workers[0].measure(recipe)
