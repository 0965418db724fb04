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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from sedimo.bank import SILENT, Progress
from sedimo.codec import content_key
from sedimo.errors import InputError, StateError
from sedimo.lab.exchange import Prober
from sedimo.lab.lab import Lab
from sedimo.lab.parts import Parts
from sedimo.lab.seeds import Seeds
from sedimo.lab.study import Execution
from sedimo.metrics.estimate import Estimate, jackknife_estimate
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.correction import Correction, StepCorrection, channel_axis
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.pipelines.schedulers import StepCall, check_step, handled_steps, previous_sample, with_previous_sample
from sedimo.space import Recipe

CORRECTION_VERSION = 1
CorrectionPath = Literal["full", "own"]
CORRECTION_PATHS: tuple[CorrectionPath, ...] = get_args(CorrectionPath)
CorrectionExtent = Literal["all", "output"]  # with the noise that the scheduler adds, or predictions alone
CORRECTION_EXTENTS: tuple[CorrectionExtent, ...] = get_args(CorrectionExtent)
CORRECTION_SAMPLES = 16  # that a checkpoint's correction is estimated from
_MAX_ASTRAY = 1e-2  # relative, between the latents of both runs: half precision rounds

Array = npt.NDArray[np.float64]
Ready = Callable[[], DiffusersPipeline]  # gives a pipeline in the state that is meant


@dataclass(frozen=True, slots=True)
class CorrectionPart:
    """Sums `[T, n, 6, C]` of n samples at T timesteps: of 1, x, d, x^2, x d and d^2 over the positions of a channel.

    x is the prediction at full precision, d what quantization adds to it.
    """

    timesteps: tuple[float, ...]
    sums: tuple[tuple[tuple[tuple[float, ...], ...], ...], ...]


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


@dataclass(frozen=True, slots=True)
class CorrectionProbe:
    """The parts of all samples, on the `path` of full precision or of the quantized denoiser itself."""

    path: CorrectionPath
    seeds: tuple[int, ...]
    parts: tuple[CorrectionPart, ...]
    execution: Execution

    @property
    def fits(self) -> tuple[StepFit, ...]:
        """By timestep, in the order of sampling."""
        sums = np.concatenate([np.array(part.sums) for part in self.parts], axis=1)
        return tuple(_estimated(t, rows) for t, rows in zip(self.parts[0].timesteps, sums, strict=True))

    @property
    def correction(self) -> Correction:
        """What corrects a pipeline: `pipelines.correction.corrected`.

        Raises:
            InputError: a slope of -1 or below: nothing of full precision is left at that step.
        """
        return Correction(
            tuple(
                StepCorrection(fit.timestep, fit.slope.value, tuple(b.value for b in fit.bias), fit.variance)
                for fit in self.fits
            )
        )


def correction_plan(seeds: Seeds, n_images: int) -> Sampling:
    """Seeds past all those that are evaluated."""
    first = seeds.settings.first_seed + max(seeds.settings.n_seeds, n_images)
    return seeds.plan(range(first, first + CORRECTION_SAMPLES))


def check_extent(extent: CorrectionExtent | None) -> None:
    """Refuses what is no extent of a correction.

    Raises:
        InputError: it is not.
    """
    if extent is not None and extent not in CORRECTION_EXTENTS:
        raise InputError(f"a correction is of {' or '.join(CORRECTION_EXTENTS)}, got {extent!r}")


def probe_correction(lab: Lab, recipe: Recipe, on: Sampling, *, path: CorrectionPath = "full") -> CorrectionProbe:
    """The correction of a recipe, batch by batch, on the path of full precision or on the recipe's own.

    With a study, finished batches are saved there and not measured again.

    Raises:
        InputError: one sample only, an unknown path, or predictions that are not finite.
        UnsupportedError: a scheduler whose step is not given what is needed.
        Interrupted: the user stopped it (with a study, calling again goes on).
    """
    adapter, bank = lab.pipe, lab.any_bank

    def key(batch: Sampling) -> str:
        named = {"correction": CORRECTION_VERSION, "recipe": recipe.key, "path": path}
        return content_key({**named, "setting": lab.setting(batch, "step")})

    with Prober(adapter.denoiser, bank.quantize, bank.input_quantizers) as prober:

        def full() -> DiffusersPipeline:
            prober.restore()
            return adapter

        def quantized() -> DiffusersPipeline:
            prober.switch(recipe)
            return adapter

        return _probe(lab.parts(), full, quantized, on, path, key)


def estimate_correction(
    full: DiffusersPipeline,
    quantized: DiffusersPipeline,
    on: Sampling,
    *,
    path: CorrectionPath = "full",
    progress: Progress = SILENT,
) -> CorrectionProbe:
    """The correction of a quantized pipeline, such as a loaded checkpoint, from the one that it was made from.

    Nothing is saved; `execution` counts the calls of the quantized denoiser alone.

    Raises:
        InputError: one sample only, an unknown path, or predictions that are not finite.
        StateError: the pipelines do not go the same way from the same latents.
        UnsupportedError: a scheduler whose step is not given what is needed.
        Interrupted: the user stopped it.
    """
    parts = Parts(quantized, None, progress)
    return _probe(parts, lambda: full, lambda: quantized, on, path, content_key)


