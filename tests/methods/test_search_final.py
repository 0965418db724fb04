"""The last choice of a search: the finalists, and that the best of them on fresh seeds becomes the result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_search import BUDGET, Setup

from sedimo.allocation.budget import BudgetSettings
from sedimo.jobs.evidence import finalist_rows
from sedimo.methods.search import BUILT, finalists, hold_final, keeps
from sedimo.metrics.signal import NoisePowers


@pytest.fixture(scope="module")
def done(tiny_pipeline_folder, tmp_path_factory):
    torch.set_num_threads(2)
    setup = Setup(tiny_pipeline_folder, tmp_path_factory.mktemp("finals"))
    yield setup
    setup.study.close()


class Scored:
    """A lab that finds the least noise in the recipe of a place."""

    def __init__(self, setup, winner):
        self.lab, self.winner = setup.lab, winner
        self.seeds = self.lab.seeds

    def measure(self, recipes, on):
        assert on == self.seeds.final
        found = self.lab.measure(recipes, on)
        return tuple(
            replace(t, powers=NoisePowers(t.powers.signal * (1e-4 if i == self.winner else 1e-2), t.powers.signal))
            for i, t in enumerate(found)
        )


def test_finalists_keep_the_budget_and_are_all_different(done):
    field = finalists(done.known, done.found, BUDGET)
    assert next(iter(field)) == BUILT
    assert field[BUILT] == done.found.allocation.recipe
    assert len({recipe.key for recipe in field.values()}) == len(field) >= 3
    assert all(keeps(done.known, recipe, BUDGET) for recipe in field.values())
    assert "best of the trials" in field


def test_the_best_of_the_trials_is_the_best_within_the_budget(done):
    field = finalists(done.known, done.found, BUDGET)
    within = [t for t in done.found.trials if keeps(done.known, t.recipe, BUDGET)]
    best = max(within, key=lambda t: float(np.mean(t.powers.sqnr_db)))
    assert field["best of the trials"] == best.recipe


def test_the_winner_on_fresh_seeds_becomes_the_result(done):
    field = finalists(done.known, done.found, BUDGET)
    for index, (name, recipe) in enumerate(field.items()):
        won = hold_final(Scored(done, index), done.known, done.found, BUDGET)
        assert won.allocation.recipe == recipe, name
        assert won.table is done.found.table
        assert list(won.finalists) == list(field)


def test_a_finalist_whose_quality_is_no_number_does_not_win(done):
    class Mixed(Scored):
        def measure(self, recipes, on):
            first, *rest = super().measure(recipes, on)
            noise = np.array([0.0, *[np.inf] * (first.powers.n - 1)])  # exact and diverged samples
            return (replace(first, powers=NoisePowers(noise, first.powers.signal)), *rest)

    won = hold_final(Mixed(done, 1), done.known, done.found, BUDGET)
    assert [trial.score for trial in won.finalists.values()][1] == 40
    assert won.allocation.recipe == list(finalists(done.known, done.found, BUDGET).values())[1]


def test_the_result_keeps_the_accounting_of_its_budget(done):
    stored = BudgetSettings(stored_bits=5.6)
    field = finalists(done.known, done.found, stored)
    for index in range(1, len(field)):
        won = hold_final(Scored(done, index), done.known, done.found, stored).allocation
        assert won.accounting == "stored"
        assert won.used_bytes == done.bank.stored_bytes(won.recipe) <= 5.6 * done.bank.space.params / 8


def test_finalists_are_told_with_what_the_chosen_one_is_ahead(done):
    rows = finalist_rows(hold_final(done.lab, done.known, done.found, BUDGET))
    chosen = [row for row in rows if row.behind is None]
    assert len(chosen) == 1
    assert all(row.measured.n == 12 for row in rows)  # seeds of the final
    others = [row for row in rows if row.behind is not None]
    assert all(row.behind.value >= 0 for row in others)
    assert chosen[0].measured.value == max(row.measured.value for row in rows)
    assert finalist_rows(done.found) == ()
