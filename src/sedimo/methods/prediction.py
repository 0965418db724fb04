"""What was predicted of the result and what was measured, and which recipes it was chosen among."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sedimo.codec import to_plain
from sedimo.metrics.estimate import Estimate

DISAGREEMENT_DB = 2.0  # beyond which a prediction is not to be trusted
EntrantKind = Literal["effects", "uniform", "exchanges"]


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
        if self.measured_db is None:
            return math.nan
        pair = self.measured_db.value, self.predicted_db.value
        return pair[0] - pair[1] if all(map(math.isfinite, pair)) else math.nan

    @property
    def is_trusted(self) -> bool:
        """Whether both agree; where they cannot be compared there is nothing to warn of."""
        return not abs(self.difference_db) > DISAGREEMENT_DB

    def as_json(self) -> Mapping[str, object]:
        """Plain values by name; scripts may rely on the names."""
        plain: dict[str, object] = to_plain(self)
        return plain | {"difference_db": to_plain(self.difference_db)}


@dataclass(frozen=True, slots=True)
class Entrant:
    """A recipe that could have been the result: SQNR on the searched seeds, of a finalist on further ones, too [dB].

    `predicted_db` is what was predicted of it, None where nothing was.
    """

    name: str
    kind: EntrantKind
    stored_bits: float
    searched: Estimate
    final: Estimate | None = None
    predicted_db: float | None = None
    is_winner: bool = False
