"""All methods on one model: their recipes at every budget, and the noise of each on the same fresh seeds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from _suite.models import Model
from sedimo.allocation.problem import Allocation
from sedimo.api.measuring import MeasuredTable, decide_by_effects, make_bank, measure_table
from sedimo.api.opening import Opened, open_source
from sedimo.api.order import BudgetOrder, Order, SamplingOrder
from sedimo.api.peer import PeerRecipe, decide_peer, measure_peers
from sedimo.api.portfolio import COARSE_BITS, allocate_by_effects
from sedimo.api.searching import Measuring, allocated
from sedimo.bank import Bank, Progress
from sedimo.codec import to_plain
from sedimo.errors import InputError
from sedimo.measurement import modelopt
from sedimo.measurement.study import Study
from sedimo.metrics.signal import NoisePowers
from sedimo.sensitivity.adjoint import expected_db
from sedimo.space import Recipe

BUDGETS = (3.0, 3.5, 4.0, 5.0)  # stored bits per weight
FIRST_FRESH, N_FRESH, N_STEPS = 10_000, 32, 10
DEFAULT, SIGNED, SUMMED, FINE = "default", "signed", "summed", "signed, 3 bits and more"
NEAREST, JACOBIAN, FORMER = "signed, nearest codes", "jacobian", "jacobian, nearest codes"
UNIFORM, MODELOPT = "uniform", "modelopt"
METHODS = (DEFAULT, SIGNED, SUMMED, FINE, NEAREST, JACOBIAN, FORMER, UNIFORM, MODELOPT)
PLAIN = (NEAREST, FORMER)  # codes are the nearest ones; all else but the peer has error feedback


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
    """An open model with its study and the bank of its formats; codes by error feedback or the nearest ones."""

    opened: Opened
    study: Study
    bank: Bank
    progress: Progress

    def bits(self, recipe: Recipe) -> float:
        """Stored bits per weight."""
        return 8 * self.bank.stored_bytes(recipe) / self.bank.space.params

    @classmethod
    def of(cls, opened: Opened, study: Study, progress: Progress) -> Bench:
        """With the bank that suits the source, and the formats that the bank could fit."""
        bank = make_bank(opened, study, is_exact=True, progress=progress)
        opened.space = bank.space
        return cls(opened, study, bank, progress)


def measure_model(model: Model, folder: Path, progress: Progress) -> dict[str, object]:
    """The JSON of one model. What the study in `folder` holds is not measured again."""
    begin = time.perf_counter()
    sampling = SamplingOrder(guidance=model.guidance, n_steps=N_STEPS)
    opened = open_source(Order(model.source, None, BudgetOrder(stored_bits=BUDGETS[0]), sampling=sampling))
    pipe = opened.pipe
    with Study(folder) as study:
        ours, plain = (Bench.of(replace(opened, is_compensated=c), study, progress) for c in (True, False))
        decided, notes = decide_all(ours, plain)
        rows = list(measured_rows(ours, plain, decided))
    plan = sampling.plan(pipe, range(FIRST_FRESH, FIRST_FRESH + N_FRESH))
    return {
        "model": to_plain(model),
        "guidance": plan.guidance,
        "conditions": len(plan.conditions),
        "n_decisions": len(ours.bank.space.decisions),
        "n_weights": ours.bank.space.params,
        "searched_seeds": to_plain(sampling.searching(pipe).seeds),
        "fresh_seeds": [FIRST_FRESH, FIRST_FRESH + N_FRESH - 1],
        "n_steps": N_STEPS,
        "seconds": round(time.perf_counter() - begin, 1),
        "notes": notes,
        "rows": rows,
    }


def decide_all(ours: Bench, plain: Bench) -> tuple[list[Decided], list[str]]:
    """Every method's recipe at every budget, best uniform ones left to the fresh seeds."""
    found: list[Decided] = []
    notes: list[str] = []
    if not modelopt.is_installed():
        notes.append(f"modelopt left out: {modelopt.PACKAGE} is not installed")
    for bits in BUDGETS:
        budget = BudgetOrder(stored_bits=bits)
        for bench in (ours, plain):
            bench.opened.order = replace(bench.opened.order, budget=budget)
        begin = time.perf_counter()
        measured, allocation = decide_by_effects(ours.opened, ours.study, ours.progress)
        facts = {**default_facts(measured), "seconds": round(time.perf_counter() - begin, 1)}
        chosen = {DEFAULT: allocation, **by_tables(ours, plain, budget, measured)}
        found += [Decided(bits, m, a.recipe, a.stored_bits, facts if m == DEFAULT else {}) for m, a in chosen.items()]
        if modelopt.is_installed():
            recipe, told = decide_peer(plain.opened, plain.bank, plain.study, MODELOPT, plain.progress)
            notes += [f"modelopt at {bits:g} bits: {note}" for note in told]
            if recipe is not None:
                found.append(Decided(bits, MODELOPT, recipe, recipe.paper_bits, {}))
    return found, notes


