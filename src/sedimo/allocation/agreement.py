"""Do predictions agree with measurements, and tables with each other? With how many pairs are behind the answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from sedimo.allocation.table import SensitivityTable
from sedimo.errors import InputError
from sedimo.metrics.estimate import Estimate
from sedimo.metrics.ranking import LEAST_RECIPES, prediction_quality
from sedimo.quant.formats import Format


@dataclass(frozen=True, slots=True)
class Agreement:
    """Predicted against measured noise of `n` pairs.

    `slope` is that of the least-squares line of log measured on log predicted, with its standard error: 1 when
    one is proportional to the other. `ratio` is the geometric mean of measured / predicted, `srcc` Spearman's
    rank correlation. `predicted` and `measured` are the pairs themselves, for pictures.
    """

    n: int
    slope: float
    slope_standard_error: float
    ratio: float
    srcc: float
    predicted: tuple[float, ...]
    measured: tuple[float, ...]


def agreement(predicted: Sequence[float], measured: Sequence[float]) -> Agreement:
    """How well predictions agree with measurements.

    Raises:
        InputError: fewer than three pairs, or a number that is not positive.
    """
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
        srcc=_rank_correlation(x, y),
        predicted=tuple(map(float, predicted)),
        measured=tuple(map(float, measured)),
    )


def predict(table: SensitivityTable, choice: Mapping[str, Format]) -> float:
    """Noise that a table predicts for a recipe: the sum of the costs of its choices.

    Raises:
        InputError: the table has no cost for a choice.
    """
    missing = [(d, str(f)) for d, f in choice.items() if f.is_quantized and (d, f) not in table.index]
    if missing:
        raise InputError(f"the {table.method} table has no cost for {missing[0][0]} at {missing[0][1]}")
    return sum(table.index[key].cost for key in choice.items() if key[1].is_quantized)


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
    sums: dict[str, list[float]] = {}
    for decision, costs in table.by_decision.items():
        quantized = [c for c in costs if c.format.is_quantized]
        if not quantized:
            continue
        nearest = min(quantized, key=lambda c: (abs(8 * c.paper_bytes / table.params[decision] - bits), c.cost))
        sums.setdefault(table.operations[decision], []).append(nearest.cost)
    return {name: float(np.mean(values)) for name, values in sums.items()}


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(stats.spearmanr(x, y).statistic)
