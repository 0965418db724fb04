import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sedimo.errors import InputError
from sedimo.metrics.estimate import jackknife_estimate, mean_estimate
from tolerances import FLOAT64_FORMULA, FLOAT64_SUM


def test_mean_estimate_is_that_of_scipy():
    values = np.random.default_rng(0).normal(3, 2, 17)
    estimate = mean_estimate(values)
    low, high = stats.t.interval(0.95, 16, loc=values.mean(), scale=stats.sem(values))
    assert estimate.value == pytest.approx(values.mean(), rel=FLOAT64_SUM)
    assert estimate.standard_error == pytest.approx(stats.sem(values), rel=FLOAT64_SUM)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), rel=FLOAT64_SUM)
    assert estimate.n == 17


def test_one_sample_says_nothing_of_its_error():
    estimate = mean_estimate([4.0])
    assert estimate.value == 4.0
    assert math.isnan(estimate.standard_error)
    assert (estimate.low, estimate.high) == (-math.inf, math.inf)


def test_infinite_value_stays_visible():
    assert mean_estimate([1.0, math.inf]).value == math.inf


def test_no_values_are_refused():
    with pytest.raises(InputError, match="at least one"):
        mean_estimate([])


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20))
def test_jackknife_of_a_mean_is_the_standard_error(values):
    array = np.array(values)
    replicates = (array.sum() - array) / (len(array) - 1)
    estimate = jackknife_estimate(float(array.mean()), replicates, len(array))
    assert estimate.standard_error == pytest.approx(float(stats.sem(array)), abs=FLOAT64_FORMULA)


def test_jackknife_needs_two_parts():
    with pytest.raises(InputError, match="two parts"):
        jackknife_estimate(1.0, [1.0], 5)


def test_jackknife_with_an_infinite_replicate_has_an_endless_interval():
    estimate = jackknife_estimate(1.0, [1.0, math.inf], 5)
    assert (estimate.low, estimate.high) == (-math.inf, math.inf)
