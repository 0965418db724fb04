"""What the layers of a denoiser are given: rounded inputs, and inputs that are divided because they were smoothed.

Hooks before a layer do both, and are the record: what is attached can be read back, saved with the denoiser, and taken
off again. A divided layer has the buffer `input_divisor` `[in]` and divides its input by it before anything else
happens to it; the columns of its weight hold the factor. A folded layer's input is divided by what other layers
compute.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import nn

from sedimo.checkpoint.layout import DIVISOR, How, kind_of
from sedimo.errors import InputError, StateError
from sedimo.pipelines.trajectory import TIMESTEP_NAMES, timestep_of
from sedimo.quant.activations import ActivationQuantizer, InputQuantizers

_MARK = "_sedimo_smoothed"


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


def round_inputs(denoiser: nn.Module, quantizers: InputQuantizers) -> None:
    """Makes the denoiser round the inputs of some layers, in place; other layers compute with what they get.

    What was attached before is taken off.
    """
    modules = dict(denoiser.named_modules(remove_duplicate=False))
    for name in quantizers.layers:
        if not name or name not in modules or kind_of(modules[name]) is None:
            raise InputError(f"the denoiser {type(denoiser).__name__} has no Linear or Conv layer {name!r}")
    unround_inputs(denoiser)
    clock = None
    if quantizers.timesteps and quantizers.layers:
        clock = _Clock(quantizers, inspect.signature(denoiser.forward))
        denoiser.register_forward_pre_hook(clock, with_kwargs=True, prepend=True)
    by_module = {modules[name]: quantizer for name, quantizer in quantizers.layers.items()}
    for module, quantizer in by_module.items():  # a module may have two names, and is hooked once
        module.register_forward_pre_hook(_Rounding(quantizer, clock))


def unround_inputs(denoiser: nn.Module) -> None:
    """Takes off what `round_inputs` attached."""
    for _, module, handle, _ in list(_hooks(denoiser)):
        del module._forward_pre_hooks[handle]
        module._forward_pre_hooks_with_kwargs.pop(handle, None)


def rounded_inputs(denoiser: nn.Module) -> InputQuantizers:
    """What is attached to a denoiser; empty if nothing is."""
    hooks = [(layer, hook) for layer, _, _, hook in _hooks(denoiser)]
    layers = {layer: hook.quantizer for layer, hook in hooks if isinstance(hook, _Rounding)}
    return InputQuantizers(layers, next((h.quantizers.timesteps for _, h in hooks if isinstance(h, _Clock)), ()))


def _hooks(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module, int, _Clock | _Rounding]]:
    """Our hooks: the layer, its module, the handle in the module, and the hook."""
    for name, module in denoiser.named_modules():
        for handle, hook in module._forward_pre_hooks.items():
            if isinstance(hook, _Clock | _Rounding):
                yield name, module, handle, hook


def smoothed_layers(denoiser: nn.Module) -> dict[str, How]:
    """What was smoothed in a denoiser, by layer; empty for one that was not."""
    found: Mapping[str, How] = denoiser.__dict__.get(_MARK, {})
    return dict(found)


def mark_smoothed(denoiser: nn.Module, layers: Mapping[str, How]) -> None:
    """Notes in a denoiser what was smoothed; nothing removes the note."""
    denoiser.__dict__.pop(_MARK, None)
    if layers:
        denoiser.__dict__[_MARK] = dict(layers)


def divide_input(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The hook of a divided layer: input `[..., in]` of a Linear, `[B, in, ...]` of a convolution, by its divisor."""
    inputs, *rest = args
    divisor: torch.Tensor = module.get_buffer(DIVISOR).to(inputs)  # offloading moves it only after this hook
    if not isinstance(module, nn.Linear):
        n_axes = len(cast("tuple[int, ...]", module.kernel_size))
        divisor = divisor.reshape(-1, *[1] * n_axes)  # an image may come alone
    return (inputs / divisor, *rest)


def set_divisor(module: nn.Module, divisor: torch.Tensor) -> None:
    """Lets a layer divide its input by `divisor` `[in]`, before the hooks that it has and those that it will get."""
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
    """Gives the divided layers of a model that is about to be loaded a place for their divisors."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, how in smoothed.items():
        module = modules.get(name)
        if module is None or kind_of(module) is None or getattr(module, "groups", 1) != 1:
            raise StateError(
                f"config.json smooths the layer {name!r}, which is no Linear or ungrouped Conv layer of the model. "
                "The checkpoint is damaged or foreign: copy or download it again."
            )
        if how == "divided":
            weight = module.get_parameter("weight")
            set_divisor(module, torch.empty(weight.shape[1], dtype=torch.float32, device=weight.device))
    mark_smoothed(model, smoothed)
