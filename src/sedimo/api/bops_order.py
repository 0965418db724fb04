"""A limit of bit operations as a person writes it: `350G`, `1.5T`, or a share of full precision, `12.5%`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal

from sedimo.errors import InputError

_EXPONENTS = {"": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15}
_PATTERN = re.compile(r"(\d+\.?\d*(?:e\d{1,3})?) ?([kMGTP%]?)")
_ROUNDING = 1e-12  # relative; a share that was computed as bops / full_bops must give the operations back
MAX_BOPS = 1 << 62  # sums of them are integers of 64 bits


@dataclass(frozen=True, slots=True)
class BopsOrder:
    """At most so many bit operations of one sample and denoiser call, attention included; `text` as it was written.

    Exactly one of `n_bops` and `share` (of those at 16 bits, 0 to 1) is given.
    """

    text: str
    n_bops: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> BopsOrder:
        """The limit that a text means.

        Example:
            >>> BopsOrder.parse("1.5T").n_bops, BopsOrder.parse("12.5%").share
            (1500000000000, 0.125)

        Raises:
            InputError: not a positive number with a unit, or beyond full precision.
        """
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
        """The limit for a model of `full_bops` at 16 bits [BOPs].

        Raises:
            InputError: a share of a model whose bit operations are not known.
        """
        if self.n_bops is not None:
            return self.n_bops
        if full_bops <= 0 or self.share is None:
            raise InputError(
                f"{self.text} of the bit operations cannot be told, because the table does not know those at 16 bits: "
                "it was made by an older version. Run the job again"
            )
        return math.floor(self.share * full_bops * (1 + _ROUNDING))

    def __str__(self) -> str:
        """For people."""
        return f"{self.text} {'of the ' if self.share is not None else ''}bit operations"
