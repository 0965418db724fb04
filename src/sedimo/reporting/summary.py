"""All that a report tells: a recipe with the table that it was chosen from, what was measured besides, and how.

Nothing here draws, reads a clock or touches a file. What follows from the table is computed when it is asked for. Every
field that evidence has to fill may be absent, and the report then leaves its part out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from sedimo.allocation.combine import Agreement
from sedimo.allocation.solve import Allocation
from sedimo.allocation.table import NOISE_POWER, Cost, SensitivityTable
from sedimo.codec import to_plain
from sedimo.methods.error import decided_by
from sedimo.methods.portfolio import Entrant
from sedimo.metrics.estimate import Estimate, normal_estimate
from sedimo.metrics.signal import PairedDifference
from sedimo.quant.formats import FULL_BITS, Format
from sedimo.reporting.explanation import Explanation
from sedimo.reporting.measured_maps import Maps
from sedimo.reporting.page import Picture
from sedimo.reporting.placement import OUTSIDE, kind_of, operation_label, stage
from sedimo.treatments.learned_rounding import LearnedRounding

DISAGREEMENT_DB = 2.0  # beyond which a prediction is not to be trusted


@dataclass(frozen=True, slots=True)
class MeasuredRecipe:
    """A recipe and how its samples compare with full precision, by the name of the measure.

    `ahead` is what the result is ahead of it, on the same seeds; None for the result itself.
    """

    name: str
    paper_bits: float
    stored_bits: float
    measures: Mapping[str, Estimate]
    ahead: PairedDifference | None = None


@dataclass(frozen=True, slots=True)
class Blamed:
    """A decision whose part in the noise is not as predicted.

    `predicted_db` and `measured_db` are what the recipe would gain if this decision alone went back to 16 bits [dB].
    """

    decision: str
    format: str
    predicted_db: float
    measured_db: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """Mean SQNR of the whole recipe [dB]: predicted before it was measured, and measured on fresh seeds, if it was.

    `blamed` are the decisions that explain most of a disagreement; empty where there is none.
    """

    predicted_db: Estimate
    measured_db: Estimate | None
    blamed: tuple[Blamed, ...] = ()

    @property
    def difference_db(self) -> float:
        """Measured minus predicted [dB]: negative where there is more noise than predicted."""
        measured = self.measured_db
        difference = math.nan if measured is None else measured.value - self.predicted_db.value
        return difference if math.isfinite(difference) else math.nan

    @property
    def is_trusted(self) -> bool:
        """Whether both agree; where they cannot be compared there is nothing to warn of."""
        return not abs(self.difference_db) > DISAGREEMENT_DB

    def as_json(self) -> Mapping[str, object]:
        """Plain values by name; scripts may rely on the names."""
        plain: dict[str, object] = to_plain(self)
        return plain | {"difference_db": to_plain(self.difference_db)}


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was measured about a recipe; all of it may be absent.

    `recipes` are the result and its rivals. `agreement` compares predicted with measured noise of `agreement_of` (in
    words, "30 random recipes"), `scaling` that of single formats which were not probed. `frontier` are the bits of the
    best recipes with their costs. `explanation` tells what a predictor learned from measured recipes, `maps` what was
    measured layer by layer and step by step; `prediction` compares what was predicted of this recipe with what was
    measured, `entrants` are the recipes that it was chosen among.
    """

    recipes: tuple[MeasuredRecipe, ...] = ()
    agreement: Agreement | None = None
    agreement_of: str = "random recipes"
    scaling: Agreement | None = None
    frontier: tuple[tuple[float, float], ...] = ()
    pictures: tuple[Picture, ...] = ()
    file_bytes: int | None = None
    source_file_bytes: int | None = None
    explanation: Explanation | None = None
    maps: Maps = Maps()
    rounding: LearnedRounding | None = None
    prediction: Prediction | None = None
    entrants: tuple[Entrant, ...] = ()

    @property
    def differences(self) -> tuple[tuple[str, Estimate], ...]:
        """The rivals, and what the result is ahead of each [dB]."""
        return tuple((one.name, one.ahead.estimate) for one in self.recipes if one.ahead is not None)

    def as_json(self) -> dict[str, object]:
        """What the report explains and draws, as plain values by name; what it lacks is left out."""
        found = {"explanation": self.explanation, "maps": None if self.maps == Maps() else self.maps}
        return {name: to_plain(one) for name, one in found.items() if one is not None}


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


