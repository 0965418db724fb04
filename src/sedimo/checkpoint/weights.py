"""The verbs on a denoiser in memory: pack weights, save it packed.

A diffusers model is told what is packed in it, so that its own `save_pretrained`, `dequantize` and `to` are right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from sedimo.checkpoint.contents import named_layers, packed_layers
from sedimo.checkpoint.diffusers_plugin import attach
from sedimo.checkpoint.inputs import round_inputs
from sedimo.checkpoint.layout import KINDS
from sedimo.errors import InputError
from sedimo.pipelines.weights import refuse_adapters
from sedimo.quant.activations import InputQuantizers
from sedimo.quant.tensor import QuantizedTensor

MAX_SHARD_SIZE = "10GB"  # the default of diffusers


def replace_weights(
    denoiser: nn.Module, weights: Mapping[str, QuantizedTensor], *, inputs: InputQuantizers | None = None
) -> None:
    """Puts packed weights in place of the weights of the named layers, in place; the others stay as they are.

    With `inputs`, what those layers are given is rounded from now on, and no other layer's inputs are. The denoiser may
    hold packed weights already. Each keeps the dtype and device of the weight that it replaces. One tensor given for
    several layers is stored once, and layers that share a parameter with a named layer follow it.

    Raises:
        InputError: an adapter is attached, a name that is no Linear or Conv layer, a wrong shape, or two different
            weights for one shared parameter.

    Example:
        >>> replace_weights(pipe.transformer, {"proj_out_2": quantize_weight(weight, "kmc4")})
    """
    refuse_adapters(denoiser)
    modules = dict(named_layers(denoiser))
    for name, weight in weights.items():
        _check_place(name, weight, modules)
    owners: dict[int, str] = {}
    for name, weight in weights.items():
        owner = owners.setdefault(id(modules[name]._parameters["weight"]), name)
        if weights[owner] is not weight:
            raise InputError(f"layers {owner!r} and {name!r} share one weight and must get one packed weight")
    sharers = {name: owners.get(id(modules[name]._parameters.get("weight"))) for name in (*weights, *modules)}
    made: dict[object, nn.Parameter] = {}
    for name, first in sharers.items():
        if first is None:
            continue
        old = modules[name].get_parameter("weight")  # not held longer: it is freed before the next one is packed
        key = (id(weights[first]), old.dtype, old.device)
        if key not in made:
            device = weights[first].device if old.device.type == "meta" else old.device
            fresh = weights[first].to(device=device, dtype=old.dtype).detach()
            fresh.layer_name = name  # type: ignore[attr-defined]  # detach() is typed as a plain tensor
            made[key] = nn.Parameter(fresh, requires_grad=False)
        modules[name]._parameters["weight"] = made[key]
    if inputs is not None:
        round_inputs(denoiser, inputs)
    attach(denoiser)


def save_denoiser(denoiser: nn.Module, folder: Path, *, max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
    """Saves a diffusers denoiser with its packed weights, to be loaded by its class's `from_pretrained`."""
    if not packed_layers(denoiser):
        raise InputError("no weight of the denoiser is packed: call replace_weights(denoiser, ...) before saving it")
    save: Callable[..., object] | None = getattr(denoiser, "save_pretrained", None)
    if save is None:
        raise InputError(f"a {type(denoiser).__name__} has no save_pretrained; only diffusers models can be saved")
    refuse_adapters(denoiser)
    save(folder, max_shard_size=max_shard_size)


def _check_place(name: str, weight: object, modules: Mapping[str, nn.Module]) -> None:
    if not isinstance(weight, QuantizedTensor):
        raise InputError(f"layer {name!r} takes a QuantizedTensor, got {type(weight).__name__}")
    if name not in modules:
        raise InputError(f"the denoiser has no {' or '.join(KINDS.values())} layer {name!r}")
    old = modules[name]._parameters.get("weight")
    if old is None or old.shape != weight.shape:
        shape = None if old is None else tuple(old.shape)
        raise InputError(f"layer {name!r} has a weight of shape {shape}, the packed weight has {tuple(weight.shape)}")
