"""The recipe of least cost under a budget, exactly or by a named rule; of decisions, or of groups decided as one.

Everything that decides is on the table's numbers; no clock, no random numbers, no file. The same table and
budget give the same recipe, whatever the order of the table's entries. Variants of a group are the options of one row
of the same problem that is put for single decisions, pruned to those that a best choice can need.

Source:
    Mills et al. 2024, Qua2SeDiMo (arXiv 2412.14628): enumeration of a block's variants, and the argmax of decisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np

from sedimo.allocation.decide import GAP, SEARCHES, Decided, decide
from sedimo.allocation.problem import (
    Accounting,
    Allocation,
    Budget,
    IntArray,
    Options,
    Outcome,
    Problem,
    as_variant,
    assemble,
    bits_range,
    bytes_for_bits,
    infeasible,
    least_cost,
    make_problem,
    pareto,
    read_budget,
    record,
)
from sedimo.allocation.relaxation import relax
from sedimo.allocation.table import Cost, SensitivityTable
from sedimo.allocation.variant_table import GroupVariants, Variant, VariantTable
from sedimo.errors import InputError
from sedimo.quant.formats import Format

ARGMIN, UNIFORM = "argmin", "uniform:"
RULES = (*SEARCHES, ARGMIN, f"{UNIFORM}FORMAT")


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
    (the least cost of each decision alone, Qua2SeDiMo's argmax of scores, no budget needed) and
    `uniform:kmc4` (the same format everywhere; no budget needed). A budget given to the last two is a
    condition that they are checked against.

    Raises:
        InputError: no budget or more than one, an unknown rule, or a budget that no choice keeps; then with
            the least and most possible bits.
    """
    if not table.costs:
        raise InputError(f"the sensitivity table {table.method!r} of {table.denoiser} has no decisions.")
    budget = read_budget(
        table.total_params, bits=bits, stored_bits=stored_bits, budget_bytes=budget_bytes, budget_bops=budget_bops
    )
    if rule == ARGMIN or rule.startswith(UNIFORM):
        return _allocate_fixed(table, budget, rule)
    return allocate_within(table, _needed(budget, rule, RULES), rule=rule, gap=gap)


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
    starts = [] if known is None else [_columns(problem, table, known, budget)]
    decided = decide(problem, rule=rule, gap=gap, starts=starts)
    if decided is None:
        raise infeasible(budget, table, (_sizes(costs, budget) for costs in table.by_decision.values()))
    pairs = zip(problem.options, decided.choice, strict=True)
    chosen = tuple(as_variant(row[int(column)]) for row, column in pairs)
    return record(table, budget, rule, _outcome(chosen, problem, decided), gap=gap)


def allocate_variants(
    table: VariantTable,
    *,
    bits: float | None = None,
    stored_bits: float | None = None,
    budget_bytes: int | None = None,
    budget_bops: int | None = None,
    rule: str = "milp",
    gap: float = GAP,
) -> Allocation:
    """The variant of every group: least total cost within a budget; `choice` is the format of every decision.

    Budgets and the rules `milp`, `greedy` and `lp` are those of `allocate`. `argmin` is the least cost of each
    group alone, Qua2SeDiMo's argmax of scores; a budget given to it is a condition that it is checked against.

    Raises:
        InputError: no budget or more than one, an unknown rule, or a budget that no choice keeps; then with
            the least and most possible bits.
    """
    if not table.groups:
        raise InputError(f"the variants of {table.denoiser} by {table.method!r} have no decisions.")
    budget = read_budget(
        table.total_params, bits=bits, stored_bits=stored_bits, budget_bytes=budget_bytes, budget_bops=budget_bops
    )
    if rule == ARGMIN:
        cheapest = [group.variant(_cheapest(group)) for group in _sorted(table)]
        return _judge(table, cheapest, make=partial(_make_problem, table), rule=rule, budget=budget)
    budget = _needed(budget, rule, (*SEARCHES, ARGMIN))
    problem = _make_problem(table, budget)
    decided = decide(problem, rule=rule, gap=gap)
    if decided is None:
        allowed = (_variant_sizes(group, budget)[:, np.isfinite(group.cost)] for group in table.groups)
        raise infeasible(budget, table, allowed)
    rows = zip(_sorted(table), problem.options, decided.choice, strict=True)
    chosen = tuple(group.variant(options[int(column)]) for group, options, column in rows)
    return record(table, budget, rule, _outcome(chosen, problem, decided), gap=gap)


