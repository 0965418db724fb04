"""The bench: what is loaded for a source, once for all its labs, in the state that the lab which asked last needs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from torch import nn

from sedimo.bank import Bank, time_fits
from sedimo.errors import InputError
from sedimo.graph.model import DenoiserGraph
from sedimo.lab.subject import Compute, InForce, Loaded, SourceSettings, load_stored, trace, weights_of
from sedimo.lab.worker import CallTiming, References, time_calls
from sedimo.pipelines.adapter import Sampling, WeightSource
from sedimo.pipelines.diffusers import BareDenoiser, DiffusersPipeline
from sedimo.pipelines.loading import load_pipeline, locate
from sedimo.pipelines.weights import FileWeights, ModuleWeights, denoiser_folder, refuse_endless
from sedimo.space import SearchSpace

logger = logging.getLogger(__name__)

Treatments = Sequence[InForce]


class Bench:
    """The pipeline, the denoiser in the dtype that it is stored in, its weights and its graph.

    Treatments are put into the denoisers, and taken out bit-exactly, when a lab asks for them. `references` are the
    full-precision samples that trials were compared with: no treatment changes what the denoiser computes there.
    """

    def __init__(self, source: SourceSettings, name: str, folder: Path | None) -> None:
        """An empty bench; see `open` and `of`."""
        self.source, self.name, self.folder = source, name, folder
        self.bank: Bank | None = None  # of objects that came with one
        self.references: References = {}
        self._pipe: DiffusersPipeline | None = None
        self._bare: Loaded | None = None
        self._graph: DenoiserGraph | None = None
        self._computing, self._stored = _Inside(is_stored=False), _Inside(is_stored=True)
        self._timings: dict[Sampling, CallTiming] = {}
        self._seconds_per_fit: float | None = None

    @classmethod
    def open(cls, source: SourceSettings) -> Bench:
        """The bench of a folder, a hub id or `zoo:NAME`; the denoiser alone is loaded now.

        Raises:
            InputError: the source cannot be used, is quantized already, or holds NaN.
            StateError: a damaged file.
        """
        name, folder = locate(source.source, source.variant)
        bench = cls(source, name, folder)
        FileWeights(denoiser_folder(folder), source.variant)  # refuses what is no full-precision checkpoint
        bench._bare = load_stored(folder, source.variant)
        refuse_endless(bench._bare.denoiser)
        return bench

    @classmethod
    def of(cls, pipe: DiffusersPipeline, bank: Bank | None = None, graph: DenoiserGraph | None = None) -> Bench:
        """The bench of a pipeline that is in memory already, of its bank and its graph if they are known."""
        bench = cls(SourceSettings(pipe.name, None, Compute()), pipe.name, None)
        bench._pipe, bench.bank, bench._graph = pipe, bank, graph
        return bench

    @cached_property
    def graph(self) -> DenoiserGraph:
        """The graph by the names of the denoiser's arguments, else by one call of its pipeline.

        Raises:
            InputError: the denoiser cannot be traced.
        """
        if self._graph is not None:
            return self._graph
        if self._bare is None:
            return trace(self.pipe(()))
        try:
            return trace(self._bare)
        except InputError as error:
            whole = self._loaded()
            if isinstance(whole, BareDenoiser):
                raise
            logger.info("%s; its pipeline is called once", error)
            self._pipe = whole
            return trace(whole)

    def pipe(self, treatments: Treatments) -> DiffusersPipeline:
        """The pipeline in the compute dtype under some treatments.

        Raises:
            InputError: the source is a denoiser alone.
        """
        pipe: Loaded = self._loaded() if self._pipe is None else self._pipe
        if isinstance(pipe, BareDenoiser):  # of objects in memory, too
            raise InputError(f"{self.name} is a denoiser without its pipeline and cannot be sampled")
        self._pipe = pipe
        self._computing.put(pipe.denoiser, treatments)
        return pipe

    def stored(self, treatments: Treatments) -> nn.Module:
        """The denoiser as it is stored under some treatments; of objects in memory, the one that computes."""
        if self._bare is None:
            return self.pipe(treatments).denoiser
        self._stored.put(self._bare.denoiser, treatments)
        return self._bare.denoiser

    def weights(self, treatments: Treatments) -> WeightSource:
        """The weights that are quantized under some treatments: those of the files, where none changes them.

        Treatments exchange parameters and never write to them, so what is in force now can be read later, too.
        """
        stored = self.stored(treatments)
        if (self._computing if self._bare is None else self._stored).is_changed:
            return ModuleWeights(stored)
        if self.bank is not None:
            return self.bank.weights
        return weights_of(self.pipe(treatments)) if self._bare is None else self.files

    @property
    def files(self) -> FileWeights:
        """The files that hold the denoiser's weights.

        Raises:
            InputError: the source was made in memory.
        """
        if self.folder is None:
            raise InputError(f"{self.name} was made in memory and has no files")
        return FileWeights(denoiser_folder(self.folder), self.source.variant)

    def is_changed(self, treatments: Treatments) -> bool:
        """Whether treatments change the denoiser that computes."""
        self.pipe(treatments)
        return self._computing.is_changed

    def timed(self, treatments: Treatments, on: Sampling) -> CallTiming:
        """How long a call of a plan takes; each plan is timed once."""
        if on not in self._timings:
            self._timings[on] = time_calls(self.pipe(treatments), on)
        return self._timings[on]

    def seconds_per_fit(self, weights: WeightSource, space: SearchSpace) -> float:
        """Seconds that one weight in one format of a space takes; timed once."""
        if self._seconds_per_fit is None:
            self._seconds_per_fit = time_fits(weights, space)
        return self._seconds_per_fit

    def _loaded(self) -> Loaded:
        compute = self.source.compute
        place = str(self.folder)
        return load_pipeline(place, device=compute.device, dtype=compute.dtype, variant=self.source.variant)


class _Inside:
    """Which treatments are in a denoiser, and how they come out again."""

    def __init__(self, *, is_stored: bool) -> None:
        self._is_stored = is_stored
        self._entered: list[tuple[InForce, Callable[[], None] | None]] = []  # with what undoes it

    @property
    def is_changed(self) -> bool:
        """Whether any treatment changes the denoiser."""
        return any(undo is not None for _, undo in self._entered)

    def put(self, denoiser: nn.Module, treatments: Treatments) -> None:
        """Makes the denoiser be under exactly these treatments."""
        if [id(one) for one, _ in self._entered] == [id(one) for one in treatments]:
            return
        while self._entered:
            _, undo = self._entered.pop()
            if undo is not None:
                undo()
        for one in treatments:
            self._entered.append((one, one.enter(denoiser, is_stored=self._is_stored)))
