"""The recipe of least cost under a budget, exactly or by a named rule; of decisions, or of groups decided as one.

Everything that decides is on the table's numbers; no clock, no random numbers, no file. The same table and
budget give the same recipe, whatever the order of the table's entries. Variants of a group are the options of one row
of the same problem that is put for single decisions, pruned to those that a best choice can need.

Source:
    Mills et al. 2024, Qua2SeDiMo (arXiv 2412.14628): enumeration of a block's variants, and the argmax of decisions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Literal

import numpy as np

from sedimo.allocation.program import GAP, SEARCHES, Answer, Problem, decide, pareto, relax
from sedimo.allocation.table import Cost, SensitivityTable
from sedimo.allocation.variants import SIZES, IntArray, Variants, check_groups
from sedimo.errors import InputError
from sedimo.quant.formats import Format
from sedimo.space import Recipe, compose

ARGMIN, UNIFORM = "argmin", "uniform:"
RULES = (*SEARCHES, ARGMIN, f"{UNIFORM}FORMAT")
Accounting = Literal["paper", "stored"]
Status = Literal["optimal", "feasible", "heuristic"]

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
    """

    size_bytes: int | None
    accounting: Accounting = "paper"
    bops: int | None = None

    def __post_init__(self) -> None:
        """Refuses a budget that limits nothing."""
        if self.size_bytes is None and self.bops is None:
            raise InputError("a budget must limit bytes or bit operations.")

    def limits(self, attention_bops: int) -> IntArray:
        """What all decisions together may take of each limited resource, bytes first, [R]; less than 0 is possible."""
        bops = None if self.bops is None else self.bops - attention_bops
        return np.array([min(limit, _NO_LIMIT) for limit in (self.size_bytes, bops) if limit is not None], np.int64)

    def sizes(self, entry: Cost | Variants) -> tuple[int | IntArray, ...]:
        """What one option, or each of many, takes of each limited resource, [R]."""
        size = entry.paper_bytes if self.accounting == "paper" else entry.stored_bytes
        return tuple(taken for limit, taken in ((self.size_bytes, size), (self.bops, entry.bops)) if limit is not None)


