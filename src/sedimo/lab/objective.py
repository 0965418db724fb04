"""What a recipe's quality is measured on: final latents, the denoiser's own path, single steps, or images.

All give a noise and a signal power per sample. For `path` and `step` the powers are those of the
denoiser's outputs, each relative to its own signal and averaged over the calls, so that every step counts
equally; the signal is then 1. `fid` looks at final latents and at the images as a set besides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from sedimo.errors import InputError, StateError
from sedimo.lab.exchange import hooked
from sedimo.lab.images import Features, compare_distributions, draw_latents_and_features
from sedimo.lab.study import ObjectiveName
from sedimo.metrics.estimate import Estimate
from sedimo.metrics.signal import NoisePowers, relative_noise
from sedimo.pipelines.adapter import PipelineAdapter, Sampling
from sedimo.pipelines.trajectory import Trajectory, batches_of, output_tensor, record, rows_of

MIN_IMAGES = 20  # of which a jackknife can leave parts out


@dataclass(frozen=True)
class Reference:
    """What the full-precision pipeline gives under a sampling plan: the other side of every comparison.

    The `trajectory` of `final_latents` and `fid`, which need only its latents, has no calls; `n_calls` is how many
    there were. `features` are those of the images, for `fid`.
    """

    objective: ObjectiveName
    trajectory: Trajectory
    n_calls: int
    features: Features | None = None


@contextlib.contextmanager
def counted_calls(adapter: PipelineAdapter) -> Iterator[list[int]]:
    """Grows by one with each call of the denoiser."""
    calls: list[int] = []
    with hooked(adapter.denoiser, {"": lambda *_: calls.append(1)}):
        yield calls


def measure_reference(objective: ObjectiveName, adapter: PipelineAdapter, sampling: Sampling) -> Reference:
    """Samples at full precision once and keeps what the objective compares with."""
    if objective == "fid" and len(sampling.seeds) < MIN_IMAGES:
        raise InputError(f"the objective 'fid' needs at least {MIN_IMAGES} samples, got {len(sampling.seeds)}")
    features = None
    with counted_calls(adapter) as calls:
        if objective in ("path", "step"):
            trajectory = record(adapter, sampling)
        elif objective == "fid":
            latents, features = draw_latents_and_features(adapter, sampling, label="full precision")
            trajectory = Trajectory(sampling, (), latents)
        else:
            trajectory = Trajectory(sampling, (), adapter.sample(sampling))
    return Reference(objective, trajectory, len(calls), features)


def measure(adapter: PipelineAdapter, reference: Reference) -> tuple[NoisePowers, Mapping[str, Estimate]]:
    """The denoiser as it is now, against the reference: powers per sample, and what the samples are as a set."""
    objective, plan, measures = reference.objective, reference.trajectory.sampling, dict[str, Estimate]()
    if objective in ("path", "step"):
        return _noise_of_calls(adapter, reference.trajectory, on_own_path=objective == "path"), measures
    if reference.features is None:
        latents = adapter.sample(plan)
    else:
        latents, features = draw_latents_and_features(adapter, plan)
        measures = _set_measures(reference.features, features)
    return relative_noise(reference.trajectory.latents.numpy(), latents.numpy()), measures


def _set_measures(reference: Features, features: Features) -> dict[str, Estimate]:
    """FID and KID, and their differences; endless for a set that diverged."""
    names = ("fid", "fid_difference", "kid", "kid_difference")
    if not np.isfinite(features.values).all():
        return dict.fromkeys(names, Estimate(np.inf, np.nan, np.inf, np.inf, len(features.values)))
    found = compare_distributions(reference, features)
    return {name: found[name] for name in names}


def _noise_of_calls(adapter: PipelineAdapter, recorded: Trajectory, *, on_own_path: bool) -> NoisePowers:
    """Relative noise per sample of outputs, mean over rows and calls, on recorded inputs or on its own path."""
    noise, n_rows = np.zeros((2, len(recorded.sampling.seeds)))
    expected = batches_of(recorded.sampling, recorded.calls)

    def compare(output: torch.Tensor) -> None:
        wanted, samples = next(expected)
        if wanted.output.shape != output.shape:
            raise StateError(f"the denoiser gave {tuple(output.shape)}, recorded {tuple(wanted.output.shape)}")
        reference, test = (t.detach().float().cpu().numpy() for t in (wanted.output, output))  # numpy knows no bfloat16
        rows = relative_noise(reference, test).ratio.reshape(-1, len(samples))
        there = slice(samples.start, samples.stop)
        noise[there] += rows.sum(0)
        n_rows[there] += len(rows)

    if on_own_path:
        adapter.sample(recorded.sampling, observer=lambda call: compare(call.output))
    else:
        with torch.no_grad():
            for call in recorded.calls:
                compare(output_tensor(adapter.denoiser(**rows_of(call, slice(None)))))
    return NoisePowers(noise / n_rows, np.ones_like(noise))
