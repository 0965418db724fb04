"""How far a set of images is from another in a feature space: FID and KID, with jackknife errors.

Both take features, never images: who extracted them is the caller's to say. Parts of the jackknife are
neighbours in sample order, so that conditions that are cycled over the samples occur in every part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import linalg

from sedimo.errors import InputError
from sedimo.metrics.estimate import Estimate, jackknife_estimate

Matrix = npt.NDArray[np.float64]

N_PARTS = 10


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean `[D]` and unbiased covariance `[D, D]` of `n` feature vectors, float64."""

    mean: Matrix
    covariance: Matrix
    n: int

    def __post_init__(self) -> None:
        """Checks shapes and symmetry.

        Raises:
            InputError: shapes disagree, values are not finite, or the covariance is not symmetric.
        """
        dim = self.mean.shape[0] if self.mean.ndim == 1 else -1
        if self.covariance.shape != (dim, dim):
            raise InputError(
                f"statistics need a mean [D] and a covariance [D, D], got {self.mean.shape}, {self.covariance.shape}"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise InputError("statistics must be finite: some features are infinite or not a number")
        if not np.allclose(self.covariance, self.covariance.T, rtol=1e-6, atol=1e-12):
            raise InputError("a covariance must be symmetric")


@dataclass(frozen=True, eq=False)
class Replicated:
    """A statistic of `n` samples, and its values with each part of them left out `[k]`."""

    value: float
    replicates: Matrix
    n: int

    def estimate(self) -> Estimate:
        """The statistic with its jackknife error."""
        return jackknife_estimate(self.value, self.replicates, self.n)

    def minus(self, other: Replicated) -> Estimate:
        """The difference to a statistic of as many paired samples, whose parts are the same."""
        return jackknife_estimate(self.value - other.value, self.replicates - other.replicates, self.n)


def feature_statistics(features: npt.ArrayLike) -> FeatureStatistics:
    """Mean and covariance of features `[n, D]`.

    Raises:
        InputError: not a matrix of at least two finite rows.
    """
    matrix = _features(features, "features")
    mean = matrix.mean(axis=0)
    centred = matrix - mean
    return FeatureStatistics(mean, centred.T @ centred / (len(matrix) - 1), len(matrix))


def fid(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Fréchet distance of two Gaussians; lower is better, 0 if equal.

    ||m1 - m2||^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2); the last trace is the sum of the roots of the
    eigenvalues of a symmetric matrix, which no singular covariance disturbs.

    Source: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", eq. 6.

    Raises:
        InputError: the statistics have different dimensions.
    """
    return _distance_to(second)(first)


def fid_jackknife(features: npt.ArrayLike, reference: FeatureStatistics, *, n_parts: int = N_PARTS) -> Estimate:
    """FID of features `[n, D]` to fixed reference statistics, with its error over `n_parts` parts left out in turn.

    FID falls with n: only figures of equal n compare.

    Raises:
        InputError: fewer than two rows remain when a part is left out, or dimensions differ.
    """
    return fid_replicates(features, reference, n_parts=n_parts).estimate()


def fid_replicates(features: npt.ArrayLike, reference: FeatureStatistics, *, n_parts: int = N_PARTS) -> Replicated:
    """FID as by `fid_jackknife`, with its values when parts are left out.

    Raises:
        InputError: as `fid_jackknife`.
    """
    whole, left_out = _leave_out_statistics(_features(features, "features"), n_parts)
    distance = _distance_to(reference)
    return Replicated(distance(whole), np.array([distance(s) for s in left_out]), whole.n)


def fid_difference(
    first: npt.ArrayLike, second: npt.ArrayLike, reference: FeatureStatistics, *, n_parts: int = N_PARTS
) -> Estimate:
    """FID of `first` minus FID of `second` `[n, D]`, row i of both from the same seed; the same parts are left out.

    Raises:
        InputError: the sets differ in shape, or as for `fid_jackknife`.
    """
    ours, theirs = (fid_replicates(rows, reference, n_parts=n_parts) for rows in _paired(first, second))
    return ours.minus(theirs)


def kid(features: npt.ArrayLike, reference: npt.ArrayLike, *, n_parts: int = N_PARTS) -> Estimate:
    """Kernel distance (squared MMD) of features `[n, D]` to reference features `[m, D]`; lower is better.

    Unbiased, over all pairs, kernel (x.y / D + 1)^3; may be slightly negative. The error leaves out parts of
    `features`; the reference is fixed.

    Source: Binkowski et al. 2018, "Demystifying MMD GANs".

    Raises:
        InputError: fewer than two rows remain when a part is left out, or dimensions differ.
    """
    return kid_replicates(features, reference, n_parts=n_parts).estimate()


def kid_replicates(features: npt.ArrayLike, reference: npt.ArrayLike, *, n_parts: int = N_PARTS) -> Replicated:
    """KID as by `kid`, with its values when parts are left out.

    Raises:
        InputError: as `kid`.
    """
    ours, theirs = _features(features, "features"), _features(reference, "reference features")
    sums = _KernelSums.of(ours, theirs, n_parts)
    return Replicated(sums.whole(), sums.replicates(), len(ours))


def kid_difference(
    first: npt.ArrayLike, second: npt.ArrayLike, reference: npt.ArrayLike, *, n_parts: int = N_PARTS
) -> Estimate:
    """KID of `first` minus KID of `second` `[n, D]`, row i of both from the same seed; the same parts are left out.

    Raises:
        InputError: the sets differ in shape, or as for `kid`.
    """
    ours, theirs = (kid_replicates(rows, reference, n_parts=n_parts) for rows in _paired(first, second))
    return ours.minus(theirs)


def kid_subsets(
    features: npt.ArrayLike,
    reference: npt.ArrayLike,
    *,
    generator: np.random.Generator,
    subset_size: int = 1000,
    n_subsets: int = 100,
) -> tuple[float, float]:
    """Mean and standard deviation of KID over random subsets: the form that most papers print.

    The deviation is that of one subset, not an error of the mean.

    Raises:
        InputError: a set is smaller than a subset.
    """
    ours, theirs = _features(features, "features"), _features(reference, "reference features")
    if not 2 <= subset_size <= min(len(ours), len(theirs)):
        raise InputError(f"subsets need 2..{min(len(ours), len(theirs))} samples, got {subset_size=}")
    values = [_subset_kid(ours, theirs, subset_size, generator) for _ in range(n_subsets)]
    return float(np.mean(values)), float(np.std(values))


def _subset_kid(ours: Matrix, theirs: Matrix, size: int, generator: np.random.Generator) -> float:
    rows = ours[generator.choice(len(ours), size, replace=False)]
    targets = theirs[generator.choice(len(theirs), size, replace=False)]
    within = _kernel(rows, rows), _kernel(targets, targets)
    pairs = sum(float(k.sum() - np.trace(k)) for k in within) / (size * (size - 1))
    return pairs - 2 * float(_kernel(rows, targets).mean())


@dataclass(frozen=True, eq=False)
class _KernelSums:
    """Kernel sums by part: `within` `[k, k]` without the diagonal, `across` `[k]` to all m targets, `sizes` `[k]`."""

    within: Matrix
    across: Matrix
    sizes: Matrix
    n_targets: int
    target_mean: float

    @classmethod
    def of(cls, ours: Matrix, theirs: Matrix, n_parts: int) -> _KernelSums:
        if ours.shape[1] != theirs.shape[1]:
            raise InputError(f"features must have one dimension, got {ours.shape[1]} and {theirs.shape[1]}")
        parts, targets = _parts(ours, n_parts), np.array_split(theirs, n_parts)
        within = np.array([[_kernel(a, b).sum() for b in parts] for a in parts])
        within -= np.diag([_self_kernel(a).sum() for a in parts])
        across = np.array([sum(_kernel(a, b).sum() for b in targets) for a in parts])
        among = sum(_kernel(a, b).sum() for a in targets for b in targets) - _self_kernel(theirs).sum()
        m = len(theirs)
        return cls(within, across, np.array([len(p) for p in parts], dtype=np.float64), m, among / (m * (m - 1)))

    def whole(self) -> float:
        return float(self._mmd(self.within.sum(), self.across.sum(), self.sizes.sum()))

    def replicates(self) -> Matrix:
        within = self.within.sum() - self.within.sum(0) - self.within.sum(1) + np.diag(self.within)
        return self._mmd(within, self.across.sum() - self.across, self.sizes.sum() - self.sizes)

    def _mmd(self, within: Matrix, across: Matrix, n: Matrix) -> Matrix:
        return within / (n * (n - 1)) + self.target_mean - 2 * across / (n * self.n_targets)


def _kernel(a: Matrix, b: Matrix) -> Matrix:
    base: Matrix = a @ b.T / a.shape[1] + 1
    return base * base * base  # np.power is ten times slower


def _self_kernel(a: Matrix) -> Matrix:
    """Kernel of each row with itself `[n]`."""
    base: Matrix = np.square(a).mean(axis=1) + 1
    return base * base * base


def _distance_to(reference: FeatureStatistics) -> Callable[[FeatureStatistics], float]:
    """FID to one reference, whose root is computed once."""
    values, vectors = linalg.eigh(reference.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    trace = float(np.trace(reference.covariance))

    def distance(other: FeatureStatistics) -> float:
        if other.mean.shape != reference.mean.shape:
            raise InputError(f"features must have one dimension, got {len(other.mean)} and {len(reference.mean)}")
        product = root @ other.covariance @ root
        overlap = np.sqrt(linalg.eigvalsh((product + product.T) / 2).clip(0)).sum()
        gap = np.square(other.mean - reference.mean).sum()
        return float(max(gap + np.trace(other.covariance) + trace - 2 * overlap, 0.0))

    return distance


def _leave_out_statistics(features: Matrix, n_parts: int) -> tuple[FeatureStatistics, list[FeatureStatistics]]:
    """Statistics of all rows, and of all rows but each part, by subtracting the part's sums.

    Rows are centred at the common mean first, so that the subtraction does not cancel digits.
    """
    centre = features.mean(axis=0)
    parts = _parts(features - centre, n_parts)
    sums, products = np.stack([p.sum(axis=0) for p in parts]), np.stack([p.T @ p for p in parts])
    sizes = [len(p) for p in parts]

    def statistics(total: Matrix, product: Matrix, n: int) -> FeatureStatistics:
        shift = total / n
        return FeatureStatistics(centre + shift, (product - n * np.outer(shift, shift)) / (n - 1), n)

    all_sums, all_products, n = sums.sum(0), products.sum(0), len(features)
    left_out = [
        statistics(all_sums - s, all_products - p, n - size) for s, p, size in zip(sums, products, sizes, strict=True)
    ]
    return statistics(all_sums, all_products, n), left_out


def _parts(features: Matrix, n_parts: int) -> list[Matrix]:
    if n_parts < 2 or len(features) - -(-len(features) // n_parts) < 2 or len(features) < n_parts:
        raise InputError(f"{len(features)} samples cannot be split into {n_parts} parts to be left out in turn")
    return np.array_split(features, n_parts)


def _paired(first: npt.ArrayLike, second: npt.ArrayLike) -> tuple[Matrix, Matrix]:
    ours, theirs = _features(first, "first features"), _features(second, "second features")
    if ours.shape != theirs.shape:
        raise InputError(f"paired sets must have one shape, got {ours.shape} and {theirs.shape}")
    return ours, theirs


def _features(values: npt.ArrayLike, what: str) -> Matrix:
    matrix = np.asarray(values).astype(np.float64)
    if matrix.ndim != 2 or len(matrix) < 2:
        raise InputError(f"{what} must be a matrix [n, D] of at least two rows, got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise InputError(f"{what} must be finite: some are infinite or not a number")
    return matrix
