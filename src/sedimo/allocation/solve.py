"""The recipe of least cost under a budget, exactly or by a named rule.

Everything that decides is on the table's numbers; no clock, no random numbers, no file. The same table and
budget give the same recipe, whatever the order of the table's entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sedimo.allocation.fixed import allocate_fixed, is_fixed
from sedimo.allocation.greedy import fill, repair
from sedimo.allocation.problem import Allocation, Budget, IntArray, Problem, bytes_for_bits, make_problem
from sedimo.allocation.program import solve_checked
from sedimo.allocation.record import Outcome, infeasible, record
from sedimo.allocation.relaxation import Relaxation, drop_superfluous, relax
from sedimo.errors import InputError
from sedimo.sensitivity.table import SensitivityTable

GAP = 1e-4
RULES = ("milp", "greedy", "lp", "argmin", "uniform:FORMAT")


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

    Exactly one budget is given: `bits` per weight in the papers' accounting, `stored_bits` per weight or
    `budget_bytes` of the tensors that replace the weights. `budget_bops` limits the bit operations of one
    sample and denoiser call besides.

    Rules: `milp` (default; within `gap` of the optimum, with proof), `greedy` (exchanges from the Lagrangian
    choice), `lp` (the linear relaxation, its one split decision rounded down, as MPQ-Diff does), `argmin`
    (the least cost of each decision alone, Qua2SeDiMo's argmax of scores, no budget needed) and
    `uniform:kmc4` (the same format everywhere; no budget needed). A budget given to the last two is a
    condition that they are checked against.

    Raises:
        InputError: no budget or more than one, an unknown rule, or a budget that no choice keeps; then with
            the least and most possible bits.
    """
    budget = _read_budget(table, bits, stored_bits, budget_bytes, budget_bops)
    if is_fixed(rule):
        return allocate_fixed(table, budget, rule)
    if rule not in ("milp", "greedy", "lp"):
        raise InputError(f"the rule must be one of {', '.join(RULES)}, got {rule!r}.")
    if budget is None:
        raise InputError("allocation needs one budget: bits, stored_bits or budget_bytes.")
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
    if (problem.least_sizes > problem.limit).any():
        raise infeasible(table, budget)
    decided: _Decided | None = _Decided(problem.cheapest, problem.total_cost(problem.cheapest))
    if not problem.fits(problem.cheapest):
        starts = [] if known is None else [_columns(problem, table, known, budget)]
        decided = _decide(problem, rule, gap, starts)
    if decided is None and rule != "milp":
        raise InputError(f"the rule {rule!r} found no choice that keeps both budgets; use 'milp', which decides it.")
    if decided is None:
        raise infeasible(table, budget)
    pairs = zip(problem.options, decided.choice, strict=True)
    chosen = {row[int(column)].decision: row[int(column)] for row, column in pairs}
    outcome = Outcome(chosen, decided.bound, decided.n_solves, decided.is_heuristic)
    return record(table, budget, rule, outcome, gap=gap)


@dataclass(frozen=True, slots=True)
class _Decided:
    """A choice `[D]` of columns, a lower bound of the best objective, and how often a solver ran for it."""

    choice: IntArray
    bound: float
    n_solves: int = 0
    is_heuristic: bool = False


def _decide(problem: Problem, rule: str, gap: float, starts: Sequence[IntArray]) -> _Decided | None:
    """The outcome of a rule for a problem whose budget matters; None when nothing fits."""
    relaxed = relax(problem)
    rounded = repair(problem, relaxed.choice)
    known = [*starts, *([] if rounded is None else [fill(problem, rounded)])]
    if rule == "milp":
        return _decide_exactly(problem, relaxed, known, gap)
    if rounded is None:
        return None
    choice = rounded if rule == "lp" else _best(problem, known)
    return _Decided(choice, relaxed.bound, is_heuristic=True)


def _decide_exactly(problem: Problem, relaxed: Relaxation, known: Sequence[IntArray], gap: float) -> _Decided | None:
    least = math.fsum(problem.cost.min(axis=1))
    core, objective = problem, relaxed.bound
    if known:
        best = _best(problem, known)
        objective = problem.total_cost(best)
        if objective - relaxed.bound <= gap * (objective - least):
            return _Decided(best, relaxed.bound)  # the relaxation proves it
        core = drop_superfluous(problem, relaxed, objective, best)
    unit = (objective - least) / len(problem.options)
    solved = solve_checked(core, unit if unit > 0 else _spread(problem), gap)
    mended = None if solved.choice is None else repair(problem, solved.choice)
    found = [*known, *([] if mended is None else [fill(problem, mended)])]
    if not found:
        return None
    choice = _best(problem, found)
    proven = min(solved.bound, problem.total_cost(choice)) if solved.choice is not None else -math.inf
    bound = max(relaxed.bound, proven)
    return _Decided(choice, bound, solved.n_solves)


def _best(problem: Problem, choices: Sequence[IntArray]) -> IntArray:
    return min((c for c in choices if problem.fits(c)), key=problem.total_cost)


def _spread(problem: Problem) -> float:
    finite = problem.cost[np.isfinite(problem.cost)]
    return float(finite.max() - finite.min()) or 1.0


def _columns(problem: Problem, table: SensitivityTable, known: Allocation, budget: Budget) -> IntArray:
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


def _read_budget(
    table: SensitivityTable,
    bits: float | None,
    stored_bits: float | None,
    budget_bytes: int | None,
    budget_bops: int | None,
) -> Budget | None:
    if not table.costs:
        raise InputError(f"the sensitivity table {table.method!r} of {table.denoiser} has no decisions.")
    given = {"bits": bits, "stored_bits": stored_bits, "budget_bytes": budget_bytes}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise InputError(f"give one budget, got {' and '.join(names)}.")
    if budget_bops is not None and budget_bops < 0:
        raise InputError(f"budget_bops must not be negative, got {budget_bops}.")
    if bits is not None:
        return Budget(bytes_for_bits(bits, table.total_params), "paper", budget_bops)
    if stored_bits is not None:
        return Budget(bytes_for_bits(stored_bits, table.total_params), "stored", budget_bops)
    if budget_bytes is not None:
        if budget_bytes <= 0:
            raise InputError(f"budget_bytes must be positive, got {budget_bytes}.")
        return Budget(int(budget_bytes), "stored", budget_bops)
    if budget_bops is not None:
        raise InputError("budget_bops limits operations besides a size: give bits, stored_bits or budget_bytes too.")
    return None
