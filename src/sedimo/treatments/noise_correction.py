"""What a quantized denoiser's predictions have in common with those of full precision, step by step of sampling.

Both pipelines sample from the same seeds. The second is given, after each of its steps, the latents of the first, so
that both predict from the same inputs at every step; the scheduler's own step does this, whatever the pipeline and its
guidance. Least squares then give y = (1 + k) x + b + r: one slope k, an intercept b per channel. Only sums over
positions are kept, per sample, so that every number has a jackknife error over samples.

Source:
    PTQD: Accurate Post-Training Quantization for Diffusion Models (arXiv 2305.10657). The intercepts are part of the
    fit here, so that a slope and biases are found exactly where there is nothing else; the path is a choice.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from sedimo.codec import content_key
from sedimo.errors import InputError, StateError
from sedimo.lab.measuring import Parts
from sedimo.lab.seeds import Seeds
from sedimo.metrics.estimate import Estimate, jackknife_estimate
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.correction import StepCorrection, channel_axis
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.pipelines.schedulers import StepCall, check_step, handled_steps, previous_sample, with_previous_sample
from sedimo.progress import SILENT, Progress
from sedimo.settings import one_of

CorrectionPath = Literal["full", "own"]
CORRECTION_PATHS: tuple[CorrectionPath, ...] = get_args(CorrectionPath)
CorrectionExtent = Literal["all", "output"]  # with the noise that the scheduler adds, or predictions alone
check_extent = one_of(get_args(CorrectionExtent))
CORRECTION_SAMPLES = 16  # that a checkpoint's correction is estimated from
_MAX_ASTRAY = 1e-2  # relative, between the latents of both runs: half precision rounds

Array = npt.NDArray[np.float64]
Seen = tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]  # a step's timestep, prediction, latents before and after


@dataclass(frozen=True, slots=True)
class StepFit:
    """Slope and biases at a timestep with jackknife errors over samples, and the variance of the rest per channel.

    `explained` is the share of what quantization adds, as a sum of squares, that slope and biases account for.
    """

    timestep: float
    slope: Estimate
    bias: tuple[Estimate, ...]
    variance: tuple[float, ...]
    explained: float


def correction_plan(seeds: Seeds, n_images: int) -> Sampling:
    """Seeds past all those that are evaluated."""
    first = seeds.settings.first_seed + max(seeds.settings.n_seeds, n_images)
    return seeds.plan(range(first, first + CORRECTION_SAMPLES))


def estimate_correction(
    full: DiffusersPipeline,
    quantized: DiffusersPipeline,
    on: Sampling,
    *,
    path: CorrectionPath = "full",
    progress: Progress = SILENT,
) -> tuple[StepFit, ...]:
    """The fits of a quantized pipeline, such as a loaded checkpoint, to the one that it was made from, step by step.

    `path` is whose latents both predict from: those of full precision, or the quantized one's own.
    """
    if path not in CORRECTION_PATHS:
        raise InputError(f"a correction is estimated on the path {' or '.join(CORRECTION_PATHS)}, got {path!r}")
    if len(on.seeds) < 2:
        raise InputError("a correction needs at least two samples to have an error, got 1")
    works = ((content_key(batch), functools.partial(_measure, full, quantized, batch, path)) for batch in on.batches())
    parts = tuple(Parts(quantized, None, progress).each(dict, "estimating the correction", on.n_batches, works))
    return tuple(_estimated(timestep, np.concatenate([part[timestep] for part in parts])) for timestep in parts[0])


def correction_of(fits: Iterable[StepFit]) -> tuple[StepCorrection, ...]:
    """What corrects a pipeline: `pipelines.correction.corrected`."""
    return tuple(StepCorrection(f.timestep, f.slope.value, tuple(b.value for b in f.bias), f.variance) for f in fits)


def _measure(
    full: DiffusersPipeline, quantized: DiffusersPipeline, batch: Sampling, path: CorrectionPath
) -> dict[float, Array]:
    """Samples both pipelines, the second on the latents of the first: sums `[n, 6, C]` by timestep (see `_sums`)."""
    leader, follower = (full, quantized) if path == "full" else (quantized, full)
    seen: list[Seen] = []

    def lead(call: StepCall) -> object:
        prediction, before = call.prediction.detach().clone(), call.sample.detach().clone()
        result = call.run()
        seen.append((call.timestep, prediction, before, previous_sample(result).detach().clone()))
        return result

    check_step(leader.pipeline.scheduler)
    with handled_steps(leader.pipeline.scheduler, lead):
        leader.sample(batch)
    sums: dict[float, Array] = {}
    left = iter(seen)

    def follow(call: StepCall) -> object:
        timestep, prediction, _, after = _next(left, call)
        x, y = (prediction, call.prediction) if path == "full" else (call.prediction, prediction)
        sums[timestep] = sums.get(timestep, 0) + _sums(x, y, len(batch.seeds))
        result = call.run()
        return with_previous_sample(result, after.to(previous_sample(result)))

    with handled_steps(follower.pipeline.scheduler, follow):
        follower.sample(batch)
    return sums


def _next(left: Iterator[Seen], call: StepCall) -> Seen:
    step = next(left, None)
    if step is None or (step[0], step[2].shape) != (call.timestep, call.sample.shape):
        found = "no step" if step is None else f"timestep {step[0]:g} of latents {tuple(step[2].shape)}"
        raise StateError(
            f"both pipelines must take the same steps, got {found} and timestep {call.timestep:g} of latents "
            f"{tuple(call.sample.shape)}; give both the same scheduler"
        )
    before = step[2].to(call.sample).double()
    astray = float((call.sample.double() - before).norm() / before.norm().clamp_min(1e-30))
    if not astray <= _MAX_ASTRAY:
        raise StateError(
            f"at timestep {call.timestep:g} the second pipeline starts {astray:.2g} off the latents of the first, so "
            "they cannot be compared; check that both have the same scheduler and start from the same noise"
        )
    return step


def _sums(x: torch.Tensor, y: torch.Tensor, n_samples: int) -> Array:
    """Of 1, x, d, x^2, x d and d^2, d = y - x, over a channel's positions: `[n, 6, C]`; row r is of sample r mod n.

    x is the prediction at full precision, d what quantization adds to it.
    """
    axis = channel_axis(x)
    x, y = (t.detach().movedim(axis, -1).double() for t in (x, y))
    d = y.to(x.device) - x
    values = torch.stack([torch.ones_like(x), x, d, x * x, x * d, d * d])  # [6, rows, ..., C]
    if not bool(values.isfinite().all()):
        raise InputError("predictions hold NaN or infinity, so they have no correction; sample in float32")
    by_sample = values.reshape(6, -1, n_samples, x[0, ..., 0].numel(), x.shape[-1]).sum(dim=(1, 3))
    found: Array = by_sample.movedim(0, 1).cpu().numpy()
    return found


def _fit(sums: Array) -> tuple[Array, Array, Array]:
    """Least squares of sums `[..., 6, C]`: slope `[...]`, bias and variance of the rest `[..., C]`."""
    n, x, d, xx, xd, dd = np.moveaxis(sums, -2, 0)
    sxx, sxd, sdd = xx - x * x / n, xd - x * d / n, dd - d * d / n
    power = sxx.sum(-1)
    slope = np.divide(sxd.sum(-1), power, out=np.zeros_like(power), where=power > 0)  # nothing varies: all is bias
    k = slope[..., None]
    return slope, (d - k * x) / n, np.maximum(0.0, (sdd - 2 * k * sxd + k * k * sxx) / n)


def _estimated(timestep: float, sums: Array) -> StepFit:
    """The fit to all samples `[n, 6, C]`, and its errors from those that leave one out."""
    total, n = sums.sum(axis=0), len(sums)
    slope, bias, variance = _fit(total)
    slopes, biases, _ = _fit(total - sums)
    added, rest = float(total[5].sum()), float((variance * total[0]).sum())
    return StepFit(
        timestep=timestep,
        slope=jackknife_estimate(float(slope), slopes, n),
        bias=tuple(jackknife_estimate(float(b), r, n) for b, r in zip(bias, biases.T, strict=True)),
        variance=tuple(variance.tolist()),
        explained=1 - rest / added if added > 0 else 0.0,
    )
