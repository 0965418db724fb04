"""Compiled kernels of error feedback: columns rounded one after another, some rows side by side.

Before a column is rounded it moves by what all earlier ones missed: one inner product per row. Rows go side by side so
that what is asked of a column is read once for all of them. Imported only when a weight is compensated.
"""
# ruff: noqa: ANN001, ANN202 -- numba derives the types from the signature in the decorator
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

from functools import partial

import numpy as np
from numba import njit

_SIDE_BY_SIDE = 16
_ROWS, _CODES, _INDEX = "float32[:, ::1]", "uint8[:, ::1]", "int64[::1]"
_kernel = partial(njit, cache=True, nogil=True, error_model="numpy")


@_kernel("float32(float32[::1], float32[::1], int64)", fastmath={"reassoc", "contract", "nsz"})
def _inner(one, other, n):
    """Inner product of the first n numbers."""
    total = np.float32(0.0)
    for index in range(n):
        total += one[index] * other[index]
    return total


@_kernel("int64(float32[::1], float32)")
def _count_below(limits, weight):
    """Number of ascending limits below a weight; without jumps, which processors guess wrong half the time."""
    found, n = 0, limits.shape[0]
    while n > 0:
        half = (n + 1) // 2
        found += half * (limits[found + half - 1] < weight)
        n -= half
    return found


@_kernel(f"void({_ROWS}, {_ROWS}, {_INDEX}, {_ROWS}, {_ROWS}, float32, {_CODES})")
def grid_codes(rows, asked, group_of, scales, zero_points, qmax, codes):
    """Codes of rows `[R, N]` on grids `[R, G]`, the columns rounded in their order; errors take the place of `rows`.

    `asked` `[N, N]`, lower triangular, says in row j what a unit of error in each earlier column asks of column j.
    """
    for first in range(0, rows.shape[0], _SIDE_BY_SIDE):
        for column in range(rows.shape[1]):
            group = group_of[column]
            for row in range(first, min(first + _SIDE_BY_SIDE, rows.shape[0])):
                weight = rows[row, column] - _inner(asked[column], rows[row], column)
                scale, zero_point = scales[row, group], zero_points[row, group]
                code = min(max(np.rint(weight / scale) + zero_point, np.float32(0.0)), qmax)
                codes[row, column] = np.uint8(np.int32(code))
                rows[row, column] = weight - (code - zero_point) * scale


@_kernel(f"void({_ROWS}, {_ROWS}, {_ROWS}, {_ROWS}, {_CODES})")
def codebook_codes(rows, asked, thresholds, codebook, codes):
    """As `grid_codes`, to the nearest of the centroids `[R or 1, K]` with `thresholds` `[R or 1, K - 1]` between."""
    for first in range(0, rows.shape[0], _SIDE_BY_SIDE):
        for column in range(rows.shape[1]):
            for row in range(first, min(first + _SIDE_BY_SIDE, rows.shape[0])):
                weight = rows[row, column] - _inner(asked[column], rows[row], column)
                own = min(row, codebook.shape[0] - 1)
                code = _count_below(thresholds[own], weight)
                codes[row, column] = np.uint8(code)
                rows[row, column] = weight - codebook[own, code]
