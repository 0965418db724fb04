"""Allocation over groups against brute force, against allocation over decisions, and at the size of SDXL."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from allocation_tables import random_table, table_of, tiny_tables
from hypothesis import given
from hypothesis import strategies as st
from variant_tables import Grouped, brute_force, grouped, sdxl_variants, tiny_variant_tables

from examples import examples
from sedimo.allocation.solve import allocate
from sedimo.allocation.table import Cost
from sedimo.errors import InputError
from sedimo.quant.formats import Format
from tolerances import FLOAT64_SUM, HIGHS

FOUR_FORMATS = tuple(Format.parse(t) for t in ("uaq3", "kmc3", "uaq4", "kmc4"))


def bits_of(table: Grouped, size_bytes: int) -> float:
    return 8 * size_bytes / table.total_params


def sums_of(table: Grouped, choice):
    """Cost, paper bytes and bit operations of a choice, looked up row by row."""
    totals = np.zeros(3)
    for group in table.groups:
        columns = [formats.index(choice[d]) for d, formats in group.formats.items()]
        (row,) = np.flatnonzero((group.choice == columns).all(axis=1))
        totals += group.cost[row], group.paper_bytes[row], group.bops[row]
    return totals


@examples(120)
@given(tiny_variant_tables(), st.integers(1, 120))
def test_the_exact_rule_equals_brute_force(table, size_bytes):
    best = brute_force(table, size_bytes)
    if best is None:
        with pytest.raises(InputError, match="least possible"):
            table.allocate(bits=bits_of(table, size_bytes))
        return
    found = table.allocate(bits=bits_of(table, size_bytes), gap=0.0)
    assert found.objective == pytest.approx(best, abs=HIGHS)
    assert found.used_bytes <= found.budget_bytes == size_bytes
    assert found.bound <= best + FLOAT64_SUM
    assert found.status == "optimal"
    cost, paper, bops = sums_of(table, found.choice)
    assert (found.objective, found.used_bytes, found.bops) == (pytest.approx(cost, abs=FLOAT64_SUM), paper, bops)


@examples(80)
@given(tiny_variant_tables(), st.integers(1, 100), st.integers(0, 80))
def test_two_budgets_equal_brute_force(table, size_bytes, bops):
    best = brute_force(table, size_bytes, bops)
    if best is None:
        with pytest.raises(InputError, match="bit operations"):
            table.allocate(bits=bits_of(table, size_bytes), budget_bops=bops)
        return
    found = table.allocate(bits=bits_of(table, size_bytes), budget_bops=bops, gap=0.0)
    assert found.objective == pytest.approx(best, abs=HIGHS)
    assert found.used_bytes <= size_bytes
    assert found.bops <= bops
    assert found.bound <= best + FLOAT64_SUM


@pytest.mark.parametrize("budget", [{"bits": 3.4}, {"stored_bits": 3.7}, {"budget_bytes": 160_000}])
def test_costs_that_add_give_what_the_decisions_alone_give(budget):
    table = random_table(24, seed=5, formats=FOUR_FORMATS)
    together = grouped(table, [4, 1, 5, 2, 3, 4, 4, 1])
    found, single = together.allocate(**budget, gap=0.0), allocate(table, **budget, gap=0.0)
    assert found.objective == pytest.approx(single.objective, rel=HIGHS)
    assert (found.budget_bytes, found.accounting) == (single.budget_bytes, single.accounting)
    assert found.used_bytes <= found.budget_bytes
    assert sorted(found.choice) == sorted(single.choice)


def test_groups_of_one_are_decisions():
    table = random_table(30, seed=6)
    found, single = grouped(table, [1] * 30).allocate(bits=3.5), allocate(table, bits=3.5)
    assert found == single


@pytest.mark.parametrize("bits", [2.9, 3.5, 5.7])
def test_rules_keep_their_order_and_the_budget(bits):
    rng = np.random.default_rng(0)
    table = grouped(random_table(36, seed=3), [3] * 12, lambda cost: cost * rng.lognormal(0, 0.5, len(cost)))
    exact, greedy, rounded = (table.allocate(bits=bits, rule=r) for r in ("milp", "greedy", "lp"))
    assert exact.bound <= exact.objective <= greedy.objective <= rounded.objective
    assert exact.gap <= 1e-4
    assert (exact.status, greedy.status, rounded.status) == ("optimal", "heuristic", "heuristic")
    assert max(a.used_bytes for a in (exact, greedy, rounded)) <= exact.budget_bytes


@examples(40)
@given(tiny_variant_tables(), st.integers(0, 2**32), st.sampled_from(["milp", "argmin"]))
def test_the_order_of_groups_variants_and_formats_does_not_matter(table, seed, rule):
    rng = np.random.default_rng(seed)
    groups = []
    for group in table.groups:
        rows = rng.permutation(len(group))
        orders = [rng.permutation(len(formats)) for formats in group.formats.values()]
        choice = np.array([np.argsort(o)[c] for o, c in zip(orders, group.choice.T, strict=True)]).T[rows]
        formats = {d: tuple(f[i] for i in o) for (d, f), o in zip(group.formats.items(), orders, strict=True)}
        names = ("cost", "standard_error", "paper_bytes", "stored_bytes", "bops")
        arrays = {name: getattr(group, name)[rows] for name in names}
        groups.append(replace(group, formats=formats, choice=choice, **arrays))
    shuffled = replace(table, groups=tuple(groups[i] for i in rng.permutation(len(groups))))
    allowed = [group.paper_bytes[np.isfinite(group.cost)] for group in table.groups]
    middle = sum(int(size.min()) + int(size.max()) for size in allowed) // 2
    budget = {} if rule == "argmin" else {"bits": bits_of(table, middle)}
    assert shuffled.allocate(rule=rule, **budget) == table.allocate(rule=rule, **budget)


def groups_of_one(costs: dict[str, list[float]], formats: tuple[Format, ...], sizes: list[int]) -> Grouped:
    """Each decision of ten weights in a group by itself."""
    entries = [Cost(d, f, 0.0, 0.0, 0, size, size, 0) for d in costs for f, size in zip(formats, sizes, strict=True)]
    table, columns = table_of(entries, dict.fromkeys(costs, 10)), np.arange(len(formats))[:, None]
    own = ((name, np.array(values)) for name, values in costs.items())
    return Grouped(table, tuple(table.group(d, {d: formats}, columns, values, 0 * values) for d, values in own))


@pytest.mark.parametrize("arguments", [{"rule": "argmin"}, {"bits": 8.0}])
@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_of_equal_variants_the_first_by_name_is_taken(order, arguments):
    formats = tuple(FOUR_FORMATS[i] for i in order)
    found = groups_of_one({"a": [1.0] * 4}, formats, [10] * 4).allocate(**arguments)
    assert found.choice == {"a": Format.parse("kmc3")}


def test_of_equal_groups_the_same_one_gets_what_is_left_in_any_order():
    """Room for the better variant of one of the two."""
    table = groups_of_one({"a": [2.0, 1.0], "b": [2.0, 1.0]}, FOUR_FORMATS[:2], [10, 20])
    found = table.allocate(bits=12.0)
    turned = replace(table, groups=table.groups[::-1]).allocate(bits=12.0)
    assert (found.objective, found.used_bytes) == (3.0, 30)
    assert turned == found


@examples(60)
@given(tiny_variant_tables())
def test_argmin_is_the_least_cost_of_each_group_and_the_smaller_of_equals(table):
    found = table.allocate(rule="argmin")
    for group in table.groups:
        cost, paper, _ = sums_of(replace(table, groups=(group,)), found.choice)
        assert cost == group.cost.min()
        assert paper == group.paper_bytes[group.cost == cost].min()
    assert (found.rule, found.status, found.budget_bytes) == ("argmin", "heuristic", found.used_bytes)
    assert found.bound <= found.objective


def test_argmin_needs_no_budget_but_keeps_one():
    table = grouped(random_table(9, seed=6, formats=FOUR_FORMATS), [3, 3, 3])
    free = table.allocate(rule="argmin")
    exactly = table.allocate(rule="argmin", bits=free.paper_bits, budget_bops=free.bops)
    assert (exactly.choice, exactly.budget_bops) == (free.choice, free.bops)
    with pytest.raises(InputError, match=r"more than the budget of 3\.0000 bits"):
        table.allocate(rule="argmin", bits=3.0)
    with pytest.raises(InputError, match=f"more than the budget of .* and {free.bops - 1} operations"):
        table.allocate(rule="argmin", bits=16.0, budget_bops=free.bops - 1)


@pytest.mark.parametrize(
    "budget", [{"bits": 1.9}, {"stored_bits": 1.9}, {"budget_bytes": 1}, {"bits": 4.0, "budget_bops": 1}]
)
def test_infeasible_budgets_are_refused_in_the_words_of_allocate(budget):
    table = random_table(6, seed=0)
    with pytest.raises(InputError) as single:
        allocate(table, **budget)
    with pytest.raises(InputError) as together:
        grouped(table, [1, 2, 3]).allocate(**budget)
    assert str(together.value) == str(single.value)
    assert "least possible" in str(single.value)


def test_what_is_possible_counts_allowed_variants_only():
    table = grouped(random_table(2, seed=0), [2])
    (group,) = table.groups
    middle = int(np.argsort(group.paper_bytes)[len(group.cost) // 2])
    cost = np.where(np.arange(len(group.cost)) == middle, 1.0, np.inf)
    bits = 8 * int(group.paper_bytes[middle]) / table.total_params
    with pytest.raises(InputError) as caught:
        replace(table, groups=(replace(group, cost=cost),)).allocate(bits=2.0)
    low, high = math.ceil(bits * 1e4) / 1e4, math.floor(bits * 1e4) / 1e4
    assert f"least possible is {low:.4f} bits and the most {high:.4f}" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs a budget"),
        ({"bits": 3.0, "stored_bits": 3.0}, "one budget, got bits and stored_bits"),
        ({"bits": math.nan}, "positive number"),
        ({"budget_bytes": 0}, "must be positive"),
        ({"budget_bops": 5}, "least possible is .* bit operations"),
        ({"bits": 4.0, "budget_bops": -1}, "must not be negative"),
        ({"bits": 4.0, "rule": "uniform:kmc4"}, "must be one of milp, greedy, lp, argmin, got 'uniform:kmc4'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        grouped(random_table(4, seed=0, formats=FOUR_FORMATS), [2, 2]).allocate(**arguments)


@pytest.mark.parametrize("arguments", [{"bits": 16.0}, {"rule": "argmin"}])
def test_a_group_of_forbidden_variants_is_refused(arguments):
    table = grouped(random_table(4, seed=0), [2, 2])
    first, second = table.groups
    forbidden = replace(second, cost=np.full(len(second), np.inf))
    with pytest.raises(InputError, match=r"group 'layer2\+layer3' has no variant of finite cost"):
        replace(table, groups=(first, forbidden)).allocate(**arguments)


def test_the_recipe_names_every_layer_of_a_decision():
    table = random_table(3, seed=2)
    table = replace(table, layers={**table.layers, "layer0": ("layer0", "twin")})
    found = grouped(table, [2, 1]).allocate(bits=4.0)
    assert found.recipe.layers["twin"] == found.recipe.layers["layer0"] == found.choice["layer0"]


def test_the_error_of_the_sum_takes_groups_as_independent():
    table = grouped(random_table(6, seed=1, formats=FOUR_FORMATS), [2, 2, 2])
    table = replace(table, groups=tuple(replace(g, standard_error=np.full(len(g), 2.0)) for g in table.groups))
    assert table.allocate(bits=3.7).standard_error == pytest.approx(math.sqrt(12))


@examples(40)
@given(tiny_tables(4), st.integers(1, 120))
def test_one_group_of_everything_is_its_best_row_that_fits(table, size_bytes):
    together = grouped(table, [len(table.by_decision)])
    (group,) = together.groups
    fits = group.paper_bytes <= size_bytes
    if fits.any():
        found = together.allocate(bits=bits_of(together, size_bytes), gap=0.0)
        assert found.objective == pytest.approx(group.cost[fits].min(), abs=HIGHS)


@pytest.mark.timeout(60)  # it takes half a second; pruning by pairs, or no pruning, takes minutes
def test_the_groups_of_sdxl():
    table = sdxl_variants()
    assert (len(table.groups), sum(len(group) for group in table.groups)) == (243, 343_458)
    for bits in (3.3, 3.6):
        found = table.allocate(bits=bits)
        assert found.used_bytes <= found.budget_bytes == math.floor(bits * table.total_params / 8)
        assert found.gap <= 1e-4
        assert found.status == "optimal"
    assert table.allocate(rule="argmin").objective <= found.objective
