"""Compiled kernels that go through rows of weights: score grids, choose codes, sum squared errors, count values.

With error feedback, columns are rounded one after another. Before a column is rounded it moves by what all earlier ones
missed: one inner product per row. Rows go side by side so that what is asked of a column is read once for all of them.

Imported only when a weight is fitted.
"""
# ruff: noqa: ANN001, ANN202 -- numba derives the types from the signature in the decorator
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

from functools import partial

import numpy as np
from numba import njit

_CHUNK = 256  # weights summed in float32 before they join a float64 sum
_SIDE_BY_SIDE = 16
_ROWS, _CODES, _ERRORS, _INDEX = "float32[:, ::1]", "uint8[:, ::1]", "float64[::1]", "int64[::1]"
_FIFTH_ROOT_MAGIC = np.float32(1278029824.0)  # 6/5 of the bits of 1.0, balanced for the least greatest error
_kernel = partial(njit, cache=True, nogil=True, error_model="numpy")


@_kernel("float32(float32)", fastmath={"contract"})
def _power_1_2(u):
    """u^1.2 for 1e-30 <= u <= 1e12, to a few units in the last place; what libraries offer is not vectorised.

    r approaches u^(-1/5) by Halley's rule from a guess made of the bits: h = 1 - u r^5, r += r (h / 5 + 3 h^2 / 25).
    """
    bits = np.float32(np.float32(u).view(np.int32))
    r = np.int32(_FIFTH_ROOT_MAGIC - np.float32(0.2) * bits).view(np.float32)
    for _ in range(2):
        square = r * r
        h = np.float32(1.0) - u * (square * square * r)
        r += r * h * (np.float32(0.2) + np.float32(0.12) * h)
    square = r * r
    return u * (u * (square * square))  # in this order nothing underflows


@_kernel(
    "float64(float32[::1], float32, float32, float32, float32, float32, float64)",
    fastmath={"reassoc", "contract", "nsz"},
)
def _score(weights, scale, inverse, zero_point, qmax, unit, limit):
    """Sum of |error unit|^2.4; gives up when it exceeds `limit`. `inverse` is 1 / scale."""
    total = 0.0
    for start in range(0, weights.shape[0], _CHUNK):
        chunk = weights[start : start + _CHUNK]
        part = np.float32(0.0)
        for index in range(chunk.shape[0]):
            code = min(max(np.rint(chunk[index] * inverse) + zero_point, np.float32(0.0)), qmax)
            error = ((code - zero_point) * scale - chunk[index]) * unit
            part += _power_1_2(error * error + np.float32(1e-30))
        total += part
        if total > limit:
            break
    return total


@_kernel(f"void({_ROWS}, int64, float32[:, :, ::1], float32[:, :, ::1], float32[:, :, ::1], float32, int64[:, ::1])")
def best_grids(rows, group_size, scales, inverses, zero_points, qmax, best):
    """Index of the best of the grids `[F, R, G]` for every group of every row, the first of equals; `best` starts at 0.

    Errors are counted in the scale of the first grid, so that their powers neither vanish nor overflow.
    """
    for row in range(rows.shape[0]):
        for group in range(best.shape[1]):
            weights = rows[row, group * group_size : (group + 1) * group_size]
            unit = inverses[0, row, group]
            least = np.inf
            for index in range(scales.shape[0]):
                scale, zero_point = scales[index, row, group], zero_points[index, row, group]
                score = _score(weights, scale, inverses[index, row, group], zero_point, qmax, unit, least)
                if score < least:
                    least = score
                    best[row, group] = index


@_kernel(f"void({_ROWS}, int64, {_ROWS}, {_ROWS}, float32, {_CODES})")
def grid_codes(rows, group_size, scales, zero_points, qmax, codes):
    """Codes of rows on grids `[R, G]`."""
    for row in range(rows.shape[0]):
        for group in range(scales.shape[1]):
            part = slice(group * group_size, min((group + 1) * group_size, rows.shape[1]))
            weights, target = rows[row, part], codes[row, part]
            scale, zero_point = scales[row, group], zero_points[row, group]
            for index in range(weights.shape[0]):
                code = np.rint(weights[index] / scale) + zero_point
                target[index] = np.uint8(np.int32(min(max(code, np.float32(0.0)), qmax)))


@_kernel(f"void({_ROWS}, int64, {_ROWS}, {_ROWS}, {_CODES}, {_ERRORS})", fastmath={"reassoc", "contract", "nsz"})
def grid_errors(rows, group_size, scales, zero_points, codes, errors):
    """Sum of squared errors of each row on its grids; the dequantized value is a float32."""
    for row in range(rows.shape[0]):
        errors[row] = 0.0
        for group in range(scales.shape[1]):
            part = slice(group * group_size, min((group + 1) * group_size, rows.shape[1]))
            weights, found = rows[row, part], codes[row, part]
            scale, zero_point = scales[row, group], zero_points[row, group]
            total = 0.0
            for index in range(weights.shape[0]):
                error = np.float64((np.float32(found[index]) - zero_point) * scale) - np.float64(weights[index])
                total += error * error
            errors[row] += total


@_kernel(f"void({_ROWS}, {_ROWS}, {_CODES})")
def codebook_codes(rows, thresholds, codes):
    """Number of thresholds `[R or 1, K - 1]` below each weight."""
    for row in range(rows.shape[0]):
        limits = thresholds[min(row, thresholds.shape[0] - 1)]
        for start in range(0, rows.shape[1], _CHUNK):
            weights, target = rows[row, start : start + _CHUNK], codes[row, start : start + _CHUNK]
            target[:] = 0
            for limit in limits:
                for index in range(weights.shape[0]):
                    target[index] += weights[index] > limit


@_kernel(f"void({_ROWS}, {_ROWS}, {_CODES}, {_ERRORS})", fastmath={"reassoc", "contract", "nsz"})
def codebook_errors(rows, codebook, codes, errors):
    """Sum of squared errors of each row with a codebook `[R or 1, K]`."""
    for row in range(rows.shape[0]):
        centroids = codebook[min(row, codebook.shape[0] - 1)]
        weights, found = rows[row], codes[row]
        total = 0.0
        for index in range(weights.shape[0]):
            error = np.float64(centroids[found[index]]) - np.float64(weights[index])
            total += error * error
        errors[row] = total


@_kernel("void(uint16[::1], int64[::1])")
def count_patterns(patterns, counts):
    """Adds the number of each 16-bit pattern to `counts` `[65536]`; numpy's own would widen every value to 64 bits."""
    for pattern in patterns:
        counts[pattern] += 1


@_kernel("float32(float32[::1], float32[::1], int64)", fastmath={"reassoc", "contract", "nsz"})
def _inner(one, other, n):
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
def feedback_grid_codes(rows, asked, group_of, scales, zero_points, qmax, codes):
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
def feedback_codebook_codes(rows, asked, thresholds, codebook, codes):
    """As `feedback_grid_codes`, to the nearest centroid `[R or 1, K]`, `thresholds` `[R or 1, K - 1]` between them."""
    for first in range(0, rows.shape[0], _SIDE_BY_SIDE):
        for column in range(rows.shape[1]):
            for row in range(first, min(first + _SIDE_BY_SIDE, rows.shape[0])):
                weight = rows[row, column] - _inner(asked[column], rows[row], column)
                own = min(row, codebook.shape[0] - 1)
                code = _count_below(thresholds[own], weight)
                codes[row, column] = np.uint8(code)
                rows[row, column] = weight - codebook[own, code]
