"""Measure random recipes of SRC and keep them in the study RUN; Ctrl-C is safe, the same command goes on.

Example: sedimo explore zoo:cifar-dit --store runs/alpha --trials 300
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from sedimo.errors import InputError, StateError
from sedimo.jobs.job import Job, early_treatment_offers, outlook, outlook_page
from sedimo.jobs.settings import FORMATS, SAMPLING, FormatSettings, open_lab, parts_of, treated, treatments_of
from sedimo.lab.bench import SourceSettings
from sedimo.lab.exploration import SAMPLERS, Exploration, SamplerName, possible_bits
from sedimo.lab.images import Features, compare_distributions, draw_latents_and_features
from sedimo.lab.lab import Lab
from sedimo.lab.measuring import CallTiming, missing_trials
from sedimo.lab.objective import MIN_IMAGES
from sedimo.lab.seeds import SamplingSettings
from sedimo.lab.study import FILE_NAME, GRAPH, OBJECTIVES, SPACE, ObjectiveName, Study, Trial
from sedimo.methods.method import Price, listed, price_of_trials, refuse_blind
from sedimo.methods.predictor.study import PRIOR, PRIORS, measure_background, prior_named
from sedimo.pipelines.adapter import Sampling
from sedimo.progress import SILENT, Progress
from sedimo.quant.tensor import memory_bytes
from sedimo.reporting.page import Page, Text, page_of
from sedimo.reporting.words import duration
from sedimo.settings import REQUIRED, Checked, block, one_of, option, within
from sedimo.space import SearchSpace

EXPLORATION, SOURCE = "exploration", "source"  # records of an explored study
EXECUTORS = ("serial", "process")
THREADS_PER_WORKER = 4  # where no number of workers is set
MAX_PRIOR_SAMPLES = 16  # of a plan of many more for sets of images; gradients are costly
_BYTES_OF_A_FIT = 1_000  # names, sums and a row


def check_objectives(names: tuple[str, ...], name: str) -> None:
    """Refuses names that are no objectives, none, and one twice."""
    unknown = [one for one in names if one not in OBJECTIVES]
    if unknown or not names:
        raise InputError(f"{name} must be of {', '.join(OBJECTIVES)}, got {', '.join(unknown) or 'none'}")
    if len(set(names)) != len(names):
        raise InputError(f"each objective is measured once, got {', '.join(names)}")


@dataclass(frozen=True, slots=True)
class ExploreSettings(Checked):
    """Which random recipes of a source to measure, on what, where to keep them, and who does it.

    Recipe i is a function of (`study_seed`, i), of the formats and the sampler; each is measured by every one of the
    `objectives`. The `prior` is measured first, for the predictors that are trained on the study.
    """

    source: SourceSettings = block(REQUIRED, "Source")
    store: Path = option(REQUIRED, "--store", help="Folder of the study.")
    trials: int = option(
        REQUIRED, "--trials", check=within(least=1), help="Number of random recipes; those the study has count."
    )
    formats: FormatSettings = block(FORMATS, "Formats")
    objectives: tuple[ObjectiveName, ...] = option(
        ("final_latents",),
        "--objective",
        parse=parts_of,
        check=check_objectives,
        help="What to measure, separated by commas: final_latents, path, step, fid.",
    )
    sampler: str = option(
        "stratified",
        "--sampler",
        check=one_of(SAMPLERS),
        help="stratified: bits evenly over a range, placed as differently as can be; paper: as published.",
    )
    low_bits: float | None = option(
        None, "--low-bits", help="Least paper bits of stratified; default: what the formats allow."
    )
    high_bits: float | None = option(
        None, "--high-bits", help="Most paper bits of stratified; default: what they allow, up to 5."
    )
    study_seed: int = option(0, "--study-seed", check=within(least=0), help="Which random recipes.")
    prior: str = option(PRIORS[0].name, "--prior", help=f"What predictors of this study start from: {listed(PRIORS)}.")
    executor: str = option(
        "serial", "--executor", check=one_of(EXECUTORS), help="serial, or process: several pipelines at once."
    )
    workers: int | None = option(
        None, "--workers", check=within(least=1), help="Number of processes of --executor process."
    )
    sampling: SamplingSettings = block(SAMPLING, "Sampling")
    chosen: Mapping[str, object] = field(default_factory=dict)

    def check_together(self) -> None:
        """Checks what can be seen before the source is opened."""
        self.formats.refuse_nothing()
        if prior_named(self.prior).is_blind:
            refuse_blind(f"{self.prior} (the prior)", self.formats.choices)
        if self.workers is not None and self.executor != "process":
            raise InputError("a number of workers is for --executor process")
        if "fid" in self.objectives and self.sampling.n_seeds < MIN_IMAGES:
            raise InputError(
                f"the objective 'fid' needs at least {MIN_IMAGES} samples, got {self.sampling.n_seeds}: "
                f"give --seeds {MIN_IMAGES} or more"
            )

    @property
    def format_texts(self) -> tuple[str, ...]:
        """The formats, sorted."""
        return tuple(sorted(map(str, self.formats.choices)))

    @property
    def n_processes(self) -> int:
        """Pipelines that measure at the same time besides that of the driver; 0: that one measures."""
        if self.executor == "serial":
            return 0
        return min(self.trials, self.workers or max(2, (os.cpu_count() or 1) // THREADS_PER_WORKER))

    def exploration(self, space: SearchSpace) -> Exploration:
        """The recipes, in a space; refuses bits that its formats do not allow."""
        least, most = possible_bits(space)
        for name, bits in (("low", self.low_bits), ("high", self.high_bits)):
            if bits is not None and not least <= bits <= most:
                raise InputError(
                    f"the {name} end of the bits must be possible: these formats allow {least:.4f} to {most:.4f} "
                    f"paper bits per weight, got {bits:g}"
                )
        return Exploration(self.study_seed, space, cast("SamplerName", self.sampler), self.low_bits, self.high_bits)


@dataclass(frozen=True, slots=True)
class ExploredSource:
    """What the trials of an explored study are about; `source` is how it was named last, `ends` is empty for None.

    `weights_digest` is that of the files; `digest` names the treated weights and how inputs are rounded, as trials do.
    `treatments` are what was set of them, by name, in words.
    """

    source: str
    variant: str | None
    weights_digest: str
    formats: tuple[str, ...]
    ends: str
    treatments: Mapping[str, str]
    digest: str


def plan(settings: ExploreSettings, progress: Progress = SILENT) -> dict[str, Any]:
    """What `run` would take, estimated from one timed call and one timed fit; nothing is measured or written."""
    lab = _open(settings, progress)
    path = settings.store if settings.store.suffix == ".sqlite" else settings.store / FILE_NAME
    with Study(path, create=False) if path.exists() else nullcontext() as study:
        if study is not None:
            refuse_other_study(study, lab, settings)
        return _plan(lab, settings, study)


def run(settings: ExploreSettings, progress: Progress = SILENT) -> dict[str, Any]:
    """Measures the first `trials` recipes by every objective; what the study has is not measured again.

    Of the `trials`, some are `measured` now; `settings` are the keys of what they were measured under, by objective.
    `trials_per_hour` counts the time of the full-precision samples, too, and is None where no trial was measured.

    The bank is fitted in full beforehand, so that later stages and workers of their own find every format.
    """
    begin = time.monotonic()
    lab = _open(settings, progress)
    with Study(settings.store) as study:
        refuse_other_study(study, lab, settings)
        files_digest = lab.weights.digest
        lab = treated(lab.kept_in(study), settings.chosen)
        space, on = lab.bank.space, lab.seeds.search
        exploration = settings.exploration(space)
        study.claim(EXPLORATION, exploration)
        study.put_record(SPACE, space)
        study.put_record(GRAPH, lab.graph)
        source, formats = settings.source, settings.formats
        about = (source.source, source.variant, files_digest, settings.format_texts, formats.ends or "")
        study.put_record(SOURCE, ExploredSource(*about, _treatments(settings), lab.bank.digest))
        measure_background(lab, settings.prior, on.first(MAX_PRIOR_SAMPLES))
        n_before, measuring = len(study.trial_keys()), time.monotonic()
        recipes = [exploration.recipe(index) for index in range(settings.trials)]
        trials: list[Trial] = []
        for name in settings.objectives:
            trials += lab.measure(recipes, on, objective=name, n_processes=settings.n_processes)
        seconds, measured = time.monotonic() - measuring, len(study.trial_keys()) - n_before
        return {
            "study": str(study.path),
            "trials": len({trial.key for trial in trials}),
            "measured": measured,
            "settings": {name: lab.setting(on, name).key for name in settings.objectives},
            "measuring_seconds": seconds,
            "seconds": time.monotonic() - begin,
            "trials_per_hour": 3600 * measured / seconds if measured else None,
        }


def _open(settings: ExploreSettings, progress: Progress) -> Lab:
    """The lab, known to be fit for sampling as often as is wanted."""
    lab = open_lab(
        settings.source, settings.formats, chosen=settings.chosen, sampling=settings.sampling, progress=progress
    )
    if settings.store.resolve().is_relative_to(lab.folder.resolve()):
        raise InputError(f"the study {settings.store} must not lie in the source {lab.folder}")
    settings.exploration(lab.space)
    lab.refuse_unsampled("measuring recipes runs the pipeline", n_copies=1 + settings.n_processes)
    return lab


def _plan(lab: Lab, settings: ExploreSettings, study: Study | None) -> dict[str, Any]:
    """What all of it takes: seconds of one process, memory of every loaded pipeline."""
    on = lab.seeds.search
    begun = study.record(ExploredSource, SOURCE) if study is not None and study.has_record(SOURCE) else None
    digest = lab.weights.digest if begun is None else begun.digest  # that names the trials; before, there are none
    fitted = study.record(SearchSpace, SPACE) if study is not None and study.has_record(SPACE) else None
    space = fitted or lab.space
    exploration = settings.exploration(space)
    recipes = [exploration.recipe(index) for index in range(settings.trials)]
    timing, weights_bytes = lab.time_calls(on), memory_bytes(lab.pipe.denoiser)
    missing = {
        name: missing_trials(recipes, study, lab.setting(on, name, weights_digest=digest))
        for name in settings.objectives
    }
    prices = [price_of_trials(left, len(on.seeds), timing, weights_bytes) for left in missing.values()]
    price = sum(prices, Price())
    price = replace(price, memory_bytes=max(1, settings.n_processes) * price.memory_bytes)
    if missing.get("fid"):
        price += Price((len(missing["fid"]) + 1) * _seconds_of_images(lab, on, timing))
    if study is None or not study.has_record(PRIOR):
        prior = prior_named(settings.prior).price_of_prior(space, lab.time_calls(on.first(MAX_PRIOR_SAMPLES)))
        price += Price(prior.seconds, prior.n_calls)
    if fitted is None:
        n_fits = sum(d.params * sum(f.is_quantized for f in d.formats) for d in space.decisions)
        price += Price(n_fits * lab.seconds_per_fit, disk_bytes=_bank_bytes(space))
    loaded = (1 + settings.n_processes) * lab.bench.loaded_bytes
    return {
        **outlook(lab.bench.name, space, replace(price, memory_bytes=price.memory_bytes + loaded)),
        "trials": len({recipe.key for recipe in recipes}) * len(settings.objectives),
        "missing": sum(map(len, missing.values())),
        "hours": price.seconds / 3600,
    }


def _seconds_of_images(lab: Lab, on: Sampling, timing: CallTiming) -> float:
    """What a trial's images and their comparison take besides the denoiser: one batch timed, and one comparison [s]."""
    n, first = len(on.seeds), on.seeds[: on.batch_size]
    begin = time.perf_counter()
    _, features = draw_latents_and_features(lab.pipe, replace(on, seeds=first, n_steps=1))
    drawn = max(0.0, time.perf_counter() - begin - timing.seconds_per_call) * n / len(first)
    values = np.resize(features.values, (n, features.values.shape[1]))
    begin = time.perf_counter()
    compare_distributions(Features(features.extractor, values), Features(features.extractor, values + np.float32(0.01)))
    return drawn + time.perf_counter() - begin


