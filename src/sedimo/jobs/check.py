"""The result beside full precision and uniform recipes, on seeds that the search has not seen; do its costs add?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from sedimo.allocation.combine import Agreement, agreement, predict
from sedimo.allocation.effects import Effects
from sedimo.allocation.table import SensitivityTable
from sedimo.codec import to_plain
from sedimo.errors import InputError
from sedimo.jobs.evaluate import compare_signals
from sedimo.lab.exchange import probed
from sedimo.lab.exploration import random_recipe_near
from sedimo.lab.images import draw
from sedimo.lab.lab import Lab
from sedimo.lab.study import Study, Trial
from sedimo.lab.trajectory import TRAJECTORY_RUNS, TRAJECTORY_SAMPLES
from sedimo.methods.method import Finding, Price
from sedimo.methods.uniform import SLACK_BITS, UNIFORM
from sedimo.metrics.signal import paired_difference
from sedimo.quant.formats import FP16, Format
from sedimo.reporting.page import Picture
from sedimo.reporting.summary import MeasuredRecipe
from sedimo.space import Recipe, SearchSpace
from sedimo.treatments.treatment import Finished

N_PICTURES = 8
N_RIVALS = 3
N_CHECKED = 2 + N_RIVALS  # full precision, the result and uniform recipes
TOLERANCE_BITS = 0.25  # of random recipes
MIN_TRIALS = 3  # for an agreement
THIS, NEAREST = "this recipe", "this recipe, rounded to nearest"


@dataclass(frozen=True)
class Check:
    """The result and its rivals on the same fresh seeds, the result first, and pictures of some samples of it.

    Rivals are the result rounded to nearest, if its rounding is learned, and the uniform recipes of about its size.
    """

    recipes: tuple[MeasuredRecipe, ...]
    pictures: tuple[Picture, ...]
    seeds: tuple[int, ...]
    n_steps: int

    def as_json(self) -> dict[str, object]:
        """Plain values by name."""
        return {
            "seeds": list(self.seeds),
            "n_steps": self.n_steps,
            "recipes": {one.name: to_plain(one.measures) for one in self.recipes},
            "differences_db": {one.name: to_plain(one.ahead) for one in self.recipes if one.ahead is not None},
        }


def check_recipe(lab: Lab, finding: Finding, finished: Finished | None = None) -> Check:
    """Samples full precision, the result, and its rivals."""
    pipe, on, bank, allocation = lab.pipe, lab.seeds.check, finding.bank, finding.decided
    reference = draw(pipe, on, label="full precision", progress=lab.progress)
    uniform = uniform_rivals(bank.space, allocation.paper_bits + SLACK_BITS)
    recipes = dict.fromkeys((THIS,) if finished is None else (THIS, NEAREST), allocation.recipe)
    checked: list[MeasuredRecipe] = []
    for name, recipe in (recipes | {f"{UNIFORM.name} {f}": bank.space.uniform(f) for f in uniform}).items():
        weights = finished.weights if name == THIS and finished is not None else bank.quantize(recipe)
        with probed(pipe.denoiser, weights, inputs=bank.input_quantizers(recipe)):
            samples = draw(pipe, on, label=name, progress=lab.progress)
        powers, found = compare_signals(reference, samples)
        if name == THIS:
            own, quantized = powers, samples
        ahead = None if name == THIS else paired_difference(own, powers)
        stored_bits = 8 * bank.stored_bytes(recipe) / bank.space.params
        checked.append(MeasuredRecipe(name, bank.space.paper_bits(recipe), stored_bits, found, ahead))
    pairs = zip(on.seeds[:N_PICTURES], reference.images, quantized.images, strict=False)
    pictures = tuple(Picture(f"seed {seed}", _pixels(a), _pixels(b)) for seed, a, b in pairs)
    return Check(tuple(checked), pictures, on.seeds, on.n_steps)


def price_of_check(lab: Lab, *, n_random: int) -> Price:
    """The result beside its rivals on fresh seeds and block by block, and random recipes to see whether costs add."""
    settings, timing = lab.seeds.settings, lab.time_calls(lab.seeds.search)
    share = max(1.0, settings.n_check_seeds / settings.n_seeds)
    mapped = TRAJECTORY_RUNS * min(1.0, TRAJECTORY_SAMPLES / settings.n_check_seeds)
    calls = round((n_random + bool(n_random) + (N_CHECKED + mapped) * share) * timing.n_calls)
    return Price(calls * timing.seconds_per_call, calls)


def uniform_rivals(space: SearchSpace, paper_bits: float) -> tuple[Format, ...]:
    """Of the formats that every decision can take at up to `paper_bits`, the largest of each family."""
    sizes = {f: space.paper_bits(space.uniform(f)) for f in space.common_formats}
    fitting = sorted((f for f, bits in sizes.items() if bits <= paper_bits), key=lambda f: -sizes[f])
    best: dict[tuple[str, bool], Format] = {}
    for number_format in fitting:
        best.setdefault((number_format.family, number_format.group_size is not None), number_format)
    return tuple(best.values())[:N_RIVALS]


def _pixels(image: object) -> np.ndarray:
    """Of an image `[3, H, W]`, uint8 `[H, W, 3]`."""
    array = np.asarray(image, dtype=np.float64).transpose(1, 2, 0)
    return np.clip(np.rint(array * 255), 0, 255).astype(np.uint8)


def measure_random_recipes(lab: Lab, space: SearchSpace, bits: float, *, n: int) -> tuple[Trial, ...]:
    """Trials of random recipes of about `bits` paper bits on the searched seeds: `n`, or as many as can be drawn."""
    found: dict[str, Recipe] = {}
    for index in range(n):
        with suppress(InputError):  # a narrow space may not have so many recipes of that size
            recipe = random_recipe_near(space, bits, seed=0, index=index, tolerance=TOLERANCE_BITS)
            found[recipe.key] = recipe
    return lab.measure(list(found.values()), lab.seeds.search)


def check_additivity(
    table: SensitivityTable, trials: Iterable[Trial], effects: Effects | None = None
) -> Agreement | None:
    """Predicted against measured mean relative noise; None with fewer than three recipes of these formats.

    Predicted by the sum of the table's costs, or, with `effects`, by the mean square of their sum.
    """
    predicted, measured = [], []
    for trial in trials:
        found = {d: trial.recipe.format_of(layers[0], table.streams.get(d)) for d, layers in table.layers.items()}
        choice = {d: f for d, f in found.items() if f is not None}
        noise = float(trial.powers.ratio.mean())
        try:
            cost = predict(table, choice) if effects is None else float(effects.noise(choice).mean())
        except InputError:
            continue  # a recipe with formats that the table does not know
        if 0 < cost < math.inf and 0 < noise < math.inf:
            predicted.append(cost)
            measured.append(noise)
    return agreement(predicted, measured) if len(predicted) >= MIN_TRIALS else None


def whole_recipes(study: Study, table: SensitivityTable) -> tuple[Trial, ...]:
    """Of the trials of a study those that say something of a table's sum, of the setting that has most of them.

    They are of recipes for most decisions: probes of single ones are in the table already.
    """
    by_setting: dict[str, list[Trial]] = {}
    for trial in study.trials():
        known = [layers[0] for layers in table.layers.values() if layers[0] in trial.recipe.layers]
        if 2 * sum(trial.recipe.layers[name] != FP16 for name in known) > len(table.layers):
            by_setting.setdefault(trial.setting.key, []).append(trial)
    largest = sorted(by_setting.values(), key=len)[-1:]
    return tuple(trial for trials in largest for trial in trials)
