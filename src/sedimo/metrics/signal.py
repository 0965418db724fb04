"""How much noise quantization put on a signal: SQNR and PSNR, per sample, in float64.

For sample s: r_s = ||x_fp - x_q||^2 / ||x_fp||^2. All figures that leave this module carry a standard error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from sedimo.codec import from_plain, to_plain
from sedimo.errors import InputError, StateError
from sedimo.metrics.estimate import Estimate, jackknife_estimate, mean_estimate, normal_estimate, with_interval

Vector = npt.NDArray[np.float64]

SAME, SAME_UP_TO_ROUNDING = 1e-6, 1e-3  # how much the powers of two references may differ
DECORRELATED = 0.5  # relative noise above which a sample has little left of the reference


@dataclass(frozen=True, eq=False)
class NoisePowers:
    """Noise and signal power `[n]` of each sample: sums of squares, float64.

    A sample that diverged (infinite or not a number) has infinite noise.
    """

    noise: Vector
    signal: Vector

    def __post_init__(self) -> None:
        noise, signal = (np.array(v, dtype=np.float64, ndmin=1) for v in (self.noise, self.signal))
        if noise.ndim != 1 or noise.shape != signal.shape or noise.size == 0:
            raise InputError(f"noise and signal must be of one length [n], got {noise.shape} and {signal.shape}")
        if not (np.isfinite(signal).all() and (signal > 0).all()):
            raise InputError(f"each sample of the reference needs a positive finite power, got {signal.min()}")
        if not (noise >= 0).all():
            raise InputError(f"noise power must not be negative, got {noise.min()}")
        object.__setattr__(self, "noise", noise)
        object.__setattr__(self, "signal", signal)

    @property
    def n(self) -> int:
        """Number of samples."""
        return int(self.noise.size)

    @property
    def ratio(self) -> Vector:
        """Relative noise r `[n]`."""
        return self.noise / self.signal

    @property
    def sqnr_db(self) -> Vector:
        """SQNR of each sample [dB] `[n]`; infinite where there is no noise."""
        with np.errstate(divide="ignore"):
            return -10 * np.log10(self.ratio)

    @property
    def n_exact(self) -> int:
        """Number of samples without any noise."""
        return int((self.noise == 0).sum())

    @property
    def n_decorrelated(self) -> int:
        """Number of samples that have little left of the reference."""
        return int((self.ratio > DECORRELATED).sum())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NoisePowers):
            return NotImplemented
        return bool(np.array_equal(self.noise, other.noise) and np.array_equal(self.signal, other.signal))

    def __hash__(self) -> int:
        return hash((self.noise.tobytes(), self.signal.tobytes()))

    def __plain__(self) -> object:
        """The JSON form: two lists."""
        return to_plain({"noise": self.noise.tolist(), "signal": self.signal.tolist()})

    @classmethod
    def __from_plain__(cls, plain: object, place: str) -> NoisePowers:
        """Reads the JSON form."""
        lists = from_plain(dict[str, tuple[float, ...]], plain, place=place)
        if lists.keys() != {"noise", "signal"}:
            raise StateError(f"{place} must have noise and signal, got {', '.join(lists) or 'nothing'}")
        return cls(np.array(lists["noise"]), np.array(lists["signal"]))


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean difference of SQNR, first minus second, over `n` common samples [dB], with its 95 % interval.

    `n_exact` further samples are exact in one or both and have no finite difference. Of the `n`, `n_diverged` are
    infinitely noisy in one or both; the mean is then infinite, or not a number, and the interval endless: a set that
    diverged anywhere is never better, and its rival is not shown to be.
    """

    mean_db: float
    standard_error: float
    low: float
    high: float
    n: int
    n_exact: int
    n_diverged: int = 0

    @property
    def estimate(self) -> Estimate:
        """The mean with its error and interval [dB], of the `n` common samples."""
        return Estimate(self.mean_db, self.standard_error, self.low, self.high, self.n)


def relative_noise(reference: npt.ArrayLike, test: npt.ArrayLike) -> NoisePowers:
    """Noise and signal power of `test` `[n, ...]` against `reference` `[n, ...]`: anything that numpy reads."""
    noise, signal = np.array([_powers(*pair) for pair in _samples(reference, test)]).T
    return NoisePowers(noise, signal)


