"""Do predictions agree with measurements? Slope, ratio and rank correlation, with how many pairs are behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from sedimo.errors import InputError
from sedimo.quant.formats import Format
from sedimo.sensitivity.table import SensitivityTable


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


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(stats.spearmanr(x, y).statistic)
