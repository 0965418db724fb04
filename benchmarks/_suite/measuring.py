"""All methods on one model: their recipes at every budget, and the noise of each on the same fresh seeds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from _suite.models import Model
from sedimo.api.measuring import MeasuredTable, decide_by_effects, make_bank, measure_table
from sedimo.api.opening import Opened, open_source
from sedimo.api.order import BudgetOrder, Order, SamplingOrder
from sedimo.api.peer import PeerRecipe, decide_peer, measure_peers
from sedimo.api.portfolio import FINAL_FACTOR, Portfolio, allocate_by_effects, hold_portfolio
from sedimo.api.searching import Measuring, allocated
from sedimo.bank import Bank, Progress
from sedimo.codec import to_plain
from sedimo.measurement import modelopt
from sedimo.measurement.study import Study
from sedimo.quant.formats import WIDE_FORMATS
from sedimo.sensitivity.adjoint import adjoint_table, effects_of, expected_db
from sedimo.space import Recipe, search_space

BUDGETS = (3.0, 3.5, 4.0, 5.0)  # stored bits per weight
FIRST_FRESH, N_FRESH, N_STEPS = 10_000, 32, 10
DEFAULT, SIGNED, SUMMED, JACOBIAN, ERROR = "default", "signed", "summed", "jacobian", "error"
UNIFORM, MODELOPT, FINE = "uniform", "modelopt", "default, 3 bits and more"
METHODS = (DEFAULT, SIGNED, SUMMED, JACOBIAN, ERROR, UNIFORM, MODELOPT)
FINE_BUDGETS = (3.5, 4.0, 5.0)
FINE_FORMATS = ",".join(str(f) for f in WIDE_FORMATS if f.bits > 2)


@dataclass
class Decided:
    """What a method chose at a budget; `facts` go into the JSON."""

    budget: float
    method: str
    recipe: Recipe | PeerRecipe
    stored_bits: float
    facts: dict[str, object]


@dataclass
class Bench:
    """An open model with its study and the bank of its formats."""

    opened: Opened
    study: Study
    bank: Bank
    progress: Progress

    @property
    def order(self) -> Order:
        """What is ordered of it now."""
        return self.opened.order

    def bits(self, recipe: Recipe) -> float:
        """Stored bits per weight."""
        return 8 * self.bank.stored_bytes(recipe) / self.bank.space.params


def measure_model(model: Model, folder: Path, progress: Progress) -> dict[str, object]:
    """The JSON of one model. What the study in `folder` holds is not measured again."""
    begin = time.perf_counter()
    sampling = SamplingOrder(guidance=model.guidance, n_steps=N_STEPS)
    opened = open_source(Order(model.source, None, BudgetOrder(stored_bits=BUDGETS[0]), sampling=sampling))
    with Study(folder) as study:
        bank = make_bank(opened, study, is_exact=True, progress=progress)
        opened.space = bank.space
        bench = Bench(opened, study, bank, progress)
        decided, notes = decide_all(bench)
        rows = list(measured_rows(bench, decided))
    plan = sampling.plan(opened.pipe, range(FIRST_FRESH, FIRST_FRESH + N_FRESH))
    return {
        "model": to_plain(model),
        "guidance": plan.guidance,
        "conditions": len(plan.conditions),
        "n_decisions": len(bank.space.decisions),
        "n_weights": bank.space.params,
        "searched_seeds": to_plain(sampling.searching(opened.pipe).seeds),
        "fresh_seeds": [FIRST_FRESH, FIRST_FRESH + N_FRESH - 1],
        "n_steps": N_STEPS,
        "seconds": round(time.perf_counter() - begin, 1),
        "notes": notes,
        "rows": rows,
    }


def decide_all(bench: Bench) -> tuple[list[Decided], list[str]]:
    """Every method's recipe at every budget, best uniform ones left to the fresh seeds."""
    found: list[Decided] = []
    notes: list[str] = []
    fine = fine_bench(bench)
    if not modelopt.is_installed():
        notes.append(f"modelopt left out: {modelopt.PACKAGE} is not installed")
    for bits in BUDGETS:
        budget = BudgetOrder(stored_bits=bits)
        bench.opened.order = replace(bench.order, budget=budget)
        begin = time.perf_counter()
        measured, allocation = decide_by_effects(bench.opened, bench.study, bench.progress)
        found.append(Decided(bits, DEFAULT, allocation.recipe, allocation.stored_bits, default_facts(measured)))
        found[-1].facts["seconds"] = round(time.perf_counter() - begin, 1)
        found += by_tables(bench, bits, measured)
        if bits in FINE_BUDGETS:
            found.append(decide_fine(fine, bits, measured))
        if modelopt.is_installed():
            recipe, told = decide_peer(bench.opened, bench.bank, bench.study, MODELOPT, bench.progress)
            notes += [f"modelopt at {bits:g} bits: {note}" for note in told]
            if recipe is not None:
                found.append(Decided(bits, MODELOPT, recipe, recipe.paper_bits, {}))
    return found, notes


