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
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

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
_START = "init_noise_sigma"
_NEEDED = ("model_output", "timestep", "sample")


def scheduler_named(pipeline: PipelineObject, name: str, n_steps: int) -> object:
    """A scheduler of that name with the noise levels and the prediction type of the pipeline's own.

    Raises:
        InputError: an unknown name, or this pipeline cannot take that scheduler, with the reason.
    """
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


@contextmanager
def scheduled(pipeline: PipelineObject, scheduler: object) -> Iterator[None]:
    """The pipeline with another scheduler; on leaving it has its own again."""
    own = pipeline.scheduler
    pipeline.scheduler = scheduler
    try:
        yield
    finally:
        pipeline.scheduler = own


def _scales_its_noise(pipeline: PipelineObject) -> bool:
    """Whether the pipeline's code asks its scheduler how large the initial noise is; there is no list of those."""
    parts = (type(pipeline).__call__, getattr(type(pipeline), "prepare_latents", None))
    return any(part is not None and _START in inspect.unwrap(part).__code__.co_names for part in parts)


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
        output: torch.Tensor = self.arguments["model_output"]
        return output[:, : self.sample.shape[1]]

    def with_prediction(self, prediction: torch.Tensor) -> StepCall:
        """The call with another prediction; a learned variance stays."""
        output: torch.Tensor = self.arguments["model_output"]
        whole = torch.cat([prediction, output[:, prediction.shape[1] :]], dim=1)
        return replace(self, arguments={**self.arguments, "model_output": whole})

    def on(self, scheduler: object) -> StepCall:
        """The same call of another scheduler of the same class."""
        own: Callable[..., object] = type(scheduler).step  # type: ignore[attr-defined]  # what handles steps is left out
        return replace(self, step=functools.partial(own, scheduler))

    def run(self, **changes: object) -> object:
        """What the step makes of the call, with some arguments changed."""
        bound = inspect.BoundArguments(self.signature, {**self.arguments, **changes})
        return self.step(*bound.args, **bound.kwargs)


@contextmanager
def handled_steps(scheduler: object, handle: Callable[[StepCall], object]) -> Iterator[None]:
    """`handle` answers every call of `scheduler.step` meanwhile; the scheduler is exactly what it was on leaving.

    Raises:
        InputError: a call with arguments that the step does not take.
    """
    original: Callable[..., object] = scheduler.step  # type: ignore[attr-defined]  # every scheduler has it
    is_own = "step" in vars(scheduler)
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

    scheduler.step = step  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if is_own:
            scheduler.step = original  # type: ignore[attr-defined]
        else:
            del scheduler.step  # type: ignore[attr-defined]


def check_step(scheduler: object) -> None:
    """Refuses a scheduler whose step is not given a prediction, a timestep and latents under their usual names.

    Raises:
        UnsupportedError: it is not.
    """
    parameters = inspect.signature(scheduler.step).parameters  # type: ignore[attr-defined]
    missing = [name for name in _NEEDED if name not in parameters]
    if missing:
        raise UnsupportedError(
            f"the step of {type(scheduler).__name__} has no argument {missing[0]!r} ({', '.join(parameters)}), so its "
            "predictions cannot be corrected. Use a scheduler such as DDIMScheduler."
        )


def previous_sample(result: object) -> torch.Tensor:
    """The latents `[B, ...]` in what a step returns."""
    return result[0] if isinstance(result, tuple) else result.prev_sample  # type: ignore[attr-defined, no-any-return]


def with_previous_sample(result: object, sample: torch.Tensor) -> object:
    """What a step returned, with other latents."""
    if isinstance(result, tuple):
        return (sample, *result[1:])
    result.prev_sample = sample  # type: ignore[attr-defined]
    return result
