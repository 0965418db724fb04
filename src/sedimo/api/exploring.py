"""Measuring random recipes of a source into a study: ordered, planned, and gone on with where it was.

The bank is fitted in full beforehand and kept in the study's folder, so that later stages and workers of their own
find every format. Nothing is measured before the whole order is known to make sense.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sedimo.api.explore_order import EXPLORATION, GRAPH, SOURCE, SPACE, ExploreOrder
from sedimo.api.measuring import make_bank
from sedimo.api.opening import OpenedSource, load_stored, open_pipeline
from sedimo.api.order import DYNAMIC_ACTIVATIONS, ActivationOrder, Compute
from sedimo.api.planning import cost_of_prior, seconds_per_fit
from sedimo.api.predicting import PRIOR, know
from sedimo.api.smooth_order import SmoothOrder
from sedimo.api.smoothing import smooth_source, smooth_stored
from sedimo.bank import SILENT, Bank, Progress, fit_bank
from sedimo.codec import to_plain
from sedimo.errors import InputError, StateError
from sedimo.measurement import campaign
from sedimo.measurement.executors import Executor, MakeWorker, ProcessExecutor, SerialExecutor
from sedimo.measurement.exploration import Exploration
from sedimo.measurement.images import Features, compare_distributions, draw_latents_and_features
from sedimo.measurement.smoothing import Smoothing, smooth_weights
from sedimo.measurement.study import FILE_NAME, Study
from sedimo.measurement.trial import ObjectiveName, Setting, Trial
from sedimo.measurement.worker import CallTiming, TrialWorker, setting_of, time_calls
from sedimo.pipelines.adapter import Sampling, WeightSource
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.pipelines.loading import load_pipeline
from sedimo.pipelines.weights import FileWeights, denoiser_folder
from sedimo.quant.activations import DYNAMIC, Activations
from sedimo.quant.memory import memory_bytes
from sedimo.space import SearchSpace

MAX_PRIOR_SAMPLES = 16  # of a plan of many more for sets of images; gradients are costly
_BYTES_OF_A_FIT = 1_000  # names, sums and a row


@dataclass(frozen=True, slots=True)
class ExploredSource:
    """What the trials of an explored study are about; `source` is how it was named last.

    `ends` is the format of the first and last layers, empty where they vary like the others. `weights_digest` is that
    of the files; `digest` names the weights as smoothed and the rules for activations, as trials do; empty: the same.
    """

    source: str
    variant: str | None
    weights_digest: str
    formats: tuple[str, ...]
    ends: str = ""
    smooth: SmoothOrder | None = None
    activations: ActivationOrder | None = None
    digest: str = ""


@dataclass(frozen=True, slots=True)
class ExploreResult:
    """What an exploration did: of `trials`, `measured` now in `measuring_seconds`; the others were there already.

    `settings` are the keys of the settings under which the trials were measured, by objective.
    """

    study: Path
    trials: int
    measured: int
    settings: Mapping[str, str]
    measuring_seconds: float
    seconds: float

    @property
    def trials_per_hour(self) -> float | None:
        """How fast trials were measured, the full-precision samples included; None when none was."""
        return 3600 * self.measured / self.measuring_seconds if self.measured else None

    def as_json(self) -> Mapping[str, object]:
        """Plain values; scripts may rely on the names (see docs/cli.md)."""
        plain: dict[str, object] = to_plain(
            {
                "study": str(self.study),
                "trials": self.trials,
                "measured": self.measured,
                "settings": self.settings,
                "seconds": self.seconds,
                "measuring_seconds": self.measuring_seconds,
                "trials_per_hour": self.trials_per_hour,
            }
        )
        return plain


@dataclass(frozen=True, slots=True)
class ExplorationPlan:
    """What an exploration takes on this machine, estimated from one timed call and one timed fit.

    `missing` of the `trials` are not in the study yet. `seconds` are those of one process, the fits included;
    `memory_bytes` includes every loaded pipeline.
    """

    source: str
    n_decisions: int
    n_formats: int
    trials: int
    missing: int
    denoiser_calls: int
    seconds: float
    memory_bytes: int
    disk_bytes: int

    def as_json(self) -> Mapping[str, object]:
        """Plain values by name, `hours` among them."""
        plain: dict[str, object] = to_plain(self)
        return plain | {"hours": self.seconds / 3600}


def plan_exploration(order: ExploreOrder, progress: Progress = SILENT) -> ExplorationPlan:
    """What `explore_source` would take; nothing is measured or written.

    Raises:
        InputError: as `explore_source`.
        StateError: as `explore_source`.
    """
    progress.start(1, "planning")
    opened = open_for_exploring(order)
    path = order.store if order.store.suffix == ".sqlite" else order.store / FILE_NAME
    if not path.exists():
        found = _plan(opened, order, None)
    else:
        with Study(path, create=False) as study:
            refuse_other_study(study, opened, order)
            found = _plan(opened, order, study)
    progress.done()
    return found


def explore_source(order: ExploreOrder, progress: Progress = SILENT) -> ExploreResult:
    """Measures the first `trials` recipes by every objective; what the study has is not measured again.

    Raises:
        InputError: the source cannot be used or sampled, or a range of bits that its formats do not allow.
        StateError: the study was begun with other weights, formats, seed, sampler or range; or a damaged file.
        Interrupted: Ctrl-C; what was measured is kept, the same order goes on.
    """
    begin = time.monotonic()
    opened = open_for_exploring(order)
    with Study(order.store) as study:
        refuse_other_study(study, opened, order)
        files_digest = opened.weights.digest
        smooth_source(opened, study, progress)
        bank = make_bank(opened, study, is_exact=True, progress=progress)
        sampling, settings = settings_of(opened, order, bank.digest)
        _keep_records(study, opened, bank, order, files_digest)
        on_prior = sampling.first(MAX_PRIOR_SAMPLES)
        know(opened.pipe, opened.graph, bank, study, prior=order.prior, sampling=on_prior, progress=progress)
        n_before, measuring = len(study.trial_keys()), time.monotonic()
        trials: list[Trial] = []
        for objective, setting in settings.items():
            wanted = WorkerOrder(
                folder=opened.folder,
                compute=order.compute,
                variant=order.variant,
                space=bank.space,
                cache=study.path.parent,
                sampling=sampling,
                objective=objective,
                smoothing=opened.smoothing,
                activations=bank.activations,
            )
            trials += campaign.explore(
                study,
                order.exploration(bank.space),
                n_trials=order.trials,
                setting=setting,
                make_worker=_make_worker(opened.pipe, bank, wanted, order.executor),
                executor=_executor(order),
                progress=progress,
            )
        return ExploreResult(
            study=study.path,
            trials=len({trial.key for trial in trials}),
            measured=len(study.trial_keys()) - n_before,
            settings={objective: setting.key for objective, setting in settings.items()},
            measuring_seconds=time.monotonic() - measuring,
            seconds=time.monotonic() - begin,
        )


def open_for_exploring(order: ExploreOrder) -> OpenedSource:
    """The source, known to be fit for sampling as often as the order wants.

    Raises:
        InputError: see `explore_source`.
    """
    opened = open_pipeline(order, order.formats, ends=order.ends, streams=order.streams)
    if order.store.resolve().is_relative_to(opened.folder.resolve()):
        raise InputError(f"the study {order.store} must not lie in the source {opened.folder}")
    order.exploration(opened.space)
    obstacle = opened.why_not_sampled(order.n_copies)
    if obstacle is not None:
        raise InputError(f"measuring recipes runs the pipeline, but {obstacle}")
    return opened


def settings_of(
    opened: OpenedSource, order: ExploreOrder, digest: str
) -> tuple[Sampling, dict[ObjectiveName, Setting]]:
    """How recipes are sampled, and the setting of each objective's trials; `digest` is that of the bank."""
    sampling = order.sampling.searching(opened.pipe)
    return sampling, {
        name: setting_of(opened.pipe, sampling, weights_digest=digest, objective=name) for name in order.objectives
    }


