"""What lies packed in a denoiser: put it there, take it out, describe it, and judge whether it may be packed.

Packed weights are assembled from the tensors of a file, and flattened into them. A denoiser's module tree is left
alone; only parameters named `weight` of Linear and Conv layers change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from sedimo.errors import InputError, StateError
from sedimo.pipelines.weights import refuse_adapters
from sedimo.quant.parts import WeightPart
from sedimo.quant.tensor import QuantizedTensor
from sedimo.runtime.judge import check_values
from sedimo.runtime.layout import LAYER_TYPES, METHOD, LayerEntry, Layers, TiedEntry, entry_of, kind_of, packed_tensors


def packed_layers(denoiser: nn.Module) -> dict[str, QuantizedTensor]:
    """The packed weights of a denoiser by layer name."""
    found: dict[str, QuantizedTensor] = {}
    for name, module in named_layers(denoiser):
        weight: torch.Tensor | None = module._parameters.get("weight")
        if isinstance(weight, QuantizedTensor):
            found[name] = weight
    return found


def named_layers(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every Linear and Conv layer with its dotted name; a module that occurs twice is named twice."""
    for name, module in denoiser.named_modules(remove_duplicate=False):
        if kind_of(module) is not None:
            yield name, module


def describe(denoiser: nn.Module) -> dict[str, LayerEntry | TiedEntry]:
    """The configuration entries of a denoiser's packed weights; a shared weight is described once."""
    owners: dict[object, str] = {}
    found: dict[str, LayerEntry | TiedEntry] = {}
    modules = dict(named_layers(denoiser))
    for name, weight in packed_layers(denoiser).items():
        owner = owners.setdefault(_identity(weight), name)
        kind = kind_of(modules[name])
        if owner != name:
            found[name] = TiedEntry(owner)
        elif kind is not None:
            found[name] = entry_of(kind, weight)
    return found


def set_weights(denoiser: nn.Module, weights: Mapping[str, QuantizedTensor]) -> None:
    """Puts packed weights in place of the weights of the named layers.

    Each keeps the dtype and device of the weight that it replaces. One tensor given for several layers stays one
    shared parameter, and layers that share a parameter with a named layer follow it.

    Raises:
        InputError: a name that is no Linear or Conv layer, a wrong shape, or two weights for one parameter.
    """
    modules = dict(named_layers(denoiser))
    for name, weight in weights.items():
        _check_place(name, weight, modules)
    targets = _with_followers(modules, weights)
    made: dict[object, nn.Parameter] = {}
    for name, weight in targets.items():
        old = modules[name]._parameters["weight"]
        if old is None:
            raise InputError(f"layer {name!r} has no weight")
        key = (id(weight), old.dtype, old.device)
        if key not in made:
            device = weight.device if old.device.type == "meta" else old.device
            fresh = weight.to(device=device, dtype=old.dtype).detach()
            fresh.layer_name = name  # type: ignore[attr-defined]  # detach() is typed as a plain tensor
            made[key] = nn.Parameter(fresh, requires_grad=False)
        modules[name]._parameters["weight"] = made[key]


def unset_weights(denoiser: nn.Module) -> None:
    """Replaces every packed weight by the ordinary tensor that it stands for, one of its own for each layer.

    Layers that shared a packed weight get equal copies, as safetensors files demand.
    """
    modules = dict(named_layers(denoiser))
    for name, weight in packed_layers(denoiser).items():
        modules[name]._parameters["weight"] = nn.Parameter(weight.dequantize(), requires_grad=False)


