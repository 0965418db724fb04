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

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sedimo.errors import UnfitFormatError
from sedimo.quant.families.family import FEEDBACK_WORK, Family, Parameters, Stored, Words, over_rows

if TYPE_CHECKING:
    from sedimo.quant.formats import Format

SHRINK_FACTORS = tuple(1.0 - percent * 0.01 for percent in range(0, 100, 10))
_ZERO_POINT_LIMIT = 32766  # a row that would need more has its scale widened: 2^-15 of its values is precise enough
_LEAST_GROUP_SCALE = 2.0**-24  # smallest positive float16


class UniformAffine(Family):
    """`scale` and `zero_point`: float32 and int16 `[C, 1]`, or float16 and uint8 `[C, G]` in groups."""

    name = "uaq"
    words = Words(
        "a uniform grid per output channel",
        grouped="a uniform grid per group of inputs",
        example=(
            "`uaq4` is a uniform grid of 2^4 = 16 steps for each output channel, "
            "`uaq4g64` one for every 64 inputs of a channel"
        ),
        mark="dash",
        rank=1,
    )
    takes_groups = True
    is_uniform = True

    def tensors(self, number_format: Format, n_channels: int, n_inputs: int) -> Stored:
        shape = (n_channels, number_format.n_groups(n_inputs))
        scale, zero_point = _dtypes(number_format)
        return {"scale": (scale, shape), "zero_point": (zero_point, shape)}

    def fit(self, rows: Tensor, formats: Sequence[Format], weight: Tensor) -> dict[Format, Parameters]:
        return {f: fit_grid(rows, f) for f in formats}

    def codes(self, rows: Tensor, number_format: Format, parameters: Parameters) -> Tensor:
        from sedimo.quant.families._row_kernels import grid_codes  # loaded here: importing compiles

        weights, scales, zeros = rows.numpy(), *_grids(parameters)
        size, qmax = number_format.group_size or rows.shape[1], np.float32(number_format.qmax)
        found = np.empty(rows.shape, np.uint8)
        over_rows(rows, lambda own: grid_codes(weights[own], size, scales[own], zeros[own], qmax, found[own]))
        return torch.from_numpy(found)

    def squared_errors(self, rows: Tensor, number_format: Format, parameters: Parameters, codes: Tensor) -> Tensor:
        from sedimo.quant.families._row_kernels import grid_errors  # loaded here: importing compiles

        weights, scales, zeros = rows.numpy(), *_grids(parameters)
        chosen, found, size = codes.numpy(), np.empty(len(rows)), number_format.group_size or rows.shape[1]
        over_rows(rows, lambda own: grid_errors(weights[own], size, scales[own], zeros[own], chosen[own], found[own]))
        return torch.from_numpy(found)

    def dequantize(self, number_format: Format, tensors: Mapping[str, Tensor]) -> Tensor:
        codes = tensors["codes"]
        scale, zero_point = self.grid(number_format, tensors, codes.shape[1])
        return codes.float().sub_(zero_point).mul_(scale)

    def grid(self, number_format: Format, parameters: Parameters, n_inputs: int) -> tuple[Tensor, Tensor]:
        scale, zero_point = parameters["scale"].float(), parameters["zero_point"].float()
        if number_format.group_size is None:
            return scale, zero_point  # [C, 1], broadcast
        span = min(number_format.group_size, n_inputs)  # a group longer than the row must not cost its length
        spread = (t.unsqueeze(2).expand(-1, -1, span).flatten(1) for t in (scale, zero_point))
        scale, zero_point = (t[:, :n_inputs] for t in spread)
        return scale, zero_point

    def feedback_codes(
        self, rows: Tensor, columns: Tensor, asked: Tensor, number_format: Format, parameters: Parameters
    ) -> Tensor:
        from sedimo.quant.families._row_kernels import feedback_grid_codes  # loaded here: importing compiles

        weights, asks, found = rows.numpy(), asked.numpy(), np.empty(rows.shape, np.uint8)
        scales, zeros = _grids(parameters)
        size, qmax = number_format.group_size, np.float32(number_format.qmax)
        group_of = (torch.zeros_like(columns) if size is None else columns // size).numpy()

        def task(own: slice) -> None:
            feedback_grid_codes(weights[own], asks, group_of, scales[own], zeros[own], qmax, found[own])

        over_rows(rows, task, work=FEEDBACK_WORK)
        return torch.from_numpy(found)

    def complaint(self, number_format: Format, parameters: Parameters) -> str:
        highest = int(parameters["zero_point"].max())
        if number_format.group_size is None or highest <= number_format.qmax:
            return ""
        return f"zero_point must lie in 0..{number_format.qmax}, got {highest}"


UAQ = UniformAffine()


def fit_grid(rows: Tensor, number_format: Format) -> dict[str, Tensor]:
    """Scale and zero point with the least mean |error|^2.4 among the shrunk ranges."""
    from sedimo.quant.families._row_kernels import best_grids  # loaded here: importing compiles

    scale, zero_point = _candidate_grids(rows, number_format)
    best = torch.zeros(scale.shape[1:], dtype=torch.int64)
    group_size, qmax = number_format.group_size or rows.shape[1], np.float32(number_format.qmax)

    def task(own: slice) -> None:
        scales, zeros = (t[:, own].contiguous() for t in (scale, zero_point))
        grids = scales.numpy(), scales.reciprocal().numpy(), zeros.numpy()
        best_grids(rows[own].numpy(), group_size, *grids, qmax, best[own].numpy())

    over_rows(rows, task)
    chosen = (t.gather(0, best.unsqueeze(0))[0] for t in (scale, zero_point))
    stored = (t.to(dtype) for t, dtype in zip(chosen, _dtypes(number_format), strict=True))  # nothing is rounded
    return dict(zip(("scale", "zero_point"), stored, strict=True))


def _candidate_grids(rows: Tensor, number_format: Format) -> tuple[Tensor, Tensor]:
    """Scale and zero point for each shrink factor, float32 `[F, C, G]` that the stored types hold exactly."""
    low, high = _ranges(rows, number_format.group_size)
    factors, qmax = torch.tensor(SHRINK_FACTORS).reshape(-1, 1, 1), number_format.qmax
    if number_format.group_size is None:
        new_low, new_high = low * factors, high * factors
        far = torch.maximum(new_low.abs(), new_high.abs()) / _ZERO_POINT_LIMIT
        scale = torch.maximum((new_high - new_low) / qmax, far).clamp_(min=torch.finfo(torch.float32).smallest_normal)
        # A constant row has no range: its magnitude as the scale makes it exact.
        scale = torch.where(low == high, torch.where(low == 0, 1.0, low.abs()), scale)
        zero_point = torch.where(low == high, -torch.sign(low), torch.round(-new_low / scale))
    else:
        below, above = low.clamp(max=0), high.clamp(min=0)
        new_low = below * factors
        scale = ((above * factors - new_low) / qmax).to(torch.float16).to(torch.float32)
        scale = torch.where(below == above, 1.0, scale.clamp_(min=_LEAST_GROUP_SCALE))
        zero_point = torch.round(-new_low / scale).clamp_(0, qmax)
        _make_constants_exact(scale, zero_point, low, high, qmax)
    if not torch.isfinite(scale).all():
        raise UnfitFormatError(
            f"{number_format} cannot hold values from {float(low.min()):.3g} to {float(high.max()):.3g}: "
            "the scale overflows. Choose kmc or kma, or fp16 to leave the layer alone."
        )
    return scale, zero_point


def _dtypes(number_format: Format) -> tuple[torch.dtype, torch.dtype]:
    """Those of scale and zero point."""
    return (torch.float16, torch.uint8) if number_format.group_size else (torch.float32, torch.int16)


def _grids(parameters: Parameters) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales and zero points `[C, G]` for kernels."""
    return parameters["scale"].float().numpy(), parameters["zero_point"].float().numpy()


def _ranges(rows: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each row or group, `[C, G]`."""
    if group_size is None:
        return rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)
    whole = rows.shape[1] // group_size * group_size
    parts = [rows[:, :whole].reshape(rows.shape[0], -1, group_size), rows[:, whole:].unsqueeze(1)]
    lows, highs = zip(*((part.amin(dim=2), part.amax(dim=2)) for part in parts if part.numel()), strict=True)
    return torch.cat(lows, dim=1), torch.cat(highs, dim=1)


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
