import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sedimo.codec import from_json, to_json
from sedimo.errors import InputError, StateError
from sedimo.metrics.signal import (
    SAME_UP_TO_ROUNDING,
    NoisePowers,
    paired_difference,
    psnr_db,
    relative_noise,
    sqnr_estimates,
)
from tolerances import FLOAT64_FORMULA, FLOAT64_SUM


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(6, 4, 3, 3)).astype(np.float32)
    return reference, reference + 0.1 * rng.normal(size=reference.shape).astype(np.float32)


def brute_force_ratio(reference, test, sample):
    noise = sum((float(a) - float(b)) ** 2 for a, b in zip(reference[sample].flat, test[sample].flat, strict=True))
    return noise / sum(float(a) ** 2 for a in reference[sample].flat)


def test_relative_noise_is_the_definition(pair):
    powers = relative_noise(*pair)
    expected = [brute_force_ratio(*pair, s) for s in range(6)]
    np.testing.assert_allclose(powers.ratio, expected, rtol=FLOAT64_SUM)
    assert powers.noise.dtype == np.float64


def test_equal_arrays_have_no_noise_at_all(pair):
    assert relative_noise(pair[0], pair[0]).noise.tolist() == [0.0] * 6


def test_tensors_are_read_as_arrays_are(pair):
    tensors = [torch.from_numpy(x) for x in pair]
    assert relative_noise(*tensors) == relative_noise(*pair)


def test_sums_are_float64_even_for_float16():
    reference = np.full((1, 100_000), 100, np.float16)
    powers = relative_noise(reference, reference + np.float16(1))
    assert (powers.noise[0], powers.signal[0]) == (1e5, 1e9)


def test_known_values():
    powers = relative_noise([[10.0], [10.0]], [[9.0], [9.0]])
    assert powers.sqnr_db.tolist() == [20.0, 20.0]
    assert sqnr_estimates(powers)["sqnr_db"].value == 20.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_sample_has_infinite_noise(bad):
    powers = relative_noise([[1.0], [1.0]], [[bad], [0.5]])
    assert powers.noise[0] == math.inf
    assert sqnr_estimates(powers)["sqnr_db"].value == -math.inf
    assert powers.n_decorrelated == 1


def test_summary_is_the_definition(pair):
    powers = relative_noise(*pair)
    mean = sqnr_estimates(powers)["sqnr_db"]
    values = [-10 * math.log10(brute_force_ratio(*pair, s)) for s in range(6)]
    low, high = stats.t.interval(0.95, 5, loc=np.mean(values), scale=stats.sem(values))
    assert mean.value == pytest.approx(np.mean(values), rel=FLOAT64_SUM)
    assert mean.standard_error == pytest.approx(stats.sem(values), rel=FLOAT64_FORMULA)
    assert (mean.low, mean.high) == pytest.approx((low, high), rel=FLOAT64_SUM)
    assert (mean.n, powers.n_exact, powers.n_decorrelated) == (6, 0, 0)


def test_pooled_error_is_a_naive_jackknife(pair):
    reference, test = (x.astype(np.float64) for x in pair)

    def pooled(rows):
        return -10 * math.log10(((reference[rows] - test[rows]) ** 2).sum() / (reference[rows] ** 2).sum())

    left_out = [pooled([r for r in range(6) if r != s]) for s in range(6)]
    error = math.sqrt(5 / 6 * sum((x - np.mean(left_out)) ** 2 for x in left_out))
    estimate = sqnr_estimates(relative_noise(*pair))["sqnr_pooled_db"]
    assert estimate.value == pytest.approx(pooled(list(range(6))), rel=FLOAT64_SUM)
    assert estimate.standard_error == pytest.approx(error, rel=FLOAT64_FORMULA)


def test_exact_samples_are_counted_apart_and_pooled():
    powers = NoisePowers([0.0, 0.01, 0.0001], [1.0, 1.0, 1.0])
    mean, pooled = sqnr_estimates(powers).values()
    assert mean.value == pytest.approx(30)
    assert (mean.n, pooled.n, powers.n_exact) == (2, 3, 1)
    assert pooled.value == pytest.approx(-10 * math.log10(0.0101 / 3))


def test_all_exact_is_infinite_and_certain():
    powers = NoisePowers([0.0, 0.0], [1.0, 2.0])
    for estimate in sqnr_estimates(powers).values():
        assert (estimate.value, estimate.standard_error, estimate.low) == (math.inf, 0.0, math.inf)
    assert powers.n_exact == 2


def test_decorrelated_samples_are_counted():
    assert NoisePowers([0.5, 0.51, 2.0], [1.0, 1.0, 1.0]).n_decorrelated == 2


def test_paired_difference_is_a_paired_t_interval():
    rng = np.random.default_rng(1)
    signal, shared = rng.uniform(1, 2, 16), rng.uniform(0.01, 1, 16)
    first, second = NoisePowers(shared * 0.8, signal), NoisePowers(shared * rng.uniform(0.9, 1.3, 16), signal)
    result = paired_difference(first, second)
    oracle = stats.ttest_rel(first.sqnr_db, second.sqnr_db)
    interval = oracle.confidence_interval(0.95)
    assert result.mean_db == pytest.approx((first.sqnr_db - second.sqnr_db).mean(), rel=FLOAT64_FORMULA)
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high), rel=FLOAT64_FORMULA)
    assert (result.n, result.n_exact) == (16, 0)
    assert (result.low > 0) == (interval.low > 0)


