"""Correction of quantization noise while sampling.

At every step a quantized denoiser predicts y = (1 + k) x + b + r where full precision predicts x: k is one number, b
one per channel, and r, of variance v per channel, has nothing to do with x. The scheduler is given (y - b) / (1 + k)
instead. What is left of r is noise that the scheduler did not add: where a step adds noise of its own, s z, of that
so much is taken away that both together have the variance s^2 again.

Source:
    PTQD: Accurate Post-Training Quantization for Diffusion Models (arXiv 2305.10657). Here, the prediction is what the
    scheduler is given: guided rows combined, whether it is of noise, velocity or sample. What a step makes of its
    noise and of the prediction is not taken from formulas but found by asking the scheduler's own step on copies, so
    that it holds for every scheduler whose step is linear in both.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from diffusers.utils.torch_utils import randn_tensor

from sedimo.errors import InputError, UnsupportedError
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.pipelines.schedulers import StepCall, check_step, handled_steps, previous_sample, with_previous_sample

_MAX_RESIDUAL = 1e-3  # relative, of what should be linear, beside rounding
_ROUNDINGS = 16  # units in the last place that a step may lose
_N_PACKED = 3  # axes of packed latents `[B, T, C]`, whose channels are last


@dataclass(frozen=True, slots=True)
class StepCorrection:
    """At a timestep: the slope k, and the bias b and the rest's variance v of each of C channels."""

    timestep: float
    slope: float
    bias: tuple[float, ...]
    variance: tuple[float, ...]

    def __post_init__(self) -> None:
        values = (self.slope, *self.bias, *self.variance)
        if len(self.bias) != len(self.variance) or not self.bias or not all(map(math.isfinite, values)):
            raise InputError(f"timestep {self.timestep:g}: each channel needs a finite bias and variance, got {self}")
        if self.slope <= -1 or min(self.variance) < 0:
            raise InputError(
                f"timestep {self.timestep:g}: a correction needs a slope above -1 and no negative variance, got "
                f"{self.slope:g} and {min(self.variance):g}; the denoiser has nothing left of full precision there"
            )

    def correct(self, prediction: torch.Tensor) -> torch.Tensor:
        """(y - b) / (1 + k) of predictions `[B, C, ...]` or `[B, T, C]`."""
        n_channels = prediction.shape[channel_axis(prediction)]
        if n_channels != len(self.bias):
            raise InputError(
                f"the correction was estimated for {len(self.bias)} channels, the scheduler is given {n_channels}; "
                "estimate it on this pipeline"
            )
        return (prediction - _by_channel(self.bias, prediction)) / (1 + self.slope)


def nearest(steps: Sequence[StepCorrection], timestep: float) -> StepCorrection:
    """The correction of the nearest timestep."""
    return min(steps, key=lambda step: abs(step.timestep - timestep))


@dataclass(slots=True)
class CorrectionLog:
    """What a correction did: steps whose prediction was corrected, and how much of its own noise each noisy one kept.

    `kept` holds s' / s, the mean over channels, of the steps where the scheduler adds noise.
    """

    scheduler: str
    with_variance: bool
    n_steps: int = 0
    kept: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.with_variance:
            return f"{self.n_steps} predictions corrected, the scheduler's noise left alone as asked"
        if not self.kept:
            return f"{self.n_steps} predictions corrected; {self.scheduler} added no noise that could be reduced"
        mean = sum(self.kept) / len(self.kept)
        return (
            f"{self.n_steps} predictions corrected, noise of {self.scheduler} reduced at {len(self.kept)} steps, to "
            f"{mean:.4g} on average"
        )