def read_budget(
    n_weights: int,
    *,
    bits: float | None = None,
    stored_bits: float | None = None,
    budget_bytes: int | None = None,
    budget_bops: int | None = None,
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


def bytes_for_bits(bits: float, n_weights: int) -> int:
    """The bytes that an average of `bits` per weight allows [bytes]."""
    if not (math.isfinite(bits) and bits > 0):
        raise InputError(f"a budget must be a positive number of bits per weight, got {bits!r}.")
    return math.floor(bits * n_weights / 8 * (1 + _ROUNDING))


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
    (the least cost of each decision alone, Qua2SeDiMo's argmax of scores) and `uniform:kmc4` (the same format
    everywhere). The last two need no budget; one that is given is a condition that they are checked against.

    Raises:
        InputError: no budget or more than one, an unknown rule, or a budget that no choice keeps; then with
            the least and most possible bits.
    """
    budget = read_budget(
        table.total_params, bits=bits, stored_bits=stored_bits, budget_bytes=budget_bytes, budget_bops=budget_bops
    )
    return allocate_within(table, budget, rule=rule, gap=gap)


def allocate_within(
    table: SensitivityTable,
    budget: Budget | None,
    *,
    rule: str = "milp",
    gap: float = GAP,
    known: Allocation | None = None,
    groups: Sequence[Variants] = (),
) -> Allocation:
    """Like `allocate`, for a `Budget`; what is searched is never worse than `known`, a choice that fits.

    With `groups` of the decisions, a variant of each is chosen, by the costs of the variants.
    """
    if not table.layers:
        raise InputError(f"the table of {table.denoiser} by {table.method!r} has no decisions to allocate.")
    if rule == ARGMIN:
        chosen = [row.at([_cheapest(row)]) for row in _rows_of(table, groups)]
        return _judge(table, chosen, rule, budget, groups)
    if rule.startswith(UNIFORM) and not groups:
        return _allocate_uniform(table, rule, budget)
    if rule not in SEARCHES:
        rules = (*SEARCHES, ARGMIN) if groups else RULES
        raise InputError(f"the rule must be one of {', '.join(rules)}, got {rule!r}.")
    if budget is None:
        raise InputError(
            "allocation needs a budget: bits, stored_bits or budget_bytes, budget_bops, or a size and bops."
        )
    problem = make_problem(table, budget, groups)
    answer = decide(problem, rule=rule, gap=gap, starts=[_columns(problem, table, known, budget)] if known else [])
    if answer.choice is None:
        raise _infeasible(table, budget, groups)
    chosen = problem.chosen(answer.choice)
    return record(table, budget, chosen, answer, rule=rule, least=problem.least_objective, gap=gap)


def allocate_given(
    table: SensitivityTable, choice: Mapping[str, Format], budget: Budget | None = None, *, rule: str = "given"
) -> Allocation:
    """The allocation of a choice that `rule` made elsewhere, with its costs, and the bound of its size or of a budget.

    Raises:
        InputError: a decision without a format that is allowed and has a cost, or a choice beyond the budget.
    """
    for d in table.by_decision:
        if d not in choice or (d, choice[d]) not in table.index:
            raise InputError(f"the table has no cost of {choice.get(d, 'any format')} for {d!r}.")
    chosen = [row.at([row.formats[row.name].index(choice[row.name])]) for row in table.rows]
    for option in chosen:
        if math.isinf(option.cost[0]):
            name = option.name
            raise InputError(f"rule {rule!r}: {choice[name]} is forbidden for decision {name!r} (infinite cost).")
    return _judge(table, chosen, rule, budget)


def frontier(
    table: SensitivityTable,
    budgets: Sequence[float],
    *,
    gap: float = GAP,
    rule: str = "greedy",
    bops: int | None = None,
) -> tuple[Allocation, ...]:
    """The allocation at each budget [paper bits per weight], in rising order of the budgets.

    By exchanges unless `rule` is `milp`: a curve needs no proofs, and each point still carries its bound and gap.
    The objective never rises along the curve: every answer is offered to the next, larger budget, so that
    the gap at which a search stops cannot bend the curve upwards. With `bops`, every point keeps that limit of bit
    operations, too; budgets at which no choice is found that keeps both are left out.
    """
    if not budgets:
        raise InputError("a frontier needs at least one budget, got none.")
    found: list[Allocation] = []
    for bits in sorted(set(budgets)):
        budget = Budget(bytes_for_bits(bits, table.total_params), bops=bops)
        try:
            found.append(allocate_within(table, budget, rule=rule, gap=gap, known=found[-1] if found else None))
        except InputError:
            if bops is None:
                raise
    return tuple(found)


def even_budgets(table: SensitivityTable, n_points: int, *, most_bits: float | None = None) -> tuple[float, ...]:
    """Budgets from the least to the most possible bits, or to `most_bits`, evenly spaced [paper bits per weight]."""
    if n_points < 2:
        raise InputError(f"a curve needs at least two points, got {n_points}.")
    low, high = bits_range(table)
    high = high if most_bits is None else min(high, most_bits)
    if high < low:
        raise InputError(f"most_bits must be at least the {low:.4f} bits that these formats need, got {most_bits}.")
    return tuple(low + (high - low) * i / (n_points - 1) for i in range(n_points))


def _allocate_uniform(table: SensitivityTable, rule: str, budget: Budget | None) -> Allocation:
    """One format everywhere; a decision that lacks it has its format of least cost, and a note says so."""
    number_format = Format.parse(rule.removeprefix(UNIFORM))
    missing = sorted(d for d in table.by_decision if (d, number_format) not in table.index)
    if len(missing) == len(table.by_decision):
        known = sorted({str(c.format) for c in table.costs})
        raise InputError(f"the table has no costs of {number_format}; it has {', '.join(known)}.")
    choice = dict.fromkeys(table.by_decision, number_format)
    for row in table.rows:
        if row.name in missing:
            choice |= row.variant(_cheapest(row))
    notes = tuple(f"{d} cannot take {number_format} and has {choice[d]}" for d in missing)
    return replace(allocate_given(table, choice, budget, rule=rule), notes=notes)


def _cheapest(row: Variants) -> int:
    """The option of least cost; the smaller one of equals, then the first by the names of its formats."""
    return int(np.lexsort((*row.ranks[::-1], row.stored_bytes, row.paper_bytes, row.cost))[0])


def _judge(
    table: SensitivityTable,
    chosen: Sequence[Variants],
    rule: str,
    budget: Budget | None,
    groups: Sequence[Variants] = (),
) -> Allocation:
    """The allocation of what was chosen without looking at a budget, with the bound of its size."""
    own = budget or Budget(sum(int(option.paper_bytes[0]) for option in chosen), "paper")
    problem = make_problem(table, own, groups)
    answer = Answer(None, relax(problem).bound, is_heuristic=True)
    found = record(table, own, chosen, answer, rule=rule, least=problem.least_objective)
    sizes = ((found.used_bytes, own.size_bytes), (found.bops, own.bops))
    if any(limit is not None and taken > limit for taken, limit in sizes):
        limits = [
            *([] if own.size_bytes is None else [f"{8 * own.size_bytes / table.total_params:.4f} bits"]),
            *([] if own.bops is None else [f"{own.bops} operations"]),
        ]
        raise InputError(
            f"the rule {rule!r} takes {found.bits:.4f} {own.accounting} bits per weight and {found.bops} bit "
            f"operations, more than the budget of {' and '.join(limits)}. Leave the budget out, or choose another rule."
        )
    return found


def _columns(problem: Problem, table: SensitivityTable, known: Allocation, budget: Budget) -> IntArray:
    """The columns of a known choice, or of options that are as good and as small."""
    entries = [table.index[name, known.choice[name]] for name in sorted(table.by_decision)]
    sizes = np.array([budget.sizes(entry) for entry in entries], np.int64).T  # [R, D]
    is_as_good = problem.cost <= np.array([entry.cost for entry in entries])[:, None]
    return np.asarray((is_as_good & (problem.size <= sizes[..., None]).all(axis=0)).argmax(axis=1), dtype=np.int64)


def _rows_of(table: SensitivityTable, groups: Sequence[Variants] = ()) -> list[Variants]:
    """The options of finite cost of each decision, or of each group if the decisions are grouped.

    Raises:
        InputError: a decision or a group that has none.
    """
    if groups:
        check_groups(groups, table.layers, table.denoiser)
    rows = [row.at(np.flatnonzero(np.isfinite(row.cost))) for row in groups or table.rows]
    if empty := [row.name for row in rows if not len(row)]:
        lacks = ("group {!r} has no variant" if groups else "decision {!r} has no format").format(min(empty))
        raise InputError(f"{lacks} of finite cost; add formats to the space.")
    return rows


def make_problem(
    table: SensitivityTable, budget: Budget, groups: Sequence[Variants] = (), *, keeps_dominated: bool = False
) -> Problem:
    """The problem of a table under a budget; the answer depends on no order but that of names."""
    rows = sorted(_rows_of(table, groups), key=attrgetter("name"))
    if not keeps_dominated:
        ties = ([row.paper_bytes, *row.ranks] for row in rows)
        sizes = (np.array(budget.sizes(row)) for row in rows)
        kept = (pareto(row.cost, size, np.array(tie)) for row, size, tie in zip(rows, sizes, ties, strict=True))
        rows = [row.at(own) for row, own in zip(rows, kept, strict=True)]
    limit, n_columns = budget.limits(table.attention_bops), max(map(len, rows), default=0)
    cost = np.full((len(rows), n_columns), np.inf)
    size = np.zeros((len(limit), len(rows), n_columns), dtype=np.int64)
    for i, row in enumerate(rows):
        cost[i, : len(row)], size[:, i, : len(row)] = row.cost, budget.sizes(row)
    return Problem(tuple(rows), cost, size, limit)


def bits_range(table: SensitivityTable) -> tuple[float, float]:
    """The least and the most average paper bits per weight that a table's formats can make, ever chosen or not."""
    ((least, most),) = _ends(_rows_of(table), Budget(0))
    return 8 / table.total_params * least, 8 / table.total_params * most


def _ends(rows: Sequence[Variants], budget: Budget) -> list[tuple[int, int]]:
    """The least and the most that all decisions together can take, of each resource that a budget limits."""
    sizes = zip(*(budget.sizes(row) for row in rows), strict=True)
    return [(sum(int(one.min()) for one in of_rows), sum(int(one.max()) for one in of_rows)) for of_rows in sizes]


def record(
    table: SensitivityTable,
    budget: Budget,
    chosen: Sequence[Variants],
    answer: Answer,
    *,
    rule: str,
    least: float,
    gap: float = 0.0,
) -> Allocation:
    """The allocation of the options that an answer chose, one for each decision or group.

    `least` is the least objective without any budget, `gap` the distance up to which it is called optimal.
    """
    choice = {name: number_format for option in chosen for name, number_format in option.variant(0).items()}
    objective = math.fsum(float(option.cost[0]) for option in chosen)
    bound = max(least, min(answer.bound, objective))
    distance = 0.0 if objective <= bound else (objective - bound) / (objective - least)
    paper, stored, bops = (sum(int(getattr(option, size)[0]) for option in chosen) for size in SIZES)
    used = paper if budget.accounting == "paper" else stored
    status: Status = "heuristic" if answer.is_heuristic else "optimal" if distance <= gap + _TOLERANCE else "feasible"
    return Allocation(
        recipe=compose(choice, table.layers, table.streams),
        choice=choice,
        bits=8 * used / table.total_params,
        budget_bytes=budget.size_bytes,
        used_bytes=used,
        objective=objective,
        standard_error=math.sqrt(math.fsum(float(option.standard_error[0]) ** 2 for option in chosen)),
        bound=bound,
        gap=distance,
        status=status,
        method=table.method,
        rule=rule,
        accounting=budget.accounting,
        paper_bits=8 * paper / table.total_params,
        stored_bits=8 * stored / table.total_params,
        bops=bops + table.attention_bops,
        budget_bops=budget.bops,
        n_solves=answer.n_solves,
    )


def _infeasible(table: SensitivityTable, budget: Budget, groups: Sequence[Variants]) -> InputError:
    """The error that says what is possible instead of a budget that cannot be kept."""
    ends, limits, possible = _ends(_rows_of(table, groups), budget), [], []
    if budget.size_bytes is not None:
        scale = 8 / table.total_params
        size = scale * budget.size_bytes
        limits.append(f"{budget.size_bytes} bytes ({size:.4f} {budget.accounting} bits per weight)")
        least, most = math.ceil(scale * ends[0][0] * 1e4) / 1e4, math.floor(scale * ends[0][1] * 1e4) / 1e4
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
