"""Noise schedulers: others on a pipeline for a while, and the steps of its own handled by somebody else for a while.

What is put in is made from the settings of the pipeline's own, and taken out again.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler

from sedimo.errors import InputError, UnsupportedError
from sedimo.pipelines.adapter import PipelineObject
from sedimo.pipelines.trajectory import timestep_of

_CLASSES: Mapping[str, Any] = {
    "ddim": DDIMScheduler,
    "dpm-solver++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
}
SCHEDULERS = tuple(_CLASSES)


@contextmanager
def exchanged(owner: object, name: str, value: object) -> Iterator[None]:
    """An object with another attribute; on leaving it is exactly what it was."""
    is_own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def scheduler_named(pipeline: PipelineObject, name: str, n_steps: int) -> object:
    """A scheduler of that name with the noise levels and the prediction type of the pipeline's own."""
    if name not in _CLASSES:
        raise InputError(f"schedulers are {', '.join(_CLASSES)}; got {name!r}")
    own: Any = pipeline.scheduler
    kind, pipeline_name = _CLASSES[name], type(pipeline).__name__
    if not isinstance(own, kind) and kind not in own.compatibles:
        raise InputError(f"{name} cannot take the settings of {type(own).__name__}, the scheduler of {pipeline_name}")
    try:
        made = kind.from_config(own.config)
        made.set_timesteps(n_steps)
    except (NotImplementedError, ValueError) as error:
        raise InputError(f"{name} cannot take the settings of {type(own).__name__}: {error}") from error
    if not math.isclose(float(made.init_noise_sigma), 1.0, rel_tol=1e-3) and not _scales_its_noise(pipeline):
        raise InputError(
            f"{name} starts from noise of {float(made.init_noise_sigma):.4g} times unit size, and {pipeline_name} "
            "always starts from unit size"
        )
    return made


def _scales_its_noise(pipeline: PipelineObject) -> bool:
    """Whether the pipeline's code asks its scheduler how large the initial noise is; there is no list of those."""
    parts = (type(pipeline).__call__, getattr(type(pipeline), "prepare_latents", None))
    return any(part is not None and "init_noise_sigma" in inspect.unwrap(part).__code__.co_names for part in parts)


@dataclass(frozen=True)
class StepCall:
    """One call of a scheduler's step: its arguments by name, and the way to carry it out."""

    arguments: Mapping[str, Any]
    signature: inspect.Signature
    step: Callable[..., object]

    @property
    def timestep(self) -> float:
        """The noise level that the scheduler is told."""
        return timestep_of(self.arguments)

    @property
    def sample(self) -> torch.Tensor:
        """The latents `[B, ...]` that the step starts from."""
        return self.arguments["sample"]  # type: ignore[no-any-return]

    @property
    def prediction(self) -> torch.Tensor:
        """What the denoiser predicts of the latents, guided rows combined; a learned variance is left out."""
        return self.arguments["model_output"][:, : self.sample.shape[1]]  # type: ignore[no-any-return]

    def with_prediction(self, prediction: torch.Tensor) -> StepCall:
        """The call with another prediction; a learned variance stays."""
        whole = torch.cat([prediction, self.arguments["model_output"][:, prediction.shape[1] :]], dim=1)
        return replace(self, arguments={**self.arguments, "model_output": whole})

    def run(self, on: Any = None, **changes: object) -> object:
        """What the step makes of the call with some arguments changed, also `on` another scheduler of that class."""
        bound = inspect.BoundArguments(self.signature, {**self.arguments, **changes})
        step = self.step if on is None else functools.partial(type(on).step, on)
        return step(*bound.args, **bound.kwargs)


@contextmanager
def handled_steps(scheduler: Any, handle: Callable[[StepCall], object]) -> Iterator[None]:
    """`handle` answers every call of `scheduler.step` meanwhile; the scheduler is exactly what it was on leaving."""
    original: Callable[..., object] = scheduler.step
    signature = inspect.signature(original)

    @functools.wraps(original)
    def step(*args: object, **kwargs: object) -> object:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(
                f"{type(scheduler).__name__} cannot be called as this pipeline calls it: its step {error}; take another"
            ) from error
        return handle(StepCall(bound.arguments, signature, original))

    with exchanged(scheduler, "step", step):
        yield


def check_step(scheduler: Any) -> None:
    """Refuses a scheduler whose step is not given a prediction, a timestep and latents under their usual names."""
    parameters = inspect.signature(scheduler.step).parameters
    missing = [name for name in ("model_output", "timestep", "sample") if name not in parameters]
    if missing:
        raise UnsupportedError(
            f"the step of {type(scheduler).__name__} has no argument {missing[0]!r} ({', '.join(parameters)}), so its "
            "predictions cannot be corrected. Use a scheduler such as DDIMScheduler."
        )


def previous_sample(result: Any) -> torch.Tensor:
    """The latents `[B, ...]` in what a step returns."""
    return result[0] if isinstance(result, tuple) else result.prev_sample  # type: ignore[no-any-return]


def with_previous_sample(result: Any, sample: torch.Tensor) -> object:
    """What a step returned, with other latents."""
    if isinstance(result, tuple):
        return (sample, *result[1:])
    result.prev_sample = sample
    return result
