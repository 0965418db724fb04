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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.special import digamma

from sedimo.allocation.problem import Allocation, Answer, Budget, FloatArray, IntArray, assemble, record
from sedimo.allocation.solve import allocate_within
from sedimo.allocation.table import CostEstimate, SensitivityTable, mean_cost
from sedimo.bank import Candidate
from sedimo.errors import InputError
from sedimo.metrics.estimate import Estimate, mean_estimate
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
        """The products of a choice, scaled so that their mean square is its cost, `[n * directions]`."""
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
    levels = _levels(list(products.values()))
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


def _levels(products: Sequence[FloatArray]) -> FloatArray:
    """How strongly each sample answers to all choices, in amplitude, `[n]`; their geometric mean is 1."""
    powers = np.array([np.square(one).mean(axis=1) for one in products])  # choices x n
    means = powers.mean(axis=1, keepdims=True)
    seen = means[:, 0] > 0
    if not seen.any():
        return np.ones(powers.shape[1])
    levels = np.sqrt((powers[seen] / means[seen]).mean(axis=0))
    levels = np.maximum(levels, np.finfo(np.float64).tiny)
    return np.asarray(levels / np.exp(np.log(levels).mean()))


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
    """The recipe of least shrunk noise within a budget that exchanges find.

    `objective` is that noise, `bound` a proven lower limit: cross terms are a mean square, so they are never below what
    they take from the costs. Starts from `known`, else from the exact solution without cross terms, and makes at most
    so many exchanges. `trust` in cross terms is that of the effects unless given.
    """
    is_summed = known is not None and known.rule == SUMMED
    summed = known if known and is_summed else allocate_within(table, budget, rule=SUMMED)
    start = known or summed
    problem = _Signed(table, effects, budget, effects.trust if trust is None else trust)
    columns = [[c.format for c in row].index(start.choice[row[0].decision]) for row in problem.rows]
    choice = problem.exchanged(np.array(columns, dtype=np.int64), most_exchanges)
    chosen = (row[int(k)] for row, k in zip(problem.rows, choice, strict=True))
    answer = Answer(choice, 0.0, summed.n_solves, is_heuristic=True)
    found = record(table, budget, chosen, answer, rule=SIGNED, least=0.0)
    objective = problem.objective(choice)
    bound = min((1 - problem.trust) * summed.bound, objective)
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
    sum, which knows nothing of how it was chosen. With one sample there is nothing to hold out.
    """
    n, candidates = effects.shape[0], tuple(candidates)
    if n < 2:
        return effects.noise(decide(table, effects))
    fold, noise = np.arange(n) % min(N_FOLDS, n), np.zeros(n)
    for left_out in range(min(N_FOLDS, n)):
        seen = effects.of_samples(np.flatnonzero(fold != left_out), candidates)
        choice = decide(_with_costs(table, seen), seen)
        held = fold == left_out
        noise[held] = effects.noise(choice)[held]
    return noise


def _with_costs(table: SensitivityTable, effects: Effects) -> SensitivityTable:
    costs = (
        replace(c, cost=found.value) if (found := effects.costs.get((c.decision, c.format))) is not None else c
        for c in table.costs
    )
    return replace(table, costs=tuple(costs))


class _Signed:
    """All allowed choices as arrays, and what exchanges change: D decisions, K options at most, M products.

    An option that costs more and takes more than another may still cancel something. Vectors `[D, K, M]` are scaled
    so that their mean square is the cost.
    """

    def __init__(self, table: SensitivityTable, effects: Effects, budget: Budget, trust: float) -> None:
        self.trust = trust  # of cross terms
        rows = [[c for c in table.by_decision[name] if math.isfinite(c.cost)] for name in sorted(table.by_decision)]
        costs = [np.array([c.cost for c in row]) for row in rows]
        sizes = [np.array([budget.sizes(c) for c in row], np.int64).T for row in rows]
        limit = budget.limits(table.attention_bops)
        self.rows, self._problem = rows, assemble([np.arange(len(row)) for row in rows], costs, sizes, limit)
        self._vectors = np.zeros((*self._problem.cost.shape, math.prod(effects.shape)))
        for i, row in enumerate(rows):
            for k, entry in enumerate(row):
                if (entry.decision, entry.format) in effects.products:
                    self._vectors[i, k] = effects.scaled((entry.decision, entry.format))
        self._each, self._n_products = np.arange(len(rows)), self._vectors.shape[2]
        self._grams = np.einsum("dkm,dlm->dkl", self._vectors, self._vectors) / self._n_products  # D K K

    def objective(self, choice: IntArray) -> float:
        """The shrunk noise of a choice `[D]` of columns."""
        chosen = self._vectors[self._each, choice]
        cross = np.square(chosen.sum(axis=0)).mean() - np.square(chosen).mean(axis=1).sum()
        return float(self._problem.cost[self._each, choice].sum() + self.trust * cross)

    def exchanged(self, start: IntArray, most: int) -> IntArray:
        """Exchanges the formats of one or two decisions as long as that lowers the objective within the limits."""
        choice = start.copy()
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
        if not len(decisions):
            return []
        kept = self._promising(gain[decisions, columns], growth[:, decisions, columns])
        decisions, columns = decisions[kept], columns[kept]
        change, sizes = gain[decisions, columns], growth[:, decisions, columns]
        vectors = self._vectors[decisions, columns] - self._vectors[decisions, choice[decisions]]
        pairs = change[:, None] + change + 2 * self.trust / self._n_products * (vectors @ vectors.T)
        fits = (sizes[:, :, None] + sizes[:, None, :] <= slack[:, None, None]).all(axis=0)
        pairs[~fits | (decisions[:, None] == decisions)] = np.inf
        single = np.where((sizes <= slack[:, None]).all(axis=0), change, np.inf)
        first, second = np.unravel_index(int(pairs.argmin()), pairs.shape)
        alone = int(single.argmin())
        chosen = [alone] if single[alone] <= pairs[first, second] else [int(first), int(second)]
        gained = min(float(single[alone]), float(pairs[first, second]))
        if gained >= -_LEAST_GAIN * max(self.objective(choice), _SMALLEST_POWER):
            return []
        return [(int(decisions[i]), int(columns[i])) for i in chosen]

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
