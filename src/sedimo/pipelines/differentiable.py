"""A sampling run whose final latents can be differentiated, any number of steps in the memory of one call.

The pipeline's own code runs with gradients: guidance, the scheduler's arithmetic with its history, and whatever else
lies between two calls of a network. At each call of a network the graph is cut: the network runs without gradients,
its inputs are copied and its outputs begin anew. On the way back, from the last call to the first, the run gives the
gradients of the final latents with respect to a call's outputs; whoever walks makes that one call again, with
gradients, and hands on those with respect to its inputs. Between calls there are only tensors of the size of latents,
and random numbers of a sampler are constants.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils import _pytree as pytree

from sedimo.errors import UnsupportedError
from sedimo.pipelines.adapter import DenoiserCall, PipelineObject, Sampling
from sedimo.pipelines.sampling import InputCopies, final_latents, named_inputs
from sedimo.pipelines.schedulers import exchanged
from sedimo.pipelines.trajectory import output_tensor, timestep_of

Tensors = list[torch.Tensor | None]


@dataclass(frozen=True)
class CutCall:
    """A call of a network in a run: what it was given, where the graph was cut, and its first output.

    `places` are the positions, among the leaves of `call.inputs`, of the inputs that depend on earlier calls.
    """

    network: nn.Module
    call: DenoiserCall
    places: tuple[int, ...]
    entries: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]


Handle = Callable[[CutCall, Sequence[Tensors]], Sequence[Tensors]]


@dataclass(frozen=True)
class DifferentiableRun:
    """One batch: its cut calls in order, and its final latents `[B, ...]`, which remember how they were made."""

    cuts: tuple[CutCall, ...]
    latents: torch.Tensor

    def walk_back(self, directions: Sequence[torch.Tensor], handle: Handle) -> None:
        """Shows `handle` each call, the last one first, with its output gradients of <direction, latents>.

        `directions` are of the latents' shape; for each of them, `handle` is given the gradients with respect to the
        call's outputs (None: no influence) and answers with those with respect to its inputs at `places`.
        """
        later: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[(self.latents, d)] for d in directions]
        for cut in reversed(self.cuts):
            answers = handle(cut, [_gradients(pairs, cut.outputs) for pairs in later])
            for pairs, answer in zip(later, answers, strict=True):
                pairs += [(e, g) for e, g in zip(cut.entries, answer, strict=True) if g is not None]


def _gradients(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], outputs: Sequence[torch.Tensor]) -> Tensors:
    roots, gradients = zip(*pairs, strict=True)
    return list(torch.autograd.grad(roots, outputs, gradients, retain_graph=True, allow_unused=True))


def run_differentiably(pipeline: PipelineObject, denoiser: nn.Module, batch: Sampling) -> DifferentiableRun:
    """Samples a plan as one batch, as `sample_batch` does, and remembers how."""
    name = f"{type(pipeline).__name__} with {type(pipeline.scheduler).__name__}"
    cuts: list[CutCall] = []

    def call(**arguments: object) -> object:
        try:
            with torch.enable_grad():
                return inspect.unwrap(type(pipeline).__call__)(pipeline, **arguments)  # around it, gradients are off
        except RuntimeError as error:
            raise UnsupportedError(f"{name} cannot be run with gradients: {error}") from error

    with contextlib.ExitStack() as stack:
        for network in pipeline.components.values():
            if isinstance(network, nn.Module):
                stack.enter_context(_cut(network, cuts, is_always_cut=network is denoiser))
        latents = final_latents(pipeline, batch, call, cuts_last=True)
    if latents is None or not latents.requires_grad:
        raise UnsupportedError(f"{name} gives final latents that have no derivative by the denoiser's outputs")
    return DifferentiableRun(tuple(cuts), latents[: len(batch.seeds)])


def make_again(cut: CutCall, inputs: Mapping[str, object]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Makes a call again with gradients, on its inputs or rows of them; its outputs, and the inputs at `places`."""
    leaves, spec = pytree.tree_flatten(dict(inputs))
    for place in cut.places:
        leaves[place] = leaves[place].detach().requires_grad_(True)
    with torch.enable_grad():
        given = [x.clone() if i in cut.places else x for i, x in enumerate(leaves)]  # may be changed in place
        output = cut.network(**pytree.tree_unflatten(given, spec))
    return [x for x in pytree.tree_leaves(output) if _is_number(x)], [leaves[place] for place in cut.places]


def pull_through(cut: CutCall, gradients: Sequence[Tensors]) -> list[Tensors]:
    """The gradients with respect to a call's inputs, for a network that nothing else is wanted of."""
    outputs, entries = make_again(cut, cut.call.inputs)
    found: list[Tensors] = []
    for one in gradients:
        pairs = [(o, g) for o, g in zip(outputs, one, strict=True) if g is not None and o.requires_grad]
        found.append(_gradients(pairs, entries) if pairs and entries else [None] * len(entries))
    return found


@contextlib.contextmanager
def _cut(network: nn.Module, cuts: list[CutCall], *, is_always_cut: bool) -> Iterator[None]:
    """While the context lasts, calls of the network are cut out of the graph, and its parameters are constants.

    Each runs without gradients, and is noted where the graph is cut. A network that is not always cut (a text encoder,
    a control network) is cut where its inputs depend on earlier calls, and else gives constants.
    """
    original: Callable[..., object] = network.forward
    signature, copies, steps = inspect.signature(original), InputCopies(), itertools.count()

    def forward(*args: object, **kwargs: object) -> object:
        named = named_inputs(signature, args, kwargs)
        leaves = pytree.tree_leaves(named)
        places = tuple(i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.requires_grad)
        if not places and not is_always_cut:
            with torch.no_grad():
                return original(*args, **kwargs)
        entries = tuple(leaves[i].clone() for i in places)  # a later change in place of the originals is none of these
        inputs = copies.of(named)
        versions = [leaves[i]._version for i in places]
        with torch.no_grad():
            output = original(*args, **kwargs)
        if versions != [leaves[i]._version for i in places]:
            raise UnsupportedError(f"{type(network).__name__} overwrites latents that it is given")
        parts, shape = pytree.tree_flatten(output)
        outputs = tuple(x.detach().clone().requires_grad_(True) for x in parts if _is_number(x))
        call = DenoiserCall(next(steps), timestep_of(inputs), inputs, output_tensor(output).detach())
        cuts.append(CutCall(network, call, places, entries, outputs))
        following = iter(outputs)
        renewed = [next(following).clone() if _is_number(x) else x for x in parts]  # a leaf may not be changed in place
        return pytree.tree_unflatten(renewed, shape)

    with contextlib.ExitStack() as stack:
        for parameter in network.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        stack.enter_context(exchanged(network, "forward", forward))  # as accelerate does
        yield


def _is_number(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
