"""The default's choice among recipes of several rules, in worlds where the noise of every recipe is known."""

from __future__ import annotations

import numpy as np
import pytest

import sedimo
from planted_worlds import N_FINAL, N_SEARCHED, N_SHOWN, World
from sedimo.allocation.budget import BudgetSettings
from sedimo.allocation.effects import allocate_signed, cross_validated_noise, expected_db
from sedimo.allocation.solve import allocate_within
from sedimo.errors import InputError
from sedimo.lab.lab import Lab
from sedimo.lab.measuring import TrialWorker
from sedimo.lab.seeds import SamplingSettings
from sedimo.lab.study import Study
from sedimo.methods import portfolio
from sedimo.methods.adjoint import adjoint_table, effects_of, probe_adjoint
from sedimo.methods.method import Finding
from sedimo.methods.portfolio import (
    FINE_NAME,
    N_FINALISTS,
    N_UNIFORM,
    SIGNED_NAME,
    SUMMED_NAME,
    allocate_by_effects,
    decide_by_effects,
    hold_portfolio,
    read_limits,
    refine,
)
from sedimo.quant.formats import Format

BUDGETS = [
    BudgetSettings(bits=3.4),
    BudgetSettings(bits=4.6),
    BudgetSettings(stored_bits=5.2),
    BudgetSettings(n_bytes=16000),
    BudgetSettings(bits=8.0),
]
SAMPLED_DB = 2.0  # of a prediction from 32 samples of 4 directions: its standard error is 0.6


def held(world, budget):
    return hold_portfolio(world, world.finding, budget)


def uniform_within(world, budget):
    """The uniform recipes that keep a budget, by format."""
    limit = read_limits(world.table, budget).limits(0)[0]
    size = world.space.paper_bytes if budget.bits is not None else world.space.stored_bytes
    recipes = {f: world.space.uniform(f) for f in world.space.common_formats}
    return {f: recipe for f, recipe in recipes.items() if size(recipe) <= limit}


@pytest.mark.parametrize("misled", [False, True])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_the_best_of_the_final_is_the_result(budget, misled):
    world = World(misled=misled)
    found = held(world, budget)
    limit = read_limits(world.table, budget)
    used = sum(limit.sizes(world.table.index[key])[0] for key in found.allocation.choice.items())
    assert used <= limit.limits(0)[0]
    ranked = [e.searched.value for e in found.entrants]
    assert ranked == sorted(ranked, reverse=True)
    finalists = [e for e in found.entrants if e.final is not None]
    (winner,) = [e for e in found.entrants if e.is_winner]
    assert winner.final == max((e.final for e in finalists), key=lambda final: final.value)
    assert set(found.entrants[:N_FINALISTS]) <= set(finalists)
    assert len(finalists) <= N_FINALISTS + 1
    assert winner.stored_bits == found.allocation.stored_bits
    assert winner.final.value == pytest.approx(world.deciding.kept[_key_of(world, found)].score)
    assert all((e.predicted_db is not None) == (e.final is not None) for e in found.entrants)
    assert winner.predicted_db == expected_db(found.predicted, world.effects.shape[1]).value
    assert found.predicted.shape == (N_SHOWN,)
    assert len(world.searching.kept) == len(found.entrants)
    assert len(world.deciding.kept) == len(finalists)


def _key_of(world, found):
    return next(key for key, trial in world.deciding.kept.items() if trial.recipe == found.allocation.recipe)


@pytest.mark.parametrize("misled", [False, True])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_the_best_uniform_recipe_is_in_the_final_and_never_better(budget, misled):
    world = World(misled=misled)
    found = held(world, budget)
    entered = {e.name: e for e in found.entrants if e.kind == "uniform"}
    fitting = uniform_within(world, budget)
    assert {Format.parse(name.removeprefix("uniform ")) for name in entered} <= set(fitting)
    assert len(entered) == min(N_UNIFORM, len(fitting))
    largest = max(fitting, key=lambda f: world.space.stored_bytes(fitting[f]))
    assert f"uniform {largest}" in entered
    told = {f: world.effects.noise(world.space.choice(recipe)) for f, recipe in fitting.items()}
    promising = max(told, key=lambda f: expected_db(told[f], world.effects.shape[1]).value)
    assert f"uniform {promising}" in entered
    best = max(entered.values(), key=lambda e: e.searched.value)
    assert best.final is not None
    result = world.noise(found.allocation.recipe)[N_SEARCHED:]
    rival = world.noise(fitting[Format.parse(best.name.removeprefix("uniform "))])[N_SEARCHED:]
    assert -np.log(result).mean() >= -np.log(rival).mean()


def test_where_effects_are_wrong_the_uniform_recipe_is_the_result():
    budget, world = BudgetSettings(bits=4.6), World(misled=True)
    found = held(world, budget)
    (winner,) = [e for e in found.entrants if e.is_winner]
    assert (winner.kind, winner.name) == ("uniform", "uniform uaq4")
    assert found.allocation.recipe == world.space.uniform(Format.parse("uaq4"))
    assert np.array_equal(found.predicted, world.effects.noise(found.allocation.choice))
    by_effects = allocate_by_effects(world.table, world.effects, budget)
    assert world.noise(by_effects.recipe).mean() > 3 * world.noise(found.allocation.recipe).mean()


