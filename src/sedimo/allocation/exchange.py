"""The recipe whose errors push the final latents least, signs kept: errors of decisions may add up, or cancel.

With a vector of signed effects for each choice, the noise of a recipe is the mean square of the sum of its vectors. Its
expectation has the costs of single choices, which are well known, and cross terms of pairs, which are few dozen numbers
for thousands of pairs: whoever minimises them freely finds cancellations that are none. So cross terms are shrunk,

    noise = sum of costs + trust * (mean square of the sum - sum of mean squares),

and what is predicted of the result is cross-validated. That is a quadratic multiple-choice problem. Exchanges of one or
two formats at a time start from the exact solution without cross terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from sedimo.allocation.effects import Effects
from sedimo.allocation.problem import Allocation, Budget, IntArray, Outcome, as_variant, record
from sedimo.allocation.solve import allocate_within
from sedimo.allocation.table import Cost, SensitivityTable
from sedimo.bank import Candidate
from sedimo.quant.formats import Format

SIGNED, SUMMED = "signed", "milp"  # rules, by name
N_FOLDS = 4
_N_MOVES = 512  # of which pairs are tried
MOST_EXCHANGES = 4000
_LEAST_GAIN = 1e-7  # relative
_SMALLEST_POWER = 1e-30

Floats = npt.NDArray[np.float64]
Decide = Callable[[SensitivityTable, Effects], Mapping[str, Format]]


@dataclass(frozen=True, eq=False)
class _Signed:
    """All choices as arrays: D decisions, K options at most, M products, R limited resources.

    Attributes:
        entries: what stands behind the columns, per decision.
        cost: `[D, K]`, infinite where there is no option.
        vectors: `[D, K, M]`, scaled so that their mean square is the cost.
        size: `[R, D, K]`.
        limit: `[R]`.
        trust: of cross terms.
    """

    entries: tuple[tuple[Cost, ...], ...]
    cost: Floats
    vectors: Floats
    size: IntArray
    limit: IntArray
    trust: float

    def objective(self, choice: IntArray) -> float:
        """The shrunk noise of a choice `[D]` of columns."""
        each = np.arange(len(choice))
        total = self.vectors[each, choice].sum(axis=0)
        own = np.square(self.vectors[each, choice]).mean(axis=1).sum()
        return float(self.cost[each, choice].sum() + self.trust * (np.square(total).mean() - own))


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

    Raises:
        InputError: no choice keeps the budget.
    """
    is_summed = known is not None and known.rule == SUMMED
    summed = known if known and is_summed else allocate_within(table, budget, rule=SUMMED)
    start = known or summed
    problem = _arrays(table, effects, budget, effects.trust if trust is None else trust)
    columns = [
        next(k for k, entry in enumerate(row) if entry.format == start.choice[row[0].decision])
        for row in problem.entries
    ]
    choice = _exchanged(problem, np.array(columns, dtype=np.int64), most_exchanges)
    chosen = tuple(as_variant(row[int(k)]) for row, k in zip(problem.entries, choice, strict=True))
    outcome = Outcome(chosen, 0.0, 0.0, summed.n_solves, is_heuristic=True)
    found = record(table, budget, SIGNED, outcome)
    objective, bound = problem.objective(choice), (1 - problem.trust) * summed.bound
    ratio = objective / max(found.objective, _SMALLEST_POWER)
    return replace(
        found,
        objective=objective,
        standard_error=found.standard_error * ratio,
        bound=min(bound, objective),
        gap=0.0 if objective <= 0 else (objective - min(bound, objective)) / objective,
    )


def cross_validated_noise(
    table: SensitivityTable, effects: Effects, candidates: Iterable[Candidate], decide: Decide
) -> Floats:
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


