"""Running the trials that a study lacks: safe to kill at any moment, told how long it takes beforehand."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from sedimo.bank import SILENT, Progress
from sedimo.errors import StateError
from sedimo.lab.executors import Executor, MakeWorker, SerialExecutor
from sedimo.lab.exploration import Exploration
from sedimo.lab.interrupt import StopRequest, graceful_interrupt
from sedimo.lab.study import Study
from sedimo.lab.trial import Setting, Trial
from sedimo.lab.worker import CallTiming
from sedimo.space import Recipe

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
