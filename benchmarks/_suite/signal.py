"""SQNR of a set of samples as one flat record, as results of benchmarks keep it."""

from __future__ import annotations

from dataclasses import dataclass

from sedimo.metrics.signal import NoisePowers, sqnr_estimates


@dataclass(frozen=True, slots=True)
class SignalSummary:
    """Mean SQNR over samples with its error and interval, and the pooled SQNR with its error [dB]; higher is better."""

    sqnr_db: float
    standard_error: float
    interval_low: float
    interval_high: float
    n: int
    n_exact: int
    n_decorrelated: int
    sqnr_pooled_db: float
    pooled_standard_error: float


def summarize(powers: NoisePowers) -> SignalSummary:
    """Mean and pooled SQNR with their errors."""
    mean, pooled = sqnr_estimates(powers).values()
    interval = mean.value, mean.standard_error, mean.low, mean.high
    counts = powers.n, powers.n_exact, powers.n_decorrelated
    return SignalSummary(*interval, *counts, pooled.value, pooled.standard_error)
