"""Recorded denoiser calls of full-precision sampling runs: the data on which sensitivities are measured."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from sedimo.errors import InputError
from sedimo.pipelines.adapter import DenoiserCall, Observer, PipelineAdapter, Sampling

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "sigma")


@dataclass(frozen=True)
class Trajectory:
    """The calls of one sampling plan, batch after batch, and the final latents `[n, C, H, W]`.

    `calls` holds `n_steps` calls per batch (more for schedulers that call twice a step; fewer if so asked).
    """

    sampling: Sampling
    calls: tuple[DenoiserCall, ...]
    latents: torch.Tensor

    @property
    def n_calls(self) -> int:
        """Number of recorded denoiser calls."""
        return len(self.calls)


def record(adapter: PipelineAdapter, sampling: Sampling, *, at_most: int | None = None) -> Trajectory:
    """Samples once and keeps the denoiser's inputs and outputs, of all steps or of `at_most` so many.

    Those are uniform over the run. How many steps it has is known after the first batch, of which all are kept until
    then.
    """
    calls: list[DenoiserCall] = []
    wanted: set[int] | None = None

    def thin() -> set[int]:
        chosen = {round(i) for i in np.linspace(0, len(calls) - 1, min(at_most or len(calls), len(calls)))}
        calls[:] = [call for index, call in enumerate(calls) if index in chosen]
        return {call.step for call in calls}

    def keep(call: DenoiserCall) -> None:
        nonlocal wanted
        if wanted is None and calls and call.step <= calls[-1].step:
            wanted = thin()
        if wanted is None or call.step in wanted:
            calls.append(call)

    latents = adapter.sample(sampling, observer=keep)
    if wanted is None:
        thin()
    return Trajectory(sampling, tuple(calls), latents)


class _Enough(Exception):  # noqa: N818  # no error: ends a sampling run whose later steps nobody wants
    pass


def sample_until(adapter: PipelineAdapter, sampling: Sampling, last_step: int, observer: Observer) -> None:
    """Shows the denoiser's calls, batch after batch, up to a step; nothing is sampled past it."""

    def show(call: DenoiserCall) -> None:
        observer(call)
        if call.step >= last_step:
            raise _Enough

    for batch in sampling.batches():
        with contextlib.suppress(_Enough):
            adapter.sample(batch, observer=show)


def replay(denoiser: nn.Module, call: DenoiserCall) -> torch.Tensor:
    """The denoiser's output on the inputs of a recorded call; gradients are the caller's to switch."""
    return output_tensor(denoiser(**call.inputs))


def output_tensor(output: object) -> torch.Tensor:
    """The tensor in what a denoiser returns: itself, the field `sample`, or the first of a tuple.

    Raises:
        InputError: there is no tensor at any of these places.
    """
    if isinstance(output, Mapping):  # diffusers' outputs are ordered mappings
        output = output["sample"] if "sample" in output else next(iter(output.values()), None)
    elif isinstance(output, tuple | list):
        output = output[0] if output else None
    if not isinstance(output, torch.Tensor):
        raise InputError(f"a denoiser must return a tensor, a tuple or an output of diffusers, got {type(output)}")
    return output


def timestep_of(inputs: Mapping[str, object]) -> float:
    """The noise level that a denoiser was told, by the name of its argument; not a number if there is none.

    The greatest one of several: some pipelines call known frames or tokens free of noise.
    """
    value = next((found for name in TIMESTEP_NAMES if (found := inputs.get(name)) is not None), float("nan"))
    return float(value.max() if isinstance(value, torch.Tensor) else value)  # type: ignore[arg-type]
