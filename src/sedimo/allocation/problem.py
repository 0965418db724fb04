"""The question that allocation answers, as arrays, and the record of an answer.

A multiple-choice knapsack: exactly one option (format) per decision, least total cost, at most so many
bytes and, if asked, bit operations. Sizes stay integers; whoever answers is checked against them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sedimo.errors import InputError
from sedimo.quant.formats import Format
from sedimo.sensitivity.table import Cost, SensitivityTable
from sedimo.space import Recipe

Accounting = Literal["paper", "stored"]
Status = Literal["optimal", "feasible", "heuristic"]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_ROUNDING = 1e-12  # relative; bits that were computed as 8 * bytes / weights must give the bytes back


@dataclass(frozen=True, slots=True)
class Allocation:
    """The recipe chosen under a budget, with its certificate.

    `choice` is the format of each decision; `bits` the average per weight in `accounting` [bits];
    `budget_bytes` and `used_bytes` are in the same accounting [bytes]. `objective` is the sum of the
    table's costs and `standard_error` that of the sum, decisions taken as independent; `bound` is a proven
    lower limit of the objective, `gap` their distance relative to what the budget costs (objective less the
    least objective without any budget). `status` is `optimal` (gap as asked for), `feasible` (the search
    ended before that, or its answer had to be mended) or
    `heuristic` (the rule promises nothing; bound and gap hold all the same).
    `n_solves` counts calls of the solver.
    """

    recipe: Recipe
    choice: Mapping[str, Format]
    bits: float
    budget_bytes: int
    used_bytes: int
    objective: float
    standard_error: float
    bound: float
    gap: float
    status: Status
    method: str
    rule: str
    accounting: Accounting
    paper_bits: float
    stored_bits: float
    bops: int
    budget_bops: int | None = None
    n_solves: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Budget:
    """At most this many bytes in one accounting, and optionally bit operations."""

    size_bytes: int
    accounting: Accounting = "paper"
    bops: int | None = None

    @property
    def limits(self) -> IntArray:
        """The limits of the resources, bytes first, [R]."""
        return np.array([self.size_bytes, *([] if self.bops is None else [self.bops])], dtype=np.int64)

    def sizes(self, cost: Cost) -> tuple[int, ...]:
        """What one option takes of each resource."""
        size = cost.paper_bytes if self.accounting == "paper" else cost.stored_bytes
        return (size,) if self.bops is None else (size, cost.bops)


@dataclass(frozen=True, slots=True)
class Problem:
    """Options of all decisions as padded arrays; decisions by name, options by size, then cost.

    Shapes: D decisions, K options at most, R resources (bytes, then bit operations if limited).

    Attributes:
        options: the table's entries behind the columns, per decision.
        cost: `[D, K]`, infinite where there is no option.
        size: `[R, D, K]`, integers; 0 where there is no option.
        limit: `[R]`.
    """

    options: tuple[tuple[Cost, ...], ...]
    cost: FloatArray
    size: IntArray
    limit: IntArray

    def total_cost(self, choice: IntArray) -> float:
        """Sum of the costs of a choice `[D]` of columns, correctly rounded."""
        return math.fsum(self.cost[np.arange(len(choice)), choice])

    def used(self, choice: IntArray) -> IntArray:
        """What a choice takes of each resource, in integers, [R]."""
        return np.asarray(self.size[:, np.arange(len(choice)), choice].sum(axis=1), dtype=np.int64)

    def fits(self, choice: IntArray) -> bool:
        """Whether a choice keeps every limit, in integers."""
        return bool((self.used(choice) <= self.limit).all())

    @property
    def least_size_each(self) -> IntArray:
        """The least that each decision can take of each resource, [R, D]."""
        present = np.where(np.isfinite(self.cost), self.size, np.iinfo(np.int64).max)
        return np.asarray(present.min(axis=2), dtype=np.int64)

    @property
    def least_sizes(self) -> IntArray:
        """The least that any choice takes of each resource, one by one, [R]."""
        return np.asarray(self.least_size_each.sum(axis=1), dtype=np.int64)

    @property
    def cheapest(self) -> IntArray:
        """The choice of least cost, whatever its size, [D]."""
        return np.asarray(self.cost.argmin(axis=1), dtype=np.int64)


def make_problem(table: SensitivityTable, budget: Budget) -> Problem:
    """The problem of a table under a budget, with dominated options removed.

    An option is removed if another of the same decision costs at most as much and takes at most as much of
    each resource. That is exact: some best choice never needs it. (The convex hull would be smaller, and
    loses best choices.) An infinite cost forbids an option.

    Raises:
        InputError: a decision has no option left, or a cost is minus infinity.
    """
    options = tuple(_pareto(table.by_decision[name], budget) for name in sorted(table.by_decision))
    n_columns = max((len(row) for row in options), default=0)
    cost = np.full((len(options), n_columns), np.inf)
    size = np.zeros((len(budget.limits), len(options), n_columns), dtype=np.int64)
    for i, row in enumerate(options):
        for j, entry in enumerate(row):
            cost[i, j] = entry.cost
            size[:, i, j] = budget.sizes(entry)
    return Problem(options, cost, size, budget.limits)


def _pareto(entries: tuple[Cost, ...], budget: Budget) -> tuple[Cost, ...]:
    name = entries[0].decision
    if any(entry.cost == -math.inf for entry in entries):
        raise InputError(f"costs must be finite, or inf for a forbidden format; decision {name!r} has -inf.")
    allowed = [entry for entry in entries if entry.cost < math.inf]
    if not allowed:
        raise InputError(f"decision {name!r} has no format of finite cost; add formats to the space.")
    kept: list[Cost] = []
    for entry in sorted(allowed, key=lambda e: (*budget.sizes(e), e.cost, str(e.format))):
        if not any(_dominates(other, entry, budget) for other in kept):
            kept.append(entry)
    return tuple(kept)


def _dominates(other: Cost, entry: Cost, budget: Budget) -> bool:
    pairs = zip(budget.sizes(other), budget.sizes(entry), strict=True)
    return other.cost <= entry.cost and all(mine <= yours for mine, yours in pairs)


def bytes_for_bits(bits: float, n_weights: int) -> int:
    """The bytes that an average of `bits` per weight allows [bytes].

    Raises:
        InputError: bits are not a positive finite number.
    """
    if not (math.isfinite(bits) and bits > 0):
        raise InputError(f"a budget must be a positive number of bits per weight, got {bits!r}.")
    return math.floor(bits * n_weights / 8 * (1 + _ROUNDING))


def bits_range(table: SensitivityTable, accounting: Accounting = "paper") -> tuple[float, float]:
    """The least and the most average bits per weight that a table's formats can make [bits].

    "Most" is the largest recipe, whether or not a budget would ever pick it.
    """
    budget = Budget(0, accounting)
    rows = [[budget.sizes(c)[0] for c in costs if c.cost < math.inf] for costs in table.by_decision.values()]
    scale = 8 / table.total_params
    return scale * sum(min(row) for row in rows), scale * sum(max(row) for row in rows)
