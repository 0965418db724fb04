"""Codebooks by exact one-dimensional k-means: per output channel (`kmc`) or per tensor (`kma`).

The fit is the optimum over all codebooks: it is computed in float64, and a row either proves its own optimality
or is solved again by dynamic programming in doubled precision. What is stored is the codebook rounded to
float16; codes are the nearest stored centroid, the lower one at equal distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sedimo.quant._threads import over_rows

_LEAST_NORMAL = 2.0**-14  # of float16
_MODEST = 2.0**-9  # a row with a centroid this large is rounded by at least 2^-21, which makes subnormals harmless
_N_PATTERNS = 1 << 16


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
        rows: float32 `[R, N]`, finite, contiguous.
        n_levels: numbers of centroids, at least 2; several share one sort.
    """
    values = rows.numpy()
    levels = np.array(sorted(set(n_levels), reverse=True), dtype=np.int64)
    centroids, errors = np.empty((len(rows), levels.sum())), np.empty((len(rows), len(levels)))

    def task(start: int, stop: int) -> None:
        _fit_sorted(np.sort(values[start:stop], axis=1), np.empty(0), levels, centroids[start:stop], errors[start:stop])

    over_rows(len(values), values.shape[1], task)
    return _split(centroids, errors, levels, n_levels)


@dataclass(frozen=True, slots=True)
class Values:
    """Values of a tensor, sorted float32 `[M]`, and how often each occurs, float64 `[M]` or `[0]` for once each."""

    values: NDArray[np.float32]
    counts: NDArray[np.float64]


def read_values(weight: Tensor) -> Values:
    """All values of a finite tensor.

    Those of a 16-bit float are at most 65,536 different ones, which are counted; others are sorted.
    """
    if weight.element_size() == 2:
        return _histogram(weight)
    return Values(np.sort(weight.detach().to(torch.float32).cpu().numpy(), axis=None), np.empty(0))


def fit_tensor_codebooks(values: Values, n_levels: Sequence[int]) -> list[Codebooks]:
    """Optimal codebooks of all values together, `[1, K]`, one for each number of levels."""
    levels = np.array(sorted(set(n_levels), reverse=True), dtype=np.int64)
    centroids, errors = np.empty((1, levels.sum())), np.empty((1, len(levels)))
    _fit_sorted(values.values[np.newaxis], values.counts, levels, centroids, errors)
    return _split(centroids, errors, levels, n_levels)


def relative_error(values: Values, codebook: Tensor) -> float:
    """Squared error of all values with their nearest stored centroids `[1, K]`, over their squared norm."""
    codes = np.searchsorted(thresholds(codebook)[0], values.values)
    wide = values.values.astype(np.float64)
    weights = values.counts if len(values.counts) else np.ones(len(wide))
    norm = float(weights @ wide**2)
    return float(weights @ (codebook[0].double().numpy()[codes] - wide) ** 2) / norm if norm > 0 else 0.0


def stored_codebook(centroids: Tensor) -> Tensor:
    """The centroids float64 `[R, K]` as they are stored: float16, or float32 where float16's range would hurt.

    The whole codebook is float32 when a centroid overflows float16; when a centroid is subnormal in float16
    and its row has none of at least 2^-9 (else the rounding of the larger centroids is the coarser one);
    or when a row of one value would not come back exactly.
    """
    half = centroids.to(torch.float16)
    magnitude = centroids.abs()
    is_subnormal = (magnitude > 0) & (magnitude < _LEAST_NORMAL)
    is_tiny_row = magnitude.amax(dim=1, keepdim=True) < _MODEST
    is_constant = (centroids[:, :1] == centroids).all(dim=1, keepdim=True)
    hurts = torch.isinf(half) | (is_subnormal & is_tiny_row) | (is_constant & (half.to(torch.float64) != centroids))
    return centroids.to(torch.float32) if bool(hurts.any()) else half


def nearest_codes(rows: Tensor, codebook: Tensor) -> Tensor:
    """Codes uint8 `[R, N]` of the nearest centroid in a stored codebook `[R, K]` or `[1, K]`."""
    codes = torch.empty(rows.shape, dtype=torch.uint8)
    _assign(rows, codebook, codes, None)
    return codes


