"""Do the main job on the embedded model and say where the report is."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from sedimo.allocation.budget import BudgetSettings
from sedimo.errors import InputError
from sedimo.jobs import quantize
from sedimo.jobs.job import simple_job
from sedimo.jobs.quantize import JobResult, QuantizeSettings
from sedimo.jobs.settings import open_lab
from sedimo.lab.bench import SourceSettings
from sedimo.lab.seeds import SamplingSettings
from sedimo.methods.predictor.training import MIN_RECIPES
from sedimo.methods.search import SEARCH, TRAINING_FACTOR, SearchSettings
from sedimo.progress import SILENT, Progress
from sedimo.settings import Option
from sedimo.treatments.error_feedback import ERROR_FEEDBACK, FeedbackSettings

logger = logging.getLogger(__name__)

SOURCE = "zoo:cifar-dit"
SAMPLING = SamplingSettings(n_seeds=8, n_steps=10, n_check_seeds=16)
SEARCHED = SearchSettings(n_trials=60, n_rounds=1)  # at most; few: a serious run has 300
SECONDS = 120.0  # that it takes, about
MARK = ".sedimo-demo"


def run(
    out: Annotated[Path, Option(("-o", "--out"), "Folder to write.")] = Path("demo-out"),
    bits: Annotated[float, Option(("--bits",), "Budget: bits per weight in the papers' accounting.")] = 3.5,
    command: str = "sedimo demo",
    *,
    progress: Progress = SILENT,
) -> JobResult:
    """Quantizes the embedded pipeline; the result of an earlier demo in its place is replaced."""
    is_used = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if is_used and not (out / MARK).is_file():
        raise InputError(f"{out} holds something that no demo wrote; choose another folder with -o")
    job = QuantizeSettings(
        source=SourceSettings(SOURCE),
        budget=BudgetSettings(bits=bits),
        out=out,
        method=SEARCH.name,
        sampling=SAMPLING,
        overwrite=is_used,
        chosen=_chosen(MIN_RECIPES),
        command=command,
    )
    result = quantize.run(replace(job, chosen=_chosen(_affordable(job, progress))), progress)
    (out / MARK).touch()
    return result


def _affordable(job: QuantizeSettings, progress: Progress) -> int:
    """As many trials as fit the time after all else, by one timed call; at least what an explanation needs."""
    progress.start(1, "timing this machine")
    lab = open_lab(job.source, job.formats, chosen={}, sampling=job.sampling, progress=SILENT)
    timing = lab.time_calls(lab.seeds.search)
    per_trial = timing.n_calls * timing.seconds_per_call + TRAINING_FACTOR * len(lab.graph.nodes)
    left = SECONDS - quantize.plan(job)["seconds"]
    n_trials = min(SEARCHED.n_trials, MIN_RECIPES + max(0, int(left / per_trial)))
    progress.done()
    if n_trials < SEARCHED.n_trials:
        logger.warning(
            "a trial takes about %.1f s on this machine, so the demo measures %d recipes instead of %d, as fits two "
            "minutes or as few as can explain something",
            *(per_trial, n_trials, SEARCHED.n_trials),
        )
    return n_trials


def _chosen(n_trials: int) -> dict[str, object]:
    """A search of so many trials, without rounds where random ones alone are all that an explanation needs."""
    n_rounds = SEARCHED.n_rounds if n_trials >= 2 * MIN_RECIPES else 0
    search = replace(SEARCHED, n_trials=n_trials, n_rounds=n_rounds)
    return {SEARCH.name: search, ERROR_FEEDBACK.name: FeedbackSettings()}


JOB = simple_job(__doc__, run, quantize.page)
