"""The order which blocks stay at 16 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sedimo.errors import InputError


@dataclass(frozen=True, slots=True)
class KeepOrder:
    """By which one rule blocks stay at 16 bits; without a rule none do.

    `keep_db` keeps those whose protection gains so much [dB], `keep` so many that gain most, `bits` as many as the
    average paper bits allow.

    Raises:
        InputError: several rules, or numbers that say nothing.
    """

    keep_db: float | None = None
    keep: int | None = None
    bits: float | None = None

    def __post_init__(self) -> None:
        """Refuses several rules, and values that are no numbers."""
        if sum(rule is not None for rule in (self.keep_db, self.keep, self.bits)) > 1:
            raise InputError("give one rule for the blocks that stay at 16 bits: --keep-db, --keep or --bits")
        if self.keep_db is not None and not math.isfinite(self.keep_db):
            raise InputError(f"--keep-db takes a gain in dB, such as 1, got {self.keep_db}")
        if self.keep is not None and self.keep < 0:
            raise InputError(f"--keep takes a number of blocks, got {self.keep}")

    @property
    def is_given(self) -> bool:
        """Whether there is a rule."""
        return any(rule is not None for rule in (self.keep_db, self.keep, self.bits))

    def __str__(self) -> str:
        """By what blocks stay at 16 bits, in words; empty when none do."""
        if self.keep_db is not None:
            return f"a gain of at least {self.keep_db:g} dB"
        if self.keep is not None:
            return f"rank, the first {self.keep} by gain"
        return "" if self.bits is None else f"gain per byte within {self.bits:g} bits per weight"