def _bank_bytes(space: SearchSpace) -> int:
    """What the fitted parameters of all formats take on disk: what is stored besides codes, in float32 [bytes]."""
    return sum(
        2 * (d.stored_bytes(f) - d.params * f.bits // 8) + _BYTES_OF_A_FIT
        for d in space.decisions
        for f in d.formats
        if f.is_quantized
    )


def refuse_other_study(study: Study, lab: Lab, settings: ExploreSettings) -> None:
    """Refuses a study that was begun otherwise, saying in what; before anything is fitted."""
    pairs: list[tuple[str, object, object]] = []
    if study.has_record(SOURCE):
        source, wanted = study.record(ExploredSource, SOURCE), _treatments(settings)
        pairs += [
            ("weights", source.weights_digest[:12], lab.weights.digest[:12]),
            ("formats", ",".join(source.formats), ",".join(settings.format_texts)),
            ("ends", source.ends or None, settings.formats.ends),
            *((n, source.treatments.get(n), wanted.get(n)) for n in dict.fromkeys([*source.treatments, *wanted])),
        ]
    if study.has_record(EXPLORATION):
        begun = study.record(Exploration, EXPLORATION)
        pairs += [
            ("study seed", begun.seed, settings.study_seed),
            ("streams decided on", len(begun.space.streams), len(lab.space.streams)),
            ("sampler", begun.sampler, settings.sampler),
            ("low bits", begun.low_bits, settings.low_bits),
            ("high bits", begun.high_bits, settings.high_bits),
        ]
    differing = [
        f"{name} {'unset' if old is None else old}, not {'unset' if new is None else new}"
        for name, old, new in pairs
        if old != new
    ]
    if differing:
        hint = " (--whole-layers decides on no streams)" if any("streams" in text for text in differing) else ""
        raise StateError(
            f"the study {study.path} was begun with {'; '.join(differing)}. "
            f"Give the same{hint}, or another folder with --store"
        )


def _treatments(settings: ExploreSettings) -> dict[str, str]:
    """What was set of treatments, by name, in words."""
    return {one.name: str(knobs) for one, knobs in treatments_of(settings.chosen)}


def page(found: Mapping[str, Any]) -> Page:
    """What an exploration did."""
    did = f"{found['trials']} trials, {found['measured']} of them measured now: {found['study']}"
    speed = found["trials_per_hour"]
    took = "" if speed is None else f"{speed:.3g} trials an hour; took {duration(found['seconds'])}"
    return page_of("", "", Text(did), Text(took))


def plan_page(found: Mapping[str, Any]) -> Page:
    """What an exploration would take."""
    trials = {"trials": f"{found['trials']}, of which {found['missing']} are not measured yet"}
    return outlook_page(found, "", trials, memory=", loaded pipelines included", workers=" in one process")


JOB = Job(__doc__, ExploreSettings, run, page, plan=plan, plan_page=plan_page, offers=early_treatment_offers)
