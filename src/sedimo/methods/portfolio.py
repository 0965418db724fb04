"""The default's choice: recipes by several rules are measured, and the best one on fresh seeds is the result.

Every rule errs somewhere: signed effects where they were cancelled by chance, single costs where errors add up, all of
first order where formats are coarse. A uniform recipe errs nowhere, for it predicts nothing. So each rule enters one
recipe, all are measured on the searched seeds, and the best few meet on seeds that nothing was searched on. The best
uniform recipe of at most the budget is always among those, so that the result never measures worse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

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
from sedimo.methods.prediction import Entrant, EntrantKind
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

Noise = npt.NDArray[np.float64]
Decide = Callable[[SensitivityTable, Effects], Mapping[str, Format]]


@dataclass(frozen=True)
class Portfolio:
    """The result of the default, what was predicted of it `[n]` (relative noise), and all that entered."""

    allocation: Allocation
    predicted: Noise
    entrants: tuple[Entrant, ...]


@dataclass(frozen=True)
class _Rule:
    """A rule's recipe, and how it decides on other effects, for what is predicted of it."""

    kind: EntrantKind
    allocation: Allocation
    decide: Decide


def allocate_by_effects(table: SensitivityTable, effects: Effects, budget: BudgetSettings) -> Allocation:
    """The recipe of least noise by signed effects."""
    return allocate_signed(table, effects, read_limits(table, budget))


def predict(table: SensitivityTable, effects: Effects, bank: Bank, budget: BudgetSettings) -> Noise:
    """What `allocate_by_effects` will make of new samples: relative noise `[n]`, cross-validated."""
    return cross_validated_noise(table, effects, bank.candidates, _signed_choice(read_limits(table, budget)))


def final_plan(lab: Lab) -> Sampling:
    """The seeds of the final, on which nothing was searched."""
    return lab.seeds.final.first(FINAL_FACTOR * lab.seeds.settings.n_seeds)


def hold_portfolio(lab: Lab, table: SensitivityTable, effects: Effects, budget: BudgetSettings) -> Portfolio:
    """Measures the recipe of each rule on the searched seeds, and the best of them on further ones.

    Raises:
        InputError: a budget that no recipe keeps.
        Interrupted: Ctrl-C; what was measured is kept, the same call goes on.
    """
    bank = lab.bank
    rules = _rules(table, effects, read_limits(table, budget), bank)
    searched = _measured(lab, lab.seeds.search, rules)
    ranked = sorted(rules, key=lambda name: -searched[name].score)
    uniform = [name for name in ranked if rules[name].kind == "uniform"][:1]
    finalists = list(dict.fromkeys([*ranked[:N_FINALISTS], *uniform]))
    final = _measured(lab, final_plan(lab), {name: rules[name] for name in finalists}) if len(finalists) > 1 else {}
    winner = max(finalists, key=lambda name: final[name].score) if final else finalists[0]
    noise = {name: _predicted(rules[name], table, effects, bank) for name in finalists}
    entrants = tuple(
        Entrant(
            name=name,
            kind=rules[name].kind,
            stored_bits=rules[name].allocation.stored_bits,
            searched=mean_sqnr(searched[name].powers),
            final=mean_sqnr(final[name].powers) if name in final else None,
            predicted_db=expected_db(noise[name], effects.shape[1]).value if name in noise else None,
            is_winner=name == winner,
        )
        for name in ranked
    )
    return Portfolio(rules[winner].allocation, noise[winner], entrants)


def _rules(table: SensitivityTable, effects: Effects, budget: Budget, bank: Bank) -> dict[str, _Rule]:
    """Each rule with its recipe, each recipe once: by its first rule, a uniform one as that."""
    summed = allocate_within(table, budget)
    found = {
        SIGNED_NAME: _Rule("effects", allocate_signed(table, effects, budget, known=summed), _signed_choice(budget)),
        SUMMED_NAME: _Rule("effects", summed, lambda costs, _: allocate_within(costs, budget).choice),
    }
    fine = _fine(table)
    if fine is not None:
        try:
            among_fine = allocate_signed(fine, effects, budget)
            allocation = allocate_signed(table, effects, budget, known=among_fine, most_exchanges=0)
            found[FINE_NAME] = _Rule(
                "effects", allocation, lambda c, e: allocate_signed(_fine(c) or c, e, budget).choice
            )
        except InputError:  # so few bits that coarse formats are needed
            pass
    found |= {
        f"uniform {f}": _Rule("uniform", a, _always(a)) for f, a in _uniform(table, effects, budget, bank).items()
    }
    uniform = {name: rule for name, rule in found.items() if rule.kind == "uniform"}
    entered = {rule.allocation.recipe.key: name for rules in (found, uniform) for name, rule in reversed(rules.items())}
    return {name: rule for name, rule in found.items() if entered[rule.allocation.recipe.key] == name}


def _signed_choice(budget: Budget) -> Decide:
    return lambda table, effects: allocate_signed(table, effects, budget).choice


def _always(allocation: Allocation) -> Decide:
    return lambda _table, _effects: allocation.choice


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
    if rule.kind == "uniform":
        return effects.noise(rule.allocation.choice)
    return cross_validated_noise(table, effects, bank.candidates, rule.decide)


def read_limits(table: SensitivityTable, budget: BudgetSettings) -> Budget:
    """The limits of a budget for the weights of a table.

    Raises:
        InputError: there are none.
    """
    found = budget.resolved(table.total_params, table.full_bops)
    if found is None:
        raise InputError("a budget is needed: --bits 3.5 (or --stored-bits, --bytes), --bops 12.5%, or both")
    return found
