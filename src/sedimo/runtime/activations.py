"""Quantized activations in a denoiser: a hook before each layer rounds what the layer is given.

The hooks are the record: what is attached can be read back, saved with the denoiser, and taken off again.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from sedimo.errors import InputError, StateError
from sedimo.pipelines.trajectory import TIMESTEP_NAMES, timestep_of
from sedimo.quant.activations import ActivationQuantizer, InputQuantizers
from sedimo.runtime.layout import kind_of


class _Clock:
    """Tells the layers at which of some timesteps the denoiser is; itself a hook before the denoiser."""

    def __init__(self, quantizers: InputQuantizers, signature: inspect.Signature) -> None:
        self.quantizers, self.group = quantizers, 0
        self._signature = signature

    def __call__(self, _module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        now = timestep_of(self._signature.bind_partial(*args, **kwargs).arguments)
        if math.isnan(now):
            raise StateError(
                f"activation ranges differ by timestep, but the denoiser was called without {', '.join(TIMESTEP_NAMES)}"
            )
        self.group = self.quantizers.group(now)


class _Rounding:
    """The hook before a layer."""

    def __init__(self, quantizer: ActivationQuantizer, clock: _Clock | None) -> None:
        self.quantizer, self.clock = quantizer, clock

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        group = 0 if self.clock is None else self.clock.group
        return (self.quantizer(args[0], n_axes=module.get_parameter("weight").ndim - 1, group=group), *args[1:])


class _Hook(NamedTuple):
    """Where a hook of ours is: its module, its handle in the module, itself."""

    layer: str
    module: nn.Module
    handle: int
    hook: _Clock | _Rounding


def round_inputs(denoiser: nn.Module, quantizers: InputQuantizers) -> None:
    """Makes the denoiser round the inputs of some layers, in place; other layers compute with what they get.

    What was attached before is taken off.

    Raises:
        InputError: a name that is no Linear or Conv layer; the denoiser keeps what it had.
    """
    modules = {name: _layer(denoiser, name) for name in quantizers.layers}
    unround_inputs(denoiser)
    clock = None
    if quantizers.timesteps and quantizers.layers:
        clock = _Clock(quantizers, inspect.signature(denoiser.forward))
        denoiser.register_forward_pre_hook(clock, with_kwargs=True, prepend=True)
    by_module = {id(module): (module, quantizers.layers[name]) for name, module in modules.items()}
    for module, quantizer in by_module.values():  # a module may have two names, and is hooked once
        module.register_forward_pre_hook(_Rounding(quantizer, clock))


def unround_inputs(denoiser: nn.Module) -> None:
    """Takes off what `round_inputs` attached."""
    for found in _hooks(denoiser):
        del found.module._forward_pre_hooks[found.handle]
        found.module._forward_pre_hooks_with_kwargs.pop(found.handle, None)


def rounded_inputs(denoiser: nn.Module) -> InputQuantizers:
    """What is attached to a denoiser; empty if nothing is."""
    hooks = _hooks(denoiser)
    layers = {found.layer: found.hook.quantizer for found in hooks if isinstance(found.hook, _Rounding)}
    return InputQuantizers(layers, next((f.hook.quantizers.timesteps for f in hooks if isinstance(f.hook, _Clock)), ()))


def _hooks(denoiser: nn.Module) -> list[_Hook]:
    return [
        _Hook(name, module, handle, hook)
        for name, module in denoiser.named_modules()
        for handle, hook in module._forward_pre_hooks.items()
        if isinstance(hook, _Clock | _Rounding)
    ]


def _layer(denoiser: nn.Module, name: str) -> nn.Module:
    try:
        module = denoiser.get_submodule(name)
    except AttributeError:
        module = denoiser
    if module is denoiser or kind_of(module) is None:
        raise InputError(f"the denoiser {type(denoiser).__name__} has no Linear or Conv layer {name!r}")
    return module
