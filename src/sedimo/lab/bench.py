"""What lies on the bench: a source, and what is loaded for it, once for all labs that differ in their treatments."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import nn

from sedimo.bank import Bank
from sedimo.checkpoint.inputs import smoothed_layers
from sedimo.errors import InputError
from sedimo.graph.model import DenoiserGraph
from sedimo.graph.trace import trace_denoiser
from sedimo.lab.measuring import CallTiming, References
from sedimo.pipelines.adapter import Sampling, WeightSource
from sedimo.pipelines.diffusers import BareDenoiser, DiffusersPipeline
from sedimo.pipelines.loading import load_pipeline, locate
from sedimo.pipelines.trajectory import record
from sedimo.pipelines.weights import (
    FileWeights,
    ModuleWeights,
    denoiser_folder,
    refuse_adapters,
    refuse_changed,
    refuse_endless,
    stored_dtype,
)
from sedimo.settings import REQUIRED, block, option

logger = logging.getLogger(__name__)

Loaded = DiffusersPipeline | BareDenoiser


@dataclass(frozen=True, slots=True)
class Compute:
    """Dtype (`fp32`, `bf16`, `fp16`) and device; None: float32 on the CPU, the checkpoint's dtype on a GPU."""

    dtype: Literal["fp32", "bf16", "fp16"] | None = option(None, "--dtype", help="Compute dtype.")
    device: str | None = option(None, "--device", help="cpu, cuda, cuda:1, mps; default: the GPU if there is one.")


@dataclass(frozen=True, slots=True)
class SourceSettings:
    """Which model: a diffusers folder, a hub id or `zoo:NAME`, which variant of its weights, and computed how."""

    source: str = option(REQUIRED, metavar="SRC", help="A diffusers folder, a hub id, or zoo:NAME.")
    variant: str | None = option(None, "--variant", help="Variant of the source's weights, such as fp16.")
    compute: Compute = block(Compute())


class InForce(Protocol):
    """A treatment that is in force, with all that was measured for it. Its text says for people what was done.

    What is not said otherwise changes nothing.
    """

    def enter(self, denoiser: nn.Module, *, is_stored: bool) -> Callable[[], None] | None:
        """Changes a denoiser in place; what it gives undoes that bit-exactly, None where nothing was changed.

        `is_stored` tells the denoiser whose weights are packed from the one that computes.
        """
        return None

    def on(self, bank: Bank) -> Bank:
        """The bank under this treatment."""
        return bank

    def as_json(self) -> Mapping[str, object]:
        """What scripts are told of it, by key."""
        return {}


def trace(pipe: Loaded | nn.Module, *, example_inputs: Mapping[str, object] | None = None) -> DenoiserGraph:
    """The graph of a denoiser: its weight layers, how they are connected, blocks, groups, MACs.

    Inputs are found by argument name, else captured from one call of the pipeline, else `example_inputs`
    (argument name to tensor; only shapes and dtypes matter) must tell them.

    Raises:
        InputError: inputs that nobody knows, a network that cannot be exported, or one with an adapter (LoRA).
    """
    denoiser = pipe if isinstance(pipe, nn.Module) else pipe.denoiser
    refuse_adapters(denoiser)
    capture = (lambda: captured_inputs(pipe)) if isinstance(pipe, DiffusersPipeline) else None
    return trace_denoiser(denoiser, example_inputs=example_inputs, capture=capture)


def captured_inputs(pipe: DiffusersPipeline) -> Mapping[str, object]:
    """The denoiser's inputs in one real call of the pipeline."""
    trajectory = record(pipe, pipe.default_sampling([0], 1), at_most=1)
    if not trajectory.calls:
        raise InputError(f"the pipeline {pipe.name} did not call its denoiser")
    return trajectory.calls[0].inputs


def weights_of(pipe: Loaded | nn.Module) -> WeightSource:
    """The weights in the dtype they are stored in: from the files where there are any, else (or smoothed) from memory.

    Refuses those that are quantized, carry an adapter, or are no longer those of their files.
    """
    if isinstance(pipe, DiffusersPipeline | BareDenoiser) and pipe.folder is not None and not pipe.is_quantized:
        weights = FileWeights(pipe.folder, pipe.variant)
        if not smoothed_layers(pipe.denoiser):
            refuse_changed(weights, pipe.denoiser)
            return weights
    return ModuleWeights(pipe if isinstance(pipe, nn.Module) else pipe.denoiser)


def under(treatments: Iterable[InForce], bank: Bank) -> Bank:
    """The bank under some treatments."""
    return functools.reduce(lambda found, one: one.on(found), treatments, bank)


