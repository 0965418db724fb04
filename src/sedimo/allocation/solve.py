"""The recipe of least cost under a budget, exactly or by a named rule; of decisions, or of groups decided as one.

Everything that decides is on the table's numbers; no clock, no random numbers, no file. The same table and
budget give the same recipe, whatever the order of the table's entries. Variants of a group are the options of one row
of the same problem that is put for single decisions, pruned to those that a best choice can need.

Source:
    Mills et al. 2024, Qua2SeDiMo (arXiv 2412.14628): enumeration of a block's variants, and the argmax of decisions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from sedimo.allocation.problem import (
    Accounting,
    Allocation,
    Answer,
    Budget,
    Entries,
    IntArray,
    Problem,
    Table,
    arrays_of,
    bits_range,
    bytes_for_bits,
    infeasible,
    make_problem,
    read_budget,
    record,
    rows_of,
)
from sedimo.allocation.program import GAP, SEARCHES, decide, relax
from sedimo.allocation.table import Cost, SensitivityTable
from sedimo.allocation.variant_table import Variant
from sedimo.errors import InputError
from sedimo.quant.formats import Format

ARGMIN, UNIFORM = "argmin", "uniform:"
RULES = (*SEARCHES, ARGMIN, f"{UNIFORM}FORMAT")


def allocate(
    table: Table,
    *,
    bits: float | None = None,
    stored_bits: float | None = None,
    budget_bytes: int | None = None,
    budget_bops: int | None = None,
    rule: str = "milp",
    gap: float = GAP,
) -> Allocation:
    """The format of every decision, by itself or as part of a variant of its group: least total cost within a budget.

    One size is given, `bits` per weight in the papers' accounting, `stored_bits` per weight or `budget_bytes` of
    the tensors that replace the weights, or `budget_bops`, or both. `budget_bops` limits the bit operations of one
    sample and call of the whole denoiser: the products of attention, which stay at 16 bits, count. Alone it says
    nothing of bytes: formats that compute in 16 bits (codebooks, fp16) are then alike, and the best one is taken.

    Rules: `milp` (default; within `gap` of the optimum, with proof), `greedy` (exchanges from the Lagrangian
    choice), `lp` (the linear relaxation, its one split decision rounded down, as MPQ-Diff does), `argmin`
    (the least cost of each decision or group alone, Qua2SeDiMo's argmax of scores, no budget needed) and, of
    decisions, `uniform:kmc4` (the same format everywhere; no budget needed). A budget given to the last two is a
    condition that they are checked against.

    Raises:
        InputError: no budget or more than one, an unknown rule, or a budget that no choice keeps; then with
            the least and most possible bits.
    """
    budget = read_budget(
        table.total_params, bits=bits, stored_bits=stored_bits, budget_bytes=budget_bytes, budget_bops=budget_bops
    )
    return allocate_within(table, budget, rule=rule, gap=gap)


def allocate_within(
    table: Table, budget: Budget | None, *, rule: str = "milp", gap: float = GAP, known: Allocation | None = None
) -> Allocation:
    """Like `allocate`, for a `Budget`; what is searched is never worse than `known`, a choice that fits."""
    rows, of_decisions = rows_of(table), table if isinstance(table, SensitivityTable) else None
    if not rows:
        raise InputError(f"the table of {table.denoiser} by {table.method!r} has no decisions to allocate.")
    if rule == ARGMIN:
        return _judge(table, map(_cheapest, of_decisions.by_decision.values() if of_decisions else rows), rule, budget)
    if rule.startswith(UNIFORM) and of_decisions:
        return _allocate_uniform(of_decisions, rule, budget)
    if rule not in SEARCHES:
        rules = RULES if of_decisions else (*SEARCHES, ARGMIN)
        raise InputError(f"the rule must be one of {', '.join(rules)}, got {rule!r}.")
    if budget is None:
        raise InputError(
            "allocation needs a budget: bits, stored_bits or budget_bytes, budget_bops, or a size and bops."
        )
    problem = make_problem(table, budget)
    starts = [_columns(problem, of_decisions, known, budget)] if known and of_decisions else []
    answer = decide(problem, rule=rule, gap=gap, starts=starts)
    if answer.choice is None:
        raise infeasible(table, budget)
    picked = zip(rows, problem.options, answer.choice, strict=True)
    chosen = (entries[int(kept[column])] for entries, kept, column in picked)
    return record(table, budget, chosen, answer, rule=rule, least=problem.least_objective, gap=gap)


def allocate_given(
    table: SensitivityTable, choice: Mapping[str, Format], budget: Budget | None = None, *, rule: str = "given"
) -> Allocation:
    """The allocation of a choice that was made elsewhere, with its costs, and the bound of its size or of a budget.

    `rule` names how it was made.

    Raises:
        InputError: a decision without a format, a format that is forbidden or that the table has no cost of, or a
            choice beyond the budget.
    """
    for d in table.by_decision:
        if d not in choice or (d, choice[d]) not in table.index:
            raise InputError(f"the table has no cost of {choice.get(d, 'any format')} for {d!r}.")
    chosen = [table.index[d, choice[d]] for d in table.by_decision]
    for entry in chosen:
        if math.isinf(entry.cost):
            raise InputError(
                f"rule {rule!r}: {entry.format} is forbidden for decision {entry.decision!r} (infinite cost)."
            )
    return _judge(table, chosen, rule, budget)


def frontier(
    table: SensitivityTable,
    budgets: Sequence[float],
    *,
    accounting: Accounting = "paper",
    gap: float = GAP,
    rule: str = "greedy",
    bops: int | None = None,
) -> tuple[Allocation, ...]:
    """The allocation at each budget [bits per weight], in rising order of the budgets.

    By exchanges unless `rule` is `milp`: a curve needs no proofs, and each point still carries its bound and gap.
    The objective never rises along the curve: every answer is offered to the next, larger budget, so that
    the gap at which a search stops cannot bend the curve upwards. With `bops`, every point keeps that limit of bit
    operations, too; budgets at which no choice is found that keeps both are left out.
    """
    if not budgets:
        raise InputError("a frontier needs at least one budget, got none.")
    found: list[Allocation] = []
    for bits in sorted(set(budgets)):
        budget = Budget(bytes_for_bits(bits, table.total_params), accounting, bops)
        try:
            found.append(allocate_within(table, budget, rule=rule, gap=gap, known=found[-1] if found else None))
        except InputError:
            if bops is None:
                raise
    return tuple(found)


def even_budgets(
    table: SensitivityTable, n_points: int, *, accounting: Accounting = "paper", most_bits: float | None = None
) -> tuple[float, ...]:
    """Budgets from the least to the most possible bits, or to `most_bits`, evenly spaced [bits per weight]."""
    if n_points < 2:
        raise InputError(f"a curve needs at least two points, got {n_points}.")
    low, high = bits_range(table, accounting)
    if most_bits is not None:
        high = min(high, most_bits)
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
    choice |= {d: f for d in missing for f in _cheapest(table.by_decision[d]).choice.values()}
    notes = tuple(f"{d} cannot take {number_format} and has {choice[d]}" for d in missing)
    return replace(allocate_given(table, choice, budget, rule=rule), notes=notes)


def _cheapest(entries: Entries) -> Cost | Variant:
    """The entry of least cost; the smaller one of equals, then the first by the names of its formats."""
    cost = arrays_of(entries, Budget(0))[0]
    equal = (entries[int(i)] for i in np.flatnonzero(cost == cost.min()))
    return min(equal, key=lambda e: (e.paper_bytes, e.stored_bytes, [*map(str, e.choice.values())]))


def _judge(table: Table, chosen: Iterable[Cost | Variant], rule: str, budget: Budget | None) -> Allocation:
    """The allocation of what was chosen without looking at a budget, with the bound of its size."""
    chosen = tuple(chosen)
    own = budget or Budget(sum(entry.paper_bytes for entry in chosen), "paper")
    problem = make_problem(table, own)
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
