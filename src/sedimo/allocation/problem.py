"""The question that allocation answers, as arrays, and the record of an answer, or why there is none.

A multiple-choice knapsack: exactly one option (format) per decision, least total cost, at most so many
bytes, bit operations, or both. Sizes stay integers; whoever answers is checked against them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from sedimo.allocation.table import Cost, SensitivityTable
from sedimo.allocation.variant_table import Variant, VariantTable
from sedimo.errors import InputError
from sedimo.quant.formats import Format
from sedimo.space import Recipe, compose

Accounting = Literal["paper", "stored"]
Status = Literal["optimal", "feasible", "heuristic"]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

Option_co = TypeVar("Option_co", covariant=True)
Resource = TypeVar("Resource")

_NO_LIMIT = 1 << 62  # nothing is as large, and differences stay integers of 64 bits
_ROUNDING = 1e-12  # relative; bits that were computed as 8 * bytes / weights must give the bytes back
_TOLERANCE = 1e-6  # the solver's absolute tolerance, in units of the mean cost of a decision


@dataclass(frozen=True, slots=True)
class Allocation:
    """The recipe chosen under a budget, with its certificate.

    `choice` is the format of each decision; `bits` the average per weight in `accounting` [bits];
    `budget_bytes` (None: no limit of size) and `used_bytes` are in the same accounting [bytes]. `bops` and
    `budget_bops` count the whole denoiser, attention included [BOPs]. `objective` is the sum of the
    table's costs and `standard_error` that of the sum, decisions (or groups) taken as independent; `bound` is a proven
    lower limit of the objective, `gap` their distance relative to what the budget costs (objective less the
    least objective without any budget). `status` is `optimal` (gap as asked for), `feasible` (the search
    ended before that, or its answer had to be mended) or
    `heuristic` (the rule promises nothing; bound and gap hold all the same).
    `n_solves` counts calls of the solver.
    """

    recipe: Recipe
    choice: Mapping[str, Format]
    bits: float
    budget_bytes: int | None
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
    """At most this many bytes in one accounting, at most this many bit operations, or both.

    `bops` are those of one sample and call of the whole denoiser, attention included. Without a limit of size,
    `accounting` is the one in which sizes are told.

    Raises:
        InputError: no limit at all.
    """

    size_bytes: int | None
    accounting: Accounting = "paper"
    bops: int | None = None

    def __post_init__(self) -> None:
        """Refuses a budget that limits nothing."""
        if self.size_bytes is None and self.bops is None:
            raise InputError("a budget must limit bytes or bit operations.")

    def limits(self, attention_bops: int) -> IntArray:
        """What all decisions together may take of each limited resource, bytes first, [R].

        Attention takes its bit operations first, so that a limit may be negative.
        """
        bops = None if self.bops is None else self.bops - attention_bops
        return np.array([min(limit, _NO_LIMIT) for limit in (self.size_bytes, bops) if limit is not None], np.int64)

    def sizes(self, cost: Cost | Variant) -> tuple[int, ...]:
        """What one option takes of each limited resource, [R]."""
        return self.limited(cost.paper_bytes, cost.stored_bytes, cost.bops)

    def limited(self, paper: Resource, stored: Resource, bops: Resource) -> tuple[Resource, ...]:
        """Of an option's (or of many options') sizes those that are limited, in the order of the limits."""
        size = paper if self.accounting == "paper" else stored
        pairs = ((self.size_bytes, size), (self.bops, bops))
        return tuple(taken for limit, taken in pairs if limit is not None)


@dataclass(frozen=True, slots=True)
class Options(Generic[Option_co]):
    """What one decision may take: K entries with their `cost` `[K]` and `size` `[R, K]`."""

    entries: tuple[Option_co, ...]
    cost: FloatArray
    size: IntArray


@dataclass(frozen=True, slots=True)
class Problem(Generic[Option_co]):
    """Options of all decisions as padded arrays; decisions by name, options by size, then cost.

    Who solves it looks at numbers only: a decision may be one of formats for a layer, or of variants for a group.
    Shapes: D decisions, K options at most, R limited resources (bytes, bit operations, or both in this order).

    Attributes:
        options: what stands behind the columns, per decision.
        cost: `[D, K]`, infinite where there is no option.
        size: `[R, D, K]`, integers; 0 where there is no option.
        limit: `[R]`.
    """

    options: tuple[tuple[Option_co, ...], ...]
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
    def least_objective(self) -> float:
        """The total cost of `cheapest`."""
        return math.fsum(self.cost.min(axis=1))

    @property
    def cheapest(self) -> IntArray:
        """The choice of least cost, whatever its size, [D]."""
        return np.asarray(self.cost.argmin(axis=1), dtype=np.int64)


def make_problem(table: SensitivityTable, budget: Budget) -> Problem[Cost]:
    """The problem of a table under a budget, with dominated options removed.

    Raises:
        InputError: a decision has no option left, or a cost is minus infinity.
    """
    rows = [_pareto_options(table.by_decision[name], budget) for name in sorted(table.by_decision)]
    return assemble(rows, budget.limits(table.attention_bops))


def assemble(rows: Sequence[Options[Option_co]], limits: IntArray) -> Problem[Option_co]:
    """The problem whose rows are the options of one decision (or group) each; `limits` `[R]`."""
    n_columns = max((len(row.cost) for row in rows), default=0)
    cost = np.full((len(rows), n_columns), np.inf)
    size = np.zeros((len(limits), len(rows), n_columns), dtype=np.int64)
    for i, row in enumerate(rows):
        cost[i, : len(row.cost)] = row.cost
        size[:, i, : len(row.cost)] = row.size
    return Problem(tuple(row.entries for row in rows), cost, size, limits)


def _pareto_options(entries: Sequence[Cost], budget: Budget) -> Options[Cost]:
    name = entries[0].decision
    cost = np.array([entry.cost for entry in entries])
    if (cost == -np.inf).any():
        raise InputError(f"costs must be finite, or inf for a forbidden format; decision {name!r} has -inf.")
    size = np.array([budget.sizes(entry) for entry in entries], dtype=np.int64).T
    by_name = np.unique([str(entry.format) for entry in entries], return_inverse=True)[1]
    kept = pareto(cost, size, np.array([[entry.paper_bytes for entry in entries], by_name], dtype=np.int64))
    if not len(kept):
        raise InputError(f"decision {name!r} has no format of finite cost; add formats to the space.")
    return Options(tuple(entries[i] for i in kept), cost[kept], size[:, kept])


def pareto(cost: FloatArray, size: IntArray, ties: IntArray) -> IntArray:
    """Positions of the options that no other dominates, by size, then cost.

    An option is dominated if another costs at most as much and takes at most as much of each resource. That
    is exact: some best choice never needs it. (The convex hull would be smaller, and loses best choices.)
    Of equal options the first by `ties` stays. An infinite cost forbids an option.

    Shapes: `cost` `[V]`, `size` `[R, V]` with one or two resources, `ties` `[T, V]`, the first row first.
    """
    order = np.lexsort((*ties[::-1], cost, *size[::-1]))
    stays = _falls(cost[order]) if len(size) == 1 else _under_the_stairs(cost[order], size[1, order])
    return np.asarray(order[stays], dtype=np.int64)


def _falls(cost: FloatArray) -> NDArray[np.bool_]:
    """Where a cost is finite and less than all before it."""
    before = np.concatenate([[np.inf], np.minimum.accumulate(cost)[:-1]])[: len(cost)]
    return cost < before


def _under_the_stairs(cost: FloatArray, size: IntArray) -> NDArray[np.bool_]:
    """Where a cost is finite and no earlier option has both at most the cost and at most the size.

    The least cost at each size so far is a falling staircase. It is kept in a list, option by option, because
    comparing all pairs takes minutes where all of 300,000 options stay.
    """
    stays = np.zeros(len(cost), dtype=bool)
    steps, heights = [-1], [float("inf")]  # sizes are never negative
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


def read_budget(
    n_weights: int,
    *,
    bits: float | None,
    stored_bits: float | None,
    budget_bytes: int | None,
    budget_bops: int | None,
) -> Budget | None:
    """The budget that is given for so many weights: a size, bit operations, or both; None when there is none.

    Raises:
        InputError: more than one size, or a number that is no budget.
    """
    given = {"bits": bits, "stored_bits": stored_bits, "budget_bytes": budget_bytes}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise InputError(f"give one budget, got {' and '.join(names)}.")
    if budget_bytes is not None and budget_bytes <= 0:
        raise InputError(f"budget_bytes must be positive, got {budget_bytes}.")
    if budget_bops is not None and budget_bops < 0:
        raise InputError(f"budget_bops must not be negative, got {budget_bops}.")
    if bits is not None:
        return Budget(bytes_for_bits(bits, n_weights), "paper", budget_bops)
    if stored_bits is not None:
        return Budget(bytes_for_bits(stored_bits, n_weights), "stored", budget_bops)
    if budget_bytes is not None:
        return Budget(int(budget_bytes), "stored", budget_bops)
    return None if budget_bops is None else Budget(None, bops=budget_bops)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was chosen for each group (a decision alone is a group of one), and how that came about.

    `least` is the least objective without any budget, `bound` a lower bound of the best one within it.
    """

    chosen: tuple[Variant, ...]
    least: float
    bound: float
    n_solves: int = 0
    is_heuristic: bool = False
    notes: tuple[str, ...] = ()


