"""A source made ready: its denoiser in the stored dtype, its graph, its space, its weights."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from sedimo.api import verbs
from sedimo.api.order import Compute, Order
from sedimo.errors import InputError
from sedimo.graph.model import DenoiserGraph
from sedimo.pipelines.diffusers import BareDenoiser, DiffusersPipeline
from sedimo.pipelines.loading import load_pipeline, locate
from sedimo.pipelines.weights import FileWeights, denoiser_folder, refuse_endless, stored_dtype
from sedimo.space import Decision, SearchSpace, search_space

logger = logging.getLogger(__name__)

ROUNDING = 1e-9
MEMORY_SHARE = 0.7  # of the free memory that a loaded pipeline may take


@dataclass(kw_only=True)
class OpenedSource:
    """A source made ready. The whole pipeline is loaded when it is first needed."""

    name: str
    folder: Path
    denoiser: torch.nn.Module
    graph: DenoiserGraph
    space: SearchSpace
    weights: FileWeights
    compute: Compute
    variant: str | None
    _pipe: DiffusersPipeline | None = field(default=None)

    @property
    def is_pipeline(self) -> bool:
        """Whether the source can be sampled at all."""
        return (self.folder / "model_index.json").is_file()

    @property
    def component(self) -> str | None:
        """Name of the denoiser's folder inside the pipeline's, None when the source is a denoiser alone."""
        return self.weights.folder.name if self.is_pipeline else None

    @property
    def weights_files(self) -> tuple[Path, ...]:
        """The files that hold the denoiser's weights."""
        return tuple(self.weights.files)

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
    formats = order.formats if order.uniform_format is None else f"{order.uniform_format},fp16"
    if order.recipe is not None:
        formats = ",".join(sorted({str(f) for f in order.recipe.formats} | {"fp16"}))
    found = open_pipeline(order.source, formats, compute=order.compute, variant=order.variant)
    if order.recipe is not None:
        found.space.check(order.recipe)
    check_budget(order, found.space)
    return Opened(order=order, **vars(found))


def open_pipeline(source: str, formats: str, *, compute: Compute, variant: str | None = None) -> OpenedSource:
    """Loads the denoiser in the dtype that it is stored in, and traces it; no budget is needed.

    Raises:
        InputError: the source cannot be used, is quantized already, holds NaN, or its inputs are unknown.
        StateError: a damaged file.
    """
    name, folder = locate(source, variant)
    inner = denoiser_folder(folder)
    weights = FileWeights(inner, variant)
    bare = load_pipeline(str(inner), device="cpu", dtype=stored_dtype(weights.files), variant=variant)
    refuse_endless(bare.denoiser)
    graph = _traced(bare, folder, compute=compute, variant=variant)
    return OpenedSource(
        name=name,
        folder=folder,
        denoiser=bare.denoiser,
        graph=graph,
        space=search_space(graph, formats),
        weights=weights,
        compute=compute,
        variant=variant,
    )


def check_budget(order: Order, space: SearchSpace) -> None:
    """Refuses a budget below what the smallest formats take, before anything is measured.

    Raises:
        InputError: with the least and most possible bits.
    """
    budget = order.budget
    if not budget.is_given or order.is_fixed:
        return
    size_of = Decision.stored_bytes if budget.bits is None else Decision.paper_bytes
    sizes = [[size_of(d, f) for f in d.formats] for d in space.decisions]
    least, most = (8 * sum(bound(s) for s in sizes) / space.params for bound in (min, max))
    if budget.in_bits(space.params) < least * (1 - ROUNDING):
        kind = "stored" if budget.bits is None else "paper"
        raise InputError(
            f"{budget} cannot be kept: with these formats the least possible is {math.ceil(least * 1e4) / 1e4:.4f} "
            f"{kind} bits per weight, the most {most:.4f}"
        )


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
