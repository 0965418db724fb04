"""Compares what a checkpoint holds with its configuration and with the model, name by name, before loading."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from sedimo.errors import StateError
from sedimo.quant.activations import InputQuantizers
from sedimo.quant.parts import TensorSpec
from sedimo.runtime.layout import LayerEntry, Layers, TiedEntry, kind_of, packed_tensors
from sedimo.runtime.smoothed import How, check_divisor_specs

_SHOWN = 5  # names in an error
_REMEDY = "The checkpoint is damaged or foreign: copy or download it again."


def check_against_layers(
    found: Mapping[str, TensorSpec], layers: Layers, smoothed: Mapping[str, How] | None = None
) -> None:
    """Refuses a checkpoint whose packed tensors or divisors are not those that its configuration describes.

    Raises:
        StateError: a tensor is missing, or has another dtype or shape.
    """
    packed = packed_tensors(layers)
    _refuse_names("lacks packed tensors", packed.keys() - found.keys())
    for name, wanted in packed.items():
        if found[name] != wanted:
            raise StateError(
                f"tensor {name!r} must be {_describe(wanted)} by config.json, the file has {_describe(found[name])}. "
                f"{_REMEDY}"
            )
    check_divisor_specs(found, smoothed or {}, _input_sizes(layers))


def _input_sizes(layers: Layers) -> dict[str, int]:
    """Input channels of the packed layers."""
    owners = {name: layers[e.same_as] if isinstance(e, TiedEntry) else e for name, e in layers.items()}
    return {name: entry.shape[1] for name, entry in owners.items() if isinstance(entry, LayerEntry)}


def check_against_model(found: Mapping[str, TensorSpec], layers: Layers, model: nn.Module) -> None:
    """Refuses a checkpoint that does not hold exactly the tensors of the model.

    Raises:
        StateError: a layer is unknown, a tensor missing, extra, or of another shape or kind of dtype.
    """
    for name, entry in layers.items():
        _check_layer(name, entry, layers, model)
    replaced = {f"{name}.weight" for name in layers}
    wanted = {n: TensorSpec(t.dtype, tuple(t.shape)) for n, t in model.state_dict().items() if n not in replaced}
    packed = packed_tensors(layers)
    plain = {name: spec for name, spec in found.items() if name not in packed}
    _refuse_names("lacks tensors of the model", wanted.keys() - plain.keys())
    _refuse_names("holds tensors that the model does not have", plain.keys() - wanted.keys())
    for name, spec in wanted.items():
        if plain[name].shape != spec.shape or plain[name].dtype.is_floating_point != spec.dtype.is_floating_point:
            raise StateError(
                f"tensor {name!r} must be {_describe(spec)} for this model, the file has {_describe(plain[name])}. "
                f"{_REMEDY}"
            )


def check_inputs(inputs: InputQuantizers, model: nn.Module) -> None:
    """Refuses rules for activations of layers that the model does not have.

    Raises:
        StateError: naming the layer.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    _refuse_names(
        "rounds the inputs of layers that the model does not have",
        [name for name in inputs.layers if name not in modules or kind_of(modules[name]) is None],
    )


def loaded_names(found: Iterable[str], layers: Layers) -> list[str]:
    """Names as the model knows them: the packed tensors of a layer count as its weight."""
    packed = packed_tensors(layers)
    return [*(name for name in found if name not in packed), *(f"{name}.weight" for name in layers)]


def _check_layer(name: str, entry: LayerEntry | TiedEntry, layers: Layers, model: nn.Module) -> None:
    owner = layers[entry.same_as] if isinstance(entry, TiedEntry) else entry
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise StateError(f"config.json packs the layer {name!r}, which the model does not have. {_REMEDY}") from error
    weight, kind = module._parameters.get("weight"), kind_of(module)
    shape = None if weight is None else tuple(weight.shape)
    if not isinstance(owner, LayerEntry) or shape != owner.shape or kind != owner.kind:
        wanted = f"{owner.kind} {owner.shape}" if isinstance(owner, LayerEntry) else "a packed layer"
        raise StateError(f"layer {name!r} is {wanted} by config.json, the model has {kind} {shape}. {_REMEDY}")


def _refuse_names(what: str, names: Iterable[str]) -> None:
    ordered = sorted(names)
    if ordered:
        more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
        raise StateError(f"the checkpoint {what}: {', '.join(map(repr, ordered[:_SHOWN]))}{more}. {_REMEDY}")


def _describe(spec: TensorSpec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"
