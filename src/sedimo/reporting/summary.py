"""All numbers of a report: what was decided, why, what it cost, how it was made, and how they follow from a table.

Nothing here draws, reads a clock or touches a file. Every field that evidence has to fill may be absent, and
the report then leaves its part out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sedimo.allocation.combine import Agreement
from sedimo.allocation.problem import Accounting, Allocation, Status
from sedimo.allocation.solve import decided_by
from sedimo.allocation.table import NOISE_POWER, Cost, SensitivityTable
from sedimo.methods.prediction import Entrant, Prediction
from sedimo.metrics.estimate import Estimate, normal_estimate
from sedimo.quant.formats import FULL_BITS, Format
from sedimo.reporting.explanation import Explanation
from sedimo.reporting.maps import NO_MAPS, Maps
from sedimo.reporting.page import Picture
from sedimo.reporting.placement import OUTSIDE, operation_label, place, stage
from sedimo.treatments.learned_rounding import LearnedRounding

RecipeKind = Literal["this", "uniform", "method"]


@dataclass(frozen=True, slots=True)
class Measure:
    """What a measured figure is called, its unit, and its direction."""

    title: str
    unit: str
    is_higher_better: bool


MEASURES: Mapping[str, Measure] = {
    "sqnr_db": Measure("SQNR", "dB", True),
    "psnr_db": Measure("PSNR", "dB", True),
    "fid": Measure("FID", "", False),
    "kid": Measure("KID", "", False),
}


@dataclass(frozen=True, slots=True)
class Step:
    """What the next larger or smaller format of a decision would change.

    `cost_change` is in the table's unit, `stored_bytes_change` in bytes; `noise_db` is the change of the whole
    recipe's predicted noise, when costs are noise powers.
    """

    format: Format
    cost_change: float
    stored_bytes_change: int
    noise_db: float | None


@dataclass(frozen=True, slots=True)
class DecisionRow:
    """One decision: what it is, what it got, what that costs.

    `cost` and `standard_error` are in the table's unit, of `n` samples; `share` is the part of the whole
    recipe's cost. `reference_cost` is the cost at the summary's reference format, None when the decision
    cannot take it; `reference_db` by how much the whole recipe's noise would change there.
    """

    name: str
    layers: tuple[str, ...]
    operation: str
    block: str
    shape: tuple[int, ...]
    params: int
    format: Format
    paper_bytes: int
    stored_bytes: int
    cost: float
    standard_error: float
    n: int
    share: float | None = None
    reference_cost: float | None = None
    reference_standard_error: float = 0.0
    reference_db: float | None = None
    larger: Step | None = None
    smaller: Step | None = None

    @property
    def paper_bits(self) -> float:
        """Bits per weight in the papers' accounting, overhead included."""
        return 8 * self.paper_bytes / self.params


