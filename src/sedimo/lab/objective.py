"""What a recipe's quality is measured on: final latents, the denoiser's own path, single steps, or images.

All give a noise and a signal power per sample. For `path` and `step` the powers are those of the
denoiser's outputs, each relative to its own signal and averaged over the calls, so that every step counts
equally; the signal is then 1. `fid` looks at final latents and at the images as a set besides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from sedimo.errors import InputError, StateError
from sedimo.lab.images import Features, compare_distributions, draw_latents_and_features
from sedimo.lab.trial import ObjectiveName
from sedimo.metrics.estimate import Estimate
from sedimo.metrics.signal import NoisePowers, relative_noise
from sedimo.pipelines.adapter import DenoiserCall, PipelineAdapter, Sampling
from sedimo.pipelines.trajectory import output_tensor, record

MAX_ROWS = 64  # of a recorded call that run at once when layers are looked at
MIN_IMAGES = 20  # of which a jackknife can leave parts out


@dataclass(frozen=True)
class Reference:
    """What the full-precision pipeline gives under a sampling plan: the other side of every comparison.

    `calls` are the recorded denoiser calls, empty for `final_latents` and `fid`, which need only `latents`; `features`
    are those of the images, for `fid`.
    """

    objective: ObjectiveName
    sampling: Sampling
    latents: torch.Tensor  # [n, ...]
    calls: tuple[DenoiserCall, ...]
    n_calls: int
    features: Features | None = None


@dataclass(frozen=True)
class Measurement:
    """Noise and signal power per sample, and what the samples are as a set."""

    powers: NoisePowers
    measures: Mapping[str, Estimate] = field(default_factory=dict)


def measure_reference(objective: ObjectiveName, adapter: PipelineAdapter, sampling: Sampling) -> Reference:
    """Samples at full precision once and keeps what the objective compares with."""
    if objective == "final_latents":
        counted: list[int] = []
        latents = adapter.sample(sampling, observer=lambda call: counted.append(call.step))
        return Reference(objective, sampling, latents, (), len(counted))
    if objective == "fid":
        if len(sampling.seeds) < MIN_IMAGES:
            raise InputError(f"the objective 'fid' needs at least {MIN_IMAGES} samples, got {len(sampling.seeds)}")
        with counted_calls(adapter) as calls:
            latents, features = draw_latents_and_features(adapter, sampling, label="full precision")
        return Reference(objective, sampling, latents, (), len(calls), features)
    trajectory = record(adapter, sampling)
    return Reference(objective, sampling, trajectory.latents, trajectory.calls, trajectory.n_calls)


def measure(adapter: PipelineAdapter, reference: Reference) -> Measurement:
    """The denoiser as it is now, against the reference."""
    if reference.objective == "final_latents":
        return Measurement(_noise(reference, adapter.sample(reference.sampling)))
    if reference.features is not None:
        latents, features = draw_latents_and_features(adapter, reference.sampling)
        return Measurement(_noise(reference, latents), _set_measures(reference.features, features))
    if reference.objective == "path":
        return Measurement(_measure_path(adapter, reference))
    return Measurement(_measure_steps(adapter, reference))


def _noise(reference: Reference, latents: torch.Tensor) -> NoisePowers:
    return relative_noise(reference.latents.numpy(), latents.numpy())


def _set_measures(reference: Features, features: Features) -> dict[str, Estimate]:
    """FID and KID, and their differences; endless for a set that diverged."""
    names = ("fid", "fid_difference", "kid", "kid_difference")
    if not np.isfinite(features.values).all():
        return dict.fromkeys(names, Estimate(np.inf, np.nan, np.inf, np.inf, len(features.values)))
    found = compare_distributions(reference, features)
    return {name: getattr(found, name) for name in names}


@contextlib.contextmanager
def counted_calls(adapter: PipelineAdapter) -> Iterator[list[int]]:
    """Grows by one with each call of the denoiser."""
    calls: list[int] = []
    hook = adapter.denoiser.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        hook.remove()


def batches_of(sampling: Sampling, calls: tuple[DenoiserCall, ...]) -> Iterator[tuple[DenoiserCall, range]]:
    """Each recorded call with the positions of the samples that it computed.

    Row r of a call belongs to sample `r mod len(range)` of its batch.

    Raises:
        StateError: the calls do not fit the sampling plan.
    """
    n, first, last_step = len(sampling.seeds), -sampling.batch_size, -1
    for index, call in enumerate(calls):
        if index == 0 or call.step <= last_step:
            first += sampling.batch_size
        last_step = call.step
        samples = range(first, min(first + sampling.batch_size, n))
        if not samples or call.output.shape[0] % len(samples):
            raise StateError(f"call {index} of {call.output.shape[0]} rows does not fit the plan of {n} samples")
        yield call, samples


StepBatches = list[tuple[DenoiserCall, range]]


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
    if len(batches) == 1:
        return batches[0][0]
    (first, _), rows = batches[0], [call.output.shape[0] for call, _ in batches]
    n_sets = rows[0] // len(batches[0][1])
    inputs = {name: _joined([call.inputs[name] for call, _ in batches], rows, n_sets) for name in first.inputs}
    output = _joined([call.output for call, _ in batches], rows, n_sets)
    return DenoiserCall(first.step, first.timestep, inputs, output_tensor(output))


def rows_of(call: DenoiserCall, rows: slice | torch.Tensor) -> dict[str, object]:
    """The inputs of some rows (a slice or positions) of a recorded call, copied: a denoiser may overwrite them.

    Tensors whose first axis has the length of the batch are cut, all others are whole.
    """
    n_rows = call.output.shape[0]
    return {name: _cut(value, rows, n_rows) for name, value in call.inputs.items()}


def rows_for(samples: torch.Tensor, n_samples: int, n_sets: int) -> torch.Tensor:
    """Positions of the rows of some of `n_samples` samples, of which a call has `n_sets` sets, one after the other."""
    return torch.cat([samples + k * n_samples for k in range(n_sets)])


def inputs_by_samples(call: DenoiserCall, n_samples: int) -> Iterator[tuple[int, dict[str, object]]]:
    """The inputs of a call, all rows of a sample together and at most about `MAX_ROWS` at a time.

    Each comes with the number of samples that it is of.
    """
    n_sets = call.output.shape[0] // n_samples
    for samples in torch.split(torch.arange(n_samples), max(1, MAX_ROWS // n_sets)):
        rows = rows_for(samples, n_samples, n_sets).to(call.output.device)
        yield len(samples), rows_of(call, rows)


def _cut(value: object, rows: slice | torch.Tensor, n_rows: int) -> object:
    if isinstance(value, torch.Tensor):
        return (value[rows] if value.ndim and value.shape[0] == n_rows else value).clone()
    if isinstance(value, Mapping):
        return {k: _cut(v, rows, n_rows) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cut(v, rows, n_rows) for v in value)
    return value


def _joined(values: Sequence[object], rows: Sequence[int], n_sets: int) -> object:
    first = values[0]
    if isinstance(first, Mapping):
        return {k: _joined([v[k] for v in values if isinstance(v, Mapping)], rows, n_sets) for k in first}
    if isinstance(first, list | tuple):
        return type(first)(_joined(group, rows, n_sets) for group in zip(*values, strict=True))
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    if not tensors or any(not t.ndim or t.shape[0] != n for t, n in zip(tensors, rows, strict=True)):
        return first
    return torch.cat([t.reshape(n_sets, -1, *t.shape[1:]) for t in tensors], dim=1).flatten(0, 1)


class _Average:
    """Relative noise per sample, averaged over rows and calls."""

    def __init__(self, sampling: Sampling) -> None:
        self._total = np.zeros(len(sampling.seeds))
        self._count = np.zeros(len(sampling.seeds))

    def add(self, reference: torch.Tensor, test: torch.Tensor, samples: range) -> None:
        rows = relative_noise(_array(reference), _array(test)).ratio.reshape(-1, len(samples))
        self._total[samples.start : samples.stop] += rows.sum(0)
        self._count[samples.start : samples.stop] += rows.shape[0]

    def powers(self) -> NoisePowers:
        return NoisePowers(self._total / self._count, np.ones_like(self._total))


def _array(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    return tensor.detach().float().cpu().numpy()  # numpy knows no bfloat16


def _measure_path(adapter: PipelineAdapter, reference: Reference) -> NoisePowers:
    average, recorded = _Average(reference.sampling), batches_of(reference.sampling, reference.calls)

    def compare(call: DenoiserCall) -> None:
        expected, samples = next(recorded)
        if expected.output.shape != call.output.shape:
            raise StateError(f"the denoiser gave {tuple(call.output.shape)}, recorded {tuple(expected.output.shape)}")
        average.add(expected.output, call.output, samples)

    adapter.sample(reference.sampling, observer=compare)
    return average.powers()


def _measure_steps(adapter: PipelineAdapter, reference: Reference) -> NoisePowers:
    average = _Average(reference.sampling)
    with torch.no_grad():
        for call, samples in batches_of(reference.sampling, reference.calls):
            average.add(call.output, output_tensor(adapter.denoiser(**rows_of(call, slice(None)))), samples)
    return average.powers()