@dataclass(frozen=True)
class Summary:
    """All that a report tells of an allocation; `shapes` are those of the decisions' weights, when known.

    The order of the table's costs is taken as that of the denoiser.
    """

    model: str
    table: SensitivityTable
    allocation: Allocation
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    evidence: Evidence = Evidence()
    provenance: Provenance = Provenance()

    @cached_property
    def chosen(self) -> tuple[Cost, ...]:
        """What each decision got, in the order of the denoiser."""
        return tuple(self.table.index[name, self.allocation.choice[name]] for name in self.table.by_decision)

    @cached_property
    def cost(self) -> Estimate:
        """Of the recipe: the sum of what it is made of. An objective may have cross terms."""
        return added(self.chosen)

    @property
    def is_noise(self) -> bool:
        """Whether costs are noise powers, so that decibels make sense."""
        return self.table.unit == NOISE_POWER

    @property
    def cost_name(self) -> str:
        """What costs are called."""
        return "noise" if self.is_noise else "cost"

    @property
    def decided_by(self) -> str:
        """The method whose costs decided; the rule, where none did."""
        return decided_by(self.table.method, self.allocation.rule)

    @cached_property
    def n_layers(self) -> int:
        """Layers that the decisions cover."""
        return len({layer for layers in self.table.layers.values() for layer in layers})

    @property
    def full_bytes(self) -> int:
        """What the decided layers take at 16 bits."""
        return self.table.total_params * FULL_BITS // 8

    @cached_property
    def stored_bytes(self) -> int:
        """What they take now."""
        return sum(c.stored_bytes for c in self.chosen)

    @cached_property
    def reference(self) -> Format:
        """The format at which decisions are compared with each other."""
        return reference_format(self.table, self.allocation)

    @cached_property
    def operations(self) -> Mapping[str, tuple[Cost, ...]]:
        """What was chosen by operation, over all blocks."""
        operations, blocks = self.table.operations, self.table.blocks
        kinds = {kind_of(blocks[c.decision]) for c in self.chosen}
        has_one_kind = len(kinds - {OUTSIDE}) == 1
        return self._grouped(lambda name: operation_label(operations[name], blocks[name], has_one_kind=has_one_kind))

    @cached_property
    def blocks(self) -> Mapping[str, tuple[Cost, ...]]:
        """What was chosen by outermost block, over all operations."""
        blocks = self.table.blocks
        return self._grouped(lambda name: stage(blocks[name]) if blocks[name] else OUTSIDE)

    @property
    def sqnr_db(self) -> Estimate | None:
        """That of the result, if it was measured."""
        return next((one.measures.get("sqnr_db") for one in self.evidence.recipes if one.ahead is None), None)

    def params(self, costs: Sequence[Cost]) -> int:
        """How many weights some decisions have."""
        return sum(self.table.params[c.decision] for c in costs)

    def params_share(self, costs: Sequence[Cost]) -> float:
        """Their part of all weights."""
        return self.params(costs) / self.table.total_params

    def paper_bits(self, costs: Sequence[Cost]) -> float:
        """Their average bits per weight in the papers' accounting."""
        return 8 * sum(c.paper_bytes for c in costs) / self.params(costs)

    def share(self, costs: Sequence[Cost]) -> float | None:
        """Their part of the recipe's cost; None where costs have no parts."""
        return math.fsum(c.cost / self.cost.value for c in costs) if self._has_shares else None

    def at_reference(self, cost: Cost) -> Cost | None:
        """What a decision would cost at the reference format; None if it cannot take that."""
        return self.table.index.get((cost.decision, self.reference))

    def noise_db(self, before: Cost, after: Cost) -> float | None:
        """By how much the recipe's noise changes if a decision takes another format [dB]; None of other costs."""
        total = self.cost.value
        changed = total - before.cost + after.cost
        return 10 * math.log10(changed / total) if self.is_noise and total > 0 and changed > 0 else None

    def step(self, cost: Cost, *, larger: bool) -> Cost | None:
        """The nearest useful format upwards (less cost) or downwards (fewer bytes), by cost per byte."""
        sign = 1 if larger else -1
        useful = [
            c
            for c in self.table.by_decision[cost.decision]
            if math.isfinite(c.cost)
            and sign * (c.stored_bytes - cost.stored_bytes) > 0
            and sign * (cost.cost - c.cost) > 0
        ]
        pick = max if larger else min
        return pick(useful, key=lambda c: (c.cost - cost.cost) / (cost.stored_bytes - c.stored_bytes), default=None)

    @cached_property
    def _has_shares(self) -> bool:
        return self.cost.value > 0 and min(c.cost for c in self.table.costs) >= 0

    def _grouped(self, key: Callable[[str], str]) -> Mapping[str, tuple[Cost, ...]]:
        members: dict[str, list[Cost]] = {}
        for cost in self.chosen:
            members.setdefault(key(cost.decision), []).append(cost)
        return {name: tuple(costs) for name, costs in members.items()}


def added(costs: Sequence[Cost]) -> Estimate:
    """The sum of costs, taken as independent."""
    return normal_estimate(math.fsum(c.cost for c in costs), math.sqrt(math.fsum(c.standard_error**2 for c in costs)))


def reference_format(table: SensitivityTable, allocation: Allocation) -> Format:
    """The format at which decisions are compared: nearly all can take it, and its bits are near the budget's."""
    available = Counter(c.format for c in table.costs if c.format.is_quantized and math.isfinite(c.cost))
    if not available:
        return allocation.choice[table.costs[0].decision]
    most = max(available.values())
    usual = [f for f, n in available.items() if n >= 0.9 * most]
    return min(usual, key=lambda f: (abs(f.bits - allocation.bits), f.numerics.words.rank, f.group_size or 0))
