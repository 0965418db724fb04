"""Exchanges that are measured, in worlds where the noise of every recipe is known."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from planted_worlds import N_SEARCHED, SECONDS, Told, World
from sedimo.allocation.budget import BudgetSettings
from sedimo.methods import portfolio as refining
from sedimo.methods.portfolio import EXCHANGED_NAME, START_NAME, decide_by_effects, hold_portfolio, refine

BUDGET = BudgetSettings(bits=4.6)
LONG = 1e6


@pytest.fixture
def world():
    """Effects that are wrong, so that measuring finds better; some thirty recipes are proposed before all are known."""
    return World(misled=True, seed=2)


def start_of(world):
    return decide_by_effects(world.finding, BUDGET)


def refined(world, minutes, found=None):
    found = found or start_of(world)
    return refine(world, found, world.finding, BUDGET, on=world.seeds.search, minutes=minutes)


def score(noise):
    return float(-10 * np.log10(noise).mean())


def test_as_many_trials_are_made_as_there_are_minutes_for(world):
    start, scores, asked = start_of(world), [], []
    for minutes in (1, 4, 16):
        world.searching.kept.clear()
        world.searching.asked.clear()
        found = refined(world, minutes)
        assert len(world.searching.kept) == minutes * 60 / SECONDS
        scores.append(score(world.noise(found.allocation.recipe)[:N_SEARCHED]))
        asked.append(list(world.searching.asked))
    assert all(longer[: len(shorter)] == shorter for shorter, longer in itertools.pairwise(asked))
    assert scores == sorted(scores)
    assert scores[0] == score(world.noise(start.allocation.recipe)[:N_SEARCHED])
    assert scores[-1] > scores[0] + 0.3


def test_the_same_call_measures_nothing_again_and_a_longer_one_goes_on(world):
    first = refined(world, 10)
    kept = dict(world.searching.kept), dict(world.deciding.kept)
    again = refined(world, 10)
    assert (world.searching.kept, world.deciding.kept) == kept
    assert again.allocation == first.allocation
    assert again.entrants == first.entrants
    assert np.array_equal(again.predicted, first.predicted)
    refined(world, 15)
    assert list(world.searching.kept)[:10] == list(kept[0])
    assert len(world.searching.kept) == 15


def test_all_recipes_keep_the_budget(world):
    found = refined(world, 16)
    sizes = [world.space.paper_bits(trial.recipe) for trial in world.searching.kept.values()]
    assert len(sizes) == 16
    assert max(sizes) <= 4.6
    assert found.allocation.paper_bits <= 4.6
    assert found.allocation.budget_bytes == start_of(world).allocation.budget_bytes


def test_the_better_of_start_and_end_on_the_final_is_returned(world):
    start = start_of(world)
    found = refined(world, 16)
    before, after = (world.noise(p.allocation.recipe)[N_SEARCHED:] for p in (start, found))
    assert found.allocation.recipe != start.allocation.recipe
    assert score(after) > score(before)
    first, last = found.entrants
    assert (first.name, first.kind, first.is_winner) == (START_NAME, "effects", False)
    assert (last.name, last.kind, last.is_winner) == (EXCHANGED_NAME, "exchanges", True)
    assert (first.final.value, last.final.value) == pytest.approx((score(before), score(after)))
    assert last.searched.value > first.searched.value
    assert last.stored_bits == found.allocation.stored_bits
    assert found.predicted == pytest.approx(start.predicted * after.mean() / before.mean())


def test_what_is_worse_on_the_final_is_not_returned(world):
    start = start_of(world)
    world.deciding = Told(lambda recipe: 1e-3 / world.noise(recipe)[N_SEARCHED:], 16)
    found = refined(world, 16)
    assert found.allocation == start.allocation
    assert np.array_equal(found.predicted, start.predicted)
    assert [(e.name, e.is_winner) for e in found.entrants] == [(START_NAME, True), (EXCHANGED_NAME, False)]
    assert found.entrants[0].final.value > found.entrants[1].final.value
    world.deciding = Told(lambda recipe: np.full(16, 0.01), 16)
    assert refined(world, 16).allocation == start.allocation


def test_where_nothing_is_better_the_final_is_not_held(world):
    best = world.searching = Told(lambda recipe: np.full(8, 1.0 if best.kept else 0.1), 8)
    start = start_of(world)
    assert refined(world, 10, found=start) is start
    assert len(best.kept) == 10
    assert world.deciding.asked == []


def test_entrants_of_the_portfolio_stay(world):
    held = hold_portfolio(world, world.finding, BUDGET)
    after = refined(world, 16, found=replace(start_of(world), entrants=held.entrants))
    *old, new = after.entrants
    assert old == [replace(e, is_winner=False) for e in held.entrants]
    assert any(e.is_winner for e in held.entrants)
    assert (new.name, new.is_winner) == (EXCHANGED_NAME, True)


@pytest.mark.parametrize("patience", [5, 20])
def test_it_ends_when_proposals_are_used_up(patience, monkeypatch):
    monkeypatch.setattr(refining, "PATIENCE", patience)
    world, proposals = World(n_decisions=2, formats="uaq3,uaq4,fp16"), []
    original = refining._propose
    monkeypatch.setattr(refining, "_propose", lambda *a, **k: proposals.append(1) or original(*a, **k))
    refined(world, LONG)
    assert len(world.searching.kept) <= 9
    assert patience <= len(proposals) <= 9 * patience
