"""From a weight to what is stored: fit a format, choose codes, estimate the error of many formats.

A weight is `[out, in, ...]` of any floating dtype; it is read as float32 rows `[C, N]`, one per output channel,
and every error is that of the *stored* numbers against those rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sedimo.errors import InputError
from sedimo.quant import kmeans, uaq
from sedimo.quant.formats import Format

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_KMA_SAMPLE = 1 << 20  # values that a per-tensor codebook is estimated from, when they are not 16 bits wide


@dataclass(frozen=True, slots=True)
class FittedParameters:
    """What is stored of a weight besides its codes, and the squared error that it leaves.

    `scale` and `zero_point` are for uaq (float32 and int16 `[C, 1]`; float16 and uint8 `[C, G]` in groups),
    `codebook` for kmc `[C, 2^b]` and kma `[1, 2^b]` (float16, rarely float32). `squared_error` and
    `squared_norm` are sums over the tensor, in float64.
    """

    format: Format
    shape: tuple[int, ...]
    scale: Tensor | None
    zero_point: Tensor | None
    codebook: Tensor | None
    squared_error: float
    squared_norm: float

    @property
    def relative_error(self) -> float:
        """Squared error over squared norm; 0 for a weight of zeros."""
        return self.squared_error / self.squared_norm if self.squared_norm > 0 else 0.0


@dataclass(frozen=True, slots=True)
class FittedWeight:
    """A quantized weight, unpacked: codes uint8 `[C, N]` with N = prod(shape[1:]), and their parameters.

    `scale` and `zero_point` are for uaq (float32 and int16 `[C, 1]`; float16 and uint8 `[C, G]` in groups),
    `codebook` for kmc `[C, 2^b]` and kma `[1, 2^b]`, float16 or float32, sorted.
    """

    format: Format
    shape: tuple[int, ...]
    codes: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    codebook: Tensor | None

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for, float32 of `shape`."""
        return dequantize(
            self.codes, self.format, scale=self.scale, zero_point=self.zero_point, codebook=self.codebook
        ).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class ErrorEstimate:
    """Relative squared error of a weight in a format, from `n` output channels; no standard error left if all."""

    mean: float
    standard_error: float
    n: int


def fit(weight: Tensor, number_format: Format, *, layer_name: str = "") -> FittedWeight:
    """The weight in one format.

    Args:
        weight: `[out, in, ...]`, any floating dtype, any strides.
        number_format: what it becomes.
        layer_name: named in errors.

    Raises:
        InputError: not a floating tensor of two or more dimensions, NaN or infinity, or the format is fp16.
    """
    return fit_many(weight, (number_format,), layer_name=layer_name)[number_format]


def fit_many(weight: Tensor, formats: Iterable[Format], *, layer_name: str = "") -> dict[Format, FittedWeight]:
    """The weight in each format; the formats share one sort and one histogram, and use all threads of torch.

    Raises:
        InputError: as `fit`.
    """
    rows = _read_rows(weight, layer_name)
    found = _fit_rows(weight, rows, tuple(formats), layer_name)
    return {f: _with_codes(rows, p, tuple(weight.shape)) for f, (p, _) in found.items()}


def fit_parameters(
    weight: Tensor, formats: Iterable[Format], *, layer_name: str = ""
) -> dict[Format, FittedParameters]:
    """As `fit_many` without codes, which `assign` makes again from the weight: a bank keeps these.

    Raises:
        InputError: as `fit`.
    """
    rows = _read_rows(weight, layer_name)
    return {f: p for f, (p, _) in _fit_rows(weight, rows, tuple(formats), layer_name).items()}


def assign(weight: Tensor, parameters: FittedParameters | FittedWeight, *, layer_name: str = "") -> Tensor:
    """Codes uint8 `[C, N]` of a weight in stored parameters: the same as when they were fitted.

    Raises:
        InputError: the weight's shape is another one, or as `fit`.
    """
    if tuple(weight.shape) != parameters.shape:
        raise InputError(
            f"{_name(layer_name)} has shape {tuple(weight.shape)}, its parameters were fitted for {parameters.shape}"
        )
    return _codes(_read_rows(weight, layer_name), parameters)


def with_codes(weight: Tensor, parameters: FittedParameters, *, layer_name: str = "") -> FittedWeight:
    """The fitted weight of parameters that were fitted before.

    Raises:
        InputError: as `assign`.
    """
    codes = assign(weight, parameters, layer_name=layer_name)
    p = parameters
    return FittedWeight(p.format, p.shape, codes, p.scale, p.zero_point, p.codebook)