def allocate_given(
    table: SensitivityTable, choice: Mapping[str, Format], budget: Budget | None = None, *, rule: str = "given"
) -> Allocation:
    """The allocation of a choice that was made elsewhere, with its costs, and the bound of its size or of a budget.

    `rule` names how it was made.

    Raises:
        InputError: a decision without a format, a format that the table has no cost of, or a choice beyond the budget.
    """
    missing = [d for d in table.by_decision if d not in choice or (d, choice[d]) not in table.index]
    if missing:
        raise InputError(f"the table has no cost of {choice.get(missing[0], 'any format')} for {missing[0]!r}.")
    chosen = {d: table.index[d, choice[d]] for d in table.by_decision}
    _refuse_forbidden(rule, chosen)
    return _judge_costs(table, chosen.values(), rule=rule, budget=budget)


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

    Raises:
        InputError: no budgets, or (without `bops`) one that no choice keeps.
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
    """Budgets from the least to the most possible bits, or to `most_bits`, evenly spaced [bits per weight].

    Raises:
        InputError: fewer than two points, or `most_bits` below the least possible.
    """
    if n_points < 2:
        raise InputError(f"a curve needs at least two points, got {n_points}.")
    low, high = bits_range(table, accounting)
    if most_bits is not None:
        high = min(high, most_bits)
    if high < low:
        raise InputError(f"most_bits must be at least the {low:.4f} bits that these formats need, got {most_bits}.")
    return tuple(low + (high - low) * i / (n_points - 1) for i in range(n_points))


def decided_by(method: str, rule: str) -> str:
    """The method whose costs decided, or the rule, where weight errors only describe what it gave.

    Such rules are a recipe that was given, one format for all, and blocks at 16 bits.
    """
    is_described = method == "error" and rule not in (*SEARCHES, ARGMIN)
    return rule if is_described else method


def _needed(budget: Budget | None, rule: str, rules: Sequence[str]) -> Budget:
    """The budget of a rule that searches."""
    if rule not in SEARCHES:
        raise InputError(f"the rule must be one of {', '.join(rules)}, got {rule!r}.")
    if budget is None:
        raise InputError(
            "allocation needs a budget: bits, stored_bits or budget_bytes, budget_bops, or a size and bops."
        )
    return budget


def _outcome(chosen: tuple[Variant, ...], problem: Problem[object], decided: Decided) -> Outcome:
    return Outcome(chosen, problem.least_objective, decided.bound, decided.n_solves, decided.is_heuristic)


def _allocate_fixed(table: SensitivityTable, budget: Budget | None, rule: str) -> Allocation:
    """The allocation of `argmin` or `uniform:FORMAT`; a budget that is given is checked, not used.

    The bound is that of the best choice of the same size. Under `uniform`, a decision that lacks the format
    has its format of least cost, and a note says so.

    Raises:
        InputError: the table does not know the format, or the result exceeds the budget.
    """
    notes: tuple[str, ...] = ()
    if rule == ARGMIN:
        chosen = {d: least_cost(costs) for d, costs in table.by_decision.items()}
    else:
        chosen, notes = _uniform(table, Format.parse(rule.removeprefix(UNIFORM)))
        _refuse_forbidden(rule, chosen)
    return _judge_costs(table, chosen.values(), budget=budget, rule=rule, notes=notes)


def _judge(
    table: SensitivityTable | VariantTable,
    chosen: Sequence[Variant],
    *,
    make: Callable[[Budget], Problem[object]],
    rule: str,
    budget: Budget | None = None,
    notes: tuple[str, ...] = (),
) -> Allocation:
    """The allocation of what was chosen without looking at a budget, with the bound of its size.

    `make` gives the problem of a budget.

    Raises:
        InputError: the choice exceeds the budget that is given all the same.
    """
    if budget is not None:
        _check_kept(chosen, budget, rule, table)
    own = budget or Budget(sum(entry.paper_bytes for entry in chosen), "paper")
    problem = make(own)
    bound = relax(problem).bound
    outcome = Outcome(tuple(chosen), problem.least_objective, bound, is_heuristic=True, notes=notes)
    return record(table, own, rule, outcome)


