"""What a decision may be, or a group of decisions that are decided as one: options as arrays.

The cost of a variant of a group need not be the sum of anything over its decisions; costs still add over groups. A
group has thousands of variants, so that they are rows of arrays, not records. A single decision is a group of one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sedimo.errors import InputError, StateError
from sedimo.quant.formats import Format

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Columns = NDArray[np.int8] | NDArray[np.int16] | IntArray

MAX_VARIANTS = 300_000
_MAX_FORMATS = 127  # per decision, as columns of eight bits
SIZES = ("paper_bytes", "stored_bytes", "bops")
_NUMBERS = ("cost", "standard_error", *SIZES)


@dataclass(frozen=True, slots=True, eq=False)
class Variants:
    """V variants of the w decisions of a group; costs and sizes as in a `Cost`, of all decisions together."""

    name: str
    formats: Mapping[str, tuple[Format, ...]]  # what each decision may be, [w]
    choice: Columns  # the column of `formats` that each variant takes for each decision, [V, w]
    cost: FloatArray  # infinite for a forbidden variant, [V]
    standard_error: FloatArray  # not a number where it is unknown, [V]
    paper_bytes: IntArray  # [V]
    stored_bytes: IntArray  # [V]
    bops: IntArray  # [V]

    def __len__(self) -> int:
        return len(self.cost)

    def variant(self, row: int) -> dict[str, Format]:
        """The format of each decision in one variant."""
        columns = zip(self.formats.items(), self.choice[row].tolist(), strict=True)
        return {name: formats[column] for (name, formats), column in columns}

    def at(self, rows: Sequence[int] | IntArray) -> Variants:
        """Some of the variants."""
        return replace(self, **{name: getattr(self, name)[rows] for name in ("choice", *_NUMBERS)})

    @property
    def ranks(self) -> list[IntArray]:
        """The place of each variant's formats in the order of their texts, by decision, [w] of [V]."""
        orders = [np.unique([str(f) for f in formats], return_inverse=True)[1] for formats in self.formats.values()]
        return [order[column] for order, column in zip(orders, self.choice.T, strict=True)]

    def check(self) -> None:
        """Refuses a wrong shape or kind of number, an unknown format, a cost that is none, and duplicates."""
        if reason := self._wrong_formats() or self._wrong_arrays() or self._wrong_choice():
            raise StateError(f"variants of group {self.name!r}: {reason}")

    def _wrong_formats(self) -> str:
        for name, formats in self.formats.items():
            if not formats or len(set(formats)) != len(formats):
                return f"{name} must have one or more different formats, got {[*map(str, formats)]}"
        return "" if self.cost.size and self.formats else "there must be at least one decision, and one variant of it"

    def _wrong_arrays(self) -> str:
        for name in ("choice", *_NUMBERS):
            array, kind = getattr(self, name), np.integer if name in ("choice", *SIZES) else np.floating
            shape = (self.cost.size, len(self.formats)) if name == "choice" else (self.cost.size,)
            if array.shape != shape or not np.issubdtype(array.dtype, kind):
                return f"{name} must be {kind.__name__} of shape {shape}, got {array.dtype} of shape {array.shape}"
        if np.isnan(self.cost).any() or (self.cost == -np.inf).any():
            return "costs must be finite, or inf for a forbidden variant"
        if any((getattr(self, name) < 0).any() for name in ("standard_error", *SIZES)):
            return "errors and sizes must not be negative"
        return ""

    def _wrong_choice(self) -> str:
        counts = np.array([len(formats) for formats in self.formats.values()])
        for row, column in np.argwhere((self.choice < 0) | (self.choice >= counts)):
            wrong = f"takes format {self.choice[row, column]} of {list(self.formats)[column]}"
            return f"variant {row} {wrong}, which has {counts[column]}"
        n_twice = len(self) - len(np.unique(self.choice, axis=0))
        return f"{n_twice} of {len(self)} variants occur twice" if n_twice else ""


def check_groups(groups: Sequence[Variants], decisions: Collection[str], denoiser: str) -> None:
    """Refuses groups that do not share out the decisions; one that is varied alone is a group of its own."""
    for group in groups:
        group.check()
    names = Counter(group.name for group in groups)
    held = Counter(name for group in groups for name in group.formats)
    wrong = {
        "groups must have different names, found twice": [name for name, n in names.items() if n > 1],
        "a decision must be in one group, found in several": [name for name, n in held.items() if n > 1],
        f"groups name decisions that {denoiser} does not have": held.keys() - set(decisions),
        "every decision must be in a group (of its own, if it is varied alone), missing": set(decisions) - held.keys(),
    }
    for rule, found in wrong.items():
        if found:
            raise InputError(f"{rule}: {_listed(sorted(found))}.")


def enumerate_variants(
    formats: Mapping[str, Sequence[Format]], *, max_variants: int = MAX_VARIANTS
) -> NDArray[np.int8]:
    """All combinations of the formats of some decisions as columns of them, [V, w]: 00 01 02 10 11 12."""
    counts = [len(own) for own in formats.values()]
    n_variants = math.prod(counts)
    if n_variants > max_variants or max(counts, default=0) > _MAX_FORMATS:
        raise InputError(
            f"a group may have {max_variants} variants of at most {_MAX_FORMATS} formats per decision, got "
            f"{n_variants:.6g} of up to {max(counts)} for {_listed(list(formats))}. "
            "Split the group, or allow fewer formats."
        )
    period = np.array([math.prod(counts[i + 1 :]) for i in range(len(counts))], dtype=np.int64)
    return (np.arange(n_variants)[:, None] // period % np.array(counts, dtype=np.int64)).astype(np.int8)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
