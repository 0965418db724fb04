"""The question that allocation answers, as arrays, and the record of an answer, or why there is none.

A multiple-choice knapsack: exactly one option per decision (a format) or group of decisions (a variant), least total
cost, at most so many bytes, bit operations, or both. Sizes stay integers; whoever answers is checked against them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sedimo.allocation.table import Cost, SensitivityTable
from sedimo.allocation.variant_table import GroupVariants, Variant, VariantTable
from sedimo.errors import InputError
from sedimo.quant.formats import Format
from sedimo.space import Recipe, compose

Accounting = Literal["paper", "stored"]
Status = Literal["optimal", "feasible", "heuristic"]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Table = SensitivityTable | VariantTable
Entries = tuple[Cost, ...] | GroupVariants  # what one decision, or one group, may be

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

    def sizes(self, entry: Cost | Variant | GroupVariants) -> tuple[int | IntArray, ...]:
        """What one option, or each of many, takes of each limited resource, [R]."""
        size = entry.paper_bytes if self.accounting == "paper" else entry.stored_bytes
        return tuple(taken for limit, taken in ((self.size_bytes, size), (self.bops, entry.bops)) if limit is not None)


@dataclass(frozen=True, slots=True)
class Problem:
    """Options of all decisions (or groups) as padded arrays; decisions by name, options by size, then cost.

    Shapes: D decisions, K options at most, R limited resources (bytes, bit operations, or both in this order).

    Attributes:
        options: which of the table's entries stand behind the columns, per decision.
        cost: `[D, K]`, infinite where there is no option.
        size: `[R, D, K]`, integers; 0 where there is no option.
        limit: `[R]`.
    """

    options: tuple[IntArray, ...]
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


def rows_of(table: Table) -> list[Entries]:
    """What each decision (or group) of a table may be, by name: the answer does not depend on the table's order."""
    if isinstance(table, VariantTable):
        return sorted(table.groups, key=attrgetter("group"))
    return [table.by_decision[name] for name in sorted(table.by_decision)]


def arrays_of(entries: Entries, budget: Budget) -> tuple[FloatArray, IntArray, IntArray]:
    """Costs `[V]`, sizes `[R, V]`, and what tells equals apart `[T, V]`: paper bytes, then formats by their texts."""
    if isinstance(entries, GroupVariants):
        ranks = [np.unique([str(f) for f in formats], return_inverse=True)[1] for formats in entries.formats]
        names = [rank[column] for rank, column in zip(ranks, entries.choice.T, strict=True)]
        return entries.cost, np.array(budget.sizes(entries), np.int64), np.array([entries.paper_bytes, *names])
    cost = np.array([entry.cost for entry in entries])
    if (cost == -np.inf).any():
        raise InputError(
            f"costs must be finite, or inf for a forbidden format; decision {entries[0].decision!r} has -inf."
        )
    by_name = np.unique([str(entry.format) for entry in entries], return_inverse=True)[1]
    ties = np.array([[entry.paper_bytes for entry in entries], by_name])
    return cost, np.array([budget.sizes(entry) for entry in entries], np.int64).T, ties


def make_problem(table: Table, budget: Budget) -> Problem:
    """The problem of a table under a budget, with dominated options removed."""
    options, costs, sizes = [], [], []
    for entries in rows_of(table):
        cost, size, ties = arrays_of(entries, budget)
        kept = pareto(cost, size, ties)
        if not len(kept):
            what = (
                f"group {entries.group!r} has no variant"
                if isinstance(entries, GroupVariants)
                else f"decision {entries[0].decision!r} has no format"
            )
            raise InputError(f"{what} of finite cost; add formats to the space.")
        options.append(kept)
        costs.append(cost[kept])
        sizes.append(size[:, kept])
    return assemble(options, costs, sizes, budget.limits(table.attention_bops))


def assemble(
    options: Sequence[IntArray], costs: Sequence[FloatArray], sizes: Sequence[IntArray], limit: IntArray
) -> Problem:
    """The problem whose rows are the `options` of one decision (or group) each, with costs `[K]` and sizes `[R, K]`."""
    n_columns = max(map(len, options), default=0)
    cost = np.full((len(options), n_columns), np.inf)
    size = np.zeros((len(limit), len(options), n_columns), dtype=np.int64)
    for i, (own, taken) in enumerate(zip(costs, sizes, strict=True)):
        cost[i, : len(own)], size[:, i, : len(own)] = own, taken
    return Problem(tuple(options), cost, size, limit)


