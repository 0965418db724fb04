"""Measuring what a study lacks, trials of whole recipes and parts of anything else: safe to kill at any moment.

Workers compute, the driver writes. Ctrl-C once: nothing new is started, what runs is finished and saved, and people
are told how to go on. Ctrl-C twice: stop at once.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from types import FrameType
from typing import TypeVar

import torch

from sedimo.bank import Bank
from sedimo.codec import content_key
from sedimo.errors import Interrupted, StateError
from sedimo.lab.exchange import Prober
from sedimo.lab.images import feature_extractor
from sedimo.lab.objective import Reference, counted_calls, measure, measure_reference
from sedimo.lab.study import Execution, ObjectiveName, Setting, Study, Trial
from sedimo.pipelines.adapter import PipelineAdapter, Sampling
from sedimo.pipelines.trajectory import Trajectory, record
from sedimo.progress import SILENT, Progress
from sedimo.space import Recipe

logger = logging.getLogger(__name__)

Part = TypeVar("Part")
Result = TypeVar("Result")
References = dict[tuple[ObjectiveName, Sampling], Reference]


class StopRequest:
    """Whether the user asked to stop; work checks it between two units that are saved."""

    is_set = False

    def check(self, how_to_resume: str) -> None:
        """Ends the work when the user asked for it."""
        if self.is_set:
            raise Interrupted(how_to_resume)


@contextlib.contextmanager
def graceful_interrupt() -> Iterator[StopRequest]:
    """While inside, the first SIGINT sets the request and the second one raises KeyboardInterrupt."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # never set: signals cannot be caught here
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        if request.is_set:
            raise KeyboardInterrupt
        request.is_set = True
        logger.warning("finishing what runs; press Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, before)


class Parts:
    """The parts of one measurement of a denoiser, kept in a study if there is one, with what each took."""

    def __init__(self, adapter: PipelineAdapter, study: Study | None, progress: Progress = SILENT) -> None:
        self._adapter, self._study, self._progress = adapter, study, progress

    def trajectory(self, sampling: Sampling, setting: Setting, *, at_most: int | None = None) -> Trajectory:
        """The recorded calls of a plan; they are too large to keep, but what the first time took is kept."""
        key = content_key({"trajectory": setting})
        return self._measured(key, lambda: record(self._adapter, sampling, at_most=at_most))

    def part(self, kind: type[Part], key: str, measure: Callable[[], Part]) -> Part:
        """The part of that name from the study, or measured now and saved there; without a study, measured."""
        saved = self._study.probe(kind, key) if self._study else None
        if self._study and saved is not None:
            self._study.account(key)
            return saved
        part = self._measured(key, measure)
        if self._study:
            self._study.put_probe(key, part)
        return part

    def each(
        self, kind: type[Part], label: str, n_parts: int, works: Iterable[tuple[str, Callable[[], Part]]]
    ) -> Iterator[Part]:
        """The parts of `n_parts` works (content key, and how to measure it) one by one: the one resumable loop."""
        with self.stage(label, n_parts) as stop:
            for key, measure in works:
                yield self.part(kind, key, measure)
                self._progress.advance(1)
                self.check(stop)

    @contextlib.contextmanager
    def stage(self, label: str, n_steps: int) -> Iterator[StopRequest]:
        """A stage of the work that people see, and that Ctrl-C may ask to end (see `check`)."""
        self._progress.start(n_steps, label)
        with graceful_interrupt() as stop:
            yield stop
        self._progress.done()

    def check(self, stop: StopRequest) -> None:
        """Ends the work when the user asked for it, and says where what was measured is."""
        kept = f"saved in {self._study.path}; run the same command again to go on" if self._study else ""
        stop.check(f"interrupted: what was measured is {kept or 'lost; give a study to keep it'}")

    def _measured(self, key: str, measure: Callable[[], Result]) -> Result:
        begin = time.perf_counter()
        with counted_calls(self._adapter) as calls:
            found = measure()
        seconds = time.perf_counter() - begin
        if self._study:
            self._study.account(key, Execution.here(seconds, len(calls)))
            self._study.took(seconds)
        return found


def setting_of(
    adapter: PipelineAdapter, sampling: Sampling, *, weights_digest: str, objective: ObjectiveName = "final_latents"
) -> Setting:
    """The setting that names the trials of a pipeline under a sampling plan."""
    parameter = next(adapter.denoiser.parameters())
    return Setting(
        weights_digest=weights_digest,
        pipeline=adapter.identity,
        objective=objective,
        seeds=sampling.seeds,
        n_steps=sampling.n_steps,
        conditions=sampling.conditions,
        guidance=sampling.guidance,
        resolution=sampling.resolution,
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=parameter.device.type,
        extractor=feature_extractor()[0] if objective == "fid" else None,
    )


class TrialWorker:
    """Measures recipes on one pipeline; `references` are shared by workers that are alike at full precision."""

    def __init__(
        self,
        adapter: PipelineAdapter,
        bank: Bank,
        sampling: Sampling,
        *,
        objective: ObjectiveName,
        references: References | None = None,
    ) -> None:
        self._adapter, self._sampling = adapter, sampling
        self.setting = setting_of(adapter, sampling, weights_digest=bank.digest, objective=objective)
        self._prober = Prober(adapter.denoiser, bank)
        self._references: References = {} if references is None else references

    def measure(self, recipe: Recipe) -> Trial:
        """The trial of a recipe."""
        wanted = (self.setting.objective, self._sampling)
        if wanted not in self._references:
            self._prober.restore()
            self._references[wanted] = measure_reference(self.setting.objective, self._adapter, self._sampling)
        reference = self._references[wanted]
        begin = time.perf_counter()
        self._prober.switch(recipe)
        powers, measures = measure(self._adapter, reference)
        execution = Execution.here(time.perf_counter() - begin, reference.n_calls)
        return Trial(self.setting, recipe, powers, execution, measures)

    def close(self) -> None:
        """Gives the denoiser back at full precision."""
        self._prober.restore()


@dataclass(frozen=True, slots=True)
class CallTiming:
    """How long a denoiser call of the plan's batch takes, scheduler included [s], and how many a run has."""

    seconds_per_call: float
    n_calls: int


def time_calls(adapter: PipelineAdapter, sampling: Sampling) -> CallTiming:
    """Times two steps of the first batch, after a first step that warms up."""
    n_steps = min(2, sampling.n_steps)
    first = replace(sampling, seeds=sampling.seeds[: sampling.batch_size], n_steps=n_steps)
    adapter.sample(replace(first, n_steps=1))
    with counted_calls(adapter) as calls:
        begin = time.perf_counter()
        adapter.sample(first)
        seconds = (time.perf_counter() - begin) / max(1, len(calls))
    return CallTiming(seconds, round(len(calls) / n_steps * sampling.n_steps) * sampling.n_batches)


def missing_trials(recipes: Sequence[Recipe], study: Study | None, setting: Setting) -> tuple[Recipe, ...]:
    """The different ones of the recipes that a study has no trial of; all without a study."""
    known = study.trial_keys() if study else frozenset[str]()
    wanted = {setting.trial_key(recipe): recipe for recipe in recipes}
    return tuple(recipe for key, recipe in wanted.items() if key not in known)


def run_trials(
    study: Study | None,
    recipes: Sequence[Recipe],
    *,
    setting: Setting,
    make_worker: Callable[[], TrialWorker],
    n_processes: int = 0,
    progress: Progress = SILENT,
) -> tuple[Trial, ...]:
    """The trials of the recipes, in their order; those that the study lacks are measured and saved first.

    Without a study, all are measured and none is kept. See `in_processes` for workers of `n_processes`; 0 is one in
    this process.
    """
    missing, measured = missing_trials(recipes, study, setting), dict[str, Trial]()
    if missing:
        logger.info("%d of %d trials are measured already", len(recipes) - len(missing), len(recipes))
        begin = time.perf_counter()
        try:
            with graceful_interrupt() if study else contextlib.nullcontext(StopRequest()) as stop:
                progress.start(len(missing), f"measuring recipes by {setting.objective}")
                for trial in _measured(make_worker, missing, stop, n_processes):
                    if trial.setting != setting:
                        raise StateError("a worker measured under another setting than the campaign's")
                    if study:
                        study.put_trial(trial)
                    measured[trial.key] = trial
                    progress.advance(1)
        finally:
            progress.done()
        if study:
            study.took(time.perf_counter() - begin)
            if len(measured) < len(missing):
                stop.check(
                    f"interrupted: {len(measured)} of {len(missing)} missing trials were measured and saved in "
                    f"{study.path}. Run the same command again to measure the rest."
                )
    keys = [setting.trial_key(recipe) for recipe in recipes]
    found = [study.trial(key) if study else measured[key] for key in keys]
    if study and None in found:
        raise StateError(f"trial {keys[found.index(None)][:12]} vanished from {study.path}")
    return tuple(trial for trial in found if trial is not None)


def _measured(
    make_worker: Callable[[], TrialWorker], recipes: Sequence[Recipe], stop: StopRequest, n_processes: int
) -> Iterator[Trial]:
    if n_processes:
        yield from in_processes(make_worker, recipes, stop, n_processes)
        return
    with contextlib.closing(make_worker()) as worker:
        for recipe in recipes:
            if stop.is_set:
                return
            yield worker.measure(recipe)


def in_processes(
    make_worker: Callable[[], TrialWorker], recipes: Sequence[Recipe], stop: StopRequest, n_processes: int
) -> Iterator[Trial]:
    """Trials as they are finished, in any order, by processes that each have their own worker and a share of the cores.

    A process must be able to start with `make_worker`: a module's function, or a partial of one with records and paths.
    """
    n_processes = min(n_processes, len(recipes))
    threads = max(1, (os.cpu_count() or 1) // n_processes)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(n_processes, context, initializer=_begin, initargs=(make_worker, threads))
    waiting, running = list(reversed(recipes)), set[Future[Trial]]()
    try:
        while running or (waiting and not stop.is_set):
            while waiting and len(running) < n_processes and not stop.is_set:
                running.add(pool.submit(_measure_in_process, waiting.pop()))
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)
    except BrokenExecutor as error:
        if not stop.is_set:  # else Ctrl-C reached a worker that had not begun yet
            raise StateError(
                "a worker process died, perhaps for lack of memory; finished trials are saved. Take fewer workers"
            ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_workers: list[TrialWorker] = []  # the one worker of a started process; stays empty in the driver


def _begin(make_worker: Callable[[], TrialWorker], threads: int) -> None:
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


def _measure_in_process(recipe: Recipe) -> Trial:
    return _workers[0].measure(recipe)
