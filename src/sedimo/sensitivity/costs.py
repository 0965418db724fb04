"""From numbers per candidate to a table: what all methods of relative noise share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sedimo.bank import Candidate
from sedimo.quant.formats import FP16, FULL_BITS, Format
from sedimo.sensitivity.table import Cost, SensitivityTable
from sedimo.space import Decision, SearchSpace

UNIT = "relative noise power"


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """A number with its standard error; `n` samples are behind it, 0 when it is exact."""

    value: float
    standard_error: float = 0.0
    n: int = 0


EXACTLY_NOTHING = CostEstimate(0.0)


def build_table(
    method: str,
    space: SearchSpace,
    candidates: Iterable[Candidate],
    estimate: Callable[[Candidate], CostEstimate],
    settings: Mapping[str, str],
    *,
    unit: str = UNIT,
) -> SensitivityTable:
    """The table of one method; fp16 costs nothing."""
    costs = tuple(
        _cost(space.decision_index[c.decision], c, estimate(c) if c.format != FP16 else EXACTLY_NOTHING)
        for c in candidates
    )
    decisions = space.decisions
    return SensitivityTable(
        method=method,
        unit=unit,
        denoiser=space.denoiser,
        costs=costs,
        layers={d.name: d.layers for d in decisions},
        operations={d.name: d.operation for d in decisions},
        blocks={d.name: d.block for d in decisions},
        params={d.name: d.params for d in decisions},
        settings=dict(settings),
    )


def count_bops(macs: int, number_format: Format) -> int:
    """Bit operations [BOPs] of one sample and call: MACs times weight bits times activation bits.

    Codebooks count with 16 weight bits, because looked-up weights are multiplied in 16 bits.

    Source:
        Mills et al. 2024, Qua2SeDiMo (arXiv 2412.14628), accounting of the released code.
    """
    weight_bits = number_format.bits if number_format.family == "uaq" else FULL_BITS
    return macs * weight_bits * number_format.activation_bits


def mean_cost(values: npt.ArrayLike) -> CostEstimate:
    """Arithmetic mean of samples, with its standard error (not a number for one sample)."""
    found = np.asarray(values, dtype=np.float64)
    error = float(found.std(ddof=1)) / math.sqrt(found.size) if found.size > 1 else math.nan
    return CostEstimate(float(found.mean()), error, int(found.size))


def geometric_mean_cost(values: npt.ArrayLike) -> CostEstimate:
    """Geometric mean of samples, which is what a mean of decibels speaks of, with its standard error."""
    found = np.asarray(values, dtype=np.float64)
    if not found.all():
        return mean_cost(found)
    logarithm = mean_cost(np.log(found))
    value = math.exp(logarithm.value)
    return CostEstimate(value, value * logarithm.standard_error, logarithm.n)


def _cost(decision: Decision, candidate: Candidate, estimate: CostEstimate) -> Cost:
    return Cost(
        decision=candidate.decision,
        format=candidate.format,
        cost=estimate.value,
        standard_error=estimate.standard_error,
        n=estimate.n,
        paper_bytes=candidate.paper_bytes,
        stored_bytes=candidate.stored_bytes,
        bops=count_bops(decision.macs, candidate.format),
    )
