"""How a lab samples, and which seeds each purpose has: the only arithmetic on seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sedimo.errors import InputError
from sedimo.pipelines.adapter import Sampling
from sedimo.settings import option, within

FINAL_FACTOR = 4  # seeds of the final per seed of the search
MAX_SEED = 2**62
MOMENTS_OFFSET = 1_000_000  # from the first seed to those behind the moments of inputs
MOMENTS_FACTOR = 4  # samples behind the moments of inputs per seed of the search

Default = Callable[[Sequence[int], int], Sampling]  # a pipeline's own plan for some seeds and a number of steps


def read_prompts(path: str) -> tuple[str, ...]:
    """The lines of a text file that are not empty."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise InputError(f"{path} holds no prompt: one per line is expected")
    return lines


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How to sample while searching: `n_seeds` samples from `first_seed` on, `n_steps` each.

    The result is checked on `n_check_seeds` fresh seeds that follow the searched ones. `conditions` are prompts or
    classes; they, `guidance` and `resolution` [pixels] are the pipeline's own where they are not given.
    """

    n_seeds: int = option(8, "--seeds", least=2, help="Number of samples.")
    first_seed: int = option(0, "--seed", least=0, most=MAX_SEED, help="First seed.")
    n_steps: int = option(10, "--steps", least=1, most=1000, help="Denoising steps.")
    conditions: tuple[str, ...] = option(
        (),
        "--prompts",
        parse=read_prompts,
        metavar="FILE",
        help="Text file, a prompt or class per line; default: the pipeline's, or built-in ones.",
    )
    guidance: float | None = option(None, "--guidance", check=within(), help="Guidance scale; default: the pipeline's.")
    resolution: int | None = option(None, "--resolution", least=8, help="Image size [pixels]; default: the pipeline's.")
    n_check_seeds: int = 16

    def __post_init__(self) -> None:
        """Checks the guidance scale. The other limits are the command line's: a script may look at one sample."""
        if self.guidance is not None:
            within()(self.guidance, "guidance")


class Seeds:
    """The sampling plans of a lab, one for each purpose. No seed serves two of them but those of `more`."""

    def __init__(self, settings: SamplingSettings, default: Default) -> None:
        self.settings, self._default = settings, default

    @property
    def search(self) -> Sampling:
        """The plan on which recipes are searched."""
        return self.plan(self._past(0, self.settings.n_seeds))

    @property
    def check(self) -> Sampling:
        """The plan on which the result is checked: seeds that the search has not seen."""
        return self.plan(self._past(self.settings.n_seeds, self.settings.n_check_seeds))

    @property
    def final(self) -> Sampling:
        """The plan on which a search decides among finalists: seeds that neither searching nor checking has seen."""
        s = self.settings
        return self.plan(self._past(s.n_seeds + s.n_check_seeds, FINAL_FACTOR * s.n_seeds))

    @property
    def moments(self) -> Sampling:
        """The plan for the moments of inputs that error feedback goes by: seeds far past those of all other plans."""
        return self.plan(self._past(MOMENTS_OFFSET, MOMENTS_FACTOR * self.settings.n_seeds))

    def more(self, n_samples: int) -> Sampling:
        """The plan for what takes at least `n_samples`: the searched seeds, and more past those of all other plans."""
        s = self.settings
        more = self._past((1 + FINAL_FACTOR) * s.n_seeds + s.n_check_seeds, max(0, n_samples - s.n_seeds))
        return self.plan((*self._past(0, s.n_seeds), *more))

    def plan(self, seeds: Sequence[int]) -> Sampling:
        """A plan for some seeds, with the pipeline's defaults where nothing is set."""
        s = self.settings
        default = self._default(seeds, s.n_steps)
        conditions = s.conditions or default.conditions
        guidance = default.guidance if s.guidance is None else s.guidance
        return replace(default, conditions=conditions, guidance=guidance, resolution=s.resolution)

    def _past(self, offset: int, n: int) -> range:
        """So many seeds from an offset past the first one on."""
        first = self.settings.first_seed + offset
        return range(first, first + n)
