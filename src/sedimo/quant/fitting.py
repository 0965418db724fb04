"""From a weight to what is stored: fit a format, choose codes, estimate the error of many formats.

A weight is `[out, in, ...]` of any floating dtype; it is read as float32 rows `[C, N]`, one per output channel,
and every error is that of the *stored* numbers against those rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sedimo.errors import InputError, UnfitFormatError
from sedimo.quant import kmeans, uaq
from sedimo.quant.formats import Format

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_KMA_SAMPLE = 1 << 17  # values that a per-tensor codebook is estimated from, when they are not 16 bits wide


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


@dataclass(frozen=True, slots=True)
class _Stored:
    """Either a grid or a codebook."""

    grid: uaq.UniformGrid | None
    codebook: Tensor | None

    @property
    def fields(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Scale, zero point, codebook."""
        return (self.grid.scale, self.grid.zero_point, None) if self.grid else (None, None, self.codebook)


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
    rows, asked = _read_rows(weight, layer_name), tuple(formats)
    return {
        f: FittedWeight(f, tuple(weight.shape), _codes(rows, f, stored), *stored.fields)
        for f, stored in _fit_all(weight, rows, asked, layer_name).items()
    }


def fit_parameters(
    weight: Tensor, formats: Iterable[Format], *, layer_name: str = ""
) -> dict[Format, FittedParameters]:
    """As `fit_many` without codes, which `assign` makes again from the weight: a bank keeps these.

    Raises:
        InputError: as `fit`.
    """
    rows, asked = _read_rows(weight, layer_name), tuple(formats)
    norm = float(_squared_norms(rows).sum())
    return {
        f: FittedParameters(f, tuple(weight.shape), *stored.fields, float(_squared_errors(rows, f, stored).sum()), norm)
        for f, stored in _fit_all(weight, rows, asked, layer_name).items()
    }


def assign(weight: Tensor, parameters: FittedParameters | FittedWeight, *, layer_name: str = "") -> Tensor:
    """Codes uint8 `[C, N]` of a weight in stored parameters: the same as when they were fitted.

    Raises:
        InputError: the weight's shape is another one, or as `fit`.
    """
    return _codes(rows_fitted_by(parameters, weight, layer_name), parameters.format, _stored(parameters))


def rows_fitted_by(parameters: FittedParameters | FittedWeight, weight: Tensor, layer_name: str) -> Tensor:
    """The weight as rows `[C, N]`, if it is one that these parameters were fitted for.

    Raises:
        InputError: as `assign`.
    """
    if tuple(weight.shape) != parameters.shape:
        raise InputError(
            f"{named(layer_name)} has shape {tuple(weight.shape)}, its parameters were fitted for {parameters.shape}"
        )
    return _read_rows(weight, layer_name)


def with_codes(weight: Tensor, parameters: FittedParameters, *, layer_name: str = "") -> FittedWeight:
    """The fitted weight of parameters that were fitted before.

    Raises:
        InputError: as `assign`.
    """
    codes = assign(weight, parameters, layer_name=layer_name)
    return FittedWeight(parameters.format, parameters.shape, codes, *_stored(parameters).fields)


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
    is_sampled = weight.element_size() > 2 and weight.numel() > _KMA_SAMPLE
    values = _tensor_values(_draw(weight, generator) if is_sampled else weight, asked, layer_name)
    norms = _squared_norms(rows)
    found = {f: ErrorEstimate(0.0, 0.0, n) for f in asked}
    for number_format, stored in _fit_rows(rows, values, asked, layer_name).items():
        if number_format.family == "kma" and values is not None and stored.codebook is not None and not is_sampled:
            found[number_format] = ErrorEstimate(kmeans.relative_error(values, stored.codebook), 0.0, n_all)
        else:
            found[number_format] = _ratio_estimate(_squared_errors(rows, number_format, stored), norms, n_all)
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


