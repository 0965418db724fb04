"""The lab: one model on the bench, with the study, the seeds and the progress of what is measured of it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Self, TypeVar

import psutil
import torch
from torch import nn

from sedimo.bank import Bank, fit_bank, time_fits
from sedimo.errors import InputError
from sedimo.graph.model import DenoiserGraph
from sedimo.lab.bench import Bench, InForce, SourceSettings, under
from sedimo.lab.measuring import CallTiming, Parts, TrialWorker, run_trials, setting_of, time_calls
from sedimo.lab.seeds import SamplingSettings, Seeds
from sedimo.lab.study import ObjectiveName, Setting, Study, Trial
from sedimo.pipelines.adapter import Sampling, WeightSource
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.progress import SILENT, Progress
from sedimo.settings import within
from sedimo.space import Recipe, SearchSpace, search_space

Treatment = TypeVar("Treatment")
MEMORY_SHARE = 0.7  # of the free memory that a loaded pipeline may take
SAMPLE_CHANNELS = 16  # output channels that stand for a weight when only its error is wanted


class Lab:
    """One model on the bench. The pipeline and the banks are loaded and made once, when they are first needed.

    A lab never changes: `treated` gives a new one. Labs of one source share the loaded pipeline; each finds it with
    its own treatments in force whenever it asks for `pipe`, and the weights as they were when it has none.
    """

    def __init__(
        self,
        source: SourceSettings | DiffusersPipeline,
        bank: Bank | None = None,
        *,
        formats: str = "wide",
        graph: DenoiserGraph | None = None,
        study: Study | None = None,
        sampling: SamplingSettings | None = None,
        progress: Progress = SILENT,
    ) -> None:
        """A lab on a folder, a hub id or `zoo:NAME`, of which nothing but the denoiser is loaded yet; or on a pipeline.

        A pipeline is taken as it is, with a `bank` of its weights, which then tells what may be decided, and its
        `graph`, where they are known.
        """
        self.bench = Bench(source, bank, graph)
        self.ends: str | None = None
        self.treatments: tuple[InForce, ...] = ()
        self.study, self.progress = study, progress
        self._formats, self._sampling = formats, sampling or SamplingSettings()

    @property
    def pipe(self) -> DiffusersPipeline:
        """The pipeline in the compute dtype, with this lab's treatments in force; refuses a denoiser alone."""
        return self.bench.pipe(self.treatments)

    @property
    def stored(self) -> nn.Module:
        """The denoiser in the dtype that it is stored in, on the CPU, with this lab's treatments in force."""
        return self.bench.stored(self.treatments)

    @cached_property
    def weights(self) -> WeightSource:
        """The weights that are quantized, as this lab's treatments leave them."""
        return self.bench.weights(self.treatments)

    @property
    def is_changed(self) -> bool:
        """Whether this lab's treatments change the denoiser that computes."""
        return bool(self.treatments) and self.bench.is_changed(self.pipe.denoiser)

    @property
    def graph(self) -> DenoiserGraph:
        """The graph of the denoiser."""
        return self.bench.graph

    @cached_property
    def space(self) -> SearchSpace:
        """What may be decided, before formats that a weight does not fit into were dropped (see `bank.space`)."""
        return self.bench.bank.space if self.bench.bank else search_space(self.graph, self._formats)

    @property
    def seeds(self) -> Seeds:
        """The sampling plans for each purpose."""
        return Seeds(self._sampling, lambda seeds, n_steps: self.pipe.default_sampling(seeds, n_steps))

    @property
    def rules(self) -> tuple[str, ...]:
        """What is done by treatments, in words."""
        return tuple(map(str, self.treatments))

    @cached_property
    def bank(self) -> Bank:
        """The bank with every format fitted in full."""
        return self._bank(None)

    @cached_property
    def estimated(self) -> Bank:
        """The bank with errors estimated from some output channels; formats are fitted when they are first used."""
        return self._bank(SAMPLE_CHANNELS)

    @property
    def fitted(self) -> Self:
        """The same lab where no error is estimated: every format is fitted in full."""
        return self._with(weights=self.weights, bank=self.bank, estimated=self.bank)

    @property
    def any_bank(self) -> Bank:
        """Whichever bank is there: what a recipe becomes is the same with both."""
        return self.bank if "bank" in vars(self) else self.estimated

    @property
    def cache(self) -> Path | None:
        """The folder where what takes long is kept beside the study."""
        return None if self.study is None else self.study.path.parent

    @property
    def source_bytes(self) -> int:
        """The size of the files that hold the denoiser's weights [bytes]."""
        return sum(f.stat().st_size for f in self.bench.files.files)

    @property
    def folder(self) -> Path:
        """The folder of the source; refuses one that was made in memory."""
        if self.bench.folder is None:
            raise InputError(f"{self.bench.name} was made in memory and has no folder")
        return self.bench.folder

    def in_force(self, kind: type[Treatment]) -> Treatment | None:
        """The treatment of a kind that is in force, None where none is."""
        return next((one for one in self.treatments if isinstance(one, kind)), None)

    @property
    def seconds_per_fit(self) -> float:
        """Seconds that one weight in one format takes here, timed once on some rows of the largest weight."""
        bench = self.bench
        bench.seconds_per_fit = bench.seconds_per_fit or time_fits(self.weights, self.space)
        return bench.seconds_per_fit

    def treated(self, *treatments: InForce) -> Self:
        """A lab of the same source with these treatments in force besides its own; this one stays as it is."""
        return self._with(treatments=(*self.treatments, *treatments))

    def decided_on(self, space: SearchSpace, *, ends: str | None = None) -> Self:
        """A lab of the same source and treatments where something else is decided on.

        `ends` is the one format that first and last layers have there, if they are not decided on like others.
        """
        return self._with(space=space, ends=ends or self.ends)

    def kept_in(self, study: Study) -> Self:
        """The same lab with a study to keep what is measured in."""
        return self._with(study=study)

    def sampled(self, sampling: SamplingSettings) -> Self:
        """The same lab with other seeds, its weights and banks included."""
        other = copy.copy(self)
        other._sampling = sampling
        return other

    def setting(
        self, on: Sampling, objective: ObjectiveName = "final_latents", *, weights_digest: str | None = None
    ) -> Setting:
        """What names the measurements of this lab under a plan.

        With `weights_digest`, of full precision alone: how weights and inputs are rounded is no part of the name.
        """
        digest = self.any_bank.digest if weights_digest is None else weights_digest
        return setting_of(self.pipe, on, weights_digest=digest, objective=objective)

    def measure(
        self,
        recipes: Sequence[Recipe],
        on: Sampling,
        *,
        objective: ObjectiveName = "final_latents",
        n_processes: int = 0,
    ) -> tuple[Trial, ...]:
        """The trials of whole recipes under a plan, in their order; what the study has is not measured again.

        With `n_processes`, by so many that each load a pipeline of their own from the source's folder.

        Raises:
            InputError: fewer processes than none, or several for a source that was made in memory.
            Interrupted: the user stopped it; calling again measures what is left.
        """
        within(least=0)(n_processes, "n_processes")
        if n_processes:
            source = SourceSettings(str(self.folder), self.bench.variant, self.bench.compute)
            make_worker = functools.partial(
                _replica, source, self.bank.space, self.treatments, self.cache, on, objective
            )
        else:
            own, references = self.any_bank, self.bench.references
            make_worker = functools.partial(TrialWorker, self.pipe, own, on, objective=objective, references=references)
        return run_trials(
            self.study,
            recipes,
            setting=self.setting(on, objective),
            make_worker=make_worker,
            n_processes=n_processes,
            progress=self.progress,
        )

    def parts(self) -> Parts:
        """A measurement in parts: kept in the study, resumed there, shown to people, safe to stop."""
        return Parts(self.pipe, self.study, self.progress)

    def time_calls(self, on: Sampling) -> CallTiming:
        """How long a denoiser call of a plan takes here; a plan is timed once."""
        timings = self.bench.timings
        if on not in timings:
            timings[on] = time_calls(self.pipe, on)
        return timings[on]

    def why_not_sampled(self, n_copies: int = 1) -> str | None:
        """Why so many copies of the pipeline cannot run here, or None when they can."""
        if not self.bench.is_pipeline:
            return "the source is a denoiser without its pipeline"
        needed, free = n_copies * self.bench.loaded_bytes, psutil.virtual_memory().available
        if needed > MEMORY_SHARE * free:
            what = "the pipeline needs" if n_copies == 1 else f"{n_copies} copies of the pipeline need"
            return f"{what} about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        return None

    def refuse_unsampled(self, what: str, remedy: str = "", *, n_copies: int = 1) -> None:
        """Refuses `what` where the pipeline cannot run, with the reason and the remedy."""
        if obstacle := self.why_not_sampled(n_copies):
            raise InputError(f"{what}, but {obstacle}{'. ' if remedy else ''}{remedy}")

    def _bank(self, sample_channels: int | None) -> Bank:
        bank = self.bench.bank
        if bank is None or bank.space is not self.space or bank.weights is not self.weights:
            bank = fit_bank(
                self.weights, self.space, sample_channels=sample_channels, cache=self.cache, progress=self.progress
            )
        return under(self.treatments, bank)

    def _with(self, **changes: object) -> Self:
        """The same lab but for some of its attributes; what follows from others is made anew."""
        other = copy.copy(self)
        for made in ("weights", "bank", "estimated"):
            vars(other).pop(made, None)
        vars(other).update(changes)
        return other


