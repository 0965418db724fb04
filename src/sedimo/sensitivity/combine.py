"""The geometric mean of two tables: where two signals err in different places, their mean errs less."""

from __future__ import annotations

import math

from sedimo.errors import InputError
from sedimo.sensitivity.costs import CostEstimate
from sedimo.sensitivity.table import Cost, SensitivityTable


def geometric_mean(first: SensitivityTable, second: SensitivityTable) -> SensitivityTable:
    """Cost = sqrt(first x second), after the second was scaled to the first's geometric mean.

    The relative standard errors are combined as if independent.

    Raises:
        InputError: the tables are about other choices.
    """
    if first.index.keys() != second.index.keys() or first.layers != second.layers:
        raise InputError(f"the tables {first.method} and {second.method} are about different choices")
    pairs = [(c, second.index[key]) for key, c in first.index.items()]
    logs = [math.log(a.cost / b.cost) for a, b in pairs if a.cost > 0 and b.cost > 0]
    scale = math.exp(sum(logs) / len(logs)) if logs else 1.0
    return SensitivityTable(
        method=f"{first.method}+{second.method}",
        unit=first.unit,
        denoiser=first.denoiser,
        costs=tuple(_with(a, _mean(a, b, scale)) for a, b in pairs),
        layers=first.layers,
        operations=first.operations,
        blocks=first.blocks,
        params=first.params,
        settings={
            **{f"{first.method}.{k}": v for k, v in first.settings.items()},
            **{f"{second.method}.{k}": v for k, v in second.settings.items()},
        },
        attention_bops=first.attention_bops,
        full_bops=first.full_bops,
    )


def _mean(first: Cost, second: Cost, scale: float) -> CostEstimate:
    value = math.sqrt(first.cost * second.cost * scale)
    if value == 0:
        return CostEstimate(0.0, 0.0, min(first.n, second.n))
    relative = math.hypot(first.standard_error / first.cost, second.standard_error / second.cost) / 2
    return CostEstimate(value, value * relative, min(first.n, second.n))


def _with(cost: Cost, estimate: CostEstimate) -> Cost:
    return Cost(
        cost.decision,
        cost.format,
        estimate.value,
        estimate.standard_error,
        estimate.n,
        cost.paper_bytes,
        cost.stored_bytes,
        cost.bops,
    )
