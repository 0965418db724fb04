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

Matrix = npt.NDArray[np.float64]

N_PARTS = 10


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean `[D]` and unbiased covariance `[D, D]` of `n` feature vectors, float64."""

    mean: Matrix
    covariance: Matrix
    n: int

    def __post_init__(self) -> None:
        dim = self.mean.shape[0] if self.mean.ndim == 1 else -1
        if self.covariance.shape != (dim, dim):
            raise InputError(
                f"statistics need a mean [D] and a covariance [D, D], got {self.mean.shape}, {self.covariance.shape}"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise InputError("statistics must be finite: some features are infinite or not a number")
        if not np.allclose(self.covariance, self.covariance.T, rtol=1e-6, atol=1e-12):
            raise InputError("a covariance must be symmetric")


def fid_replicates(features: npt.ArrayLike, reference: FeatureStatistics, *, n_parts: int = N_PARTS) -> Matrix:
    """FID of features `[n, D]` to fixed reference statistics, and its values over parts left out in turn, `[1 + k]`.

    FID falls with n: only figures of equal n compare.
    """
    distance = fid_to(reference)
    return np.array([distance(one) for one in _leave_out_statistics(_features(features, "features"), n_parts)])


def fid_to(reference: FeatureStatistics) -> Callable[[FeatureStatistics], float]:
    """The Fréchet distance of Gaussians to one, whose root is computed once; lower is better, 0 if equal.

    ||m1 - m2||^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2); the last trace is the sum of the roots of the
    eigenvalues of a symmetric matrix, which no singular covariance disturbs.

    Source: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", eq. 6.
    """
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


def kid_replicates(features: npt.ArrayLike, reference: npt.ArrayLike, *, n_parts: int = N_PARTS) -> Matrix:
    """Kernel distance (squared MMD) of features `[n, D]` to reference features `[m, D]`; lower is better.

    Unbiased, over all pairs, kernel (x.y / D + 1)^3; may be slightly negative. After it, `[1 + k]`, its values over
    parts of `features` left out in turn; the reference is fixed.

    Source: Binkowski et al. 2018, "Demystifying MMD GANs".
    """
    ours, theirs = _features(features, "features"), _features(reference, "reference features")
    if ours.shape[1] != theirs.shape[1]:
        raise InputError(f"features must have one dimension, got {ours.shape[1]} and {theirs.shape[1]}")
    parts, targets, m = _parts(ours, n_parts), np.array_split(theirs, n_parts), len(theirs)
    within = np.array([[_kernel(a, b).sum() for b in parts] for a in parts])  # [k, k], without the diagonal of pairs
    within -= np.diag([_self_kernel(a).sum() for a in parts])
    across = np.array([sum(_kernel(a, b).sum() for b in targets) for a in parts])
    among = sum(_kernel(a, b).sum() for a in targets for b in targets) - _self_kernel(theirs).sum()
    sizes = np.array([len(p) for p in parts], dtype=np.float64)

    def mmd(within: Matrix, across: Matrix, n: Matrix) -> Matrix:
        return np.asarray(within / (n * (n - 1)) + among / (m * (m - 1)) - 2 * across / (n * m))

    kept = within.sum() - within.sum(0) - within.sum(1) + np.diag(within)
    replicates = mmd(kept, across.sum() - across, sizes.sum() - sizes)
    return np.array([mmd(within.sum(), across.sum(), sizes.sum()), *replicates])


def _kernel(a: Matrix, b: Matrix) -> Matrix:
    base: Matrix = a @ b.T / a.shape[1] + 1
    return base * base * base  # np.power is ten times slower


def _self_kernel(a: Matrix) -> Matrix:
    """Kernel of each row with itself `[n]`."""
    base: Matrix = np.square(a).mean(axis=1) + 1
    return base * base * base


def _leave_out_statistics(features: Matrix, n_parts: int) -> list[FeatureStatistics]:
    """Statistics of all rows, then of all rows but each part, by subtracting the part's sums.

    Rows are centred at the common mean first, so that the subtraction does not cancel digits.
    """
    centre = features.mean(axis=0)
    parts = _parts(features - centre, n_parts)
    sums, products = np.stack([p.sum(axis=0) for p in parts]), np.stack([p.T @ p for p in parts])
    sizes = [len(p) for p in parts]

    def statistics(total: Matrix, product: Matrix, n: int) -> FeatureStatistics:
        shift = total / n
        return FeatureStatistics(centre + shift, (product - n * np.outer(shift, shift)) / (n - 1), n)

    total, product, n = sums.sum(0), products.sum(0), len(features)
    left_out = (statistics(total - s, product - p, n - m) for s, p, m in zip(sums, products, sizes, strict=True))
    return [statistics(total, product, n), *left_out]


def _parts(features: Matrix, n_parts: int) -> list[Matrix]:
    if n_parts < 2 or len(features) - -(-len(features) // n_parts) < 2 or len(features) < n_parts:
        raise InputError(f"{len(features)} samples cannot be split into {n_parts} parts to be left out in turn")
    return np.array_split(features, n_parts)


def _features(values: npt.ArrayLike, what: str) -> Matrix:
    matrix = np.asarray(values).astype(np.float64)
    if matrix.ndim != 2 or len(matrix) < 2:
        raise InputError(f"{what} must be a matrix [n, D] of at least two rows, got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise InputError(f"{what} must be finite: some are infinite or not a number")
    return matrix
