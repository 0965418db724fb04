"""From a weight to what is stored: fit a format, choose codes, estimate the error of many formats.

A weight is `[out, in, ...]` of any floating dtype; it is read as float32 rows `[C, N]`, one per output channel,
and every error is that of the *stored* numbers against those rows. How a format is fitted, its family says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from sedimo.errors import InputError, UnfitFormatError
from sedimo.quant.families.family import ErrorEstimate, Family, Parameters, squared_norms
from sedimo.quant.formats import Format
from sedimo.quant.parts import Fitted
from sedimo.quant.tensor import QuantizedTensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Found = TypeVar("Found")


def quantize_weight(weight: Tensor, number_format: Format | str, *, layer_name: str = "") -> QuantizedTensor:
    """A weight `[out, in, ...]` of any floating dtype, packed in one format; on the weight's device.

    Example:
        >>> packed = quantize_weight(torch.eye(8), "kmc2")
        >>> packed.stored_bytes, torch.equal(packed.dequantize(), torch.eye(8))
        (80, True)

    Raises:
        InputError: not a format, `fp16`, or a weight that cannot be quantized (NaN, infinity, integers).
    """
    wanted = Format.parse(number_format) if isinstance(number_format, str) else number_format
    packed = QuantizedTensor.from_fitted(fit(weight, wanted, layer_name=layer_name), weight.dtype)
    packed.layer_name = layer_name
    moved: QuantizedTensor = packed.to(weight.device)  # type: ignore[assignment]  # torch types it as its base
    return moved


def fit(weight: Tensor, number_format: Format, *, layer_name: str = "") -> Fitted:
    """The weight in one format.

    Args:
        weight: `[out, in, ...]`, any floating dtype, any strides.
        number_format: what it becomes.
        layer_name: named in errors.

    Raises:
        InputError: not a floating tensor of two or more dimensions, NaN or infinity, or the format is fp16.
    """
    return fit_many(weight, (number_format,), layer_name=layer_name)[number_format]


def fit_many(weight: Tensor, formats: Iterable[Format], *, layer_name: str = "") -> dict[Format, Fitted]:
    """The weight in each format; formats of one family share what they can, and use all threads of torch.

    Raises:
        InputError: as `fit`.
    """
    rows, asked, shape = _read_rows(weight, layer_name), tuple(formats), tuple(weight.shape)
    fitted = _fit_rows(weight, rows, asked, layer_name)
    return {f: Fitted(f, shape, fitted[f], f.numerics.codes(rows, f, fitted[f])) for f in asked}


def fit_parameters(weight: Tensor, formats: Iterable[Format], *, layer_name: str = "") -> dict[Format, Fitted]:
    """As `fit_many` with errors and without codes, which `with_codes` makes again: a bank keeps these.

    Raises:
        InputError: as `fit`.
    """
    rows, asked, shape = _read_rows(weight, layer_name), tuple(formats), tuple(weight.shape)
    norm = float(squared_norms(rows).sum())
    fitted = _fit_rows(weight, rows, asked, layer_name)
    errors = {f: float(f.numerics.squared_errors(rows, f, fitted[f]).sum()) for f in asked}
    return {f: Fitted(f, shape, fitted[f], None, errors[f], norm) for f in asked}


def with_codes(weight: Tensor, fitted: Fitted, *, layer_name: str = "") -> Fitted:
    """A fit with the codes of the weight that it was made for: the nearest ones.

    Raises:
        InputError: the weight's shape is another one, or as `fit`.
    """
    rows = rows_fitted_by(fitted, weight, layer_name)
    return replace(fitted, codes=fitted.format.numerics.codes(rows, fitted.format, fitted.parameters))


def rows_fitted_by(fitted: Fitted, weight: Tensor, layer_name: str) -> Tensor:
    """The weight as rows `[C, N]`, if it is one that this fit was made for.

    Raises:
        InputError: as `with_codes`.
    """
    if tuple(weight.shape) != fitted.shape:
        raise InputError(
            f"{named(layer_name)} has shape {tuple(weight.shape)}, its parameters were fitted for {fitted.shape}"
        )
    return _read_rows(weight, layer_name)


def error_estimates(
    weight: Tensor,
    formats: Iterable[Format],
    *,
    n_channels: int,
    generator: torch.Generator,
    layer_name: str = "",
) -> dict[Format, ErrorEstimate]:
    """Relative squared error of each format, from `n_channels` output channels drawn without replacement.

    The estimate is the ratio of the sampled channels' squared errors to their squared norms, its standard error
    that of a ratio estimator with the correction for a finite number of channels: 0 when all channels were used.
    A per-tensor codebook is fitted on the whole tensor, and its error exact, when the tensor has 16-bit values or at
    most 2^17; else it is fitted on 2^17 values drawn at random. fp16 has no error: it leaves the layer alone.

    Raises:
        InputError: fewer than two channels asked of a weight that has more, or as `fit`.
    """
    _check(weight, layer_name)
    n_all, asked = weight.shape[0], tuple(formats)
    if n_channels < min(2, n_all):
        raise InputError(f"{named(layer_name)}: an error bar needs at least 2 output channels, got {n_channels=}")
    n = min(n_channels, n_all)
    index = torch.randperm(n_all, generator=generator)[:n].sort().values
    rows = _read_rows(weight.detach().cpu()[index] if n < n_all else weight, layer_name)
    quantized = [f for f in asked if f.is_quantized]
    found = _by_family(quantized, weight, layer_name, lambda own, fs: own.estimates(rows, fs, weight, generator))
    return {f: found.get(f, ErrorEstimate(0.0, 0.0, n)) for f in asked}


def named(layer_name: str) -> str:
    """How errors speak of a weight."""
    return f"layer {layer_name!r}" if layer_name else "the weight"


def _fit_rows(weight: Tensor, rows: Tensor, formats: Sequence[Format], layer_name: str) -> dict[Format, Parameters]:
    return _by_family(formats, weight, layer_name, lambda own, fs: own.fit(rows, fs, weight))


def _by_family(
    formats: Sequence[Format],
    weight: Tensor,
    layer_name: str,
    make: Callable[[Family, Sequence[Format]], dict[Format, Found]],
) -> dict[Format, Found]:
    """What `make` gives for the formats of each family; the layer is named in errors."""
    own: dict[str, list[Format]] = {}
    for number_format in formats:
        own.setdefault(number_format.family, []).append(number_format)
        refusal = number_format.numerics.refusal(number_format, weight.shape)
        if refusal:
            raise UnfitFormatError(f"{named(layer_name)} cannot take {number_format}: {refusal}")
    found: dict[Format, Found] = {}
    for alike in own.values():
        try:
            found |= make(alike[0].numerics, alike)
        except InputError as error:
            raise type(error)(f"{named(layer_name)}: {error}") from error
    return found


def _check(weight: Tensor, layer_name: str) -> None:
    if weight.dtype not in _DTYPES or weight.ndim < 2 or weight.numel() == 0:
        raise InputError(
            f"{named(layer_name)} must be a non-empty floating tensor [out, in, ...] to be quantized, "
            f"got {weight.dtype} of shape {tuple(weight.shape)}"
        )


def _read_rows(weight: Tensor, layer_name: str) -> Tensor:
    """The weight as finite float32 rows `[C, N]` on the CPU."""
    _check(weight, layer_name)
    rows = weight.detach().to(device="cpu", dtype=torch.float32).reshape(weight.shape[0], -1).contiguous()
    if not (math.isfinite(float(rows.amin())) and math.isfinite(float(rows.amax()))):  # NaN, when any value is
        raise InputError(
            f"{named(layer_name)} holds NaN or infinity (as float32) and cannot be quantized. Leave it at fp16."
        )
    return rows
