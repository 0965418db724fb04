"""From a table, an allocation and evidence to the `Summary` of a report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from sedimo.allocation.problem import Accounting, Allocation
from sedimo.metrics.estimate import Estimate, normal_estimate
from sedimo.quant.formats import FULL_BITS, Format
from sedimo.reporting.placement import OUTSIDE, kinds, operation_label, stage
from sedimo.reporting.summary import (
    Choice,
    DecisionRow,
    Evidence,
    FrontierPoint,
    GroupRow,
    Provenance,
    Sizes,
    Step,
    Summary,
)
from sedimo.sensitivity.costs import NOISE_POWER
from sedimo.sensitivity.table import Cost, SensitivityTable


def summarize(
    table: SensitivityTable,
    allocation: Allocation,
    *,
    model: str,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    evidence: Evidence | None = None,
    provenance: Provenance | None = None,
) -> Summary:
    """All numbers of the report of one allocation.

    `shapes` gives the weight's shape of each decision, when known. The order of `table.layers` is taken as
    that of the denoiser.
    """
    reference = reference_format(table, allocation)
    chosen = [table.index[key] for key in allocation.choice.items()]
    summed = math.fsum(c.cost for c in chosen)  # an objective may have cross terms; shares are parts of the sum
    error = math.sqrt(math.fsum(c.standard_error**2 for c in chosen))
    total = normal_estimate(summed, error)
    rows = _decision_rows(table, allocation, shapes or {}, reference, total=summed)
    found = evidence or Evidence()
    has_one_kind = len([k for k in kinds(rows) if k != OUTSIDE]) == 1
    return Summary(
        model=model,
        denoiser=table.denoiser,
        sizes=_sizes(table, allocation, rows, found),
        choice=_choice(table, allocation, total),
        reference_format=reference,
        decisions=rows,
        operations=_groups(rows, lambda row: operation_label(row, has_one_kind=has_one_kind)),
        blocks=_groups(rows, lambda row: stage(row.block) if row.block else OUTSIDE),
        evidence=found,
        provenance=provenance or Provenance(),
    )


def reference_format(table: SensitivityTable, allocation: Allocation) -> Format:
    """The format at which decisions are compared: nearly all can take it, and its bits are near the budget's."""
    available = Counter(c.format for c in table.costs if c.format.is_quantized and math.isfinite(c.cost))
    if not available:
        return next(iter(allocation.choice.values()))
    most = max(available.values())
    usual = [f for f, n in available.items() if n >= 0.9 * most]
    order = ("kmc", "uaq", "kma")
    return min(usual, key=lambda f: (abs(f.bits - allocation.bits), order.index(f.family), f.group_size or 0))


def frontier_points(curve: Sequence[Allocation]) -> tuple[FrontierPoint, ...]:
    """The points of a curve of allocations."""
    return tuple(FrontierPoint(a.bits, a.objective, a.standard_error) for a in curve)


def beside_frontier(named: Mapping[str, Allocation], *, accounting: Accounting = "paper") -> tuple[FrontierPoint, ...]:
    """Other recipes to be drawn beside the curve, such as the uniform ones."""
    return tuple(
        FrontierPoint(a.paper_bits if accounting == "paper" else a.stored_bits, a.objective, a.standard_error, name)
        for name, a in named.items()
    )


def _sizes(table: SensitivityTable, allocation: Allocation, rows: Sequence[DecisionRow], evidence: Evidence) -> Sizes:
    return Sizes(
        params=table.total_params,
        n_layers=len({layer for row in rows for layer in row.layers}),
        n_decisions=len(rows),
        paper_bits=allocation.paper_bits,
        stored_bits=allocation.stored_bits,
        stored_bytes=sum(row.stored_bytes for row in rows),
        fp16_bytes=table.total_params * FULL_BITS // 8,
        file_bytes=evidence.file_bytes,
        source_file_bytes=evidence.source_file_bytes,
        bops=allocation.bops,
        full_bops=table.full_bops,
        attention_bops=table.attention_bops,
    )


