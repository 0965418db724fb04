"""The default's choice: recipes by several rules are measured, and the best one on fresh seeds is the result.

Every rule errs somewhere: signed effects where they were cancelled by chance, single costs where errors add up, all of
first order where formats are coarse. A uniform recipe errs nowhere, for it predicts nothing. So each rule enters one
recipe, all are measured on the searched seeds, and the best few meet on seeds that nothing was searched on. The best
uniform recipe of at most the budget is always among those, so that the result never measures worse.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from sedimo.allocation.budget import BudgetSettings
from sedimo.allocation.effects import Effects, allocate_signed, cross_validated_noise, expected_db
from sedimo.allocation.solve import Allocation, Budget, allocate, allocate_within
from sedimo.allocation.table import SensitivityTable
from sedimo.errors import InputError
from sedimo.lab.lab import Lab
from sedimo.lab.study import Trial
from sedimo.methods.method import Finding
from sedimo.metrics.estimate import Estimate
from sedimo.metrics.signal import mean_sqnr
from sedimo.pipelines.adapter import Sampling
from sedimo.quant.formats import Format

SIGNED_NAME, SUMMED_NAME, FINE_NAME = "signed effects", "summed noise", "signed effects, 3 bits and more"
UNIFORM_NAME = "uniform "  # and the format
N_UNIFORM = 2
N_FINALISTS = 2  # besides the best uniform recipe
FINAL_FACTOR = 2  # seeds of the final per searched one
N_ENTRANTS = 5  # recipes on the searched seeds, at most
N_RUNS = N_ENTRANTS + FINAL_FACTOR * (2 + N_FINALISTS)  # of the searched seeds, at most; full precision counts too
COARSE_BITS = 2
EXCHANGED_NAME, START_NAME = "measured exchanges", "before exchanges"
MOST_EXCHANGES = 6  # of one proposal
PATIENCE = 60  # proposals in a row that are known already: the neighbourhood is used up
_TRUST_FACTORS = (0.5, 1.0, 2.0)

Noise = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Entrant:
    """A recipe that could have been the result: SQNR on the searched seeds, of a finalist on further ones, too [dB].

    `predicted_db` is what was predicted of it, None where nothing was.
    """

    name: str
    kind: Literal["effects", "uniform", "exchanges"]
    stored_bits: float
    searched: Estimate
    final: Estimate | None = None
    predicted_db: float | None = None
    is_winner: bool = False


@dataclass(frozen=True, eq=False)
class Portfolio:
    """The result, its relative noise `[n]` by sample as signed effects of `n_directions` predict it, and its rivals.

    `entrants` are all that it was chosen among; empty where there was no choice.
    """

    allocation: Allocation
    predicted: Noise
    n_directions: int
    entrants: tuple[Entrant, ...] = ()

    @property
    def sqnr_db(self) -> Estimate:
        """Mean SQNR of the recipe as it is predicted [dB]."""
        return expected_db(self.predicted, self.n_directions)


def allocate_by_effects(table: SensitivityTable, effects: Effects, budget: BudgetSettings) -> Allocation:
    """The recipe of least noise by signed effects."""
    return allocate_signed(table, effects, read_limits(table, budget))


def decide_by_effects(finding: Finding, budget: BudgetSettings) -> Portfolio:
    """The recipe of least noise by signed effects, and what it will make of new samples, cross-validated."""
    effects = finding.need(Effects)
    allocation = allocate_by_effects(finding.table, effects, budget)
    return Portfolio(allocation, _predicted(SIGNED_NAME, allocation, finding, budget), effects.shape[1])


def final_plan(lab: Lab) -> Sampling:
    """The seeds of the final, on which nothing was searched."""
    return lab.seeds.final.first(FINAL_FACTOR * lab.seeds.settings.n_seeds)


def hold_portfolio(lab: Lab, finding: Finding, budget: BudgetSettings) -> Portfolio:
    """Measures the recipe of each rule on the searched seeds, and the best of them on further ones."""
    entered, n_directions = _entered(finding, read_limits(finding.table, budget)), finding.need(Effects).shape[1]
    searched = _measured(lab, lab.seeds.search, entered)
    ranked = sorted(entered, key=lambda name: -searched[name].score)
    uniform = [name for name in ranked if name.startswith(UNIFORM_NAME)][:1]
    finalists = list(dict.fromkeys([*ranked[:N_FINALISTS], *uniform]))
    final = _measured(lab, final_plan(lab), {name: entered[name] for name in finalists}) if len(finalists) > 1 else {}
    winner = max(finalists, key=lambda name: final[name].score) if final else finalists[0]
    noise = {name: _predicted(name, entered[name], finding, budget) for name in finalists}
    entrants = tuple(
        replace(
            _entrant(name, entered[name], searched[name], final.get(name), is_winner=name == winner),
            predicted_db=expected_db(noise[name], n_directions).value if name in noise else None,
        )
        for name in ranked
    )
    return Portfolio(entered[winner], noise[winner], n_directions, entrants)


def _entered(finding: Finding, limits: Budget) -> dict[str, Allocation]:
    """The recipe of each rule, each recipe once: by its first rule, a uniform one as that."""
    table, effects = finding.table, finding.need(Effects)
    summed = allocate_within(table, limits)
    found = {SIGNED_NAME: allocate_signed(table, effects, limits, known=summed), SUMMED_NAME: summed}
    fine = _fine(table)
    if fine is not None:
        with contextlib.suppress(InputError):  # so few bits that coarse formats are needed
            among_fine = allocate_signed(fine, effects, limits)
            found[FINE_NAME] = allocate_signed(table, effects, limits, known=among_fine, most_exchanges=0)
    uniform = _uniform(finding, limits)
    found |= uniform
    first = {one.recipe.key: name for some in (found, uniform) for name, one in reversed(some.items())}
    return {name: one for name, one in found.items() if first[one.recipe.key] == name}


def _fine(table: SensitivityTable) -> SensitivityTable | None:
    """The table without its coarsest formats; None where it has none, or a decision would have nothing left."""
    kept = tuple(c for c in table.costs if c.format.bits > COARSE_BITS)
    is_whole = {c.decision for c in kept} == set(table.layers)
    return replace(table, costs=kept) if is_whole and len(kept) < len(table.costs) else None


def _uniform(finding: Finding, limits: Budget) -> dict[str, Allocation]:
    """Of the formats that all decisions can take within the budget, the largest, and those that let expect most."""
    table, effects, fitting = finding.table, finding.need(Effects), dict[str, Allocation]()
    for f in finding.bank.space.common_formats:
        if f.is_quantized:
            allocation = allocate(table, rule=f"uniform:{f}")
            sizes = [limits.sizes(table.index[key]) for key in allocation.choice.items()]
            if (np.array(sizes, dtype=np.int64).sum(axis=0) <= limits.limits(table.attention_bops)).all():
                fitting[f"{UNIFORM_NAME}{f}"] = allocation
    expected = {name: expected_db(effects.noise(a.choice), effects.shape[1]).value for name, a in fitting.items()}
    largest = sorted(fitting, key=lambda name: -fitting[name].stored_bits)[:1]  # effects may be wrong about all of them
    chosen = dict.fromkeys([*largest, *sorted(fitting, key=lambda name: -expected[name])])
    return {name: fitting[name] for name in list(chosen)[:N_UNIFORM]}


def _measured(lab: Lab, on: Sampling, entered: Mapping[str, Allocation]) -> dict[str, Trial]:
    return dict(zip(entered, lab.measure([one.recipe for one in entered.values()], on), strict=True))


def _predicted(name: str, allocation: Allocation, finding: Finding, budget: BudgetSettings) -> Noise:
    """What effects predict of a rule's recipe; cross-validated where they decided on it."""
    effects, limits = finding.need(Effects), read_limits(finding.table, budget)
    deciding: Mapping[str, Callable[[SensitivityTable, Effects], Mapping[str, Format]]] = {
        SIGNED_NAME: lambda table, shown: allocate_signed(table, shown, limits).choice,
        SUMMED_NAME: lambda table, _: allocate_within(table, limits).choice,
        FINE_NAME: lambda table, shown: allocate_signed(_fine(table) or table, shown, limits).choice,
    }
    if name not in deciding:
        return effects.noise(allocation.choice)
    return cross_validated_noise(finding.table, effects, finding.bank.candidates, deciding[name])


