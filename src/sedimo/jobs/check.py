"""The result beside full precision and beside uniform recipes, on seeds that the search has not seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sedimo.bank import Bank
from sedimo.codec import to_plain
from sedimo.jobs.measures import SignalEvaluation, compare_signals, measures
from sedimo.lab.exchange import probed
from sedimo.lab.images import Samples, draw
from sedimo.lab.lab import Lab
from sedimo.lab.trajectory import TRAJECTORY_RUNS, TRAJECTORY_SAMPLES
from sedimo.methods.method import Finding, Price
from sedimo.methods.uniform import SLACK_BITS
from sedimo.metrics.signal import PairedDifference, paired_difference
from sedimo.quant.formats import Format
from sedimo.space import Recipe
from sedimo.treatments.treatment import Finished

N_PICTURES = 8
N_CHECKED = 5  # full precision, the result and three uniform recipes
THIS, NEAREST = "this recipe", "this recipe, rounded to nearest"


@dataclass(frozen=True)
class CheckedRecipe:
    """A recipe and how its samples compare with full precision."""

    name: str
    recipe: Recipe
    paper_bits: float
    stored_bits: float
    signals: SignalEvaluation


@dataclass(frozen=True)
class Check:
    """The result and its rivals on the same fresh seeds.

    Rivals are the result rounded to nearest, if its rounding is learned, and the uniform recipes of about its size,
    which are rounded to nearest, too. `differences` are result minus rival [dB], paired.
    """

    this: CheckedRecipe
    rivals: tuple[CheckedRecipe, ...]
    differences: Mapping[str, PairedDifference]
    reference: Samples
    quantized: Samples
    seeds: tuple[int, ...]
    n_steps: int

    def as_json(self) -> dict[str, object]:
        """Plain values by name."""
        recipes = {r.name: to_plain(measures(r.signals, {})) for r in (self.this, *self.rivals)}
        return {
            "seeds": list(self.seeds),
            "n_steps": self.n_steps,
            "recipes": recipes,
            "differences_db": to_plain(self.differences),
        }


def check_recipe(lab: Lab, finding: Finding, finished: Finished | None = None) -> Check:
    """Samples full precision, the result, and the best uniform recipes of about the same size.

    With weights that were `finished`, the nearest rounding of the result is a rival.
    """
    pipe, on, bank, allocation = lab.pipe, lab.seeds.check, finding.bank, finding.decided
    reference = draw(pipe, on, label="full precision", progress=lab.progress)
    names = (THIS,) if finished is None else (THIS, NEAREST)
    uniform = uniform_rivals(bank, allocation.paper_bits + SLACK_BITS)
    recipes = dict.fromkeys(names, allocation.recipe) | {f"uniform {f}": bank.space.uniform(f) for f in uniform}
    checked, quantized = [], reference
    for name, recipe in recipes.items():
        weights = finished.weights if name == THIS and finished is not None else bank.quantize(recipe)
        with probed(pipe.denoiser, weights, inputs=bank.input_quantizers(recipe)):
            samples = draw(pipe, on, label=name, progress=lab.progress)
        checked.append(_checked(bank, name, recipe, compare_signals(reference, samples)))
        quantized = samples if name == THIS else quantized
    this, *rivals = checked
    differences = {r.name: paired_difference(this.signals.powers, r.signals.powers) for r in rivals}
    return Check(this, tuple(rivals), differences, reference, quantized, on.seeds, on.n_steps)


def price_of_check(lab: Lab, *, n_random: int) -> Price:
    """The result beside its rivals on fresh seeds and block by block, and random recipes to see whether costs add."""
    settings, timing = lab.seeds.settings, lab.time_calls(lab.seeds.search)
    share = max(1.0, settings.n_check_seeds / settings.n_seeds)
    mapped = TRAJECTORY_RUNS * min(1.0, TRAJECTORY_SAMPLES / settings.n_check_seeds)
    calls = round((n_random + bool(n_random) + (N_CHECKED + mapped) * share) * timing.n_calls)
    return Price(calls * timing.seconds_per_call, calls)


def uniform_rivals(bank: Bank, paper_bits: float, *, n: int = 3) -> tuple[Format, ...]:
    """Of the formats that every decision can take at up to `paper_bits`, the largest of each family."""
    space = bank.space
    sizes = {f: space.paper_bits(space.uniform(f)) for f in space.common_formats}
    fitting = sorted((f for f, bits in sizes.items() if bits <= paper_bits), key=lambda f: -sizes[f])
    best: dict[tuple[str, bool], Format] = {}
    for number_format in fitting:
        best.setdefault((number_format.family, number_format.group_size is not None), number_format)
    return tuple(best.values())[:n]


def pictures_of(check: Check) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Label and uint8 images `[H, W, 3]` of full precision and of the result, for the first samples."""
    pairs = zip(check.seeds, check.reference.images, check.quantized.images, strict=True)
    return [(f"seed {seed}", _pixels(a), _pixels(b)) for seed, a, b in list(pairs)[:N_PICTURES]]


def _pixels(image: object) -> np.ndarray:
    array = np.asarray(image, dtype=np.float64).transpose(1, 2, 0)
    return np.clip(np.rint(array * 255), 0, 255).astype(np.uint8)


def _checked(bank: Bank, name: str, recipe: Recipe, signals: SignalEvaluation) -> CheckedRecipe:
    stored = 8 * bank.stored_bytes(recipe) / bank.space.params
    return CheckedRecipe(name, recipe, bank.space.paper_bits(recipe), stored, signals)
