"""All numbers of a report, as records: what was decided, why, what it cost, how it was made.

Nothing here draws, reads a clock or touches a file. Every field that evidence has to fill may be absent, and
the report then leaves its part out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sedimo.allocation.fixed import decided_by
from sedimo.allocation.problem import Accounting, Status
from sedimo.metrics.estimate import Estimate
from sedimo.quant.formats import Format
from sedimo.reporting.explanation import Explanation
from sedimo.reporting.maps import NO_MAPS, Maps
from sedimo.reporting.prediction import Entrant, Prediction
from sedimo.sensitivity.agreement import Agreement
from sedimo.sensitivity.costs import NOISE_POWER

RecipeKind = Literal["this", "uniform", "random", "method", "peer"]


@dataclass(frozen=True, slots=True)
class Measure:
    """What a measured figure is called, its unit, and its direction."""

    title: str
    unit: str
    is_higher_better: bool


MEASURES: Mapping[str, Measure] = {
    "sqnr_db": Measure("SQNR", "dB", True),
    "psnr_db": Measure("PSNR", "dB", True),
    "clip_score": Measure("CLIP score", "", True),
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
    note: str = ""


@dataclass(frozen=True, slots=True)
class DifferenceRow:
    """This recipe minus another (or minus full precision), on the same seeds.

    `n_comparisons` tells of how many recipes the other was the best, 1 when it was named beforehand.
    """

    other: str
    measure: str
    difference: Estimate
    n_comparisons: int = 1

    @property
    def verdict(self) -> Literal["better", "worse", "open"]:
        """What the 95 % interval allows to say."""
        sign = 1 if MEASURES[self.measure].is_higher_better else -1
        low, high = sorted((sign * self.difference.low, sign * self.difference.high))
        return "better" if low > 0 else "worse" if high < 0 else "open"


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """The least cost that a budget allows, with its standard error; `name` marks a recipe beside the curve."""

    bits: float
    cost: float
    standard_error: float = 0.0
    name: str = ""


@dataclass(frozen=True, eq=False)
class Picture:
    """The same sample by both pipelines: uint8 arrays `[height, width, 3]`."""

    label: str
    reference: NDArray[np.uint8]
    quantized: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class LearnedRounding:
    """Block reconstruction: rounding learned from `n_samples` samples with `n_steps` steps a block.

    `n_learned` of `n_blocks` blocks use it, the others keep nearest rounding; `changed_share` of the weights changed.
    `error_ratio` is the geometric mean over blocks of the output's squared error over that of nearest rounding.
    """

    n_blocks: int
    n_learned: int
    n_samples: int
    n_steps: int
    changed_share: float
    error_ratio: float


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
    beside_frontier: tuple[FrontierPoint, ...] = ()
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
