"""What quality costs in bits: the best allocation at each of several budgets."""

from __future__ import annotations

from collections.abc import Sequence

from sedimo.allocation.decide import GAP
from sedimo.allocation.problem import Accounting, Allocation, Budget, bits_range, bytes_for_bits
from sedimo.allocation.solve import allocate_within
from sedimo.errors import InputError
from sedimo.sensitivity.table import SensitivityTable


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