@contextmanager
def corrected(
    pipe: DiffusersPipeline, steps: Sequence[StepCorrection], *, with_variance: bool = True
) -> Iterator[CorrectionLog]:
    """The pipeline samples with corrections meanwhile, however it is called; it is exactly what it was on leaving.

    Each step takes that of the nearest timestep. `with_variance` reduces the noise that the scheduler adds, too. A
    deterministic scheduler adds none.

    Raises:
        UnsupportedError: the scheduler's step is not given what is needed; or, with the variance, noise that is not one
            number times standard noise, or a step that is not linear in the prediction (it clips).
        InputError: no correction, or predictions of another number of channels than its.
    """
    scheduler = pipe.pipeline.scheduler
    check_step(scheduler)
    if not steps:
        raise InputError("a correction needs at least one timestep, got none")
    if with_variance and hasattr(scheduler, "noise_sampler"):
        raise _not_linear(scheduler, "it draws its noise from a process of its own")
    if with_variance and "step" in vars(scheduler):
        raise _not_linear(scheduler, "its step was exchanged for another one")
    log = CorrectionLog(type(scheduler).__name__, with_variance)

    def step(call: StepCall) -> object:
        found = nearest(steps, call.timestep)
        call = call.with_prediction(found.correct(call.prediction))
        log.n_steps += 1
        response = _response(scheduler, call) if with_variance else None
        result = call.run()
        if response is None:
            return result
        mean, gain = response
        kept = [math.sqrt(max(0.0, 1 - (gain / (1 + found.slope)) ** 2 * v)) for v in found.variance]
        log.kept.append(sum(kept) / len(kept))
        previous = previous_sample(result)
        noise = (previous.double() - mean) * _by_channel(kept, mean)
        return with_previous_sample(result, (mean + noise).to(previous.dtype))

    with handled_steps(scheduler, step):
        yield log


def channel_axis(tensor: torch.Tensor) -> int:
    """The axis of the channels: the last of packed latents `[B, T, C]`, the first after the batch of all others."""
    return tensor.ndim - 1 if tensor.ndim == _N_PACKED else 1


def _by_channel(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    shape = [1] * like.ndim
    shape[channel_axis(like)] = len(values)
    return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(shape)


def _response(scheduler: object, call: StepCall) -> tuple[torch.Tensor, float] | None:
    """How a step answers, found by taking it on copies of the scheduler; None where it adds no noise.

    A step is mean + scale z with standard noise z, and adding h to the prediction adds gain h to the mean; the mean and
    gain / scale are given. Noise that makes up scale^2 together with a prediction's noise of variance v is
    sqrt(1 - (gain / scale)^2 v) times as large.
    """
    takes_generator = "generator" in call.signature.parameters

    def take(seed: int, taken: StepCall = call) -> torch.Tensor:
        changes = {"generator": torch.Generator().manual_seed(seed)} if takes_generator else {}
        return previous_sample(taken.run(copy.deepcopy(scheduler), **changes)).double()

    like = call.prediction
    with torch.random.fork_rng(devices=[like.device] if like.device.type == "cuda" else []):
        first, second = take(0), take(1)
        if torch.equal(first, second):
            return None
        noise, other = (
            randn_tensor(like.shape, torch.Generator().manual_seed(seed), like.device, like.dtype).double()
            for seed in (0, 1)
        )
        rounding = _ROUNDINGS * torch.finfo(like.dtype).eps * float(first.norm() + second.norm())
        scale = _slope(noise - other, first - second, rounding)
        if scale is None:
            raise _not_linear(scheduler, "its noise is not one number times standard noise from its generator")
        change = noise * like.double().std()
        moved = take(0, call.with_prediction(like + change.to(like.dtype)))
    gain = _slope(change, moved - first, rounding)
    if gain is None:
        raise _not_linear(scheduler, "its step is not linear in the prediction, as when it clips")
    return first - scale * noise, gain / abs(scale)


def _slope(cause: torch.Tensor, effect: torch.Tensor, rounding: float) -> float | None:
    """The number that makes `effect` of `cause`; None when there is no such number."""
    slope = float((cause * effect).sum() / cause.square().sum())
    residual = float((effect - slope * cause).norm())
    return slope if residual <= _MAX_RESIDUAL * float(effect.norm()) + rounding else None


def _not_linear(scheduler: object, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"the noise of {type(scheduler).__name__} cannot be reduced: {why}. Correct predictions alone: "
        "with_variance=False, or --correct=output"
    )
