"""Uniform affine quantization: one scale and zero point per output channel, or per group of inputs.

    code = clamp(round(weight / scale) + zero_point, 0, 2^b - 1)        weight' = (code - zero_point) * scale

The range is searched: the row's own minimum and maximum are shrunk by ten factors, and the one with the least
mean |error|^2.4 wins. Per channel, scale is float32 and zero point int16; the zero point may lie outside the
codes when a row has only one sign. In groups, scale is float16, zero point uint8, and the range is widened to
hold zero, so that both always fit. All arithmetic is float32, in the order of the published code; a group's
scale is rounded to float16 before anything is computed with it.

Source:
    Mills et al. 2024, Qua2SeDiMo (arXiv 2412.14628), released code; the norm is that of
    Nahshan et al. 2019, Loss Aware Post-training Quantization (arXiv 1911.07190).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sedimo.errors import UnfitFormatError
from sedimo.quant._threads import over_rows
from sedimo.quant.formats import Format

SHRINK_FACTORS = tuple(1.0 - percent * 0.01 for percent in range(0, 100, 10))
_ZERO_POINT_LIMIT = 32766  # a row that would need more has its scale widened: 2^-15 of its values is precise enough
_LEAST_GROUP_SCALE = 2.0**-24  # smallest positive float16


@dataclass(frozen=True, slots=True)
class UniformGrid:
    """Scale and zero point of every row or group: float32 and int16 `[C, 1]`, or float16 and uint8 `[C, G]`."""

    scale: Tensor
    zero_point: Tensor


def fit_grid(rows: Tensor, number_format: Format) -> UniformGrid:
    """The grid with the least mean |error|^2.4 among the shrunk ranges.

    Args:
        rows: float32 `[C, N]`, finite, contiguous.
        number_format: a `uaq` format.

    Raises:
        UnfitFormatError: values so large that the scale overflows its type.
    """
    from sedimo.quant._row_kernels import best_grids  # loaded here: importing compiles

    scale, zero_point = candidate_grids(rows, number_format)
    best = torch.zeros(scale.shape[1:], dtype=torch.int64)
    group_size, qmax = number_format.group_size or rows.shape[1], np.float32(number_format.qmax)

    def task(start: int, stop: int) -> None:
        part = scale[:, start:stop].contiguous()
        zeros = zero_point[:, start:stop].contiguous().numpy()
        found = best[start:stop].numpy()
        best_grids(rows[start:stop].numpy(), group_size, part.numpy(), part.reciprocal().numpy(), zeros, qmax, found)

    over_rows(len(rows), rows.shape[1], task)
    index = best.unsqueeze(0)
    return stored_grid(scale.gather(0, index)[0], zero_point.gather(0, index)[0], number_format)


def candidate_grids(rows: Tensor, number_format: Format) -> tuple[Tensor, Tensor]:
    """Scale and zero point for each shrink factor, as float32 numbers that the stored types hold exactly.

    Returns:
        Two float32 tensors `[F, C, G]`, one entry per shrink factor.
    """
    low, high = _ranges(rows, number_format.group_size)
    factors = torch.tensor(SHRINK_FACTORS).reshape(-1, 1, 1)
    if number_format.group_size is None:
        scale, zero_point = _row_grids(low, high, factors, number_format.qmax)
    else:
        scale, zero_point = _group_grids(low.clamp(max=0), high.clamp(min=0), factors, number_format.qmax)
        _make_constants_exact(scale, zero_point, low, high, number_format.qmax)
    if not torch.isfinite(scale).all():
        raise UnfitFormatError(
            f"{number_format} cannot hold values from {float(low.min()):.3g} to {float(high.max()):.3g}: "
            "the scale overflows. Choose kmc or kma, or fp16 to leave the layer alone."
        )
    return scale, zero_point


def stored_grid(scale: Tensor, zero_point: Tensor, number_format: Format) -> UniformGrid:
    """The grid in the types it is stored in; nothing is rounded."""
    if number_format.group_size is None:
        return UniformGrid(scale, zero_point.to(torch.int16))
    return UniformGrid(scale.to(torch.float16), zero_point.to(torch.uint8))


def grid_codes(rows: Tensor, grid: UniformGrid, number_format: Format) -> Tensor:
    """Codes uint8 `[C, N]` of float32 rows `[C, N]` on a stored grid."""
    codes = torch.empty(rows.shape, dtype=torch.uint8)
    _assign(rows, grid, number_format, codes, None)
    return codes


def squared_errors(rows: Tensor, grid: UniformGrid, number_format: Format) -> Tensor:
    """Sum of squared errors of each row on a stored grid, float64 `[C]`."""
    errors = torch.empty(len(rows), dtype=torch.float64)
    _assign(rows, grid, number_format, None, errors)
    return errors


def dequantize_grid(codes: Tensor, grid: UniformGrid, group_size: int | None) -> Tensor:
    """Weights float32 `[C, N]` of codes `[C, N]`: (code - zero_point) * scale."""
    scale, zero_point = per_weight(grid, group_size, codes.shape[1])
    return codes.to(torch.float32).sub_(zero_point).mul_(scale)


def per_weight(grid: UniformGrid, group_size: int | None, n_inputs: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each weight, float32 `[C, N]` in groups, else `[C, 1]`, which broadcasts."""
    scale, zero_point = grid.scale.to(torch.float32), grid.zero_point.to(torch.float32)
    if group_size is None:
        return scale, zero_point
    return (
        scale.repeat_interleave(group_size, dim=1)[:, :n_inputs],
        zero_point.repeat_interleave(group_size, dim=1)[:, :n_inputs],
    )