def _judge_costs(
    table: SensitivityTable,
    chosen: Iterable[Cost],
    *,
    rule: str,
    budget: Budget | None = None,
    notes: tuple[str, ...] = (),
) -> Allocation:
    entries = [as_variant(entry) for entry in chosen]
    return _judge(table, entries, make=partial(make_problem, table), rule=rule, budget=budget, notes=notes)


def _check_kept(chosen: Sequence[Variant], budget: Budget, rule: str, table: SensitivityTable | VariantTable) -> None:
    used = np.array([budget.sizes(entry) for entry in chosen], dtype=np.int64).sum(axis=0)
    if (used <= budget.limits(table.attention_bops)).all():
        return
    bops = table.attention_bops + sum(entry.bops for entry in chosen)
    size_bytes = sum(entry.paper_bytes if budget.accounting == "paper" else entry.stored_bytes for entry in chosen)
    limits = [
        *([] if budget.size_bytes is None else [f"{8 * budget.size_bytes / table.total_params:.4f} bits"]),
        *([] if budget.bops is None else [f"{budget.bops} operations"]),
    ]
    raise InputError(
        f"the rule {rule!r} takes {8 * size_bytes / table.total_params:.4f} {budget.accounting} bits per weight and "
        f"{bops} bit operations, more than the budget of {' and '.join(limits)}. Leave the budget out, or choose "
        "another rule."
    )


def _refuse_forbidden(rule: str, chosen: Mapping[str, Cost]) -> None:
    for decision, entry in chosen.items():
        if math.isinf(entry.cost):
            raise InputError(f"rule {rule!r}: {entry.format} is forbidden for decision {decision!r} (infinite cost).")


def _uniform(table: SensitivityTable, number_format: Format) -> tuple[dict[str, Cost], tuple[str, ...]]:
    index = table.index
    missing = sorted(d for d in table.by_decision if (d, number_format) not in index)
    if len(missing) == len(table.by_decision):
        known = sorted({str(c.format) for c in table.costs})
        raise InputError(f"the table has no costs of {number_format}; it has {', '.join(known)}.")
    chosen = {
        d: index[d, number_format] if d not in missing else least_cost(costs) for d, costs in table.by_decision.items()
    }
    notes = tuple(f"{d} cannot take {number_format} and has {chosen[d].format}" for d in missing)
    return chosen, notes


def _sizes(costs: Sequence[Cost], budget: Budget) -> IntArray:
    """What the allowed formats of a decision take, [R, V]."""
    return np.array([budget.sizes(entry) for entry in costs if entry.cost < math.inf], dtype=np.int64).T


def _columns(problem: Problem[Cost], table: SensitivityTable, known: Allocation, budget: Budget) -> IntArray:
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


def _make_problem(table: VariantTable, budget: Budget) -> Problem[int]:
    """The problem of a table; its options are rows of `GroupVariants`."""
    return assemble([_pareto_rows(group, budget) for group in _sorted(table)], budget.limits(table.attention_bops))


def _pareto_rows(group: GroupVariants, budget: Budget) -> Options[int]:
    size = _variant_sizes(group, budget)
    kept = pareto(group.cost, size, np.vstack([group.paper_bytes, _names(group)]))
    if not len(kept):
        raise InputError(f"group {group.group!r} has no variant of finite cost; add formats to the space.")
    return Options(tuple(kept.tolist()), group.cost[kept], size[:, kept])


def _cheapest(group: GroupVariants) -> int:
    """The variant of least cost; the smaller one of equals, then the first by the names of its formats."""
    keys = (*_names(group)[::-1], group.stored_bytes, group.paper_bytes, group.cost)
    return int(np.lexsort(keys)[0])


def _variant_sizes(group: GroupVariants, budget: Budget) -> IntArray:
    """What each variant takes of each resource, [R, V]."""
    return np.array(budget.limited(group.paper_bytes, group.stored_bytes, group.bops), dtype=np.int64)


def _names(group: GroupVariants) -> IntArray:
    """The place of each decision's format among the sorted texts, [w, V]: equals do not depend on their order."""
    ranks = [np.argsort(np.argsort([str(f) for f in formats])) for formats in group.formats]
    return np.array([rank[column] for rank, column in zip(ranks, group.choice.T, strict=True)], dtype=np.int64)


def _sorted(table: VariantTable) -> list[GroupVariants]:
    """Groups by name: the answer does not depend on their order."""
    return sorted(table.groups, key=lambda group: group.group)
