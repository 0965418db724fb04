"""Quality of predictions: scipy and scikit-learn as oracles, resamples by brute force, and what has no order."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import ndcg_score

from sedimo.errors import InputError
from sedimo.metrics import ranking as quality
from sedimo.metrics.ranking import LEAST_RESAMPLES, prediction_quality, quality_difference
from tolerances import FLOAT64_SUM

N_BOOTSTRAP = 400
MEASURES = ("srcc", "kendall_tau", "ndcg_at_10", "mae")
PAIRS = st.integers(3, 40).flatmap(
    lambda n: st.tuples(*(st.lists(st.integers(0, 12), min_size=n, max_size=n) for _ in range(2)))
)


def noisy(n, noise=1.0, seed=0, n_levels=None):
    """Predictions and measurements; with `n_levels` they are rounded, so that many are equal."""
    rng = np.random.default_rng(seed)
    measured = rng.normal(size=n)
    predicted = measured + noise * rng.normal(size=n)
    if n_levels:
        return np.round(predicted * n_levels) / n_levels, np.round(measured * n_levels) / n_levels
    return predicted, measured


def relevance(measured):
    return (measured - measured.min()) / np.ptp(measured)


@given(PAIRS)
@settings(max_examples=60)
def test_values_are_those_of_scipy_and_sklearn(pair):
    predicted, measured = (np.array(side, dtype=float) for side in pair)
    found = prediction_quality(predicted, measured, n_bootstrap=LEAST_RESAMPLES)
    if np.ptp(predicted) > 0 and np.ptp(measured) > 0:
        assert found.srcc.value == pytest.approx(stats.spearmanr(predicted, measured).statistic, abs=FLOAT64_SUM)
        tau = stats.kendalltau(predicted, measured).statistic
        assert found.kendall_tau.value == pytest.approx(tau, abs=FLOAT64_SUM)
    if np.ptp(measured) > 0:
        expected = ndcg_score([relevance(measured)], [predicted], k=10)
        assert found.ndcg_at_10.value == pytest.approx(expected, abs=FLOAT64_SUM)
    assert found.mae.value == pytest.approx(np.abs(predicted - measured).mean(), rel=FLOAT64_SUM, abs=FLOAT64_SUM)
    assert all(math.isfinite(x) for m in MEASURES for x in _numbers(getattr(found, m)))


def _numbers(estimate):
    return estimate.value, estimate.standard_error, estimate.low, estimate.high


@pytest.mark.parametrize("n_levels", [None, 2])
def test_intervals_are_percentiles_of_resampled_recipes(n_levels):
    predicted, measured = noisy(25, n_levels=n_levels)
    n, rng = len(measured), np.random.default_rng(7)
    gains = relevance(measured)
    rows = []
    for counts in rng.multinomial(n, np.full(n, 1 / n), size=N_BOOTSTRAP):
        drawn = np.repeat(np.arange(n), counts)
        x, y = predicted[drawn], measured[drawn]
        ndcg = ndcg_score([gains[drawn]], [x], k=10)
        rows.append((stats.spearmanr(x, y).statistic, stats.kendalltau(x, y).statistic, ndcg, np.abs(x - y).mean()))
    found = prediction_quality(predicted, measured, n_bootstrap=N_BOOTSTRAP, seed=7)
    for name, replicates in zip(MEASURES, np.transpose(rows), strict=True):
        estimate = getattr(found, name)
        assert (estimate.low, estimate.high) == pytest.approx(np.percentile(replicates, [2.5, 97.5]), abs=FLOAT64_SUM)
        assert estimate.standard_error == pytest.approx(replicates.std(ddof=1), rel=FLOAT64_SUM)
        assert estimate.n == found.n == n


def test_interval_of_the_rank_correlation_covers_what_many_recipes_have():
    truth = stats.spearmanr(*noisy(200_000)).statistic
    found = [prediction_quality(*noisy(80, seed=s), n_bootstrap=N_BOOTSTRAP).srcc for s in range(1, 61)]
    covered = np.mean([e.low <= truth <= e.high for e in found])
    assert covered > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 60)  # three standard errors of a share of 60


def test_perfect_and_reversed_order():
    predicted, _ = noisy(30)
    same = prediction_quality(predicted, 2 * predicted, n_bootstrap=LEAST_RESAMPLES)
    for name in ("srcc", "kendall_tau", "ndcg_at_10"):
        assert getattr(same, name).value == pytest.approx(1, abs=FLOAT64_SUM)
    reverse = prediction_quality(-predicted, predicted, n_bootstrap=LEAST_RESAMPLES)
    assert reverse.srcc.value == reverse.kendall_tau.value == -1
    assert reverse.ndcg_at_10.value < 0.5


def test_ndcg_looks_at_the_ten_best_predictions_only():
    measured = np.arange(40.0)
    predicted = measured.copy()
    predicted[:30] = predicted[:30][::-1]  # the order of the rest is wrong
    found = prediction_quality(predicted, measured, n_bootstrap=LEAST_RESAMPLES)
    assert found.ndcg_at_10.value == pytest.approx(1, abs=FLOAT64_SUM)
    assert found.srcc.value < 0.9


def test_constant_predictions_have_no_correlation():
    found = prediction_quality(np.full(20, 3.0), noisy(20)[1], n_bootstrap=LEAST_RESAMPLES)
    assert _numbers(found.srcc) == _numbers(found.kendall_tau) == (0, 0, 0, 0)
    assert 0 < found.ndcg_at_10.value < 1


def test_constant_measurements_have_no_order():
    found = prediction_quality(noisy(20)[1], np.full(20, 3.0), n_bootstrap=LEAST_RESAMPLES)
    assert _numbers(found.srcc) == _numbers(found.kendall_tau) == _numbers(found.ndcg_at_10) == (0, 0, 0, 0)


def test_pairs_in_several_blocks_give_the_same_tau(monkeypatch):
    predicted, measured = noisy(40, n_levels=3)
    whole = prediction_quality(predicted, measured, n_bootstrap=LEAST_RESAMPLES)
    monkeypatch.setattr(quality, "_BLOCK_ROWS", 7)
    assert prediction_quality(predicted, measured, n_bootstrap=LEAST_RESAMPLES) == whole


def test_seed_decides_the_resamples():
    pair = noisy(20)
    assert prediction_quality(*pair, seed=1) == prediction_quality(*pair, seed=1)
    assert prediction_quality(*pair, seed=1) != prediction_quality(*pair, seed=2)


def test_difference_is_paired():
    good, measured = noisy(60, noise=0.5)
    bad = good + np.random.default_rng(1).normal(size=60)
    found = quality_difference(good, bad, measured, n_bootstrap=N_BOOTSTRAP, seed=5)
    n, rng = 60, np.random.default_rng(5)
    differences = []
    for counts in rng.multinomial(n, np.full(n, 1 / n), size=N_BOOTSTRAP):
        drawn = np.repeat(np.arange(n), counts)
        a, b = (stats.spearmanr(p[drawn], measured[drawn]).statistic for p in (good, bad))
        differences.append(a - b)
    expected = stats.spearmanr(good, measured).statistic - stats.spearmanr(bad, measured).statistic
    assert found.value == pytest.approx(expected, abs=FLOAT64_SUM)
    assert (found.low, found.high) == pytest.approx(np.percentile(differences, [2.5, 97.5]), abs=FLOAT64_SUM)
    assert found.low > 0
    assert found.n == n


def test_difference_to_itself_is_nothing():
    predicted, measured = noisy(20)
    assert _numbers(quality_difference(predicted, predicted, measured)) == (0, 0, 0, 0)


def test_a_thousand_resamples_of_five_hundred_recipes_take_no_time():
    start = time.process_time()
    prediction_quality(*noisy(500), n_bootstrap=1000)
    assert time.process_time() - start < 2  # seconds; 0.1 measured on one core


@pytest.mark.parametrize(
    ("predicted", "measured", "rule"),
    [
        ([1, 2], [1, 2], r"at least 3 recipes, got predictions of shape \(2,\)"),
        ([1, 2, 3], [1, 2], r"got measurements of shape \(2,\)"),
        ([[1, 2, 3]], [[1, 2, 3]], r"shape \(1, 3\)"),
        ([1, 2, 3, 4], [1, 2, 3], "got 4 and 3"),
        ([1, math.nan, 3], [1, 2, 3], "predictions must be finite, got nan for recipe 1"),
        ([1, 2, 3], [1, 2, math.inf], "measurements must be finite, got inf for recipe 2"),
    ],
)
def test_what_has_no_quality_is_refused(predicted, measured, rule):
    with pytest.raises(InputError, match=rule):
        prediction_quality(predicted, measured)


def test_difference_refuses_the_same():
    with pytest.raises(InputError, match="predictions b must be finite"):
        quality_difference([1, 2, 3], [1, 2, math.nan], [1, 2, 3])
    with pytest.raises(InputError, match="got 4 and 3"):
        quality_difference([1, 2, 3], [1, 2, 3, 4], [1, 2, 3])


def test_too_few_resamples_are_refused():
    with pytest.raises(InputError, match=f"at least {LEAST_RESAMPLES} resamples, got n_bootstrap=39"):
        prediction_quality([1, 2, 3], [1, 2, 3], n_bootstrap=LEAST_RESAMPLES - 1)
