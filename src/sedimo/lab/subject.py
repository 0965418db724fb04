"""What lies on the bench: which source, what is decided about it, which treatments are in force."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import nn

from sedimo.bank import Bank
from sedimo.errors import InputError
from sedimo.graph.model import DenoiserGraph
from sedimo.graph.trace import trace_denoiser
from sedimo.pipelines.adapter import WeightSource
from sedimo.pipelines.diffusers import BareDenoiser, DiffusersPipeline
from sedimo.pipelines.loading import load_pipeline
from sedimo.pipelines.trajectory import record
from sedimo.pipelines.weights import (
    FileWeights,
    ModuleWeights,
    denoiser_folder,
    refuse_adapters,
    refuse_changed,
    stored_dtype,
)
from sedimo.runtime.smoothed import smoothed_layers
from sedimo.settings import REQUIRED, block, option
from sedimo.space import SearchSpace

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
    """A treatment that is in force, with all that was measured for it. Its text says for people what was done."""

    def enter(self, denoiser: nn.Module, *, is_stored: bool) -> Callable[[], None] | None:
        """Changes a denoiser in place; what it gives undoes that bit-exactly, None where nothing was changed.

        `is_stored` tells the denoiser whose weights are packed from the one that computes.
        """

    def on(self, bank: Bank) -> Bank:
        """The bank under this treatment."""

    def as_json(self) -> Mapping[str, object]:
        """What scripts are told of it, by key."""


@dataclass(frozen=True)
class Subject:
    """A source made ready, and the treatments in force, in the order in which they came.

    `folder` is where its files are, None for objects that were made in memory; `ends` is the one format of first and
    last layers, None where they are decided on like all others.
    """

    name: str
    folder: Path | None
    variant: str | None
    compute: Compute
    space: SearchSpace
    treatments: tuple[InForce, ...] = ()
    ends: str | None = None

    @property
    def is_pipeline(self) -> bool:
        """Whether the source can be sampled at all."""
        return self.folder is None or (self.folder / "model_index.json").is_file()

    @property
    def component(self) -> str | None:
        """Name of the denoiser's folder inside the pipeline's, None when the source is a denoiser alone."""
        return denoiser_folder(self.folder).name if self.folder is not None and self.is_pipeline else None

    @property
    def rules(self) -> tuple[str, ...]:
        """What is done by treatments, in words."""
        return tuple(str(one) for one in self.treatments)


def load_stored(folder: Path, variant: str | None) -> Loaded:
    """The denoiser of a folder alone, in the dtype that its files have, on the CPU."""
    inner = denoiser_folder(folder)
    dtype = stored_dtype(FileWeights(inner, variant).files)
    return load_pipeline(str(inner), device="cpu", dtype=dtype, variant=variant)


def trace(pipe: Loaded | nn.Module, *, example_inputs: Mapping[str, object] | None = None) -> DenoiserGraph:
    """The graph of a denoiser: its weight layers, how they are connected, blocks, groups, MACs.

    Inputs are found by argument name, else captured from one call of the pipeline, else `example_inputs`
    (argument name to tensor; only shapes and dtypes matter) must tell them.

    Raises:
        InputError: inputs that nobody knows, a network that cannot be exported, or one with an adapter (LoRA).
    """
    refuse_adapters(pipe if isinstance(pipe, nn.Module) else pipe.denoiser)
    if isinstance(pipe, DiffusersPipeline):
        return trace_denoiser(pipe.denoiser, example_inputs=example_inputs, capture=lambda: captured_inputs(pipe))
    denoiser = pipe.denoiser if isinstance(pipe, BareDenoiser) else pipe
    return trace_denoiser(denoiser, example_inputs=example_inputs)


def captured_inputs(pipe: DiffusersPipeline) -> Mapping[str, object]:
    """The denoiser's inputs in one real call of the pipeline.

    Raises:
        InputError: it is not called.
    """
    trajectory = record(pipe, pipe.default_sampling([0], 1), at_most=1)
    if not trajectory.calls:
        raise InputError(f"the pipeline {pipe.name} did not call its denoiser")
    return trajectory.calls[0].inputs


def weights_of(pipe: Loaded | nn.Module) -> WeightSource:
    """The weights in the dtype they are stored in: from the files where there are any, else (or smoothed) from memory.

    Raises:
        InputError: weights that are quantized, carry an adapter, or are no longer those of their files.
    """
    if isinstance(pipe, DiffusersPipeline | BareDenoiser) and pipe.folder is not None and not pipe.is_quantized:
        weights = FileWeights(denoiser_folder(pipe.folder), pipe.variant)
        if not smoothed_layers(pipe.denoiser):
            refuse_changed(weights, pipe.denoiser)
            return weights
    return ModuleWeights(pipe if isinstance(pipe, nn.Module) else pipe.denoiser)


def loaded_bytes(subject: Subject) -> int:
    """About what the loaded pipeline takes [bytes]; 0 where it is in memory already."""
    if subject.folder is None:
        return 0
    files = sum(f.stat().st_size for f in subject.folder.rglob("*.safetensors"))
    on_cpu = subject.compute.device in (None, "cpu") and not torch.cuda.is_available()
    return files * (2 if on_cpu and subject.compute.dtype in (None, "fp32") else 1)
