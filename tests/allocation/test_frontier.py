"""The curve of cost over bits."""

from __future__ import annotations

import pytest
from allocation_tables import brute_force, random_table, tiny_tables
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from sedimo.allocation.solve import bits_range, bytes_for_bits, even_budgets, frontier
from sedimo.errors import InputError
from tolerances import FLOAT64_FORMULA


@examples(40)
@given(tiny_tables())
def test_the_objective_never_rises_with_the_budget(table):
    curve = frontier(table, even_budgets(table, 9), gap=0.0)
    objectives = [a.objective for a in curve]
    assert objectives == sorted(objectives, reverse=True)


def test_the_curve_falls_even_when_the_solver_is_lazy():
    table = random_table(40, seed=7)
    budgets = [3.0 + 0.002 * i for i in range(40)]
    curve = frontier(table, budgets, gap=0.3)
    objectives = [a.objective for a in curve]
    assert objectives == sorted(objectives, reverse=True)
    assert all(a.used_bytes <= a.budget_bytes for a in curve)


def test_budgets_are_sorted_and_counted_once():
    table = random_table(10, seed=7)
    curve = frontier(table, [4.0, 3.0, 4.0])
    assert [a.accounting for a in curve] == ["paper", "paper"]
    assert curve[0].paper_bits <= 3.0 < curve[1].paper_bits <= 4.0


def test_even_budgets_span_what_is_possible():
    table = random_table(10, seed=7)
    budgets = even_budgets(table, 5)
    assert (budgets[0], budgets[-1]) == bits_range(table)
    assert frontier(table, budgets)[-1].objective == 0.0


def test_even_budgets_may_end_early():
    table = random_table(10, seed=7)
    assert even_budgets(table, 3, most_bits=6.0)[-1] == 6.0
    assert even_budgets(table, 3, most_bits=60.0)[-1] == bits_range(table)[1]
    with pytest.raises(InputError, match="most_bits must be at least"):
        even_budgets(table, 3, most_bits=1.0)


@pytest.mark.parametrize("call", [lambda t: frontier(t, []), lambda t: even_budgets(t, 1)])
def test_too_few_points_are_refused(call):
    with pytest.raises(InputError, match="at least"):
        call(random_table(3, seed=0))


@examples(40)
@given(tiny_tables(), st.integers(0, 120))
def test_a_limit_of_operations_holds_along_the_curve(table, bops):
    budgets = sorted(set(even_budgets(table, 5)))
    curve = frontier(table, budgets, gap=0.0, rule="milp", bops=bops)
    best = [brute_force(table, bytes_for_bits(bits, table.total_params), bops) for bits in budgets]
    assert [a.objective for a in curve] == pytest.approx(
        [cost for cost in best if cost is not None], abs=FLOAT64_FORMULA
    )
    assert all(a.bops <= bops == a.budget_bops for a in curve)


def test_without_a_limit_of_operations_a_budget_that_nothing_keeps_is_refused():
    table = random_table(10, seed=7)
    with pytest.raises(InputError, match="no choice of formats"):
        frontier(table, [1.0, 4.0])
    assert frontier(table, [1.0, 4.0], bops=0) == ()
