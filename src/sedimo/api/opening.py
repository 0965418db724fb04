"""A source made ready: its denoiser in the stored dtype, its graph, its space, its weights."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil
import torch

from sedimo.allocation.solve import allocate
from sedimo.api import verbs
from sedimo.api.order import DYNAMIC_ACTIVATIONS, ActivationOrder, Compute, Order, SamplingOrder
from sedimo.api.smooth_order import SmoothOrder
from sedimo.bank import Candidate
from sedimo.errors import InputError
from sedimo.graph.model import DenoiserGraph
from sedimo.measurement.smoothing import Smoothing
from sedimo.pipelines.adapter import WeightSource
from sedimo.pipelines.diffusers import BareDenoiser, DiffusersPipeline
from sedimo.pipelines.loading import load_pipeline, locate
from sedimo.pipelines.weights import FileWeights, denoiser_folder, refuse_endless, stored_dtype
from sedimo.quant.formats import Format, parse_formats
from sedimo.sensitivity.costs import EXACTLY_NOTHING, build_table
from sedimo.space import SearchSpace, search_space

logger = logging.getLogger(__name__)

COMPENSATED = "codes by error feedback"
MEMORY_SHARE = 0.7  # of the free memory that a loaded pipeline may take


class SourceOrder(Protocol):
    """What every order says of its source: which, computed how, sampled how, smoothed and with inputs rounded how."""

    @property
    def source(self) -> str:
        """A folder, a hub id or `zoo:NAME`."""

    @property
    def variant(self) -> str | None:
        """The `fp16` of `*.fp16.safetensors`."""

    @property
    def compute(self) -> Compute:
        """Dtype and device."""

    @property
    def sampling(self) -> SamplingOrder:
        """The samples that everything is measured on, ranges included."""

    @property
    def activations(self) -> ActivationOrder:
        """How the inputs of layers are rounded."""

    @property
    def smooth(self) -> SmoothOrder | None:
        """How inputs are smoothed beforehand, if at all."""


@dataclass(kw_only=True)
class OpenedSource:
    """A source made ready for an order. The whole pipeline is loaded when it is first needed.

    Once it is smoothed, `smoothing` says how; `denoiser`, `weights` and `pipe` are then the smoothed ones. When it
    `is_compensated`, codes are chosen by error feedback.
    """

    name: str
    folder: Path
    denoiser: torch.nn.Module
    graph: DenoiserGraph
    space: SearchSpace
    files: FileWeights
    weights: WeightSource
    compute: Compute
    variant: str | None
    order: SourceOrder
    smoothing: Smoothing | None = None
    is_compensated: bool = False
    _pipe: DiffusersPipeline | None = field(default=None)

    @property
    def is_pipeline(self) -> bool:
        """Whether the source can be sampled at all."""
        return (self.folder / "model_index.json").is_file()

    @property
    def component(self) -> str | None:
        """Name of the denoiser's folder inside the pipeline's, None when the source is a denoiser alone."""
        return self.files.folder.name if self.is_pipeline else None

    @property
    def weights_files(self) -> tuple[Path, ...]:
        """The files that hold the denoiser's weights."""
        return tuple(self.files.files)

    @property
    def pipe(self) -> DiffusersPipeline:
        """The pipeline, loaded in the compute dtype.

        Raises:
            InputError: the source is a denoiser alone.
        """
        if self._pipe is None:
            device, dtype = self.compute.device, self.compute.dtype
            loaded = load_pipeline(str(self.folder), device=device, dtype=dtype, variant=self.variant)
            if isinstance(loaded, BareDenoiser):
                raise InputError(f"{self.name} is a denoiser without its pipeline and cannot be sampled")
            self._pipe = loaded
        return self._pipe

    @property
    def rules(self) -> tuple[str, ...]:
        """How it was smoothed and how weights and inputs are rounded, in words, where that is not the default."""
        rounded = self.order.activations
        said = [] if self.smoothing is None else [str(self.smoothing)]
        said += [COMPENSATED] if self.is_compensated else []
        return (*said, *([] if rounded == DYNAMIC_ACTIVATIONS else [f"activations: {rounded}"]))

    @property
    def loaded_bytes(self) -> int:
        """About what the loaded pipeline takes [bytes]."""
        files = sum(f.stat().st_size for f in self.folder.rglob("*.safetensors"))
        on_cpu = self.compute.device in (None, "cpu") and not torch.cuda.is_available()
        return files * (2 if on_cpu and self.compute.dtype in (None, "fp32") else 1)

    def why_not_sampled(self, n_copies: int = 1) -> str | None:
        """Why so many copies of the pipeline cannot run here, or None when they can."""
        if not self.is_pipeline:
            return "the source is a denoiser without its pipeline"
        needed, free = n_copies * self.loaded_bytes, psutil.virtual_memory().available
        if needed > MEMORY_SHARE * free:
            what = "the pipeline needs" if n_copies == 1 else f"{n_copies} copies of the pipeline need"
            return f"{what} about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        return None


