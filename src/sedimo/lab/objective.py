"""What a recipe's quality is measured on: final latents, the denoiser's own path, single steps, or images.

All give a noise and a signal power per sample. For `path` and `step` the powers are those of the
denoiser's outputs, each relative to its own signal and averaged over the calls, so that every step counts
equally; the signal is then 1. `fid` looks at final latents and at the images as a set besides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from sedimo.errors import InputError, StateError
from sedimo.lab.images import Features, compare_distributions, draw_latents_and_features
from sedimo.lab.study import ObjectiveName
from sedimo.metrics.estimate import Estimate
from sedimo.metrics.signal import NoisePowers, relative_noise
from sedimo.pipelines.adapter import DenoiserCall, PipelineAdapter, Sampling
from sedimo.pipelines.trajectory import batches_of, output_tensor, record, rows_of

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
