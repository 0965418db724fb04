"""Which layers to smooth, and how much."""

from __future__ import annotations

from dataclasses import dataclass

from sedimo.errors import InputError
from sedimo.quant.smoothing import DEFAULT_ALPHA, check_alpha

DEFAULT_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class SmoothOrder:
    """How to smooth: alpha, and the share of the layers, most sensitive first; 1 for all.

    `layers` names them instead; then the share does not matter.
    """

    alpha: float = DEFAULT_ALPHA
    share: float = DEFAULT_SHARE
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuses an alpha or a share outside 0..1."""
        check_alpha(self.alpha)
        if not 0 < self.share <= 1:
            raise InputError(f"the share of smoothed layers must lie in 0..1 and not be 0, got {self.share}")

    def __str__(self) -> str:
        """For people."""
        which = ", ".join(self.layers) or f"{self.share:g} of the layers"
        return f"alpha {self.alpha:g} on {which}"

    @property
    def is_given(self) -> bool:
        """Whether the layers need not be ranked."""
        return bool(self.layers) or self.share == 1


DEFAULT_SMOOTHING = SmoothOrder()
