"""Rules that look at no budget: the papers' argmax of every decision, and one format for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np

from sedimo.allocation.decide import SEARCHES
from sedimo.allocation.problem import Allocation, Budget, Problem, make_problem
from sedimo.allocation.record import Outcome, as_variant, least_cost, record
from sedimo.allocation.relaxation import relax
from sedimo.errors import InputError
from sedimo.quant.formats import Format
from sedimo.sensitivity.table import Cost, SensitivityTable
from sedimo.sensitivity.variants import Variant, VariantTable

ARGMIN, UNIFORM = "argmin", "uniform:"


def is_fixed(rule: str) -> bool:
    """Whether a rule needs no budget."""
    return rule == ARGMIN or rule.startswith(UNIFORM)


def decided_by(method: str, rule: str) -> str:
    """The method whose costs decided, or the rule, where weight errors only describe what it gave.

    Such rules are a recipe that was given, one format for all, and blocks at 16 bits.
    """
    is_described = method == "error" and rule not in (*SEARCHES, ARGMIN)
    return rule if is_described else method


def allocate_fixed(table: SensitivityTable, budget: Budget | None, rule: str) -> Allocation:
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


def judge(
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
    return judge(table, entries, make=partial(make_problem, table), rule=rule, budget=budget, notes=notes)


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