def dequantize(
    codes: Tensor, number_format: Format, *, scale: Tensor | None, zero_point: Tensor | None, codebook: Tensor | None
) -> Tensor:
    """Weights float32 `[C, N]` of codes uint8 `[C, N]`; plain torch, on the device of its inputs.

    Raises:
        InputError: the parameters of the format's family are missing.
    """
    if number_format.family == "uaq" and scale is not None and zero_point is not None:
        return uaq.dequantize_grid(codes, uaq.UniformGrid(scale, zero_point), number_format.group_size)
    if number_format.family in ("kmc", "kma") and codebook is not None:
        return kmeans.dequantize_codebook(codes, codebook)
    raise InputError(f"{number_format} needs scale and zero point (uaq) or a codebook (kmc, kma), which are missing")


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
    A per-tensor codebook is fitted on the whole tensor when its values have 16 bits, else on 2^20 values drawn at
    random, and its error taken on the sampled channels. fp16 has no error: it leaves the layer alone.

    Raises:
        InputError: fewer than two channels asked of a weight that has more, or as `fit`.
    """
    rows = _read_rows(weight, layer_name)
    n_all = rows.shape[0]
    if n_channels < min(2, n_all):
        raise InputError(f"{_name(layer_name)}: an error bar needs at least 2 output channels, got {n_channels=}")
    n = min(n_channels, n_all)
    sampled = rows[torch.randperm(n_all, generator=generator)[:n].sort().values] if n < n_all else rows
    asked = tuple(formats)
    norms = _squares(sampled)
    found: dict[Format, ErrorEstimate] = {f: ErrorEstimate(0.0, 0.0, n) for f in asked}
    books = _tensor_codebooks(_sampled_values(weight, generator), [f for f in asked if f.family == "kma"])
    for number_format, (_, errors) in _fit_rows(
        weight, sampled, tuple(f for f in asked if f.is_quantized), layer_name, books
    ).items():
        found[number_format] = _ratio_estimate(errors, norms, n_all)
    return found


def _ratio_estimate(errors: Tensor, norms: Tensor, n_all: int) -> ErrorEstimate:
    """Ratio of sums over n sampled of `n_all` channels, with its standard error."""
    n, total = len(errors), float(norms.sum())
    if total == 0:
        return ErrorEstimate(0.0, 0.0, n)
    mean = float(errors.sum()) / total
    if n == n_all:
        return ErrorEstimate(mean, 0.0, n)
    variance = float(((errors - mean * norms) ** 2).sum()) / (n - 1)
    return ErrorEstimate(mean, math.sqrt((1 - n / n_all) * variance / n) / (total / n), n)


def _name(layer_name: str) -> str:
    return f"layer {layer_name!r}" if layer_name else "the weight"


def _read_rows(weight: Tensor, layer_name: str) -> Tensor:
    """The weight as finite float32 rows `[C, N]` on the CPU."""
    if weight.dtype not in _DTYPES or weight.ndim < 2 or weight.numel() == 0:
        raise InputError(
            f"{_name(layer_name)} must be a non-empty floating tensor [out, in, ...] to be quantized, "
            f"got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    rows = weight.detach().to(device="cpu", dtype=torch.float32).reshape(weight.shape[0], -1).contiguous()
    low, high = torch.aminmax(rows)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise InputError(f"{_name(layer_name)} holds NaN or infinity and cannot be quantized. Leave it at fp16.")
    return rows


def _fit_rows(
    weight: Tensor,
    rows: Tensor,
    formats: tuple[Format, ...],
    layer_name: str,
    tensor_codebooks: Mapping[int, Tensor] | None = None,
) -> dict[Format, tuple[FittedParameters, Tensor]]:
    """Parameters and squared error per row for each format."""
    for number_format in formats:
        if not number_format.is_quantized:
            raise InputError(f"{_name(layer_name)}: {number_format} leaves a weight alone; there is nothing to fit")
    shape = (rows.shape[0], *weight.shape[1:])
    if tensor_codebooks is None:
        tensor_codebooks = _tensor_codebooks(weight, [f for f in formats if f.family == "kma"])
    row_levels = sorted({f.n_levels for f in formats if f.family == "kmc"}, reverse=True)
    row_books = dict(zip(row_levels, kmeans.fit_codebooks(rows, row_levels), strict=True)) if row_levels else {}
    norm = float(_squares(rows).sum())
    found = {}
    for number_format in formats:
        grid, codebook = None, None
        if number_format.family == "uaq":
            grid = uaq.fit_grid(rows, number_format)
        elif number_format.family == "kmc":
            codebook = kmeans.stored_codebook(row_books[number_format.n_levels].centroids, rows)
        else:
            codebook = tensor_codebooks[number_format.n_levels]
        scale, zero_point = (grid.scale, grid.zero_point) if grid else (None, None)
        parameters = FittedParameters(number_format, shape, scale, zero_point, codebook, 0.0, norm)
        errors = _squares(rows - _with_codes(rows, parameters, tuple(rows.shape)).dequantize())
        found[number_format] = (
            FittedParameters(number_format, shape, scale, zero_point, codebook, float(errors.sum()), norm),
            errors,
        )
    return found


def _tensor_codebooks(weight: Tensor, formats: list[Format]) -> dict[int, Tensor]:
    if not formats:
        return {}
    levels = sorted({f.n_levels for f in formats}, reverse=True)
    row = weight.detach().to(device="cpu", dtype=torch.float32).reshape(1, -1)
    books = kmeans.fit_codebooks(row, levels)
    return {k: kmeans.stored_codebook(book.centroids, row) for k, book in zip(levels, books, strict=True)}


def _sampled_values(weight: Tensor, generator: torch.Generator) -> Tensor:
    if weight.element_size() == 2 or weight.numel() <= _KMA_SAMPLE:
        return weight
    index = torch.randint(weight.numel(), (_KMA_SAMPLE,), generator=generator)
    return weight.detach().reshape(-1)[index].reshape(1, -1)


def _squares(rows: Tensor) -> Tensor:
    return rows.to(torch.float64).square_().sum(dim=1)


def _codes(rows: Tensor, parameters: FittedParameters | FittedWeight) -> Tensor:
    p = parameters
    if p.scale is not None and p.zero_point is not None:
        return uaq.grid_codes(rows, uaq.UniformGrid(p.scale, p.zero_point), p.format)
    if p.codebook is None:
        raise InputError(f"{p.format} needs scale and zero point (uaq) or a codebook (kmc, kma), which are missing")
    return kmeans.nearest_codes(rows, p.codebook)


def _with_codes(rows: Tensor, parameters: FittedParameters, shape: tuple[int, ...]) -> FittedWeight:
    p = parameters
    return FittedWeight(p.format, shape, _codes(rows, p), p.scale, p.zero_point, p.codebook)
