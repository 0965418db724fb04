"""Bits of weights and activations decided together: the exact programme, the published one, and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from allocation_tables import table_of, tiny_tables
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import linprog

from examples import examples
from sedimo.allocation.program import relax
from sedimo.allocation.solve import Budget, allocate, allocate_within, make_problem
from sedimo.allocation.table import Cost, of_family
from sedimo.errors import InputError
from sedimo.quant.families.uaq import UAQ
from sedimo.quant.formats import Format, count_bops, with_activations
from tolerances import FLOAT64_FORMULA, HIGHS

WIDTHS = (2, 3, 4, 5, 6, 8)
WEIGHTS = tuple(Format("uaq", bits) for bits in WIDTHS)
PAIRS = with_activations(WEIGHTS, WIDTHS)


@examples(150)
@given(tiny_tables(), st.integers(1, 120) | st.none(), st.integers(0, 120) | st.none())
def test_the_exact_programme_is_never_worse_than_rounding_nor_over_a_budget(table, size_bytes, bops):
    assume(size_bytes is not None or bops is not None)
    budget = Budget(size_bytes, bops=bops)
    try:
        rounded = allocate_within(table, budget, rule="lp")
    except InputError:
        return  # nothing fits, or rounding finds nothing that does; what the exact rule does then is tested elsewhere
    exact = allocate_within(table, budget, gap=0.0)
    assert exact.bound <= exact.objective <= rounded.objective + HIGHS
    for found in (exact, rounded):
        chosen = [table.index[d, f] for d, f in found.choice.items()]
        assert size_bytes is None or sum(c.paper_bytes for c in chosen) <= size_bytes
        assert bops is None or table.attention_bops + sum(c.bops for c in chosen) <= bops


def linear_table(thetas, sizes, formats):
    """Costs of orthogonality, theta (32 - b_w - b_a), for 8 n weights each, called so many times, without overhead."""
    entries, params = [], {}
    for i, (theta, (n, calls)) in enumerate(zip(thetas, sizes, strict=True)):
        params[f"d{i}"] = 8 * n
        for f in formats:
            cost = theta * (32 - f.bits - f.activation_bits)
            entries.append(Cost(f"d{i}", f, cost, 0.0, 0, n * f.bits, n * f.bits, count_bops(8 * n * calls, f)))
    return table_of(entries, params)


def least_of_all(table, size_bytes, bops):
    """The least cost over all choices, by adding whole axes; infinite when none fits."""
    cost, size, used = np.zeros(1), np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    for costs in table.by_decision.values():
        cost = np.add.outer(cost, [c.cost for c in costs]).ravel()
        size = np.add.outer(size, [c.paper_bytes for c in costs]).ravel()
        used = np.add.outer(used, [c.bops for c in costs]).ravel()
    return cost[(size <= size_bytes) & (used <= bops)].min(initial=np.inf)


thetas = st.lists(st.floats(0.01, 1), min_size=3, max_size=3)
sizes = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 9)), min_size=3, max_size=3)


@examples(40)
@given(thetas, sizes, st.floats(0.01, 1), st.floats(0.01, 1))
def test_pairs_under_both_budgets_equal_brute_force(thetas, sizes, size_share, bops_share):
    """All 46,656 choices of three decisions with 36 pairs each."""
    table = linear_table(thetas, sizes, PAIRS)
    taken = np.array([(c.paper_bytes, c.bops) for c in table.costs]).reshape(3, len(PAIRS), 2)
    low, high = taken.min(axis=1).sum(axis=0), taken.max(axis=1).sum(axis=0)
    size_bytes, bops = (low + (high - low) * (size_share, bops_share)).astype(int).tolist()
    best = least_of_all(table, size_bytes, bops)
    found = allocate_within(table, Budget(size_bytes, bops=bops), gap=0.0)
    assert found.objective == pytest.approx(best, abs=HIGHS)
    assert found.used_bytes <= size_bytes
    assert found.bops <= bops
    assert found.bound <= best + FLOAT64_FORMULA


@examples(60)
@given(st.integers(0, 10_000), st.floats(2.05, 7.95))
def test_the_rule_lp_is_the_published_programme_and_the_exact_one_beats_its_rounding(seed, bits):
    """OMPQ's: continuous bits that maximise importance times bits within a size, then rounded to whole bits."""
    rng = np.random.default_rng(seed)
    n = 12
    importances, sizes = rng.random(n) + 0.01, [(int(k), 1) for k in rng.integers(1, 1000, n)]
    table = linear_table(importances, sizes, [Format("uaq", b) for b in range(2, 9)])
    weights = np.array([8 * k for k, _ in sizes])
    limit = int(bits * weights.sum() / 8)
    published = linprog(
        -importances, A_ub=weights[None] / weights.sum(), b_ub=[8 * limit / weights.sum()], bounds=(2, 8)
    )
    relaxed = relax(make_problem(table, Budget(limit)))
    assert relaxed.bound == pytest.approx(16 * importances.sum() + published.fun)
    rounded = np.around(published.x)
    exact, ours = (allocate(table, bits=8 * limit / weights.sum(), rule=rule, gap=0.0) for rule in ("milp", "lp"))
    assert exact.objective <= ours.objective + HIGHS
    assert max(exact.used_bytes, ours.used_bytes) <= limit
    if weights @ rounded <= 8 * limit:  # to the nearest bits may exceed the budget: nothing enforces it
        assert exact.objective <= (importances * (16 - rounded)).sum() + HIGHS


