"""Layers whose inputs are smoothed: the divisor that a layer keeps, and the mark of what was smoothed in a denoiser.

A divided layer has the buffer `input_divisor` `[in]` and divides its input by it before anything else happens to it;
the columns of its weight hold the factor. A folded layer's input is divided by what other layers compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

import torch
from torch import nn

from sedimo.errors import InputError, StateError

How = Literal["divided", "folded"]
DIVISOR = "input_divisor"
_MARK = "_sedimo_smoothed"
_SHOWN = 5
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def smoothed_layers(denoiser: nn.Module) -> dict[str, How]:
    """What was smoothed in a denoiser, by layer; empty for one that was not."""
    found: Mapping[str, How] = denoiser.__dict__.get(_MARK, {})
    return dict(found)


def mark_smoothed(denoiser: nn.Module, layers: Mapping[str, How]) -> None:
    """Notes in a denoiser what was smoothed; nothing removes the note."""
    if layers:
        denoiser.__dict__[_MARK] = dict(layers)
    else:
        denoiser.__dict__.pop(_MARK, None)


def divide_input(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The hook of a divided layer: input `[..., in]` of a Linear, `[B, in, ...]` of a convolution, by its divisor."""
    inputs, *rest = args
    divisor: torch.Tensor = module.get_buffer(DIVISOR).to(inputs)  # offloading moves it only after this hook
    if not isinstance(module, nn.Linear):
        n_axes = len(cast("tuple[int, ...]", module.kernel_size))
        divisor = divisor.reshape(-1, *[1] * n_axes)  # an image may come alone
    return (inputs / divisor, *rest)


def set_divisor(module: nn.Module, divisor: torch.Tensor) -> None:
    """Lets a layer divide its input by `divisor` `[in]`, before the hooks that it has and those that it will get.

    Raises:
        InputError: it has a divisor already.
    """
    if DIVISOR in module._buffers:
        raise InputError("the layer divides its input already: smooth the denoiser as it was loaded")
    module.register_buffer(DIVISOR, divisor)
    module.register_forward_pre_hook(divide_input, prepend=True)


def remove_divisor(module: nn.Module) -> None:
    """Takes divisor and hook away; the weight is the caller's to restore."""
    del module._buffers[DIVISOR]
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is divide_input]:
        del module._forward_pre_hooks[key]


def unsmooth_inputs(denoiser: nn.Module) -> None:
    """Puts every divisor back into its weight, so that the denoiser is an ordinary one; folded ones need nothing.

    Weights that layers share are divided once. Exact, as divisors are powers of two.
    """
    done: dict[int, nn.Parameter] = {}
    for name, how in smoothed_layers(denoiser).items():
        module = denoiser.get_submodule(name)
        if how == "divided":
            weight = module.get_parameter("weight")
            if id(weight) not in done:
                divisor = module.get_buffer(DIVISOR).to(weight.dtype)
                plain = weight.detach() / divisor.reshape(1, -1, *[1] * (weight.ndim - 2))
                done[id(weight)] = nn.Parameter(plain, requires_grad=False)
            module.register_parameter("weight", done[id(weight)])
            remove_divisor(module)
    mark_smoothed(denoiser, {})


def prepare_divisors(model: nn.Module, smoothed: Mapping[str, How]) -> None:
    """Gives the divided layers of a model that is about to be loaded a place for their divisors.

    Raises:
        StateError: the model has no such layer, or its channels are grouped.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, how in smoothed.items():
        module = modules.get(name)
        if not isinstance(module, _LAYERS) or getattr(module, "groups", 1) != 1:
            raise StateError(
                f"config.json smooths the layer {name!r}, which is no Linear or ungrouped Conv layer of the model. "
                "The checkpoint is damaged or foreign: copy or download it again."
            )
        if how == "divided":
            weight = module.get_parameter("weight")
            set_divisor(module, torch.empty(weight.shape[1], dtype=torch.float32, device=weight.device))
    mark_smoothed(model, smoothed)