def _plan(opened: OpenedSource, order: ExploreOrder, study: Study | None) -> ExplorationPlan:
    sampling, settings = settings_of(opened, order, _digest_of_trials(opened, study))
    is_fitted = study is not None and SPACE in study.record_names()
    space = study.record(SearchSpace, SPACE) if study is not None and is_fitted else opened.space
    exploration = order.exploration(space)
    recipes = [exploration.recipe(index) for index in range(order.trials)]
    timing, weights_bytes = time_calls(opened.pipe, sampling), memory_bytes(opened.pipe.denoiser)
    campaigns = {
        name: campaign.plan_campaign(recipes, study=study, setting=setting, timing=timing, weights_bytes=weights_bytes)
        for name, setting in settings.items()
    }
    seconds = sum(plan.seconds for plan in campaigns.values())
    if "fid" in campaigns and campaigns["fid"].n_missing:
        seconds += (campaigns["fid"].n_missing + 1) * _seconds_of_images(opened.pipe, sampling, timing)
    is_known = study is not None and PRIOR in study.record_names()
    prior_seconds, prior_calls = 0.0, 0
    if not is_known:
        on_prior = sampling.first(MAX_PRIOR_SAMPLES)
        prior_timing = timing if on_prior == sampling else time_calls(opened.pipe, on_prior)
        prior_seconds, prior_calls = cost_of_prior(order.prior, space, prior_timing)
    seconds += prior_seconds
    memory = order.n_workers * max(plan.memory_bytes for plan in campaigns.values())
    disk = sum(plan.disk_bytes for plan in campaigns.values())
    if not is_fitted:
        fitted = sum(d.params * sum(f.is_quantized for f in d.formats) for d in space.decisions)
        seconds += fitted * seconds_per_fit(opened)
        disk += _bank_bytes(space)
    return ExplorationPlan(
        source=opened.name,
        n_decisions=len(space.decisions),
        n_formats=len({f for d in space.decisions for f in d.formats}),
        trials=len({recipe.key for recipe in recipes}) * len(settings),
        missing=sum(plan.n_missing for plan in campaigns.values()),
        denoiser_calls=sum(plan.n_calls for plan in campaigns.values()) + prior_calls,
        seconds=seconds,
        memory_bytes=memory + order.n_copies * opened.loaded_bytes,
        disk_bytes=disk,
    )


