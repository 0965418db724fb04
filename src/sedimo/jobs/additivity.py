"""Are the costs of a table additive? Predicted against measured noise of whole recipes."""

from __future__ import annotations

import math
from collections.abc import Iterable

from sedimo.allocation.combine import Agreement, agreement, predict
from sedimo.allocation.effects import Effects
from sedimo.allocation.table import SensitivityTable
from sedimo.errors import InputError
from sedimo.lab.exploration import random_recipe_near
from sedimo.lab.lab import Lab
from sedimo.lab.study import Study, Trial
from sedimo.quant.formats import FP16
from sedimo.space import Recipe, SearchSpace

N_RECIPES = 30
TOLERANCE_BITS = 0.25
MIN_TRIALS = 3


def measure_random_recipes(lab: Lab, space: SearchSpace, bits: float, *, n: int) -> tuple[Trial, ...]:
    """Trials of `n` random recipes of about `bits` paper bits on the searched seeds."""
    return lab.measure(_recipes(space, bits, n), lab.seeds.search)


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
    """Of the trials of a study those that say something of a table's sum: recipes for most decisions, one setting.

    Trials of one setting compare with each other; the setting is the one that has most of them. Probes of single
    decisions, which are in the table already, are left out.
    """
    by_setting: dict[str, list[Trial]] = {}
    for trial in study.trials():
        known = [layers[0] for layers in table.layers.values() if layers[0] in trial.recipe.layers]
        if 2 * sum(trial.recipe.layers[name] != FP16 for name in known) > len(table.layers):
            by_setting.setdefault(trial.setting.key, []).append(trial)
    largest = sorted(by_setting.values(), key=len)[-1:]
    return tuple(trial for trials in largest for trial in trials)


def _recipes(space: SearchSpace, bits: float, n: int) -> list[Recipe]:
    """As many as can be drawn: a narrow space may not have so many recipes of that size."""
    found: dict[str, Recipe] = {}
    for index in range(n):
        try:
            recipe = random_recipe_near(space, bits, seed=0, index=index, tolerance=TOLERANCE_BITS)
        except InputError:
            continue
        found[recipe.key] = recipe
    return list(found.values())
