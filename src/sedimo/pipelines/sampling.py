"""Running a diffusers pipeline to its final latents: one generator per sample, every denoiser call seen.

Pipelines differ in what they hand out. Those that know `output_type="latent"` are asked for it. Others
(`DiTPipeline`, `DDPMPipeline`, `DDIMPipeline`, ...) are watched: their scheduler's `step` is wrapped for the
length of one call, which shows the last latents, and gives the scheduler the samples' generators where the
pipeline forgets to. Whatever is wrapped is restored, also after an exception.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

from sedimo.errors import InputError, StateError
from sedimo.pipelines.adapter import DenoiserCall, Observer, PipelineObject, Sampling
from sedimo.pipelines.conditions import call_parameters, condition_arguments
from sedimo.pipelines.schedulers import StepCall, handled_steps, previous_sample, with_previous_sample
from sedimo.pipelines.trajectory import output_tensor, timestep_of

logger = logging.getLogger(__name__)

_LATENT_OUTPUT = "latent"


def sample_batch(
    pipeline: PipelineObject,
    denoiser: nn.Module,
    sampling: Sampling,
    indices: Sequence[int],
    observer: Observer | None,
) -> torch.Tensor:
    """Final latents `[B, ...]` float32 on the CPU of the samples `indices` of a plan, run as one batch.

    Raises:
        InputError: the pipeline does not take what the plan asks for.
    """
    with torch.no_grad(), ready_to_sample(pipeline, sampling, indices) as ready:
        if observer is not None:
            ready.stack.enter_context(observed_calls(denoiser, observer))
        result = pipeline(**ready.arguments)[0]
    latents = result if gives_latents(pipeline) else ready.steps.last
    if not isinstance(latents, torch.Tensor):
        raise StateError(f"{type(pipeline).__name__} ended without latents: its scheduler made no step")
    return latents[: len(indices)].detach().to("cpu", torch.float32)  # guidance doubles DiT's batch


@dataclass(frozen=True)
class Ready:
    """A pipeline in which nothing is missing for a batch: the arguments of its call, and what its steps gave.

    `stack` takes what has to be undone when the batch is finished.
    """

    arguments: dict[str, object]
    steps: SeenSteps
    stack: ExitStack


@contextmanager
def ready_to_sample(pipeline: PipelineObject, sampling: Sampling, indices: Sequence[int]) -> Iterator[Ready]:
    """The pipeline made ready for the samples `indices` of a plan; on leaving it is what it was.

    Raises:
        InputError: the pipeline does not take what the plan asks for.
    """
    generators = [torch.Generator().manual_seed(sampling.seeds[i]) for i in indices]
    arguments = _call_arguments(pipeline, sampling, indices) | {"generator": generators}
    with ExitStack() as stack:
        stack.enter_context(_without_progress_bar(pipeline))
        stack.enter_context(_repeatable_global_noise(pipeline, sampling.seeds[indices[0]]))
        steps = stack.enter_context(_watched_steps(pipeline.scheduler, generators))
        if not gives_latents(pipeline):
            stack.enter_context(_skipped_decoding(pipeline))
        yield Ready(arguments, steps, stack)


def _call_arguments(pipeline: PipelineObject, sampling: Sampling, indices: Sequence[int]) -> dict[str, object]:
    parameters, name = call_parameters(pipeline), type(pipeline).__name__
    arguments = condition_arguments(pipeline, [sampling.condition(i) for i in indices])
    if not arguments and "batch_size" in parameters:
        arguments["batch_size"] = len(indices)
    arguments |= {"num_inference_steps": sampling.n_steps, "return_dict": False}
    if sampling.guidance is not None:
        arguments["guidance_scale"] = sampling.guidance
    if sampling.resolution is not None:
        arguments |= {"height": sampling.resolution, "width": sampling.resolution}
    if "output_type" in parameters:
        arguments["output_type"] = _LATENT_OUTPUT if gives_latents(pipeline) else "pt"
    words = {"guidance_scale": "guidance", "height": "resolution", "width": "resolution"}
    refused = [words.get(a, a) for a in arguments if a not in parameters]
    if refused:
        raise InputError(f"{name} cannot be told its {refused[0]}; leave {refused[0]} out to use its own")
    return arguments


def gives_latents(pipeline: PipelineObject) -> bool:
    """Whether the call compares its `output_type` with "latent"; there is no list of those that do."""
    function = inspect.unwrap(type(pipeline).__call__)
    return "output_type" in call_parameters(pipeline) and _LATENT_OUTPUT in function.__code__.co_consts


@contextmanager
def _without_progress_bar(pipeline: PipelineObject) -> Iterator[None]:
    kept = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**kept)


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


@dataclass
class SeenSteps:
    """What the scheduler's steps gave: the latest previous sample, and how many there were.

    With `cuts_last`, the pipeline gets the last step's sample without its history of gradients: it goes on to make
    pictures of it in ways that know none.
    """

    last: torch.Tensor | None = None
    n_steps: int = 0
    cuts_last: bool = False


@contextmanager
def _watched_steps(scheduler: object, generators: Sequence[torch.Generator]) -> Iterator[SeenSteps]:
    """Watches `scheduler.step`, and gives it the samples' generators."""
    seen = SeenSteps()

    def watch(call: StepCall) -> object:
        changes: dict[str, object] = {}
        if "generator" in call.signature.parameters:
            rows = len(next(iter(call.arguments.values())))
            changes["generator"] = _one_per_row(generators, rows)
        result = call.run(**changes)
        seen.last, seen.n_steps = previous_sample(result), seen.n_steps + 1
        is_cut = seen.cuts_last and seen.n_steps == len(scheduler.timesteps)  # type: ignore[attr-defined]
        return with_previous_sample(result, seen.last.detach()) if is_cut else result

    with handled_steps(scheduler, watch):
        yield seen


