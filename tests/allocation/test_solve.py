"""Allocation against brute force, its properties, and every way in which budgets are refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from allocation_tables import brute_force, random_table, table_of, tiny_tables
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from sedimo.allocation.program import relax
from sedimo.allocation.solve import Budget, allocate, allocate_within, bits_range, make_problem
from sedimo.allocation.table import Cost
from sedimo.errors import InputError
from sedimo.quant.formats import FP16, Format
from tolerances import FLOAT64_FORMULA, FLOAT64_SUM, HIGHS

KMC4, UAQ3 = Format.parse("kmc4"), Format.parse("uaq3")
PRINTED = 1e-4  # bits in a message have four decimals, rounded to the side that is possible


@examples(150)
@given(tiny_tables(), st.integers(1, 120))
def test_the_exact_rule_equals_brute_force(table, size_bytes):
    best = brute_force(table, size_bytes)
    if best is None:
        with pytest.raises(InputError, match="least possible"):
            allocate_within(table, Budget(size_bytes))
        return
    found = allocate_within(table, Budget(size_bytes), gap=0.0)
    assert found.objective == pytest.approx(best, abs=HIGHS)
    assert found.used_bytes <= size_bytes
    assert found.bound <= best + FLOAT64_SUM
    assert found.status == "optimal"


@examples(80)
@given(tiny_tables(4), st.integers(1, 100) | st.none(), st.integers(0, 80))
def test_operations_alone_or_beside_a_size_equal_brute_force(table, size_bytes, bops):
    best = brute_force(table, size_bytes, bops)
    if best is None:
        with pytest.raises(InputError, match="bit operations"):
            allocate_within(table, Budget(size_bytes, bops=bops))
        return
    found = allocate_within(table, Budget(size_bytes, bops=bops), gap=0.0)
    assert found.objective == pytest.approx(best, abs=HIGHS)
    assert size_bytes is None or found.used_bytes <= size_bytes
    assert found.budget_bytes == size_bytes
    assert found.bops == table.attention_bops + sum(table.index[d, f].bops for d, f in found.choice.items()) <= bops
    assert found.bound <= best + FLOAT64_SUM


@pytest.mark.parametrize("bits", [2.9, 3.5, 4.0, 5.7])
@pytest.mark.parametrize("accounting", ["bits", "stored_bits"])
def test_rules_keep_their_order_and_the_budget(bits, accounting):
    table = random_table(60, seed=3)
    exact, greedy, rounded = (allocate(table, **{accounting: bits}, rule=r) for r in ("milp", "greedy", "lp"))
    bound = relax(make_problem(table, Budget(exact.budget_bytes, exact.accounting))).bound
    assert bound <= exact.bound <= exact.objective <= greedy.objective <= rounded.objective
    assert exact.gap <= 1e-4
    assert greedy.gap == pytest.approx((greedy.objective - greedy.bound) / greedy.objective)
    for found in (exact, greedy, rounded):
        assert found.used_bytes <= found.budget_bytes == math.floor(bits * table.total_params / 8)
        assert found.bits == pytest.approx(8 * found.used_bytes / table.total_params)
    assert (greedy.status, rounded.status, exact.status) == ("heuristic", "heuristic", "optimal")


def test_the_bound_is_that_of_the_linear_relaxation():
    """Against an independent linear programme, which needs scaling that the multipliers do not."""
    from scipy.optimize import linprog

    table, budget = random_table(25, seed=5), Budget(120_000)
    problem = make_problem(table, budget)
    rows, columns = np.nonzero(np.isfinite(problem.cost))
    one_each = np.zeros((len(problem.rows), len(rows)))
    one_each[rows, np.arange(len(rows))] = 1
    unit = problem.cost[rows, columns].max() / 1e4
    result = linprog(
        problem.cost[rows, columns] / unit,
        A_ub=problem.size[0, rows, columns][None] / budget.size_bytes,
        b_ub=[1],
        A_eq=one_each,
        b_eq=np.ones(len(problem.rows)),
    )
    assert relax(problem).bound == pytest.approx(result.fun * unit)


def test_the_objective_is_the_sum_of_the_chosen_costs_with_its_error():
    table = random_table(12, seed=1)
    found = allocate(table, bits=4.0)
    chosen = [table.index[d, f] for d, f in found.choice.items()]
    assert found.objective == math.fsum(c.cost for c in chosen)
    assert found.standard_error == pytest.approx(math.sqrt(sum(c.standard_error**2 for c in chosen)))
    assert found.paper_bits == 8 * sum(c.paper_bytes for c in chosen) / table.total_params
    assert found.stored_bits == 8 * sum(c.stored_bytes for c in chosen) / table.total_params
    assert found.bops == sum(c.bops for c in chosen)


def test_the_recipe_names_every_layer_of_a_decision():
    table = random_table(3, seed=2)
    table = replace(table, layers={**table.layers, "layer0": ("layer0", "twin")})
    found = allocate(table, bits=4.0)
    assert found.recipe.layers["twin"] == found.recipe.layers["layer0"] == found.choice["layer0"]


def test_the_order_of_the_table_does_not_matter():
    table = random_table(20, seed=4)
    order = np.random.default_rng(0).permutation(len(table.costs))
    shuffled = replace(table, costs=tuple(table.costs[i] for i in order))
    assert allocate(shuffled, bits=3.3).choice == allocate(table, bits=3.3).choice


def test_a_loose_budget_gives_everything_its_least_cost():
    found = allocate(random_table(5, seed=0), bits=16.0)
    assert set(found.choice.values()) == {FP16}
    assert (found.objective, found.gap, found.status, found.n_solves) == (0.0, 0.0, "optimal", 0)


def test_bits_of_a_recipe_give_its_bytes_back():
    table = random_table(7, seed=8)
    uniform = allocate(table, rule="uniform:kmc4")
    again = allocate(table, bits=uniform.paper_bits)
    assert again.budget_bytes == uniform.used_bytes
    assert again.objective <= uniform.objective


def test_infeasible_budgets_tell_the_least_and_the_most():
    table = random_table(6, seed=0)
    low, high = bits_range(table)
    with pytest.raises(InputError) as caught:
        allocate(table, bits=low * 0.9)
    words = [float(w.strip(",.")) for w in str(caught.value).replace("(", " ").split() if w[0].isdigit()]
    assert words[-2] == pytest.approx(low, abs=PRINTED)
    assert words[-1] == pytest.approx(high, abs=PRINTED)
    assert allocate(table, bits=words[-2]).used_bytes <= low * 1.001 * table.total_params / 8
    assert high == 16.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs a budget"),
        ({"bits": 3.0, "stored_bits": 3.0}, "one budget, got bits and stored_bits"),
        ({"bits": math.nan}, "positive number"),
        ({"bits": -1.0}, "positive number"),
        ({"stored_bits": math.inf}, "positive number"),
        ({"budget_bytes": 0}, "must be positive"),
        ({"budget_bops": 5}, "least possible is .* bit operations"),
        ({"bits": 4.0, "budget_bops": -1}, "must not be negative"),
        ({"bits": 4.0, "rule": "best"}, "must be one of milp"),
        ({"rule": "uniform:kmc9"}, "bits must lie"),
        ({"rule": "uniform:kma5"}, "no costs of kma5; it has fp16, kmc2"),
        ({"rule": "uniform:kmc4", "bits": 3.0}, "more than the budget of 3.0000 bits"),
        ({"rule": "argmin", "bits": 4.0}, "Leave the budget out"),
        ({"bits": 4.0, "budget_bops": 1}, "Both must hold at once"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        allocate(random_table(4, seed=0), **arguments)


def test_attention_takes_its_share_of_the_operations_first():
    table = random_table(12, seed=1)
    plain = allocate(table, bits=6.0, budget_bops=8_000_000)
    more = replace(table, attention_bops=3_000_000)
    assert allocate(more, bits=6.0, budget_bops=11_000_000).choice == plain.choice
    assert allocate(more, bits=6.0, budget_bops=11_000_000).bops == plain.bops + 3_000_000 <= 11_000_000
    with pytest.raises(InputError, match="of which attention takes 3000000 in any case"):
        allocate(more, budget_bops=2_999_999)
    with pytest.raises(InputError, match="and 5000000 operations"):
        allocate(more, rule="uniform:kmc4", bits=16.0, budget_bops=5_000_000)


def test_operations_alone_say_nothing_of_bytes_but_equals_take_fewer():
    """Formats of equal cost and equal operations: the smallest is taken, though bytes are not limited."""
    large, small = Cost("a", FP16, 1.0, 0.0, 0, 200, 200, 5), Cost("a", KMC4, 1.0, 0.0, 0, 50, 50, 5)
    found = allocate(table_of([large, small], {"a": 100}), budget_bops=5)
    assert (found.choice, found.budget_bytes, found.budget_bops, found.used_bytes) == ({"a": KMC4}, None, 5, 50)


def test_an_empty_table_is_refused():
    with pytest.raises(InputError, match="no decisions"):
        allocate(table_of([], {}), bits=4.0)


def test_costs_below_zero_are_allowed():
    """Scores of a predictor, negated, have any sign."""
    entries = [
        Cost(d, f, c, 0.0, 0, b, b, 0)
        for d, f, c, b in [("a", KMC4, -3.0, 40), ("a", UAQ3, -1.0, 30), ("b", KMC4, -2.0, 40), ("b", UAQ3, 1.0, 30)]
    ]
    found = allocate(table_of(entries, {"a": 80, "b": 80}), budget_bytes=70)
    assert found.objective == -3.0
    assert found.choice == {"a": UAQ3, "b": KMC4}


def test_exchanges_spend_what_rounding_leaves():
    table = random_table(60, seed=3)
    gained = [
        allocate(table, bits=b, rule="lp").objective / allocate(table, bits=b, rule="greedy").objective
        for b in (3.0, 3.3, 3.6, 4.0, 4.4)
    ]
    assert max(gained) > 1.001


def test_the_gap_is_relative_to_what_the_budget_costs():
    """A constant that is added to every cost of a decision changes nothing."""
    table = random_table(20, seed=4)
    lifted = replace(table, costs=tuple(replace(c, cost=c.cost + 2.0**-16) for c in table.costs))
    plain, changed = (allocate(t, bits=3.5, rule="greedy") for t in (table, lifted))
    assert changed.gap == pytest.approx(plain.gap, rel=FLOAT64_FORMULA)
    assert plain.gap > 0


def test_an_infinite_cost_forbids_a_format():
    table = random_table(4, seed=0)
    costs = tuple(replace(c, cost=math.inf) if c.decision == "layer1" and c.format != KMC4 else c for c in table.costs)
    assert allocate(replace(table, costs=costs), bits=4.5).choice["layer1"] == KMC4
    nothing = tuple(replace(c, cost=math.inf) if c.decision == "layer1" else c for c in table.costs)
    with pytest.raises(InputError, match="'layer1' has no format of finite cost"):
        allocate(replace(table, costs=nothing), bits=4.5)
    minus = tuple(replace(c, cost=-math.inf) if c.decision == "layer1" else c for c in table.costs)
    with pytest.raises(InputError, match="'layer1' has -inf"):
        allocate(replace(table, costs=minus), bits=4.5)
    with pytest.raises(InputError, match="uaq3 is forbidden for decision 'layer1'"):
        allocate(replace(table, costs=costs), rule="uniform:uaq3")


def test_argmin_is_the_least_cost_of_each_decision():
    table = random_table(9, seed=6, formats=(UAQ3, KMC4))
    found = allocate(table, rule="argmin")
    assert all(table.index[d, f].cost == min(c.cost for c in table.by_decision[d]) for d, f in found.choice.items())
    assert (found.rule, found.budget_bytes) == ("argmin", found.used_bytes)


def test_the_bound_of_uniform_is_that_of_its_size():
    table = random_table(30, seed=6)
    found = allocate(table, rule="uniform:kmc4")
    bound = relax(make_problem(table, Budget(found.used_bytes))).bound
    assert found.bound == bound < allocate(table, bits=found.paper_bits).objective < found.objective


def test_uniform_names_the_decisions_that_cannot_take_the_format():
    table = random_table(5, seed=6)
    table = replace(table, costs=tuple(c for c in table.costs if (c.decision, c.format) != ("layer2", KMC4)))
    found = allocate(table, rule="uniform:kmc4")
    assert {f for d, f in found.choice.items() if d != "layer2"} == {KMC4}
    assert found.choice["layer2"] == FP16
    assert found.notes == ("layer2 cannot take kmc4 and has fp16",)
    assert found.bound <= found.objective


def test_a_known_choice_is_never_lost():
    table = random_table(40, seed=9)
    small = allocate(table, bits=3.4, gap=0.0)
    lazy = allocate_within(table, Budget(small.used_bytes + 1), gap=0.5, known=small)
    assert lazy.objective <= small.objective
