"""Forward hooks on some layers for a while, and what a layer makes of a change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from sedimo.graph.model import Stream
from sedimo.quant.activations import InputQuantizers

Hook = Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor | None]


@contextmanager
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
