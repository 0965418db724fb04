"""From a problem to a choice by a named rule, and what is proven about it: bounds, exchanges, and HiGHS.

A multiple-choice knapsack: exactly one option per row, least total cost, at most so many bytes, bit operations, or
both. Sizes stay integers; whoever answers is checked against them. This looks at arrays only: whether a row is a
decision or a group of them, and what its columns stand for, is known to the caller. No clock, no random numbers: equal
arrays give equal choices.

Lower bounds are by Lagrange multipliers: for any prices p >= 0 per unit of each resource, the sum over decisions of
min(cost + p * size) minus p * limit is at most the best objective. The best prices are found by nested bisection on the
sign of what is left of the limits, because that needs no solver and no scaling; the bound holds for any prices, so that
its quality, not its truth, depends on the search.

Single exchanges promise nothing about the distance from the optimum: they start the exact search, mend its answers, and
stand in for it by name.

The answers of HiGHS are suspects. What it does on this kind of problem, and what is done about it:

* costs of 1e-9 disappear in its absolute tolerances, and it stops at half of the budget with status
  optimal: costs are shifted and divided so that a known good objective is 1 per decision, sizes by what the
  budget leaves above the least;
* its answers may exceed a limit by its feasibility tolerance: they are summed again in integers, and a
  problem answered that way is solved again with the limit lowered by the excess, at most thrice;
* it prints to file descriptor 1 on some instances: the descriptor is silenced.

Source:
    Geoffrion 1974, Lagrangean relaxation for integer programming.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from sedimo.allocation.variants import FloatArray, IntArray, Variants
from sedimo.errors import InputError, SedimoError

GAP = 1e-4
SEARCHES = ("milp", "greedy", "lp")
MAX_SOLVES = 4  # once, and thrice again
NODE_LIMIT = 20_000  # a count, not seconds: the answer must not depend on the machine
_FREE = 1e-15  # an exchange that takes no room counts as taking this share of a limit
_GROWTH = 100  # an excess below the solver's tolerance does not vanish when the limit is lowered by as much
_OPTIMAL, _LIMIT, _INFEASIBLE = 0, 1, 2
_STEPS = 64  # halvings of the exponent range: far below the spacing of the breakpoints that matter
_DECADES = 30.0  # a price is searched over this many powers of ten around the scale of the problem
_SAFETY = 1e-9  # relative; keeps rounding from dropping an option of the best choice
_STDOUT = 1


@dataclass(frozen=True, slots=True)
class Problem:
    """What all decisions (or groups) may be as padded arrays, by name; `rows` tell what their columns stand for.

    Shapes: D decisions, K options at most, R limited resources (bytes, bit operations, or both in this order).
    """

    rows: tuple[Variants, ...]
    cost: FloatArray  # [D, K], infinite where there is no option
    size: IntArray  # [R, D, K]; 0 where there is no option
    limit: IntArray  # [R]

    def chosen(self, choice: IntArray) -> list[Variants]:
        """The options that a choice `[D]` of columns takes."""
        return [row.at([column]) for row, column in zip(self.rows, choice.tolist(), strict=True)]

    def total_cost(self, choice: IntArray) -> float:
        """Sum of the costs of a choice, correctly rounded."""
        return math.fsum(self.cost[np.arange(len(choice)), choice])

    def used(self, choice: IntArray) -> IntArray:
        """What a choice takes of each resource, in integers, [R]."""
        return np.asarray(self.size[:, np.arange(len(choice)), choice].sum(axis=1), dtype=np.int64)

    def fits(self, choice: IntArray) -> bool:
        """Whether a choice keeps every limit, in integers."""
        return bool((self.used(choice) <= self.limit).all())

    @property
    def least_sizes(self) -> IntArray:
        """The least that each decision can take of each resource, [R, D]."""
        present = np.where(np.isfinite(self.cost), self.size, np.iinfo(np.int64).max)
        return np.asarray(present.min(axis=2), dtype=np.int64)

    @property
    def least_objective(self) -> float:
        """The total cost of the cheapest choice, whatever its size."""
        return math.fsum(self.cost.min(axis=1))


@dataclass(frozen=True, slots=True)
class Answer:
    """A choice `[D]`, None if none was found, a lower bound of the best objective, and how often a solver ran."""

    choice: IntArray | None
    bound: float
    n_solves: int = 0
    is_heuristic: bool = False


def pareto(cost: FloatArray, size: IntArray, ties: IntArray) -> IntArray:
    """Positions of the options that no other dominates, by size, then cost.

    An option is dominated if another costs at most as much and takes at most as much of each resource. That
    is exact: some best choice never needs it. (The convex hull would be smaller, and loses best choices.)
    Of equal options the first by `ties` stays. An infinite cost forbids an option.

    Shapes: `cost` `[V]`, `size` `[R, V]` with one or two resources, `ties` `[T, V]`, the first row first.
    """
    order = np.lexsort((*ties[::-1], cost, *size[::-1]))
    if len(size) == 2:
        return order[_under_the_stairs(cost[order], size[1, order])]
    return order[cost[order] < np.minimum.accumulate(np.append(np.inf, cost[order]))[:-1]]  # less than all before it


def _under_the_stairs(cost: FloatArray, size: IntArray) -> NDArray[np.bool_]:
    """Where a cost is finite and no earlier option has both at most the cost and at most the size.

    The least cost at each size so far is a falling staircase. It is kept in a list, option by option, because
    comparing all pairs takes minutes where all of 300,000 options stay.
    """
    stays = np.zeros(len(cost), dtype=bool)
    steps, heights = [-1], [math.inf]  # sizes are never negative
    for i, (own, room) in enumerate(zip(cost.tolist(), size.tolist(), strict=True)):
        at = bisect_right(steps, room)
        if heights[at - 1] <= own:
            continue
        stays[i] = True
        end = at
        while end < len(heights) and heights[end] >= own:
            end += 1
        steps[at:end], heights[at:end] = [room], [own]
    return stays


def decide(problem: Problem, *, rule: str, gap: float, starts: Sequence[IntArray] = ()) -> Answer:
    """The choice of one of `SEARCHES`, never worse than the `starts` that fit; none when nothing fits."""
    if (problem.least_sizes.sum(axis=1) > problem.limit).any():
        return Answer(None, math.inf)
    cheapest = np.asarray(problem.cost.argmin(axis=1), dtype=np.int64)
    if problem.fits(cheapest):
        return Answer(cheapest, problem.least_objective)
    relaxed = relax(problem)
    rounded = repair(problem, relaxed.choice)
    known = [*starts, *([] if rounded is None else [fill(problem, rounded)])]
    if rule == "milp":
        return _decide_exactly(problem, relaxed, known, gap)
    if rounded is None:
        raise InputError(f"the rule {rule!r} found no choice that keeps both budgets; use 'milp', which decides it.")
    return Answer(rounded if rule == "lp" else _best(problem, known), relaxed.bound, is_heuristic=True)


def _decide_exactly(problem: Problem, relaxed: Relaxation, known: Sequence[IntArray], gap: float) -> Answer:
    least = problem.least_objective
    core, objective = problem, relaxed.bound
    if known:
        best = _best(problem, known)
        objective = problem.total_cost(best)
        if objective - relaxed.bound <= gap * (objective - least):
            return Answer(best, relaxed.bound)  # the relaxation proves it
        slack = _SAFETY * (abs(objective) + abs(relaxed.bound))
        stays = relaxed.bound + relaxed.excess <= objective + slack  # what no better choice can contain goes
        stays[np.arange(len(best)), best] = True
        core = replace(problem, cost=np.where(stays, problem.cost, np.inf))
    finite = problem.cost[np.isfinite(problem.cost)]
    unit = (objective - least) / len(problem.rows)
    solved = solve_checked(core, unit if unit > 0 else float(np.ptp(finite)) or 1.0, gap)
    mended = None if solved.choice is None else repair(problem, solved.choice)
    found = [*known, *([] if mended is None else [fill(problem, mended)])]
    if not found:
        if solved.choice is None:
            return solved
        raise InputError("the solver's answers exceed a budget by a little, which proves nothing; loosen one.")
    choice = _best(problem, found)
    proven = min(solved.bound, problem.total_cost(choice)) if solved.choice is not None else -math.inf
    return Answer(choice, max(relaxed.bound, proven), solved.n_solves)


def _best(problem: Problem, choices: Sequence[IntArray]) -> IntArray:
    return min((c for c in choices if problem.fits(c)), key=problem.total_cost)


def repair(problem: Problem, choice: IntArray) -> IntArray | None:
    """Exchanges options until the choice keeps the limits, cheapest relief first.

    Returns None where no single exchange helps any more; with one limit that means that nothing fits.
    """

    def price(used: IntArray, change: IntArray, rise: FloatArray) -> FloatArray:
        relief = _violation(problem, used) - _violation(problem, used[:, None, None] + change)
        return np.where(relief > 0, rise / np.where(relief > 0, relief, 1.0), np.inf)

    found = _exchanged(problem, choice, price)
    return found if problem.fits(found) else None


def fill(problem: Problem, choice: IntArray) -> IntArray:
    """Exchanges options for cheaper ones that still fit, most saved per room first, until none is left."""

    def price(used: IntArray, change: IntArray, rise: FloatArray) -> FloatArray:
        fits = (change <= (problem.limit - used)[:, None, None]).all(axis=0)
        weight = (np.maximum(change, 0) / np.maximum(problem.limit, 1)[:, None, None]).sum(axis=0)
        return np.where(fits & (rise < 0), rise / np.maximum(weight, _FREE), np.inf)

    return _exchanged(problem, choice, price)


def _exchanged(
    problem: Problem, choice: IntArray, price: Callable[[IntArray, IntArray, FloatArray], FloatArray]
) -> IntArray:
    """Exchanges one option after another, the one of least price first, until no price is finite.

    A price `[D, K]` is of what is used `[R]`, by what that would change `[R, D, K]`, and the cost would rise `[D, K]`.
    """
    choice, rows = choice.copy(), np.arange(len(choice))
    while True:
        change = problem.size - problem.size[:, rows, choice][..., None]
        prices = price(problem.used(choice), change, problem.cost - problem.cost[rows, choice][:, None])
        row, column = np.unravel_index(int(prices.argmin()), prices.shape)
        if np.isinf(prices[row, column]):
            return choice
        choice[row] = column


def _violation(problem: Problem, used: IntArray) -> FloatArray:
    """By how much limits are exceeded, relative to them and summed; `used` is `[R, ...]`."""
    limit = problem.limit.reshape(-1, *[1] * (used.ndim - 1))
    return np.asarray((np.maximum(used - limit, 0) / np.maximum(limit, 1)).sum(axis=0), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Relaxation:
    """The bound that the best prices prove, the choice `[D]` that they make, which may break the limits.

    `excess` `[D, K]` is how much the bound rises if the option is forced.
    """

    bound: float
    choice: IntArray
    excess: FloatArray


def relax(problem: Problem) -> Relaxation:
    """The best Lagrangian bound of a problem that has at least one choice within each single limit."""
    present, least = np.isfinite(problem.cost), problem.least_sizes
    left = problem.limit - least.sum(axis=1)
    room = np.maximum(left, 1).astype(np.float64)  # sizes above the least are in units of it
    size, limit = np.where(present, problem.size - least[..., None], 0) / room[:, None, None], left / room
    spread = np.where(present, problem.cost, -np.inf).max(axis=1) - problem.cost.min(axis=1)
    scale = float(spread.sum()) or 1.0

    def evaluated(prices: FloatArray) -> Relaxation:
        priced = problem.cost + np.tensordot(prices, size, axes=1)
        choice = np.asarray(priced.argmin(axis=1), dtype=np.int64)
        lowest = priced[np.arange(len(choice)), choice]
        return Relaxation(float(np.sum(lowest) - prices @ limit), choice, priced - lowest[:, None])

    def is_over(found: Relaxation, resource: int) -> bool:
        return bool(size[resource, np.arange(len(found.choice)), found.choice].sum() > limit[resource])

    def search(given: tuple[float, ...]) -> Relaxation:
        """By the best prices of the resources that have no price yet."""
        resource = len(given)
        if resource == len(limit):
            return evaluated(np.array(given))
        best = search((*given, 0.0))
        if not is_over(best, resource):
            return best
        low, high = -_DECADES, _DECADES
        for _ in range(_STEPS):
            middle = (low + high) / 2
            found = search((*given, scale * 10.0**middle))
            best = max(best, found, key=lambda one: one.bound)
            low, high = (middle, high) if is_over(found, resource) else (low, middle)
        return best

    return search(())


def solve_checked(problem: Problem, unit: float, gap: float) -> Answer:
    """Solves until the answer fits in integers, at most `MAX_SOLVES` times; else the last answer that does not.

    `unit` is the cost that becomes 1, `gap` the relative distance from the optimum at which to stop. The
    bound is that of the first call, because later ones see lowered limits.
    """
    first = answer = solve_highs(problem, unit, gap)
    limit, choice, n_solves = problem.limit, answer.choice, 1
    while answer.choice is not None and not problem.fits(answer.choice) and n_solves < MAX_SOLVES:
        limit = limit - np.maximum(problem.used(answer.choice) - problem.limit, 0) * _GROWTH ** (n_solves - 1)
        answer = solve_highs(replace(problem, limit=limit), unit, gap)
        choice = choice if answer.choice is None else answer.choice
        n_solves += 1
    return Answer(choice, first.bound, n_solves)


def solve_highs(problem: Problem, unit: float, gap: float) -> Answer:
    """The integer programme by HiGHS (`scipy.optimize.milp`)."""
    rows, columns = np.nonzero(np.isfinite(problem.cost))
    least = problem.cost.min(axis=1)
    smallest = problem.least_sizes
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


@contextlib.contextmanager
def silenced_stdout() -> Iterator[None]:
    """Discards everything written to file descriptor 1 in the meantime, by any thread.

    A caller who asked for JSON there gets a broken document otherwise. Replacing `sys.stdout` does not help against C;
    this does not care whether `sys.stdout` has a descriptor, and does nothing when descriptor 1 is closed. C buffers
    are flushed on both sides, else the text would come out later.
    """
    _flush()
    try:
        saved = os.dup(_STDOUT)
    except OSError:  # closed, as under pythonw or a daemon: there is nothing to protect
        yield
        return
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, _STDOUT)
        yield
    finally:
        _flush()
        os.dup2(saved, _STDOUT)
        os.close(sink)
        os.close(saved)


def _flush() -> None:
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL("ucrtbase") if sys.platform == "win32" else ctypes.CDLL(None)
        library.fflush(None)
