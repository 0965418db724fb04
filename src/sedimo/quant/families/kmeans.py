"""Codebooks by exact one-dimensional k-means: per output channel (`kmc`) or per tensor (`kma`).

The fit is the optimum over all codebooks: it is computed in float64, and a row either proves its own optimality
or is solved again by dynamic programming in doubled precision. What is stored is the codebook rounded to
float16; codes are the nearest stored centroid, the lower one at equal distance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sedimo.errors import InputError
from sedimo.quant.families.family import FEEDBACK_WORK, CostEstimate, Family, Parameters, Stored, Words, over_rows

if TYPE_CHECKING:
    from sedimo.quant.formats import Format

_SAMPLE = 1 << 17  # values that a codebook of a tensor is estimated from, when they are not 16 bits wide
_LEAST_NORMAL = 2.0**-14  # of float16
_MODEST = 2.0**-9  # a row with a centroid this large is rounded by at least 2^-21, which makes subnormals harmless
Array = NDArray[np.float64]
Values = NDArray[np.float32]
Codebooks = tuple[Tensor, Tensor]  # centroids float64 `[R, K]`, sorted, and squared errors of rows float64 `[R]`


class KMeans(Family):
    """`codebook` `[C, 2^b]`, or `[1, 2^b]` of a whole tensor: float16, rarely float32, sorted."""

    dtypes = {"codebook": (torch.float16, torch.float32)}  # noqa: RUF012 -- a constant, as in Family

    def __init__(self, name: str, words: Words, *, is_shared: bool) -> None:
        self.name, self.words, self._is_shared = name, words, is_shared

    def tensors(self, number_format: Format, n_channels: int, n_inputs: int) -> Stored:
        return {"codebook": (torch.float16, (1 if self._is_shared else n_channels, number_format.n_levels))}

    def fit(self, rows: Tensor, formats: Sequence[Format], weight: Tensor) -> dict[Format, Parameters]:
        return _fitted(formats, *read_values(weight)) if self._is_shared else _fitted(formats, rows.numpy())

    def codes(self, rows: Tensor, number_format: Format, parameters: Parameters) -> Tensor:
        from sedimo.quant.families._row_kernels import codebook_codes  # loaded here: importing compiles

        weights, limits, found = rows.numpy(), _thresholds(parameters["codebook"]), np.empty(rows.shape, np.uint8)
        over_rows(rows, lambda part: codebook_codes(weights[part], _own(limits, part), found[part]))
        return torch.from_numpy(found)

    def squared_errors(self, rows: Tensor, number_format: Format, parameters: Parameters, codes: Tensor) -> Tensor:
        from sedimo.quant.families._row_kernels import codebook_errors  # loaded here: importing compiles

        weights, chosen, found = rows.numpy(), codes.numpy(), np.empty(len(rows))
        centroids = parameters["codebook"].float().numpy()
        over_rows(rows, lambda part: codebook_errors(weights[part], _own(centroids, part), chosen[part], found[part]))
        return torch.from_numpy(found)

    def dequantize(self, number_format: Format, tensors: Mapping[str, Tensor]) -> Tensor:
        codes = tensors["codes"]
        rows = tensors["codebook"].float().expand(len(codes), -1)  # gather is 4 times as fast as indexing
        return torch.gather(rows, 1, codes.long())

    def estimates(
        self, rows: Tensor, formats: Sequence[Format], weight: Tensor, generator: torch.Generator
    ) -> dict[Format, CostEstimate]:
        """A codebook of the tensor is fitted on all values, and its error exact, unless that takes long."""
        if not self._is_shared:
            return super().estimates(rows, formats, weight, generator)
        if weight.element_size() > 2 and weight.numel() > _SAMPLE:
            index = torch.randint(weight.numel(), (_SAMPLE,), generator=generator)
            drawn = read_values(weight.detach().reshape(-1).cpu()[index])
            return self.row_estimates(rows, _fitted(formats, *drawn), len(weight))
        values, counts = read_values(weight)
        fitted = _fitted(formats, values, counts)
        return {f: CostEstimate(relative_error(values, counts, p["codebook"])) for f, p in fitted.items()}

    def feedback_codes(
        self, rows: Tensor, columns: Tensor, asked: Tensor, number_format: Format, parameters: Parameters
    ) -> Tensor:
        from sedimo.quant.families._row_kernels import feedback_codebook_codes  # loaded here: importing compiles

        weights, asks, found = rows.numpy(), asked.numpy(), np.empty(rows.shape, np.uint8)
        limits, centroids = _thresholds(parameters["codebook"]), parameters["codebook"].float().numpy()

        def task(part: slice) -> None:
            feedback_codebook_codes(weights[part], asks, _own(limits, part), _own(centroids, part), found[part])

        over_rows(rows, task, work=FEEDBACK_WORK)
        return torch.from_numpy(found)

    def complaint(self, number_format: Format, parameters: Parameters) -> str:
        is_sorted = bool((parameters["codebook"].diff(dim=1) >= 0).all())
        return "" if is_sorted else "codebook must be sorted in every row"


_KMC4 = "`kmc4` a codebook of 16 freely placed values per output channel"
_OF_CHANNELS = Words("a k-means codebook per output channel", example=_KMC4, mark="dot", rank=0)
_KMA4 = "`kma4` one codebook for the whole layer"
_OF_TENSOR = Words("one k-means codebook per layer", example=_KMA4, mark="ring", rank=2)
KMC = KMeans("kmc", _OF_CHANNELS, is_shared=False)
KMA = KMeans("kma", _OF_TENSOR, is_shared=True)


def fit_codebooks(rows: Values, n_levels: Sequence[int], counts: Array | None = None) -> list[Codebooks]:
    """Optimal codebooks of every row of finite values `[R, N]`, one for each number of levels, at least 2.

    All levels share one sort; rows with `counts` are sorted already. A row of fewer than K distinct values repeats its
    last centroid.
    """
    from sedimo.quant.families._kmeans_kernels import BLOCK, fit_distinct, fit_rows  # loaded here: importing compiles

    levels = np.array(sorted(set(n_levels), reverse=True), dtype=np.int64)
    ends, weights = levels.cumsum(), np.empty(0) if counts is None else counts
    centroids, errors = np.empty((len(rows), ends[-1])), np.empty((len(rows), len(levels)))

    def task(own: slice) -> None:
        known, found, left = rows[own], centroids[own], errors[own]
        known = np.sort(known, axis=1) if counts is None else known
        fit_rows(known, weights, levels, BLOCK, found, left)
        for row, index in np.argwhere(left < 0):  # unsolved
            distinct, first = np.unique(known[row], return_index=True)
            n_each = np.add.reduceat(weights if len(weights) else np.ones(known.shape[1]), first)
            book = found[row, ends[index] - levels[index] : ends[index]]
            left[row, index] = fit_distinct(distinct.astype(np.float64), n_each, book)

    over_rows(rows, task)
    books = np.split(centroids, ends[:-1], axis=1)
    columns = [levels.tolist().index(k) for k in n_levels]
    return [(torch.from_numpy(books[i].copy()), torch.from_numpy(errors[:, i].copy())) for i in columns]


def read_values(weight: Tensor) -> tuple[Values, Array]:
    """All values of a tensor as a sorted row `[1, N]`, and how often each occurs; empty: once each.

    Those of a 16-bit float, at most 65,536 different ones, are counted.
    """
    if weight.element_size() == 2:
        from sedimo.quant.families._row_kernels import count_patterns  # loaded here: importing compiles

        n_each = np.zeros(1 << 16, dtype=np.int64)
        count_patterns(weight.detach().cpu().contiguous().view(torch.uint16).numpy().reshape(-1), n_each)
        patterns = np.nonzero(n_each)[0]
        values = torch.from_numpy(patterns.astype(np.uint16)).view(weight.dtype).to(torch.float32).numpy()
        order = np.argsort(values)
        values, counts = values[order], n_each[patterns][order].astype(np.float64)
    else:
        values, counts = np.sort(weight.detach().to(torch.float32).cpu().numpy(), axis=None), np.empty(0)
    if not np.isfinite(values[[0, -1]]).all():  # NaN is sorted last
        raise InputError("some of its values are NaN or infinity (as float32). Leave it at fp16.")
    return values[np.newaxis], counts


def relative_error(values: Values, counts: Array, codebook: Tensor) -> float:
    """Squared error of all values with their nearest stored centroids `[1, K]`, over their squared norm."""
    codes = np.searchsorted(_thresholds(codebook)[0], values[0])
    wide = values[0].astype(np.float64)
    weights = counts if len(counts) else np.ones(len(wide))
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


def _fitted(formats: Sequence[Format], rows: Values, counts: Array | None = None) -> dict[Format, Parameters]:
    books = fit_codebooks(rows, [f.n_levels for f in formats], counts)
    return {f: {"codebook": stored_codebook(centroids)} for f, (centroids, _) in zip(formats, books, strict=True)}


def _thresholds(codebook: Tensor) -> Values:
    """float32 numbers that a float32 weight exceeds exactly when it exceeds the middle of two centroids."""
    wide = codebook.to(torch.float64).numpy()
    middles = (wide[:, 1:] + wide[:, :-1]) / 2
    rounded: Values = middles.astype(np.float32)
    np.nextafter(rounded, np.float32(-np.inf), out=rounded, where=rounded > middles)
    return rounded


def _own(table: Values, part: slice) -> Values:
    """What belongs to some rows; one codebook is that of all."""
    return table if len(table) == 1 else table[part]