def _digest_of_trials(opened: OpenedSource, study: Study | None) -> str:
    """What names the trials of a study that was begun with this order; before that, nothing has been measured."""
    is_begun = study is not None and SOURCE in study.record_names()
    begun = study.record(ExploredSource, SOURCE).digest if study is not None and is_begun else ""
    return begun or opened.weights.digest


def _seconds_of_images(pipe: DiffusersPipeline, sampling: Sampling, timing: CallTiming) -> float:
    """What a trial's images and their comparison take besides the denoiser: one batch timed, and one comparison [s]."""
    n, first = len(sampling.seeds), sampling.seeds[: sampling.batch_size]
    begin = time.perf_counter()
    _, features = draw_latents_and_features(pipe, replace(sampling, seeds=first, n_steps=1))
    drawn = max(0.0, time.perf_counter() - begin - timing.seconds_per_call) * n / len(first)
    values = np.resize(features.values, (n, features.values.shape[1]))
    begin = time.perf_counter()
    compare_distributions(Features(features.extractor, values), Features(features.extractor, values + np.float32(0.01)))
    return drawn + time.perf_counter() - begin


def _bank_bytes(space: SearchSpace) -> int:
    """What the fitted parameters of all formats take on disk: what is stored besides codes, in float32 [bytes]."""
    sizes = [
        2 * (d.stored_bytes(f) - d.params * f.bits // 8) + _BYTES_OF_A_FIT
        for d in space.decisions
        for f in d.formats
        if f.is_quantized
    ]
    return sum(sizes)


def refuse_other_study(study: Study, opened: OpenedSource, order: ExploreOrder) -> None:
    """Refuses a study that was begun otherwise, saying in what; before anything is fitted.

    Raises:
        StateError: other weights, formats, smoothing, rules for activations, seed, sampler or range of bits.
    """
    names = study.record_names()
    pairs: list[tuple[str, object, object]] = []
    if SOURCE in names:
        source = study.record(ExploredSource, SOURCE)
        pairs.append(("weights", source.weights_digest[:12], opened.weights.digest[:12]))
        pairs.append(("formats", ",".join(source.formats), ",".join(order.format_texts)))
        pairs.append(("ends", source.ends or None, order.ends))
        pairs.append(("smoothing", source.smooth, order.smooth))
        pairs.append(("activations", source.activations or DYNAMIC_ACTIVATIONS, order.activations))
    if EXPLORATION in names:
        begun = study.record(Exploration, EXPLORATION)
        pairs.append(("study seed", begun.seed, order.study_seed))
        pairs.append(("streams decided on", len(begun.space.streams), len(opened.space.streams)))
        pairs.append(("sampler", begun.sampler, order.sampler))
        pairs.append(("low bits", begun.low_bits, order.low_bits))
        pairs.append(("high bits", begun.high_bits, order.high_bits))
    differing = [f"{name} {_shown(old)}, not {_shown(new)}" for name, old, new in pairs if old != new]
    if differing:
        hint = " (--whole-layers decides on no streams)" if any("streams" in text for text in differing) else ""
        raise StateError(
            f"the study {study.path} was begun with {'; '.join(differing)}. "
            f"Give the same{hint}, or another folder with --store"
        )


def _shown(value: object) -> str:
    return "unset" if value is None else str(value)


def _keep_records(study: Study, opened: OpenedSource, bank: Bank, order: ExploreOrder, files_digest: str) -> None:
    """What later stages need to know of the trials."""
    study.claim(EXPLORATION, order.exploration(bank.space))
    study.put_record(SPACE, bank.space)
    study.put_record(GRAPH, opened.graph)
    about = (order.source, order.variant, files_digest, order.format_texts, order.ends or "")
    study.put_record(SOURCE, ExploredSource(*about, order.smooth, order.activations, bank.digest))


def _executor(order: ExploreOrder) -> Executor:
    return SerialExecutor() if order.executor == "serial" else ProcessExecutor(order.n_workers)


@dataclass(frozen=True, slots=True)
class WorkerOrder:
    """What a process of its own needs to know to become a worker; the bank is in the folder `cache` already.

    It smooths its pipeline and its weights as the driver did, and rounds activations by the driver's ranges.
    """

    folder: Path
    compute: Compute
    variant: str | None
    space: SearchSpace
    cache: Path
    sampling: Sampling
    objective: ObjectiveName
    smoothing: Smoothing | None = None
    activations: Activations = DYNAMIC


def make_worker(order: WorkerOrder) -> TrialWorker:
    """A worker with a pipeline and a bank of its own.

    Raises:
        InputError: the pipeline is gone since the order was made.
    """
    compute = order.compute
    pipe = load_pipeline(order.folder, device=compute.device, dtype=compute.dtype, variant=order.variant)
    if not isinstance(pipe, DiffusersPipeline):
        raise InputError(f"{order.folder} is a denoiser without its pipeline and cannot be sampled")
    weights: WeightSource = FileWeights(denoiser_folder(order.folder), order.variant)
    if order.smoothing is not None:
        smooth_weights(pipe.denoiser, order.smoothing)
        weights, _ = smooth_stored(load_stored(order.folder, order.variant)[1].denoiser, order.smoothing)
    bank = fit_bank(weights, order.space, cache=order.cache).rounding(order.activations)
    return TrialWorker(pipe, bank, order.sampling, objective=order.objective)


def _make_worker(pipe: DiffusersPipeline, bank: Bank, wanted: WorkerOrder, executor: str) -> MakeWorker:
    if executor == "process":
        return functools.partial(make_worker, wanted)
    return lambda: TrialWorker(pipe, bank, wanted.sampling, objective=wanted.objective)
