"""From a pipeline to a recipe by measured recipes, the final among the best, and the sentences that explain it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import sedimo
from sedimo.allocation.budget import BudgetSettings
from sedimo.codec import from_json, to_json
from sedimo.errors import InputError
from sedimo.jobs.evidence import explain, finalist_rows
from sedimo.lab.lab import Lab
from sedimo.lab.measuring import TrialWorker
from sedimo.lab.seeds import SamplingSettings
from sedimo.lab.study import Study
from sedimo.methods.method import Task
from sedimo.methods.predictor import study as background
from sedimo.methods.predictor.goal import Goal
from sedimo.methods.predictor.noise_model import fit_noise_model
from sedimo.methods.predictor.quality import telling_changes
from sedimo.methods.predictor.study import fits_space, measure_background, measures_of, training_set
from sedimo.methods.predictor.training import FAST
from sedimo.methods.search import (
    BUILT,
    SEARCH,
    Search,
    SearchSettings,
    build_by_groups,
    finalists,
    hold_final,
    keeps,
    propose,
    search,
)
from sedimo.metrics.signal import NoisePowers
from sedimo.quant.formats import Format
from sedimo.reporting.explanation import Explanation
from sedimo.space import SearchSpace

SAMPLING = SamplingSettings(n_seeds=3, n_steps=2, n_check_seeds=4)
BUDGET = BudgetSettings(bits=5.0)  # small layers pay much for their codebooks
SETTINGS = SearchSettings(n_trials=42, n_rounds=1, training=replace(FAST, n_folds=2, n_epochs=3, patience=2))


class Setup:
    """A tiny pipeline with all that a search needs, and its result."""

    def __init__(self, folder, store):
        self.pipe = sedimo.load(folder)
        self.graph = sedimo.trace(self.pipe)
        self.bank = sedimo.fit(self.pipe, sedimo.search_space(self.graph, "uaq3,uaq4,uaq6,kmc3"))
        self.study = Study(store)
        self.lab = Lab(self.pipe, self.bank, graph=self.graph, study=self.study, sampling=SAMPLING)
        self.known = measure_background(self.lab)
        self.found = search(self.lab, self.known, SETTINGS, BUDGET)


@pytest.fixture(scope="module")
def done(tiny_pipeline_folder, tmp_path_factory):
    setup = Setup(tiny_pipeline_folder, tmp_path_factory.mktemp("search"))
    yield setup
    setup.study.close()


def test_a_search_keeps_its_budget_and_its_number_of_trials(done):
    found = done.found
    assert len(found.trials) == 42
    assert found.n_random == 21
    assert found.allocation.paper_bits <= 5.0
    assert found.table.method == "gnn"
    assert [r.n_trials for r in found.rounds] == [21]
    proposed = found.trials[21:]
    assert all(keeps(done.known, t.recipe, BUDGET) for t in proposed)
    assert len({t.key for t in found.trials}) == 42
    bits = [done.bank.space.paper_bits(t.recipe) for t in proposed]
    assert min(bits) > 4.6  # what is proposed uses the budget


def test_the_same_search_measures_nothing_again(done, monkeypatch):
    monkeypatch.setattr(TrialWorker, "measure", lambda *_: pytest.fail("measured"))
    again = search(done.lab, done.known, SETTINGS, BUDGET)
    assert again.allocation.recipe == done.found.allocation.recipe
    assert [t.key for t in again.trials] == [t.key for t in done.found.trials]


def test_a_study_of_another_space_is_refused_before_anything_is_measured(done, monkeypatch):
    other = sedimo.fit(done.pipe, sedimo.search_space(done.graph, "uaq3,uaq4"))
    monkeypatch.setattr(background, "prior_named", lambda *_: pytest.fail("measured"))
    with pytest.raises(InputError, match="of another denoiser or of other formats"):
        measure_background(Lab(done.pipe, other, graph=done.graph, study=done.study))
    assert done.study.record(SearchSpace, "space") == done.bank.space


def test_groups_can_be_decided_as_a_whole(done):
    found = build_by_groups(
        done.known, done.found.predictor, done.found.table, done.found.allocation, BUDGET, confidence=1.0
    )
    assert found.paper_bits <= 5.0
    assert found.method == "gnn"
    assert set(found.choice) == {d.name for d in done.bank.space.decisions}


def test_proposals_are_new_and_differ_by_seed(done):
    data = done.found.predictor.data
    model = fit_noise_model(data.choices, data.prior, data.codes, data.quality)
    known = done.found.trials
    one, same, other = (propose(done.known, model, BUDGET, 4, known=known, seed=(seed,)) for seed in (5, 5, 6))
    assert [r.key for r in one] == [r.key for r in same]
    assert {r.key for r in one} != {r.key for r in other}
    assert not {r.key for r in one} & {t.recipe.key for t in known}


def test_an_explanation_tells_everything_and_verifies_its_sentences(done):
    found = explain(done.lab, done.known, done.found, target="sqnr_db")
    operations = {d.operation for d in done.bank.space.decisions}
    assert {box.name for box in found.operation_boxes} == operations
    assert sum(share.n_layers for share in found.format_shares) == len(done.graph.layers)
    assert {row.predictor for row in found.predictors} >= {"this predictor", "average bits", "ridge on one-hot choices"}
    assert all(row.advantage is not None for row in found.predictors if not row.is_used)
    assert {point.kind for point in found.curve} == {"this", "random", "uniform"}
    assert found.insights
    for insight in found.insights:
        assert insight.measured is not None
        assert insight.measured.n == 4  # fresh seeds
        assert insight.predicted_low < insight.predicted_db < insight.predicted_high
        assert insight.verdict in ("confirmed", "refuted", "open")
    assert from_json(Explanation, to_json(found)) == found


def test_taking_bits_from_an_operation_is_predicted_to_cost(done):
    changes = telling_changes(done.found.predictor, done.found.table, done.found.allocation)
    assert changes
    chosen = done.found.allocation.choice
    for change, recipe in changes.items():
        moved = done.bank.space.choice(recipe)
        assert {d for d in moved if moved[d] != chosen[d]} == set(change.decisions)
        assert change.predicted_low < change.predicted_db < change.predicted_high
        assert ("costs" in change.sentence) == (change.predicted_db < 0)


def test_measures_and_targets_of_trials(done):
    trial, space = done.found.trials[0], done.bank.space
    measures = measures_of(trial, space)
    assert measures["sqnr_db"] == pytest.approx(float(np.mean(trial.powers.sqnr_db)))
    assert measures["avg_bits"] == pytest.approx(space.paper_bits(trial.recipe))
    data = training_set(done.known, done.found.trials, Goal.parse("2 * sqnr_db - 10 * avg_bits"))
    assert data.quality[0] == pytest.approx(2 * measures["sqnr_db"])
    assert data.target[0] == pytest.approx(2 * measures["sqnr_db"] - 10 * measures["avg_bits"])
    with pytest.raises(InputError, match="fid"):
        training_set(done.known, done.found.trials, Goal.parse("-fid"))
    assert fits_space(trial, space)
    smaller = sedimo.search_space(done.graph, [Format("kmc", 3)])
    assert not fits_space(trial, smaller)


def test_the_method_searches_and_holds_a_final(done):
    task = Task(SETTINGS, BUDGET)
    finding = SEARCH.find(done.lab, task)
    found = finding.of(Search)
    assert finding.bank is done.bank
    assert found.trials == done.found.trials
    assert finding.table == done.found.table
    assert finding.allocation is found.allocation
    assert found.allocation.recipe in [trial.recipe for trial in found.finalists.values()]
    assert {trial.setting.seeds for trial in found.finalists.values()} == {done.lab.seeds.final.seeds}


def test_a_search_is_priced_by_its_trials(done):
    timing = done.lab.time_calls(done.lab.seeds.search)
    full, unchecked, more, blind = (
        SEARCH.price(done.lab, task)
        for task in (
            Task(SETTINGS, BUDGET),
            Task(SETTINGS, BUDGET, is_checked=False),
            Task(replace(SETTINGS, n_trials=142), BUDGET, is_checked=False),
            Task(replace(SETTINGS, prior="error"), BUDGET),
        )
    )
    assert more.n_calls - unchecked.n_calls == 100 * timing.n_calls
    assert full.n_calls > unchecked.n_calls > 42 * timing.n_calls
    assert full.n_calls - blind.n_calls == 2 * timing.n_calls  # the trajectory, and once through it with gradients
    assert full.seconds >= full.n_calls * timing.seconds_per_call


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_trials": 5}, "at least 20 trials"),
        ({"n_trials": 25, "n_rounds": 2}, "too few for 2 rounds"),
        ({"prior": "guess"}, "prior must be one of jacobian, adjoint, ablation, error"),
        ({"level": "blocks"}, "level must be one of decisions, groups"),
        ({"confidence": -1.0}, "confidence must be at least 0 and at most 10 .standard deviations., got -1"),
        ({"target": "sqnr_db +"}, "."),
        ({"target": "-fid"}, "can predict sqnr_db or sqnr_pooled_db"),
    ],
)
def test_orders_that_make_no_sense_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        SearchSettings(**change)


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