def named(layer_name: str) -> str:
    """How errors speak of a weight."""
    return f"layer {layer_name!r}" if layer_name else "the weight"


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
    _check_finite(float(rows.amin()), float(rows.amax()), layer_name)
    return rows


def _check_finite(low: float, high: float, layer_name: str) -> None:
    """The least and greatest value tell: both are NaN when any value is."""
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(
            f"{named(layer_name)} holds NaN or infinity (as float32) and cannot be quantized. Leave it at fp16."
        )


def _draw(weight: Tensor, generator: torch.Generator) -> Tensor:
    index = torch.randint(weight.numel(), (_KMA_SAMPLE,), generator=generator)
    return weight.detach().reshape(-1).cpu()[index]


def _tensor_values(weight: Tensor, formats: Sequence[Format], layer_name: str) -> kmeans.Values | None:
    """The values that per-tensor codebooks are fitted on, if a format has one."""
    if not any(f.family == "kma" for f in formats):
        return None
    values = kmeans.read_values(weight)
    _check_finite(float(values.values[0]), float(values.values[-1]), layer_name)  # NaN is sorted last
    return values


def _fit_rows(
    rows: Tensor, values: kmeans.Values | None, formats: Sequence[Format], layer_name: str
) -> dict[Format, _Stored]:
    """What is stored for each quantized format; codebooks of `kma` come from `values`."""
    codebooks: dict[Format, Tensor] = {}
    by_row = [f for f in formats if f.family == "kmc"]
    if by_row:
        books = kmeans.fit_codebooks(rows, [f.n_levels for f in by_row])
        codebooks |= {f: kmeans.stored_codebook(b.centroids) for f, b in zip(by_row, books, strict=True)}
    by_tensor = [f for f in formats if f.family == "kma"]
    if values is not None:
        books = kmeans.fit_tensor_codebooks(values, [f.n_levels for f in by_tensor])
        codebooks |= {f: kmeans.stored_codebook(b.centroids) for f, b in zip(by_tensor, books, strict=True)}
    found = {f: _Stored(None, c) for f, c in codebooks.items()}
    try:
        return found | {f: _Stored(uaq.fit_grid(rows, f), None) for f in formats if f.family == "uaq"}
    except UnfitFormatError as error:
        raise UnfitFormatError(f"{named(layer_name)}: {error}") from error


def _fit_all(weight: Tensor, rows: Tensor, formats: Sequence[Format], layer_name: str) -> dict[Format, _Stored]:
    """As `_fit_rows`, for all rows of a weight, in the order asked for; fp16 is refused."""
    for number_format in formats:
        if not number_format.is_quantized:
            raise InputError(f"{named(layer_name)}: {number_format} leaves a weight alone; there is nothing to fit")
    found = _fit_rows(rows, _tensor_values(weight, formats, layer_name), formats, layer_name)
    return {f: found[f] for f in formats}


def _squared_norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms.square_()


def _squared_errors(rows: Tensor, number_format: Format, stored: _Stored) -> Tensor:
    if stored.grid is not None:
        return uaq.squared_errors(rows, stored.grid, number_format)
    return kmeans.squared_errors(rows, _present(stored.codebook, number_format))


def _codes(rows: Tensor, number_format: Format, stored: _Stored) -> Tensor:
    if stored.grid is not None:
        return uaq.grid_codes(rows, stored.grid, number_format)
    return kmeans.nearest_codes(rows, _present(stored.codebook, number_format))


def _present(codebook: Tensor | None, number_format: Format) -> Tensor:
    if codebook is None:
        raise InputError(
            f"{number_format} needs scale and zero point (uaq) or a codebook (kmc, kma), which are missing"
        )
    return codebook


def _stored(parameters: FittedParameters | FittedWeight) -> _Stored:
    p = parameters
    if p.scale is None or p.zero_point is None:
        return _Stored(None, p.codebook)
    return _Stored(uaq.UniformGrid(p.scale, p.zero_point), None)