def _choice(table: SensitivityTable, allocation: Allocation, cost: Estimate) -> Choice:
    return Choice(
        method=table.method,
        unit=table.unit,
        rule=allocation.rule,
        accounting=allocation.accounting,
        budget_bits=None if allocation.budget_bytes is None else 8 * allocation.budget_bytes / table.total_params,
        budget_bops=allocation.budget_bops,
        cost=cost,
        gap=allocation.gap,
        status=allocation.status,
        notes=allocation.notes,
    )


def _decision_rows(
    table: SensitivityTable,
    allocation: Allocation,
    shapes: Mapping[str, tuple[int, ...]],
    reference: Format,
    *,
    total: float,
) -> tuple[DecisionRow, ...]:
    has_shares = total > 0 and min(c.cost for c in table.costs) >= 0
    rows = []
    for name in table.layers:
        entry, at_reference = table.index[name, allocation.choice[name]], table.index.get((name, reference))
        part = entry.cost / total if has_shares else None
        rows.append(_decision_row(table, entry, at_reference, shapes.get(name, ()), total=total, share=part))
    return tuple(rows)


def _decision_row(
    table: SensitivityTable,
    entry: Cost,
    reference: Cost | None,
    shape: tuple[int, ...],
    *,
    total: float,
    share: float | None,
) -> DecisionRow:
    name, is_noise = entry.decision, table.unit == NOISE_POWER
    return DecisionRow(
        name=name,
        layers=tuple(table.layers[name]),
        operation=table.operations[name],
        block=table.blocks[name],
        shape=shape,
        params=table.params[name],
        format=entry.format,
        paper_bytes=entry.paper_bytes,
        stored_bytes=entry.stored_bytes,
        cost=entry.cost,
        standard_error=entry.standard_error,
        n=entry.n,
        share=share,
        reference_cost=None if reference is None else reference.cost,
        reference_standard_error=0.0 if reference is None else reference.standard_error,
        reference_db=_noise_db(total, entry, reference) if is_noise and reference else None,
        larger=_step(table, entry, total, larger=True),
        smaller=_step(table, entry, total, larger=False),
    )


def _step(table: SensitivityTable, entry: Cost, total: float, *, larger: bool) -> Step | None:
    """The nearest useful format upwards (less cost) or downwards (fewer bytes), by cost per byte."""
    others = [c for c in table.by_decision[entry.decision] if math.isfinite(c.cost) and c.format != entry.format]
    if larger:
        useful = [c for c in others if c.cost < entry.cost and c.stored_bytes > entry.stored_bytes]
    else:
        useful = [c for c in others if c.stored_bytes < entry.stored_bytes and c.cost > entry.cost]
    if not useful:
        return None
    pick = max if larger else min
    other = pick(useful, key=lambda c: (c.cost - entry.cost) / (entry.stored_bytes - c.stored_bytes))
    is_noise = table.unit == NOISE_POWER
    return Step(
        format=other.format,
        cost_change=other.cost - entry.cost,
        stored_bytes_change=other.stored_bytes - entry.stored_bytes,
        noise_db=_noise_db(total, entry, other) if is_noise else None,
    )


def _noise_db(total: float, entry: Cost, other: Cost) -> float | None:
    """By how many decibels the whole recipe's noise changes if one decision takes another format."""
    changed = total - entry.cost + other.cost
    return 10 * math.log10(changed / total) if total > 0 and changed > 0 else None


def _groups(rows: Sequence[DecisionRow], key: Callable[[DecisionRow], str]) -> tuple[GroupRow, ...]:
    members: dict[str, list[DecisionRow]] = {}
    for row in rows:
        members.setdefault(key(row), []).append(row)
    return tuple(_group(name, found) for name, found in members.items())


def _group(name: str, rows: Sequence[DecisionRow]) -> GroupRow:
    params = sum(row.params for row in rows)
    shares = [row.share for row in rows if row.share is not None]
    referred = [row for row in rows if row.reference_cost is not None]
    return GroupRow(
        name=name,
        n_decisions=len(rows),
        params=params,
        paper_bits=8 * sum(row.paper_bytes for row in rows) / params,
        cost=math.fsum(row.cost for row in rows),
        cost_share=math.fsum(shares) if len(shares) == len(rows) else None,
        reference_cost=math.fsum(row.reference_cost or 0.0 for row in referred),
        reference_standard_error=math.sqrt(math.fsum(row.reference_standard_error**2 for row in referred)),
        n_reference=len(referred),
    )
