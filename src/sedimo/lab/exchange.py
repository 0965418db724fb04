"""Trying other weights in a denoiser for a while, and giving it back exactly as it was.

The original parameters are never written to: a layer's `weight` is exchanged for another parameter object and
exchanged back, so that restoring is bit-exact by construction, also after an exception.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from sedimo.bank import Bank
from sedimo.checkpoint.inputs import round_inputs, unround_inputs
from sedimo.errors import InputError
from sedimo.graph.model import Stream
from sedimo.quant.activations import InputQuantizers
from sedimo.quant.formats import FP16
from sedimo.quant.parts import Entry
from sedimo.quant.tensor import QuantizedTensor
from sedimo.space import Decision, Recipe, SearchSpace

MEMORY_BYTES = 2 << 30


def input_roundings(bank: Bank, decision: Decision) -> dict[str, tuple[InputQuantizers, ...]]:
    """How the inputs of a decision's layers are rounded, at each width that it may take, ascending."""
    quantizers, widths = bank.activations.quantizers, decision.activation_bits
    return {name: tuple(quantizers({name: bits}) for bits in widths) for name in decision.layers}


def passes(space: SearchSpace, memory_bytes: int = MEMORY_BYTES) -> list[list[str]]:
    """Decisions in groups whose weight changes fit in memory, at least one each; a trajectory is replayed for each."""
    found: list[list[str]] = []
    free = 0
    for decision in (one for one in space.decisions if one.changes):
        size = 4 * decision.params * len(decision.weight_formats)
        if not found or size > free:
            found.append([])
            free = memory_bytes
        found[-1].append(decision.name)
        free -= size
    return found


def weight_changes(bank: Bank, denoiser: nn.Module, decision: str) -> torch.Tensor:
    """What each weight format changes, `[F, out, in, ...]` float32 on the denoiser's device."""
    known, device = bank.space.decision_index[decision], next(denoiser.parameters()).device
    deltas = torch.empty(len(known.weight_formats), *known.shape, device=device)
    for target, (_, change) in zip(deltas, bank.changes(decision), strict=True):
        target.copy_(change)
    return deltas


Hook = Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor | None]


@contextlib.contextmanager
def hooked(denoiser: nn.Module, hooks: Mapping[str, Hook]) -> Iterator[None]:
    """Each hook is called with its layer, the layer's inputs and its output; all are gone on leaving."""
    handles = [denoiser.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def linear_part(module: nn.Module, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What a Linear or Conv layer makes of inputs with a weight and no bias, in float32 or better."""
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    inputs, weight = inputs.to(dtype), weight.to(dtype)
    if isinstance(module, _ConvNd):
        return module._conv_forward(inputs, weight, None)
    return F.linear(inputs, weight)


def stream_of(module: nn.Module, inputs: torch.Tensor, stream: Stream | None) -> torch.Tensor:
    """Of the inputs of a Linear or Conv layer the channels of a stream; all without one."""
    if stream is None:
        return inputs
    return inputs.narrow(1 if isinstance(module, _ConvNd) else -1, stream.start, stream.width)


def rounding_change(
    module: nn.Module, layer: str, inputs: torch.Tensor, quantizers: InputQuantizers, timestep: float
) -> torch.Tensor:
    """What rounding its inputs adds to the output of a layer; exact, for a layer is linear in them."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]  # every such layer has one
    rounded = quantizers.round(layer, inputs, n_axes=weight.ndim - 1, timestep=timestep)
    return linear_part(module, rounded.float() - inputs.float(), weight)


@contextlib.contextmanager
def probed(
    denoiser: nn.Module, weights: Mapping[str, torch.Tensor], *, inputs: InputQuantizers | None = None
) -> Iterator[nn.Module]:
    """The denoiser with other weights for some layers; on leaving it is bit-exactly what it was.

    `weights` are plain or packed tensors `[out, in, ...]` by layer name; they are cast to the layer's dtype. With
    `inputs`, the inputs of those layers are rounded meanwhile.
    """
    exchange = _Exchange(denoiser)
    try:
        exchange.put(weights)
        if inputs is not None:
            round_inputs(denoiser, inputs)
        yield denoiser
    finally:
        exchange.restore()
        if inputs is not None:
            unround_inputs(denoiser)


class Prober:
    """Puts recipes into a denoiser one after the other; a context manager that restores it on leaving.

    Going from one recipe to the next exchanges only the weights whose format differs.

    Example:
        >>> with Prober(denoiser, bank) as prober:
        ...     prober.switch(recipe)  # denoiser now computes with the recipe's weights and activations
    """

    def __init__(self, denoiser: nn.Module, bank: Bank) -> None:
        self._denoiser, self._bank, self._exchange = denoiser, bank, _Exchange(denoiser)
        self._entries: dict[str, Entry] = {}
        self._rounded: InputQuantizers | None = None  # None: what the denoiser came with

    def __enter__(self) -> Prober:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def switch(self, recipe: Recipe) -> int:
        """Makes the denoiser compute with a recipe; returns the number of layers that were exchanged.

        When it fails, the denoiser is restored to full precision before the error goes on.
        """
        wanted = {name: entry for name, entry in recipe.weights_alone.layers.items() if entry != FP16}
        released = [name for name in self._entries if name not in wanted]
        changed = {name: entry for name, entry in wanted.items() if self._entries.get(name) != entry}
        try:
            for name in released:
                self._exchange.release(name)
            if changed:
                self._exchange.put(self._bank.quantize(Recipe(changed)))
            inputs = self._bank.input_quantizers(recipe)
            if inputs != self._rounded:  # hooks are put on by a walk through all modules
                round_inputs(self._denoiser, inputs)
        except BaseException:
            self.restore()
            raise
        self._entries, self._rounded = wanted, inputs
        return len(released) + len(changed)

    def restore(self) -> None:
        """Puts every original parameter back and leaves activations alone."""
        self._exchange.restore()
        unround_inputs(self._denoiser)
        self._entries, self._rounded = {}, None


class _Exchange:
    """The parameters that were taken out of a denoiser, by the module they belong to."""

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = denoiser
        self._originals: dict[nn.Module, nn.Parameter] = {}

    def put(self, weights: Mapping[str, torch.Tensor]) -> None:
        made: dict[tuple[int, torch.dtype], nn.Parameter] = {}
        for name, weight in weights.items():
            module, present = _layer(self._denoiser, name)
            if weight.shape != present.shape:
                raise InputError(
                    f"layer {name!r} has a weight of shape {tuple(present.shape)}, it cannot take {tuple(weight.shape)}"
                )
            self._originals.setdefault(module, present)
            key = (id(weight), present.dtype)
            if key not in made:  # layers that share a weight go on sharing one
                moved = weight.detach().to(present.device, present.dtype)  # a packed one dequantizes in its new dtype
                plain = moved.dequantize() if isinstance(moved, QuantizedTensor) else moved
                made[key] = nn.Parameter(plain, requires_grad=False)
            module.weight = made[key]

    def release(self, name: str) -> None:
        module, _ = _layer(self._denoiser, name)
        module.weight = self._originals[module]

    def restore(self) -> None:
        for module, original in self._originals.items():
            module.weight = original
        self._originals.clear()


def _layer(denoiser: nn.Module, name: str) -> tuple[nn.Module, nn.Parameter]:
    try:
        module = denoiser.get_submodule(name)
    except AttributeError:
        module = denoiser
    weight = getattr(module, "weight", None)
    if module is denoiser or not isinstance(weight, nn.Parameter):
        raise InputError(f"the denoiser {type(denoiser).__name__} has no layer {name!r} with a weight")
    return module, weight
