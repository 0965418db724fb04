"""What a family of number formats owns, and what it gets for nothing.

A `Family` is all that is known of one kind of format: how it is written, which widths it has, how a weight is fitted,
which tensors are stored and how they become numbers again, what it is called in a report. Whoever writes one gives
`name`, `words`, `tensors`, `fit`, `codes` and `dequantize`; everything else has an answer here that may be replaced by
a better one. Bytes are counted from `tensors`.

Codes are whole numbers below 2^bits, uint8 `[C, N]`, one per weight; parameters are all other stored tensors, by name.
Rows are a weight `[out, in, ...]` as finite float32 `[C, N]` on the CPU, one row per output channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sedimo.errors import InputError

if TYPE_CHECKING:
    from sedimo.quant.formats import Format  # which asks FAMILIES, and so cannot be imported here

Parameters = Mapping[str, Tensor]
Stored = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape by name
_CHUNK = 1 << 17  # weights per task: independent of the threads, so that results are too
FEEDBACK_WORK = 32  # of a weight whose codes make up for others, as a multiple of a plain rounding's


class Words(NamedTuple):
    """What people read of a family.

    `summary` goes on after "of the weights, ... serves 30 %", `grouped` instead of it where a format has a group size;
    `example` explains one format in the glossary; `mark` is drawn in maps. Of formats that come equally near to a
    budget, reports compare layers at the one of the least `rank`.
    """

    summary: str
    grouped: str = ""
    example: str = ""
    mark: Literal["", "dash", "dot", "ring"] = "dash"
    rank: int = 9


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """A number with its standard error; `n` samples are behind it, 0 when it is exact."""

    value: float
    standard_error: float = 0.0
    n: int = 0


class Family(Protocol):
    """One kind of number format.

    `widths` are the bits that it has; `takes_groups` says whether a format may have a group size (`uaq4g64`).
    `is_uniform`: codes are steps of a grid, so that products can be computed on them, their rounding can be learned
    (see `grid`), and bit operations count the format's own bits. `dtypes` names the stored tensors whose dtype depends
    on the weight, and the dtypes that each may have, the usual one first. The numerics of a foreign family are those of
    another program, for which it is fitted, measured, counted and exported; Sedimo's own checkpoint does not hold it.
    """

    name: str
    words: Words
    widths: Sequence[int] = range(2, 9)
    takes_groups: bool = False
    is_uniform: bool = False
    is_foreign: bool = False
    dtypes: Mapping[str, tuple[torch.dtype, ...]] = {}

    @property
    def spelling(self) -> str:
        """How a format is written, before group size and activation bits: `uaq{bits}`."""
        return f"{self.name}{{bits}}"

    @property
    def label(self) -> str:
        """Its name for people; that of its format if it has one alone."""
        return self.name if len(self.widths) > 1 else self.spelling.format(bits=self.widths[0])

    def tensors(self, number_format: Format, n_channels: int, n_inputs: int) -> Stored:
        """Dtype and shape of each stored tensor but the codes, of a weight `[C, N]`."""
        ...

    def fit(self, rows: Tensor, formats: Sequence[Format], weight: Tensor) -> dict[Format, Parameters]:
        """The parameters of each format for these rows.

        `weight` is the whole weight as it came, for what all of its values decide; rows may be some of it only.

        Raises:
            UnfitFormatError: a format cannot hold such values.
        """
        ...

    def codes(self, rows: Tensor, number_format: Format, parameters: Parameters) -> Tensor:
        """The codes of rows: the nearest that the parameters have."""
        ...

    def dequantize(self, number_format: Format, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weights float32 `[C, N]` that parameters and unpacked `codes` stand for, on their device; plain torch."""
        ...

    def refusal(self, number_format: Format, shape: Sequence[int]) -> str:
        """Why a weight of this shape cannot take the format; empty if it can."""
        return ""

    def complaint(self, number_format: Format, parameters: Parameters) -> str:
        """What is wrong with parameters of the right dtypes and shapes; empty if a fit may give such."""
        return ""

    def squared_errors(self, rows: Tensor, number_format: Format, parameters: Parameters, codes: Tensor) -> Tensor:
        """Sum of squared errors of each row with its codes, float64 `[C]`."""
        found = self.dequantize(number_format, {**parameters, "codes": codes})
        return (found.double() - rows.double()).square().sum(dim=1)

    def estimates(
        self, rows: Tensor, formats: Sequence[Format], weight: Tensor, generator: torch.Generator
    ) -> dict[Format, CostEstimate]:
        """The relative squared error of each format on a weight, from some of its rows, which are its samples."""
        return self.row_estimates(rows, self.fit(rows, formats, weight), len(weight))

    def row_estimates(
        self, rows: Tensor, fitted: Mapping[Format, Parameters], n_all: int
    ) -> dict[Format, CostEstimate]:
        """The error of fitted formats on a weight of `n_all` rows, a ratio of sums over some, with standard error."""
        norms, n, found = squared_norms(rows), len(rows), {}
        total = float(norms.sum())
        for number_format, parameters in fitted.items():
            codes = self.codes(rows, number_format, parameters)
            errors = self.squared_errors(rows, number_format, parameters, codes)
            mean = float(errors.sum()) / total if total else 0.0
            spread = 0.0
            if total and n < n_all:
                variance = float(((errors - mean * norms) ** 2).sum()) / (n - 1)
                spread = math.sqrt((1 - n / n_all) * variance / n) / (total / n)
            found[number_format] = CostEstimate(mean, spread, n if n < n_all else 0)
        return found

    def feedback_codes(
        self, rows: Tensor, columns: Tensor, asked: Tensor, number_format: Format, parameters: Parameters
    ) -> Tensor | None:
        """Codes by error feedback; None if the family has nothing but its nearest codes.

        Columns of `rows` are in the order of rounding, `columns` int64 `[n]` says which of the weight's each is, and
        `asked` `[n, n]`, lower triangular, in row j what a unit of error in each earlier column asks of column j.
        """
        return None

    def grid(self, number_format: Format, parameters: Parameters, n_inputs: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each weight of a uniform family, float32 `[C, N]` or `[C, 1]`."""
        raise InputError(f"{number_format} has no uniform grid")


def squared_norms(rows: Tensor) -> Tensor:
    """Squared norm of each row, float64 `[C]`."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms.square_()


def over_rows(rows: Tensor | NDArray[np.float32], task: Callable[[slice], None], *, work: int = 1) -> None:
    """Calls a task with consecutive ranges of rows, on as many threads as torch may use; it must release the lock.

    `work` is that of one weight, as a multiple of a plain rounding's.
    """
    step = max(1, _CHUNK // max(rows.shape[1] * work, 1))
    parts = [slice(start, min(start + step, len(rows))) for start in range(0, len(rows), step)]
    n_threads = min(torch.get_num_threads(), len(parts))
    if n_threads <= 1:
        for part in parts:
            task(part)
    else:
        with ThreadPoolExecutor(n_threads) as pool:
            list(pool.map(task, parts))
