"""Several tables as one: where signals err in different places, their mean errs less.

`geometric_mean` needs costs of one kind (relative noise, of two methods). `rank_average` looks at the order alone, so
that tables in any units can be combined.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.stats import rankdata

from sedimo.allocation.costs import CostEstimate
from sedimo.allocation.table import Cost, SensitivityTable
from sedimo.errors import InputError


def geometric_mean(first: SensitivityTable, second: SensitivityTable) -> SensitivityTable:
    """Cost = sqrt(first x second), after the second was scaled to the first's geometric mean.

    The relative standard errors are combined as if independent. What one table forbids stays forbidden.

    Raises:
        InputError: the tables are about other choices.
    """
    if first.index.keys() != second.index.keys() or first.layers != second.layers:
        raise InputError(f"the tables {first.method} and {second.method} are about different choices")
    pairs = [(c, second.index[key]) for key, c in first.index.items()]
    logs = [math.log(a.cost / b.cost) for a, b in pairs if 0 < a.cost < math.inf and 0 < b.cost < math.inf]
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
        streams=first.streams,
    )


def rank_average(tables: Sequence[SensitivityTable]) -> SensitivityTable:
    """Each choice costs what the first table takes at the choice's rank, averaged over the tables.

    The ranks are those of a choice among all choices of its table, equal costs sharing their mean rank; between two
    ranks the first table's costs are interpolated. So costs still add, in the first table's unit, tables of one order
    give the first one back, and a rising transformation of any other table changes nothing. What one table forbids
    stays forbidden. The standard error is that of the mean rank: how much the tables disagree; `n` is their number.

    Raises:
        InputError: fewer than two tables, or tables about other choices.
    """
    if len(tables) < 2:
        raise InputError(f"averaging ranks takes at least two tables, got {len(tables)}")
    first = tables[0]
    for other in tables[1:]:
        if first.index.keys() != other.index.keys() or first.layers != other.layers:
            raise InputError(f"the tables {first.method} and {other.method} are about different choices")
    costs = np.array([[table.index[key].cost for key in first.index] for table in tables])  # [T, V]
    allowed = np.isfinite(costs).all(axis=0)
    ranks = rankdata(costs[:, allowed], axis=1) - 1
    mean, error = ranks.mean(axis=0), ranks.std(axis=0, ddof=1) / math.sqrt(len(tables))
    ladder = np.sort(costs[0, allowed])
    value, low, high = (np.interp(at, np.arange(len(ladder)), ladder) for at in (mean, mean - error, mean + error))
    found = np.full((2, costs.shape[1]), [[math.inf], [0.0]])
    found[:, allowed] = value, (high - low) / 2
    estimates = (CostEstimate(float(v), float(e), len(tables)) for v, e in found.T)
    method = f"rank average of {', '.join(table.method for table in tables)}"
    settings = {f"{table.method}.{k}": v for table in tables for k, v in table.settings.items()}
    entries = tuple(_with(cost, one) for cost, one in zip(first.index.values(), estimates, strict=True))
    return replace(first, method=method, costs=entries, settings=settings)


def _mean(first: Cost, second: Cost, scale: float) -> CostEstimate:
    if math.inf in (first.cost, second.cost):
        return CostEstimate(math.inf, 0.0, min(first.n, second.n))
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
