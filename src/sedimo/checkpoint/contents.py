"""What lies packed in a denoiser: take it out, describe it, and judge whether it may be packed.

Packed weights are assembled from the tensors of a file, and flattened into them. A denoiser's module tree is left
alone; only parameters named `weight` of Linear and Conv layers change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from sedimo.checkpoint.inputs import rounded_inputs, smoothed_layers, unround_inputs, unsmooth_inputs
from sedimo.checkpoint.layout import METHOD, Configuration, LayerEntry, entry_of, kind_of, stored_tensors
from sedimo.checkpoint.validation import check_values
from sedimo.errors import InputError, StateError
from sedimo.pipelines.weights import refuse_adapters
from sedimo.quant.parts import WeightPart
from sedimo.quant.tensor import QuantizedTensor


def packed_layers(denoiser: nn.Module) -> dict[str, QuantizedTensor]:
    """The packed weights of a denoiser by layer name."""
    weights: Iterator[tuple[str, torch.Tensor | None]]
    weights = ((name, module._parameters.get("weight")) for name, module in named_layers(denoiser))
    return {name: weight for name, weight in weights if isinstance(weight, QuantizedTensor)}


def named_layers(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every Linear and Conv layer with its dotted name; a module that occurs twice is named twice."""
    return ((n, m) for n, m in denoiser.named_modules(remove_duplicate=False) if kind_of(m) is not None)


def describe(denoiser: nn.Module) -> Configuration:
    """The configuration of a denoiser's packed weights, a shared one described once, and of what layers are given."""
    weights, first = packed_layers(denoiser), dict[object, str]()
    owners = {name: first.setdefault(_identity(weight), name) for name, weight in weights.items()}
    layers = {owner: entry_of(weights[owner]) for owner in first.values()}
    return Configuration(layers, owners, rounded_inputs(denoiser), smoothed_layers(denoiser))


def make_ordinary(denoiser: nn.Module) -> None:
    """Replaces every packed weight by the tensor that it stands for; inputs are neither rounded nor divided any more.

    Layers that shared a packed weight get equal copies, as safetensors files demand.
    """
    modules = dict(named_layers(denoiser))
    for name, weight in packed_layers(denoiser).items():
        modules[name]._parameters["weight"] = nn.Parameter(weight.dequantize(), requires_grad=False)
    unround_inputs(denoiser)
    unsmooth_inputs(denoiser)


def assemble(layer: str, entry: LayerEntry, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> QuantizedTensor:
    """The packed weight of a layer from its stored tensors by name; their values are checked.

    The tensors are copied: those of a safetensors file are windows on the file, which may change.
    """
    parts = []
    for i, part in enumerate(entry.parts):
        place, n_inputs = f"{layer}.weight.{i}", (part.stop - part.start) * math.prod(entry.shape[2:])
        fields = {field: tensors[f"{place}.{field}"].clone() for field in part.tensors(entry.shape)}
        check_values(place, part, fields, n_inputs=n_inputs)
        parts.append(WeightPart(part.start, part.stop, part.format, fields))
    try:
        weight = QuantizedTensor.from_parts(parts, entry.shape, dtype)
    except InputError as error:
        raise StateError(f"layer {layer!r}: {error}") from error
    weight.layer_name = layer
    return weight


def flatten_state(state: Mapping[str, torch.Tensor], configuration: Configuration) -> dict[str, torch.Tensor]:
    """The tensors of a weights file from a state dict: packed weights as parts, shared ones once, others narrowed."""
    plain, stored = dict(state), dict[str, torch.Tensor]()
    packed = {name: plain.pop(f"{name}.weight", None) for name in configuration.owners}
    for name, owner in configuration.owners.items():
        weight, shared = packed[name], packed[owner]
        if not isinstance(weight, QuantizedTensor):
            raise _changed(name, "has no packed weight")
        if weight.device.type == "meta":
            raise StateError(f"layer {name!r} has no data (it is offloaded): remove the offloading hooks before saving")
        if not isinstance(shared, QuantizedTensor) or _identity(shared) != _identity(weight):
            raise _changed(name, f"does not share the weight of {owner!r}")
        if entry_of(weight) != configuration.layers[owner]:
            raise _changed(name, "has a packed weight of another layout")
        if name == owner:
            stored |= stored_tensors(name, weight)
    for name, tensor in plain.items():
        if isinstance(tensor, QuantizedTensor):
            raise _changed(name.removesuffix(".weight"), "is packed but not described")
    return {name: narrowed(tensor) for name, tensor in plain.items()} | stored


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
    """Refuses to quantize what is not a full-precision denoiser."""
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
