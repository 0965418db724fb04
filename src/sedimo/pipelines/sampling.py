"""Running a diffusers pipeline to its final latents: one generator per sample, every denoiser call seen.

Pipelines differ in what they hand out. Those that know `output_type="latent"` are asked for it. Others
(`DiTPipeline`, `DDPMPipeline`, `DDIMPipeline`, ...) are watched: their scheduler's `step` is wrapped for the
length of one call, which shows the last latents, and gives the scheduler the samples' generators where the
pipeline forgets to. Whatever is wrapped is restored, also after an exception.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from sedimo.errors import InputError, StateError, UnsupportedError
from sedimo.pipelines.adapter import DenoiserCall, Observer, PipelineObject, Sampling
from sedimo.pipelines.conditions import call_parameters, condition_arguments
from sedimo.pipelines.schedulers import StepCall, exchanged, handled_steps, previous_sample, with_previous_sample
from sedimo.pipelines.trajectory import output_tensor, timestep_of

logger = logging.getLogger(__name__)

_LATENT_OUTPUT = "latent"


def sample_batch(
    pipeline: PipelineObject, denoiser: nn.Module, batch: Sampling, observer: Observer | None
) -> torch.Tensor:
    """Final latents `[B, ...]` float32 on the CPU of all samples of a plan, run as one batch."""
    watching = nullcontext() if observer is None else observed_calls(denoiser, observer)
    with torch.no_grad(), watching:
        latents = final_latents(pipeline, batch, pipeline)
    if latents is None:
        raise StateError(f"{type(pipeline).__name__} ended without latents: its scheduler made no step")
    return latents[: len(batch.seeds)].detach().to("cpu", torch.float32)  # guidance doubles DiT's batch


def final_latents(
    pipeline: PipelineObject, batch: Sampling, call: Callable[..., Any], *, cuts_last: bool = False
) -> torch.Tensor | None:
    """The final latents of a plan, run as one batch by `call`, the pipeline's own; None if it ends without any.

    With `cuts_last`, a pipeline that gives no latents gets the last step's sample without its history of gradients: it
    goes on to make pictures of it in ways that know none.
    """
    scheduler: Any = pipeline.scheduler
    generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
    arguments = _call_arguments(pipeline, batch) | {"generator": generators}
    is_watched = not gives_latents(pipeline)
    last, n_steps = None, 0

    def watch(step: StepCall) -> object:
        nonlocal last, n_steps
        changes: dict[str, object] = {}
        if "generator" in step.signature.parameters:
            repeats = len(next(iter(step.arguments.values()))) // len(generators)  # of the batch, by guidance
            copies = [torch.Generator().set_state(g.get_state()) for _ in range(repeats - 1) for g in generators]
            changes["generator"] = [*generators, *copies]  # repeats draw the same noise
        result = step.run(**changes)
        last, n_steps = previous_sample(result), n_steps + 1
        is_cut = cuts_last and is_watched and n_steps == len(scheduler.timesteps)
        return with_previous_sample(result, last.detach()) if is_cut else result

    with ExitStack() as stack:
        stack.callback(pipeline.set_progress_bar_config, **getattr(pipeline, "_progress_bar_config", {}))
        pipeline.set_progress_bar_config(disable=True)
        stack.enter_context(_repeatable_global_noise(pipeline, batch.seeds[0]))
        stack.enter_context(handled_steps(scheduler, watch))
        decoder = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
        if is_watched and decoder is not None:  # it must decode, and images are not wanted here
            stack.enter_context(exchanged(decoder, "decode", lambda latents, *_, **__: SimpleNamespace(sample=latents)))
        result = call(**arguments)[0]
    if cuts_last and is_watched and n_steps > len(scheduler.timesteps):
        name = f"{type(pipeline).__name__} with {type(scheduler).__name__}"
        raise UnsupportedError(f"{name} makes {n_steps} steps at {len(scheduler.timesteps)} timesteps")
    latents = last if is_watched else result
    return latents if isinstance(latents, torch.Tensor) else None


def _call_arguments(pipeline: PipelineObject, batch: Sampling) -> dict[str, object]:
    parameters, name = call_parameters(pipeline), type(pipeline).__name__
    arguments = condition_arguments(pipeline, [batch.condition(i) for i in range(len(batch.seeds))])
    if not arguments and "batch_size" in parameters:
        arguments["batch_size"] = len(batch.seeds)
    arguments |= {"num_inference_steps": batch.n_steps, "return_dict": False}
    if batch.guidance is not None:
        arguments["guidance_scale"] = batch.guidance
    if batch.resolution is not None:
        arguments |= {"height": batch.resolution, "width": batch.resolution}
    if "output_type" in parameters:
        arguments["output_type"] = _LATENT_OUTPUT if gives_latents(pipeline) else "pt"
    words = {"guidance_scale": "guidance", "height": "resolution", "width": "resolution"}
    if refused := [words.get(a, a) for a in arguments if a not in parameters]:
        raise InputError(f"{name} cannot be told its {refused[0]}; leave {refused[0]} out to use its own")
    return arguments


def gives_latents(pipeline: PipelineObject) -> bool:
    """Whether the call compares its `output_type` with "latent"; there is no list of those that do."""
    function = inspect.unwrap(type(pipeline).__call__)
    return "output_type" in call_parameters(pipeline) and _LATENT_OUTPUT in function.__code__.co_consts


@contextmanager
def _repeatable_global_noise(pipeline: PipelineObject, seed: int) -> Iterator[None]:
    """Leaves the global random state alone; noise that a pipeline draws from it is at least repeatable."""
    device = torch.device(pipeline.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        yield
        if not torch.equal(before, torch.get_rng_state()):
            logger.warning(
                "%s with %s draws noise from the global random state: a sample depends on its batch. "
                "Use a scheduler whose step takes a generator.",
                type(pipeline).__name__,
                type(pipeline.scheduler).__name__,
            )


@contextmanager
def observed_calls(denoiser: nn.Module, observer: Observer) -> Iterator[None]:
    """Shows every call of the denoiser to `observer` while the context lasts; steps count from 0."""
    signature, copies = inspect.signature(denoiser.forward), InputCopies()
    inputs, steps = dict[str, object](), itertools.count()

    def before(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        nonlocal inputs
        inputs = copies.of(named_inputs(signature, args, kwargs))

    def after(_module: nn.Module, _args: object, output: object) -> None:
        observer(DenoiserCall(next(steps), timestep_of(inputs), inputs, output_tensor(output).detach().clone()))

    with denoiser.register_forward_pre_hook(before, with_kwargs=True), denoiser.register_forward_hook(after):
        yield


def named_inputs(
    signature: inspect.Signature, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> dict[str, object]:
    """The inputs of a network's call by argument name; how the caller wants the answer is none."""
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name, {})
    given.pop("return_dict", None)
    return given


class InputCopies:
    """Copies of tensors before a call may change them; what is passed unchanged to several calls is copied once."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}

    def of(self, inputs: dict[str, object]) -> dict[str, object]:
        """The same inputs with copied tensors."""
        leaves, spec = pytree.tree_flatten(inputs)
        for place, value in enumerate(leaves):
            if isinstance(value, torch.Tensor):
                source, version, copy = self._kept.get(place, (None, -1, value))
                if source is not value or version != value._version:
                    copy = value.detach().clone()
                    self._kept[place] = (value, value._version, copy)
                leaves[place] = copy
        copied: dict[str, object] = pytree.tree_unflatten(leaves, spec)
        return copied
