import math

import numpy as np
import pytest
from scipy import linalg
from sklearn.metrics.pairwise import polynomial_kernel

from sedimo.errors import InputError
from sedimo.metrics.distribution import FeatureStatistics, fid_replicates, fid_to, kid_replicates
from sedimo.metrics.estimate import jackknife_estimate
from tolerances import FLOAT64_FORMULA, FLOAT64_ROOT


@pytest.fixture
def sets():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(8, 8))
    return rng.normal(size=(53, 8)) @ mixing, rng.normal(0.3, 1.1, size=(41, 8)) @ mixing


def feature_statistics(features):
    return FeatureStatistics(features.mean(0), np.cov(features.T), len(features))


def fid(first, second):
    return fid_to(second)(first)


def estimate_of(replicates, n):
    return jackknife_estimate(replicates[0], replicates[1:], n)


def fid_jackknife(features, reference):
    return estimate_of(fid_replicates(features, reference), len(features))


def fid_difference(first, second, reference, n_parts=10):
    ours, theirs = (fid_replicates(rows, reference, n_parts=n_parts) for rows in (first, second))
    return estimate_of(ours - theirs, len(first))


def kid(features, reference, n_parts=10):
    return estimate_of(kid_replicates(features, reference, n_parts=n_parts), len(features))


def kid_difference(first, second, reference):
    return estimate_of(kid_replicates(first, reference) - kid_replicates(second, reference), len(first))


def naive_fid(first, second):
    m1, m2, s1, s2 = first.mean(0), second.mean(0), np.cov(first.T), np.cov(second.T)
    return ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * linalg.sqrtm(s1 @ s2).real)


def naive_kid(first, second):
    n, m = len(first), len(second)
    xx, yy, xy = (polynomial_kernel(a, b) for a, b in ((first, first), (second, second), (first, second)))
    pairs_x = sum(xx[i, j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    pairs_y = sum(yy[i, j] for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return pairs_x + pairs_y - 2 * xy.mean()


def naive_jackknife(statistic, n, k):
    kept = [np.delete(np.arange(n), part) for part in np.array_split(np.arange(n), k)]
    values = np.array([statistic(rows) for rows in kept])
    return math.sqrt((k - 1) / k * ((values - values.mean()) ** 2).sum())


def test_fid_of_gaussians_in_closed_form():
    mean_1, mean_2, var_1, var_2 = np.array([0.0, 1.0]), np.array([2.0, 1.0]), [4.0, 9.0], [1.0, 16.0]
    first = FeatureStatistics(mean_1, np.diag(var_1), 10)
    second = FeatureStatistics(mean_2, np.diag(var_2), 10)
    assert fid(first, second) == pytest.approx(4 + (2 - 1) ** 2 + (3 - 4) ** 2, rel=FLOAT64_FORMULA)


def test_fid_against_matrix_square_root(sets):
    ours = fid(*map(feature_statistics, sets))
    assert ours == pytest.approx(naive_fid(*sets), rel=FLOAT64_FORMULA)
    assert ours == pytest.approx(fid(*map(feature_statistics, reversed(sets))), rel=FLOAT64_FORMULA)


def test_fid_of_equal_sets_is_zero_even_if_singular():
    features = np.random.default_rng(0).normal(size=(5, 12))
    statistics = feature_statistics(features)
    assert fid(statistics, statistics) == pytest.approx(0, abs=FLOAT64_ROOT)
    assert fid(statistics, statistics) >= 0


def test_fid_jackknife_is_the_naive_loop(sets):
    features, reference = sets
    estimate = fid_jackknife(features, feature_statistics(reference))
    error = naive_jackknife(lambda rows: naive_fid(features[rows], reference), 53, 10)
    assert estimate.value == pytest.approx(naive_fid(*sets), rel=FLOAT64_FORMULA)
    assert estimate.standard_error == pytest.approx(error)
    assert estimate.n == 53
    assert estimate.low < estimate.value < estimate.high


def test_fid_jackknife_keeps_digits_far_from_the_origin(sets):
    features, reference = (x + 1e6 for x in sets)
    moved = fid_jackknife(features, feature_statistics(reference))
    plain = fid_jackknife(sets[0], feature_statistics(sets[1]))
    assert moved.value == pytest.approx(plain.value)  # 1e6 itself costs 6 of 16 digits
    assert moved.standard_error == pytest.approx(plain.standard_error)


def test_fid_difference_is_the_naive_loop_and_pairs(sets):
    features, reference = sets
    worse = features + np.random.default_rng(1).normal(0, 0.3, features.shape)
    estimate = fid_difference(worse, features, feature_statistics(reference), n_parts=7)
    error = naive_jackknife(
        lambda rows: naive_fid(worse[rows], reference) - naive_fid(features[rows], reference), 53, 7
    )
    assert estimate.value == pytest.approx(naive_fid(worse, reference) - naive_fid(features, reference))
    assert estimate.standard_error == pytest.approx(error)
    assert estimate.standard_error < fid_jackknife(features, feature_statistics(reference)).standard_error


def test_difference_of_equal_sets_is_exactly_zero(sets):
    statistics = feature_statistics(sets[1])
    for estimate in (fid_difference(sets[0], sets[0], statistics), kid_difference(sets[0], sets[0], sets[1])):
        assert (estimate.value, estimate.standard_error) == (0.0, 0.0)


def test_kid_against_sklearn_and_naive_loops(sets):
    features, reference = sets
    estimate = kid(features, reference, n_parts=6)
    error = naive_jackknife(lambda rows: naive_kid(features[rows], reference), 53, 6)
    assert estimate.value == pytest.approx(naive_kid(*sets), rel=FLOAT64_FORMULA)
    assert estimate.standard_error == pytest.approx(error, rel=FLOAT64_FORMULA)
    assert estimate.n == 53


def test_kid_difference_is_the_naive_loop(sets):
    features, reference = sets
    worse = features * 1.2
    estimate = kid_difference(worse, features, reference)
    error = naive_jackknife(
        lambda rows: naive_kid(worse[rows], reference) - naive_kid(features[rows], reference), 53, 10
    )
    assert estimate.value == pytest.approx(
        naive_kid(worse, reference) - naive_kid(features, reference), rel=FLOAT64_FORMULA
    )
    assert estimate.standard_error == pytest.approx(error)


def test_kid_is_unbiased():
    rng = np.random.default_rng(0)
    values = [kid(rng.normal(size=(20, 4)), rng.normal(size=(20, 4))).value for _ in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(200)
    assert min(values) < 0


@pytest.mark.parametrize(
    ("features", "message"),
    [([1.0, 2.0], "matrix"), ([[1.0, 2.0]], "two rows"), ([[1.0], [math.nan]], "finite")],
)
def test_bad_features_are_refused(features, message):
    with pytest.raises(InputError, match=message):
        kid_replicates(features, [[1.0], [2.0]])


def test_disagreeing_sets_are_refused(sets):
    features, reference = sets
    with pytest.raises(InputError, match="one dimension"):
        fid_jackknife(features[:, :4], feature_statistics(reference))
    with pytest.raises(InputError, match="one dimension"):
        kid(features[:, :4], reference)
    with pytest.raises(InputError, match="10 parts"):
        kid(features[:6], reference)


def test_bad_statistics_are_refused():
    with pytest.raises(InputError, match="covariance"):
        FeatureStatistics(np.zeros(3), np.zeros((2, 2)), 5)
    with pytest.raises(InputError, match="symmetric"):
        FeatureStatistics(np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]), 5)
    with pytest.raises(InputError, match="finite"):
        FeatureStatistics(np.array([0.0, math.inf]), np.eye(2), 5)