def test_paired_difference_leaves_exact_samples_out():
    result = paired_difference(NoisePowers([0.0, 0.1, 0.1], [1.0] * 3), NoisePowers([0.1, 1.0, 1.0], [1.0] * 3))
    assert (result.mean_db, result.n, result.n_exact) == (pytest.approx(10), 2, 1)


@pytest.mark.parametrize(
    ("first", "second", "mean"),
    [
        ([math.inf, 0.1, 0.1], [0.2, 0.2, 0.2], -math.inf),
        ([0.1, 0.1, 0.1], [math.inf, 0.2, 0.2], math.inf),
        ([math.inf, 0.1, 0.1], [0.2, math.inf, 0.2], math.nan),
        ([math.inf, 0.1, 0.0], [math.inf, 0.2, 0.2], math.nan),
    ],
)
def test_nothing_that_diverged_is_better_or_left_out(first, second, mean):
    result = paired_difference(NoisePowers(first, [1.0] * 3), NoisePowers(second, [1.0] * 3))
    assert result.mean_db == pytest.approx(mean, nan_ok=True)
    assert (result.low, result.high) == (-math.inf, math.inf)
    assert result.n_diverged == sum(math.inf in pair for pair in zip(first, second, strict=True))
    assert result.n_exact == first.count(0.0)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [([0.0, 0.0], [0.0, 0.0], 0.0), ([0.0, 0.0], [1.0, 1.0], math.inf), ([1.0, 1.0], [0.0, 0.0], -math.inf)],
)
def test_paired_difference_of_exact_sets(first, second, expected):
    result = paired_difference(NoisePowers(first, [1.0, 1.0]), NoisePowers(second, [1.0, 1.0]))
    assert (result.mean_db, result.low, result.n_exact) == (expected, expected, 2)


def test_different_references_are_not_compared():
    with pytest.raises(InputError, match="same reference"):
        paired_difference(NoisePowers([0.1], [1.0]), NoisePowers([0.1], [1.1]))
    with pytest.raises(InputError, match="1 and 2 samples"):
        paired_difference(NoisePowers([0.1], [1.0]), NoisePowers([0.1, 0.1], [1.0, 1.0]))


def test_psnr_is_the_definition():
    reference = np.zeros((2, 3, 4, 4), np.float32)
    test = reference.copy()
    test[0] += 0.1
    values = psnr_db(reference, test)
    assert values[0] == pytest.approx(20)
    assert values[1] == math.inf
    assert psnr_db(reference, test, peak=2.0)[0] == pytest.approx(20 + 20 * math.log10(2))


@pytest.mark.parametrize(
    ("reference", "test", "message"),
    [
        ([[1.0]], [[1.0, 2.0]], "one shape"),
        ([], [], "one shape"),
        (1.0, 1.0, "one shape"),
        ([[0.0]], [[1.0]], "positive finite power"),
        ([[math.nan]], [[1.0]], "positive finite power"),
    ],
)
def test_bad_signals_are_refused(reference, test, message):
    with pytest.raises(InputError, match=message):
        relative_noise(reference, test)


def test_bad_powers_are_refused():
    with pytest.raises(InputError, match="negative"):
        NoisePowers([-1.0], [1.0])
    with pytest.raises(InputError, match="negative"):
        NoisePowers([math.nan], [1.0])
    with pytest.raises(InputError, match="one length"):
        NoisePowers([1.0, 2.0], [1.0])


@given(st.lists(st.tuples(st.floats(0, 1e9), st.floats(1e-9, 1e9)), min_size=1, max_size=5))
def test_powers_survive_json(rows):
    powers = NoisePowers([n for n, _ in rows], [s for _, s in rows])
    assert from_json(NoisePowers, to_json(powers)) == powers


def test_infinite_noise_survives_json_and_strange_fields_do_not():
    powers = NoisePowers([math.inf], [1.0])
    assert from_json(NoisePowers, to_json(powers)) == powers
    with pytest.raises(StateError):
        from_json(NoisePowers, '{"noise":[1.0],"signal":["x"]}')


def test_equal_powers_are_equal_and_others_not():
    powers = NoisePowers([1.0], [2.0])
    assert len({powers, NoisePowers([1.0], [2.0])}) == 1
    assert powers != NoisePowers([1.0], [3.0])
    assert powers != "powers"


def test_references_that_differ_by_rounding_are_paired_where_that_is_said():
    first = NoisePowers([0.1, 0.3], [1.0, 2.0])
    rounded, other = NoisePowers([0.2, 0.3], [1.0001, 2.0]), NoisePowers([0.2, 0.3], [1.01, 2.0])
    with pytest.raises(InputError, match="same reference"):
        paired_difference(first, rounded)
    with pytest.raises(InputError, match="same reference"):
        paired_difference(first, other, tolerance=SAME_UP_TO_ROUNDING)
    found = paired_difference(first, rounded, tolerance=SAME_UP_TO_ROUNDING)
    assert found.mean_db == pytest.approx(5 * math.log10(2 / 1.0001))
