"""Codebooks by exact one-dimensional k-means: per output channel (`kmc`) or per tensor (`kma`).

The fit is the optimum over all codebooks: it is computed in float64, and a row either proves its own optimality
or is solved again by dynamic programming in doubled precision. What is stored is the codebook rounded to
float16; codes are the nearest stored centroid, the lower one at equal distance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sedimo.errors import InputError
from sedimo.quant.families.family import FEEDBACK_WORK, ErrorEstimate, Family, Parameters, Stored, Words, over_rows

if TYPE_CHECKING:
    from sedimo.quant.formats import Format

_SAMPLE = 1 << 17  # values that a codebook of a tensor is estimated from, when they are not 16 bits wide
_LEAST_NORMAL = 2.0**-14  # of float16
_MODEST = 2.0**-9  # a row with a centroid this large is rounded by at least 2^-21, which makes subnormals harmless
_N_PATTERNS = 1 << 16
Array = NDArray[np.float64]
Values = tuple[NDArray[np.float32], Array]  # of a tensor, sorted, and how often each occurs; empty: once each
Codebooks = tuple[Tensor, Tensor]  # centroids float64 `[R, K]`, sorted, and squared errors of rows float64 `[R]`


class KMeans(Family):
    """`codebook` `[C, 2^b]`, or `[1, 2^b]` of a whole tensor: float16, rarely float32, sorted."""

    dtypes = {"codebook": (torch.float16, torch.float32)}  # noqa: RUF012 -- a constant, as in Family

    def __init__(self, name: str, words: Words, *, is_shared: bool) -> None:
        """One codebook of all channels if `is_shared`."""
        self.name, self.words, self._is_shared = name, words, is_shared

    def tensors(self, number_format: Format, n_channels: int, n_inputs: int) -> Stored:
        return {"codebook": (torch.float16, (1 if self._is_shared else n_channels, number_format.n_levels))}

    def fit(self, rows: Tensor, formats: Sequence[Format], weight: Tensor) -> dict[Format, Parameters]:
        if self._is_shared:
            return _fit_shared(read_values(weight), formats)
        return _stored(formats, fit_codebooks(rows, [f.n_levels for f in formats]))

    def codes(self, rows: Tensor, number_format: Format, parameters: Parameters) -> Tensor:
        return _nearest(rows, parameters["codebook"], are_errors_wanted=False)

    def squared_errors(self, rows: Tensor, number_format: Format, parameters: Parameters) -> Tensor:
        return _nearest(rows, parameters["codebook"], are_errors_wanted=True)

    def dequantize(self, number_format: Format, tensors: Mapping[str, Tensor]) -> Tensor:
        codes = tensors["codes"]
        rows = tensors["codebook"].float().expand(len(codes), -1)  # gather is 4 times as fast as indexing
        return torch.gather(rows, 1, codes.long())

    def estimates(
        self, rows: Tensor, formats: Sequence[Format], weight: Tensor, generator: torch.Generator
    ) -> dict[Format, ErrorEstimate]:
        """A codebook of the tensor is fitted on all values, and its error exact, unless that takes long."""
        if not self._is_shared:
            return super().estimates(rows, formats, weight, generator)
        if weight.element_size() > 2 and weight.numel() > _SAMPLE:
            index = torch.randint(weight.numel(), (_SAMPLE,), generator=generator)
            drawn = read_values(weight.detach().reshape(-1).cpu()[index])
            return self.row_estimates(rows, _fit_shared(drawn, formats), len(weight))
        values = read_values(weight)
        fitted = _fit_shared(values, formats)
        return {f: ErrorEstimate(relative_error(values, p["codebook"]), 0.0, len(weight)) for f, p in fitted.items()}

    def feedback_codes(
        self, rows: Tensor, columns: Tensor, asked: Tensor, number_format: Format, parameters: Parameters
    ) -> Tensor:
        from sedimo.quant.families._row_kernels import feedback_codebook_codes  # loaded here: importing compiles

        weights, asks, found = rows.numpy(), asked.numpy(), np.empty(rows.shape, np.uint8)
        limits, centroids = _thresholds(parameters["codebook"]), parameters["codebook"].float().numpy()

        def task(part: slice) -> None:
            own = slice(None) if self._is_shared else part
            feedback_codebook_codes(weights[part], asks, limits[own], centroids[own], found[part])

        over_rows(rows, task, work=FEEDBACK_WORK)
        return torch.from_numpy(found)

    def complaint(self, number_format: Format, parameters: Parameters) -> str:
        is_sorted = bool((parameters["codebook"].diff(dim=1) >= 0).all())
        return "" if is_sorted else "codebook must be sorted in every row"


_OF_CHANNELS = Words(
    "a k-means codebook per output channel",
    example="`kmc4` a codebook of 16 freely placed values per output channel",
    mark="dot",
    rank=0,
)
_OF_TENSOR = Words(
    "one k-means codebook per layer", example="`kma4` one codebook for the whole layer", mark="ring", rank=2
)
KMC = KMeans("kmc", _OF_CHANNELS, is_shared=False)
KMA = KMeans("kma", _OF_TENSOR, is_shared=True)


def fit_codebooks(rows: Tensor, n_levels: Sequence[int]) -> list[Codebooks]:
    """Optimal codebooks of every row of finite, contiguous float32 `[R, N]`, one for each number of levels, at least 2.

    All levels share one sort. A row of fewer than K distinct values repeats its last centroid.
    """
    values = rows.numpy()

    def fill(levels: NDArray[np.int64], centroids: Array, errors: Array) -> None:
        def task(own: slice) -> None:
            _fit_sorted(np.sort(values[own], axis=1), np.empty(0), levels, centroids[own], errors[own])

        over_rows(rows, task)

    return _fit_levels(len(rows), n_levels, fill)


def read_values(weight: Tensor) -> Values:
    """All values of a finite tensor: those of a 16-bit float, at most 65,536 different ones, are counted."""
    if weight.element_size() != 2:
        return np.sort(weight.detach().to(torch.float32).cpu().numpy(), axis=None), np.empty(0)
    from sedimo.quant.families._row_kernels import count_patterns  # loaded here: importing compiles

    patterns = weight.detach().cpu().contiguous().view(torch.uint16).numpy().reshape(-1)
    counts = np.zeros(_N_PATTERNS, dtype=np.int64)
    count_patterns(patterns, counts)
    used = np.nonzero(counts)[0]
    values = torch.from_numpy(used.astype(np.uint16)).view(weight.dtype).to(torch.float32).numpy()
    order = np.argsort(values)
    return values[order], counts[used][order].astype(np.float64)


def fit_tensor_codebooks(values: Values, n_levels: Sequence[int]) -> list[Codebooks]:
    """Optimal codebooks of all values together, `[1, K]`, one for each number of levels."""
    rows, counts = values[0][np.newaxis], values[1]
    return _fit_levels(1, n_levels, lambda *targets: _fit_sorted(rows, counts, *targets))


def relative_error(values: Values, codebook: Tensor) -> float:
    """Squared error of all values with their nearest stored centroids `[1, K]`, over their squared norm."""
    distinct, counts = values
    codes = np.searchsorted(_thresholds(codebook)[0], distinct)
    wide = distinct.astype(np.float64)
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


def _fit_shared(values: Values, formats: Sequence[Format]) -> dict[Format, Parameters]:
    """The codebooks of all values together."""
    if not np.isfinite(values[0][[0, -1]]).all():  # NaN is sorted last
        raise InputError("some of its values are NaN or infinity (as float32). Leave it at fp16.")
    return _stored(formats, fit_tensor_codebooks(values, [f.n_levels for f in formats]))


def _stored(formats: Sequence[Format], books: Sequence[Codebooks]) -> dict[Format, Parameters]:
    return {f: {"codebook": stored_codebook(centroids)} for f, (centroids, _) in zip(formats, books, strict=True)}


def _fit_levels(
    n_rows: int, n_levels: Sequence[int], fill: Callable[[NDArray[np.int64], Array, Array], None]
) -> list[Codebooks]:
    """The codebooks of each number of levels, which `fill` writes side by side, that of most levels first."""
    levels = np.array(sorted(set(n_levels), reverse=True), dtype=np.int64)
    centroids, errors = np.empty((n_rows, levels.sum())), np.empty((n_rows, len(levels)))
    fill(levels, centroids, errors)
    books = np.split(centroids, levels.cumsum()[:-1], axis=1)
    columns = [levels.tolist().index(k) for k in n_levels]
    return [(torch.from_numpy(books[i].copy()), torch.from_numpy(errors[:, i].copy())) for i in columns]


def _fit_sorted(
    rows: NDArray[np.float32], counts: Array, levels: NDArray[np.int64], centroids: Array, errors: Array
) -> None:
    from sedimo.quant.families._kmeans_kernels import BLOCK, fit_distinct, fit_rows  # loaded here: importing compiles

    fit_rows(rows, counts, levels, BLOCK, centroids, errors)
    ends = levels.cumsum()
    for row, index in np.argwhere(errors < 0):  # unsolved
        distinct, first = np.unique(rows[row], return_index=True)
        weights = counts if len(counts) else np.ones(rows.shape[1])
        found = np.empty(levels[index])
        errors[row, index] = fit_distinct(distinct.astype(np.float64), np.add.reduceat(weights, first), found)
        centroids[row, ends[index] - levels[index] : ends[index]] = found


def _thresholds(codebook: Tensor) -> NDArray[np.float32]:
    """float32 numbers that a float32 weight exceeds exactly when it exceeds the middle of two centroids."""
    wide = codebook.to(torch.float64).numpy()
    middles = (wide[:, 1:] + wide[:, :-1]) / 2
    rounded: NDArray[np.float32] = middles.astype(np.float32)
    np.nextafter(rounded, np.float32(-np.inf), out=rounded, where=rounded > middles)
    return rounded


def _nearest(rows: Tensor, codebook: Tensor, *, are_errors_wanted: bool) -> Tensor:
    """The nearest codes uint8 `[R, N]`, or the squared error of each row with them, float64 `[R]`."""
    from sedimo.quant.families._row_kernels import codebook_codes, codebook_errors  # loaded here: importing compiles

    values, limits, centroids = rows.numpy(), _thresholds(codebook), codebook.to(torch.float32).numpy()
    found = np.empty(len(rows)) if are_errors_wanted else np.empty(rows.shape, np.uint8)

    def task(part: slice) -> None:
        own = slice(None) if len(centroids) == 1 else part
        codes = np.empty(values[part].shape, np.uint8) if are_errors_wanted else found[part]
        codebook_codes(values[part], limits[own], codes)
        if are_errors_wanted:
            codebook_errors(values[part], centroids[own], codes, found[part])

    over_rows(rows, task)
    return torch.from_numpy(found)