def _entrant(name: str, allocation: Allocation, searched: Trial, final: Trial | None, *, is_winner: bool) -> Entrant:
    return Entrant(
        name=name,
        kind="uniform" if name.startswith(UNIFORM_NAME) else "exchanges" if name == EXCHANGED_NAME else "effects",
        stored_bits=allocation.stored_bits,
        searched=mean_sqnr(searched.powers),
        final=None if final is None else mean_sqnr(final.powers),
        is_winner=is_winner,
    )


def read_limits(table: SensitivityTable, budget: BudgetSettings) -> Budget:
    """The limits of a budget for the weights of a table."""
    found = budget.resolved(table.total_params, table.full_bops)
    if found is None:
        raise InputError("a budget is needed: --bits 3.5 (or --stored-bits, --bytes), --bops 12.5%, or both")
    return found


def refine(
    lab: Lab, found: Portfolio, finding: Finding, budget: BudgetSettings, *, on: Sampling, minutes: float
) -> Portfolio:
    """As good as it gets in so many minutes: exchanges of formats that are measured, from a recipe that is good.

    Each round proposes what a few exchanges would gain by the effects of a random part of the samples, and measures it
    on a plan; what is better there is the next start. At the end, start and result meet on seeds that nothing was
    searched on. Proposals follow from their number alone and trials are kept, so that a run that was stopped goes on
    where it was, with the minutes that it has left.
    """
    limits = read_limits(finding.table, budget)
    start = best = found.allocation
    first = trial = lab.measure([start.recipe], on)[0]
    seen, spent, idle = {start.recipe.key}, first.execution.seconds, 0
    for number in itertools.count():
        if spent >= 60 * minutes or idle >= PATIENCE:
            break
        proposed = _propose(best, finding, limits, number=number)
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
    best = allocate_signed(finding.table, finding.need(Effects), limits, known=best, most_exchanges=0)  # by all samples
    before, after = lab.measure([start.recipe, best.recipe], final_plan(lab))
    is_better = after.score > before.score
    entrants = found.entrants or (_entrant(START_NAME, start, first, before, is_winner=True),)
    others = (replace(one, is_winner=one.is_winner and not is_better) for one in entrants)
    found = replace(found, entrants=(*others, _entrant(EXCHANGED_NAME, best, trial, after, is_winner=is_better)))
    if not is_better:
        return found
    left = float(after.powers.ratio.mean() / before.powers.ratio.mean())  # predictions change as measurements did
    return replace(found, allocation=best, predicted=found.predicted * left)


def _propose(best: Allocation, finding: Finding, limits: Budget, *, number: int) -> Allocation:
    """A few exchanges from the best recipe so far, by what a random draw of the samples shows."""
    generator, effects = np.random.default_rng(number), finding.need(Effects)
    shown = effects.of_samples(generator.choice(effects.shape[0], effects.shape[0]), finding.bank.candidates)
    trust = min(1.0, effects.trust * float(generator.choice(_TRUST_FACTORS)))
    most = int(generator.integers(1, MOST_EXCHANGES + 1))
    return allocate_signed(finding.table, shown, limits, known=best, trust=trust, most_exchanges=most)
