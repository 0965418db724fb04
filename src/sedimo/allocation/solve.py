"""The recipe of least cost under a budget, exactly or by a named rule.

Everything that decides is on the table's numbers; no clock, no random numbers, no file. The same table and
budget give the same recipe, whatever the order of the table's entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sedimo.allocation.decide import GAP, SEARCHES, decide
from sedimo.allocation.fixed import ARGMIN, UNIFORM, allocate_fixed, is_fixed
from sedimo.allocation.problem import Allocation, Budget, IntArray, Problem, make_problem, read_budget
from sedimo.allocation.record import Outcome, as_variant, infeasible, record
from sedimo.errors import InputError
from sedimo.sensitivity.table import Cost, SensitivityTable

RULES = (*SEARCHES, ARGMIN, f"{UNIFORM}FORMAT")


def allocate(
    table: SensitivityTable,
    *,
    bits: float | None = None,
    stored_bits: float | None = None,
    budget_bytes: int | None = None,
    budget_bops: int | None = None,
    rule: str = "milp",
    gap: float = GAP,
) -> Allocation:
    """The format of every decision: least total cost within a budget.

    One size is given, `bits` per weight in the papers' accounting, `stored_bits` per weight or `budget_bytes` of
    the tensors that replace the weights, or `budget_bops`, or both. `budget_bops` limits the bit operations of one
    sample and call of the whole denoiser: the products of attention, which stay at 16 bits, count. Alone it says
    nothing of bytes: formats that compute in 16 bits (codebooks, fp16) are then alike, and the best one is taken.

    Rules: `milp` (default; within `gap` of the optimum, with proof), `greedy` (exchanges from the Lagrangian
    choice), `lp` (the linear relaxation, its one split decision rounded down, as MPQ-Diff does), `argmin`
    (the least cost of each decision alone, Qua2SeDiMo's argmax of scores, no budget needed) and
    `uniform:kmc4` (the same format everywhere; no budget needed). A budget given to the last two is a
    condition that they are checked against.

    Raises:
        InputError: no budget or more than one, an unknown rule, or a budget that no choice keeps; then with
            the least and most possible bits.
    """
    if not table.costs:
        raise InputError(f"the sensitivity table {table.method!r} of {table.denoiser} has no decisions.")
    budget = read_budget(
        table.total_params, bits=bits, stored_bits=stored_bits, budget_bytes=budget_bytes, budget_bops=budget_bops
    )
    if is_fixed(rule):
        return allocate_fixed(table, budget, rule)
    if rule not in SEARCHES:
        raise InputError(f"the rule must be one of {', '.join(RULES)}, got {rule!r}.")
    if budget is None:
        raise InputError(
            "allocation needs a budget: bits, stored_bits or budget_bytes, budget_bops, or a size and bops."
        )
    return allocate_within(table, budget, rule=rule, gap=gap)


def allocate_within(
    table: SensitivityTable,
    budget: Budget,
    *,
    rule: str = "milp",
    gap: float = GAP,
    known: Allocation | None = None,
) -> Allocation:
    """Like `allocate`, for a `Budget`; the result is never worse than `known`, a choice that fits it.

    Raises:
        InputError: no choice keeps the budget.
    """
    problem = make_problem(table, budget)
    starts = [] if known is None else [_columns(problem, table, known, budget)]
    decided = decide(problem, rule=rule, gap=gap, starts=starts)
    if decided is None:
        raise infeasible(budget, table, (_sizes(costs, budget) for costs in table.by_decision.values()))
    pairs = zip(problem.options, decided.choice, strict=True)
    chosen = tuple(as_variant(row[int(column)]) for row, column in pairs)
    outcome = Outcome(chosen, problem.least_objective, decided.bound, decided.n_solves, decided.is_heuristic)
    return record(table, budget, rule, outcome, gap=gap)


def _sizes(costs: Sequence[Cost], budget: Budget) -> IntArray:
    """What the allowed formats of a decision take, [R, V]."""
    return np.array([budget.sizes(entry) for entry in costs if entry.cost < math.inf], dtype=np.int64).T


def _columns(problem: Problem[Cost], table: SensitivityTable, known: Allocation, budget: Budget) -> IntArray:
    """The columns of a known choice, or of options that are as good and as small."""
    found = np.empty(len(problem.options), dtype=np.int64)
    for i, row in enumerate(problem.options):
        entry = table.index[row[0].decision, known.choice[row[0].decision]]
        sizes = budget.sizes(entry)
        found[i] = next(
            j
            for j, other in enumerate(row)
            if other.cost <= entry.cost and all(a <= b for a, b in zip(budget.sizes(other), sizes, strict=True))
        )
    return found