def sqnr_estimates(powers: NoisePowers) -> dict[str, Estimate]:
    """`sqnr_db`, the mean over the samples with any noise, and `sqnr_pooled_db`, -10 log10(sum noise / sum signal).

    In decibels, higher is better, infinite if all samples are exact. The error of the pooled one is a jackknife's.
    """
    n, noise, signal = powers.n, powers.noise.sum(), powers.signal.sum()
    if noise == 0:
        exact = Estimate(math.inf, 0.0, math.inf, math.inf, n)
        return {"sqnr_db": exact, "sqnr_pooled_db": with_interval(math.inf, 0.0, n, n_replicates=n)}
    value = decibel(noise / signal)
    if n < 2 or not math.isfinite(noise):
        pooled = with_interval(value, math.nan, n, n_replicates=n)
    else:
        left_out = [decibel((noise - x) / (signal - s)) for x, s in zip(powers.noise, powers.signal, strict=True)]
        pooled = jackknife_estimate(value, left_out, n)
    return {"sqnr_db": mean_estimate(powers.sqnr_db[powers.noise > 0]), "sqnr_pooled_db": pooled}


def mean_sqnr(powers: NoisePowers) -> Estimate:
    """Mean SQNR of samples, with its error and interval [dB]."""
    return sqnr_estimates(powers)["sqnr_db"]


def paired_difference(first: NoisePowers, second: NoisePowers, *, tolerance: float = SAME) -> PairedDifference:
    """How much better `first` is than `second` on the same samples, whose signal powers agree to a relative tolerance.

    `SAME_UP_TO_ROUNDING` suits references that are the same function in another order of rounding, as that of a
    smoothed denoiser is.
    """
    if first.n != second.n or not np.allclose(first.signal, second.signal, rtol=tolerance, atol=0):
        raise InputError(
            "only measurements of the same seeds against the same reference can be compared in pairs; "
            f"got {first.n} and {second.n} samples" + ("" if first.n != second.n else " with different signal powers")
        )
    is_noisy = (first.noise > 0) & (second.noise > 0)
    n_exact = first.n - int(is_noisy.sum())
    with np.errstate(invalid="ignore"):
        differences = first.sqnr_db - second.sqnr_db
    if n_exact == first.n:  # equal, endlessly better or worse, or mixed (not a number)
        signs = {0.0 if math.isnan(d) else d for d in differences.tolist()}
        value = signs.pop() if len(signs) == 1 else math.nan
        return PairedDifference(value, 0.0 if value == value else math.nan, value, value, 0, n_exact)
    differences = differences[is_noisy]
    n_diverged = int((np.isinf(first.sqnr_db) | np.isinf(second.sqnr_db))[is_noisy].sum())
    if n_diverged:
        with np.errstate(invalid="ignore"):
            value = float(differences.mean())
        return PairedDifference(value, math.nan, -math.inf, math.inf, len(differences), n_exact, n_diverged)
    mean = mean_estimate(differences)
    return PairedDifference(mean.value, mean.standard_error, mean.low, mean.high, mean.n, n_exact)


def psnr_db(reference: npt.ArrayLike, test: npt.ArrayLike, *, peak: float = 1.0) -> Vector:
    """Peak signal-to-noise ratio of each sample [dB] `[n]` of values in [0, `peak`]; higher is better.

    10 log10(peak^2 / mean squared error); infinite where both agree.
    """
    mse = np.array([_powers(w, g)[0] / w.size for w, g in _samples(reference, test)])
    with np.errstate(divide="ignore"):
        return cast("Vector", 10 * np.log10(peak**2 / mse))


def _samples(reference: npt.ArrayLike, test: npt.ArrayLike) -> Iterator[tuple[Vector, Vector]]:
    wanted, got = np.asarray(reference), np.asarray(test)
    if wanted.shape != got.shape or wanted.ndim < 1 or wanted.size == 0:
        raise InputError(f"reference and test must have one shape [n, ...], got {wanted.shape} and {got.shape}")
    for w, g in zip(wanted, got, strict=True):
        yield w.astype(np.float64), g.astype(np.float64)


def _powers(reference: Vector, test: Vector) -> tuple[float, float]:
    with np.errstate(over="ignore", invalid="ignore"):
        noise = float(np.square(reference - test).sum())
    return (noise if math.isfinite(noise) else math.inf), float(np.square(reference).sum())


def decibel(noise: float) -> float:
    """SQNR of a relative noise power [dB]: endless without noise, not a number if that is none."""
    return math.inf if noise <= 0 else -10 * math.log10(noise)


def estimated_db(noise: Estimate) -> Estimate:
    """SQNR of an estimated noise power [dB], with its error by the derivative."""
    value = decibel(noise.value)
    if not math.isfinite(value):
        return Estimate(value, 0.0, value, value, noise.n)
    return normal_estimate(value, 10 / math.log(10) * noise.standard_error / noise.value)
