"""How good are predictions of a recipe's quality? Rank correlations, NDCG@10 and error, each with its uncertainty.

Higher predicted and measured values mean better recipes. The uncertainty is that of the choice of recipes: they
are drawn again with replacement. A resample is kept as the number of times that each recipe was drawn, so that all
resamples are computed at once and none of them is sorted. What a model learned is not drawn again: the interval
says nothing of another training run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import stats

from sedimo.errors import InputError
from sedimo.metrics.estimate import CONFIDENCE, Estimate

LEAST_RECIPES = 3
LEAST_RESAMPLES = 40  # 2.5 % of them is one: fewer have nothing beyond the ends of a 95 % interval
NDCG_PLACES = 10
_BLOCK_ROWS = 512  # of the matrix of pairs: 4 kB of memory per recipe, whatever their number

_Array: TypeAlias = npt.NDArray[np.float64]
_Codes: TypeAlias = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class PredictionQuality:
    """How well predictions order and hit the measurements of `n` recipes.

    `srcc` is Spearman's rank correlation, `kendall_tau` Kendall's tau-b, both 1 for the same order and 0 where one
    side is constant. `ndcg_at_10` is 1 when the ten recipes predicted to be best are the ten best in their order.
    `mae` is the mean absolute error in the unit of the measurements; it means something only where the predictions
    have that unit. Lower is better for `mae`, higher for all others.
    """

    srcc: Estimate
    kendall_tau: Estimate
    ndcg_at_10: Estimate
    mae: Estimate
    n: int


def rank_correlation(first: _Array, second: _Array, *, of_constant: float = 0.0) -> float:
    """Spearman's rank correlation of `[n]` and `[n]`, and a given number where one side is constant."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return of_constant
    return float(stats.spearmanr(first, second).statistic)


def prediction_quality(
    predicted: npt.ArrayLike,
    measured: npt.ArrayLike,
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> PredictionQuality:
    """Quality of the predictions `[n]` of measurements `[n]`, with percentile bootstrap intervals over recipes.

    NDCG@10 takes the predicted order, with the mean gain for recipes of equal prediction, against the measured
    order. A recipe's gain is its measurement, shifted and scaled so that the worst of all has 0 and the best 1. Gains
    belong to the recipes and stay the same in all resamples. Where no order is better than another, correlations and
    NDCG are 0.

    Example:
        >>> prediction_quality([1.0, 2.0, 3.0, 4.0], [10.0, 30.0, 20.0, 40.0]).srcc.value
        0.8

    Source: Järvelin and Kekäläinen 2002, "Cumulated gain-based evaluation of IR techniques" (NDCG, with discount
    1 / log2(1 + place)); Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    x, y = _checked(predicted, measured)
    counts = _resamples(len(y), n_bootstrap, seed)
    x_ties, y_ties, spread = _ties(x), _ties(y), np.ptp(y)
    gains = (y - y.min()) / spread if spread > 0 else np.zeros_like(y)
    return PredictionQuality(
        srcc=_estimate(_srcc(counts, x_ties, y_ties), n=len(y)),
        kendall_tau=_estimate(_kendall_tau(counts, x_ties, y_ties), n=len(y)),
        ndcg_at_10=_estimate(_ratio(_dcg(counts, _ties(-x), gains), _dcg(counts, _ties(-y), gains)), n=len(y)),
        mae=_estimate(counts @ np.abs(x - y) / len(y), n=len(y)),
        n=len(y),
    )


def quality_difference(
    predicted_a: npt.ArrayLike,
    predicted_b: npt.ArrayLike,
    measured: npt.ArrayLike,
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Rank correlation (SRCC) of predictions a minus that of b, over the same resamples of the recipes.

    a is better where the interval lies above 0. Pairing removes what both owe to the choice of recipes.
    """
    a, y = _checked(predicted_a, measured, "predictions a")
    b, _ = _checked(predicted_b, measured, "predictions b")
    counts, y_ties = _resamples(len(y), n_bootstrap, seed), _ties(y)
    return _estimate(_srcc(counts, _ties(a), y_ties) - _srcc(counts, _ties(b), y_ties), n=len(y))


def _checked(predicted: npt.ArrayLike, measured: npt.ArrayLike, said: str = "predictions") -> tuple[_Array, _Array]:
    found = []
    for values, role in ((predicted, said), (measured, "measurements")):
        array = np.asarray(values, dtype=np.float64)
        if array.ndim != 1 or array.size < LEAST_RECIPES:
            raise InputError(
                f"the quality of predictions needs one number for each of at least {LEAST_RECIPES} recipes, "
                f"got {role} of shape {array.shape}. Measure more recipes."
            )
        wrong = np.flatnonzero(~np.isfinite(array))
        if wrong.size:
            raise InputError(
                f"{role} must be finite, got {array[wrong[0]]} for recipe {wrong[0]}. Leave diverged recipes out."
            )
        found.append(array)
    x, y = found
    if x.shape != y.shape:
        raise InputError(
            f"each recipe needs a prediction and a measurement, got {x.size} and {y.size}. "
            "Pass both for the same recipes, in the same order."
        )
    return x, y


def _resamples(n: int, n_bootstrap: int, seed: int) -> _Array:
    """How often each recipe is drawn, `[1 + n_bootstrap, n]`; row 0 is the sample itself."""
    if n_bootstrap < LEAST_RESAMPLES:
        raise InputError(f"a 95 % interval needs at least {LEAST_RESAMPLES} resamples, got n_bootstrap={n_bootstrap}")
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_bootstrap)
    return np.vstack([np.ones(n), drawn])


