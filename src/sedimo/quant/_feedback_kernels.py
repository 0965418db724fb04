"""Compiled kernels of error feedback: a block of columns, rounded one after another, some rows side by side.

Imported only when a weight is compensated.
"""
# ruff: noqa: ANN001, ANN202 -- numba derives the types from the signature in the decorator
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

from functools import partial

import numpy as np
from numba import njit

_LANES = 16  # rows that are computed side by side, as processors do
_MANY_LIMITS = 64  # from so many on, searching is quicker than counting
_ROWS, _CODES, _INDEX = "float32[:, ::1]", "uint8[:, ::1]", "int64[::1]"
_kernel = partial(njit, cache=True, nogil=True, error_model="numpy", fastmath={"contract"})


@_kernel(f"void({_ROWS}, {_ROWS}, int64)", inline="always")
def _pass_on(tile, factor, column):
    """Moves the later columns of a tile `[B, lanes]` by what a column, which holds its errors, asks of them."""
    for later in range(column + 1, tile.shape[0]):
        share = factor[column, later]
        for lane in range(_LANES):
            tile[later, lane] -= share * tile[column, lane]


@_kernel(f"void({_ROWS}, {_ROWS}, {_INDEX}, {_ROWS}, {_ROWS}, float32, {_CODES})")
def grid_block(rows, factor, group_of, scales, zero_points, qmax, codes):
    """Rounds the columns of rows `[R, B]` to grids `[R, G]`, one after another.

    `factor` `[B, B]` says what an error in one column asks of the later ones. Fills `codes` `[R, B]`; what was missed
    in each column takes the place of `rows`.
    """
    n_columns = rows.shape[1]
    tile, code = np.empty((n_columns, _LANES), np.float32), np.empty(_LANES, np.float32)
    scale, zero_point = np.empty((n_columns, _LANES), np.float32), np.empty((n_columns, _LANES), np.float32)
    for first in range(0, rows.shape[0], _LANES):
        n = min(_LANES, rows.shape[0] - first)
        for lane in range(_LANES):
            row = first + min(lane, n - 1)
            for column in range(n_columns):
                tile[column, lane] = rows[row, column]
                scale[column, lane] = scales[row, group_of[column]]
                zero_point[column, lane] = zero_points[row, group_of[column]]
        for column in range(n_columns):
            weight = tile[column]
            for lane in range(_LANES):
                rounded = np.rint(weight[lane] / scale[column, lane]) + zero_point[column, lane]
                code[lane] = min(max(rounded, np.float32(0.0)), qmax)
                weight[lane] -= (code[lane] - zero_point[column, lane]) * scale[column, lane]
            for lane in range(n):
                codes[first + lane, column] = np.uint8(np.int32(code[lane]))
            _pass_on(tile, factor, column)
        for lane in range(n):
            for column in range(n_columns):
                rows[first + lane, column] = tile[column, lane]


@_kernel(f"void({_ROWS}, {_ROWS}, int32[::1], int64)", inline="always")
def _count_below(tile, limits, below, column):
    """Number of limits `[K - 1, lanes]`, ascending, below each weight of a column."""
    below[:] = 0
    if limits.shape[0] < _MANY_LIMITS:
        for index in range(limits.shape[0]):
            for lane in range(_LANES):
                below[lane] += tile[column, lane] > limits[index, lane]
        return
    for lane in range(_LANES):
        low, high = 0, limits.shape[0]
        while low < high:
            middle = (low + high) // 2
            if tile[column, lane] > limits[middle, lane]:
                low = middle + 1
            else:
                high = middle
        below[lane] = low


@_kernel(f"void({_ROWS}, {_ROWS}, {_ROWS}, {_ROWS}, {_CODES})")
def codebook_block(rows, factor, thresholds, codebook, codes):
    """As `grid_block`, to the nearest of the centroids `[R or 1, K]` with `thresholds` `[R or 1, K - 1]` between."""
    n_columns, n_limits = rows.shape[1], thresholds.shape[1]
    tile, below = np.empty((n_columns, _LANES), np.float32), np.empty(_LANES, np.int32)
    limits = np.empty((n_limits, _LANES), np.float32)
    for first in range(0, rows.shape[0], _LANES):
        n = min(_LANES, rows.shape[0] - first)
        for lane in range(_LANES):
            row = first + min(lane, n - 1)
            for column in range(n_columns):
                tile[column, lane] = rows[row, column]
            for index in range(n_limits):
                limits[index, lane] = thresholds[min(row, thresholds.shape[0] - 1), index]
        for column in range(n_columns):
            _count_below(tile, limits, below, column)
            for lane in range(_LANES):
                row = first + min(lane, n - 1)
                tile[column, lane] -= codebook[min(row, codebook.shape[0] - 1), below[lane]]
            for lane in range(n):
                codes[first + lane, column] = np.uint8(below[lane])
            _pass_on(tile, factor, column)
        for lane in range(n):
            for column in range(n_columns):
                rows[first + lane, column] = tile[column, lane]
