"""From a weight to what is stored: fit a format, choose codes, estimate the error of many formats.

A weight is `[out, in, ...]` of any floating dtype; it is read as float32 rows `[C, N]`, one per output channel,
and every error is that of the *stored* numbers against those rows. How a format is fitted, its family says.

Codes are the nearest ones, or those of error feedback, which make up for one another in what a layer gives: rounding
a row w to w' changes the output by the squared error (w - w') H (w - w')^T in the mean, H the second moments of the
layer's inputs, which nearest codes ignore. Columns are rounded one after another instead, and after each the columns
that are still to come move to where they make up best for what was missed. Inputs of large power come first. Where
inputs are strongly correlated (embedded timesteps, modulation), most of the error vanishes.

Source:
    Frantar et al. 2022, GPTQ (arXiv 2210.17323): the order of columns, the Cholesky form of the updates, and
    damping by 1 % of the mean power. Scales, zero points and codebooks are those of the format's own fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from sedimo.errors import InputError, UnfitFormatError
from sedimo.quant.families.family import CostEstimate, Family, squared_norms
from sedimo.quant.formats import Format
from sedimo.quant.parts import Fitted
from sedimo.quant.tensor import QuantizedTensor

FEEDBACK_VERSION = 1  # raise it when codes by error feedback change: trials are then measured anew
DAMPING = 0.01  # added to every power of an input, as a share of their mean
_LEAST_DAMPING, _MOST_DAMPING = 1e-6, 1.0
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
    """The weight `[out, in, ...]` in one format, with its nearest codes; `layer_name` is named in errors."""
    return fit_parameters(weight, (number_format,), layer_name=layer_name, keep_codes=True)[number_format]


def fit_parameters(
    weight: Tensor, formats: Iterable[Format], *, layer_name: str = "", keep_codes: bool = False
) -> dict[Format, Fitted]:
    """As `fit` without codes, unless they are to be kept; `with_codes` makes them again: a bank keeps these.

    Formats of one family share what they can, and use all threads of torch.

    Raises:
        InputError: not a floating tensor of two or more dimensions, NaN or infinity, or a format is fp16.
    """
    rows, asked = _read_rows(weight, layer_name), tuple(formats)
    norm, found = float(squared_norms(rows).sum()), {}
    parameters = _by_family(asked, weight, layer_name, lambda own, fs: own.fit(rows, fs, weight))
    for f in asked:
        codes = f.numerics.codes(rows, f, parameters[f])
        error = float(f.numerics.squared_errors(rows, f, parameters[f], codes).sum())
        found[f] = Fitted(f, tuple(weight.shape), parameters[f], error, norm, codes if keep_codes else None)
    return found


def with_codes(weight: Tensor, fitted: Fitted, parts: Sequence[Feedback] = (), *, layer_name: str = "") -> Fitted:
    """A fit with the codes of the weight that it was made for: the nearest ones, or those of error feedback.

    `parts` are the feedback of consecutive ranges of the N = in * kernel size columns; errors stay within a range.
    A family without error feedback gives its nearest codes.
    """
    shape, family = tuple(weight.shape), fitted.format.numerics
    if shape != fitted.shape:
        raise InputError(f"{_named(layer_name)} has shape {shape}, its parameters were fitted for {fitted.shape}")
    rows, n, start = _read_rows(weight, layer_name), sum(len(part.order) for part in parts), 0
    if parts and n != rows.shape[1]:
        raise InputError(f"{_named(layer_name)} has {rows.shape[1]} columns, its moments are of {n}")
    codes = torch.empty(rows.shape, dtype=torch.uint8)
    for part in parts:
        columns = part.order + start
        found = family.feedback_codes(rows[:, columns], columns, part.asked, fitted.format, fitted.parameters)
        if found is None:
            break
        codes[:, columns] = found
        start += len(part.order)
    return replace(fitted, codes=codes if start else family.codes(rows, fitted.format, fitted.parameters))


def error_estimates(
    weight: Tensor, formats: Iterable[Format], *, n_channels: int, generator: torch.Generator, layer_name: str = ""
) -> dict[Format, CostEstimate]:
    """Relative squared error of each format, from `n_channels` output channels drawn without replacement.

    The estimate is the ratio of the sampled channels' squared errors to their squared norms, its standard error
    that of a ratio estimator with the correction for a finite number of channels: 0 when all channels were used.
    A per-tensor codebook is fitted on the whole tensor, and its error exact, when the tensor has 16-bit values or at
    most 2^17; else it is fitted on 2^17 values drawn at random. fp16 has no error: it leaves the layer alone.
    """
    _check(weight, layer_name)
    n_all, asked = weight.shape[0], tuple(formats)
    if n_channels < min(2, n_all):
        raise InputError(f"{_named(layer_name)}: an error bar needs at least 2 output channels, got {n_channels=}")
    n = min(n_channels, n_all)
    index = torch.randperm(n_all, generator=generator)[:n].sort().values
    rows = _read_rows(weight.detach().cpu()[index] if n < n_all else weight, layer_name)
    quantized = [f for f in asked if f.is_quantized]
    found = _by_family(quantized, weight, layer_name, lambda own, fs: own.estimates(rows, fs, weight, generator))
    return {f: found.get(f, CostEstimate(0.0)) for f in asked}


class Moments(Protocol):
    """Second moments of the inputs of weights."""

    @property
    def key(self) -> str:
        """What they were measured on."""

    def blocks(self, weight: str) -> Sequence[Tensor]:
        """Blocks `[n, n]` on the diagonal of the moments of a weight's columns, in order; none if it has no moments."""


