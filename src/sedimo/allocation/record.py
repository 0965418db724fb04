"""From a choice to the `Allocation` that is handed out: sums, certificate, and why a budget cannot be met."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sedimo.allocation.problem import Allocation, Budget, IntArray, Status
from sedimo.errors import InputError
from sedimo.sensitivity.table import Cost, SensitivityTable
from sedimo.sensitivity.variants import Variant, VariantTable
from sedimo.space import compose

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
