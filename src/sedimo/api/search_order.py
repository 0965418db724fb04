"""How recipes are searched by measuring: how many, from which prior, predicted how. Checked before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from sedimo.errors import InputError
from sedimo.measurement.target import Target
from sedimo.sensitivity.gnn.training import FAST, MIN_RECIPES, TrainingOptions

Level = Literal["decisions", "groups"]
TARGETS = ("sqnr_db", "sqnr_pooled_db")
PRIORS = ("jacobian", "adjoint", "ablation", "error")


@dataclass(frozen=True, slots=True)
class SearchOrder:
    """How many recipes are measured, and how.

    Of `n_trials`, those of the `n_rounds` of refinement are half; none without rounds. `confidence` is the margin of
    costs in standard deviations. `seed` names the random recipes, `prior` what is measured before them.
    `level` says what the allocation decides on: single `decisions`, or variants of whole `groups`.
    """

    n_trials: int = 300
    n_rounds: int = 0
    seed: int = 0
    target: str = "sqnr_db"
    prior: str = "jacobian"
    confidence: float = 1.0
    level: Level = "decisions"
    training: TrainingOptions = FAST

    def __post_init__(self) -> None:
        """Refuses too few trials."""
        if self.n_trials < MIN_RECIPES or self.n_rounds < 0:
            raise InputError(
                f"a search needs at least {MIN_RECIPES} trials and no negative number of rounds, got {self.n_trials} "
                f"and {self.n_rounds}"
            )
        if self.n_rounds and (self.per_round < 1 or self.n_random < MIN_RECIPES):
            raise InputError(f"{self.n_trials} trials are too few for {self.n_rounds} rounds: half of them are random")
        check_study(self.seed, self.prior)
        check_confidence(self.confidence)
        if self.level not in get_args(Level):
            raise InputError(f"the level must be one of {', '.join(get_args(Level))}, got {self.level!r}")
        if str(Target.parse(self.target).split_bits()[0]) not in TARGETS:
            raise InputError(
                f"a search measures final latents and can predict {' or '.join(TARGETS)}, with a term of avg_bits or "
                f"without; got {self.target!r}. Other targets: sedimo explore, sedimo attribute"
            )

    @property
    def per_round(self) -> int:
        """Trials of one round of refinement."""
        return self.n_trials // (2 * self.n_rounds) if self.n_rounds else 0

    @property
    def n_random(self) -> int:
        """Random recipes to begin with."""
        return self.n_trials - self.n_rounds * self.per_round


def check_study(seed: int, prior: str) -> None:
    """Refuses a seed or a prior that no study has.

    Raises:
        InputError: a negative seed, an unknown prior.
    """
    if seed < 0:
        raise InputError(f"the seed of a study must not be negative, got {seed}")
    if prior not in PRIORS:
        raise InputError(f"the prior must be one of {', '.join(PRIORS)}, got {prior!r}")


def check_confidence(confidence: float) -> None:
    """Refuses a margin that is no sensible number of standard deviations.

    Raises:
        InputError: below 0, above 10, or no number.
    """
    if not 0 <= confidence <= 10:
        raise InputError(f"the confidence is a number of standard deviations from 0 to 10, got {confidence}")