@dataclass(kw_only=True)
class Opened(OpenedSource):
    """A source made ready for an order of the main job."""

    order: Order


def open_source(order: Order) -> Opened:
    """Loads the denoiser in the dtype that it is stored in, and traces it.

    Raises:
        InputError: the source cannot be used, is quantized already, holds NaN, or its inputs are unknown; a budget that
            no recipe keeps.
        StateError: a damaged file.
    """
    formats = order.formats if order.one_format is None else f"{order.one_format},fp16"
    streams: bool | Collection[str] = order.streams and order.one_format is None
    if order.recipe is not None:
        formats = ",".join(sorted({str(f) for f in order.recipe.formats} | {"fp16"}))
        streams = [layer for layer, entry in order.recipe.layers.items() if not isinstance(entry, Format)]
    found = open_pipeline(order, formats, ends=order.ends, streams=streams)
    if order.recipe is not None:
        found.space.check(order.recipe)
    check_budget(order, found.space)
    return Opened(**{**vars(found), "order": order})


def open_pipeline(
    order: SourceOrder, formats: str, *, ends: str | None = None, streams: bool | Collection[str] = True
) -> OpenedSource:
    """Loads the denoiser in the dtype that it is stored in, and traces it; no budget is needed.

    What is decided on follows from formats, `ends` and `streams` (see `search_space`).

    Raises:
        InputError: the source cannot be used, is quantized already, holds NaN, or its inputs are unknown; or rules for
            activations that no format rounds.
        StateError: a damaged file.
    """
    order.activations.refuse_idle([*parse_formats(formats), *([] if ends is None else [Format.parse(ends)])])
    name, folder = locate(order.source, order.variant)
    weights, bare = load_stored(folder, order.variant)
    refuse_endless(bare.denoiser)
    graph = _traced(bare, folder, compute=order.compute, variant=order.variant)
    return OpenedSource(
        name=name,
        folder=folder,
        denoiser=bare.denoiser,
        graph=graph,
        space=search_space(graph, formats, ends=ends, streams=streams),
        files=weights,
        weights=weights,
        compute=order.compute,
        variant=order.variant,
        order=order,
    )


def load_stored(folder: Path, variant: str | None) -> tuple[FileWeights, verbs.Loaded]:
    """The files of a folder's denoiser, and the denoiser alone in the dtype that they have, on the CPU."""
    inner = denoiser_folder(folder)
    weights = FileWeights(inner, variant)
    return weights, load_pipeline(str(inner), device="cpu", dtype=stored_dtype(weights.files), variant=variant)


def check_budget(order: Order, space: SearchSpace) -> None:
    """Refuses a budget that no choice of formats keeps, before anything is measured: all formats cost nothing here.

    Raises:
        InputError: with the least and most possible.
    """
    budget = order.budget
    if not budget.is_given or order.is_given:
        return
    candidates = [
        Candidate(d.name, f, 0.0, 0.0, 0, d.paper_bytes(f), d.stored_bytes(f))
        for d in space.decisions
        for f in d.formats
    ]
    table = build_table("none", space, candidates, lambda _: EXACTLY_NOTHING, {}, sees_activations=True)
    try:
        allocate(table, **budget.named(table.full_bops))
    except InputError as error:
        raise InputError(f"{budget} cannot be kept: {error}") from error


def _traced(bare: verbs.Loaded, folder: Path, *, compute: Compute, variant: str | None) -> DenoiserGraph:
    """The graph by the names of the denoiser's arguments, else by one call of its pipeline."""
    try:
        return verbs.trace(bare)
    except InputError as error:
        whole = load_pipeline(folder, device=compute.device, dtype=compute.dtype, variant=variant)
        if isinstance(whole, BareDenoiser):
            raise
        logger.info("%s; its pipeline is called once", error)
        return verbs.trace(whole)