def _estimate(values: _Array, *, n: int) -> Estimate:
    """From the value of the sample, in row 0, and those of its resamples."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values[1:], [tail, 100 - tail])
    return Estimate(float(values[0]), float(values[1:].std(ddof=1)), float(low), float(high), n)


def _ties(values: _Array) -> _Codes:
    """The group of each recipe `[n]`, those of equal value together, lowest value first."""
    return np.unique(values, return_inverse=True)[1]


def _totals(weights: _Array, codes: _Codes) -> _Array:
    """Sum of the weights `[B, n]` in each group, as `[B, K]`."""
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    return np.add.reduceat(weights[:, order], starts, axis=1)


def _centred_ranks(counts: _Array, ties: _Codes) -> _Array:
    """Average ranks of all recipes within each resample, less their mean, `[B, n]`."""
    groups = _totals(counts, ties)
    ranks: _Array = np.cumsum(groups, axis=1) - (groups - 1) / 2 - (counts.shape[1] + 1) / 2
    return ranks[:, ties]


def _srcc(counts: _Array, x: _Codes, y: _Codes) -> _Array:
    x_ranks, y_ranks = _centred_ranks(counts, x), _centred_ranks(counts, y)
    weighted = counts * x_ranks
    x_power, y_power = (weighted * x_ranks).sum(1), (counts * np.square(y_ranks)).sum(1)
    return _ratio((weighted * y_ranks).sum(1), np.sqrt(x_power * y_power))


def _kendall_tau(counts: _Array, x: _Codes, y: _Codes) -> _Array:
    """Concordant less discordant pairs over the geometric mean of the pairs that x and y each tell apart."""
    n = counts.shape[1]
    concordance = np.zeros(len(counts))
    for start in range(0, n, _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        signs = np.sign(x[rows, None] - x) * np.sign(y[rows, None] - y)  # [rows, n]
        concordance += (counts[:, rows] * (counts @ signs.T.astype(np.float64))).sum(1)
    x_pairs, y_pairs = (n**2 - np.square(_totals(counts, ties)).sum(1) for ties in (x, y))
    return _ratio(concordance, np.sqrt(x_pairs * y_pairs))


def _dcg(counts: _Array, best_first: _Codes, gains: _Array) -> _Array:
    """DCG@10 of each resample, best recipe first; equal recipes share their places, so each gets the mean discount."""
    places = np.arange(1, counts.shape[1] + 1)
    discounts = np.where(places <= NDCG_PLACES, 1 / np.log2(places + 1), 0)
    reached = np.concatenate([[0.0], np.cumsum(discounts)])  # [n + 1], the discounts of the first p places
    groups = _totals(counts, best_first)
    ends = np.cumsum(groups, axis=1).astype(np.intp)
    span = reached[ends] - reached[ends - groups.astype(np.intp)]
    return np.asarray((_totals(counts * gains, best_first) * _ratio(span, groups)).sum(1))


def _ratio(numerator: _Array, denominator: _Array) -> _Array:
    """Quotients, and 0 where the denominator is 0: nothing was told apart."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