def assemble(layer: str, entry: LayerEntry, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> QuantizedTensor:
    """The packed weight of a layer from its stored tensors by name; their values are checked.

    The tensors are copied: those of a safetensors file are windows on the file, which may change.

    Raises:
        StateError: a value that no quantizer writes, or tensors that do not fit the entry.
    """
    own: list[dict[str, torch.Tensor]] = [{} for _ in entry.parts]
    for name, (i, field_name) in entry.tensors(layer).items():
        own[i][field_name] = tensors[name].clone()
    parts = []
    for i, (part, fields) in enumerate(zip(entry.parts, own, strict=True)):
        check_values(
            f"{layer}.weight.{i}", part, fields, n_inputs=(part.stop - part.start) * math.prod(entry.shape[2:])
        )
        parts.append(WeightPart(part.start, part.stop, part.format, fields))
    try:
        weight = QuantizedTensor.from_parts(parts, entry.shape, dtype)
    except InputError as error:
        raise StateError(f"layer {layer!r}: {error}") from error
    weight.layer_name = layer
    return weight


def flatten_state(state: Mapping[str, torch.Tensor], layers: Layers) -> dict[str, torch.Tensor]:
    """The tensors of a weights file from a state dict: packed weights as parts, shared ones once, others narrowed.

    Raises:
        StateError: the packed weights are not those that `layers` describes, or have no data.
    """
    flat = dict(state)
    packed = {name: flat.pop(f"{name}.weight", None) for name in layers}
    for name, entry in layers.items():
        weight = packed[name]
        if not isinstance(weight, QuantizedTensor):
            raise _changed(name, "has no packed weight")
        if weight.device.type == "meta":
            raise StateError(f"layer {name!r} has no data (it is offloaded): remove the offloading hooks before saving")
        if isinstance(entry, TiedEntry):
            owner = packed[entry.same_as]
            if not isinstance(owner, QuantizedTensor) or _identity(owner) != _identity(weight):
                raise _changed(name, f"does not share the weight of {entry.same_as!r}")
        elif entry_of(entry.kind, weight) != entry:
            raise _changed(name, "has a packed weight of another layout")
        else:
            flat |= {n: weight.parts[i].tensors[field] for n, (i, field) in entry.tensors(name).items()}
    stored = packed_tensors(layers)
    stray = [name for name, tensor in flat.items() if isinstance(tensor, QuantizedTensor)]
    if stray:
        raise _changed(stray[0].removesuffix(".weight"), "is packed but not described")
    return {name: tensor if name in stored else narrowed(tensor) for name, tensor in flat.items()}


def narrowed(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in 16 bits if that keeps every value exactly, else as it is.

    A source in float16 that was loaded in float32 is so stored as it came; loaders cast to the dtype asked for.
    """
    if tensor.dtype in (torch.float32, torch.float64):
        for dtype in (torch.float16, torch.bfloat16):
            short = tensor.to(dtype)
            if torch.equal(short.to(tensor.dtype), tensor):
                return short
    return tensor


def refuse_unfit_source(denoiser: nn.Module) -> None:
    """Refuses to quantize what is not a full-precision denoiser.

    Raises:
        InputError: it is already quantized, or has adapters (LoRA), attached or merged.
    """
    method = getattr(denoiser, "quantization_method", None) if hasattr(denoiser, "hf_quantizer") else None
    if method not in (None, METHOD) or packed_layers(denoiser):  # ours without packed weights is smoothed only
        raise InputError(
            f"the denoiser is already quantized ({method or 'packed weights'}): quantize the full-precision source, "
            "or change single layers with replace_weights(denoiser, {layer: weight})"
        )
    refuse_adapters(denoiser)
    for name, module in named_layers(denoiser):
        weight = module._parameters.get("weight")
        if weight is not None and (not weight.is_floating_point() or type(weight) is not nn.Parameter):
            found = f"{type(weight).__name__} of {weight.dtype}"
            raise InputError(f"layer {name!r} is already quantized (its weight is a {found}): quantize the source")


def _changed(name: str, how: str) -> StateError:
    return StateError(
        f"layer {name!r} {how}: the weights have changed since the model was packed or loaded. Use "
        "replace_weights(denoiser, ...) to change packed weights, and unload adapters (LoRA) before saving."
    )


def _identity(weight: QuantizedTensor) -> object:
    return tuple(id(t) for part in weight.parts for t in part.tensors.values())


def _check_place(name: str, weight: torch.Tensor, modules: Mapping[str, nn.Module]) -> None:
    if not isinstance(weight, QuantizedTensor):
        raise InputError(f"layer {name!r} takes a QuantizedTensor, got {type(weight).__name__}")
    if name not in modules:
        raise InputError(f"the denoiser has no {' or '.join(LAYER_TYPES)} layer {name!r}")
    old = modules[name]._parameters.get("weight")
    if old is None or old.shape != weight.shape:
        shape = None if old is None else tuple(old.shape)
        raise InputError(f"layer {name!r} has a weight of shape {shape}, the packed weight has {tuple(weight.shape)}")


def _with_followers(
    modules: Mapping[str, nn.Module], weights: Mapping[str, QuantizedTensor]
) -> dict[str, QuantizedTensor]:
    """The weights, and the same weight for every layer that shares its parameter with a named one."""
    by_parameter: dict[int, tuple[str, QuantizedTensor]] = {}
    for name, weight in weights.items():
        first = by_parameter.setdefault(id(modules[name]._parameters["weight"]), (name, weight))
        if first[1] is not weight:
            raise InputError(f"layers {first[0]!r} and {name!r} share one weight and must get one packed weight")
    found = dict(weights)
    for name, module in modules.items():
        follower = by_parameter.get(id(module._parameters.get("weight")))
        if follower is not None:
            found[name] = follower[1]
    return found