def _arrays(table: SensitivityTable, effects: Effects, budget: Budget, trust: float) -> _Signed:
    """Every allowed choice; one that costs more and takes more may still cancel something."""
    rows = [tuple(c for c in table.by_decision[name] if math.isfinite(c.cost)) for name in sorted(table.by_decision)]
    limit = budget.limits(table.attention_bops)
    shape = (len(rows), max(map(len, rows)))
    cost, size = np.full(shape, np.inf), np.zeros((len(limit), *shape), dtype=np.int64)
    vectors = np.zeros((*shape, math.prod(effects.shape)))
    for i, row in enumerate(rows):
        for k, entry in enumerate(row):
            cost[i, k], size[:, i, k] = entry.cost, budget.sizes(entry)
            if (entry.decision, entry.format) in effects.products:
                vectors[i, k] = effects.scaled((entry.decision, entry.format))
    return _Signed(tuple(rows), cost, vectors, size, limit, trust)


def _exchanged(problem: _Signed, start: IntArray, most: int) -> IntArray:
    """Exchanges the formats of one or two decisions as long as that lowers the objective within the limits."""
    choice = start.copy()
    moves = _Moves(problem)
    for _ in range(most):
        found = moves.best(choice)
        if not found:
            break
        for decision, column in found:
            choice[decision] = column
    return choice


class _Moves:
    """What single exchanges change, and the best of them or of their pairs."""

    def __init__(self, problem: _Signed) -> None:
        self._problem, self._each = problem, np.arange(len(problem.cost))
        self._n_products = problem.vectors.shape[2]
        self._grams = np.einsum("dkm,dlm->dkl", problem.vectors, problem.vectors) / self._n_products  # D K K

    def best(self, choice: IntArray) -> list[tuple[int, int]]:
        """The exchanges (decision, column) of the step that gains most; none where nothing gains."""
        problem, each = self._problem, self._each
        gain, growth = self._single(choice)
        slack = problem.limit - problem.size[:, each, choice].sum(axis=1)
        decisions, columns = np.nonzero(np.isfinite(gain) & (np.arange(gain.shape[1]) != choice[:, None]))
        if not len(decisions):
            return []
        kept = self._promising(gain[decisions, columns], growth[:, decisions, columns])
        decisions, columns = decisions[kept], columns[kept]
        change, sizes = gain[decisions, columns], growth[:, decisions, columns]
        vectors = problem.vectors[decisions, columns] - problem.vectors[decisions, choice[decisions]]
        pairs = change[:, None] + change + 2 * problem.trust / self._n_products * (vectors @ vectors.T)
        fits = (sizes[:, :, None] + sizes[:, None, :] <= slack[:, None, None]).all(axis=0)
        pairs[~fits | (decisions[:, None] == decisions)] = np.inf
        single = np.where((sizes <= slack[:, None]).all(axis=0), change, np.inf)
        first, second = np.unravel_index(int(pairs.argmin()), pairs.shape)
        alone = int(single.argmin())
        chosen = [alone] if single[alone] <= pairs[first, second] else [int(first), int(second)]
        gained = min(float(single[alone]), float(pairs[first, second]))
        if gained >= -_LEAST_GAIN * max(problem.objective(choice), _SMALLEST_POWER):
            return []
        return [(int(decisions[i]), int(columns[i])) for i in chosen]

    def _single(self, choice: IntArray) -> tuple[Floats, IntArray]:
        """Of every single exchange: the change of the objective `[D, K]`, and of the sizes `[R, D, K]`."""
        problem, each = self._problem, self._each
        total = problem.vectors[each, choice].sum(axis=0)
        along = problem.vectors @ total / self._n_products  # D K
        own = self._grams[each, :, choice]  # D K, products with the present choice
        cross = 2 * (along - along[each, choice][:, None]) - 2 * (own - own[each, choice][:, None])
        gain = problem.cost - problem.cost[each, choice][:, None] + problem.trust * cross
        return gain, problem.size - problem.size[:, each, choice][:, :, None]

    def _promising(self, gain: Floats, growth: IntArray) -> IntArray:
        """The moves that gain most at the price that size has now."""
        size = (growth / np.maximum(self._problem.limit, 1)[:, None]).sum(axis=0)
        is_buying = (size > 0) & (gain < 0)
        price = float(np.median(np.sort(-gain[is_buying] / size[is_buying])[-20:])) if is_buying.any() else 0.0
        return np.argsort(gain + price * size, kind="stable")[:_N_MOVES]