def _probe(
    parts: Parts, full: Ready, quantized: Ready, on: Sampling, path: CorrectionPath, key: Callable[[Sampling], str]
) -> CorrectionProbe:
    """The correction between a pair of pipelines, or two states of one, batch by batch."""
    if path not in CORRECTION_PATHS:
        raise InputError(f"a correction is estimated on the path {' or '.join(CORRECTION_PATHS)}, got {path!r}")
    if len(on.seeds) < 2:
        raise InputError("a correction needs at least two samples to have an error, got 1")
    works = ((key(batch), functools.partial(_measure, full, quantized, batch, path)) for batch in on.batches())
    found = tuple(parts.each(CorrectionPart, "estimating the correction", on.n_batches, works))
    return CorrectionProbe(path, on.seeds, found, parts.execution)


@dataclass(frozen=True)
class _Seen:
    """Of one step of the first run: its timestep and prediction, and the latents before and after it."""

    timestep: float
    prediction: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor


def _measure(full: Ready, quantized: Ready, batch: Sampling, path: CorrectionPath) -> CorrectionPart:
    """Samples both pipelines, the second on the latents of the first."""
    leader, follower = (full, quantized) if path == "full" else (quantized, full)
    seen: list[_Seen] = []

    def lead(call: StepCall) -> object:
        prediction, before = call.prediction.detach().clone(), call.sample.detach().clone()
        result = call.run()
        seen.append(_Seen(call.timestep, prediction, before, previous_sample(result).detach().clone()))
        return result

    pipe = leader()
    check_step(pipe.pipeline.scheduler)
    with handled_steps(pipe.pipeline.scheduler, lead):
        pipe.sample(batch)
    sums: dict[float, Array] = {}
    left = iter(seen)

    def follow(call: StepCall) -> object:
        step = _next(left, call)
        x, y = (step.prediction, call.prediction) if path == "full" else (call.prediction, step.prediction)
        sums[step.timestep] = sums.get(step.timestep, 0) + _sums(x, y, len(batch.seeds))
        result = call.run()
        return with_previous_sample(result, step.after.to(previous_sample(result)))

    pipe = follower()
    with handled_steps(pipe.pipeline.scheduler, follow):
        pipe.sample(batch)
    return CorrectionPart(tuple(sums), tuple(_nested(rows) for rows in sums.values()))


def _next(left: Iterator[_Seen], call: StepCall) -> _Seen:
    step = next(left, None)
    if step is None or (step.timestep, step.before.shape) != (call.timestep, call.sample.shape):
        found = "no step" if step is None else f"timestep {step.timestep:g} of latents {tuple(step.before.shape)}"
        raise StateError(
            f"both pipelines must take the same steps, got {found} and timestep {call.timestep:g} of latents "
            f"{tuple(call.sample.shape)}; give both the same scheduler"
        )
    before = step.before.to(call.sample).double()
    astray = float((call.sample.double() - before).norm() / before.norm().clamp_min(1e-30))
    if not astray <= _MAX_ASTRAY:
        raise StateError(
            f"at timestep {call.timestep:g} the second pipeline starts {astray:.2g} off the latents of the first, so "
            "they cannot be compared; check that both have the same scheduler and start from the same noise"
        )
    return step


def _sums(x: torch.Tensor, y: torch.Tensor, n_samples: int) -> Array:
    """`[n, 6, C]`; row r of a call belongs to sample r mod n."""
    axis = channel_axis(x)
    x, y = (t.detach().movedim(axis, -1).double() for t in (x, y))
    d = y.to(x.device) - x
    values = torch.stack([torch.ones_like(x), x, d, x * x, x * d, d * d])  # [6, rows, ..., C]
    if not bool(values.isfinite().all()):
        raise InputError("predictions hold NaN or infinity, so they have no correction; sample in float32")
    by_sample = values.reshape(6, -1, n_samples, x[0, ..., 0].numel(), x.shape[-1]).sum(dim=(1, 3))
    found: Array = by_sample.movedim(0, 1).cpu().numpy()
    return found


def _nested(rows: Array) -> tuple[tuple[tuple[float, ...], ...], ...]:
    return tuple(tuple(tuple(channels) for channels in sample) for sample in rows.tolist())


def _fit(sums: Array) -> Mapping[str, Array]:
    """Least squares of sums `[..., 6, C]`: slope `[...]`, bias and variance of the rest `[..., C]`."""
    n, x, d, xx, xd, dd = np.moveaxis(sums, -2, 0)
    sxx, sxd, sdd = xx - x * x / n, xd - x * d / n, dd - d * d / n
    power = sxx.sum(-1)
    slope = np.divide(sxd.sum(-1), power, out=np.zeros_like(power), where=power > 0)  # nothing varies: all is bias
    k = slope[..., None]
    variance = np.maximum(0.0, (sdd - 2 * k * sxd + k * k * sxx) / n)
    return {"slope": slope, "bias": (d - k * x) / n, "variance": variance}


def _estimated(timestep: float, sums: Array) -> StepFit:
    """The fit to all samples `[n, 6, C]`, and its errors from those that leave one out."""
    total, n = sums.sum(axis=0), len(sums)
    whole, without = _fit(total), _fit(total - sums)
    added = float(total[5].sum())
    rest = float((whole["variance"] * total[0]).sum())
    return StepFit(
        timestep=timestep,
        slope=jackknife_estimate(float(whole["slope"]), without["slope"], n),
        bias=tuple(jackknife_estimate(float(b), r, n) for b, r in zip(whole["bias"], without["bias"].T, strict=True)),
        variance=tuple(whole["variance"].tolist()),
        explained=1 - rest / added if added > 0 else 0.0,
    )