@dataclass(frozen=True)
class Feedback:
    """How the errors of some columns are passed on to later ones.

    `order` int64 `[N]` is that in which columns are rounded; `asked` float32 `[N, N]`, lower triangular in that order:
    in row j what a unit of error in each earlier column asks of column j.
    """

    order: Tensor
    asked: Tensor


def feedback(moments: Tensor, *, damping: float = DAMPING) -> Feedback:
    """The feedback that second moments of inputs `[N, N]` ask for.

    Inputs that are never used, and moments that are too nearly singular, are damped more until a factor exists.
    """
    if moments.ndim != 2 or moments.shape[0] != moments.shape[1]:
        raise InputError(f"second moments are a square matrix, got {tuple(moments.shape)}")
    wide = moments.detach().cpu().double()
    if not torch.isfinite(wide).all():
        raise InputError("second moments hold NaN or infinity: measure them in another dtype, or leave codes alone")
    power = wide.diagonal()
    order = torch.argsort(power, descending=True, stable=True)
    mean, damped = float(power.mean()), wide[order][:, order]
    if mean == 0:  # no inputs were seen: nothing is passed on
        return Feedback(order, torch.eye(len(power), dtype=torch.float32))
    added = 0.0
    while damping <= _MOST_DAMPING:
        damped.diagonal().add_((damping - added) * mean)
        added = damping
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return Feedback(order, (upper / upper.diagonal().unsqueeze(1)).T.float().contiguous())
        damping = max(10 * damping, _LEAST_DAMPING)
    raise InputError("second moments far from positive semidefinite are those of no inputs: measure them again")


def feedback_of(blocks: Sequence[Tensor], start: int, stop: int) -> list[Feedback]:
    """The feedback of columns `start` to `stop` (exclusive), one for each block that they lie in."""
    found, first = [], 0
    for block in blocks:
        inner = slice(max(start - first, 0), min(stop - first, len(block)))
        if inner.start < inner.stop:
            found.append(feedback(block[inner, inner]))
        first += len(block)
    return found


def _named(layer_name: str) -> str:
    return f"layer {layer_name!r}" if layer_name else "the weight"


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
            raise UnfitFormatError(f"{_named(layer_name)} cannot take {number_format}: {refusal}")
    found: dict[Format, Found] = {}
    for alike in own.values():
        try:
            found |= make(alike[0].numerics, alike)
        except InputError as error:
            raise type(error)(f"{_named(layer_name)}: {error}") from error
    return found


def _check(weight: Tensor, layer_name: str) -> None:
    if weight.dtype not in _DTYPES or weight.ndim < 2 or weight.numel() == 0:
        found = f"{weight.dtype} of shape {tuple(weight.shape)}"
        raise InputError(f"{_named(layer_name)} must be a non-empty floating tensor [out, in, ...], got {found}")


def _read_rows(weight: Tensor, layer_name: str) -> Tensor:
    """The weight as finite float32 rows `[C, N]` on the CPU."""
    _check(weight, layer_name)
    rows = weight.detach().to(device="cpu", dtype=torch.float32).reshape(weight.shape[0], -1).contiguous()
    if not (math.isfinite(float(rows.amin())) and math.isfinite(float(rows.amax()))):  # NaN, when any value is
        raise InputError(f"{_named(layer_name)} holds NaN or infinity (as float32). Leave it at fp16.")
    return rows
