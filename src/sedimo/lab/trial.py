"""One measured recipe: what determines the number, and the number per sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from sedimo.codec import content_key, to_plain
from sedimo.errors import InputError, StateError
from sedimo.metrics.estimate import Estimate, ranked
from sedimo.metrics.signal import NoisePowers
from sedimo.space import Recipe

ObjectiveName = Literal["final_latents", "path", "step", "fid"]
OBJECTIVES: tuple[ObjectiveName, ...] = get_args(ObjectiveName)
TRIAL_VERSION = 1


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything but the recipe that determines a measured number; its key is part of every trial's name.

    `weights_digest` names the full-precision weights, `pipeline` what else draws the sample (class, scheduler,
    text encoders); `dtype` and `device` (kind only, `cpu` or `cuda`) are those the denoiser computes in. The batch
    size is not part of it: a sample does not depend on its batch. `extractor` names the network behind `fid`, and is
    None for objectives that look at no image.
    """

    weights_digest: str
    pipeline: str
    objective: ObjectiveName
    seeds: tuple[int, ...]
    n_steps: int
    conditions: tuple[str, ...]
    guidance: float | None
    resolution: int | None
    dtype: str
    device: str
    version: int = TRIAL_VERSION
    extractor: str | None = None

    def __post_init__(self) -> None:
        """Refuses another version's numbers and an unknown objective."""
        if self.version != TRIAL_VERSION:
            raise InputError(f"trials of version {self.version} cannot be compared; this Sedimo has {TRIAL_VERSION}")
        if self.objective not in OBJECTIVES:
            raise InputError(f"the objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")

    @property
    def key(self) -> str:
        """Content key of the setting."""
        return content_key(self._named())

    def trial_key(self, recipe: Recipe) -> str:
        """The name of the trial of a recipe under this setting: sha256 of all that determines its number."""
        return content_key({"setting": self._named(), "recipe": recipe.key})

    def _named(self) -> Mapping[str, object]:
        """What names it. An absent extractor is left out, so that older trials keep their names."""
        plain: dict[str, object] = to_plain(self)
        return {name: value for name, value in plain.items() if name != "extractor" or value is not None}


@dataclass(frozen=True, slots=True)
class Execution:
    """Where and how fast a number was made; none of it changes the number's name.

    `seconds` is wall-clock time of the trial [s], `n_calls` the number of denoiser calls.
    """

    seconds: float
    n_calls: int
    threads: int
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Trial:
    """A recipe with its noise and signal power per sample, in the order of the setting's seeds.

    The powers themselves are kept, so that two trials can be paired and jackknifed later. `measures` holds what is
    known of the samples as a set: `fid` and `kid` to real images, and their differences to full precision.
    """

    setting: Setting
    recipe: Recipe
    powers: NoisePowers
    execution: Execution
    measures: Mapping[str, Estimate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks that there is one pair of powers per seed.

        Raises:
            StateError: a sample is missing.
        """
        if self.powers.n != len(self.setting.seeds):
            raise StateError(f"a trial of {len(self.setting.seeds)} seeds needs as many powers, got {self.powers.n}")

    @property
    def score(self) -> float:
        """Mean SQNR over samples [dB], by which trials are ranked; minus infinity where it is not a number."""
        with np.errstate(invalid="ignore"):  # exact samples beside diverged ones
            return ranked(float(self.powers.sqnr_db.mean()))

    @property
    def key(self) -> str:
        """Content key, the trial's name."""
        return self.setting.trial_key(self.recipe)
