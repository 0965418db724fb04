"""The seam between Sedimo and any diffusion pipeline: what a pipeline must be able to do, and nothing else.

`pipelines/diffusers.py` fulfils it for diffusers; a test or a user may pass an object of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from sedimo.errors import InputError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample: part of the key of everything that is measured.

    Sample i is generated from `seeds[i]` and `conditions[i mod len(conditions)]` (prompts, or class numbers
    as text; empty for an unconditional pipeline). `guidance` and `resolution` [pixels] are the pipeline's own
    defaults when None.
    """

    seeds: tuple[int, ...]
    n_steps: int
    conditions: tuple[str, ...] = ()
    guidance: float | None = None
    resolution: int | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InputError(f"seeds must be a non-empty list without duplicates, got {len(self.seeds)} seeds")
        if self.n_steps < 1 or self.batch_size < 1:
            raise InputError(f"steps and batch size must be positive, got {self.n_steps=}, {self.batch_size=}")

    def first(self, n: int) -> Sampling:
        """The first `n` samples of this plan, or all of them."""
        return replace(self, seeds=self.seeds[:n])

    @property
    def n_batches(self) -> int:
        """How many batches the samples make."""
        return -(-len(self.seeds) // self.batch_size)

    def batches(self) -> Iterator[Sampling]:
        """The plan cut into plans of one batch each, the same samples in the same order with their conditions."""
        for first in range(0, len(self.seeds), self.batch_size):
            seeds = self.seeds[first : first + self.batch_size]
            conditions = tuple(self.condition(first + i) or "" for i in range(len(seeds))) if self.conditions else ()
            yield replace(self, seeds=seeds, conditions=conditions)

    def condition(self, index: int) -> str | None:
        """The condition of sample `index`."""
        return self.conditions[index % len(self.conditions)] if self.conditions else None


@dataclass(frozen=True)
class DenoiserCall:
    """One call of the denoiser: its inputs by argument name, and its output `[B, C, H, W]`.

    `step` counts the calls of one batch from 0; `timestep` is the noise level as the denoiser was told it (not a
    number if it takes none by a known name). With guidance the rows repeat: row r belongs to sample r mod B.
    """

    step: int
    timestep: float
    inputs: Mapping[str, object]
    output: torch.Tensor


Observer = Callable[[DenoiserCall], None]


class PipelineAdapter(Protocol):
    """What Sedimo needs of a pipeline.

    The same seed gives the same sample whatever else is in the batch: initial noise and the scheduler's
    noise come from one CPU generator per sample.
    """

    @property
    def name(self) -> str:
        """Name of the pipeline for people."""

    @property
    def identity(self) -> str:
        """Names what determines a sample besides the denoiser and the plan: class, scheduler, other networks."""

    @property
    def denoiser(self) -> nn.Module:
        """The network that is called at each step."""

    def sample(self, sampling: Sampling, *, observer: Observer | None = None) -> torch.Tensor:
        """Final latents `[n, C, H, W]` float32 on the CPU, one per seed; `observer` sees each denoiser call."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images `[n, 3, H, W]` float32 in [0, 1] of final latents."""


class WeightSource(Protocol):
    """Weights by layer name, read one at a time so that a large model never lies in memory whole."""

    @property
    def digest(self) -> str:
        """sha256 that changes when any weight does."""

    def read(self, layer_name: str) -> torch.Tensor:
        """The weight of a layer, `[out, in, ...]`, on the CPU in its stored dtype."""


class PipelineObject(Protocol):
    """The part of `diffusers.DiffusionPipeline` that Sedimo touches."""

    scheduler: object
    components: dict[str, object]  # by name; None where one is left out
    device: torch.device  # where it computes

    def __call__(self, **arguments: object) -> tuple[torch.Tensor, ...]:
        """Runs it; the images or latents come first."""

    def set_progress_bar_config(self, **settings: object) -> None:
        """Replaces the settings of its progress bar."""

    def save_config(self, folder: Path) -> None:
        """Writes `model_index.json`."""

    def to(self, target: torch.device | torch.dtype) -> object:
        """Moves or casts every component."""
