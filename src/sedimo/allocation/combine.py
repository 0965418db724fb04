"""Several tables: as one, and how far they agree with one another and with measurements.

Where signals err in different places, their mean errs less. `geometric_mean` needs costs of one kind (relative noise,
of two methods). `rank_average` looks at the order alone, so that tables in any units can be combined.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from sedimo.allocation.table import Cost, SensitivityTable
from sedimo.errors import InputError
from sedimo.metrics.estimate import Estimate
from sedimo.metrics.ranking import LEAST_RECIPES, prediction_quality, rank_correlation
from sedimo.quant.formats import Format


def geometric_mean(first: SensitivityTable, second: SensitivityTable) -> SensitivityTable:
    """Cost = sqrt(first x second), after the second was scaled to the first's geometric mean.

    The relative standard errors are combined as if independent. What one table forbids stays forbidden.
    """
    _refuse_other_choices(first, second)
    pairs = [(c, second.index[key]) for key, c in first.index.items()]
    logs = [math.log(a.cost / b.cost) for a, b in pairs if 0 < a.cost < math.inf and 0 < b.cost < math.inf]
    scale = math.exp(sum(logs) / len(logs)) if logs else 1.0
    costs = tuple(_mean(a, b, scale) for a, b in pairs)
    return replace(first, method=f"{first.method}+{second.method}", costs=costs, settings=_settings(first, second))


def rank_average(tables: Sequence[SensitivityTable]) -> SensitivityTable:
    """Each choice costs what the first table takes at the choice's rank, averaged over the tables.

    The ranks are those of a choice among all choices of its table, equal costs sharing their mean rank; between two
    ranks the first table's costs are interpolated. So costs still add, in the first table's unit, tables of one order
    give the first one back, and a rising transformation of any other table changes nothing. What one table forbids
    stays forbidden. The standard error is that of the mean rank: how much the tables disagree; `n` is their number.
    """
    if len(tables) < 2:
        raise InputError(f"averaging ranks takes at least two tables, got {len(tables)}")
    first = tables[0]
    for other in tables[1:]:
        _refuse_other_choices(first, other)
    costs = np.array([[table.index[key].cost for key in first.index] for table in tables])  # [T, V]
    allowed = np.isfinite(costs).all(axis=0)
    ranks = stats.rankdata(costs[:, allowed], axis=1) - 1
    mean, error = ranks.mean(axis=0), ranks.std(axis=0, ddof=1) / math.sqrt(len(tables))
    ladder = np.sort(costs[0, allowed])
    value, low, high = (np.interp(at, np.arange(len(ladder)), ladder) for at in (mean, mean - error, mean + error))
    found = np.full((2, costs.shape[1]), [[math.inf], [0.0]])
    found[:, allowed] = value, (high - low) / 2
    entries = tuple(
        replace(c, cost=v, standard_error=e, n=len(tables))
        for c, (v, e) in zip(first.costs, found.T.tolist(), strict=True)
    )
    method = f"rank average of {', '.join(table.method for table in tables)}"
    return replace(first, method=method, costs=entries, settings=_settings(*tables))


def _refuse_other_choices(first: SensitivityTable, second: SensitivityTable) -> None:
    if first.index.keys() != second.index.keys() or first.layers != second.layers:
        raise InputError(f"the tables {first.method} and {second.method} are about different choices")


def _settings(*tables: SensitivityTable) -> dict[str, str]:
    return {f"{table.method}.{k}": v for table in tables for k, v in table.settings.items()}


def _mean(first: Cost, second: Cost, scale: float) -> Cost:
    value, error = math.inf, 0.0
    if math.inf not in (first.cost, second.cost):
        value = math.sqrt(first.cost * second.cost * scale)
    if 0 < value < math.inf:
        error = value * (math.hypot(first.standard_error / first.cost, second.standard_error / second.cost) / 2)
    return replace(first, cost=value, standard_error=error, n=min(first.n, second.n))


@dataclass(frozen=True, slots=True)
class Agreement:
    """Predicted against measured noise of `n` pairs.

    `slope` is that of the least-squares line of log measured on log predicted, 1 when one is proportional to the
    other; `ratio` the geometric mean of measured / predicted, `srcc` Spearman's rank correlation.
    """

    n: int
    slope: float
    slope_standard_error: float
    ratio: float
    srcc: float
    predicted: tuple[float, ...]
    measured: tuple[float, ...]


def agreement(predicted: Sequence[float], measured: Sequence[float]) -> Agreement:
    """How well predictions agree with measurements."""
    if len(predicted) != len(measured) or len(predicted) < 3:
        raise InputError(f"agreement needs at least three pairs, got {len(predicted)} and {len(measured)} numbers")
    if not all(0 < v < math.inf for v in (*predicted, *measured)):
        raise InputError("agreement is about positive finite noise powers")
    x, y = np.log(np.asarray(predicted, dtype=np.float64)), np.log(np.asarray(measured, dtype=np.float64))
    line = stats.linregress(x, y) if np.ptp(x) > 0 else None
    return Agreement(
        n=len(predicted),
        slope=float(line.slope) if line else math.nan,
        slope_standard_error=float(line.stderr) if line else math.nan,
        ratio=math.exp(float((y - x).mean())),
        srcc=rank_correlation(x, y, of_constant=math.nan),
        predicted=tuple(map(float, predicted)),
        measured=tuple(map(float, measured)),
    )


def predict(table: SensitivityTable, choice: Mapping[str, Format]) -> float:
    """Noise that a table predicts for a recipe: the sum of the costs of its choices."""
    taken = [(decision, f) for decision, f in choice.items() if f.is_quantized]
    for decision, f in taken:
        if (decision, f) not in table.index:
            raise InputError(f"the {table.method} table has no cost for {decision} at {f}")
    return sum(table.index[key].cost for key in taken)


def agreement_about_operations(
    truth: SensitivityTable, tables: Mapping[str, SensitivityTable], bits: float
) -> dict[str, Estimate]:
    """Kendall's tau between operations' costs by each of some tables and by a true one, with bootstrap intervals.

    An operation's cost is the mean over its decisions, at each one's format nearest to `bits`. Fewer than three
    operations have no order worth a number.
    """
    wanted, found = _of_operations(truth, bits), {}
    for method, table in tables.items() if len(wanted) >= LEAST_RECIPES else ():
        costs = _of_operations(table, bits)
        found[method] = prediction_quality([costs[name] for name in wanted], list(wanted.values())).kendall_tau
    return found


def _of_operations(table: SensitivityTable, bits: float) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for decision, costs in table.by_decision.items():
        if quantized := [c for c in costs if c.format.is_quantized]:
            nearest = min(quantized, key=lambda c: (abs(8 * c.paper_bytes / table.params[decision] - bits), c.cost))
            found.setdefault(table.operations[decision], []).append(nearest.cost)
    return {name: float(np.mean(values)) for name, values in found.items()}
