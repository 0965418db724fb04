"""First-order effects on the final latents, signs kept, and the recipe whose errors push these latents least.

A table adds the noise of decisions as if their errors were independent. They are not: many of them push the final
latents the same way, and such pushes add in amplitude. `Effects` keeps the signed products, so that the noise of a
whole recipe is the mean square of a sum.

Samples differ: noise of one may be ten times that of another, whatever is rounded. A mean of decibels, by which recipes
are judged, looks at each sample relative to itself; so each sample's products are divided by its level, which all
choices show together.

A few dozen products say little of a single choice. They say more together: the noise of a choice is nearly its weight
error, times a factor of its decision, times one of its format. Each estimate is drawn towards that, as far as its own
sampling error asks for (empirical Bayes).

The expected noise of a recipe has the costs of single choices, which are well known, and cross terms of pairs, few
dozen numbers for thousands of pairs: whoever minimises them freely finds cancellations that are none. So they are
shrunk,

    noise = sum of costs + trust * (mean square of the sum - sum of mean squares),

and what is predicted of the result is cross-validated. That is a quadratic multiple-choice problem. Exchanges of one or
two formats at a time start from the exact solution without cross terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.special import digamma

from sedimo.allocation.program import Answer, Problem
from sedimo.allocation.solve import Allocation, Budget, allocate_within, make_problem, record
from sedimo.allocation.table import SensitivityTable, mean_cost
from sedimo.allocation.variants import FloatArray, IntArray
from sedimo.bank import Candidate
from sedimo.errors import InputError
from sedimo.metrics.estimate import Estimate, mean_estimate
from sedimo.quant.families.family import CostEstimate
from sedimo.quant.formats import FP16, Format

# Products at which cross terms count half; fewer can be cancelled by chance (docs/results/first-order-noise.md).
TRUSTED_AT = 128
SIGNED, SUMMED = "signed", "milp"  # rules, by name
N_FOLDS = 4
MOST_EXCHANGES = 4000
_ROUNDS = 30  # of fitting factors of decisions and formats in turn
_N_MOVES = 512  # of which pairs are tried
_LEAST_GAIN = 1e-7  # relative
_SMALLEST_POWER = 1e-30

Choice = tuple[str, Format]
Decide = Callable[[SensitivityTable, "Effects"], Mapping[str, Format]]


@dataclass(frozen=True, eq=False)
class Effects:
    """What each choice does to the final latents: signed products `[n, directions]`, divided by the samples' levels.

    `levels` `[n]` are how much more or less the same rounding disturbs one sample than another (in amplitude, their
    geometric mean is 1). `costs` are the noise powers of single choices, with what all choices together say of each;
    absent: no effect.
    """

    products: Mapping[Choice, FloatArray]
    levels: FloatArray
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

    def scaled(self, choice: Choice) -> FloatArray:
        """The products of a choice `[n * directions]`, so that their mean square is its cost."""
        products = self.products[choice].ravel()
        power = float(np.square(products).mean())
        return products if power == 0 else products * np.sqrt(self.costs[choice].value / power)

    def noise(self, choice: Mapping[str, Format]) -> FloatArray:
        """Relative noise of the final latents of each sample under a whole recipe, to first order, `[n]`.

        Each is a mean over the directions (see `expected_db`). It is honest for recipes that were not chosen by these
        products; for others see `cross_validated_noise`.
        """
        total = np.zeros(self.shape)
        for key in choice.items():
            if key[1] != FP16:
                if key not in self.products:
                    raise InputError(f"the effect of {key[0]} at {key[1]} was not measured; measure it for this space")
                total += self.products[key]
        return np.asarray(np.square(total).mean(axis=1) * np.square(self.levels), dtype=np.float64)

    def of_samples(self, kept: IntArray, candidates: Iterable[Candidate]) -> Effects:
        """The effects as some of the samples show them, estimated anew."""
        return _estimated({key: one[kept] for key, one in self.products.items()}, self.levels[kept], candidates)


def make_effects(products: Mapping[Choice, FloatArray], candidates: Iterable[Candidate]) -> Effects:
    """The effects that signed products `[n, directions]` of all choices on the final latents tell."""
    if not products:
        raise InputError("every choice leaves the weights as they are and has no effect; add formats such as kmc4")
    powers = np.array([np.square(one).mean(axis=1) for one in products.values()])  # choices x n
    means = powers.mean(axis=1, keepdims=True)
    seen = means[:, 0] > 0
    levels = np.ones(powers.shape[1])
    if seen.any():
        levels = np.maximum(np.sqrt((powers[seen] / means[seen]).mean(axis=0)), np.finfo(np.float64).tiny)
        levels /= np.exp(np.log(levels).mean())
    return _estimated({key: one / levels[:, None] for key, one in products.items()}, levels, candidates)


def expected_db(noise: FloatArray, n_directions: int) -> Estimate:
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


def _estimated(products: Mapping[Choice, FloatArray], levels: FloatArray, candidates: Iterable[Candidate]) -> Effects:
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


def _drawn(powers: Mapping[Choice, FloatArray], errors: Mapping[Choice, float]) -> dict[Choice, float]:
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


def _means(values: FloatArray, group: IntArray) -> FloatArray:
    return np.asarray(np.bincount(group, values) / np.bincount(group))


def _jackknife_variance(rows: FloatArray) -> float:
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


def allocate_signed(
    table: SensitivityTable,
    effects: Effects,
    budget: Budget,
    *,
    known: Allocation | None = None,
    trust: float | None = None,
    most_exchanges: int = MOST_EXCHANGES,
) -> Allocation:
    """The recipe of least shrunk noise within a budget that exchanges find, from `known` or what costs alone choose.

    `objective` is that noise, `bound` a proven lower limit: cross terms are a mean square, so they are never below what
    they take from the costs. `trust` in cross terms is that of the effects unless given.
    """
    summed = known if known and known.rule == SUMMED else allocate_within(table, budget, rule=SUMMED)
    problem = make_problem(table, budget, keeps_dominated=True)
    signed = _Signed(problem, effects, effects.trust if trust is None else trust)
    choice = signed.exchanged((known or summed).choice, most_exchanges)
    answer = Answer(choice, 0.0, summed.n_solves, is_heuristic=True)
    found = record(table, budget, problem.chosen(choice), answer, rule=SIGNED, least=0.0)
    objective = signed.objective(choice)
    bound = min((1 - signed.trust) * summed.bound, objective)
    return replace(
        found,
        objective=objective,
        standard_error=found.standard_error * (objective / max(found.objective, _SMALLEST_POWER)),
        bound=bound,
        gap=0.0 if objective <= 0 else (objective - bound) / objective,
    )


def cross_validated_noise(
    table: SensitivityTable, effects: Effects, candidates: Iterable[Candidate], decide: Decide
) -> FloatArray:
    """What a recipe that `decide` chooses by effects will make of new samples: relative noise `[n]`, to first order.

    The recipe is chosen anew without a part of the samples, and judged on that part by the plain mean square of the
    sum. With one sample there is nothing to hold out.
    """
    n, candidates = effects.shape[0], tuple(candidates)
    if n < 2:
        return effects.noise(decide(table, effects))
    fold, noise = np.arange(n) % min(N_FOLDS, n), np.zeros(n)
    for left_out in range(min(N_FOLDS, n)):
        seen = effects.of_samples(np.flatnonzero(fold != left_out), candidates)
        known = ((c, seen.costs.get(key)) for key, c in table.index.items())
        costs = tuple(c if found is None else replace(c, cost=found.value) for c, found in known)
        held = fold == left_out
        noise[held] = effects.noise(decide(replace(table, costs=costs), seen))[held]
    return noise


class _Signed:
    """What exchanges change in a problem with its dominated options, which may still cancel something.

    D decisions, K options at most, M products; vectors `[D, K, M]` are scaled so that their mean square is the cost.
    """

    def __init__(self, problem: Problem, effects: Effects, trust: float) -> None:
        self.trust = trust  # of cross terms
        self._problem = problem
        self._vectors = np.zeros((*problem.cost.shape, math.prod(effects.shape)))
        for i, row in enumerate(problem.rows):
            for k in range(len(row)):
                (key,) = row.variant(k).items()
                if key in effects.products:
                    self._vectors[i, k] = effects.scaled(key)
        self._each, self._n_products = np.arange(len(problem.rows)), self._vectors.shape[2]
        self._grams = np.einsum("dkm,dlm->dkl", self._vectors, self._vectors) / self._n_products  # D K K

    def objective(self, choice: IntArray) -> float:
        """The shrunk noise of a choice `[D]` of columns."""
        chosen = self._vectors[self._each, choice]
        cross = np.square(chosen.sum(axis=0)).mean() - np.square(chosen).mean(axis=1).sum()
        return float(self._problem.cost[self._each, choice].sum() + self.trust * cross)

    def exchanged(self, start: Mapping[str, Format], most: int) -> IntArray:
        """Exchanges the formats of one or two decisions as long as that lowers the objective within the limits."""
        options = ([row.variant(k)[row.name] for k in range(len(row))] for row in self._problem.rows)
        columns = [own.index(start[row.name]) for row, own in zip(self._problem.rows, options, strict=True)]
        choice = np.array(columns, dtype=np.int64)
        for _ in range(most):
            found = self._best(choice)
            if not found:
                break
            for decision, column in found:
                choice[decision] = column
        return choice

    def _best(self, choice: IntArray) -> list[tuple[int, int]]:
        """The exchanges (decision, column) of the step that gains most; none where nothing gains."""
        gain, growth = self._single(choice)
        slack = self._problem.limit - self._problem.used(choice)
        decisions, columns = np.nonzero(np.isfinite(gain) & (np.arange(gain.shape[1]) != choice[:, None]))
        kept = self._promising(gain[decisions, columns], growth[:, decisions, columns])
        decisions, columns = decisions[kept], columns[kept]
        vectors = self._vectors[decisions, columns] - self._vectors[decisions, choice[decisions]]
        products = np.pad(vectors @ vectors.T, (1, 0))  # the first move changes nothing: the other one alone
        change, moved = np.append(0.0, gain[decisions, columns]), np.append(-1, decisions)
        sizes = np.pad(growth[:, decisions, columns], ((0, 0), (1, 0)))
        pairs = change[:, None] + change + 2 * self.trust / self._n_products * products
        fits = (sizes[:, :, None] + sizes[:, None, :] <= slack[:, None, None]).all(axis=0)
        pairs[~fits | (moved[:, None] == moved)] = np.inf
        found = np.unravel_index(int(pairs.argmin()), pairs.shape)
        if pairs[found] >= -_LEAST_GAIN * max(self.objective(choice), _SMALLEST_POWER):
            return []
        return [(int(decisions[i - 1]), int(columns[i - 1])) for i in found if i]

    def _single(self, choice: IntArray) -> tuple[FloatArray, IntArray]:
        """Of every single exchange: the change of the objective `[D, K]`, and of the sizes `[R, D, K]`."""
        problem, each = self._problem, self._each
        total = self._vectors[each, choice].sum(axis=0)
        along = self._vectors @ total / self._n_products  # D K
        own = self._grams[each, :, choice]  # D K, products with the present choice
        cross = 2 * (along - along[each, choice][:, None]) - 2 * (own - own[each, choice][:, None])
        gain = problem.cost - problem.cost[each, choice][:, None] + self.trust * cross
        return gain, problem.size - problem.size[:, each, choice][:, :, None]

    def _promising(self, gain: FloatArray, growth: IntArray) -> IntArray:
        """The moves that gain most at the price that size has now."""
        size = (growth / np.maximum(self._problem.limit, 1)[:, None]).sum(axis=0)
        is_buying = (size > 0) & (gain < 0)
        price = float(np.median(np.sort(-gain[is_buying] / size[is_buying])[-20:])) if is_buying.any() else 0.0
        return np.argsort(gain + price * size, kind="stable")[:_N_MOVES]
