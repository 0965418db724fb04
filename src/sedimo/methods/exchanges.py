"""As good as it gets in so many minutes: exchanges of formats that are measured, from a recipe that is good already.

Each round proposes what a few exchanges would gain by the effects of a random part of the samples, and measures it on
the searched seeds; what is better there is the next start. At the end, start and result meet on seeds that nothing was
searched on. Proposals follow from their number alone and trials are kept, so that a run that was stopped goes on where
it was, with the minutes that it has left.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from sedimo.allocation.budget import BudgetSettings
from sedimo.allocation.effects import Effects, allocate_signed
from sedimo.allocation.problem import Allocation, Budget
from sedimo.allocation.table import SensitivityTable
from sedimo.bank import Bank
from sedimo.lab.lab import Lab
from sedimo.lab.study import Trial
from sedimo.methods.portfolio import Portfolio, final_plan, read_limits
from sedimo.methods.prediction import Entrant
from sedimo.metrics.signal import mean_sqnr
from sedimo.pipelines.adapter import Sampling

NAME, START_NAME = "measured exchanges", "before exchanges"
MOST_EXCHANGES = 6  # of one proposal
PATIENCE = 60  # proposals in a row that are known already: the neighbourhood is used up
_TRUST_FACTORS = (0.5, 1.0, 2.0)


def refine(
    lab: Lab,
    found: Portfolio,
    table: SensitivityTable,
    effects: Effects,
    budget: BudgetSettings,
    *,
    on: Sampling,
    minutes: float,
) -> Portfolio:
    """The better of what was found and what exchanges that are measured on a plan make of it in so many minutes.

    Raises:
        Interrupted: Ctrl-C; what was measured is kept, the same call goes on.
    """
    limits = read_limits(table, budget)
    start = best = found.allocation
    first = trial = lab.measure([start.recipe], on)[0]
    seen, spent, idle = {start.recipe.key}, first.execution.seconds, 0
    for number in itertools.count():
        if spent >= 60 * minutes or idle >= PATIENCE:
            break
        proposed = _propose(best, table, effects, lab.bank, limits, number=number)
        idle += 1
        if proposed.recipe.key in seen:
            continue
        seen.add(proposed.recipe.key)
        idle, tried = 0, lab.measure([proposed.recipe], on)[0]
        spent += tried.execution.seconds
        if tried.score > trial.score:
            best, trial = proposed, tried
    if best.recipe.key == start.recipe.key:
        return found
    best = allocate_signed(table, effects, limits, known=best, most_exchanges=0)  # by all samples
    before, after = lab.measure([start.recipe, best.recipe], final_plan(lab))
    return _better(found, best, searched=(first, trial), final=(before, after))


def _propose(
    best: Allocation, table: SensitivityTable, effects: Effects, bank: Bank, budget: Budget, *, number: int
) -> Allocation:
    """A few exchanges from the best recipe so far, by what a random draw of the samples shows."""
    generator = np.random.default_rng(number)
    shown = effects.of_samples(generator.choice(effects.shape[0], effects.shape[0]), bank.candidates)
    trust = min(1.0, effects.trust * float(generator.choice(_TRUST_FACTORS)))
    most = int(generator.integers(1, MOST_EXCHANGES + 1))
    return allocate_signed(table, shown, budget, known=best, trust=trust, most_exchanges=most)


def _better(
    found: Portfolio, best: Allocation, *, searched: tuple[Trial, Trial], final: tuple[Trial, Trial]
) -> Portfolio:
    """The better of start and result on the final's seeds; what is predicted changes as what was measured did."""
    before, after = final
    is_better = after.score > before.score
    known = found.entrants or (
        Entrant(
            START_NAME,
            "effects",
            found.allocation.stored_bits,
            mean_sqnr(searched[0].powers),
            mean_sqnr(before.powers),
            is_winner=True,
        ),
    )
    others = tuple(replace(one, is_winner=one.is_winner and not is_better) for one in known)
    exchanged = Entrant(
        NAME, "exchanges", best.stored_bits, mean_sqnr(searched[1].powers), mean_sqnr(after.powers), is_winner=is_better
    )
    entrants = (*others, exchanged)
    if not is_better:
        return replace(found, entrants=entrants)
    left = float(after.powers.ratio.mean() / before.powers.ratio.mean())
    return Portfolio(best, found.predicted * left, entrants)
