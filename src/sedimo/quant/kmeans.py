"""Codebooks by exact one-dimensional k-means: per output channel (`kmc`) or per tensor (`kma`).

The fit is the optimum over all codebooks, computed in float64. What is stored is that codebook rounded to
float16 and sorted; codes are the nearest stored centroid, the lower one at equal distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LEAST_NORMAL = 2.0**-14  # of float16
_MODEST = 2.0**-9


@dataclass(frozen=True, slots=True)
class Codebooks:
    """Optimal centroids float64 `[R, K]`, sorted, and the sum of squared errors of each row, float64 `[R]`.

    A row of fewer than K distinct values repeats its last centroid.
    """

    centroids: Tensor
    squared_error: Tensor


def fit_codebooks(rows: Tensor, n_levels: Sequence[int]) -> list[Codebooks]:
    """Optimal codebooks of every row, one for each number of levels.

    Args:
        rows: float32 `[R, N]`, finite.
        n_levels: numbers of centroids.
    """
    found = [_fit_values(*np.unique(row, return_counts=True), n_levels) for row in rows.numpy()]
    return [
        Codebooks(
            torch.from_numpy(np.stack([f[i][0] for f in found])),
            torch.tensor([f[i][1] for f in found], dtype=torch.float64),
        )
        for i in range(len(n_levels))
    ]


def _fit_values(
    values: NDArray[np.float32], counts: NDArray[np.int64], n_levels: Sequence[int]
) -> list[tuple[NDArray[np.float64], float]]:
    from sedimo.quant._kmeans_kernels import layered

    found = []
    for k in n_levels:
        centroids, errors = np.empty(k), np.zeros(k)
        if len(values) <= k:
            centroids[:] = values[-1]
            centroids[: len(values)] = values
        else:
            layered(values.astype(np.float64), counts.astype(np.float64), k, centroids, errors)
        found.append((centroids, float(errors.sum())))
    return found


def stored_codebook(centroids: Tensor, rows: Tensor) -> Tensor:
    """The centroids float64 `[R, K]` as they are stored: float16, or float32 where float16's range would hurt.

    The whole codebook is float32 when a centroid overflows float16; when a centroid is subnormal in float16
    and its row has none of at least 2^-9 (else the rounding of the larger centroids is the coarser one);
    or when a constant row would not come back exactly.
    """
    half = centroids.to(torch.float16)
    magnitude = centroids.abs()
    is_subnormal = (magnitude > 0) & (magnitude < _LEAST_NORMAL)
    is_tiny_row = magnitude.amax(dim=1, keepdim=True) < _MODEST
    is_constant = (centroids[:, :1] == centroids).all(dim=1, keepdim=True)
    hurts = torch.isinf(half) | (is_subnormal & is_tiny_row) | (is_constant & (half.to(torch.float64) != centroids))
    return centroids.to(torch.float32) if bool(hurts.any()) else half


def nearest_codes(rows: Tensor, codebook: Tensor) -> Tensor:
    """Codes uint8 `[R, N]` of the nearest centroid in a sorted codebook `[R, K]` or `[1, K]`."""
    wide = codebook.to(torch.float64)
    thresholds = ((wide[:, 1:] + wide[:, :-1]) / 2).expand(rows.shape[0], -1).contiguous()
    return torch.searchsorted(thresholds, rows.to(torch.float64)).to(torch.uint8)


def dequantize_codebook(codes: Tensor, codebook: Tensor) -> Tensor:
    """Weights float32 `[R, N]` of codes `[R, N]` in a codebook `[R, K]` or `[1, K]`."""
    wide = codebook.to(torch.float32)
    if wide.shape[0] == 1:
        return wide[0][codes.long()]
    return wide.gather(1, codes.long())