def _ranges(rows: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each row or group, `[C, G]`."""
    if group_size is None:
        return rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)
    whole = rows.shape[1] // group_size * group_size
    parts = [rows[:, :whole].reshape(rows.shape[0], -1, group_size), rows[:, whole:].unsqueeze(1)]
    lows, highs = zip(*((part.amin(dim=2), part.amax(dim=2)) for part in parts if part.numel()), strict=True)
    return torch.cat(lows, dim=1), torch.cat(highs, dim=1)


def _row_grids(low: Tensor, high: Tensor, factors: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    new_low, new_high = low * factors, high * factors
    far = torch.maximum(new_low.abs(), new_high.abs()) / _ZERO_POINT_LIMIT
    scale = torch.maximum((new_high - new_low) / qmax, far).clamp_(min=torch.finfo(torch.float32).smallest_normal)
    # A constant row has no range: its magnitude as the scale makes it exact.
    scale = torch.where(low == high, torch.where(low == 0, 1.0, low.abs()), scale)
    return scale, torch.where(low == high, -torch.sign(low), torch.round(-new_low / scale))


def _group_grids(low: Tensor, high: Tensor, factors: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    new_low = low * factors
    scale = (high * factors - new_low) / qmax
    scale = scale.to(torch.float16).to(torch.float32)
    scale = torch.where(low == high, 1.0, scale.clamp_(min=_LEAST_GROUP_SCALE))
    return scale, torch.round(-new_low / scale).clamp_(0, qmax)


def _make_constants_exact(scale: Tensor, zero_point: Tensor, low: Tensor, high: Tensor, qmax: int) -> None:
    """Groups of one value get the float16 scale and code that come nearest to it: exact for a float16 value."""
    is_constant = (low == high) & (low != 0)
    if not is_constant.any():
        return
    value = low[is_constant]
    steps = torch.arange(1, qmax + 1, dtype=torch.float32)
    scales = (value.abs().unsqueeze(1) / steps).to(torch.float16).to(torch.float32).clamp_(min=_LEAST_GROUP_SCALE)
    best = (scales * steps - value.abs().unsqueeze(1)).abs().argmin(dim=1)
    scale[:, is_constant] = scales.gather(1, best.unsqueeze(1)).squeeze(1)
    zero_point[:, is_constant] = torch.where(value > 0, 0.0, steps[best])


def _assign(
    rows: Tensor, grid: UniformGrid, number_format: Format, codes: Tensor | None, errors: Tensor | None
) -> None:
    """Fills codes uint8 `[C, N]`, or squared errors float64 `[C]`, or both."""
    from sedimo.quant._row_kernels import grid_codes, grid_errors  # loaded here: importing compiles

    values, scales = rows.numpy(), grid.scale.to(torch.float32).numpy()
    zeros = grid.zero_point.to(torch.float32).numpy()
    group_size, qmax = number_format.group_size or values.shape[1], np.float32(number_format.qmax)

    def task(start: int, stop: int) -> None:
        part = slice(start, stop)
        found = np.empty(values[part].shape, np.uint8) if codes is None else codes.numpy()[part]
        grid_codes(values[part], group_size, scales[part], zeros[part], qmax, found)
        if errors is not None:
            grid_errors(values[part], group_size, scales[part], zeros[part], found, errors.numpy()[part])

    over_rows(len(values), values.shape[1], task)
