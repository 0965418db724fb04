"""Honest rivals of a predictor on the same folds: what bits, weight errors, tables and plain regression know already.

Each gives a quantity per recipe, and a line from it to the target is fitted on the training recipes of the fold, so
that errors have the target's unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sedimo.sensitivity.adjoint import Effects, expected_db
from sedimo.sensitivity.choices import Choices, Codes, Values, picked
from sedimo.sensitivity.gnn.training import TrainingSet
from sedimo.sensitivity.noise_model import fit_noise_model

Fit = Callable[[Codes, Values], Callable[[Codes], Values]]
SIGNED_EFFECTS = "signed effects"
RIDGES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True)
class Held:
    """What a predictor says of recipes that it was not trained on.

    `folds` `[T]`: of each training recipe by the fold that left it out. `extra` `[U]`: of further recipes, the mean
    over folds.
    """

    name: str
    folds: Values
    extra: Values


def run_baselines(
    data: TrainingSet,
    extra: Codes,
    *,
    tests: Sequence[npt.NDArray[np.int64]],
    costs: Mapping[str, Values],
    errors: Values,
    effects: Effects | None = None,
) -> tuple[Held, ...]:
    """All baselines on the folds whose test recipes are `tests`.

    `costs` are those of tables `[D, K]` by name, `errors` relative weight errors `[D, K]`; `effects` keep their signs.
    """
    choices = data.choices
    fits: dict[str, Fit] = {
        "average bits": _line(choices.paper_bits),
        "weight error, summed": _line(lambda c: -np.log10(picked(errors, c).sum(axis=1) + 1e-12)),
        "ridge on one-hot choices": _ridge(choices),
        **{f"{name} costs, summed": _line(_sum_of(values)) for name, values in costs.items()},
        **({} if effects is None else {SIGNED_EFFECTS: _line(_signed(choices, effects))}),
        "noise model, no graph": lambda c, y: fit_noise_model(choices, data.prior, c, y).predict,
    }
    return tuple(_held(name, fit, data, extra, tests) for name, fit in fits.items())


def _held(name: str, fit: Fit, data: TrainingSet, extra: Codes, tests: Sequence[npt.NDArray[np.int64]]) -> Held:
    folds, further = np.full(data.n, np.nan), np.zeros(len(extra))
    for test in tests:
        training = np.setdiff1d(np.arange(data.n), test)
        predict = fit(data.codes[training], data.quality[training])
        folds[test] = predict(data.codes[test])
        if len(extra):
            further += predict(extra) / len(tests)
    return Held(name, folds, further)


def _sum_of(costs: Values) -> Callable[[Codes], Values]:
    def quantity(codes: Codes) -> Values:
        found: Values = -10 * np.log10(picked(costs, codes).sum(axis=1) + 1e-12)
        return found

    return quantity


def _signed(choices: Choices, effects: Effects) -> Callable[[Codes], Values]:
    """SQNR of each recipe by the mean square of the sum of its effects [dB]."""

    def quantity(codes: Codes) -> Values:
        recipes = [choices.choice(row) for row in codes]
        return np.array([expected_db(effects.noise(choice), effects.shape[1]).value for choice in recipes])

    return quantity


def _line(quantity: Callable[[Codes], Values]) -> Fit:
    def fit(codes: Codes, target: Values) -> Callable[[Codes], Values]:
        x = quantity(codes)
        slope, offset = np.polyfit(x, target, 1) if np.ptp(x) > 0 else (0.0, float(target.mean()))
        return lambda other: offset + slope * quantity(other)

    return fit


def _ridge(choices: Choices) -> Fit:
    """Ridge regression; the penalty is the one of least generalised cross-validation error on the training recipes."""

    def design(codes: Codes) -> Values:
        found: Values = np.eye(choices.n_options)[codes].reshape(len(codes), -1)
        return found

    def fit(codes: Codes, target: Values) -> Callable[[Codes], Values]:
        x, mean = design(codes), float(target.mean())
        centre = x.mean(axis=0)
        u, singular, vt = np.linalg.svd(x - centre, full_matrices=False)
        along = u.T @ (target - mean)

        def error(penalty: float) -> float:
            shrunk = singular**2 / (singular**2 + penalty)
            rest = target - mean - u @ (shrunk * along)
            return float((rest**2).mean() / (1 - (shrunk.sum() + 1) / len(target)) ** 2)

        penalty = min(RIDGES, key=error)
        weights = vt.T @ (singular / (singular**2 + penalty) * along)
        return lambda other: mean + (design(other) - centre) @ weights

    return fit
