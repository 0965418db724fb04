"""From a choice to the `Allocation` that is handed out: sums, certificate, and why a budget cannot be met."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sedimo.allocation.problem import Allocation, Budget, IntArray, Status
from sedimo.errors import InputError
from sedimo.sensitivity.table import Cost, SensitivityTable
from sedimo.sensitivity.variants import Variant, VariantTable
from sedimo.space import Recipe

_ROUNDING = 1e-6  # the solver's absolute tolerance, in units of the mean cost of a decision


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
    status: Status = "heuristic" if outcome.is_heuristic else "optimal" if distance <= gap + _ROUNDING else "feasible"
    return Allocation(
        recipe=Recipe.from_mapping({layer: f for name, f in choice.items() for layer in table.layers[name]}),
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
        bops=sum(entry.bops for entry in chosen),
        budget_bops=budget.bops,
        n_solves=outcome.n_solves,
        notes=outcome.notes,
    )


def infeasible(budget: Budget, n_weights: int, sizes: Iterable[IntArray]) -> InputError:
    """The error that says what is possible instead of a budget that cannot be kept.

    `sizes` is what the allowed options of each decision or group take, `[R, V]` each.
    """
    ends = [(size.min(axis=1), int(size[0].max())) for size in sizes]
    scale = 8 / n_weights
    low, high = scale * sum(int(least[0]) for least, _ in ends), scale * sum(most for _, most in ends)
    text = (
        f"no choice of formats keeps the budget of {budget.size_bytes} bytes ({scale * budget.size_bytes:.4f} "
        f"{budget.accounting} bits per weight): with these formats the least possible is "
        f"{math.ceil(low * 1e4) / 1e4:.4f} bits and the most {math.floor(high * 1e4) / 1e4:.4f}."
    )
    if budget.bops is None:
        return InputError(f"{text} Raise the budget, or allow formats with fewer bits.")
    return InputError(
        f"{text} The budget of bit operations is {budget.bops}, the least possible "
        f"{sum(int(least[1]) for least, _ in ends)}; "
        f"both must hold at once. Raise one of them, or allow formats with fewer bits."
    )
