"""One part of a packed weight: the codes of a range of input channels and what turns them back into numbers.

A weight `[C, I, ...]` is cut along its input channels; a part holds the rows `[C, n]` of its range, flattened
(`n = (stop - start) * kernel size`). Which tensors a format stores, their dtypes and shapes stand in one
table, `expected_tensors`; packing, files and checks all read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from sedimo.errors import InputError
from sedimo.quant.formats import Format, row_bytes
from sedimo.quant.packing import pack, unpack

FIELDS = ("codes", "scale", "zero_point", "codebook", "values")
CODEBOOK_DTYPES = (torch.float16, torch.float32)
VALUE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class TensorSpec(NamedTuple):
    """Dtype and shape that a stored tensor must have."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of such a tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class Fitted(Protocol):
    """What a quantizer hands over: codes not yet packed, and the stored parameters (see quant/fitting.py)."""

    @property
    def format(self) -> Format:
        """The number format."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, `[C, I, ...]`."""

    @property
    def codes(self) -> torch.Tensor:
        """uint8 `[C, n]`, not packed."""

    @property
    def scale(self) -> torch.Tensor | None:
        """Step sizes of uaq."""

    @property
    def zero_point(self) -> torch.Tensor | None:
        """Zero points of uaq."""

    @property
    def codebook(self) -> torch.Tensor | None:
        """Centroids of kmc and kma."""


def expected_tensors(
    number_format: Format, n_channels: int, n_inputs: int, *, wide: torch.dtype | None = None
) -> dict[str, TensorSpec]:
    """The tensors that a part `[C, n]` stores, by field name.

    `wide` is the dtype of the codebook (float16 unless it had to be float32), or of the values of an
    unquantized part; it is ignored by uaq.

    Raises:
        InputError: `wide` is not allowed for the format.

    Example:
        >>> expected_tensors(Format.parse("kmc3"), 8, 10)["codes"]
        TensorSpec(dtype=torch.uint8, shape=(8, 4))
    """
    wide = wide or torch.float16
    if not number_format.is_quantized:
        _require_dtype("values", wide, VALUE_DTYPES)
        return {"values": TensorSpec(wide, (n_channels, n_inputs))}
    found = {"codes": TensorSpec(torch.uint8, (n_channels, row_bytes(number_format.bits, n_inputs)))}
    if number_format.family == "uaq":
        n_groups, grouped = number_format.n_groups(n_inputs), number_format.group_size is not None
        found["scale"] = TensorSpec(torch.float16 if grouped else torch.float32, (n_channels, n_groups))
        found["zero_point"] = TensorSpec(torch.uint8 if grouped else torch.int16, (n_channels, n_groups))
        return found
    _require_dtype("codebook", wide, CODEBOOK_DTYPES)
    n_codebooks = n_channels if number_format.family == "kmc" else 1
    found["codebook"] = TensorSpec(wide, (n_codebooks, number_format.n_levels))
    return found


@dataclass(frozen=True, slots=True, eq=False)
class WeightPart:
    """Input channels `start..stop` of a weight in one format.

    Shapes, with `n` weights per row: `codes` uint8 `[C, row bytes]`, packed; `scale` float32 `[C, 1]` (float16
    `[C, G]` in groups); `zero_point` int16 `[C, 1]` (uint8 `[C, G]`); `codebook` `[C, 2^b]` (kmc) or `[1, 2^b]`
    (kma), float16 or float32; `values` `[C, n]` of a part left at fp16. Fields that the format does not have are None.
    """

    start: int
    stop: int
    format: Format
    codes: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None
    codebook: torch.Tensor | None = None
    values: torch.Tensor | None = None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by field name, in the fixed order of `FIELDS`."""
        return {name: t for name in FIELDS if (t := getattr(self, name)) is not None}

    @property
    def wide_dtype(self) -> torch.dtype | None:
        """Dtype of the codebook or the unquantized values; None for uaq."""
        tensor = self.codebook if self.codebook is not None else self.values
        return None if tensor is None else tensor.dtype

    @property
    def stored_bytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> WeightPart:
        """The same part holding other tensors."""
        return WeightPart(self.start, self.stop, self.format, **tensors)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> WeightPart:
        """The same part with `function` applied to each stored tensor."""
        return self.with_tensors({name: function(t) for name, t in self.tensors.items()})

    def shape_in(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of this part of a weight of the given shape."""
        return (shape[0], self.stop - self.start, *shape[2:])

    def check(self, shape: Sequence[int]) -> None:
        """Refuses tensors whose dtypes or shapes do not fit a weight of the given shape.

        Raises:
            InputError: naming the field, what it must be and what it is.
        """
        n_inputs = math.prod(self.shape_in(shape)[1:])
        expected = expected_tensors(self.format, shape[0], n_inputs, wide=self.wide_dtype)
        found = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in self.tensors.items()}
        for name in {**expected, **found}:
            if expected.get(name) != found.get(name):
                raise InputError(
                    f"part {self.start}..{self.stop} in format {self.format}: {name} must be "
                    f"{_describe(expected.get(name))}, got {_describe(found.get(name))}"
                )

    def unpacked_codes(self, shape: Sequence[int]) -> torch.Tensor:
        """Codes, uint8 `[C, n]`.

        Raises:
            InputError: the part is not quantized.
        """
        if self.codes is None:
            raise InputError(f"part {self.start}..{self.stop} is left at fp16 and has no codes")
        return unpack(self.codes, self.format.bits, math.prod(self.shape_in(shape)[1:]))

    def dequantize(self, shape: Sequence[int]) -> torch.Tensor:
        """The part's weights, float32 `[C, stop - start, ...]`, for a weight of the given shape."""
        if self.values is not None:
            rows = self.values.float()
        else:
            codes = self.unpacked_codes(shape)
            rows = reconstruct(codes, self.format, scale=self.scale, zero_point=self.zero_point, codebook=self.codebook)
        return rows.reshape(self.shape_in(shape))


