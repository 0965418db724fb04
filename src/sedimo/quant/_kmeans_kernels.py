"""Compiled kernels of the exact one-dimensional k-means. Imported only when a k-means format is fitted."""

from __future__ import annotations

import numpy as np
from numba import njit

F8 = np.float64


@njit("int64(float64[::1], float64[::1], int64, float64[::1], float64[::1])", cache=True, nogil=True)
def layered(values, counts, k, centroids, errors):  # type: ignore[no-untyped-def]
    """Optimal k clusters of sorted distinct values by dynamic programming over the clusters; k < n."""
    n = values.shape[0]
    s0 = np.zeros(n + 1)
    s1 = np.zeros(n + 1)
    s2 = np.zeros(n + 1)
    for i in range(n):
        s0[i + 1] = s0[i] + counts[i]
        s1[i + 1] = s1[i] + counts[i] * values[i]
    shift = s1[n] / s0[n]
    s1[:] = 0.0
    for i in range(n):
        x = values[i] - shift
        s1[i + 1] = s1[i] + counts[i] * x
        s2[i + 1] = s2[i] + counts[i] * x * x
    previous = np.empty(n + 1)
    current = np.empty(n + 1)
    arg = np.zeros((k, n + 1), dtype=np.int32)
    for j in range(1, n + 1):
        previous[j] = s2[j] - s1[j] * s1[j] / s0[j]
    stack = np.empty((128, 4), dtype=np.int64)
    for layer in range(1, k):
        depth = 1
        stack[0] = (layer + 1, n, layer, n - 1)
        while depth > 0:
            depth -= 1
            jlo, jhi, ilo, ihi = stack[depth]
            if jlo > jhi:
                continue
            j = (jlo + jhi) // 2
            best = np.inf
            best_i = ilo
            for i in range(ilo, min(ihi, j - 1) + 1):
                d = s1[j] - s1[i]
                value = previous[i] + max(s2[j] - s2[i] - d * d / (s0[j] - s0[i]), 0.0)
                if value < best:
                    best = value
                    best_i = i
            current[j] = best
            arg[layer, j] = best_i
            stack[depth] = (jlo, j - 1, ilo, best_i)
            stack[depth + 1] = (j + 1, jhi, best_i, ihi)
            depth += 2
        previous, current = current, previous
    stop = n
    for layer in range(k - 1, -1, -1):
        start = arg[layer, stop] if layer > 0 else 0
        total = 0.0
        weight = 0.0
        for i in range(start, stop):
            total += counts[i] * (values[i] - values[start])
            weight += counts[i]
        mean = values[start] + total / weight
        error = 0.0
        for i in range(start, stop):
            error += counts[i] * (values[i] - mean) ** 2
        centroids[layer] = mean
        errors[layer] = error
        stop = start
    return k
