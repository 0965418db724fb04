"""Judges a packed folder, which is untrusted: every check of its files, of the tensors in them, and against the model.

In the order of docs/reference/formats.md 1.8: headers, seal, names and shapes, and only then tensors: their checksums
and values.
The seal lies in the metadata of the safetensors files and tells a damaged or exchanged file from a good one: CRC-32 of
every tensor, in the order of their sorted names. It guards against accidents, not against an attacker, who can write a
new seal. Every check raises a `StateError` that names the file, layer or tensor, the rule, and what was found.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from sedimo.checkpoint.layout import (
    DIVISOR,
    FORMAT_VERSION,
    Configuration,
    How,
    PartEntry,
    kind_of,
    version_error,
)
from sedimo.errors import StateError
from sedimo.pipelines.weights import DTYPES, FileHeader
from sedimo.quant.parts import CODES, TensorSpec

_VERSION, _LAYERS, _CHECKSUMS = "sedimo_format", "sedimo_layers", "sedimo_crc32"
_DIGITS = 8  # hexadecimal digits of a CRC-32
_SHOWN = 5  # names in an error
_REMEDY = "The checkpoint is damaged or foreign: copy or download it again."


def judge_headers(headers: Sequence[FileHeader], configuration: Configuration) -> tuple[dict[str, TensorSpec], str]:
    """What a checkpoint's files hold, and the digits of their seal, after everything that headers can tell."""
    found, seal, packed = tensor_specs(headers), _read_seal(headers, configuration), configuration.tensors
    _refuse_names("lacks packed tensors", packed.keys() - found.keys())
    for name, wanted in packed.items():
        if found[name] != wanted:
            raise StateError(f"tensor {name!r} must be {wanted} by config.json, the file has {found[name]}. {_REMEDY}")
    n_inputs = {name: configuration.layers[owner].shape[1] for name, owner in configuration.owners.items()}
    check_divisor_specs(found, configuration.smoothed, n_inputs)
    return found, seal


def tensor_specs(headers: Iterable[FileHeader]) -> dict[str, TensorSpec]:
    """Dtype and shape of every tensor of a checkpoint's files; none lies in two, each has a dtype of torch."""
    homes: dict[str, FileHeader] = {}
    specs: dict[str, TensorSpec] = {}
    for header in headers:
        for name, (shape, dtype) in header.tensors.items():
            if name in homes:
                raise StateError(f"tensor {name!r} lies in both {homes[name].path.name} and {header.path.name}")
            if dtype not in DTYPES:
                raise StateError(
                    f"tensor {name!r} of {header.path}: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}"
                )
            homes[name], specs[name] = header, TensorSpec(DTYPES[dtype], shape)
    return specs


def make_seal(tensors: Mapping[str, torch.Tensor], configuration: Configuration) -> dict[str, str]:
    """The metadata that seals a checkpoint of these tensors (over all of its files)."""
    digits = "".join(checksum(tensors[name]) for name in sorted(tensors))
    return {_VERSION: str(FORMAT_VERSION), _LAYERS: configuration.key, _CHECKSUMS: digits}


def _read_seal(headers: Iterable[FileHeader], configuration: Configuration) -> str:
    """The digits of a checkpoint's seal, after checking that its files belong together and to the configuration."""
    found = set()
    for header in headers:
        if _VERSION not in header.metadata:
            raise StateError(
                f"{header.path} is a foreign file: its metadata has no {_VERSION!r}, so Sedimo did not write it. "
                "Take the weights file that belongs to this config.json."
            )
        if header.metadata[_VERSION] != str(FORMAT_VERSION):
            raise version_error(header.metadata[_VERSION], str(header.path))
        if header.metadata.get(_LAYERS) != configuration.key:
            raise StateError(
                f"{header.path} belongs to another checkpoint: it was written for other layers than those of "
                "config.json. Take the two files from the same folder."
            )
        found.add(header.metadata.get(_CHECKSUMS, ""))
    if len(found) != 1:
        raise StateError("the shards of the checkpoint were not written together. Copy or download them again.")
    return found.pop()


def checksums_of(seal: str, names: Iterable[str]) -> dict[str, str]:
    """The checksums of the digits of a seal by tensor name, as many as there are tensors."""
    ordered, n_sealed = sorted(names), len(seal) // _DIGITS
    if len(ordered) != n_sealed:
        word = "missing" if len(ordered) < n_sealed else "extra"
        raise StateError(
            f"tensors are {word}: the checkpoint was written with {n_sealed}, its files hold {len(ordered)}. "
            "Copy or download it again."
        )
    return {name: seal[i * _DIGITS : (i + 1) * _DIGITS] for i, name in enumerate(ordered)}


def checksum(tensor: torch.Tensor) -> str:
    """CRC-32 of a tensor's bytes as they lie in the file, eight hexadecimal digits."""
    flat = tensor.detach().contiguous().reshape(-1).cpu()
    data: memoryview = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy arrays are buffers
    return f"{zlib.crc32(data):08x}"


