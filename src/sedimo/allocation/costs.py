"""From numbers per candidate to a table: what all methods of relative noise share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sedimo.allocation.table import Cost, SensitivityTable
from sedimo.bank import Candidate
from sedimo.errors import InputError
from sedimo.quant.formats import FP16, Format, count_bops
from sedimo.space import Decision, SearchSpace

NOISE_POWER = "relative noise power"


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
    unit: str = NOISE_POWER,
    sees_activations: bool = False,
) -> SensitivityTable:
    """The table of one method; fp16 costs nothing. What sees weights alone is not asked about their activations.

    Raises:
        InputError: activations of several widths for one weight, and a method that does not see them.
    """
    candidates = tuple(candidates)
    if not sees_activations:
        _refuse_widths(method, candidates)

    def cost(c: Candidate) -> CostEstimate:
        is_changed = c.format != FP16 if sees_activations else c.format.is_quantized
        return estimate(c) if is_changed else EXACTLY_NOTHING

    costs = tuple(_cost(space.decision_index[c.decision], c, cost(c)) for c in candidates)
    decisions = space.decisions
    return SensitivityTable(
        method=method,
        unit=unit,
        denoiser=space.denoiser,
        costs=costs,
        layers=space.layers,
        operations={d.name: d.operation for d in decisions},
        blocks={d.name: d.block for d in decisions},
        params={d.name: d.params for d in decisions},
        settings=dict(settings),
        attention_bops=space.attention_bops,
        full_bops=space.full_bops,
        streams=space.streams,
    )


def _refuse_widths(method: str, candidates: Iterable[Candidate]) -> None:
    """Refuses candidates that differ in their activations alone, which would all cost the same."""
    seen: dict[tuple[str, Format], Format] = {}
    for c in candidates:
        other = seen.setdefault((c.decision, c.format.weight_format), c.format)
        if other != c.format:
            raise InputError(
                f"method {method!r} sees weights alone and cannot choose between {other} and {c.format} for "
                f"{c.decision!r}: use orthogonality (with importance of bits), or one width of activations"
            )


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
