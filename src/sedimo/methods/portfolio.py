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
from sedimo.allocation.problem import Allocation, Budget
from sedimo.allocation.solve import allocate, allocate_within
from sedimo.allocation.table import SensitivityTable
from sedimo.bank import Bank
from sedimo.errors import InputError
from sedimo.lab.lab import Lab
from sedimo.lab.study import Trial
from sedimo.metrics.estimate import Estimate
from sedimo.metrics.signal import mean_sqnr
from sedimo.pipelines.adapter import Sampling
from sedimo.quant.formats import Format

SIGNED_NAME, SUMMED_NAME, FINE_NAME = "signed effects", "summed noise", "signed effects, 3 bits and more"
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
Decide = Callable[[SensitivityTable, Effects], Mapping[str, Format]]


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


@dataclass(frozen=True)
class _Rule:
    """A rule's recipe, and how it decides on other effects, for what is predicted of it; None if always alike."""

    allocation: Allocation
    decide: Decide | None = None


def allocate_by_effects(table: SensitivityTable, effects: Effects, budget: BudgetSettings) -> Allocation:
    """The recipe of least noise by signed effects."""
    return allocate_signed(table, effects, read_limits(table, budget))


def decide_by_effects(table: SensitivityTable, effects: Effects, bank: Bank, budget: BudgetSettings) -> Portfolio:
    """The recipe of least noise by signed effects, and what it will make of new samples, cross-validated."""
    rule = _Rule(allocate_by_effects(table, effects, budget), _signed_choice(read_limits(table, budget)))
    return Portfolio(rule.allocation, _predicted(rule, table, effects, bank), effects.shape[1])


def final_plan(lab: Lab) -> Sampling:
    """The seeds of the final, on which nothing was searched."""
    return lab.seeds.final.first(FINAL_FACTOR * lab.seeds.settings.n_seeds)


def hold_portfolio(lab: Lab, table: SensitivityTable, effects: Effects, budget: BudgetSettings) -> Portfolio:
    """Measures the recipe of each rule on the searched seeds, and the best of them on further ones."""
    bank = lab.bank
    rules = _rules(table, effects, read_limits(table, budget), bank)
    searched = _measured(lab, lab.seeds.search, rules)
    ranked = sorted(rules, key=lambda name: -searched[name].score)
    uniform = [name for name in ranked if rules[name].decide is None][:1]
    finalists = list(dict.fromkeys([*ranked[:N_FINALISTS], *uniform]))
    final = _measured(lab, final_plan(lab), {name: rules[name] for name in finalists}) if len(finalists) > 1 else {}
    winner = max(finalists, key=lambda name: final[name].score) if final else finalists[0]
    noise = {name: _predicted(rules[name], table, effects, bank) for name in finalists}
    entrants = tuple(
        Entrant(
            name=name,
            kind="uniform" if rules[name].decide is None else "effects",
            stored_bits=rules[name].allocation.stored_bits,
            searched=mean_sqnr(searched[name].powers),
            final=mean_sqnr(final[name].powers) if name in final else None,
            predicted_db=expected_db(noise[name], effects.shape[1]).value if name in noise else None,
            is_winner=name == winner,
        )
        for name in ranked
    )
    return Portfolio(rules[winner].allocation, noise[winner], effects.shape[1], entrants)


def _rules(table: SensitivityTable, effects: Effects, budget: Budget, bank: Bank) -> dict[str, _Rule]:
    """Each rule with its recipe, each recipe once: by its first rule, a uniform one as that."""
    summed = allocate_within(table, budget)
    found = {
        SIGNED_NAME: _Rule(allocate_signed(table, effects, budget, known=summed), _signed_choice(budget)),
        SUMMED_NAME: _Rule(summed, lambda costs, _: allocate_within(costs, budget).choice),
    }
    fine = _fine(table)
    if fine is not None:
        with contextlib.suppress(InputError):  # so few bits that coarse formats are needed
            among_fine = allocate_signed(fine, effects, budget)
            allocation = allocate_signed(table, effects, budget, known=among_fine, most_exchanges=0)
            found[FINE_NAME] = _Rule(allocation, lambda c, e: allocate_signed(_fine(c) or c, e, budget).choice)
    uniform = {f"uniform {f}": _Rule(one) for f, one in _uniform(table, effects, budget, bank).items()}
    found |= uniform
    entered = {rule.allocation.recipe.key: name for rules in (found, uniform) for name, rule in reversed(rules.items())}
    return {name: rule for name, rule in found.items() if entered[rule.allocation.recipe.key] == name}