def test_where_effects_are_right_a_recipe_by_effects_is_the_result():
    budget, world = BudgetSettings(bits=4.6), World()
    found = held(world, budget)
    (winner,) = [e for e in found.entrants if e.is_winner]
    assert winner.kind == "effects"
    assert winner.name in (SIGNED_NAME, SUMMED_NAME, FINE_NAME)
    assert winner.final.value > max(e.final.value for e in found.entrants if e.kind == "uniform" and e.final) + 1
    assert winner.predicted_db == pytest.approx(winner.final.value, abs=SAMPLED_DB)


def test_what_is_predicted_of_a_rule_is_cross_validated():
    budget, world = BudgetSettings(bits=4.1), World()
    limits = read_limits(world.table, budget)
    given = (world.table, world.effects, world.bank.candidates)
    rules = {
        SIGNED_NAME: lambda table, effects: allocate_signed(table, effects, limits).choice,
        SUMMED_NAME: lambda table, _: allocate_within(table, limits).choice,
    }
    signed = decide_by_effects(world.finding, budget)
    expected = {name: cross_validated_noise(*given, rule) for name, rule in rules.items()}
    assert np.array_equal(signed.predicted, expected[SIGNED_NAME])
    inside = world.effects.noise(allocate_by_effects(world.table, world.effects, budget).choice)
    assert not np.array_equal(expected[SIGNED_NAME], inside)
    compared = 0
    for e in held(world, budget).entrants:
        if e.name in expected and e.predicted_db is not None:
            assert e.predicted_db == expected_db(expected[e.name], 4).value
            compared += 1
    assert compared > 0


def test_each_recipe_enters_once_and_a_uniform_one_as_that():
    world = World(formats="uaq4,fp16")
    found = held(world, BudgetSettings(bits=4.6))
    (only,) = found.entrants
    assert (only.name, only.final, only.is_winner) == ("uniform uaq4", None, True)
    assert found.allocation.recipe == world.space.uniform(Format.parse("uaq4"))
    assert world.deciding.asked == []  # nothing is left to decide


def test_recipes_of_all_rules_are_different():
    world = World()
    for budget in BUDGETS:
        world.searching.asked.clear()
        found = held(world, budget)
        assert len(set(world.searching.asked)) == len(world.searching.asked) == len(found.entrants)
        assert len({e.name for e in found.entrants}) == len(found.entrants)


def test_one_rule_leaves_out_the_coarsest_formats(monkeypatch):
    world, recipes = World(formats="uaq2,uaq3,uaq4,uaq6,fp16"), {}
    monkeypatch.setattr(portfolio, "_predicted", lambda *_: np.ones(3))
    original = portfolio._entered
    monkeypatch.setattr(portfolio, "_entered", lambda *a: recipes.update(original(*a)) or original(*a))
    held(world, BudgetSettings(bits=3.8))
    coarse = {name: 2 in {f.bits for f in one.choice.values()} for name, one in recipes.items()}
    assert coarse[SIGNED_NAME]
    assert not coarse[FINE_NAME]
    recipes.clear()
    held(world, BudgetSettings(bits=2.8))  # so few bits that nothing else is possible
    assert FINE_NAME not in recipes


def test_a_budget_that_no_recipe_keeps_is_refused():
    world = World()
    with pytest.raises(InputError, match="the least possible is"):
        held(world, BudgetSettings(bits=1.0))
    with pytest.raises(InputError, match="a budget is needed"):
        held(world, BudgetSettings())
    assert world.searching.asked == []


@pytest.fixture(scope="module")
def pipe(tiny_pipeline_folder):
    return sedimo.load(tiny_pipeline_folder)


def test_on_a_pipeline_what_was_measured_is_not_measured_again(pipe, tmp_path, monkeypatch):
    bank = sedimo.fit(pipe, sedimo.search_space(sedimo.trace(pipe), "uaq2,uaq3,uaq4,uaq6"))
    budget, probe = BudgetSettings(bits=4.6), probe_adjoint(Lab(pipe, bank), pipe.default_sampling(range(4), 2))
    table = adjoint_table(bank.space, bank.candidates, probe)
    finding = Finding(bank, table).with_evidence(effects_of(bank.candidates, probe))
    sampling, results = SamplingSettings(n_seeds=N_FINAL // 4, n_steps=2), []
    with Study(tmp_path) as study:
        for _ in range(2):
            lab = Lab(pipe, bank, study=study, sampling=sampling)
            found = hold_portfolio(lab, finding, budget)
            refined = refine(lab, found, finding, budget, on=lab.seeds.search, minutes=1e-9)
            results.append((found.entrants, found.allocation, found.predicted.tolist(), refined.allocation))
            monkeypatch.setattr(TrialWorker, "measure", None)  # would fail if it were called
    assert results[0] == results[1]
    entrants, allocation, _, refined = results[0]
    assert refined == allocation  # no time for an exchange
    assert allocation.paper_bits <= 4.6
    best = max((e for e in entrants if e.final), key=lambda e: e.final.value)
    assert best.is_winner
    assert any(e.kind == "uniform" and e.final for e in entrants)
