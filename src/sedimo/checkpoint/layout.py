"""What a checkpoint's configuration says about each packed layer, and which tensors follow from it.

Nothing here opens a file. The configuration is untrusted: it is read strictly, and the names, dtypes and shapes
that follow from it are compared with the file's header before any tensor is made (docs/reference/formats.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from sedimo.codec import content_key, from_plain, to_plain
from sedimo.errors import InputError, StateError
from sedimo.pipelines.weights import dtype_name
from sedimo.quant import families
from sedimo.quant.activations import InputQuantizers
from sedimo.quant.formats import Format
from sedimo.quant.parts import PartFormat, TensorSpec, expected_tensors
from sedimo.quant.tensor import QuantizedTensor

METHOD = "sedimo"
_FIELDS = {"quant_method", "format_version", "made_by", "layers", "activations", "smoothed"}
FORMAT_VERSION = 1
DIVISOR = "input_divisor"  # the tensor of a divided layer
How = Literal["divided", "folded"]
Kind = Literal["Linear", "Conv1d", "Conv2d", "Conv3d"]

KINDS: dict[int, Kind] = {2: "Linear", 3: "Conv1d", 4: "Conv2d", 5: "Conv3d"}  # by the axes of their weights


@dataclass(frozen=True, slots=True)
class PartEntry:
    """Input channels `start..stop` in one format; `dtypes` names those of tensors whose dtype depends on the weight."""

    start: int
    stop: int
    format: Format
    dtypes: Mapping[str, str] = field(default_factory=dict)

    def __plain__(self) -> dict[str, object]:
        """In the file, dtypes stand beside the format: `"codebook": "float16"`."""
        return {"start": self.start, "stop": self.stop, "format": str(self.format), **self.dtypes}

    @classmethod
    def __from_plain__(cls, plain: object, place: str) -> PartEntry:
        """Reads that form."""
        known = {name for family in families.FAMILIES for name in family.dtypes}
        fields = dict(plain) if isinstance(plain, Mapping) else {}
        told = from_plain(dict[str, str | None], {n: fields.pop(n) for n in known & fields.keys()}, place=place)
        dtypes = {name: dtype for name, dtype in told.items() if dtype is not None}
        range_of = from_plain(PartFormat, fields or plain, place=place)
        return cls(range_of.start, range_of.stop, range_of.format, dtypes)

    def tensors(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """The stored tensors by field, for a layer of the given weight shape."""
        family, dtypes = self.format.numerics, dict[str, torch.dtype]()
        if self.format != self.format.weight_format:
            raise InputError(f"a packed weight has no activation bits, they belong in 'activations'; got {self.format}")
        if family.is_foreign:
            raise InputError(
                f"{self.format} is a format of another program: export it, our checkpoint does not hold it"
            )
        for name in sorted(self.dtypes.keys() ^ family.dtypes.keys()):
            owners = " and ".join(f.label for f in families.FAMILIES if name in f.dtypes)
            raise InputError(f"{name!r} belongs to {owners} and is required there; the format is {self.format}")
        for name, text in self.dtypes.items():
            allowed = {dtype_name(dtype): dtype for dtype in family.dtypes[name]}
            if text not in allowed:
                raise InputError(f"{name!r} must be one of {list(allowed)}, got {text!r}")
            dtypes[name] = allowed[text]
        return expected_tensors(self.format, shape[0], (self.stop - self.start) * math.prod(shape[2:]), dtypes)


@dataclass(frozen=True, slots=True)
class LayerEntry:
    """A packed layer: its kind, the logical shape `[out, in, ...]` of its weight, and the parts."""

    kind: Kind
    shape: tuple[int, ...]
    parts: tuple[PartEntry, ...]

    def __post_init__(self) -> None:
        """Refuses shapes that the kind cannot have, and parts that do not cover the inputs exactly once."""
        if KINDS.get(len(self.shape)) != self.kind or min(self.shape) < 1:
            n_axes = next(n for n, kind in KINDS.items() if kind == self.kind)
            raise InputError(f"a {self.kind} weight has {n_axes} positive sizes, got {self.shape}")
        edges = [0, *(edge for part in self.parts for edge in (part.start, part.stop)), self.shape[1]]
        if edges[::2] != edges[1::2] or any(p.stop <= p.start for p in self.parts):
            raise InputError(f"parts must cover the {self.shape[1]} input channels in order, got edges {edges[1:-1]}")
        for part in self.parts:
            part.tensors(self.shape)

    def tensors(self, layer: str) -> dict[str, TensorSpec]:
        """Dtype and shape of the stored tensors of the layer by their names in the file."""
        fields = ((i, *one) for i, part in enumerate(self.parts) for one in part.tensors(self.shape).items())
        return {f"{layer}.weight.{i}.{field}": spec for i, field, spec in fields}

    @property
    def n_weights(self) -> int:
        """Number of weights that are packed."""
        return math.prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(spec.n_bytes for spec in self.tensors("").values())


@dataclass(frozen=True)
class Configuration:
    """A `quantization_config`: packed layers, how inputs of layers are rounded and smoothed, what made it.

    `owners` tells of every packed layer which one of `layers` has its stored weight: itself, or one that shares it.
    """

    layers: Mapping[str, LayerEntry] = field(default_factory=dict)
    owners: Mapping[str, str] = field(default_factory=dict)
    inputs: InputQuantizers = InputQuantizers()
    smoothed: Mapping[str, How] = field(default_factory=dict)
    made_by: str = ""

    @property
    def plain(self) -> dict[str, object]:
        """The `quantization_config` that `read_configuration` reads; what says nothing is left out."""
        owners = self.owners.items()
        found: dict[str, object] = {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "made_by": self.made_by,
            "layers": {n: to_plain(self.layers[n]) if n == owner else {"same_as": owner} for n, owner in owners},
        }
        if self.inputs.layers:
            found["activations"] = to_plain(self.inputs)
        if self.smoothed:
            found["smoothed"] = dict(self.smoothed)
        return found

    @property
    def is_needed(self) -> bool:
        """Whether the tensors mean something else without it; folded layers are ordinary ones."""
        return bool(self.layers or self.inputs.layers or "divided" in self.smoothed.values())

    @property
    def key(self) -> str:
        """sha256 that ties a weights file to all that its configuration says of computing with it."""
        told = {name: value for name, value in self.plain.items() if name in ("layers", "activations", "smoothed")}
        return content_key(told if len(told) > 1 else told["layers"])

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """Dtype and shape of every stored tensor of the packed layers, by its name in the file."""
        return {name: spec for layer, entry in self.layers.items() for name, spec in entry.tensors(layer).items()}


def read_configuration(plain: object, *, place: str) -> Configuration:
    """A `quantization_config`; the version is judged first."""
    if not isinstance(plain, Mapping):
        raise StateError(f"{place} must be an object, got {type(plain).__name__}")
    if plain.get("quant_method") != METHOD:
        raise StateError(f"{place} is of the method {plain.get('quant_method')!r}; Sedimo reads {METHOD!r}")
    version = plain.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise version_error(version, place)
    unknown = sorted(map(str, plain.keys() - _FIELDS))
    made_by = plain.get("made_by", "")
    if unknown or not isinstance(made_by, str):
        raise StateError(f"{place} has unknown fields {unknown}, or 'made_by' is no text")
    return Configuration(
        *_read_layers(plain.get("layers"), place=f"{place}.layers"),
        from_plain(InputQuantizers, plain.get("activations", {"layers": {}}), place=f"{place}.activations"),
        from_plain(dict[str, How], plain.get("smoothed", {}), place=f"{place}.smoothed"),
        made_by,
    )


def version_error(found: object, place: str) -> StateError:
    """The error of a checkpoint that another version of Sedimo wrote."""
    return StateError(
        f"{place} has format version {found!r}; this Sedimo reads version {FORMAT_VERSION}. "
        "Install the version of Sedimo that wrote it, or make the checkpoint again."
    )


def _read_layers(plain: object, *, place: str) -> tuple[dict[str, LayerEntry], dict[str, str]]:
    """The layers of a configuration with a stored weight, and the owners of all; strict."""
    layers, owners = dict[str, LayerEntry](), dict[str, str]()
    for name, entry in from_plain(dict[str, Any], plain, place=place).items():
        inner, owners[name] = f"{place}[{name!r}]", name
        if isinstance(entry, Mapping) and entry.keys() == {"same_as"}:
            owners[name] = from_plain(str, entry["same_as"], place=f"{inner}.same_as")
        else:
            layers[name] = from_plain(LayerEntry, entry, place=inner)
    for name, owner in owners.items():
        if owner not in layers:
            raise StateError(f"{place}[{name!r}] shares the weight of {owner!r}, which is no packed layer")
    return layers, owners


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a layer that can be packed; None for every other module."""
    return next((kind for kind in KINDS.values() if isinstance(module, getattr(nn, kind))), None)


def entry_of(tensor: QuantizedTensor) -> LayerEntry:
    """The entry that describes a packed weight."""
    parts = (
        PartEntry(p.start, p.stop, p.format, {name: dtype_name(dtype) for name, dtype in p.dtypes.items()})
        for p in tensor.parts
    )
    return LayerEntry(KINDS[tensor.dim()], tuple(tensor.shape), tuple(parts))


def stored_tensors(layer: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The tensors of a packed weight by their names in the file."""
    return {f"{layer}.weight.{i}.{name}": t for i, part in enumerate(tensor.parts) for name, t in part.tensors.items()}