def least_cost(costs: Sequence[Cost]) -> Cost:
    """The entry of least cost; the smaller one of equals."""
    return min(costs, key=lambda c: (c.cost, c.paper_bytes, c.stored_bytes, str(c.format)))


def as_variant(cost: Cost) -> Variant:
    """The cost of a decision as that of a group of one."""
    return Variant(
        {cost.decision: cost.format},
        cost.cost,
        cost.standard_error,
        cost.paper_bytes,
        cost.stored_bytes,
        cost.bops,
    )


def record(
    table: SensitivityTable | VariantTable, budget: Budget, rule: str, outcome: Outcome, *, gap: float = 0.0
) -> Allocation:
    """The allocation of an outcome; `gap` is the distance at which it may call itself optimal."""
    chosen = outcome.chosen
    choice = {name: number_format for entry in chosen for name, number_format in entry.choice.items()}
    objective = math.fsum(entry.cost for entry in chosen)
    bound = max(outcome.least, min(outcome.bound, objective))
    distance = 0.0 if objective <= bound else (objective - bound) / (objective - outcome.least)
    paper, stored = sum(entry.paper_bytes for entry in chosen), sum(entry.stored_bytes for entry in chosen)
    used = paper if budget.accounting == "paper" else stored
    status: Status = "heuristic" if outcome.is_heuristic else "optimal" if distance <= gap + _TOLERANCE else "feasible"
    return Allocation(
        recipe=compose(choice, table.layers, table.streams),
        choice=choice,
        bits=8 * used / table.total_params,
        budget_bytes=budget.size_bytes,
        used_bytes=used,
        objective=objective,
        standard_error=math.sqrt(math.fsum(entry.standard_error**2 for entry in chosen)),
        bound=bound,
        gap=distance,
        status=status,
        method=table.method,
        rule=rule,
        accounting=budget.accounting,
        paper_bits=8 * paper / table.total_params,
        stored_bits=8 * stored / table.total_params,
        bops=sum(entry.bops for entry in chosen) + table.attention_bops,
        budget_bops=budget.bops,
        n_solves=outcome.n_solves,
        notes=outcome.notes,
    )


