"""A cost and its uncertainty for each choice: all that allocation needs to know.

Costs are higher = worse, in units that add over decisions. `unit` names them (`relative noise power` for
error, jacobian, ablation and sqnr).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from sedimo.allocation.variants import SIZES, Columns, FloatArray, Variants
from sedimo.bank import Candidate
from sedimo.errors import InputError, StateError
from sedimo.graph.model import Stream
from sedimo.quant.families.family import CostEstimate, Family
from sedimo.quant.formats import FP16, Format, count_bops
from sedimo.space import SearchSpace

NOISE_POWER = "relative noise power"


@dataclass(frozen=True, slots=True)
class Cost:
    """What one format costs one decision, in the table's unit, and takes.

    `n` samples are behind the cost (0: exact, then `standard_error` is 0). `paper_bytes`, `stored_bytes` [bytes] and
    `bops` [bit operations of one sample and call] are those of the decision's layers together.
    """

    decision: str
    format: Format
    cost: float
    standard_error: float
    n: int
    paper_bytes: int
    stored_bytes: int
    bops: int


@dataclass(frozen=True)
class SensitivityTable:
    """One cost per (decision, format), by one method; each once, of a known decision, and a number.

    `layers` tells which layers each decision covers, `operations` and `blocks` what they are (for pictures),
    `params` how many weights each decision has. `settings` says how the numbers came about. `attention_bops` are the
    bit operations that no decision changes, `full_bops` those of the whole model at 16 bits, `attention_bops` included.
    `streams` are those of the decisions about one stream of a layer.
    """

    method: str
    unit: str
    denoiser: str
    costs: tuple[Cost, ...]
    layers: Mapping[str, tuple[str, ...]]
    operations: Mapping[str, str]
    blocks: Mapping[str, str]
    params: Mapping[str, int]
    settings: Mapping[str, str]
    attention_bops: int = 0
    full_bops: int = 0
    streams: Mapping[str, Stream] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks that costs are unique and speak of known decisions."""
        place = f"sensitivity table {self.method!r}"
        if len(self.index) != len(self.costs):
            raise StateError(f"{place}: a (decision, format) occurs twice")
        if unknown := sorted({c.decision for c in self.costs} ^ set(self.layers)):
            raise StateError(f"{place}: costs and layers disagree about {unknown[:5]}")
        if bad := next((c for c in self.costs if math.isnan(c.cost)), None):
            raise StateError(f"{place}: {bad.decision} at {bad.format} has no number as cost")

    @cached_property
    def index(self) -> Mapping[tuple[str, Format], Cost]:
        """Costs by (decision, format)."""
        return {(c.decision, c.format): c for c in self.costs}

    @cached_property
    def by_decision(self) -> Mapping[str, tuple[Cost, ...]]:
        """The costs of each decision."""
        found: dict[str, list[Cost]] = {}
        for cost in self.costs:
            found.setdefault(cost.decision, []).append(cost)
        return {name: tuple(costs) for name, costs in found.items()}

    @property
    def total_params(self) -> int:
        """Number of weights that the decisions cover, shared ones once."""
        return sum(self.params.values())

    @cached_property
    def rows(self) -> tuple[Variants, ...]:
        """What each decision may be, as arrays."""
        if bad := next((c for c in self.costs if c.cost == -math.inf), None):
            raise InputError(
                f"costs must be finite, or inf for a forbidden format; decision {bad.decision!r} has -inf."
            )
        rows = []
        for name, entries in self.by_decision.items():
            cost, error = np.array([(c.cost, c.standard_error) for c in entries], np.float64).T
            formats = {name: tuple(c.format for c in entries)}
            rows.append(self.group(name, formats, np.arange(len(entries))[:, None], cost, error))
        return tuple(rows)

    def group(
        self,
        name: str,
        formats: Mapping[str, tuple[Format, ...]],
        choice: Columns,
        cost: FloatArray,
        standard_error: FloatArray,
    ) -> Variants:
        """The variants `[V]` of a group of decisions, which take what the table says of each decision."""
        taken = np.zeros((len(SIZES), len(choice)), dtype=np.int64)
        for (decision, own), column in zip(formats.items(), choice.T, strict=True):
            entries = (self.index[decision, f] for f in own)
            taken += np.array([[getattr(entry, size) for size in SIZES] for entry in entries], np.int64).T[:, column]
        return Variants(name, formats, choice, cost, standard_error, *taken)


def of_family(table: SensitivityTable, family: Family) -> SensitivityTable:
    """The table with one family of formats per output channel; a decision that has none of them keeps all it has.

    For programmes that were published for one family, as those of OMPQ and MPQ-Diff.
    """
    kept = {c for c in table.costs if c.format.family == family.name and c.format.group_size is None}
    able = {c.decision for c in kept}
    return replace(table, costs=tuple(c for c in table.costs if c in kept or c.decision not in able))


EXACTLY_NOTHING = CostEstimate(0.0)


def build_table(
    method: str,
    space: SearchSpace,
    candidates: Iterable[Candidate],
    estimate: Callable[[Candidate], CostEstimate],
    settings: Mapping[str, str],
    *,
    unit: str = NOISE_POWER,
    sees_activations: bool = False,
) -> SensitivityTable:
    """The table of one method; fp16 costs nothing.

    What sees weights alone is not asked about their activations, and refuses several widths of them for one weight.
    """
    candidates, seen = tuple(candidates), dict[tuple[str, Format], Format]()
    for c in () if sees_activations else candidates:
        other = seen.setdefault((c.decision, c.format.weight_format), c.format)
        if other != c.format:
            raise InputError(
                f"method {method!r} sees weights alone and cannot choose between {other} and {c.format} for "
                f"{c.decision!r}: use orthogonality (with importance of bits), or one width of activations"
            )

    def cost(c: Candidate) -> Cost:
        is_changed = c.format != FP16 if sees_activations else c.format.is_quantized
        e = estimate(c) if is_changed else EXACTLY_NOTHING
        bops = count_bops(space.decision_index[c.decision].macs, c.format)
        return Cost(c.decision, c.format, e.value, e.standard_error, e.n, c.paper_bytes, c.stored_bytes, bops)

    return SensitivityTable(
        method=method,
        unit=unit,
        denoiser=space.denoiser,
        costs=tuple(cost(c) for c in candidates),
        layers=space.layers,
        operations={d.name: d.operation for d in space.decisions},
        blocks={d.name: d.block for d in space.decisions},
        params={d.name: d.params for d in space.decisions},
        settings=dict(settings),
        attention_bops=space.attention_bops,
        full_bops=space.full_bops,
        streams=space.streams,
    )


def mean_cost(values: npt.ArrayLike) -> CostEstimate:
    """Arithmetic mean of samples, with its standard error (not a number for one sample)."""
    found = np.asarray(values, dtype=np.float64)
    error = float(found.std(ddof=1)) / math.sqrt(found.size) if found.size > 1 else math.nan
    return CostEstimate(float(found.mean()), error, int(found.size))