def by_tables(bench: Bench, bits: float, measured: MeasuredTable) -> Iterator[Decided]:
    """The recipes that follow from a table without measuring any."""
    budget = BudgetOrder(stored_bits=bits)
    tables = {m: measure_table(bench.opened, m, bench.study, bench.progress).table for m in (JACOBIAN, ERROR)}
    found = {SUMMED: allocated(measured.table, budget)} | {m: allocated(t, budget) for m, t in tables.items()}
    if measured.effects is not None:
        found[SIGNED] = allocate_by_effects(measured.table, measured.effects, budget)
    for method, allocation in found.items():
        yield Decided(bits, method, allocation.recipe, allocation.stored_bits, {})


def fine_bench(bench: Bench) -> Bench:
    """The same model without formats of 2 bits."""
    opened = replace(bench.opened, space=search_space(bench.opened.graph, FINE_FORMATS), _pipe=bench.opened.pipe)
    bank = make_bank(opened, bench.study, is_exact=True, progress=bench.progress)
    return Bench(opened, bench.study, bank, bench.progress)


def decide_fine(fine: Bench, bits: float, wide: MeasuredTable) -> Decided:
    """What the default does without formats of 2 bits.

    Products of a format do not depend on which others are looked at, so they are those of the wide choice; all that
    follows from them is done anew.
    """
    (probe,) = (one.adjoint for one in wide.probes if one.adjoint is not None)
    candidates, plan = fine.bank.candidates, fine.order.sampling
    pipe = fine.opened.pipe
    plans = (plan.searching(pipe), plan.deciding(pipe).first(FINAL_FACTOR * plan.n_seeds))
    searching, deciding = (Measuring.on(pipe, fine.bank, fine.study, p, progress=fine.progress) for p in plans)
    effects = effects_of(candidates, probe)
    portfolio = hold_portfolio(
        adjoint_table(fine.bank.space, candidates, probe),
        effects,
        fine.bank,
        BudgetOrder(stored_bits=bits),
        searching=searching,
        deciding=deciding,
    )
    facts = portfolio_facts(portfolio, effects.shape[1])
    return Decided(bits, FINE, portfolio.allocation.recipe, portfolio.allocation.stored_bits, facts)


def default_facts(measured: MeasuredTable) -> dict[str, object]:
    """What the default predicted, and which rule's recipe won."""
    if measured.predicted is None or measured.effects is None:
        return {}
    return {
        "predicted": to_plain(expected_db(measured.predicted, measured.effects.shape[1])),
        "winner": next((e.name for e in measured.entrants if e.is_winner), ""),
        "entrants": to_plain(measured.entrants),
    }


def portfolio_facts(portfolio: Portfolio, n_directions: int) -> dict[str, object]:
    """As `default_facts`."""
    return {
        "predicted": to_plain(expected_db(portfolio.predicted, n_directions)),
        "winner": next((e.name for e in portfolio.entrants if e.is_winner), ""),
    }


def measured_rows(bench: Bench, decided: list[Decided]) -> Iterator[dict[str, object]]:
    """Each recipe on the fresh seeds, and the best of all uniform ones of at most each budget."""
    pipe, space = bench.opened.pipe, bench.bank.space
    plan = bench.order.sampling.plan(pipe, range(FIRST_FRESH, FIRST_FRESH + N_FRESH))
    fresh = Measuring.on(pipe, bench.bank, bench.study, plan, progress=bench.progress)
    uniform = {str(f): space.uniform(f) for f in space.common_formats}
    uniform = {name: recipe for name, recipe in uniform.items() if bench.bits(recipe) <= max(BUDGETS)}
    own = [d.recipe for d in decided if isinstance(d.recipe, Recipe)]
    trials = {t.recipe.key: t for t in fresh.trials([*own, *uniform.values()])}
    peers = [d.recipe for d in decided if isinstance(d.recipe, PeerRecipe)]
    digest = bench.bank.weights_digest
    of_peers = measure_peers(pipe, bench.study, plan, peers, weights_digest=digest, progress=bench.progress)
    for bits in BUDGETS:
        fitting = {name: recipe for name, recipe in uniform.items() if bench.bits(recipe) <= bits}
        if fitting:
            best = max(fitting, key=lambda name: trials[fitting[name].key].score)
            facts: dict[str, object] = {"format": best, "n_formats": len(fitting)}
            decided.append(Decided(bits, UNIFORM, fitting[best], bench.bits(fitting[best]), facts))
    for one in decided:
        powers = of_peers[one.recipe.key] if isinstance(one.recipe, PeerRecipe) else trials[one.recipe.key].powers
        yield {
            "budget": one.budget,
            "method": one.method,
            "stored_bits": one.stored_bits,
            "recipe": one.recipe.key,
            **one.facts,
            "powers": to_plain(powers),
        }
