"""Recipes by signed effects against all choices there are, and what is predicted of them against fresh draws."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from signed_problems import SignedProblem, signed_problem

from examples import examples
from sedimo.allocation.effects import allocate_signed, cross_validated_noise
from sedimo.allocation.program import GAP
from sedimo.allocation.solve import Budget, allocate_within
from sedimo.allocation.table import SensitivityTable
from sedimo.errors import InputError
from sedimo.methods.adjoint import effects_of
from synthetic_effects import candidates_of, drawn_products, probe_of, space_of, table_of
from tolerances import FLOAT64_FORMULA

N_SEEDS, N_BEST, N_GAINED = 150, 142, 95
WORST = 0.5  # relative, where most of the costs cancel; found: 0.39
SAMPLED_NOISE = 0.1  # of a mean of 400 x 4 squares: they have 4 %
SAMPLED_PREDICTION = 0.35  # of such a mean of 16 x 4 squares: they have 18 %
problems = st.builds(signed_problem, st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 4))


def found_in(problem: SignedProblem, budget: Budget, trust: float, **settings):
    return allocate_signed(problem.table, problem.effects, budget, trust=trust, **settings)


@examples(30, derandomize=True)
@given(problems, st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_the_budget_is_kept_and_the_start_is_never_better(problem, share, trust, with_bops):
    budget = problem.budget(share, with_bops=with_bops)
    try:
        start = allocate_within(problem.table, budget)
    except InputError:
        assert not any(problem.fits(choice, budget) for choice in problem.choices())
        with pytest.raises(InputError, match="no choice of formats keeps the budget"):
            found_in(problem, budget, trust)
        return
    found = found_in(problem, budget, trust)
    slack = FLOAT64_FORMULA * sum(c.cost for c in problem.table.costs)
    objective = problem.objective(found.choice, trust)
    best = problem.best(budget, trust)
    assert problem.fits(found.choice, budget)
    assert found.used_bytes == sum(problem.table.index[key].stored_bytes for key in found.choice.items())
    assert (found.accounting, found.budget_bytes, found.budget_bops) == ("stored", budget.size_bytes, budget.bops)
    assert found.objective == pytest.approx(objective, abs=slack)
    assert best - slack <= objective <= problem.objective(start.choice, trust) + slack
    assert found.bound <= best + slack
    assert found_in(problem, budget, trust, most_exchanges=0).bound <= best + slack
    assert found.gap == pytest.approx((found.objective - found.bound) / found.objective if found.objective > 0 else 0)
    assert (found.status, found.rule) == ("heuristic", "signed")


@pytest.mark.slow
def test_exchanges_nearly_always_end_at_the_best_of_all_choices():
    """They are local: the exact number on these seeds is a fact, and a change of it asks for a look."""
    n_best, n_gained, worst = 0, 0, 0.0
    for seed in range(N_SEEDS):
        problem = signed_problem(seed)
        budget, trust = problem.budget(0.2 + 0.6 * (seed % 10) / 10), 0.8
        found, best = found_in(problem, budget, trust).objective, problem.best(budget, trust)
        start = problem.objective(allocate_within(problem.table, budget).choice, trust)
        slack = FLOAT64_FORMULA * sum(c.cost for c in problem.table.costs)
        n_best += found <= best + slack
        n_gained += found < start - slack
        worst = max(worst, (found - best) / best)
    assert (n_best, n_gained) == (N_BEST, N_GAINED)
    assert worst < WORST


@examples(40, derandomize=True)
@given(problems, st.floats(0, 1))
def test_without_trust_it_is_the_sum_of_costs(problem, share):
    budget = problem.budget(share)
    found, summed = found_in(problem, budget, 0.0), allocate_within(problem.table, budget)
    slack = FLOAT64_FORMULA * sum(c.cost for c in problem.table.costs)
    assert found.objective == pytest.approx(summed.objective, abs=slack)
    assert found.objective == pytest.approx(problem.best(budget, 0.0), abs=slack)
    assert found.standard_error == pytest.approx(summed.standard_error, abs=slack)


@examples(40, derandomize=True)
@given(problems, st.floats(0.1, 1), st.integers(0, 2**32))
def test_more_formats_never_cost_more_by_the_sum(problem, share, seed):
    rng, budget = np.random.default_rng(seed), problem.budget(share)
    kept = []
    for row in problem.table.by_decision.values():
        smallest = min(row, key=lambda c: c.stored_bytes)
        kept += [c for c in row if c is smallest or rng.random() < 0.5]
    fewer = allocate_within(replace(problem.table, costs=tuple(kept)), budget)
    more = allocate_within(problem.table, budget)
    assert more.objective <= fewer.objective * (1 + GAP) + FLOAT64_FORMULA


def test_trust_is_that_of_the_effects_unless_given():
    differing = 0
    for seed in range(10):
        problem = signed_problem(seed)
        budget = problem.budget(0.5)
        own = allocate_signed(problem.table, problem.effects, budget)
        assert own == found_in(problem, budget, problem.effects.trust)
        differing += own.objective != found_in(problem, budget, 1.0).objective
    assert differing > 5


def moved(one, other):
    return sum(one.choice[name] != other.choice[name] for name in one.choice)


def test_at_most_so_many_exchanges_are_made_from_what_is_known():
    problem = signed_problem(3, n_decisions=12, n_formats=4)
    budget = problem.budget(0.5)
    known = allocate_within(problem.table, budget)
    whole = found_in(problem, budget, 1.0, known=known)
    path = [found_in(problem, budget, 1.0, known=known, most_exchanges=n) for n in range(20)]
    assert path[0].choice == known.choice
    assert all(1 <= moved(one, other) <= 2 for one, other in itertools.pairwise(path[:4]))
    objectives = [one.objective for one in path]
    assert all(later <= earlier for earlier, later in itertools.pairwise(objectives))
    assert path[-1] == whole
    again = found_in(problem, budget, 1.0, known=whole)
    assert again.choice == whole.choice  # nothing is left to gain
    other = found_in(problem, problem.budget(0.9), 1.0, known=whole, most_exchanges=0)
    assert other.choice == whole.choice


def test_two_formats_change_places_where_one_alone_does_not_fit():
    """The first decision gives bits to the second: neither half of the exchange would do."""
    problem = signed_problem(0, n_decisions=2, n_formats=1)
    two = [replace(c, stored_bytes=4) for c in problem.table.costs]
    a, b = two
    cheap_a, cheap_b = (_other(c, cost, stored_bytes=2) for c, cost in ((a, 1.5), (b, 9.0)))
    entries = [replace(a, cost=1.0), cheap_a, replace(b, cost=1.0), cheap_b]
    table = replace(problem.table, costs=tuple(entries))
    known = allocate_within(replace(table, costs=(entries[0], cheap_b)), Budget(6, "stored"))
    found = allocate_signed(table, problem.effects, Budget(6, "stored"), known=known, most_exchanges=1, trust=0.0)
    assert found.choice == {a.decision: cheap_a.format, b.decision: b.format}
    assert found.objective == pytest.approx(2.5)


def _other(cost, value, *, stored_bytes):
    formats = {str(cost.format): cost.format}
    other = next(c.format for c in signed_problem(1).table.costs if str(c.format) not in formats)
    return replace(cost, format=other, cost=value, stored_bytes=stored_bytes)


@examples(40, derandomize=True)
@given(problems, st.integers(0, 2**32))
def test_forbidden_formats_are_never_taken(problem, seed):
    """Each would cancel all the rest, if it might."""
    rng, entries, effects = np.random.default_rng(seed), [], problem.effects
    for row in problem.table.by_decision.values():
        largest = max(row, key=lambda c: c.stored_bytes)
        entries += [replace(c, cost=math.inf) if c is not largest and rng.random() < 0.5 else c for c in row]
    table = replace(problem.table, costs=tuple(entries))
    found = allocate_signed(table, effects, Budget(1 << 40, "stored"), trust=1.0)
    assert all(table.index[key].cost < math.inf for key in found.choice.items())
    assert found.objective < math.inf


N_SAMPLES, N_DIRECTIONS = 16, 4
SAME_SIZE = "uaq3,kmc3,kma3"


def chances(seed: int, n: int = N_SAMPLES):
    """Formats of one power, and products without anything in common."""
    space = space_of(40, SAME_SIZE)
    products = drawn_products(space, lambda *_: 1.0, (n, N_DIRECTIONS), seed)
    candidates = candidates_of(space)
    effects = effects_of(candidates, probe_of(products, n))
    return space, candidates, effects, table_of(space, candidates, effects)


def deciding(trust: float):
    return lambda table, effects: allocate_signed(table, effects, Budget(1 << 40, "stored"), trust=trust).choice


@pytest.mark.parametrize("seed", [0, 1])
def test_what_was_cancelled_by_chance_is_not_predicted(seed):
    _, candidates, effects, table = chances(seed)
    choice = deciding(1.0)(table, effects)
    inside = effects.noise(choice).mean()
    fresh = chances(seed + 100, 400)[2].noise(choice).mean()
    predicted = cross_validated_noise(table, effects, candidates, deciding(1.0))
    assert predicted.shape == (N_SAMPLES,)
    assert fresh == pytest.approx(40, rel=SAMPLED_NOISE)  # 40 decisions of power 1
    assert inside < 0.3 * fresh
    assert predicted.mean() == pytest.approx(fresh, rel=SAMPLED_PREDICTION)


def test_what_cancels_in_truth_is_predicted_too():
    """Two formats of each decision are opposite pushes of one direction."""
    space = space_of(20, "uaq3,kmc3")
    rng = np.random.default_rng(1)
    common = rng.normal(size=(N_SAMPLES, N_DIRECTIONS))
    products = {
        d.name: {"uaq3": common + 0.1 * rng.normal(size=common.shape), "kmc3": -common} for d in space.decisions
    }
    candidates = candidates_of(space)
    effects = effects_of(candidates, probe_of(products, N_SAMPLES))
    table = table_of(space, candidates, effects)
    predicted = cross_validated_noise(table, effects, candidates, deciding(1.0))
    alone = sum(min(c.cost for c in row) for row in table.by_decision.values())
    assert predicted.mean() < 0.05 * alone
    uniform = effects.noise(dict.fromkeys(space.decision_index, space.decisions[0].formats[0]))
    assert uniform.mean() > 10 * alone


def test_each_part_of_the_samples_is_predicted_without_it():
    _, candidates, effects, table = chances(2, 6)
    seen = []

    def decide(costs: SensitivityTable, shown):
        seen.append((costs, shown))
        return dict.fromkeys(table.by_decision, costs.costs[0].format)

    found = cross_validated_noise(table, effects, candidates, decide)
    assert np.array_equal(found, effects.noise(decide(table, effects)))
    folds = [shown.shape[0] for _, shown in seen[:-1]]
    assert folds == [4, 4, 5, 5]
    key = next(iter(effects.products))
    shown_rows = {tuple(row) for _, shown in seen[:-1] for row in shown.products[key].tolist()}
    assert shown_rows == {tuple(row) for row in effects.products[key].tolist()}
    for costs, shown in seen[:-1]:
        assert all(costs.index[k].cost == c.value for k, c in shown.costs.items())
        assert costs.index[key].cost != table.index[key].cost


def test_one_sample_can_hold_nothing_out():
    _, candidates, effects, table = chances(3, 1)
    choice = deciding(1.0)(table, effects)
    found = cross_validated_noise(table, effects, candidates, deciding(1.0))
    assert np.array_equal(found, effects.noise(choice))
