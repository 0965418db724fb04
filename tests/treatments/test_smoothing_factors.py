"""The factors of smoothing: the published formula, and the powers of two that stand for it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sedimo.errors import InputError
from sedimo.treatments.smoothing import MAX_EXPONENT, factor_exponents, smoothing_factors
from tolerances import FLOAT64_FORMULA, FLOAT64_SUM

MAGNITUDES = st.one_of(st.just(0.0), st.floats(1e-7, 6e4))
PAIRS = st.lists(st.tuples(MAGNITUDES, MAGNITUDES), min_size=1, max_size=12)
ALPHAS = st.floats(0, 1)


def maxima(pairs):
    inputs, weights = (torch.tensor(values, dtype=torch.float64) for values in zip(*pairs, strict=True))
    return inputs, weights


@given(PAIRS, ALPHAS)
def test_the_formula(pairs, alpha):
    found = smoothing_factors(*maxima(pairs), alpha)
    wanted = [x**alpha / w ** (1 - alpha) if x > 0 and w > 0 else 1.0 for x, w in pairs]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=FLOAT64_SUM, atol=0)


@given(PAIRS, ALPHAS)
def test_exponents_are_the_nearest_within_their_limits(pairs, alpha):
    inputs, weights = maxima(pairs)
    factors = smoothing_factors(inputs, weights, alpha)
    exponents = factor_exponents(factors, inputs, weights)
    live = [i for i, (x, w) in enumerate(pairs) if x > 0 and w > 0]
    middle = sum(math.log2(factors[i]) for i in live) / max(1, len(live))
    for i, exponent in enumerate(exponents.tolist()):
        assert abs(exponent) <= MAX_EXPONENT
        if i not in live:
            assert exponent == 0
            continue
        wanted, size = math.log2(factors[i]) - middle, math.log2(pairs[i][1])
        is_limited = abs(exponent) == MAX_EXPONENT or exponent + size > 14 or exponent + size < -13
        assert is_limited or abs(exponent - wanted) <= 0.5 + FLOAT64_FORMULA
        assert exponent == 0 or exponent * wanted > 0  # never in the wrong direction


@given(PAIRS, ALPHAS)
def test_float16_weights_neither_overflow_nor_vanish(pairs, alpha):
    inputs, weights = maxima(pairs)
    scaled = weights * torch.exp2(factor_exponents(smoothing_factors(inputs, weights, alpha), inputs, weights))
    assert scaled.half().isfinite().all()
    is_normal = weights >= 2**-14
    assert (scaled[is_normal] >= 2**-14).all()


@given(PAIRS, ALPHAS, st.integers(-6, 6))
def test_a_common_factor_changes_nothing(pairs, alpha, power):
    inputs, weights = maxima([(x, min(w, 1.0) if w == 0 else min(max(w, 0.01), 1.0)) for x, w in pairs])
    factors = smoothing_factors(inputs, weights, alpha)
    alone = factor_exponents(factors, inputs, weights)
    live = (inputs > 0) & (weights > 0)
    scaled = torch.where(live, factors * 2.0**power, factors)
    assert (factor_exponents(scaled, inputs, weights) - alone).abs().max() <= 1  # of values halfway between two


def test_an_outlier_channel_moves_into_the_weights():
    inputs, weights = torch.tensor([1.0, 1.0, 1.0, 64.0]), torch.ones(4)
    exponents = factor_exponents(smoothing_factors(inputs, weights, 0.5), inputs, weights)
    assert exponents.tolist() == [-1, -1, -1, 2]  # 64 ^ 0.5 = 2 ^ 3, less the mean of 0.75


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, math.inf])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(InputError, match="alpha must be at least 0"):
        smoothing_factors(torch.ones(2), torch.ones(2), alpha)


@pytest.mark.parametrize("values", [[1.0, math.nan], [1.0, math.inf], [1.0, -1.0]])
def test_maxima_that_are_none_are_refused(values):
    with pytest.raises(InputError, match="finite and not negative"):
        smoothing_factors(torch.tensor(values), torch.ones(2))
    with pytest.raises(InputError, match="finite and not negative"):
        smoothing_factors(torch.ones(2), torch.tensor(values))


def test_shapes_must_agree():
    with pytest.raises(InputError, match=r"\[2\] and \[3\]"):
        smoothing_factors(torch.ones(2), torch.ones(3))
