"""A weight in parts along its input channels: what a recipe says of them, and what is stored of them.

A recipe's entry for a layer is a format, or a `PartFormat` for each range of input channels. A weight `[C, I, ...]` is
cut the same way: a `WeightPart` holds the rows `[C, n]` of its range, flattened (`n = (stop - start) * kernel size`),
as the tensors that its format stores. `Fitted` is what a quantizer hands over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sedimo.codec import from_plain
from sedimo.errors import InputError
from sedimo.quant.families.family import Parameters
from sedimo.quant.formats import FP16, Format
from sedimo.quant.packing import pack, row_bytes, unpack

CODES = "codes"


@dataclass(frozen=True, slots=True)
class PartFormat:
    """The format of the input channels `start` to `stop` (exclusive) of a layer."""

    start: int
    stop: int
    format: Format

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise InputError(f"a part must be a range of input channels, got {self.start}..{self.stop}")


Entry = Format | tuple[PartFormat, ...]  # what a recipe says of a layer


def entry_text(entry: Entry) -> str:
    """An entry of a recipe for people, such as `kmc4` or `0..96 kmc4 | 96..160 uaq5`."""
    return str(entry) if isinstance(entry, Format) else " | ".join(f"{p.start}..{p.stop} {p.format}" for p in entry)


def covering(n_inputs: int, parts: Iterable[PartFormat]) -> Entry:
    """The entry of some parts of a layer of `n_inputs`: fp16 between them, and as a whole if all of them are."""
    known = sorted(parts, key=lambda p: p.start)
    gaps = zip([0, *(p.stop for p in known)], [*(p.start for p in known), n_inputs], strict=True)
    found = [*known, *(PartFormat(start, stop, FP16) for start, stop in gaps if start < stop)]
    return FP16 if all(p.format == FP16 for p in found) else tuple(sorted(found, key=lambda p: p.start))


def parts_of(entry: Entry, n_inputs: int) -> tuple[PartFormat, ...]:
    """The parts of an entry of a layer of `n_inputs`: one, if it is a format."""
    return (PartFormat(0, n_inputs, entry),) if isinstance(entry, Format) else entry


def read_entry(value: object) -> Entry:
    """An entry from a format, its text, or a list of `{start, stop, format}`."""
    if isinstance(value, Format):
        return value
    if isinstance(value, str):
        return Format.parse(value)
    if isinstance(value, Sequence) and value:
        return tuple(p if isinstance(p, PartFormat) else from_plain(PartFormat, p, place="part") for p in value)
    raise InputError("a layer takes a format text or a list of parts {start, stop, format}")


class TensorSpec(NamedTuple):
    """Dtype and shape that a stored tensor must have."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of such a tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def expected_tensors(
    number_format: Format, n_channels: int, n_inputs: int, dtypes: Mapping[str, torch.dtype] | None = None
) -> dict[str, TensorSpec]:
    """The tensors that a part `[C, n]` stores, by name, in the order in which they are written.

    `dtypes` are those of tensors whose dtype depends on the weight, where it is not the usual one.
    """
    family, found = number_format.numerics, {}
    if number_format.is_quantized:
        found[CODES] = TensorSpec(torch.uint8, (n_channels, row_bytes(number_format.bits, n_inputs)))
    for name, (usual, shape) in family.tensors(number_format, n_channels, n_inputs).items():
        dtype = (dtypes or {}).get(name, usual)
        allowed = family.dtypes.get(name, (usual,))
        if dtype not in allowed:
            raise InputError(f"{name} must be one of {', '.join(map(str, allowed))}, got {dtype}")
        found[name] = TensorSpec(dtype, shape)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """A weight `shape` in a format, not packed: what is stored of it, and the squared error of its nearest codes.

    `codes` are uint8 `[C, N]` with N = prod(shape[1:]); None where only `parameters` are kept, from which `with_codes`
    makes them again. Sums are over the tensor.
    """

    format: Format
    shape: tuple[int, ...]
    parameters: Parameters
    squared_error: float
    squared_norm: float
    codes: Tensor | None = None

    @property
    def relative_error(self) -> float:
        """Squared error over squared norm; 0 for a weight of zeros."""
        return self.squared_error / self.squared_norm if self.squared_norm > 0 else 0.0

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors that replace the weight, codes packed."""
        codes = self.shape[0] * row_bytes(self.format.bits, math.prod(self.shape[1:]))
        return codes + sum(t.nbytes for t in self.parameters.values())

    @property
    def known_codes(self) -> Tensor:
        """The codes, where they were asked for."""
        if self.codes is None:
            raise InputError(f"these parameters of {self.format} have no codes yet: use with_codes(weight, fitted)")
        return self.codes

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for, float32 of `shape`."""
        return reconstruct(self.format, {**self.parameters, CODES: self.known_codes}).reshape(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class WeightPart:
    """Input channels `start..stop` of a weight in one format: the stored tensors by name, codes packed."""

    start: int
    stop: int
    format: Format
    tensors: Mapping[str, Tensor]

    @property
    def codes(self) -> Tensor | None:
        """The packed codes, uint8 `[C, row bytes]`; None of a part left at fp16."""
        return self.tensors.get(CODES)

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtypes of the tensors whose dtype depends on the weight."""
        return {name: self.tensors[name].dtype for name in self.format.numerics.dtypes if name in self.tensors}

    @property
    def stored_bytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def with_codes(self, codes: Tensor) -> WeightPart:
        """The same part with other packed codes."""
        return replace(self, tensors={**self.tensors, CODES: codes})

    def shape_in(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of this part of a weight of the given shape."""
        return (shape[0], self.stop - self.start, *shape[2:])

    def check(self, shape: Sequence[int]) -> None:
        """Refuses tensors whose dtypes or shapes do not fit a weight of the given shape."""
        n_inputs = math.prod(self.shape_in(shape)[1:])
        expected = expected_tensors(self.format, shape[0], n_inputs, self.dtypes)
        found = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in self.tensors.items()}
        for name in {**expected, **found}:
            if expected.get(name) != found.get(name):
                place = f"part {self.start}..{self.stop} in format {self.format}"
                wanted, given = (one.get(name, "absent") for one in (expected, found))
                raise InputError(f"{place}: {name} must be {wanted}, got {given}")

    def unpacked_codes(self, shape: Sequence[int]) -> Tensor:
        """Codes, uint8 `[C, n]`, for a weight of the given shape."""
        if self.codes is None:
            raise InputError(f"part {self.start}..{self.stop} is left at fp16 and has no codes")
        return unpack(self.codes, self.format.bits, math.prod(self.shape_in(shape)[1:]))

    def dequantize(self, shape: Sequence[int]) -> Tensor:
        """The part's weights, float32 `[C, stop - start, ...]`, for a weight of the given shape."""
        unpacked = {} if self.codes is None else {CODES: self.unpacked_codes(shape)}
        return reconstruct(self.format, {**self.tensors, **unpacked}).reshape(self.shape_in(shape))


def reconstruct(number_format: Format, tensors: Mapping[str, Tensor]) -> Tensor:
    """Weights float32 `[C, n]` of stored tensors, their codes unpacked; on their device."""
    family = number_format.numerics
    needed = [CODES] if number_format.is_quantized else []
    missing = [n for n in (*needed, *family.tensors(number_format, 1, 1)) if n not in tensors]
    if missing:
        raise InputError(f"format {number_format} needs {' and '.join(missing)}")
    return family.dequantize(number_format, tensors)


def weight_part(piece: Fitted | Tensor, *, start: int = 0) -> WeightPart:
    """The part that begins at input channel `start` and holds what was fitted, packed, or a weight as it is."""
    stop = start + piece.shape[1]
    if isinstance(piece, Fitted):
        packed = {CODES: pack(piece.known_codes, piece.format.bits), **piece.parameters}
        return WeightPart(start, stop, piece.format.weight_format, packed)
    ((name, dtypes),) = FP16.numerics.dtypes.items()
    dtype = piece.dtype if piece.dtype in dtypes else torch.float32
    return WeightPart(start, stop, FP16, {name: piece.detach().to(dtype).reshape(len(piece), -1).clone()})
