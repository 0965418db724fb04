"""What was predicted beside what was measured, and which decisions are to blame where they differ."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from planted_worlds import N_SEARCHED, N_SHOWN, World
from sedimo.allocation.effects import expected_db
from sedimo.allocation.solve import allocate
from sedimo.jobs import evidence
from sedimo.jobs.evidence import N_BLAMED, N_SUSPECTS, judge_prediction
from sedimo.methods.adjoint import adjoint_table, effects_of
from sedimo.methods.error import error_table
from sedimo.methods.method import Finding
from sedimo.methods.portfolio import Portfolio
from sedimo.metrics.estimate import normal_estimate
from sedimo.metrics.signal import NoisePowers, mean_sqnr
from sedimo.quant.formats import Format
from sedimo.reporting.summary import DISAGREEMENT_DB, Prediction
from synthetic_effects import candidates_of, probe_of

UAQ4 = Format.parse("uaq4")


class Judged:
    """A world, its uniform recipe of four bits, and a prediction in which the effect of some decisions is scaled."""

    def __init__(self, wrong=None):
        self.world = world = World()
        shown = {
            d: {name: np.array(values) * (wrong or {}).get(d, 1.0) for name, values in changes.items()}
            for d, changes in world.probe.numbers.items()
        }
        probe, candidates = probe_of(shown, N_SHOWN), candidates_of(world.space)
        effects, table = effects_of(candidates, probe), adjoint_table(world.space, candidates, probe)
        self.allocation = allocate(table, rule="uniform:uaq4")
        self.predicted = effects.noise(self.allocation.choice)
        portfolio = Portfolio(self.allocation, self.predicted, 4)
        self.finding = Finding(world.bank, table, self.allocation).with_evidence(effects, portfolio)

    def judge(self, finding=None, *, predicts=True):
        powers = NoisePowers(self.world.noise(self.allocation.recipe)[N_SEARCHED:], np.ones(16))
        return judge_prediction(self.world, finding or self.finding, mean_sqnr(powers), predicts=predicts)


def loudest(world):
    return max(world.factors, key=world.factors.get)


def test_where_both_agree_nobody_is_blamed_and_nothing_is_measured():
    judged = Judged()
    found = judged.judge()
    assert abs(found.difference_db) < DISAGREEMENT_DB
    assert found.is_trusted
    assert found.blamed == ()
    assert judged.world.searching.asked == []
    assert found.predicted_db == expected_db(judged.predicted, 4)
    powers = judged.world.noise(judged.allocation.recipe)[N_SEARCHED:]
    assert found.measured_db.value == pytest.approx(float(-10 * np.log10(powers).mean()))


def test_the_decision_whose_effect_was_missed_is_named():
    name = loudest(World())
    judged = Judged({name: 0.02})
    found = judged.judge()
    assert found.difference_db < -DISAGREEMENT_DB
    assert not found.is_trusted
    assert len(found.blamed) == N_BLAMED
    first = found.blamed[0]
    assert (first.decision, first.format) == (name, "uaq4")
    whole, without = (judged.world.noise(r)[:N_SEARCHED] for r in _with_and_without(judged, name))
    gain = float(-10 * np.log10(without).mean() + 10 * np.log10(whole).mean())
    assert first.measured_db == pytest.approx(gain)
    assert first.measured_db > 1.5
    assert abs(first.predicted_db) < 0.5
    gaps = [abs(one.measured_db - one.predicted_db) for one in found.blamed]
    assert gaps == sorted(gaps, reverse=True)


def _with_and_without(judged, name):
    choice, space = judged.allocation.choice, judged.world.space
    return space.recipe(choice), space.recipe({**choice, name: Format.parse("fp16")})


def test_the_decision_whose_effect_was_made_up_is_named():
    name = min(World().factors, key=World().factors.get)
    found = Judged({name: 60.0}).judge()
    assert found.difference_db > DISAGREEMENT_DB
    assert found.blamed[0].decision == name
    assert found.blamed[0].predicted_db > 3
    assert abs(found.blamed[0].measured_db) < 0.5


def test_suspects_are_those_of_great_cost_and_of_great_error(monkeypatch):
    judged = Judged({loudest(World()): 0.02})
    world, index = judged.world, judged.world.bank.index
    costs = {d: judged.finding.table.index[d, UAQ4].cost for d in judged.allocation.choice}
    ranked = sorted(costs, key=costs.get)
    for number, name in enumerate(ranked):  # the greatest error where the cost is least
        index[name, UAQ4] = replace(index[name, UAQ4], error=1.0 / (1 + number))
    monkeypatch.setattr(evidence, "N_SUSPECTS", 4)
    judged.judge()
    first, *others = [trial.recipe for trial in world.searching.kept.values()]
    assert first == judged.allocation.recipe
    relieved = [{d for d, f in world.space.choice(recipe).items() if f != UAQ4} for recipe in others]
    assert relieved == [{ranked[-1]}, {ranked[-2]}, {ranked[0]}, {ranked[1]}]
    assert N_SUSPECTS >= 2 * N_BLAMED


def test_other_tables_predict_by_the_sum_of_their_costs():
    judged = Judged()
    table = judged.finding.table
    summed = judged.judge(Finding(judged.world.bank, table, judged.allocation))
    assert summed.predicted_db.value == pytest.approx(-10 * math.log10(judged.allocation.objective))
    relative = judged.allocation.standard_error / judged.allocation.objective
    assert summed.predicted_db.standard_error == pytest.approx(10 / math.log(10) * relative)
    errors = error_table(judged.world.space, judged.world.bank.candidates)
    assert judged.judge(Finding(judged.world.bank, errors, judged.allocation), predicts=False) is None


def test_the_blamed_of_summed_costs_are_told_by_their_costs():
    name = loudest(World())
    judged = Judged({name: 0.02})
    found = judged.judge(Finding(judged.world.bank, judged.finding.table, judged.allocation))
    first = found.blamed[0]
    costs = {d: judged.finding.table.index[d, UAQ4].cost for d in judged.allocation.choice}
    whole = sum(costs.values())
    assert first.decision == name
    assert first.predicted_db == pytest.approx(10 * math.log10(whole / (whole - costs[name])))


def test_a_prediction_is_told_by_name():
    predicted, measured = normal_estimate(20.0, 0.5), normal_estimate(17.0, 0.4, 16)
    found = Prediction(predicted, measured)
    plain = json.loads(json.dumps(found.as_json()))
    assert set(plain) == {"predicted_db", "measured_db", "blamed", "difference_db"}
    assert (plain["difference_db"], plain["blamed"]) == (-3.0, [])
    assert plain["predicted_db"]["value"] == 20.0
    assert plain["measured_db"]["n"] == 16
    assert not found.is_trusted


@pytest.mark.parametrize(("measured", "trusted"), [(18.0, True), (22.0, True), (17.9, False), (22.1, False)])
def test_it_is_trusted_within_two_decibels(measured, trusted):
    assert Prediction(normal_estimate(20.0, 0.5), normal_estimate(measured, 0.5)).is_trusted is trusted


def test_what_cannot_be_compared_is_no_disagreement():
    for pair in ((math.inf, math.inf), (math.inf, 20.0), (20.0, -math.inf)):
        found = Prediction(*(normal_estimate(value, 0.0) for value in pair))
        assert math.isnan(found.difference_db)
        assert found.is_trusted
        json.dumps(found.as_json())