def infeasible(budget: Budget, table: SensitivityTable | VariantTable, sizes: Iterable[IntArray]) -> InputError:
    """The error that says what is possible instead of a budget that cannot be kept.

    `sizes` is what the allowed options of each decision or group take of the limited resources, `[R, V]` each.
    """
    ends = np.array([[size.min(axis=1), size.max(axis=1)] for size in sizes]).sum(axis=0).T.tolist()  # [R, 2]
    limits, possible = [], []
    if budget.size_bytes is not None:
        scale = 8 / table.total_params
        least, most = (scale * end for end in ends[0])
        limits.append(
            f"{budget.size_bytes} bytes ({scale * budget.size_bytes:.4f} {budget.accounting} bits per weight)"
        )
        least, most = math.ceil(least * 1e4) / 1e4, math.floor(most * 1e4) / 1e4
        possible.append(f"the least possible is {least:.4f} bits and the most {most:.4f}")
    if budget.bops is not None:
        least, most = (end + table.attention_bops for end in ends[-1])
        limits.append(f"{budget.bops} bit operations")
        possible.append(
            f"the least possible is {least} bit operations and the most {most}, of which attention takes "
            f"{table.attention_bops} in any case (codebooks compute in 16 bits)"
        )
    remedy = "Raise the budget" if len(limits) == 1 else "Both must hold at once: raise one of them"
    return InputError(
        f"no choice of formats keeps the budget of {' and '.join(limits)}: with these formats {'; '.join(possible)}. "
        f"{remedy}, or allow formats with fewer bits."
    )
