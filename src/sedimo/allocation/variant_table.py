"""A cost for each variant of a group: a format for every one of its decisions at once.

The cost of a variant need not be the sum of anything over its decisions; costs still add over groups. A
group has thousands of variants, so that they are rows of arrays, not records.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sedimo.bank import Candidate
from sedimo.errors import InputError, StateError
from sedimo.graph.model import Stream
from sedimo.quant.formats import Format, count_bops
from sedimo.space import Decision, SearchSpace

Columns = NDArray[np.int8] | NDArray[np.int16]
Sizes = NDArray[np.int64]

MAX_VARIANTS = 300_000
_MAX_FORMATS = 127  # per decision, as columns of eight bits


@dataclass(frozen=True, slots=True)
class Variant:
    """One variant of a group: the format of each decision, and what they cost and take together.

    Units are those of `Cost`.
    """

    choice: Mapping[str, Format]
    cost: float
    standard_error: float
    paper_bytes: int
    stored_bytes: int
    bops: int


@dataclass(frozen=True, slots=True, eq=False)
class GroupVariants:
    """The variants of one group; V of them over w decisions.

    Attributes:
        group: its name.
        decisions: names, [w].
        formats: what each decision may be, [w] tuples.
        choice: the column of `formats` that each variant takes for each decision, [V, w].
        cost: in the unit of the method, higher = worse, infinite for a forbidden variant, [V].
        standard_error: in the same unit, not a number where it is unknown, [V].
        paper_bytes: of all decisions together [bytes], [V].
        stored_bytes: of the tensors that replace their weights [bytes], [V].
        bops: of one sample and call [bit operations], [V].
    """

    group: str
    decisions: tuple[str, ...]
    formats: tuple[tuple[Format, ...], ...]
    choice: Columns
    cost: NDArray[np.float64]
    standard_error: NDArray[np.float64]
    paper_bytes: Sizes
    stored_bytes: Sizes
    bops: Sizes

    def __post_init__(self) -> None:
        """Checks that the arrays belong together and speak of existing formats.

        Raises:
            StateError: a wrong shape or kind of number, an unknown format, a cost that is none, or a duplicate.
        """
        self._check_names()
        self._check_arrays()
        self._check_choice()
        if np.isnan(self.cost).any() or (self.cost == -np.inf).any():
            raise self._refused("costs must be finite, or inf for a forbidden variant")
        if any((array < 0).any() for array in (self.standard_error, self.paper_bytes, self.stored_bytes, self.bops)):
            raise self._refused("errors and sizes must not be negative")

    @property
    def n_variants(self) -> int:
        """How many variants there are, V."""
        return len(self.cost)

    def variant(self, row: int) -> Variant:
        """One variant by its row."""
        columns = zip(self.decisions, self.formats, self.choice[row].tolist(), strict=True)
        return Variant(
            choice={name: formats[column] for name, formats, column in columns},
            cost=float(self.cost[row]),
            standard_error=float(self.standard_error[row]),
            paper_bytes=int(self.paper_bytes[row]),
            stored_bytes=int(self.stored_bytes[row]),
            bops=int(self.bops[row]),
        )

    def _check_names(self) -> None:
        n_decisions = len(self.decisions)
        if not n_decisions or len(set(self.decisions)) != n_decisions:
            raise self._refused(f"decisions must be one or more different names, got {self.decisions}")
        if len(self.formats) != n_decisions:
            raise self._refused(f"{n_decisions} decisions need as many rows of formats, got {len(self.formats)}")
        for name, formats in zip(self.decisions, self.formats, strict=True):
            if not formats or len(set(formats)) != len(formats):
                raise self._refused(f"{name} must have one or more different formats, got {[*map(str, formats)]}")

    def _check_arrays(self) -> None:
        n_variants = self.cost.size
        if not n_variants:
            raise self._refused("there must be at least one variant")
        wanted: dict[str, tuple[type, tuple[int, ...]]] = {
            "choice": (np.integer, (n_variants, len(self.decisions))),
            **dict.fromkeys(("cost", "standard_error"), (np.floating, (n_variants,))),
            **dict.fromkeys(("paper_bytes", "stored_bytes", "bops"), (np.integer, (n_variants,))),
        }
        for name, (kind, shape) in wanted.items():
            array = getattr(self, name)
            if array.shape != shape or not np.issubdtype(array.dtype, kind):
                raise self._refused(
                    f"{name} must be {kind.__name__} of shape {shape}, got {array.dtype} of shape {array.shape}"
                )

    def _check_choice(self) -> None:
        counts = np.array([len(formats) for formats in self.formats])
        wrong = np.argwhere((self.choice < 0) | (self.choice >= counts))
        if len(wrong):
            row, column = wrong[0]
            raise self._refused(
                f"variant {row} takes format {self.choice[row, column]} of {self.decisions[column]}, "
                f"which has {counts[column]}"
            )
        n_different = len(np.unique(self.choice, axis=0))
        if n_different != self.n_variants:
            raise self._refused(f"{self.n_variants - n_different} of {self.n_variants} variants occur twice")

    def _refused(self, reason: str) -> StateError:
        return StateError(f"variants of group {self.group!r}: {reason}")


@dataclass(frozen=True, slots=True, eq=False)
class VariantTable:
    """The variants of all groups, by one method: what a `SensitivityTable` is for single decisions.

    Every decision is in exactly one group; one that is varied alone is a group of its own. `layers` tells which
    layers each decision covers, `params` how many weights it has, `attention_bops` the bit operations that no
    decision changes, `streams` those of the decisions about one stream of a layer.
    """

    method: str
    denoiser: str
    groups: tuple[GroupVariants, ...]
    layers: Mapping[str, tuple[str, ...]]
    params: Mapping[str, int]
    attention_bops: int = 0
    streams: Mapping[str, Stream] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks that the groups have different names and share out the decisions.

        Raises:
            InputError: two groups of one name, or a decision that is in no group, in several, or unknown.
        """
        held = [name for group in self.groups for name in group.decisions]
        wrong = {
            "groups must have different names, found twice": _repeated([group.group for group in self.groups]),
            "a decision must be in one group, found in several": _repeated(held),
            f"groups name decisions that {self.denoiser} does not have": sorted(set(held) - self.layers.keys()),
            "every decision must be in a group (of its own, if it is varied alone), missing": sorted(
                self.layers.keys() - set(held)
            ),
        }
        for rule, names in wrong.items():
            if names:
                raise InputError(f"{rule}: {_listed(names)}.")

    @property
    def total_params(self) -> int:
        """Number of weights that the decisions cover, shared ones once."""
        return sum(self.params.values())


