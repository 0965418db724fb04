"""Recorded denoiser calls of full-precision sampling runs: the data on which sensitivities are measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sedimo.pipelines.adapter import DenoiserCall, PipelineAdapter, Sampling


@dataclass(frozen=True)
class Trajectory:
    """The calls of one sampling plan, batch after batch, and the final latents `[n, C, H, W]`.

    `calls` holds `n_steps` calls per batch (more for schedulers that call twice a step).
    """

    sampling: Sampling
    calls: tuple[DenoiserCall, ...]
    latents: torch.Tensor

    @property
    def n_calls(self) -> int:
        """Number of recorded denoiser calls."""
        return len(self.calls)


def record(adapter: PipelineAdapter, sampling: Sampling, *, steps: Sequence[int] | None = None) -> Trajectory:
    """Samples once and keeps the denoiser's inputs and outputs, of the given steps or of all."""
    wanted = None if steps is None else set(steps)
    calls: list[DenoiserCall] = []

    def keep(call: DenoiserCall) -> None:
        if wanted is None or call.step in wanted:
            calls.append(call)

    latents = adapter.sample(sampling, observer=keep)
    return Trajectory(sampling, tuple(calls), latents)
