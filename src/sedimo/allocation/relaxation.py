"""Lower bounds by Lagrange multipliers, and what they prove superfluous.

For any prices p >= 0 per unit of each resource, the sum over decisions of min(cost + p * size) minus
p * limit is at most the best objective. The best prices are found by nested bisection on the sign of what
is left of the limits, because that needs no solver and no scaling; the bound holds for any prices, so that
its quality, not its truth, depends on the search.

Source:
    Geoffrion 1974, Lagrangean relaxation for integer programming.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sedimo.allocation.problem import FloatArray, IntArray, Problem

_STEPS = 64  # halvings of the exponent range: far below the spacing of the breakpoints that matter
_DECADES = 30.0  # a price is searched over this many powers of ten around the scale of the problem
_SAFETY = 1e-9  # relative; keeps rounding from dropping an option of the best choice


@dataclass(frozen=True, slots=True)
class Relaxation:
    """Prices `[R]` per normalised unit, the bound they prove, and the choice `[D]` they make.

    `excess` `[D, K]` is how much the bound rises if the option is forced.
    """

    prices: FloatArray
    bound: float
    choice: IntArray
    excess: FloatArray


def relax(problem: Problem[object]) -> Relaxation:
    """The best Lagrangian bound of a problem that has at least one choice within each single limit.

    `choice` may break the limits; it is where heuristics start.
    """
    scaled = _Scaled.of(problem)
    prices = _search(scaled, np.zeros(len(problem.limit)), 0)
    return scaled.evaluate(prices)


def drop_superfluous(
    problem: Problem[object], relaxation: Relaxation, objective: float, keep: IntArray
) -> Problem[object]:
    """The problem without the options that no choice better than `objective` can contain.

    The options of `keep` `[D]` stay in any case.
    """
    slack = _SAFETY * (abs(objective) + abs(relaxation.bound))
    stays = relaxation.bound + relaxation.excess <= objective + slack
    stays[np.arange(len(keep)), keep] = True
    return Problem(problem.options, np.where(stays, problem.cost, np.inf), problem.size, problem.limit)


@dataclass(frozen=True, slots=True)
class _Scaled:
    """Sizes above the least possible, in units of what the limits leave above it."""

    problem: Problem[object]
    size: FloatArray  # [R, D, K]
    limit: FloatArray  # [R]
    scale: float

    @classmethod
    def of(cls, problem: Problem[object]) -> _Scaled:
        present = np.isfinite(problem.cost)
        least = problem.least_size_each
        room = np.maximum(problem.limit - least.sum(axis=1), 1).astype(np.float64)
        size = np.where(present, problem.size - least[..., None], 0) / room[:, None, None]
        limit = (problem.limit - least.sum(axis=1)) / room
        spread = np.where(present, problem.cost, -np.inf).max(axis=1) - problem.cost.min(axis=1)
        return cls(problem, size, limit, float(spread.sum()) or 1.0)

    def evaluate(self, prices: FloatArray) -> Relaxation:
        priced = self.problem.cost + np.tensordot(prices, self.size, axes=1)
        choice = priced.argmin(axis=1)
        least = priced[np.arange(len(choice)), choice]
        bound = float(np.sum(least) - prices @ self.limit)
        return Relaxation(prices, bound, np.asarray(choice, dtype=np.int64), priced - least[:, None])

    def is_over(self, relaxation: Relaxation, resource: int) -> bool:
        used = self.size[resource, np.arange(len(relaxation.choice)), relaxation.choice].sum()
        return bool(used > self.limit[resource])


def _search(scaled: _Scaled, prices: FloatArray, resource: int) -> FloatArray:
    """Best prices of the resources from `resource` on, the earlier ones given."""
    if resource == len(prices):
        return prices

    def at(price: float) -> FloatArray:
        given = prices.copy()
        given[resource] = price
        return _search(scaled, given, resource + 1)

    best = at(0.0)
    if not scaled.is_over(scaled.evaluate(best), resource):
        return best
    low, high = -_DECADES, _DECADES
    found = [best]
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found.append(at(scaled.scale * 10.0**middle))
        if scaled.is_over(scaled.evaluate(found[-1]), resource):
            low = middle
        else:
            high = middle
    return max(found, key=lambda candidate: scaled.evaluate(candidate).bound)
