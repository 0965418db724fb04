"""The best variant of every group under a budget.

A group is decided as one: its variants are the options of one row of the same problem that `solve.py` puts
for single decisions, pruned to those that a best choice can need.

Source:
    Mills et al. 2024, Qua2SeDiMo (arXiv 2412.14628): enumeration of a block's variants, and their argmax.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from sedimo.allocation.decide import GAP, SEARCHES, decide
from sedimo.allocation.fixed import ARGMIN, judge
from sedimo.allocation.pareto import pareto
from sedimo.allocation.problem import Allocation, Budget, IntArray, Options, Problem, assemble, read_budget
from sedimo.allocation.record import Outcome, infeasible, record
from sedimo.errors import InputError
from sedimo.sensitivity.variants import GroupVariants, VariantTable


def allocate_variants(
    table: VariantTable,
    *,
    bits: float | None = None,
    stored_bits: float | None = None,
    budget_bytes: int | None = None,
    budget_bops: int | None = None,
    rule: str = "milp",
    gap: float = GAP,
) -> Allocation:
    """The variant of every group: least total cost within a budget; `choice` is the format of every decision.

    Budgets and the rules `milp`, `greedy` and `lp` are those of `allocate`. `argmin` is the least cost of each
    group alone, Qua2SeDiMo's argmax of scores; a budget given to it is a condition that it is checked against.

    Raises:
        InputError: no budget or more than one, an unknown rule, or a budget that no choice keeps; then with
            the least and most possible bits.
    """
    if not table.groups:
        raise InputError(f"the variants of {table.denoiser} by {table.method!r} have no decisions.")
    budget = read_budget(
        table.total_params, bits=bits, stored_bits=stored_bits, budget_bytes=budget_bytes, budget_bops=budget_bops
    )
    if rule == ARGMIN:
        chosen = [group.variant(_cheapest(group)) for group in _sorted(table)]
        return judge(table, chosen, make=partial(_make_problem, table), rule=rule, budget=budget)
    if rule not in SEARCHES:
        raise InputError(f"the rule must be one of {', '.join((*SEARCHES, ARGMIN))}, got {rule!r}.")
    if budget is None:
        raise InputError(
            "allocation needs a budget: bits, stored_bits or budget_bytes, budget_bops, or a size and bops."
        )
    return _allocate_within(table, budget, rule, gap)


def _allocate_within(table: VariantTable, budget: Budget, rule: str, gap: float) -> Allocation:
    problem = _make_problem(table, budget)
    decided = decide(problem, rule=rule, gap=gap)
    if decided is None:
        allowed = (_sizes(group, budget)[:, np.isfinite(group.cost)] for group in table.groups)
        raise infeasible(budget, table, allowed)
    rows = zip(_sorted(table), problem.options, decided.choice, strict=True)
    chosen = tuple(group.variant(options[int(column)]) for group, options, column in rows)
    outcome = Outcome(chosen, problem.least_objective, decided.bound, decided.n_solves, decided.is_heuristic)
    return record(table, budget, rule, outcome, gap=gap)


def _make_problem(table: VariantTable, budget: Budget) -> Problem[int]:
    """The problem of a table; its options are rows of `GroupVariants`."""
    return assemble([_pareto_rows(group, budget) for group in _sorted(table)], budget.limits(table.attention_bops))


def _pareto_rows(group: GroupVariants, budget: Budget) -> Options[int]:
    size = _sizes(group, budget)
    kept = pareto(group.cost, size, np.vstack([group.paper_bytes, _names(group)]))
    if not len(kept):
        raise InputError(f"group {group.group!r} has no variant of finite cost; add formats to the space.")
    return Options(tuple(kept.tolist()), group.cost[kept], size[:, kept])


def _cheapest(group: GroupVariants) -> int:
    """The variant of least cost; the smaller one of equals, then the first by the names of its formats."""
    keys = (*_names(group)[::-1], group.stored_bytes, group.paper_bytes, group.cost)
    return int(np.lexsort(keys)[0])


def _sizes(group: GroupVariants, budget: Budget) -> IntArray:
    """What each variant takes of each resource, [R, V]."""
    return np.array(budget.limited(group.paper_bytes, group.stored_bytes, group.bops), dtype=np.int64)


def _names(group: GroupVariants) -> IntArray:
    """The place of each decision's format among the sorted texts, [w, V]: equals do not depend on their order."""
    ranks = [np.argsort(np.argsort([str(f) for f in formats])) for formats in group.formats]
    return np.array([rank[column] for rank, column in zip(ranks, group.choice.T, strict=True)], dtype=np.int64)


def _sorted(table: VariantTable) -> list[GroupVariants]:
    """Groups by name: the answer does not depend on their order."""
    return sorted(table.groups, key=lambda group: group.group)