def test_rounding_to_the_nearest_bits_can_exceed_the_budget_which_the_rule_lp_never_does():
    table = linear_table([1.0, 0.5], [(100, 1), (100, 1)], [Format("uaq", b) for b in range(2, 9)])
    published = linprog([-1.0, -0.5], A_ub=[[1, 1]], b_ub=[13.6], bounds=(2, 8))
    assert np.around(published.x).tolist() == [8, 6]
    assert 8 + 6 > 13.6
    found = allocate(table, bits=6.8, rule="lp")
    assert found.choice == {"d0": Format("uaq", 8), "d1": Format("uaq", 5)}


def test_the_bound_of_two_budgets_is_that_of_the_linear_relaxation():
    rng = np.random.default_rng(3)
    sizes = [(int(k), int(c)) for k, c in zip(rng.integers(1, 1000, 20), rng.integers(1, 60, 20), strict=True)]
    table = linear_table(rng.random(20), sizes, PAIRS)
    budget = Budget(int(sum(4.1 * k for k, _ in sizes)), bops=int(sum(8 * k * c * 17 for k, c in sizes)))
    problem = make_problem(table, budget)
    rows, columns = np.nonzero(np.isfinite(problem.cost))
    one_each = np.zeros((20, len(rows)))
    one_each[rows, np.arange(len(rows))] = 1
    result = linprog(
        problem.cost[rows, columns],
        A_ub=problem.size[:, rows, columns] / problem.limit[:, None],
        b_ub=[1, 1],
        A_eq=one_each,
        b_eq=np.ones(20),
    )
    bound = relax(problem).bound
    assert bound <= result.fun * (1 + FLOAT64_FORMULA)
    assert bound == pytest.approx(result.fun, rel=HIGHS)


def test_one_family_keeps_what_has_none_of_it():
    kmc, uaq, grouped = Format.parse("kmc4"), Format.parse("uaq4a8"), Format.parse("uaq4g64")
    entries = [Cost(d, f, 1.0, 0.0, 0, 5, 5, 5) for d, f in itertools.product("ab", (kmc, uaq, grouped))]
    found = of_family(table_of([*entries[:3], entries[3]], {"a": 10, "b": 10}), UAQ)
    assert [(c.decision, c.format) for c in found.costs] == [("a", uaq), ("b", kmc)]
