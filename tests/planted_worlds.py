"""Worlds in which the noise of every recipe is known: what a probe shows of them, and measuring that asks them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from sedimo.lab.seeds import SamplingSettings, Seeds
from sedimo.lab.study import Execution, Setting, Trial
from sedimo.methods.adjoint import adjoint_table, effects_of
from sedimo.methods.method import Finding
from sedimo.metrics.signal import NoisePowers
from sedimo.pipelines.adapter import Sampling
from sedimo.quant.formats import Format
from synthetic_effects import candidates_of, drawn_products, error_of, probe_of, space_of

FORMATS = "uaq2,uaq3,uaq4,uaq6,kma3,fp16"
N_SHOWN, N_SEARCHED, N_FINAL = 32, 8, 16
SECONDS = 60.0  # that each trial is said to take


class Told:
    """Measuring that knows the answers, keeps what it was asked, and counts it."""

    def __init__(self, noise_of, n: int):
        self.noise_of = noise_of
        self.setting = Setting("w", "Toy", "final_latents", tuple(range(n)), 4, (), None, None, "float32", "cpu")
        self.kept: dict[str, Trial] = {}
        self.asked: list[str] = []

    def trials(self, recipes):
        for recipe in recipes:
            self.asked.append(recipe.key)
            if recipe.key not in self.kept:
                powers = NoisePowers(self.noise_of(recipe), np.ones(len(self.setting.seeds)))
                self.kept[recipe.key] = Trial(self.setting, recipe, powers, Execution(SECONDS, 1, 1, {}))
        return tuple(self.kept[recipe.key] for recipe in recipes)


class World:
    """A lab on layers whose importance differs a hundredfold.

    The probe is shown what matters, or its inverse if it is `misled`.
    """

    def __init__(self, *, misled: bool = False, formats: str = FORMATS, n_decisions: int = 8, seed: int = 0):
        self.space = space_of(n_decisions, formats)
        candidates = candidates_of(self.space)
        self.bank = SimpleNamespace(
            space=self.space, candidates=candidates, index={(c.decision, c.format): c for c in candidates}
        )
        spread = np.random.default_rng(seed).permutation(np.logspace(-4, -2, n_decisions))
        factors = dict(zip(self.space.decision_index, spread, strict=True))
        self.factors = factors
        shown = {name: 1e-6 / value for name, value in factors.items()} if misled else factors
        products = drawn_products(self.space, _power(shown), (N_SHOWN, 4), seed + 1)
        self.probe = probe_of(products, N_SHOWN)
        self.effects = effects_of(candidates, self.probe)
        self.table = adjoint_table(self.space, candidates, self.probe)
        self.finding = Finding(self.bank, self.table).with_evidence(self.effects)
        true = drawn_products(self.space, _power(factors), (N_SEARCHED + N_FINAL, 40), seed + 2)
        self.truth = effects_of(candidates, probe_of(true, N_SEARCHED + N_FINAL))
        self.searching = Told(lambda recipe: self.noise(recipe)[:N_SEARCHED], N_SEARCHED)
        self.deciding = Told(lambda recipe: self.noise(recipe)[N_SEARCHED:], N_FINAL)
        self.seeds = Seeds(SamplingSettings(n_seeds=N_SEARCHED), lambda seeds, n_steps: Sampling(tuple(seeds), n_steps))

    def measure(self, recipes, on):
        """What a lab of this world measures: on the final's seeds, or on the searched ones and more."""
        is_final = set(on.seeds) <= set(self.seeds.final.seeds)
        return (self.deciding if is_final else self.searching).trials(recipes)

    def noise(self, recipe):
        """Of all samples, searched ones first."""
        return self.truth.noise(self.space.choice(recipe))


def _power(factors):
    def power(name, change):
        return factors[name] * error_of(Format.parse(change))

    return power