def _signed_choice(budget: Budget) -> Decide:
    return lambda table, effects: allocate_signed(table, effects, budget).choice


def _fine(table: SensitivityTable) -> SensitivityTable | None:
    """The table without its coarsest formats; None where it has none, or a decision would have nothing left."""
    kept = tuple(c for c in table.costs if c.format.bits > COARSE_BITS)
    is_whole = {c.decision for c in kept} == set(table.layers)
    return replace(table, costs=kept) if is_whole and len(kept) < len(table.costs) else None


def _uniform(table: SensitivityTable, effects: Effects, budget: Budget, bank: Bank) -> dict[Format, Allocation]:
    """Of the formats that all decisions can take within the budget, the largest, and those that let expect most."""
    fitting: dict[Format, Allocation] = {}
    for f in bank.space.common_formats:
        if f.is_quantized:
            allocation = allocate(table, rule=f"uniform:{f}")
            if _fits(table, allocation, budget):
                fitting[f] = allocation
    expected = {f: expected_db(effects.noise(a.choice), effects.shape[1]).value for f, a in fitting.items()}
    largest = sorted(fitting, key=lambda f: -fitting[f].stored_bits)[:1]  # effects may be wrong about all of them
    chosen = dict.fromkeys([*largest, *sorted(fitting, key=lambda f: -expected[f])])
    return {f: fitting[f] for f in list(chosen)[:N_UNIFORM]}


def _fits(table: SensitivityTable, allocation: Allocation, budget: Budget) -> bool:
    costs = [table.index[key] for key in allocation.choice.items()]
    used = np.array([budget.sizes(cost) for cost in costs], dtype=np.int64).sum(axis=0)
    return bool((used <= budget.limits(table.attention_bops)).all())


def _measured(lab: Lab, on: Sampling, rules: Mapping[str, _Rule]) -> dict[str, Trial]:
    trials = lab.measure([rule.allocation.recipe for rule in rules.values()], on)
    return dict(zip(rules, trials, strict=True))


def _predicted(rule: _Rule, table: SensitivityTable, effects: Effects, bank: Bank) -> Noise:
    if rule.decide is None:
        return effects.noise(rule.allocation.choice)
    return cross_validated_noise(table, effects, bank.candidates, rule.decide)


def read_limits(table: SensitivityTable, budget: BudgetSettings) -> Budget:
    """The limits of a budget for the weights of a table."""
    found = budget.resolved(table.total_params, table.full_bops)
    if found is None:
        raise InputError("a budget is needed: --bits 3.5 (or --stored-bits, --bytes), --bops 12.5%, or both")
    return found


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
    """As good as it gets in so many minutes: exchanges of formats that are measured, from a recipe that is good.

    Each round proposes what a few exchanges would gain by the effects of a random part of the samples, and measures it
    on a plan; what is better there is the next start. At the end, start and result meet on seeds that nothing was
    searched on. Proposals follow from their number alone and trials are kept, so that a run that was stopped goes on
    where it was, with the minutes that it has left.
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
    (first, tried), (before, after) = searched, final
    is_better = after.score > before.score
    start = Entrant(
        START_NAME,
        "effects",
        found.allocation.stored_bits,
        mean_sqnr(first.powers),
        mean_sqnr(before.powers),
        is_winner=True,
    )
    exchanged = Entrant(
        EXCHANGED_NAME,
        "exchanges",
        best.stored_bits,
        mean_sqnr(tried.powers),
        mean_sqnr(after.powers),
        is_winner=is_better,
    )
    others = (replace(one, is_winner=one.is_winner and not is_better) for one in found.entrants or (start,))
    found = replace(found, entrants=(*others, exchanged))
    if not is_better:
        return found
    left = float(after.powers.ratio.mean() / before.powers.ratio.mean())
    return replace(found, allocation=best, predicted=found.predicted * left)
