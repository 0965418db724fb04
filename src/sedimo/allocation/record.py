"""From a choice to the `Allocation` that is handed out: sums, certificate, and why a budget cannot be met."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sedimo.allocation.problem import Allocation, Budget, Status, bits_range
from sedimo.errors import InputError
from sedimo.sensitivity.table import Cost, SensitivityTable
from sedimo.space import Recipe

_ROUNDING = 1e-6  # the solver's absolute tolerance, in units of the mean cost of a decision


@dataclass(frozen=True, slots=True)
class Outcome:
    """The table's entry chosen for each decision, a lower bound of the best objective, and how it came about."""

    chosen: Mapping[str, Cost]
    bound: float
    n_solves: int = 0
    is_heuristic: bool = False
    notes: tuple[str, ...] = ()


def least_cost(costs: Sequence[Cost]) -> Cost:
    """The entry of least cost; the smaller one of equals."""
    return min(costs, key=lambda c: (c.cost, c.paper_bytes, c.stored_bytes, str(c.format)))


def record(table: SensitivityTable, budget: Budget, rule: str, outcome: Outcome, *, gap: float = 0.0) -> Allocation:
    """The allocation of an outcome; `gap` is the distance at which it may call itself optimal.

    Raises:
        InputError: the outcome contains a forbidden format.
    """
    chosen = outcome.chosen
    choice = {name: entry.format for name, entry in chosen.items()}
    objective = math.fsum(entry.cost for entry in chosen.values())
    if math.isinf(objective):
        bad = next(entry for entry in chosen.values() if math.isinf(entry.cost))
        raise InputError(f"rule {rule!r}: {bad.format} is forbidden for decision {bad.decision!r} (infinite cost).")
    least = math.fsum(least_cost(costs).cost for costs in table.by_decision.values())
    bound = max(least, min(outcome.bound, objective))
    distance = 0.0 if objective <= bound else (objective - bound) / (objective - least)
    paper, stored = (sum(b) for b in zip(*((e.paper_bytes, e.stored_bytes) for e in chosen.values()), strict=True))
    used = paper if budget.accounting == "paper" else stored
    status: Status = "heuristic" if outcome.is_heuristic else "optimal" if distance <= gap + _ROUNDING else "feasible"
    return Allocation(
        recipe=Recipe.from_mapping({layer: f for name, f in choice.items() for layer in table.layers[name]}),
        choice=choice,
        bits=8 * used / table.total_params,
        budget_bytes=budget.size_bytes,
        used_bytes=used,
        objective=objective,
        standard_error=math.sqrt(math.fsum(entry.standard_error**2 for entry in chosen.values())),
        bound=bound,
        gap=distance,
        status=status,
        method=table.method,
        rule=rule,
        accounting=budget.accounting,
        paper_bits=8 * paper / table.total_params,
        stored_bits=8 * stored / table.total_params,
        bops=sum(entry.bops for entry in chosen.values()),
        budget_bops=budget.bops,
        n_solves=outcome.n_solves,
        notes=outcome.notes,
    )


def infeasible(table: SensitivityTable, budget: Budget) -> InputError:
    """The error that says what is possible instead of a budget that cannot be kept."""
    low, high = bits_range(table, budget.accounting)
    wanted = 8 * budget.size_bytes / table.total_params
    text = (
        f"no choice of formats keeps the budget of {budget.size_bytes} bytes ({wanted:.4f} {budget.accounting} bits "
        f"per weight): with these formats the least possible is {math.ceil(low * 1e4) / 1e4:.4f} bits and the most "
        f"{math.floor(high * 1e4) / 1e4:.4f}."
    )
    if budget.bops is None:
        return InputError(f"{text} Raise the budget, or allow formats with fewer bits.")
    least = sum(min(c.bops for c in costs if c.cost < math.inf) for costs in table.by_decision.values())
    return InputError(
        f"{text} The budget of bit operations is {budget.bops}, the least possible {least}; "
        f"both must hold at once. Raise one of them, or allow formats with fewer bits."
    )