def by_tables(ours: Bench, plain: Bench, budget: BudgetOrder, measured: MeasuredTable) -> dict[str, Allocation]:
    """The recipes that follow from a table without measuring any."""
    found = {SUMMED: allocated(measured.table, budget)}
    for method, bench in ((JACOBIAN, ours), (FORMER, plain)):
        found[method] = allocated(measure_table(bench.opened, "jacobian", bench.study, bench.progress).table, budget)
    nearest = measure_table(plain.opened, "adjoint", plain.study, plain.progress)
    for method, one in ((SIGNED, measured), (NEAREST, nearest)):
        if one.effects is not None:
            found[method] = allocate_by_effects(one.table, one.effects, budget)
    if measured.effects is not None:
        fine = replace(measured.table, costs=tuple(c for c in measured.table.costs if c.format.bits > COARSE_BITS))
        with contextlib.suppress(InputError):  # a budget below 3 bits and their scales
            found[FINE] = allocate_by_effects(fine, measured.effects, budget)
    return found


def default_facts(measured: MeasuredTable) -> dict[str, object]:
    """What the default predicted, and which rule's recipe won."""
    if measured.predicted is None or measured.effects is None:
        return {}
    return {
        "predicted": to_plain(expected_db(measured.predicted, measured.effects.shape[1])),
        "winner": next((e.name for e in measured.entrants if e.is_winner), ""),
        "entrants": to_plain(measured.entrants),
    }


def measured_rows(ours: Bench, plain: Bench, decided: list[Decided]) -> Iterator[dict[str, object]]:
    """Each recipe on the fresh seeds, and the best of all uniform ones of at most each budget."""
    pipe, space = ours.opened.pipe, ours.bank.space
    plan = ours.opened.order.sampling.plan(pipe, range(FIRST_FRESH, FIRST_FRESH + N_FRESH))
    uniform = {str(f): space.uniform(f) for f in space.common_formats}
    uniform = {name: recipe for name, recipe in uniform.items() if ours.bits(recipe) <= max(BUDGETS)}
    powers: dict[tuple[bool, str], NoisePowers] = {}
    for is_plain, bench, more in ((False, ours, list(uniform.values())), (True, plain, [])):
        own = [d.recipe for d in decided if isinstance(d.recipe, Recipe) and (d.method in PLAIN) == is_plain]
        fresh = Measuring.on(pipe, bench.bank, bench.study, plan, progress=bench.progress)
        powers |= {(is_plain, t.recipe.key): t.powers for t in fresh.trials([*own, *more])}
    peers = [d.recipe for d in decided if isinstance(d.recipe, PeerRecipe)]
    digest = plain.bank.weights_digest
    of_peers = measure_peers(pipe, plain.study, plan, peers, weights_digest=digest, progress=plain.progress)
    for bits in BUDGETS:
        fitting = {name: recipe for name, recipe in uniform.items() if ours.bits(recipe) <= bits}
        if fitting:
            best = max(fitting, key=lambda name: powers[False, fitting[name].key].sqnr_db.mean())
            facts: dict[str, object] = {"format": best, "n_formats": len(fitting)}
            decided.append(Decided(bits, UNIFORM, fitting[best], ours.bits(fitting[best]), facts))
    for one in decided:
        is_peer = isinstance(one.recipe, PeerRecipe)
        yield {
            "budget": one.budget,
            "method": one.method,
            "stored_bits": one.stored_bits,
            "recipe": one.recipe.key,
            **one.facts,
            "powers": to_plain(of_peers[one.recipe.key] if is_peer else powers[one.method in PLAIN, one.recipe.key]),
        }
