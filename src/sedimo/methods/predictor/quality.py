"""How good a predictor is beside honest rivals: what bits, weight errors, tables and plain regression know already.

All are judged on recipes that they were not trained on. Each rival gives a quantity per recipe, and a line from it to
the goal is fitted on the training recipes of the fold, so that errors have the goal's unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from sedimo.allocation.effects import Effects, expected_db
from sedimo.methods.predictor.choices import Choices, Codes, Values, picked
from sedimo.methods.predictor.noise_model import fit_noise_model
from sedimo.methods.predictor.study import Background
from sedimo.methods.predictor.training import Predictor, TrainingSet
from sedimo.metrics.estimate import Estimate
from sedimo.metrics.ranking import PredictionQuality, prediction_quality, quality_difference

Fit = Callable[[Codes, Values], Callable[[Codes], Values]]
MINE, SIGNED_EFFECTS = "this predictor", "signed effects"
RIDGES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
ALL, EXTRA = "all", "extra recipes in the band"
MIN_IN_BAND = 8  # recipes that a rank correlation in a band needs
N_BOOTSTRAP_OF_FOLD = 200


@dataclass(frozen=True, slots=True)
class Band:
    """A range of average paper bits."""

    low: float
    high: float

    @classmethod
    def around(cls, bits: float) -> Band:
        """Half a bit, in the middle of which some bits are."""
        return cls(bits - 0.25, bits + 0.25)

    def holds(self, bits: Values) -> npt.NDArray[np.bool_]:
        """Which recipes are in it, `[T]`."""
        return (bits >= self.low) & (bits <= self.high)

    def __str__(self) -> str:
        """For people."""
        return f"{self.low:.2f} to {self.high:.2f} bits"


@dataclass(frozen=True)
class Rating:
    """How well a predictor does on a subset of recipes that it was not trained on.

    `ahead` is the SRCC of the predictor in question minus that of this rival, paired; None for itself.
    """

    predictor: str
    subset: str
    quality: PredictionQuality
    ahead: Estimate | None = None


@dataclass(frozen=True)
class HopRating:
    """How well a hop of a fold's network orders those test recipes of the fold that are in a subset."""

    fold: int
    hop: int
    subset: str
    quality: PredictionQuality


@dataclass(frozen=True)
class HeldOut:
    """What a predictor says of recipes that it was not trained on.

    `folds` `[T]`: of each training recipe by the fold that left it out. `extra` `[U]`: of further recipes, the mean
    over folds.
    """

    name: str
    folds: Values
    extra: Values


def rate(
    predictor: Predictor,
    data: TrainingSet,
    background: Background,
    *,
    extra: TrainingSet | None = None,
    band: Band | None = None,
) -> tuple[Rating, ...]:
    """The predictor and all rivals on the same held-out recipes: all, those in a band of bits, and extra ones.

    What is predicted is the quality, or the whole goal if the predictor's preset does.
    """
    truth = _truth(predictor, data)
    codes, measured = (data.codes[:0], truth[:0]) if extra is None else (extra.codes, _truth(predictor, extra))
    mine = HeldOut(MINE, predictor.cross_validated(data.n), predictor.predict(codes) if len(codes) else measured)
    table = background.table
    rivals = predict_by_rivals(
        replace(data, quality=truth),
        codes,
        tests=[fold.test for fold in predictor.folds],
        costs={} if table.method == "error" else {table.method: background.prior()},
        errors=data.choices.errors(background.candidates),
        effects=background.effects,
    )
    everyone = (mine, *rivals)
    subsets = {ALL: (truth, {h.name: h.folds for h in everyone})}
    inside = band.holds(data.choices.paper_bits(data.codes)) if band is not None else np.zeros(0, dtype=bool)
    if inside.sum() >= MIN_IN_BAND:
        subsets[str(band)] = (truth[inside], {h.name: h.folds[inside] for h in everyone})
    if len(codes):
        subsets[EXTRA] = (measured, {h.name: h.extra for h in everyone})
    return tuple(rating for subset, (y, said) in subsets.items() for rating in _ratings(subset, y, said))


def rate_hops(predictor: Predictor, data: TrainingSet, band: Band) -> Iterator[HopRating]:
    """Every hop of every fold on the fold's own test recipes, and on those of them in a band of bits."""
    truth, bits = _truth(predictor, data), data.choices.paper_bits(data.codes)
    for index, fold in enumerate(predictor.folds):
        for subset, chosen in ((ALL, np.ones(len(fold.test), dtype=bool)), (str(band), band.holds(bits[fold.test]))):
            if chosen.sum() < MIN_IN_BAND:
                continue
            for hop, scores in enumerate(fold.hop_scores):
                q = prediction_quality(scores[chosen], truth[fold.test][chosen], n_bootstrap=N_BOOTSTRAP_OF_FOLD)
                yield HopRating(index, hop, subset, q)


def _truth(predictor: Predictor, data: TrainingSet) -> Values:
    return data.target if predictor.has_sizes else data.quality


def _ratings(subset: str, truth: Values, said: Mapping[str, Values]) -> Iterator[Rating]:
    for name, predictions in said.items():
        ahead = None if name == MINE else quality_difference(said[MINE], predictions, truth)
        yield Rating(name, subset, prediction_quality(predictions, truth), ahead)


def predict_by_rivals(
    data: TrainingSet,
    extra: Codes,
    *,
    tests: Sequence[npt.NDArray[np.int64]],
    costs: Mapping[str, Values],
    errors: Values,
    effects: Effects | None = None,
) -> tuple[HeldOut, ...]:
    """What all rivals say on the folds whose test recipes are `tests`.

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


def _held(name: str, fit: Fit, data: TrainingSet, extra: Codes, tests: Sequence[npt.NDArray[np.int64]]) -> HeldOut:
    folds, further = np.full(data.n, np.nan), np.zeros(len(extra))
    for test in tests:
        training = np.setdiff1d(np.arange(data.n), test)
        predict = fit(data.codes[training], data.quality[training])
        folds[test] = predict(data.codes[test])
        if len(extra):
            further += predict(extra) / len(tests)
    return HeldOut(name, folds, further)


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
