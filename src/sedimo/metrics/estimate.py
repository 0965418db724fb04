"""A measured number with its uncertainty, and the two ways by which uncertainties come about here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from sedimo.errors import InputError

CONFIDENCE = 0.95
NORMAL_95 = 1.959964  # half of a 95 % interval in standard errors, where errors are normal


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value, its standard error, its 95 % interval by Student's t, and the number of samples `n` behind it.

    The error is not a number, and the interval endless, where one sample says nothing of the spread.
    """

    value: float
    standard_error: float
    low: float
    high: float
    n: int


def to_digits(value: float, digits: int) -> float:
    """The value to so many significant digits, as it is kept."""
    return float(f"{value:.{digits}g}")


def ranked(value: float) -> float:
    """The value as a key of `max`: what is not a number must never win.

    Example:
        >>> max(math.nan, 1.0, key=ranked)
        1.0
    """
    return -math.inf if math.isnan(value) else value


def normal_estimate(value: float, standard_error: float, n: int = 0) -> Estimate:
    """A value whose error is known, such as a sum of many: its interval is that of the normal distribution."""
    half = NORMAL_95 * standard_error
    return Estimate(value, standard_error, value - half, value + half, n)


def mean_estimate(values: npt.ArrayLike) -> Estimate:
    """Mean of independent values `[n]`, with standard error sd / sqrt(n).

    Example:
        >>> mean_estimate([1.0, 3.0]).standard_error
        1.0
    """
    array = np.asarray(values, dtype=np.float64).ravel()
    if array.size == 0:
        raise InputError("a mean needs at least one value, got none")
    value = float(array.mean())
    if not math.isfinite(value):
        return Estimate(value, math.nan, value, value, array.size)
    error = float(array.std(ddof=1) / math.sqrt(array.size)) if array.size > 1 else math.nan
    return with_interval(value, error, array.size, n_replicates=array.size)


def jackknife_estimate(value: float, replicates: npt.ArrayLike, n: int) -> Estimate:
    """A statistic `value` of `n` samples with the error of its leave-one-part-out `replicates` `[k]`.

    Source: Efron and Stein 1981, "The jackknife estimate of variance": (k - 1) / k * sum (theta_i - mean)^2.
    """
    array = np.asarray(replicates, dtype=np.float64).ravel()
    if array.size < 2:
        raise InputError(f"a jackknife needs at least two parts, got {array.size}")
    if not np.isfinite(array).all():
        return with_interval(value, math.inf, n, n_replicates=array.size)
    k = array.size
    error = math.sqrt((k - 1) / k * float(np.square(array - array.mean()).sum()))
    return with_interval(value, error, n, n_replicates=k)


def with_interval(value: float, standard_error: float, n: int, *, n_replicates: int) -> Estimate:
    """The estimate with its 95 % interval by Student's t with `n_replicates` - 1 degrees of freedom."""
    if n_replicates < 2 or not math.isfinite(standard_error):
        return Estimate(value, standard_error, -math.inf, math.inf, n)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n_replicates - 1)) * standard_error
    return Estimate(value, standard_error, value - half, value + half, n)
