"""Recorded denoiser calls of full-precision sampling runs: the data on which sensitivities are measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from sedimo.errors import InputError, StateError
from sedimo.pipelines.adapter import DenoiserCall, Observer, PipelineAdapter, Sampling

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "sigma")
MAX_ROWS = 64  # of a recorded call that run at once when layers are looked at
StepBatches = list[tuple[DenoiserCall, range]]


@dataclass(frozen=True)
class Trajectory:
    """The calls of one sampling plan, batch after batch, and the final latents `[n, C, H, W]`.

    `calls` holds `n_steps` calls per batch (more for schedulers that call twice a step; fewer if so asked).
    """

    sampling: Sampling
    calls: tuple[DenoiserCall, ...]
    latents: torch.Tensor


def record(adapter: PipelineAdapter, sampling: Sampling, *, at_most: int | None = None) -> Trajectory:
    """Samples once and keeps the denoiser's inputs and outputs, of all steps or of `at_most`, uniform over the run."""
    calls: list[DenoiserCall] = []
    wanted: set[int] | None = None  # how many steps there are is known after the first batch, all of which is kept

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
    """The tensor in what a denoiser returns: itself, the field `sample`, or the first of a tuple."""
    if isinstance(output, Mapping):  # diffusers' outputs are ordered mappings
        output = output["sample"] if "sample" in output else next(iter(output.values()), None)
    elif isinstance(output, tuple | list):
        output = output[0] if output else None
    if not isinstance(output, torch.Tensor):
        raise InputError(f"a denoiser must return a tensor, a tuple or an output of diffusers, got {type(output)}")
    return output


def timestep_of(inputs: Mapping[str, object]) -> float:
    """The noise level that a denoiser was told, by the name of its argument; not a number if there is none."""
    value = next((found for name in TIMESTEP_NAMES if (found := inputs.get(name)) is not None), float("nan"))
    # of several the greatest: some pipelines call known frames or tokens free of noise
    return float(value.max() if isinstance(value, torch.Tensor) else value)  # type: ignore[arg-type]


def batches_of(sampling: Sampling, calls: tuple[DenoiserCall, ...]) -> Iterator[tuple[DenoiserCall, range]]:
    """Each recorded call with the positions of its samples; row r belongs to sample `r mod len(range)` of them."""
    n, first, last_step = len(sampling.seeds), -sampling.batch_size, -1
    for index, call in enumerate(calls):
        if index == 0 or call.step <= last_step:
            first += sampling.batch_size
        last_step = call.step
        samples = range(first, min(first + sampling.batch_size, n))
        if not samples or call.output.shape[0] % len(samples):
            raise StateError(f"call {index} of {call.output.shape[0]} rows does not fit the plan of {n} samples")
        yield call, samples


def calls_by_step(sampling: Sampling, calls: tuple[DenoiserCall, ...]) -> list[StepBatches]:
    """The calls of all batches at one step, with the positions of their samples, step by step."""
    found: dict[int, StepBatches] = {}
    for call, samples in batches_of(sampling, calls):
        found.setdefault(call.step, []).append((call, samples))
    return [found[step] for step in sorted(found)]


def joined_calls(batches: StepBatches) -> DenoiserCall:
    """The calls of all batches at one step as one of all n samples, whose row r belongs to sample r mod n.

    Tensors whose first axis has the length of their batch are joined; all others are those of the first batch.
    """
    calls, rows = [call for call, _ in batches], [call.output.shape[0] for call, _ in batches]
    n_sets = rows[0] // len(batches[0][1])

    def join(*values: object) -> object:
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        if not tensors or any(not t.ndim or t.shape[0] != n for t, n in zip(tensors, rows, strict=True)):
            return values[0]
        return torch.cat([t.reshape(n_sets, -1, *t.shape[1:]) for t in tensors], dim=1).flatten(0, 1)

    if len(calls) == 1:
        return calls[0]
    inputs, *others = (dict(call.inputs) for call in calls)
    output = output_tensor(join(*(call.output for call in calls)))
    return DenoiserCall(calls[0].step, calls[0].timestep, pytree.tree_map(join, inputs, *others), output)


def rows_of(call: DenoiserCall, rows: slice | torch.Tensor) -> dict[str, object]:
    """The inputs of some rows (a slice or positions) of a recorded call, copied: a denoiser may overwrite them."""

    def cut(value: torch.Tensor) -> torch.Tensor:  # what has no row for each of the output is whole
        return (value[rows] if value.ndim and len(value) == len(call.output) else value).clone()

    inputs: dict[str, object] = pytree.tree_map_only(torch.Tensor, cut, dict(call.inputs))
    return inputs


def rows_for(samples: torch.Tensor, n_samples: int, n_sets: int) -> torch.Tensor:
    """Positions of the rows of some of `n_samples` samples, of which a call has `n_sets` sets, one after the other."""
    return torch.cat([samples + k * n_samples for k in range(n_sets)])


def inputs_by_samples(call: DenoiserCall, n_samples: int) -> Iterator[tuple[int, dict[str, object]]]:
    """Numbers of samples and their inputs of a call, all rows of a sample together, about `MAX_ROWS` at a time."""
    n_sets = call.output.shape[0] // n_samples
    for samples in torch.split(torch.arange(n_samples), max(1, MAX_ROWS // n_sets)):
        rows = rows_for(samples, n_samples, n_sets).to(call.output.device)
        yield len(samples), rows_of(call, rows)
