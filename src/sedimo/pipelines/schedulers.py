"""Other noise schedulers on a pipeline for a while: made from the settings of its own, and taken out again."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from sedimo.errors import InputError
from sedimo.pipelines.objects import PipelineObject

_CLASSES: Mapping[str, Any] = {
    "ddim": DDIMScheduler,
    "dpm-solver++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
}
SCHEDULERS = tuple(_CLASSES)
_START = "init_noise_sigma"


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


@contextlib.contextmanager
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