def reconstruct(
    codes: torch.Tensor,
    number_format: Format,
    *,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    codebook: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights of codes `[C, n]` and stored parameters, computed in float32.

    uaq: `(code - zero_point) * scale`; kmc and kma: the centroid that the code names.

    Raises:
        InputError: a parameter that the format needs is missing.
    """
    if number_format.family == "uaq":
        if scale is None or zero_point is None:
            raise InputError(f"format {number_format} needs a scale and a zero point")
        steps, zeros = (_per_weight(t.float(), number_format, codes.shape[1]) for t in (scale, zero_point))
        return codes.float().sub_(zeros).mul_(steps)
    if codebook is None:
        raise InputError(f"format {number_format} needs a codebook")
    rows = codebook.float().expand(codes.shape[0], -1)  # gather is 4 times as fast as indexing, and needs the rows
    return torch.gather(rows, 1, codes.long())


def pack_fitted(fitted: Fitted, *, start: int = 0) -> WeightPart:
    """The part that begins at input channel `start` and holds a fitted weight, its codes packed."""
    return WeightPart(
        start,
        start + fitted.shape[1],
        fitted.format.weight_format,
        codes=pack(fitted.codes, fitted.format.bits),
        scale=fitted.scale,
        zero_point=fitted.zero_point,
        codebook=fitted.codebook,
    )


def unquantized_part(weight: torch.Tensor, *, start: int = 0) -> WeightPart:
    """The part that begins at input channel `start` and keeps `weight` `[C, I, ...]` as it is."""
    dtype = weight.dtype if weight.dtype in VALUE_DTYPES else torch.float32
    values = weight.detach().to(dtype).reshape(weight.shape[0], -1).clone()
    return WeightPart(start, start + weight.shape[1], Format.parse("fp16"), values=values)


def check_cover(parts: Sequence[WeightPart], shape: Sequence[int]) -> None:
    """Refuses parts that do not cover the input channels of a weight exactly once, in order.

    Raises:
        InputError: a gap, an overlap, no part, or a part that does not fit.
    """
    if len(shape) < 2 or min(shape) < 1:
        raise InputError(f"a packed weight has the shape [out, in, ...] with at least one of each, got {tuple(shape)}")
    position = 0
    for part in parts:
        if part.start != position or part.stop <= part.start:
            raise InputError(
                f"parts must cover the {shape[1]} input channels in order, got {part.start}..{part.stop} at {position}"
            )
        part.check(shape)
        position = part.stop
    if position != shape[1]:
        raise InputError(f"parts must cover the {shape[1]} input channels, got only {position}")


def _per_weight(parameter: torch.Tensor, number_format: Format, n_inputs: int) -> torch.Tensor:
    if number_format.group_size is None:
        return parameter  # [C, 1], broadcast
    span = min(number_format.group_size, n_inputs)  # a group longer than the row must not cost its length
    spread = parameter.unsqueeze(2).expand(-1, -1, span)  # [C, G, span]
    return spread.reshape(parameter.shape[0], -1)[:, :n_inputs]  # [C, n]


def _require_dtype(name: str, dtype: torch.dtype, allowed: Sequence[torch.dtype]) -> None:
    if dtype not in allowed:
        raise InputError(f"{name} must be one of {', '.join(map(str, allowed))}, got {dtype}")


def _describe(spec: TensorSpec | None) -> str:
    return "absent" if spec is None else f"{spec.dtype} {list(spec.shape)}"
