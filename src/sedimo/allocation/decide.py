"""From a problem to a choice by a named rule, and what is proven about it.

This looks at arrays only: whether a row is a decision or a group of them, and what its columns stand for,
is known to the caller. No clock, no random numbers: equal arrays give equal choices. Single exchanges promise nothing
about the distance from the optimum: they start the exact search, mend its answers, and stand in for it by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sedimo.allocation.problem import FloatArray, IntArray, Problem
from sedimo.allocation.program import solve_checked
from sedimo.allocation.relaxation import Relaxation, drop_superfluous, relax
from sedimo.errors import InputError

GAP = 1e-4
_FREE = 1e-15  # an exchange that takes no room counts as taking this share of a limit
SEARCHES = ("milp", "greedy", "lp")


@dataclass(frozen=True, slots=True)
class Decided:
    """A choice `[D]` of columns, a lower bound of the best objective, and how often a solver ran for it."""

    choice: IntArray
    bound: float
    n_solves: int = 0
    is_heuristic: bool = False


def decide(problem: Problem[object], *, rule: str, gap: float, starts: Sequence[IntArray] = ()) -> Decided | None:
    """The choice of one of `SEARCHES`, never worse than the `starts` that fit; None when nothing fits.

    Raises:
        InputError: the search ends without a choice, which proves nothing.
    """
    if (problem.least_sizes > problem.limit).any():
        return None
    if problem.fits(problem.cheapest):
        return Decided(problem.cheapest, problem.least_objective)
    relaxed = relax(problem)
    rounded = repair(problem, relaxed.choice)
    known = [*starts, *([] if rounded is None else [fill(problem, rounded)])]
    if rule == "milp":
        return _decide_exactly(problem, relaxed, known, gap)
    if rounded is None:
        raise InputError(f"the rule {rule!r} found no choice that keeps both budgets; use 'milp', which decides it.")
    choice = rounded if rule == "lp" else _best(problem, known)
    return Decided(choice, relaxed.bound, is_heuristic=True)


def _decide_exactly(
    problem: Problem[object], relaxed: Relaxation, known: Sequence[IntArray], gap: float
) -> Decided | None:
    least = problem.least_objective
    core, objective = problem, relaxed.bound
    if known:
        best = _best(problem, known)
        objective = problem.total_cost(best)
        if objective - relaxed.bound <= gap * (objective - least):
            return Decided(best, relaxed.bound)  # the relaxation proves it
        core = drop_superfluous(problem, relaxed, objective, best)
    unit = (objective - least) / len(problem.options)
    solved = solve_checked(core, unit if unit > 0 else _spread(problem), gap)
    mended = None if solved.choice is None else repair(problem, solved.choice)
    found = [*known, *([] if mended is None else [fill(problem, mended)])]
    if not found:
        if solved.choice is None:
            return None
        raise InputError("the solver's answers exceed a budget by a little, which proves nothing; loosen one.")
    choice = _best(problem, found)
    proven = min(solved.bound, problem.total_cost(choice)) if solved.choice is not None else -math.inf
    bound = max(relaxed.bound, proven)
    return Decided(choice, bound, solved.n_solves)


def _best(problem: Problem[object], choices: Sequence[IntArray]) -> IntArray:
    return min((c for c in choices if problem.fits(c)), key=problem.total_cost)


def _spread(problem: Problem[object]) -> float:
    finite = problem.cost[np.isfinite(problem.cost)]
    return float(finite.max() - finite.min()) or 1.0


def repair(problem: Problem[object], choice: IntArray) -> IntArray | None:
    """Exchanges options until the choice keeps the limits, cheapest relief first.

    Returns None where no single exchange helps any more; with one limit that means that nothing fits.
    """
    choice = choice.copy()
    rows = np.arange(len(choice))
    while not problem.fits(choice):
        used = problem.used(choice)
        change = problem.size - problem.size[:, rows, choice][..., None]
        relief = _violation(problem, used) - _violation(problem, used[:, None, None] + change)
        rise = problem.cost - problem.cost[rows, choice][:, None]
        helps = (relief > 0) & np.isfinite(problem.cost)
        if not helps.any():
            return None
        price = np.where(helps, rise, np.inf) / np.where(helps, relief, 1.0)
        row, column = np.unravel_index(int(price.argmin()), price.shape)
        choice[row] = column
    return choice


def fill(problem: Problem[object], choice: IntArray) -> IntArray:
    """Exchanges options for cheaper ones that still fit, most saved per room first, until none is left."""
    choice = choice.copy()
    rows = np.arange(len(choice))
    room_unit = np.maximum(problem.limit, 1)[:, None, None]
    while True:
        change = problem.size - problem.size[:, rows, choice][..., None]
        left = (problem.limit - problem.used(choice))[:, None, None]
        saved = problem.cost[rows, choice][:, None] - problem.cost
        takes = (saved > 0) & (change <= left).all(axis=0)
        if not takes.any():
            return choice
        weight = (np.maximum(change, 0) / room_unit).sum(axis=0)
        gain = np.where(takes, saved, 0.0) / np.maximum(weight, _FREE)
        row, column = np.unravel_index(int(gain.argmax()), gain.shape)
        choice[row] = column


def _violation(problem: Problem[object], used: IntArray) -> FloatArray:
    """By how much limits are exceeded, relative to them and summed; `used` is `[R, ...]`."""
    over = np.maximum(used - problem.limit.reshape(-1, *[1] * (used.ndim - 1)), 0)
    unit = np.maximum(problem.limit, 1).reshape(-1, *[1] * (used.ndim - 1))
    return np.asarray((over / unit).sum(axis=0), dtype=np.float64)
