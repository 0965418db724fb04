"""The additive noise model: it finds what was planted, its derivatives are right, its errors are honest."""

from __future__ import annotations

import numpy as np
import pytest
from planted import candidates_of, planted_choices, planted_set, quality_of, random_codes, true_costs
from scipy import stats

from sedimo.errors import InputError
from sedimo.methods.predictor.features import picked
from sedimo.methods.predictor.noise_model import _Problem, effects_of, fit_noise_model, posterior_variance
from tolerances import FLOAT64_FORMULA

QUOTIENT = 1e-4  # of a central difference: float64 rounding over its step, and the third derivative
SAMPLED = 0.2  # of 400 draws: a mean has 5 % of a deviation of about one, a deviation 4 %


def test_it_ranks_new_recipes_where_the_prior_cannot():
    data = planted_set(100)
    model = fit_noise_model(data.choices, data.prior, data.codes, data.quality)
    new = random_codes(data.choices, 200, seed=9)
    truth = quality_of(data.choices, new)
    by_prior = stats.spearmanr(-picked(data.prior, new).sum(axis=1), truth).statistic
    by_model = stats.spearmanr(model.predict(new), truth).statistic
    assert by_prior < 0.75
    assert by_model > 0.97
    assert np.abs(model.predict(new) - truth).mean() < 0.5


def test_its_costs_are_those_that_were_planted():
    data = planted_set(150, error_db=0.1)
    model = fit_noise_model(data.choices, data.prior, data.codes, data.quality)
    planted = true_costs(data.choices)
    assert stats.spearmanr(model.log_costs[data.choices.exists], planted[data.choices.exists]).statistic > 0.9
    powers = np.exp(picked(model.log_costs, data.codes))
    shares = powers / (powers.sum(axis=1, keepdims=True) + model.floor)
    assert (shares > 0).all()
    assert (shares.sum(axis=1) <= 1 + FLOAT64_FORMULA).all()
    assert shares.mean(axis=0).argmax() == [d.operation for d in data.choices.space.decisions].index("head")


def test_its_uncertainty_covers_its_errors():
    """Errors of new recipes over the stated deviation have a spread near one: neither proud nor timid."""
    scores = []
    for seed in range(4):
        data = planted_set(60, error_db=0.4, seed=seed)
        model = fit_noise_model(data.choices, data.prior, data.codes, data.quality)
        new = random_codes(data.choices, 100, seed=50 + seed)
        errors = model.predict(new) - quality_of(data.choices, new)
        scores.append(errors / np.sqrt(model.uncertainty(new) ** 2 + 1e-6))
        assert 0.2 < model.residual < 0.8
    assert 0.4 < np.concatenate(scores).std() < 2.0


def test_more_trials_leave_less_unknown():
    few, many = (fit_noise_model(d.choices, d.prior, d.codes, d.quality) for d in (planted_set(30), planted_set(200)))
    assert many.deviation.mean() < few.deviation.mean()


def test_derivatives_are_those_of_differences():
    data = planted_set(12)
    problem = _Problem(data.choices, data.prior, data.codes, data.quality)
    generator = np.random.default_rng(3)
    for power in (0.0, 0.4, -0.7):
        link = np.array([1.0, 0.2, -1.0, power])
        n_effects = len(problem.start) - 4
        state = np.concatenate([0.2 * generator.standard_normal(n_effects), link])
        value, jacobian = problem.jacobian(state, data.codes)
        assert np.allclose(value, problem.value(state))
        for column in (0, 5, n_effects - 1, *range(n_effects, n_effects + 4)):
            step = np.zeros(n_effects + 4)
            step[column] = 1e-5
            ends = [problem.value(state + sign * step) for sign in (1, -1)]
            assert np.allclose(jacobian[:, column], (ends[0] - ends[1]) / 2e-5, rtol=QUOTIENT)


def test_the_posterior_is_that_of_the_full_matrix():
    """Through the trials (Woodbury) or by inverting the precision of all parameters: the same variances."""
    generator = np.random.default_rng(0)
    scaled, variance = generator.standard_normal((7, 20)), generator.uniform(0.1, 2, 20)
    full = np.linalg.inv(np.diag(1 / variance) + scaled.T @ scaled)
    assert np.allclose(posterior_variance(scaled, variance), np.diag(full))


def test_draws_spread_as_the_deviation_says():
    data = planted_set(60)
    model = fit_noise_model(data.choices, data.prior, data.codes, data.quality)
    generator = np.random.default_rng(0)
    draws = np.stack([model.draw(generator) for _ in range(400)])
    exists = data.choices.exists
    assert np.allclose(draws.mean(axis=0)[exists], model.log_costs[exists], atol=SAMPLED)
    assert np.allclose(draws.std(axis=0)[exists] / model.deviation[exists], 1, atol=SAMPLED)


def test_differences_are_better_known_than_their_ends():
    data = planted_set(60)
    model = fit_noise_model(data.choices, data.prior, data.codes, data.quality)
    one = data.codes[:20].copy()
    other = one.copy()
    other[:, 0] = 0
    apart = np.sqrt(model.uncertainty(one) ** 2 + model.uncertainty(other) ** 2)
    assert (model.uncertainty(other, minus=one) < apart).all()
    assert model.uncertainty(one, minus=one).max() == 0


def test_fp16_stays_without_noise():
    data = planted_set(80, formats="uaq3,uaq4,kmc4,fp16")
    prior = np.where(data.choices.array(lambda _d, f: float(f.is_quantized)) > 0, data.prior, 0.0)
    codes = data.codes[(picked(prior, data.codes) > 0).any(axis=1)]
    quality = -10 * np.log10(picked(prior, codes).sum(axis=1) + 1e-3)
    model = fit_noise_model(data.choices, prior, codes, quality)
    assert np.isneginf(model.log_costs[data.choices.array(lambda _d, f: float(not f.is_quantized)) > 0]).all()
    assert np.isfinite(model.predict(codes)).all()


def test_effects_number_every_option():
    choices = planted_choices()
    kinds = effects_of(choices)
    assert kinds["operation"].max() == 3
    assert kinds["decision"].max() == len(choices.space.decisions) - 1
    assert len(np.unique(kinds["option"][choices.exists])) == choices.exists.sum()


def test_what_cannot_be_fitted_is_refused():
    data = planted_set(30)
    with pytest.raises(InputError, match="at least 8 measured recipes, got 3"):
        fit_noise_model(data.choices, data.prior, data.codes[:3], data.quality[:3])
    with pytest.raises(InputError, match="finite and not all equal"):
        fit_noise_model(data.choices, data.prior, data.codes, np.full(30, 2.0))
    with pytest.raises(InputError, match="without any quantized decision"):
        fit_noise_model(data.choices, 0 * data.prior, data.codes, data.quality)


def test_recipes_and_codes_are_the_same_thing():
    choices = planted_choices()
    codes = random_codes(choices, 5)
    assert (choices.codes([choices.recipe(row) for row in codes]) == codes).all()
    assert choices.paper_bits(codes)[0] == pytest.approx(choices.space.paper_bits(choices.recipe(codes[0])))
    other = planted_choices("uaq8")
    with pytest.raises(InputError, match="cannot take uaq8 in this space"):
        choices.codes([other.recipe(np.zeros(len(choices.space.decisions), dtype=int))])
    assert set(candidates_of(choices)) == {(d.name, f) for d in choices.space.decisions for f in d.formats}