class Bench:
    """The pipeline, the denoiser in the dtype that it is stored in, its weights and its graph.

    Treatments are put into the denoisers, and taken out bit-exactly, when a lab asks for them. `folder` is where the
    source's files are, None for objects that were made in memory; `bank` is that of objects which came with one.
    `references` are the full-precision samples that trials were compared with: no treatment changes what the denoiser
    computes there. `timings` are of plans that were timed.
    """

    def __init__(
        self, source: SourceSettings | DiffusersPipeline, bank: Bank | None = None, graph: DenoiserGraph | None = None
    ) -> None:
        """On a folder, a hub id or `zoo:NAME`, of which the denoiser alone is loaded now; or on a loaded pipeline."""
        self.bank = bank
        self.references: References = {}
        self.timings: dict[Sampling, CallTiming] = {}
        self.seconds_per_fit: float | None = None
        self._pipe: DiffusersPipeline | None = None
        self._bare: Loaded | None = None
        self._inside: dict[nn.Module, list[tuple[InForce, Callable[[], None] | None]]] = {}  # with what undoes it
        self.folder: Path | None = None
        if graph is not None:
            self.graph = graph
        if isinstance(source, SourceSettings):
            self.variant, self.compute = source.variant, source.compute
            self.name, self.folder = locate(source.source, source.variant)
            files = self.files  # refuses what is no full-precision checkpoint
            dtype = stored_dtype(files.files)
            self._bare = load_pipeline(str(files.folder), device="cpu", dtype=dtype, variant=source.variant)
            refuse_endless(self._bare.denoiser)
            return
        self.name, self.variant, self.compute, self._pipe = source.name, None, Compute(), source
        if isinstance(source, DiffusersPipeline):  # what else can be sampled has no files
            self.folder, self.variant = source.folder, source.variant

    @property
    def is_pipeline(self) -> bool:
        """Whether the source can be sampled at all."""
        return self.folder is None or (self.folder / "model_index.json").is_file()

    @property
    def component(self) -> str | None:
        """Name of the denoiser's folder inside the pipeline's, None when the source is a denoiser alone."""
        return denoiser_folder(self.folder).name if self.folder is not None and self.is_pipeline else None

    @property
    def loaded_bytes(self) -> int:
        """About what the loaded pipeline takes [bytes]; 0 where it was made in memory."""
        if self.folder is None:
            return 0
        files = sum(f.stat().st_size for f in self.folder.rglob("*.safetensors"))
        on_cpu = self.compute.device in (None, "cpu") and not torch.cuda.is_available()
        return files * (2 if on_cpu and self.compute.dtype in (None, "fp32") else 1)

    @cached_property
    def graph(self) -> DenoiserGraph:
        """The graph by the names of the denoiser's arguments, else by one call of its pipeline."""
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

    def pipe(self, treatments: Sequence[InForce]) -> DiffusersPipeline:
        """The pipeline in the compute dtype under some treatments."""
        pipe: Loaded = self._loaded() if self._pipe is None else self._pipe
        if isinstance(pipe, BareDenoiser):  # of objects in memory, too
            raise InputError(f"{self.name} is a denoiser without its pipeline and cannot be sampled")
        self._pipe = pipe
        self._put(pipe.denoiser, treatments, is_stored=False)
        return pipe

    def stored(self, treatments: Sequence[InForce]) -> nn.Module:
        """The denoiser as it is stored under some treatments; of objects in memory, the one that computes."""
        if self._bare is None:
            return self.pipe(treatments).denoiser
        self._put(self._bare.denoiser, treatments, is_stored=True)
        return self._bare.denoiser

    def weights(self, treatments: Sequence[InForce]) -> WeightSource:
        """The weights that are quantized under some treatments: those of the files, where none changes them.

        Treatments exchange parameters and never write to them, so what is in force now can be read later, too.
        """
        stored = self.stored(treatments)
        if self.is_changed(stored):
            return ModuleWeights(stored)
        if self.bank is not None:
            return self.bank.weights
        return weights_of(self.pipe(treatments)) if self._bare is None else self.files

    def is_changed(self, denoiser: nn.Module) -> bool:
        """Whether a treatment that is in it now changes a denoiser of the bench."""
        return any(undo is not None for _, undo in self._inside.get(denoiser, ()))

    @property
    def files(self) -> FileWeights:
        """The files that hold the denoiser's weights."""
        if self.folder is None:
            raise InputError(f"{self.name} was made in memory and has no files")
        return FileWeights(self.folder, self.variant)

    def _put(self, denoiser: nn.Module, treatments: Sequence[InForce], *, is_stored: bool) -> None:
        """Makes a denoiser be under exactly these treatments."""
        inside = self._inside.setdefault(denoiser, [])
        if [id(one) for one, _ in inside] == [id(one) for one in treatments]:
            return
        while inside:
            _, undo = inside.pop()
            if undo is not None:
                undo()
        for one in treatments:
            inside.append((one, one.enter(denoiser, is_stored=is_stored)))

    def _loaded(self) -> Loaded:
        compute = self.compute
        return load_pipeline(str(self.folder), device=compute.device, dtype=compute.dtype, variant=self.variant)
