"""A cost and its uncertainty for each choice: all that allocation needs to know.

Costs are higher = worse, in units that add over decisions. `unit` names them (`relative noise power` for
error, jacobian, ablation and sqnr).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from sedimo.errors import StateError
from sedimo.graph.model import Stream
from sedimo.quant.families.family import Family
from sedimo.quant.formats import Format


@dataclass(frozen=True, slots=True)
class Cost:
    """What one format costs one decision.

    `cost` and `standard_error` are in the table's unit; `n` is the number of samples behind them (0: exact,
    then `standard_error` is 0). `paper_bytes`, `stored_bytes` [bytes] and `bops` [bit operations of one
    sample and call] are those of the decision's layers together.
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
    """One cost per (decision, format), by one method.

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
        """Checks that costs are unique and speak of known decisions.

        Raises:
            StateError: a duplicate, an unknown decision, or a cost that is not a number.
        """
        keys = [(c.decision, c.format) for c in self.costs]
        if len(set(keys)) != len(keys):
            raise StateError(f"sensitivity table {self.method!r}: a (decision, format) occurs twice")
        unknown = sorted({c.decision for c in self.costs} ^ set(self.layers))
        if unknown:
            raise StateError(f"sensitivity table {self.method!r}: costs and layers disagree about {unknown[:5]}")
        bad = [k for k, c in zip(keys, self.costs, strict=True) if c.cost != c.cost]
        if bad:
            decision, number_format = bad[0]
            raise StateError(f"sensitivity table {self.method!r}: {decision} at {number_format} has no number as cost")

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


def of_family(table: SensitivityTable, family: Family) -> SensitivityTable:
    """The table with one family of formats per output channel; a decision that has none of them keeps all it has.

    For programmes that were published for one family, as those of OMPQ and MPQ-Diff.
    """
    kept = {c for c in table.costs if c.format.family == family.name and c.format.group_size is None}
    able = {c.decision for c in kept}
    return replace(table, costs=tuple(c for c in table.costs if c in kept or c.decision not in able))
