"""Small problems with signed effects, at random from a seed, and what all their choices come to."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from allocation_tables import FORMATS, table_of

from sedimo.allocation.effects import Effects
from sedimo.allocation.solve import Budget
from sedimo.allocation.table import Cost, SensitivityTable
from sedimo.quant.families.family import CostEstimate
from sedimo.quant.formats import FP16


@dataclass(frozen=True)
class SignedProblem:
    table: SensitivityTable
    effects: Effects

    @cached_property
    def inner(self):
        """Mean products of any two choices, each scaled to the power that is its cost."""
        keys = list(self.effects.products)
        vectors = np.array([self.effects.scaled(key) for key in keys])
        gram = (vectors @ vectors.T / vectors.shape[1]).tolist()
        return {(a, b): gram[i][j] for i, a in enumerate(keys) for j, b in enumerate(keys)}

    def objective(self, choice, trust: float) -> float:
        """Costs, and what each pair adds to them as far as it is trusted."""
        pairs = itertools.combinations(choice.items(), 2)
        cross = sum(2 * self.inner.get(pair, 0.0) for pair in pairs)
        return sum(self.table.index[key].cost for key in choice.items()) + trust * cross

    def choices(self):
        names = list(self.table.by_decision)
        for entries in itertools.product(*self.table.by_decision.values()):
            if all(entry.cost < np.inf for entry in entries):
                yield dict(zip(names, (entry.format for entry in entries), strict=True))

    def fits(self, choice, budget: Budget) -> bool:
        used = map(sum, zip(*(budget.sizes(self.table.index[key]) for key in choice.items()), strict=True))
        limits = budget.limits(self.table.attention_bops).tolist()
        return all(taken <= limit for taken, limit in zip(used, limits, strict=True))

    def best(self, budget: Budget, trust: float) -> float:
        """The least objective of all choices within the budget."""
        return min(self.objective(c, trust) for c in self.choices() if self.fits(c, budget))

    def budget(self, share: float, *, with_bops: bool = False, bops_share: float = 0.6) -> Budget:
        """A share of the way from the smallest to the largest choice, in stored bytes; of operations likewise."""
        rows = list(self.table.by_decision.values())

        def between(field, share):
            least, most = (sum(end(getattr(c, field) for c in row) for row in rows) for end in (min, max))
            return int(least + share * (most - least))

        bops = between("bops", bops_share) + self.table.attention_bops if with_bops else None
        return Budget(between("stored_bytes", share), "stored", bops)


def signed_problem(seed: int, n_decisions: int = 4, n_formats: int = 4, shape=(3, 2)) -> SignedProblem:
    """Effects that share a direction in part; costs that are not quite their powers; sizes that follow bits roughly.

    `[samples, directions]` products of each choice.
    """
    rng = np.random.default_rng(seed)
    entries, params, products, costs = [], {}, {}, {}
    common = rng.normal(size=shape)
    for i in range(n_decisions):
        name, level = f"d{i}", rng.lognormal(0, 0.7)
        params[name] = int(rng.integers(10, 100))
        others = [f for f in (FORMATS[j] for j in rng.permutation(len(FORMATS))) if f != FP16 or n_formats > 1]
        for f in others[:n_formats]:
            size = int(params[name] * f.bits // 2 + rng.integers(0, 10))
            cost = 0.0
            if f != FP16:
                own = rng.normal(size=shape) + rng.normal() * common
                products[name, f] = level * 2.0**-f.bits * own
                cost = float(np.square(products[name, f]).mean() * rng.lognormal(0, 0.3))
                costs[name, f] = CostEstimate(cost, 0.1 * cost, shape[0])
            bops = params[name] * (f.bits if f.family == "uaq" else 16)
            entries.append(Cost(name, f, cost, 0.1 * cost, shape[0], size - 1, size, bops))
    return SignedProblem(table_of(entries, params), Effects(products, np.ones(shape[0]), costs))