def build_variant_table(method: str, space: SearchSpace, groups: Sequence[GroupVariants]) -> VariantTable:
    """The table of one method for all decisions of a space.

    Raises:
        InputError: the groups do not share out the decisions.
    """
    params = {d.name: d.params for d in space.decisions}
    about = (space.layers, params, space.attention_bops, space.streams)
    return VariantTable(method, space.denoiser, tuple(groups), *about)


def enumerate_variants(decisions: Sequence[Decision], *, max_variants: int = MAX_VARIANTS) -> NDArray[np.int8]:
    """All combinations of the decisions' formats as columns of `Decision.formats`, the last one fastest, [V, w].

    Example:
        Decisions with two and three formats have the six variants 00 01 02 10 11 12.

    Raises:
        InputError: more than `max_variants` combinations, or more formats than eight bits can number.
    """
    counts = [len(decision.formats) for decision in decisions]
    n_variants = math.prod(counts)
    if n_variants > max_variants or max(counts, default=0) > _MAX_FORMATS:
        raise InputError(
            f"a group may have {max_variants} variants of at most {_MAX_FORMATS} formats per decision, got "
            f"{n_variants:.6g} of up to {max(counts)} for {_listed([d.name for d in decisions])}. "
            "Split the group, or allow fewer formats."
        )
    period = np.array([math.prod(counts[i + 1 :]) for i in range(len(counts))], dtype=np.int64)
    return (np.arange(n_variants)[:, None] // period % np.array(counts, dtype=np.int64)).astype(np.int8)


def variant_sizes(
    decisions: Sequence[Decision],
    choice: Columns,
    *,
    candidates: Mapping[tuple[str, Format], Candidate] | None = None,
) -> tuple[Sizes, Sizes, Sizes]:
    """Paper bytes, stored bytes [bytes] and bit operations of variants `[V, w]`, summed over the decisions, [V] each.

    `candidates` are those of a bank (`Bank.index`). Without them stored bytes follow from shapes alone, which a
    codebook outside float16 and a full-precision weight of 32 bits exceed.
    """
    total = np.zeros((3, len(choice)), dtype=np.int64)
    for i, decision in enumerate(decisions):
        sizes = [_sizes(decision, f, candidates) for f in decision.formats]
        total += np.array(sizes, dtype=np.int64).T[:, choice[:, i]]
    paper, stored, bops = total
    return paper, stored, bops


def _sizes(
    decision: Decision, number_format: Format, candidates: Mapping[tuple[str, Format], Candidate] | None
) -> tuple[int, int, int]:
    bops = count_bops(decision.macs, number_format)
    if candidates is None:
        return decision.paper_bytes(number_format), decision.stored_bytes(number_format), bops
    known = candidates[decision.name, number_format]
    return known.paper_bytes, known.stored_bytes, bops


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted(name for name, n in Counter(names).items() if n > 1)
