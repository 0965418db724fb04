"""Rules that look at no budget: the papers' argmax of every decision, and one format for all."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sedimo.allocation.problem import Allocation, Budget, make_problem
from sedimo.allocation.record import Outcome, least_cost, record
from sedimo.allocation.relaxation import relax
from sedimo.errors import InputError
from sedimo.quant.formats import Format
from sedimo.sensitivity.table import Cost, SensitivityTable

ARGMIN, UNIFORM = "argmin", "uniform:"


def is_fixed(rule: str) -> bool:
    """Whether a rule needs no budget."""
    return rule == ARGMIN or rule.startswith(UNIFORM)


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
    size = Budget(0, "paper" if budget is None else budget.accounting)
    used = sum(size.sizes(entry)[0] for entry in chosen.values())
    bops = sum(entry.bops for entry in chosen.values())
    if budget is not None and (used > budget.size_bytes or (budget.bops is not None and bops > budget.bops)):
        raise InputError(
            f"the rule {rule!r} takes {8 * used / table.total_params:.4f} {budget.accounting} bits per weight and "
            f"{bops} bit operations, more than the budget of {8 * budget.size_bytes / table.total_params:.4f} bits"
            f"{'' if budget.bops is None else f' and {budget.bops} operations'}. Leave the budget out, or choose "
            "another rule."
        )
    own = budget or Budget(used, "paper")
    bound = min(relax(make_problem(table, own)).bound, math.fsum(entry.cost for entry in chosen.values()))
    return record(table, own, rule, Outcome(chosen, bound, is_heuristic=True, notes=notes))


def allocate_given(table: SensitivityTable, choice: Mapping[str, Format]) -> Allocation:
    """The allocation of a choice that was made elsewhere, with its costs and the bound of its size.

    Raises:
        InputError: a decision without a format, or a format that the table has no cost of.
    """
    missing = [d for d in table.by_decision if d not in choice or (d, choice[d]) not in table.index]
    if missing:
        raise InputError(f"the table has no cost of {choice.get(missing[0], 'any format')} for {missing[0]!r}.")
    chosen = {d: table.index[d, choice[d]] for d in table.by_decision}
    own = Budget(sum(entry.paper_bytes for entry in chosen.values()), "paper")
    bound = min(relax(make_problem(table, own)).bound, math.fsum(entry.cost for entry in chosen.values()))
    return record(table, own, "given", Outcome(chosen, bound, is_heuristic=True))


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