def pareto(cost: FloatArray, size: IntArray, ties: IntArray) -> IntArray:
    """Positions of the options that no other dominates, by size, then cost.

    An option is dominated if another costs at most as much and takes at most as much of each resource. That
    is exact: some best choice never needs it. (The convex hull would be smaller, and loses best choices.)
    Of equal options the first by `ties` stays. An infinite cost forbids an option.

    Shapes: `cost` `[V]`, `size` `[R, V]` with one or two resources, `ties` `[T, V]`, the first row first.
    """
    order = np.lexsort((*ties[::-1], cost, *size[::-1]))
    ordered = cost[order]
    if len(size) == 2:
        stays = _under_the_stairs(ordered, size[1, order])
    else:  # less than all before it
        stays = ordered < np.minimum.accumulate(np.concatenate([[np.inf], ordered]))[:-1]
    return np.asarray(order[stays], dtype=np.int64)


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


def bytes_for_bits(bits: float, n_weights: int) -> int:
    """The bytes that an average of `bits` per weight allows [bytes]."""
    if not (math.isfinite(bits) and bits > 0):
        raise InputError(f"a budget must be a positive number of bits per weight, got {bits!r}.")
    return math.floor(bits * n_weights / 8 * (1 + _ROUNDING))


def bits_range(table: SensitivityTable, accounting: Accounting = "paper") -> tuple[float, float]:
    """The least and the most average bits per weight that a table's formats can make [bits].

    "Most" is the largest recipe, whether or not a budget would ever pick it.
    """
    budget = Budget(0, accounting)
    rows = [arrays_of(entries, budget) for entries in rows_of(table)]
    allowed = [size[0, np.isfinite(cost)] for cost, size, _ in rows]
    scale = 8 / table.total_params
    return scale * sum(int(size.min()) for size in allowed), scale * sum(int(size.max()) for size in allowed)


def read_budget(
    n_weights: int,
    *,
    bits: float | None,
    stored_bits: float | None,
    budget_bytes: int | None,
    budget_bops: int | None,
) -> Budget | None:
    """The budget that is given for so many weights: a size, bit operations, or both; None when there is none."""
    given = {"bits": bits, "stored_bits": stored_bits, "budget_bytes": budget_bytes}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise InputError(f"give one budget, got {' and '.join(names)}.")
    if budget_bytes is not None and budget_bytes <= 0:
        raise InputError(f"budget_bytes must be positive, got {budget_bytes}.")
    if budget_bops is not None and budget_bops < 0:
        raise InputError(f"budget_bops must not be negative, got {budget_bops}.")
    accounting: Accounting = "paper" if stored_bits is None and budget_bytes is None else "stored"
    per_weight = bits if stored_bits is None else stored_bits
    if per_weight is not None:
        budget_bytes = bytes_for_bits(per_weight, n_weights)
    if budget_bytes is None and budget_bops is None:
        return None
    return Budget(None if budget_bytes is None else int(budget_bytes), accounting, budget_bops)


def record(
    table: Table,
    budget: Budget,
    chosen: Iterable[Cost | Variant],
    answer: Answer,
    *,
    rule: str,
    least: float,
    gap: float = 0.0,
) -> Allocation:
    """The allocation of the entries that an answer chose, one for each decision or group.

    `least` is the least objective without any budget, `gap` the distance at which it may call itself optimal.
    """
    chosen = tuple(chosen)
    choice = {name: number_format for entry in chosen for name, number_format in entry.choice.items()}
    objective = math.fsum(entry.cost for entry in chosen)
    bound = max(least, min(answer.bound, objective))
    distance = 0.0 if objective <= bound else (objective - bound) / (objective - least)
    paper, stored = sum(entry.paper_bytes for entry in chosen), sum(entry.stored_bytes for entry in chosen)
    used = paper if budget.accounting == "paper" else stored
    status: Status = "heuristic" if answer.is_heuristic else "optimal" if distance <= gap + _TOLERANCE else "feasible"
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
        n_solves=answer.n_solves,
    )


def infeasible(table: Table, budget: Budget) -> InputError:
    """The error that says what is possible instead of a budget that cannot be kept."""
    rows = [arrays_of(entries, budget) for entries in rows_of(table)]
    allowed = [size[:, np.isfinite(cost)] for cost, size, _ in rows]
    ends = np.array([[size.min(axis=1), size.max(axis=1)] for size in allowed]).sum(axis=0).T.tolist()  # [R, 2]
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
