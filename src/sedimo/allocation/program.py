"""The integer programme, and HiGHS, whose answers are suspects.

What HiGHS does on this kind of problem, and what is done about it:

* costs of 1e-9 disappear in its absolute tolerances, and it stops at half of the budget with status
  optimal: costs are shifted and divided so that a known good objective is 1 per decision, sizes by what the
  budget leaves above the least;
* its answers may exceed a limit by its feasibility tolerance: they are summed again in integers, and a
  problem answered that way is solved again with the limit lowered by the excess, at most thrice;
* it prints to file descriptor 1 on some instances: the descriptor is silenced.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from sedimo.allocation._silence import silenced_stdout
from sedimo.allocation.problem import IntArray, Problem
from sedimo.errors import SedimoError

MAX_SOLVES = 4  # once, and thrice again
NODE_LIMIT = 20_000  # a count, not seconds: the answer must not depend on the machine
# An excess below the solver's tolerance does not vanish when the limit is lowered by as much.
_GROWTH = 100
_OPTIMAL, _LIMIT, _INFEASIBLE = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Answer:
    """What a solver says: a choice `[D]`, or None when it found none, and a lower bound of the best objective."""

    choice: IntArray | None
    bound: float


@dataclass(frozen=True, slots=True)
class Solved:
    """An answer that keeps every limit in integers, or the last one that did not when none was found."""

    choice: IntArray | None
    bound: float
    n_solves: int


Solver = Callable[[Problem[object], float, float], Answer]


def solve_checked(problem: Problem[object], unit: float, gap: float, solver: Solver | None = None) -> Solved:
    """Solves until the answer fits in integers, at most four times.

    `unit` is the cost that becomes 1, `gap` the relative distance from the optimum at which to stop. The
    bound is that of the first call, because later ones see lowered limits.
    """
    solver = solver or solve_highs
    first = answer = solver(problem, unit, gap)
    limit, choice, n_solves = problem.limit, answer.choice, 1
    while answer.choice is not None and not problem.fits(answer.choice) and n_solves < MAX_SOLVES:
        limit = limit - np.maximum(problem.used(answer.choice) - problem.limit, 0) * _GROWTH ** (n_solves - 1)
        answer = solver(Problem(problem.options, problem.cost, problem.size, limit), unit, gap)
        choice = choice if answer.choice is None else answer.choice
        n_solves += 1
    return Solved(choice, first.bound, n_solves)


def solve_highs(problem: Problem[object], unit: float, gap: float) -> Answer:
    """The integer programme by HiGHS (`scipy.optimize.milp`).

    Raises:
        SedimoError: HiGHS fails with anything but infeasibility, or reaches its node limit without a choice.
    """
    rows, columns = np.nonzero(np.isfinite(problem.cost))
    least = problem.cost.min(axis=1)
    smallest = problem.least_size_each  # [R, D]
    room = problem.limit - smallest.sum(axis=1)
    if (room < 0).any():
        return Answer(None, math.inf)
    size = (problem.size[:, rows, columns] - smallest[:, rows]) / np.maximum(room, 1)[:, None]
    one_each = scipy.sparse.csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
    with silenced_stdout():
        result = milp(
            (problem.cost[rows, columns] - least[rows]) / unit,
            integrality=np.ones(len(rows), dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size, -np.inf, np.minimum(room, 1))],
            options={"mip_rel_gap": gap, "node_limit": NODE_LIMIT, "disp": False},
        )
    if result.status not in (_OPTIMAL, _LIMIT, _INFEASIBLE):
        raise SedimoError(f"the solver gave up on {len(least)} decisions with {len(rows)} options: {result.message}")
    bound = result.mip_dual_bound
    total = math.fsum(least) + unit * float(bound) if bound is not None else -math.inf
    if result.x is None:
        if result.status != _INFEASIBLE:
            raise SedimoError(
                f"the solver found no choice for {len(least)} decisions within {NODE_LIMIT} nodes, which does not "
                "prove that there is none: loosen one of the budgets"
            )
        return Answer(None, total)
    picked = np.full(problem.cost.shape, -1.0)
    picked[rows, columns] = result.x
    return Answer(np.asarray(picked.argmax(axis=1), dtype=np.int64), total)