@dataclass(frozen=True, slots=True)
class GroupRow:
    """Decisions taken together: an operation over all blocks, or a block over all operations.

    `cost_share` is the group's part of the recipe's cost, `reference_cost` the sum of the costs at the
    reference format, over the `n_reference` decisions that can take it.
    """

    name: str
    n_decisions: int
    params: int
    paper_bits: float
    cost: float
    cost_share: float | None
    reference_cost: float
    reference_standard_error: float
    n_reference: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large everything was and is [bytes, bits per weight].

    `fp16_bytes` is what the decided layers take at 16 bits; `file_bytes` and `source_file_bytes` are those of the
    whole denoiser file, when known. `bops` are bit operations of one sample and denoiser call, `full_bops` those at
    16 bits, of which `attention_bops` are the same in every recipe [BOPs]; 0 where nobody counted.
    """

    params: int
    n_layers: int
    n_decisions: int
    paper_bits: float
    stored_bits: float
    stored_bytes: int
    fp16_bytes: int
    file_bytes: int | None = None
    source_file_bytes: int | None = None
    bops: int = 0
    full_bops: int = 0
    attention_bops: int = 0

    @property
    def ratio(self) -> float:
        """How many times smaller the decided layers became."""
        return self.fp16_bytes / self.stored_bytes


@dataclass(frozen=True, slots=True)
class Choice:
    """How the recipe was chosen: method, rule, budget and certificate, in words and numbers.

    `budget_bits` per weight and `budget_bops` are None where there was no such limit.
    """

    method: str
    unit: str
    rule: str
    accounting: Accounting
    budget_bits: float | None
    cost: Estimate
    gap: float
    status: Status
    notes: tuple[str, ...] = ()
    budget_bops: int | None = None

    @property
    def decided_by(self) -> str:
        """The method whose costs decided; the rule, where none did."""
        return decided_by(self.method, self.rule)

    @property
    def is_noise(self) -> bool:
        """Whether costs are noise powers, so that decibels make sense."""
        return self.unit == NOISE_POWER


@dataclass(frozen=True, slots=True)
class RecipeRow:
    """A measured recipe in the comparison; `kind` is `this` for the one that the report is about."""

    name: str
    kind: RecipeKind
    paper_bits: float
    stored_bits: float | None = None
    measures: Mapping[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DifferenceRow:
    """This recipe minus another, on the same seeds."""

    other: str
    measure: str
    difference: Estimate

    @property
    def verdict(self) -> Literal["better", "worse", "no difference shown"]:
        """What the 95 % interval allows to say."""
        sign = 1 if MEASURES[self.measure].is_higher_better else -1
        low, high = sorted((sign * self.difference.low, sign * self.difference.high))
        return "better" if low > 0 else "worse" if high < 0 else "no difference shown"


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """The least cost that a budget allows, with its standard error."""

    bits: float
    cost: float
    standard_error: float = 0.0


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was measured about a recipe; all of it may be absent.

    `agreement` compares predicted with measured noise of `agreement_of` (in words, "30 random recipes"), `scaling`
    that of single formats which were not probed, `explanation` tells what a predictor learned from measured recipes,
    `maps` what was measured layer by layer and step by step, `prediction` compares what was predicted of this recipe
    with what was measured, `entrants` are the recipes that it was chosen among.
    """

    recipes: tuple[RecipeRow, ...] = ()
    differences: tuple[DifferenceRow, ...] = ()
    agreement: Agreement | None = None
    agreement_of: str = "random recipes"
    scaling: Agreement | None = None
    frontier: tuple[FrontierPoint, ...] = ()
    pictures: tuple[Picture, ...] = ()
    file_bytes: int | None = None
    source_file_bytes: int | None = None
    explanation: Explanation | None = None
    maps: Maps = NO_MAPS
    rounding: LearnedRounding | None = None
    prediction: Prediction | None = None
    entrants: tuple[Entrant, ...] = ()


@dataclass(frozen=True, slots=True)
class Provenance:
    """How it was made; every part in words, in the order in which it is shown."""

    command: str = ""
    created: str = ""
    seeds: str = ""
    sampling: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Summary:
    """All that a report tells.

    `reference_format` is the format at which decisions are compared with each other. `decisions` are in the
    order of the denoiser; `operations` and `blocks` (the outermost ones) in the order in which they first occur.
    """

    model: str
    denoiser: str
    sizes: Sizes
    choice: Choice
    reference_format: Format
    decisions: tuple[DecisionRow, ...]
    operations: tuple[GroupRow, ...]
    blocks: tuple[GroupRow, ...]
    evidence: Evidence = Evidence()
    provenance: Provenance = Provenance()

    @property
    def this(self) -> RecipeRow | None:
        """The measured row of this recipe."""
        return next((row for row in self.evidence.recipes if row.kind == "this"), None)

    def measured(self, measure: str) -> Estimate | None:
        """A measured figure of this recipe."""
        return None if self.this is None else self.this.measures.get(measure)


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
    has_one_kind = len({place(row.operation, row.block).kind for row in rows} - {OUTSIDE}) == 1
    return Summary(
        model=model,
        denoiser=table.denoiser,
        sizes=_sizes(table, allocation, rows, found),
        choice=_choice(table, allocation, total),
        reference_format=reference,
        decisions=rows,
        operations=_groups(rows, lambda row: operation_label(row.operation, row.block, has_one_kind=has_one_kind)),
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
    return min(usual, key=lambda f: (abs(f.bits - allocation.bits), f.numerics.words.rank, f.group_size or 0))


def frontier_points(curve: Sequence[Allocation]) -> tuple[FrontierPoint, ...]:
    """The points of a curve of allocations."""
    return tuple(FrontierPoint(a.bits, a.objective, a.standard_error) for a in curve)


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