def squared_errors(rows: Tensor, codebook: Tensor) -> Tensor:
    """Sum of squared errors of each row with its nearest stored centroids, float64 `[R]`."""
    errors = torch.empty(len(rows), dtype=torch.float64)
    _assign(rows, codebook, None, errors)
    return errors


def dequantize_codebook(codes: Tensor, codebook: Tensor) -> Tensor:
    """Weights float32 `[R, N]` of codes `[R, N]` in a codebook `[R, K]` or `[1, K]`; on their device."""
    wide = codebook.to(torch.float32)
    if wide.shape[0] == 1:
        return wide[0][codes.long()]
    return wide.gather(1, codes.long())


def _fit_sorted(
    rows: NDArray[np.float32],
    counts: NDArray[np.float64],
    levels: NDArray[np.int64],
    centroids: NDArray[np.float64],
    errors: NDArray[np.float64],
) -> None:
    from sedimo.quant._kmeans_kernels import BLOCK, fit_rows  # loaded here: importing compiles

    fit_rows(rows, counts, levels, BLOCK, centroids, errors)
    ends = levels.cumsum()
    for row, index in np.argwhere(errors < 0):
        found = centroids[row, ends[index] - levels[index] : ends[index]]
        errors[row, index] = _fit_unsolved(rows[row], counts, found)


def _fit_unsolved(values: NDArray[np.float32], counts: NDArray[np.float64], centroids: NDArray[np.float64]) -> float:
    from sedimo.quant._kmeans_layers import fit_distinct  # loaded here: importing compiles

    distinct, first = np.unique(values, return_index=True)
    weights = counts if len(counts) else np.ones(len(values))
    found = np.empty(len(centroids))
    error = fit_distinct(distinct.astype(np.float64), np.add.reduceat(weights, first), found)
    centroids[:] = found
    return float(error)


def _split(
    centroids: NDArray[np.float64], errors: NDArray[np.float64], levels: NDArray[np.int64], n_levels: Sequence[int]
) -> list[Codebooks]:
    ends = dict(zip(levels.tolist(), levels.cumsum().tolist(), strict=True))
    column = {k: i for i, k in enumerate(levels.tolist())}
    books = torch.from_numpy(centroids)
    return [
        Codebooks(books[:, ends[k] - k : ends[k]].contiguous(), torch.from_numpy(errors[:, column[k]].copy()))
        for k in n_levels
    ]


def _histogram(weight: Tensor) -> Values:
    from sedimo.quant._row_kernels import count_patterns  # loaded here: importing compiles

    patterns = weight.detach().cpu().contiguous().view(torch.uint16).numpy().reshape(-1)
    counts = np.zeros(_N_PATTERNS, dtype=np.int64)
    count_patterns(patterns, counts)
    used = np.nonzero(counts)[0]
    values = torch.from_numpy(used.astype(np.uint16)).view(weight.dtype).to(torch.float32).numpy()
    order = np.argsort(values)
    return Values(values[order], counts[used][order].astype(np.float64))


def thresholds(codebook: Tensor) -> NDArray[np.float32]:
    """float32 numbers that a float32 weight exceeds exactly when it exceeds the middle of two centroids."""
    wide = codebook.to(torch.float64).numpy()
    middles = (wide[:, 1:] + wide[:, :-1]) / 2
    rounded: NDArray[np.float32] = middles.astype(np.float32)
    np.nextafter(rounded, np.float32(-np.inf), out=rounded, where=rounded > middles)
    return rounded


def _assign(rows: Tensor, codebook: Tensor, codes: Tensor | None, errors: Tensor | None) -> None:
    """Fills codes uint8 `[R, N]`, or squared errors float64 `[R]`, or both."""
    from sedimo.quant._row_kernels import codebook_codes, codebook_errors  # loaded here: importing compiles

    values, limits, centroids = rows.numpy(), thresholds(codebook), codebook.to(torch.float32).numpy()
    is_shared = len(centroids) == 1

    def task(start: int, stop: int) -> None:
        part = slice(None) if is_shared else slice(start, stop)
        found = np.empty((stop - start, values.shape[1]), np.uint8) if codes is None else codes.numpy()[start:stop]
        codebook_codes(values[start:stop], limits[part], found)
        if errors is not None:
            codebook_errors(values[start:stop], centroids[part], found, errors.numpy()[start:stop])

    over_rows(len(values), values.shape[1], task)