def _replica(
    source: SourceSettings,
    space: SearchSpace,
    treatments: Sequence[InForce],
    cache: Path | None,
    on: Sampling,
    objective: ObjectiveName,
) -> TrialWorker:
    """A lab's worker in another process, with a pipeline and a bank of its own."""
    bench = Bench(source)
    bank = under(treatments, fit_bank(bench.weights(treatments), space, cache=cache))
    return TrialWorker(bench.pipe(treatments), bank, on, objective=objective)


PATIENCE_SECONDS = 30 * 60
ROWS_PER_SAMPLE = 2  # with guidance
FASTEST_MACS_PER_SECOND = {"cpu": 5e11, "other": 1e15}  # of any such device: a lower bound of time


def seconds_of_fits(lab: Lab) -> float:
    """Seconds of fitting every format in full."""
    return sum(d.params * len(d.formats) for d in lab.space.decisions) * lab.seconds_per_fit


def seconds_of_estimates(lab: Lab) -> float:
    """Seconds of errors from some output channels, and of fitting the chosen formats."""
    decisions = lab.space.decisions
    sampled = sum(min(1.0, SAMPLE_CHANNELS / d.shape[0]) * d.params * len(d.formats) for d in decisions)
    return (sampled + lab.space.params) * lab.seconds_per_fit


def too_slow(what: str, seconds: float, how_sure: str = "about") -> str:
    """That something takes too long, in words."""
    return f"{what} would take {how_sure} {max(1, round(seconds / 60))} minutes"


def why_too_slow(lab: Lab, n_rows: int, what: str) -> str | None:
    """Whether operations alone say that so many denoiser rows take longer than half an hour."""
    device = lab.bench.compute.device or ("cuda" if torch.cuda.is_available() else "cpu")
    speed = FASTEST_MACS_PER_SECOND.get(device, FASTEST_MACS_PER_SECOND["other"])
    seconds = ROWS_PER_SAMPLE * n_rows * lab.graph.macs / speed
    return too_slow(what, seconds, "at least") if seconds > PATIENCE_SECONDS else None
