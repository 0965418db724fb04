"""Running the trials that a study lacks: safe to kill at any moment, told how long it takes beforehand."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from sedimo.bank import SILENT, Bank, Progress
from sedimo.errors import InputError, StateError
from sedimo.lab.exchange import Prober
from sedimo.lab.exploration import Exploration
from sedimo.lab.images import feature_extractor
from sedimo.lab.objective import Reference, measure, measure_reference
from sedimo.lab.parts import StopRequest, graceful_interrupt
from sedimo.lab.study import Execution, ObjectiveName, Setting, Study, Trial, versions
from sedimo.pipelines.adapter import PipelineAdapter, Sampling
from sedimo.space import Recipe

References = dict[tuple[ObjectiveName, Sampling], Reference]


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
    """Measures recipes on one pipeline. The reference is sampled when the first one comes.

    Workers whose denoisers are the same function at full precision may share the `references` that were sampled.
    """

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
        self._prober = Prober(adapter.denoiser, bank.quantize, bank.input_quantizers)
        self._references: References = {} if references is None else references

    @property
    def reference(self) -> Reference:
        """What the full-precision pipeline gives."""
        wanted = (self.setting.objective, self._sampling)
        if wanted not in self._references:
            self._prober.restore()
            self._references[wanted] = measure_reference(self.setting.objective, self._adapter, self._sampling)
        return self._references[wanted]

    def measure(self, recipe: Recipe) -> Trial:
        """The trial of a recipe."""
        reference = self.reference
        begin = time.perf_counter()
        self._prober.switch(recipe)
        found = measure(self._adapter, reference)
        execution = Execution(
            seconds=time.perf_counter() - begin,
            n_calls=reference.n_calls,
            threads=torch.get_num_threads(),
            versions=versions(),
        )
        return Trial(self.setting, recipe, found.powers, execution, found.measures)

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
    counted: list[int] = []
    begin = time.perf_counter()
    adapter.sample(first, observer=lambda call: counted.append(call.step))
    seconds = (time.perf_counter() - begin) / max(1, len(counted))
    return CallTiming(seconds, round(len(counted) / n_steps * sampling.n_steps) * sampling.n_batches)


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


def _measure_in_process(recipe: Recipe) -> Trial:
    return _workers[0].measure(recipe)


logger = logging.getLogger(__name__)

_TRIAL_BYTES = 2_000  # of a row, besides the recipe and the powers
_ENTRY_BYTES = 60  # of a layer's entry in a recipe


@dataclass(frozen=True, slots=True)
class CampaignPlan:
    """What a campaign will take, estimated from one timed call.

    `n_calls` are denoiser calls, the reference's included; `memory_bytes` is what it needs besides the loaded
    pipeline, `disk_bytes` what the study grows by.
    """

    n_trials: int
    n_missing: int
    n_calls: int
    seconds: float
    memory_bytes: int
    disk_bytes: int


def plan_campaign(
    recipes: Sequence[Recipe], *, study: Study | None, setting: Setting, timing: CallTiming, weights_bytes: int
) -> CampaignPlan:
    """What measuring the recipes takes, those that the study already has left out.

    `weights_bytes` is the size of the denoiser's weights as loaded: a probed recipe holds as much again.
    """
    missing = _missing(recipes, study.trial_keys() if study else frozenset(), setting)
    n_calls = (len(missing) + 1) * timing.n_calls if missing else 0
    n_layers = max((len(recipe.layers) for recipe in missing), default=0)
    return CampaignPlan(
        n_trials=len(recipes),
        n_missing=len(missing),
        n_calls=n_calls,
        seconds=n_calls * timing.seconds_per_call,
        memory_bytes=2 * weights_bytes if missing else 0,
        disk_bytes=len(missing) * (_TRIAL_BYTES + n_layers * _ENTRY_BYTES + 50 * len(setting.seeds)),
    )


def run_trials(
    study: Study | None,
    recipes: Sequence[Recipe],
    *,
    setting: Setting,
    make_worker: MakeWorker,
    executor: Executor | None = None,
    progress: Progress = SILENT,
) -> tuple[Trial, ...]:
    """The trials of the recipes, in their order; those that the study lacks are measured and saved first.

    Ctrl-C once finishes and saves the running trial. Without a study, all are measured and none is kept.

    Raises:
        Interrupted: the user stopped it; calling again measures what is left.
        StateError: a worker measured under another setting than the one that names the trials.
    """
    keys = [setting.trial_key(recipe) for recipe in recipes]
    if study is None:
        found = _unsaved(recipes, setting, make_worker, progress)
        return tuple(found[key] for key in keys)
    missing = _missing(recipes, study.trial_keys(), setting)
    if missing:
        logger.info("%d of %d trials are measured already", len(recipes) - len(missing), len(recipes))
        with graceful_interrupt() as stop, study.measuring():
            _measure(study, missing, setting, (executor or SerialExecutor(), make_worker), (progress, stop))
    return tuple(_saved(study, key) for key in keys)


def explore(
    study: Study,
    exploration: Exploration,
    *,
    n_trials: int,
    setting: Setting,
    make_worker: MakeWorker,
    executor: Executor | None = None,
    progress: Progress = SILENT,
) -> tuple[Trial, ...]:
    """The first `n_trials` random recipes of a study, measured; those it has already are not measured again.

    Raises:
        Interrupted: the user stopped it; calling again measures what is left.
        StateError: the study was begun with another seed or space.
    """
    study.claim("exploration", exploration)
    recipes = [exploration.recipe(index) for index in range(n_trials)]
    return run_trials(study, recipes, setting=setting, make_worker=make_worker, executor=executor, progress=progress)


def _measure(
    study: Study,
    missing: Sequence[Recipe],
    setting: Setting,
    work: tuple[Executor, MakeWorker],
    control: tuple[Progress, StopRequest],
) -> None:
    (executor, make_worker), (progress, stop) = work, control
    n_done = 0
    progress.start(len(missing), f"measuring recipes by {setting.objective}")
    try:
        for trial in executor.run(make_worker, missing, stop):
            if trial.setting != setting:
                raise StateError("a worker measured under another setting than the campaign's")
            study.put_trial(trial)
            n_done += 1
            progress.advance(1)
    finally:
        progress.done()
    if n_done < len(missing):
        stop.check(
            f"interrupted: {n_done} of {len(missing)} missing trials were measured and saved in {study.path}. "
            "Run the same command again to measure the rest."
        )


def _unsaved(
    recipes: Sequence[Recipe], setting: Setting, make_worker: MakeWorker, progress: Progress
) -> dict[str, Trial]:
    distinct = _missing(recipes, frozenset(), setting)
    progress.start(len(distinct), f"measuring recipes by {setting.objective}")
    worker, found = make_worker(), dict[str, Trial]()
    try:
        for recipe in distinct:
            found[setting.trial_key(recipe)] = worker.measure(recipe)
            progress.advance(1)
    finally:
        worker.close()
        progress.done()
    return found


def _missing(recipes: Sequence[Recipe], known: frozenset[str], setting: Setting) -> tuple[Recipe, ...]:
    wanted = {setting.trial_key(recipe): recipe for recipe in recipes}
    return tuple(recipe for key, recipe in wanted.items() if key not in known)


def _saved(study: Study, key: str) -> Trial:
    trial = study.trial(key)
    if trial is None:
        raise StateError(f"trial {key[:12]} vanished from {study.path}")
    return trial
