"""The last choice of a search: a few finalists, measured on seeds that nothing was searched on.

Whatever was best on the seeds of the search is best there partly by luck, and a predictor may be wrong where it is
confident. So the recipe that it builds has to hold its own: against the one of the prior alone, one half way between
both, and the best recipes that were measured on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sedimo.allocation.fixed import allocate_given
from sedimo.allocation.problem import read_budget
from sedimo.api.order import BudgetOrder
from sedimo.api.predicting import Known
from sedimo.api.searching import Finalist, Measuring, Search, allocated, keeps
from sedimo.sensitivity.combine import geometric_mean
from sedimo.space import Recipe

BUILT = "built by the predictor"
MEASURED = ("best of the trials", "second of the trials")


def hold_finals(known: Known, found: Search, budget: BudgetOrder, measuring: Measuring) -> Search:
    """The search with its best finalist as its allocation; `measuring` is on seeds that the search has not seen.

    Raises:
        Interrupted: Ctrl-C; what was measured is kept, the same call goes on.
    """
    recipes = finalists(known, found, budget)
    trials = measuring.trials(list(recipes.values()))
    field = tuple(Finalist(name, trial) for name, trial in zip(recipes, trials, strict=True))
    best = max(field, key=lambda f: f.trial.score)
    if best.name == BUILT:
        return replace(found, finalists=field)
    own = read_budget(known.space.params, **budget.named(known.space.full_bops))
    chosen = allocate_given(found.table, known.space.choice(best.trial.recipe), own)
    return replace(found, allocation=chosen, finalists=field)


def finalists(known: Known, found: Search, budget: BudgetOrder) -> Mapping[str, Recipe]:
    """The recipes among which the final decides, by name, each once; the predictor's own first."""
    prior = known.table
    mean = geometric_mean(found.table, prior)
    entries = {
        BUILT: found.allocation.recipe,
        f"by {prior.method} alone": allocated(prior, budget).recipe,
        f"half way to {prior.method}": allocated(mean, budget).recipe,
    }
    within = [t for t in found.trials if keeps(known, t.recipe, budget)]
    within.sort(key=lambda t: -t.score)
    entries |= {name: trial.recipe for name, trial in zip(MEASURED, within, strict=False)}
    first = {recipe.key: name for name, recipe in reversed(entries.items())}
    return {name: recipe for name, recipe in entries.items() if first[recipe.key] == name}
