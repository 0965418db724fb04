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
    """The variants of one group; V of them over w decisions, each a `Variant` by its row.

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

    Raises:
        StateError: a wrong shape or kind of number, an unknown format, a cost that is none, or a duplicate.
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
        """Checks that the arrays belong together and speak of existing formats."""
        for check in (self._check_names, self._check_arrays, self._check_choice):
            if reason := check():
                raise StateError(f"variants of group {self.group!r}: {reason}")

    def __len__(self) -> int:
        return len(self.cost)

    def __getitem__(self, row: int) -> Variant:
        columns = zip(self.decisions, self.formats, self.choice[row].tolist(), strict=True)
        return Variant(
            {name: formats[column] for name, formats, column in columns},
            float(self.cost[row]),
            float(self.standard_error[row]),
            int(self.paper_bytes[row]),
            int(self.stored_bytes[row]),
            int(self.bops[row]),
        )

    def _check_names(self) -> str:
        n = len(self.decisions)
        if not n or len(set(self.decisions)) != n:
            return f"decisions must be one or more different names, got {self.decisions}"
        if len(self.formats) != n:
            return f"{n} decisions need as many rows of formats, got {len(self.formats)}"
        for name, formats in zip(self.decisions, self.formats, strict=True):
            if not formats or len(set(formats)) != len(formats):
                return f"{name} must have one or more different formats, got {[*map(str, formats)]}"
        return "" if self.cost.size else "there must be at least one variant"

    def _check_arrays(self) -> str:
        floats, integers = ("cost", "standard_error"), ("paper_bytes", "stored_bytes", "bops")
        for name in ("choice", *floats, *integers):
            array, kind = getattr(self, name), np.floating if name in floats else np.integer
            shape = (self.cost.size, len(self.decisions)) if name == "choice" else (self.cost.size,)
            if array.shape != shape or not np.issubdtype(array.dtype, kind):
                return f"{name} must be {kind.__name__} of shape {shape}, got {array.dtype} of shape {array.shape}"
        if np.isnan(self.cost).any() or (self.cost == -np.inf).any():
            return "costs must be finite, or inf for a forbidden variant"
        if any((getattr(self, name) < 0).any() for name in ("standard_error", *integers)):
            return "errors and sizes must not be negative"
        return ""

    def _check_choice(self) -> str:
        counts = np.array([len(formats) for formats in self.formats])
        for row, column in np.argwhere((self.choice < 0) | (self.choice >= counts)):
            wrong = f"takes format {self.choice[row, column]} of {self.decisions[column]}"
            return f"variant {row} {wrong}, which has {counts[column]}"
        n_twice = len(self) - len(np.unique(self.choice, axis=0))
        return f"{n_twice} of {len(self)} variants occur twice" if n_twice else ""


@dataclass(frozen=True, slots=True, eq=False)
class VariantTable:
    """The variants of all groups, by one method: what a `SensitivityTable` is for single decisions.

    Every decision is in exactly one group; one that is varied alone is a group of its own. `layers` tells which
    layers each decision covers, `total_params` how many weights all have, `attention_bops` the bit operations that no
    decision changes, `streams` those of the decisions about one stream of a layer.

    Raises:
        InputError: two groups of one name, or a decision that is in no group, in several, or unknown.
    """

    method: str
    denoiser: str
    groups: tuple[GroupVariants, ...]
    layers: Mapping[str, tuple[str, ...]]
    total_params: int
    attention_bops: int = 0
    streams: Mapping[str, Stream] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks that the groups have different names and share out the decisions."""
        names = Counter(group.group for group in self.groups)
        held = Counter(name for group in self.groups for name in group.decisions)
        wrong = {
            "groups must have different names, found twice": [name for name, n in names.items() if n > 1],
            "a decision must be in one group, found in several": [name for name, n in held.items() if n > 1],
            f"groups name decisions that {self.denoiser} does not have": held.keys() - self.layers.keys(),
            "every decision must be in a group (of its own, if it is varied alone), missing": (
                self.layers.keys() - held.keys()
            ),
        }
        for rule, found in wrong.items():
            if found:
                raise InputError(f"{rule}: {_listed(sorted(found))}.")


def build_variant_table(method: str, space: SearchSpace, groups: Sequence[GroupVariants]) -> VariantTable:
    """The table of one method for all decisions of a space, which the groups must share out."""
    about = (space.layers, space.params, space.attention_bops, space.streams)
    return VariantTable(method, space.denoiser, tuple(groups), *about)


def enumerate_variants(decisions: Sequence[Decision], *, max_variants: int = MAX_VARIANTS) -> NDArray[np.int8]:
    """All combinations of the decisions' formats as columns of `Decision.formats`, the last one fastest, [V, w].

    Example:
        Decisions with two and three formats have the six variants 00 01 02 10 11 12.
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
    for decision, columns in zip(decisions, choice.T, strict=True):
        sizes = []
        for f in decision.formats:
            paper, stored = decision.paper_bytes(f), decision.stored_bytes(f)
            if candidates is not None:
                known = candidates[decision.name, f]
                paper, stored = known.paper_bytes, known.stored_bytes
            sizes.append((paper, stored, count_bops(decision.macs, f)))
        total += np.array(sizes, dtype=np.int64).T[:, columns]
    return total[0], total[1], total[2]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
