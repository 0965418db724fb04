"""All methods on one model: their recipes at every budget, and the noise of each on the same fresh seeds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import sedimo
from _suite.models import Model
from sedimo.allocation.budget import BudgetSettings, allocated
from sedimo.allocation.effects import Effects
from sedimo.allocation.solve import Allocation
from sedimo.codec import to_plain
from sedimo.errors import InputError
from sedimo.methods import modelopt
from sedimo.methods.adjoint import ADJOINT, AdjointSettings
from sedimo.methods.method import Finding, Task
from sedimo.methods.modelopt import MODELOPT as PEER
from sedimo.methods.modelopt import PeerRecipe, measure_peers
from sedimo.methods.portfolio import COARSE_BITS, Portfolio, allocate_by_effects
from sedimo.metrics.signal import NoisePowers
from sedimo.progress import Progress
from sedimo.space import Recipe
from sedimo.treatments.error_feedback import FeedbackSettings, feed_back

BUDGETS = (3.0, 3.5, 4.0, 5.0)  # stored bits per weight
FRESH, N_STEPS = range(10_000, 10_032), 10
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


def stored_bits(lab: sedimo.Lab, recipe: Recipe) -> float:
    """Per weight."""
    return 8 * lab.bank.stored_bytes(recipe) / lab.bank.space.params


def measure_model(model: Model, folder: Path, progress: Progress) -> dict[str, object]:
    """The JSON of one model. What the study in `folder` holds is not measured again."""
    begin = time.perf_counter()
    sampling = sedimo.SamplingSettings(guidance=model.guidance, n_steps=N_STEPS)
    plain = sedimo.Lab(model.source, store=folder, sampling=sampling, progress=progress)
    ours = plain.treated(feed_back(plain, FeedbackSettings()))
    decided, notes = decide_all(ours, plain)
    rows = list(measured_rows(ours, plain, decided))
    plan = plain.seeds.plan(FRESH)
    return {
        "model": to_plain(model),
        "guidance": plan.guidance,
        "conditions": len(plan.conditions),
        "n_decisions": len(ours.bank.space.decisions),
        "n_weights": ours.bank.space.params,
        "searched_seeds": to_plain(plain.seeds.search.seeds),
        "fresh_seeds": [FRESH[0], FRESH[-1]],
        "n_steps": N_STEPS,
        "seconds": round(time.perf_counter() - begin, 1),
        "notes": notes,
        "rows": rows,
    }


def decide_all(ours: sedimo.Lab, plain: sedimo.Lab) -> tuple[list[Decided], list[str]]:
    """Every method's recipe at every budget, best uniform ones left to the fresh seeds."""
    found: list[Decided] = []
    notes: list[str] = []
    if not modelopt.is_installed():
        notes.append(f"modelopt left out: {modelopt.PACKAGE} is not installed")
    for bits in BUDGETS:
        budget = BudgetSettings(stored_bits=bits)
        begin = time.perf_counter()
        default = ADJOINT.find(ours, Task(AdjointSettings(is_portfolio=True), budget))
        facts = {**default_facts(default), "seconds": round(time.perf_counter() - begin, 1)}
        chosen = {DEFAULT: default.decided, **by_tables(ours, plain, budget, default)}
        found += [Decided(bits, m, a.recipe, a.stored_bits, facts if m == DEFAULT else {}) for m, a in chosen.items()]
        if modelopt.is_installed():
            peer = PEER.find(plain, Task(PEER.knobs(), budget))
            notes += [f"modelopt at {bits:g} bits: {note}" for note in peer.notes]
            recipe = peer.of(PeerRecipe)
            if recipe is not None:
                found.append(Decided(bits, MODELOPT, recipe, recipe.paper_bits, {}))
    return found, notes


def by_tables(ours: sedimo.Lab, plain: sedimo.Lab, budget: BudgetSettings, default: Finding) -> dict[str, Allocation]:
    """The recipes that follow from a table without measuring any."""
    found = {SUMMED: allocated(default.table, budget)}
    for method, lab in ((JACOBIAN, ours), (FORMER, plain)):
        found[method] = allocated(lab.table("jacobian"), budget)
    nearest, effects = ADJOINT.measure(plain, Task(AdjointSettings())), default.need(Effects)
    found[SIGNED] = allocate_by_effects(default.table, effects, budget)
    found[NEAREST] = allocate_by_effects(nearest.table, nearest.need(Effects), budget)
    fine = replace(default.table, costs=tuple(c for c in default.table.costs if c.format.bits > COARSE_BITS))
    with contextlib.suppress(InputError):  # a budget below 3 bits and their scales
        found[FINE] = allocate_by_effects(fine, effects, budget)
    return found


def default_facts(default: Finding) -> dict[str, object]:
    """What the default predicted, and which rule's recipe won."""
    portfolio = default.need(Portfolio)
    return {
        "predicted": to_plain(portfolio.sqnr_db),
        "winner": next((e.name for e in portfolio.entrants if e.is_winner), ""),
        "entrants": to_plain(portfolio.entrants),
    }


def measured_rows(ours: sedimo.Lab, plain: sedimo.Lab, decided: list[Decided]) -> Iterator[dict[str, object]]:
    """Each recipe on the fresh seeds, and the best of all uniform ones of at most each budget."""
    space, plan = ours.bank.space, plain.seeds.plan(FRESH)
    uniform = {str(f): space.uniform(f) for f in space.common_formats}
    uniform = {name: recipe for name, recipe in uniform.items() if stored_bits(ours, recipe) <= max(BUDGETS)}
    powers: dict[tuple[bool, str], NoisePowers] = {}
    for is_plain, lab, more in ((False, ours, list(uniform.values())), (True, plain, [])):
        own = [d.recipe for d in decided if isinstance(d.recipe, Recipe) and (d.method in PLAIN) == is_plain]
        powers |= {(is_plain, t.recipe.key): t.powers for t in lab.measure([*own, *more], plan)}
    peers = [d.recipe for d in decided if isinstance(d.recipe, PeerRecipe)]
    of_peers = measure_peers(plain, plan, peers)
    for bits in BUDGETS:
        fitting = {name: recipe for name, recipe in uniform.items() if stored_bits(ours, recipe) <= bits}
        if fitting:
            best = max(fitting, key=lambda name: powers[False, fitting[name].key].sqnr_db.mean())
            facts: dict[str, object] = {"format": best, "n_formats": len(fitting)}
            decided.append(Decided(bits, UNIFORM, fitting[best], stored_bits(ours, fitting[best]), facts))
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