def _one_per_row(generators: Sequence[torch.Generator], rows: int) -> list[torch.Generator]:
    """The samples' generators; where guidance repeats the batch, the repeats draw the same noise."""
    repeats = max(1, rows // len(generators))
    copies = [torch.Generator().set_state(g.get_state()) for _ in range(repeats - 1) for g in generators]
    return [*generators, *copies]


@contextmanager
def _skipped_decoding(pipeline: PipelineObject) -> Iterator[None]:
    """Lets a pipeline that must decode pass its latents through: images are not wanted here."""
    decoder = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
    if decoder is None:
        yield
        return
    decoder.decode = lambda latents, *_, **__: SimpleNamespace(sample=latents)
    try:
        yield
    finally:
        del decoder.decode


@contextmanager
def observed_calls(denoiser: nn.Module, observer: Observer) -> Iterator[None]:
    """Shows every call of the denoiser to `observer` while the context lasts; steps count from 0."""
    watcher = _Watcher(inspect.signature(denoiser.forward), observer)
    before = denoiser.register_forward_pre_hook(watcher.before, with_kwargs=True)
    after = denoiser.register_forward_hook(watcher.after)
    try:
        yield
    finally:
        before.remove()
        after.remove()


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
    """Copies of tensors as they are now, for the call may change them.

    A tensor that is passed unchanged to several calls (a prompt's embedding) is copied once.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[torch.Tensor, int, torch.Tensor]] = {}

    def copy(self, value: torch.Tensor, place: str) -> torch.Tensor:
        """The copy of what stands at a place of the inputs."""
        source, version, copy = self._kept.get(place, (None, -1, value))
        if source is not value or version != value._version:
            copy = value.detach().clone()
            self._kept[place] = (value, value._version, copy)
        return copy


class _Watcher:
    """Copies inputs before a call, for the call may change them, and reports them with the output after it.

    A tensor that is passed unchanged to several calls (a prompt's embedding) is copied once.
    """

    def __init__(self, signature: inspect.Signature, observer: Observer) -> None:
        self._signature, self._observer = signature, observer
        self._step = 0
        self._inputs: Mapping[str, object] = {}
        self._copies = InputCopies()

    def before(self, _module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        given = named_inputs(self._signature, args, kwargs)
        self._inputs = {name: self._copy(value, name) for name, value in given.items()}

    def after(self, _module: nn.Module, _args: tuple[object, ...], output: object) -> None:
        call = DenoiserCall(self._step, timestep_of(self._inputs), self._inputs, output_tensor(output).detach().clone())
        self._step += 1
        self._observer(call)

    def _copy(self, value: object, place: str) -> object:
        if isinstance(value, torch.Tensor):
            return self._copies.copy(value, place)
        if isinstance(value, Mapping):
            return {k: self._copy(v, f"{place}.{k}") for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(v, f"{place}.{i}") for i, v in enumerate(value))
        return value
