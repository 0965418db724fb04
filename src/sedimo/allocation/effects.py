"""First-order effects on the final latents: as a table of single choices, and of whole recipes with signs kept.

A table adds the noise of decisions as if their errors were independent. They are not: many of them push the final
latents the same way, and such pushes add in amplitude. `Effects` keeps the signed products, so that the noise of a
whole recipe is the mean square of a sum.

Samples differ: noise of one may be ten times that of another, whatever is rounded. A mean of decibels, by which recipes
are judged, looks at each sample relative to itself; so each sample's products are divided by its level, which all
choices show together.

A few dozen products say little of a single choice. They say more together: the noise of a choice is nearly its weight
error, times a factor of its decision, times one of its format. Each estimate is drawn towards that, as far as its own
sampling error asks for (empirical Bayes).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression
from scipy.special import digamma

from sedimo.allocation.costs import CostEstimate, mean_cost
from sedimo.bank import Candidate
from sedimo.errors import InputError
from sedimo.metrics.estimate import Estimate, mean_estimate
from sedimo.quant.formats import FP16, Format

# Products at which cross terms count half; fewer can be cancelled by chance (docs/results/first-order-noise.md).
TRUSTED_AT = 128
_ROUNDS = 30  # of fitting factors of decisions and formats in turn

Array = npt.NDArray[np.float64]
Choice = tuple[str, Format]


@dataclass(frozen=True, eq=False)
class Effects:
    """What each choice does to the final latents: signed products `[n, directions]`, divided by the samples' levels.

    `levels` `[n]` are how much more or less the same rounding disturbs one sample than another (in amplitude, their
    geometric mean is 1). `costs` are the noise powers of single choices, with what all choices together say of each;
    absent: no effect.
    """

    products: Mapping[Choice, Array]
    levels: Array
    costs: Mapping[Choice, CostEstimate]

    @property
    def shape(self) -> tuple[int, int]:
        """Samples and directions."""
        n, n_directions = next(iter(self.products.values())).shape
        return n, n_directions

    @property
    def trust(self) -> float:
        """How far cross terms between decisions are believed where a recipe is chosen by them, 0 to 1."""
        n, n_directions = self.shape
        return n * n_directions / (n * n_directions + TRUSTED_AT)

    def scaled(self, choice: Choice) -> Array:
        """The products of a choice, scaled so that their mean square is its cost, `[n * directions]`."""
        products = self.products[choice].ravel()
        power = float(np.square(products).mean())
        return products if power == 0 else products * np.sqrt(self.costs[choice].value / power)

    def noise(self, choice: Mapping[str, Format]) -> Array:
        """Relative noise of the final latents of each sample under a whole recipe, to first order, `[n]`.

        Each is a mean over the directions (see `expected_db`). It is honest for recipes that were not chosen by these
        products; for others see `allocation.exchange`.

        Raises:
            InputError: a choice that was not measured.
        """
        total = np.zeros(self.shape)
        for key in choice.items():
            if key[1] != FP16:
                if key not in self.products:
                    raise InputError(f"the effect of {key[0]} at {key[1]} was not measured; measure it for this space")
                total += self.products[key]
        return np.asarray(np.square(total).mean(axis=1) * np.square(self.levels), dtype=np.float64)

    def of_samples(self, kept: npt.NDArray[np.int64], candidates: Iterable[Candidate]) -> Effects:
        """The effects as some of the samples show them, estimated anew."""
        return _estimated({key: one[kept] for key, one in self.products.items()}, self.levels[kept], candidates)


def make_effects(products: Mapping[Choice, Array], candidates: Iterable[Candidate]) -> Effects:
    """The effects that signed products `[n, directions]` of all choices on the final latents tell.

    Raises:
        InputError: there is none.
    """
    if not products:
        raise InputError("every choice leaves the weights as they are and has no effect; add formats such as kmc4")
    levels = _levels(list(products.values()))
    return _estimated({key: one / levels[:, None] for key, one in products.items()}, levels, candidates)


def expected_db(noise: Array, n_directions: int) -> Estimate:
    """Mean SQNR over samples [dB] that relative noise `[n]`, each estimated from so many directions, lets expect.

    The estimate of a sample is its noise times a chi-squared variable over its degrees of freedom, one a direction; the
    mean of the logarithm of that is known and taken off.
    """
    noisy = noise[noise > 0]
    if not len(noisy) or not np.isfinite(noise).all():
        best = math.inf if not len(noisy) else -math.inf
        return Estimate(best, 0.0, best, best, len(noise))
    half = n_directions / 2
    return mean_estimate(-10 * np.log10(noisy) + 10 / math.log(10) * (float(digamma(half)) - math.log(half)))


def _levels(products: Sequence[Array]) -> Array:
    """How strongly each sample answers to all choices, in amplitude, `[n]`; their geometric mean is 1."""
    powers = np.array([np.square(one).mean(axis=1) for one in products])  # choices x n
    means = powers.mean(axis=1, keepdims=True)
    seen = means[:, 0] > 0
    if not seen.any():
        return np.ones(powers.shape[1])
    levels = np.sqrt((powers[seen] / means[seen]).mean(axis=0))
    levels = np.maximum(levels, np.finfo(np.float64).tiny)
    found: Array = levels / np.exp(np.log(levels).mean())
    return found


def _estimated(products: Mapping[Choice, Array], levels: Array, candidates: Iterable[Candidate]) -> Effects:
    """Noise powers of all choices: measured, drawn towards what they have in common, and monotone in the bits."""
    errors = {(c.decision, c.format): c.error for c in candidates}
    powers = {key: np.square(values).mean(axis=1) for key, values in products.items()}  # [n] each
    measured = {key: mean_cost(rows) for key, rows in powers.items()}
    drawn = _drawn({k: rows for k, rows in powers.items() if rows.mean() > 0 and errors.get(k, 0.0) > 0}, errors)
    scale = {key: value / measured[key].value for key, value in (drawn | _monotone(measured, drawn)).items()}
    costs = {
        key: CostEstimate(c.value * scale.get(key, 1.0), c.standard_error * scale.get(key, 1.0), c.n)
        for key, c in measured.items()
    }
    return Effects(products, levels, costs)


def _drawn(powers: Mapping[Choice, Array], errors: Mapping[Choice, float]) -> dict[Choice, float]:
    """Each power, in logarithms, between itself and weight error x factor of the decision x factor of the format."""
    keys = list(powers)
    if len(keys) < 3 or len(next(iter(powers.values()))) < 2:
        return {key: float(rows.mean()) for key, rows in powers.items()}
    expected = np.log([errors[key] for key in keys])
    excess = np.log([powers[key].mean() for key in keys]) - expected
    decision, number_format = (np.unique([str(key[i]) for key in keys], return_inverse=True)[1] for i in (0, 1))
    by_decision, by_format = np.zeros(decision.max() + 1), np.zeros(number_format.max() + 1)
    for _ in range(_ROUNDS):
        by_decision = _means(excess - by_format[number_format], decision)
        by_format = _means(excess - by_decision[decision], number_format)
    common = by_decision[decision] + by_format[number_format]
    noise = np.array([_jackknife_variance(powers[key]) for key in keys])
    scatter = max(0.0, float(np.var(excess - common) - noise.mean()))
    own = scatter / (scatter + float(np.median(noise))) if scatter > 0 else 0.0
    values = np.exp(expected + common + own * (excess - common))
    return dict(zip(keys, values.tolist(), strict=True))


def _means(values: Array, group: npt.NDArray[np.int64]) -> Array:
    found: Array = np.bincount(group, values) / np.bincount(group)
    return found


def _jackknife_variance(rows: Array) -> float:
    """Of the logarithm of the mean of samples."""
    n = len(rows)
    left_out = np.log(np.maximum(rows.sum() - rows, np.finfo(np.float64).tiny) / (n - 1))
    return float((n - 1) / n * np.square(left_out - left_out.mean()).sum())


def _monotone(measured: Mapping[Choice, CostEstimate], drawn: Mapping[Choice, float]) -> dict[Choice, float]:
    """Powers that do not grow with the bits of a family: neighbours that say otherwise share their mean."""
    ladders: dict[tuple[object, ...], list[Choice]] = {}
    for key in measured:
        decision, f = key
        if key in drawn and f.is_quantized:
            ladders.setdefault((decision, f.family, f.group_size, f.activation_bits), []).append(key)
    found: dict[Choice, float] = {}
    for keys in ladders.values():
        keys.sort(key=lambda key: key[1].bits)
        logs = isotonic_regression(np.log([drawn[key] for key in keys]), increasing=False).x
        found |= dict(zip(keys, np.exp(logs).tolist(), strict=True))
    return found
