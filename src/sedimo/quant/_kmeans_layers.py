"""Compiled kernel of exact one-dimensional k-means for the rows that `_kmeans_kernels` leaves unsolved.

Dynamic programming over the pieces, each layer by divide and conquer, about a hundred times slower. Every cost is a
pair of float64 whose sum is the number (about 32 decimal digits), so that neither an outlier nor a large common
offset cancels the small differences that decide.

Source:
    Dekker 1971, A floating-point technique for extending the available precision.
"""
# ruff: noqa: ANN001, ANN202 -- numba derives the types from the signature in the decorator
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

from functools import partial

import numpy as np
from numba import njit

_SPLIT = 134217729.0  # 2^27 + 1
_PAIR = "UniTuple(float64, 2)"
_kernel = partial(njit, cache=True, nogil=True, error_model="numpy")


@_kernel(f"{_PAIR}(float64, float64)")
def _sum_exactly(a, b):
    high = a + b
    rest = high - a
    return high, (a - (high - rest)) + (b - rest)


@_kernel(f"{_PAIR}(float64, float64)")
def _multiply_exactly(a, b):
    high = a * b
    a_high, b_high = _SPLIT * a, _SPLIT * b
    a_high, b_high = a_high - (a_high - a), b_high - (b_high - b)
    a_low, b_low = a - a_high, b - b_high
    return high, ((a_high * b_high - high) + a_high * b_low + a_low * b_high) + a_low * b_low


@_kernel(f"{_PAIR}(float64, float64, float64, float64)")
def _add(a, a_low, b, b_low):
    high, rest = _sum_exactly(a, b)
    low, rest_low = _sum_exactly(a_low, b_low)
    high, rest = _sum_exactly(high, rest + low)
    return _sum_exactly(high, rest + rest_low)


@_kernel("float64[:, ::1](float64[::1], float64[::1])")
def _sum_prefixes(values, counts):
    """Rows: count, value (two), square (two); entry i is the sum over the first i values."""
    sums = np.zeros((5, values.shape[0] + 1))
    for i in range(values.shape[0]):
        first, first_low = _multiply_exactly(values[i], counts[i])
        second, second_low = _multiply_exactly(values[i], values[i])
        low_first, low_second = second_low * counts[i], 0.0
        second, low_second = _multiply_exactly(second, counts[i])
        sums[0, i + 1] = sums[0, i] + counts[i]
        sums[1, i + 1], sums[2, i + 1] = _add(sums[1, i], sums[2, i], first, first_low)
        sums[3, i + 1], sums[4, i + 1] = _add(sums[3, i], sums[4, i], second, low_second + low_first)
    return sums


@_kernel(f"{_PAIR}(int64, int64, float64[:, ::1])")
def _cost(start, stop, sums):
    """Sum of squared distances of the values start .. stop-1 to their mean."""
    weight = sums[0, stop] - sums[0, start]
    total, total_low = _add(sums[1, stop], sums[2, stop], -sums[1, start], -sums[2, start])
    square, square_low = _multiply_exactly(total, total)
    square_low += 2 * total * total_low
    quotient = square / weight
    back, back_low = _multiply_exactly(quotient, weight)
    quotient_low = ((square - back) - back_low + square_low) / weight
    second, second_low = _add(sums[3, stop], sums[4, stop], -sums[3, start], -sums[4, start])
    return _add(second, second_low, -quotient, -quotient_low)


@_kernel("int64(int64, int64, int64, float64[:, ::1], float64[:, ::1], float64[:, ::1])")
def _best_start(stop, low, high, sums, before, after):
    """The best start of the piece that ends at `stop`, among low .. high; writes its cost to `after`."""
    best, best_low, best_index = np.inf, 0.0, low
    for start in range(low, min(high, stop - 1) + 1):
        cost, cost_low = _cost(start, stop, sums)
        cost, cost_low = _add(cost, cost_low, before[0, start], before[1, start])
        if cost < best or (cost == best and cost_low < best_low):
            best, best_low, best_index = cost, cost_low, start
    after[0, stop], after[1, stop] = best, best_low
    return best_index


@_kernel("void(int64, int64, int64, float64[:, ::1], float64[:, ::1], float64[:, ::1], int32[::1])")
def _fill_layer(layer, first, last, sums, before, after, starts):
    """Best starts of piece number `layer` for every stop first .. last; they move right with the stop."""
    tasks = np.empty((80, 4), dtype=np.int64)
    tasks[0] = (first, last, layer, last - 1)
    depth = 1
    while depth > 0:
        depth -= 1
        left, right, low, high = tasks[depth]
        if left > right:
            continue
        middle = (left + right) // 2
        best = _best_start(middle, low, high, sums, before, after)
        starts[middle] = best
        tasks[depth] = (left, middle - 1, low, best)
        tasks[depth + 1] = (middle + 1, right, best, high)
        depth += 2


@_kernel("float64(float64[::1], float64[::1], float64[::1])")
def fit_distinct(values, counts, centroids):
    """Optimal centroids of sorted distinct values with counts, fewer centroids than values; their squared error."""
    n, k = values.shape[0], centroids.shape[0]
    sums = _sum_prefixes(values, counts)
    starts = np.zeros((k, n + 1), dtype=np.int32)
    before, after = np.empty((2, n + 1)), np.empty((2, n + 1))
    for stop in range(1, n + 1):
        after[0, stop], after[1, stop] = _cost(0, stop, sums)
    for layer in range(1, k):
        before, after = after, before
        first = n if layer == k - 1 else layer + 1
        _fill_layer(layer, first, n - (k - 1 - layer), sums, before, after, starts[layer])
    error, stop = after[0, n], n
    for layer in range(k - 1, -1, -1):
        start = np.int64(starts[layer, stop])
        total, _ = _add(sums[1, stop], sums[2, stop], -sums[1, start], -sums[2, start])
        centroids[layer] = total / (sums[0, stop] - sums[0, start])
        stop = start
    return max(error, 0.0)
