"""A budget as a person writes it: a size, bit operations, or both."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal

from sedimo.allocation.solve import Allocation, Budget, allocate_within, read_budget
from sedimo.allocation.table import SensitivityTable
from sedimo.errors import InputError
from sedimo.settings import option

MAX_BITS = 32
MAX_BYTES = 1 << 50
MAX_BOPS = 1 << 62  # sums of them are integers of 64 bits
_EXPONENTS = {"": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15}
_PATTERN = re.compile(r"(\d+\.?\d*(?:e\d{1,3})?) ?([kMGTP%]?)")
_ROUNDING = 1e-12  # relative; a share that was computed as bops / full_bops must give the operations back


@dataclass(frozen=True, slots=True)
class BopsLimit:
    """At most so many bit operations of one sample and denoiser call, attention included; `text` as it was written.

    Exactly one of `n_bops` and `share` (of those at 16 bits, 0 to 1) is given.
    """

    text: str
    n_bops: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> BopsLimit:
        """The limit that a text such as `1.5T` or `12.5%` means; nothing beyond full precision."""
        match = _PATTERN.fullmatch(text.strip())
        if match is None or not Decimal(match[1]):
            raise InputError(
                "bit operations are written as a positive number, with k, M, G, T or P for thousands, or in percent of "
                f"those at 16 bits: 350G, 1.5T, 12.5%; got {text!r}"
            )
        value = Decimal(match[1])
        if match[2] == "%":
            if value > 100:
                raise InputError(f"a share of the bit operations at 16 bits is at most 100%, got {text!r}")
            return cls(text.strip(), share=float(value / 100))
        n_bops = value.scaleb(_EXPONENTS[match[2]])
        if n_bops > MAX_BOPS:
            raise InputError(f"a budget of {text} bit operations is beyond any model")
        return cls(text.strip(), n_bops=int(n_bops))

    def resolved(self, full_bops: int) -> int:
        """The limit for a model of `full_bops` at 16 bits [BOPs]."""
        if self.n_bops is not None:
            return self.n_bops
        assert self.share is not None  # noqa: S101  # exactly one is given
        return math.floor(self.share * full_bops * (1 + _ROUNDING))

    def __str__(self) -> str:
        """For people."""
        return f"{self.text} {'of the ' if self.share is not None else ''}bit operations"


@dataclass(frozen=True, slots=True)
class BudgetSettings:
    """A size, bit operations, or both; the size in paper bits or stored bits per weight, or in bytes.

    Raises:
        InputError: two sizes at once, or a budget that no weight has.
    """

    bits: float | None = option(None, "--bits", help="Budget: bits per weight in the papers' accounting.")
    stored_bits: float | None = option(
        None, "--stored-bits", help="Budget: bits per weight as stored, scales and codebooks counted."
    )
    n_bytes: int | None = option(None, "--bytes", help="Budget: bytes of the tensors that replace the weights.")
    bops: BopsLimit | None = option(
        None,
        "--bops",
        parse=BopsLimit.parse,
        help="Budget: bit operations a sample and call, attention too: 350G, 1.5T or 12.5% of 16-bit ones.",
    )

    def __post_init__(self) -> None:
        """Checks the sizes."""
        given = self._sizes
        if len(given) > 1:
            raise InputError("give one size: --bits, --stored-bits or --bytes, got several")
        if given and not 0 < given[0] < float("inf"):
            raise InputError(f"a budget must be positive, got {given[0]}")
        if max(self.bits or 0, self.stored_bits or 0) > MAX_BITS or (self.n_bytes or 0) > MAX_BYTES:
            raise InputError(f"a budget of {given[0]:g} is beyond any model; weights have at most {MAX_BITS} bits")

    @property
    def _sizes(self) -> list[float]:
        return [v for v in (self.bits, self.stored_bits, self.n_bytes) if v is not None]

    @property
    def has_size(self) -> bool:
        """Whether the size is limited."""
        return bool(self._sizes)

    @property
    def is_given(self) -> bool:
        """Whether there is a budget at all."""
        return self.has_size or self.bops is not None

    def resolved(self, n_weights: int, full_bops: int) -> Budget | None:
        """The limits for a model of so many weights and bit operations at 16 bits; None without a budget."""
        bops = None if self.bops is None else self.bops.resolved(full_bops)
        return read_budget(
            n_weights, bits=self.bits, stored_bits=self.stored_bits, budget_bytes=self.n_bytes, budget_bops=bops
        )

    def in_bits(self, n_weights: int) -> float:
        """The size per weight [bits], in its own accounting."""
        if not self.has_size:
            raise InputError("a budget of size is needed: --bits 3.5 (or --stored-bits, --bytes)")
        (size,) = self._sizes
        return size if self.n_bytes is None else 8 * size / n_weights

    def __str__(self) -> str:
        """For people."""
        parts = (
            f"{self.bits:g} paper bits per weight" if self.bits is not None else "",
            f"{self.stored_bits:g} stored bits per weight" if self.stored_bits is not None else "",
            f"{self.n_bytes} bytes" if self.n_bytes is not None else "",
            str(self.bops or ""),
        )
        return " and ".join(filter(None, parts)) or "no budget"


NO_BUDGET = BudgetSettings()


def allocated(table: SensitivityTable, budget: BudgetSettings, *, rule: str = "milp") -> Allocation:
    """The recipe of a table under a budget in any accounting (see `allocate`)."""
    return allocate_within(table, budget.resolved(table.total_params, table.full_bops), rule=rule)
