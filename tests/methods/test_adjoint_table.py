"""Costs and whole recipes from signed effects on the final latents."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sedimo.allocation.effects import TRUSTED_AT, Effects, expected_db
from sedimo.errors import InputError
from sedimo.methods.adjoint import adjoint_table, effects_of
from sedimo.quant.families.family import CostEstimate
from sedimo.quant.formats import FP16, Format
from synthetic_effects import candidates_of, drawn_products, error_of, probe_of, space_of
from tolerances import FLOAT64_FORMULA, STANDARD_ERRORS

FORMATS = "uaq2,uaq3,uaq4,uaq6,kmc2,kmc3,kmc4,fp16"
UAQ3, UAQ4, UAQ4A8, FP16A8 = (Format.parse(t) for t in ("uaq3", "uaq4", "uaq4a8", "fp16a8"))
SPACE = space_of(12, FORMATS)
CANDIDATES = candidates_of(SPACE)
FACTORS = dict(zip(SPACE.decision_index, np.random.default_rng(5).lognormal(-5, 1.5, 12), strict=True))
SAMPLED_LEVEL = 0.05  # of 84 choices of 64 products: they have 1 %


def planted(name, change):
    """Weight error x factor of the decision x factor of the format."""
    f = Format.parse(change)
    return error_of(f) * FACTORS[name] * (2.0 if f.bits == 2 else 1.0)


def log_error(costs, power):
    """Mean squared error of the logarithms of costs."""
    pairs = [(costs[d, f].value, power(d, str(f))) for d, f in costs]
    return float(np.mean([math.log(got / true) ** 2 for got, true in pairs]))


def raw_of(effects):
    return {key: CostEstimate(float(np.square(values).mean())) for key, values in effects.products.items()}


def test_noisy_costs_are_drawn_towards_what_all_choices_say():
    effects = effects_of(CANDIDATES, probe_of(drawn_products(SPACE, planted, (8, 1)), 8))
    raw = log_error(raw_of(effects), planted)
    assert raw > 0.15  # eight squared normals say little: 0.3 expected
    assert log_error(effects.costs, planted) < 0.4 * raw  # 84 numbers share 19 factors: 0.23 at best


def test_costs_of_many_samples_stay_what_they_are():
    rng = np.random.default_rng(1)
    own = {(d.name, str(f)): rng.lognormal(0, 0.4) for d in SPACE.decisions for f in d.formats if f != FP16}

    def power(name, change):
        return planted(name, change) * own.get((name, change), 1.0)

    effects = effects_of(CANDIDATES, probe_of(drawn_products(SPACE, power, (2000, 1)), 2000))
    raw = raw_of(effects)
    ratios = np.array([math.log(effects.costs[key].value / raw[key].value) for key in raw])
    assert np.abs(ratios).max() < 0.03  # the own share is 0.16 / (0.16 + 0.001)
    assert np.std([math.log(raw[key].value / planted(key[0], str(key[1]))) for key in raw]) > 0.3


def test_exact_products_give_exact_costs():
    """Products of one size: nothing is drawn anywhere, however far choices are from their common pattern."""
    rng = np.random.default_rng(2)
    space = space_of(4, "uaq2,uaq4,kmc3,fp16")
    own = {(d.name, str(f)): 4.0**-f.bits * rng.uniform(0.8, 1.2) for d in space.decisions for f in d.formats}
    products = {
        d.name: {str(f): math.sqrt(own[d.name, str(f)]) * rng.choice([-1, 1], (6, 2)) for f in d.formats if f != FP16}
        for d in space.decisions
    }
    table = adjoint_table(space, candidates_of(space), probe_of(products, 6))
    for (name, f), cost in table.index.items():
        assert cost.cost == pytest.approx(0 if f == FP16 else own[name, str(f)], rel=FLOAT64_FORMULA)
        assert cost.standard_error == pytest.approx(0)
    assert (table.method, table.unit) == ("adjoint", "relative noise power")
    assert table.settings == {"n_samples": "6", "n_steps": "4", "n_directions": "2", "unused_decisions": "none"}


@settings(derandomize=True, max_examples=40)
@given(st.integers(0, 2**32), st.integers(2, 6), st.integers(1, 2), st.floats(0, 2))
def test_more_bits_never_cost_more_within_a_family(seed, n, n_directions, scatter):
    space = space_of(3, "uaq2,uaq3,uaq4,uaq3g64,uaq4g64,kmc2,kmc4,uaq2a8,uaq4a8,fp16")
    rng = np.random.default_rng(seed)
    products = drawn_products(space, lambda *_: rng.lognormal(-5, scatter), (n, n_directions), seed)
    table = adjoint_table(space, candidates_of(space), probe_of(products, n))
    ladders = {}
    for (name, f), cost in table.index.items():
        assert 0 <= cost.cost < math.inf
        ladders.setdefault((name, f.family, f.group_size, f.activation_bits), []).append((f.bits, cost.cost))
    assert max(map(len, ladders.values())) == 3
    for rungs in ladders.values():
        costs = [cost for _, cost in sorted(rungs)]
        assert all(more <= less * (1 + FLOAT64_FORMULA) for less, more in itertools.pairwise(costs))


@pytest.mark.parametrize("n_directions", [1, 2, 4, 16])
def test_expected_sqnr_is_unbiased(n_directions):
    rng, n = np.random.default_rng(3), 20000
    true = rng.lognormal(-5, 0.5, n)
    noise = true * rng.chisquare(n_directions, n) / n_directions
    found = expected_db(noise, n_directions)
    exact = float((-10 * np.log10(true)).mean())
    assert found.value == pytest.approx(exact, abs=STANDARD_ERRORS * found.standard_error)
    assert found.standard_error < 0.08
    plain = float((-10 * np.log10(noise)).mean())
    if n_directions < 16:
        assert plain - exact > 5 * found.standard_error  # what is taken off matters


def test_expected_sqnr_at_the_ends():
    assert expected_db(np.zeros(3), 4).value == math.inf
    assert expected_db(np.array([1.0, math.inf]), 4).value == -math.inf
    assert expected_db(np.array([0.1, 0.0]), 10**9).value == pytest.approx(10)  # exact samples have no decibels
    assert expected_db(np.array([0.1, 0.1]), 10**9).n == 2


def two_effects(second):
    """Decision d00 with +1 and -1, d01 with what is given."""
    space = space_of(2, "uaq4,fp16")
    ones = np.array([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]])
    products = {"d00": {"uaq4": ones}, "d01": {"uaq4": second * ones}}
    return effects_of(candidates_of(space), probe_of(products, 2))


@pytest.mark.parametrize(("second", "expected"), [(-1.0, 0.0), (1.0, 4.0), (0.5, 2.25)])
def test_effects_of_one_direction_add_in_amplitude(second, expected):
    effects = two_effects(second)
    assert effects.noise({"d00": UAQ4, "d01": FP16}).tolist() == [1.0, 1.0]
    assert effects.noise({"d00": UAQ4, "d01": UAQ4}).tolist() == [expected] * 2
    assert effects.noise({"d00": FP16, "d01": FP16}).tolist() == [0.0, 0.0]
    with pytest.raises(InputError, match="d00 at uaq3 was not measured"):
        effects.noise({"d00": UAQ3})


def test_a_loud_sample_is_heard_as_one_of_many():
    """Costs are compared up to the factor that all share."""
    quiet, loudness = drawn_products(SPACE, planted, (16, 4), seed=4), np.array([30.0, *[1.0] * 15])[:, None]
    loud = {d: {name: values * loudness for name, values in changes.items()} for d, changes in quiet.items()}
    before, after = (effects_of(CANDIDATES, probe_of(products, 16)) for products in (quiet, loud))
    assert after.levels[0] / after.levels[1:].mean() > 20
    assert np.log(after.levels).mean() == pytest.approx(0)
    of_loud = {key: CostEstimate(float(np.square(loud[key[0]][str(key[1])]).mean())) for key in before.costs}
    errors = [spread(costs) for costs in (raw_of(before), raw_of(after), of_loud)]
    assert errors[0] < 1.5 * 2 / 64  # of 64 squared normals
    assert errors[2] > 0.7 * 2 / 4  # four of them drown the rest
    assert errors[1] < 2 * errors[0]
    choice = dict.fromkeys(SPACE.decision_index, UAQ4)
    ratio = after.noise(choice) / before.noise(choice)
    assert ratio == pytest.approx([30.0**2, *[1.0] * 15], rel=FLOAT64_FORMULA)  # but its own noise is what it is


def spread(costs):
    """Variance of the logarithms of costs beside what was planted."""
    return float(np.var([math.log(cost.value / planted(d, str(f))) for (d, f), cost in costs.items()]))


def test_levels_are_told_from_products_of_many_choices():
    true = np.array([0.2, 1.0, 5.0, 1.0])
    products = drawn_products(SPACE, planted, (4, 64), seed=6)
    scaled = {d: {name: v * true[:, None] for name, v in c.items()} for d, c in products.items()}
    found = effects_of(CANDIDATES, probe_of(scaled, 4)).levels
    assert found == pytest.approx(true / np.exp(np.log(true).mean()), rel=SAMPLED_LEVEL)


def test_effects_of_some_samples_are_estimated_anew():
    effects = effects_of(CANDIDATES, probe_of(drawn_products(SPACE, planted, (6, 2)), 6))
    same = effects.of_samples(np.arange(6), CANDIDATES)
    assert same.costs == effects.costs
    kept = np.array([4, 0, 4])
    some = effects.of_samples(kept, CANDIDATES)
    key = ("d03", UAQ3)
    assert (some.shape, effects.shape) == ((3, 2), (6, 2))
    assert np.array_equal(some.products[key], effects.products[key][kept])
    assert np.array_equal(some.levels, effects.levels[kept])
    assert some.costs[key].n == 3
    assert some.costs[key] != effects.costs[key]
    choice = dict.fromkeys(SPACE.decision_index, UAQ3)
    assert np.array_equal(some.noise(choice), effects.noise(choice)[kept])


def test_scaled_products_have_their_cost_as_power():
    effects = effects_of(CANDIDATES, probe_of(drawn_products(SPACE, planted, (4, 2)), 4))
    for key, cost in effects.costs.items():
        scaled = effects.scaled(key)
        assert np.square(scaled).mean() == pytest.approx(cost.value, rel=FLOAT64_FORMULA)
        assert np.corrcoef(scaled, effects.products[key].ravel())[0, 1] == pytest.approx(1)
    assert effects.trust == 8 / (8 + TRUSTED_AT)


def test_what_has_no_effect_costs_nothing():
    products = drawn_products(SPACE, planted, (4, 2))
    products["d05"] = {name: np.zeros((4, 2)) for name in products["d05"]}
    probe = probe_of(products, 4, ("d05",))
    table = adjoint_table(SPACE, CANDIDATES, probe)
    for (name, f), cost in table.index.items():
        assert (cost.cost == 0) == (name == "d05" or f == FP16)
    assert table.settings["unused_decisions"] == "d05"
    effects = effects_of(CANDIDATES, probe)
    assert not effects.scaled(("d05", UAQ3)).any()
    nothing = {d: {name: np.zeros((4, 2)) for name in c} for d, c in products.items()}
    silent = effects_of(CANDIDATES, probe_of(nothing, 4))
    assert silent.levels.tolist() == [1.0] * 4
    assert {c.value for c in silent.costs.values()} == {0.0}
    assert not silent.noise(dict.fromkeys(SPACE.decision_index, UAQ3)).any()


def test_rounded_activations_add_to_the_products_of_the_weight():
    space = space_of(2, "uaq4,uaq4a8,fp16a8,fp16")
    rng = np.random.default_rng(7)
    products = {d: {"uaq4": rng.normal(size=(3, 2)), "a8": rng.normal(size=(3, 2))} for d in ("d00", "d01")}
    effects = effects_of(candidates_of(space), probe_of(products, 3))
    parts = products["d01"]
    for f, expected in ((UAQ4, parts["uaq4"]), (FP16A8, parts["a8"]), (UAQ4A8, parts["uaq4"] + parts["a8"])):
        got = effects.products["d01", f] * effects.levels[:, None]
        assert got == pytest.approx(expected, rel=FLOAT64_FORMULA)
    assert ("d01", FP16) not in effects.products
    del products["d01"]["a8"]
    with pytest.raises(InputError, match="no d01 at a8"):
        effects_of(candidates_of(space), probe_of(products, 3))


def test_one_sample_and_few_choices_are_taken_as_they_are():
    space = space_of(1, "uaq3,uaq4,fp16")
    products = {"d00": {"uaq3": [[3.0, 1.0]], "uaq4": [[1.0, 1.0]]}}
    table = adjoint_table(space, candidates_of(space), probe_of(products, 1))
    assert [table.index["d00", f].cost for f in (UAQ3, UAQ4, FP16)] == pytest.approx([5.0, 1.0, 0.0])
    assert math.isnan(table.index["d00", UAQ3].standard_error)


def test_effects_may_be_made_by_hand():
    effects = Effects({("a", UAQ3): np.ones((2, 1))}, np.array([2.0, 0.5]), {})
    assert effects.noise({"a": UAQ3}).tolist() == [4.0, 0.25]
    assert replace(effects, levels=np.ones(2)).noise({"a": UAQ3}).tolist() == [1.0, 1.0]