def check_tensors(tensors: Mapping[str, torch.Tensor], checksums: Mapping[str, str]) -> None:
    """Refuses tensors that have changed since they were written, and divisors that are not positive and finite."""
    for name, tensor in tensors.items():
        if checksums.get(name) != checksum(tensor):
            raise StateError(
                f"tensor {name!r} is damaged: its checksum is {checksum(tensor)}, it was written with "
                f"{checksums.get(name)}. Copy or download the checkpoint again."
            )
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] == DIVISOR and not bool((tensor.isfinite() & (tensor > 0)).all()):
            raise StateError(f"{name} must be finite and greater than zero: the file is damaged; make it again")


def check_divisor_specs(
    found: Mapping[str, TensorSpec], smoothed: Mapping[str, How], shapes: Mapping[str, int]
) -> None:
    """Refuses a checkpoint whose divisors are not one floating-point number per input channel of each divided layer.

    `shapes` tells the input channels of packed layers; those of others follow from their weight in `found`.
    """
    wanted = {f"{name}.{DIVISOR}" for name, how in smoothed.items() if how == "divided"}
    present = {name for name in found if name.rpartition(".")[2] == DIVISOR}
    if odd := sorted(wanted ^ present):
        raise StateError(f"divisors of config.json and of the file differ in {', '.join(odd[:_SHOWN])}: copy it again")
    for name in wanted:
        layer, spec = name.removesuffix(f".{DIVISOR}"), found[name]
        weight = found.get(f"{layer}.weight")
        n_inputs = shapes.get(layer) if weight is None else next(iter(weight.shape[1:]), None)
        if n_inputs is None:
            raise StateError(f"tensor {name!r} divides the input of a layer without a weight [out, in, ...]")
        if spec.shape != (n_inputs,) or not spec.dtype.is_floating_point:
            raise StateError(f"tensor {name!r} must be [{n_inputs}] of floating point, got {spec.dtype} {spec.shape}")


def check_against_model(found: Mapping[str, TensorSpec], configuration: Configuration, model: nn.Module) -> None:
    """Refuses a checkpoint that does not hold exactly the layers and tensors of the model, in their shapes."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, owner in configuration.owners.items():
        module, entry = modules.get(name), configuration.layers[owner]
        if module is None:
            raise StateError(f"config.json packs the layer {name!r}, which the model does not have. {_REMEDY}")
        weight, kind = module._parameters.get("weight"), kind_of(module)
        shape = None if weight is None else tuple(weight.shape)
        if (kind, shape) != (entry.kind, entry.shape):
            raise StateError(
                f"layer {name!r} is {entry.kind} {entry.shape} by config.json, the model has {kind} {shape}. {_REMEDY}"
            )
    replaced, packed = {f"{name}.weight" for name in configuration.owners}, configuration.tensors
    wanted = {n: TensorSpec(t.dtype, tuple(t.shape)) for n, t in model.state_dict().items() if n not in replaced}
    plain = {name: spec for name, spec in found.items() if name not in packed}
    _refuse_names("lacks tensors of the model", wanted.keys() - plain.keys())
    _refuse_names("holds tensors that the model does not have", plain.keys() - wanted.keys())
    for name, spec in wanted.items():
        if plain[name].shape != spec.shape or plain[name].dtype.is_floating_point != spec.dtype.is_floating_point:
            raise StateError(f"tensor {name!r} must be {spec} for this model, the file has {plain[name]}. {_REMEDY}")
    _refuse_names(
        "rounds the inputs of layers that the model does not have",
        [name for name in configuration.inputs.layers if name not in modules or kind_of(modules[name]) is None],
    )


def check_values(place: str, part: PartEntry, tensors: Mapping[str, torch.Tensor], *, n_inputs: int) -> None:
    """Refuses stored values that no quantizer writes."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise StateError(f"{place}.{name} holds NaN or infinity: the file is damaged; make the checkpoint again")
    codes = tensors.get(CODES)
    n_padding = -n_inputs * part.format.bits % 8
    if codes is not None and n_padding and int(codes[:, -1].max()) >> (8 - n_padding):
        raise StateError(f"{place}.codes has set bits after the last code of a row, which must be zero")
    complaint = part.format.numerics.complaint(part.format, tensors)
    if complaint:
        raise StateError(f"{place}.{complaint}")


def check_nothing_on_meta(model: nn.Module) -> None:
    """Refuses a loaded model of which a tensor has no data; modules that accelerate offloads keep theirs elsewhere."""
    missing = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if not getattr(getattr(module, "_hf_hook", None), "offload", False)
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if tensor.device.type == "meta"
    ]
    if missing:
        raise StateError(f"these tensors of the model were not in the checkpoint: {missing[:_SHOWN]}")


def _refuse_names(what: str, names: Iterable[str]) -> None:
    ordered = sorted(names)
    if ordered:
        more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
        raise StateError(f"the checkpoint {what}: {', '.join(map(repr, ordered[:_SHOWN]))}{more}. {_REMEDY}")
