"""What work took is told by what it used, not by when that was measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sedimo.bank import fit_bank
from sedimo.codec import parse_json, to_json
from sedimo.lab.lab import Lab
from sedimo.lab.study import Execution, Ledger, Setting, Spent, Study, Trial, add_up
from sedimo.methods.jacobian import probe_jacobian
from sedimo.methods.sqnr import probe_sqnr
from sedimo.metrics.signal import NoisePowers
from sedimo.pipelines.adapter import Sampling
from sedimo.space import Recipe
from toy_pipeline import ToyAdapter, ToyWeights, toy_space

SETTING = Setting("0" * 64, "toy", "step", (0, 1), 4, (), None, None, "float32", "cpu")
SAMPLING = Sampling(seeds=(1, 2, 3), n_steps=2, batch_size=2)


def trial(seconds, formats, setting=SETTING, noise=(1.0, 1.0)):
    powers = NoisePowers(np.array(noise), np.ones(2))
    return Trial(setting, Recipe.from_mapping(formats), powers, Execution(seconds, 4, 1, {}))


def test_every_measurement_counts_once_and_the_reference_as_one_more_trial():
    first, second = trial(1.0, {"a": "uaq4"}), trial(3.0, {"a": "uaq3"})
    one = Ledger({first.key: first}, {"part": Execution(10.0, 5, 1, {})})
    other = Ledger({first.key: first, second.key: second}, {"part": Execution(10.0, 5, 1, {})})
    assert add_up([one, other]) == Spent(1.0 + 3.0 + 2.0 + 10.0, 4 + 4 + 4 + 5, is_complete=True)
    elsewhere = trial(5.0, {"a": "uaq4"}, replace(SETTING, seeds=(2, 3)))
    assert add_up([Ledger({first.key: first, elsewhere.key: elsewhere})]).denoiser_calls == 16  # two references
    assert add_up([]) == Spent(0.0, 0, is_complete=True)


def test_parts_without_an_execution_make_costs_incomplete():
    assert add_up([Ledger({}, {"old": None, "new": Execution(2.0, 3, 1, {})})]) == Spent(2.0, 3, is_complete=False)


@pytest.mark.parametrize("probe", [probe_jacobian, probe_sqnr])
def test_probes_cost_the_same_however_they_came_about(tmp_path, probe):
    adapter = ToyAdapter()
    bank = fit_bank(ToyWeights(adapter.denoiser), toy_space(adapter.denoiser))
    with Study(tmp_path) as study:
        with study.ledger() as measured:
            probe(Lab(adapter, bank, study=study), SAMPLING)
        n_calls = adapter.n_calls
        with study.ledger() as read:
            probe(Lab(adapter, bank, study=study), SAMPLING)
    assert add_up([measured]) == add_up([read])
    assert add_up([read]).denoiser_calls > n_calls
    assert measured.measuring_seconds >= add_up([measured]).seconds > 0


def test_a_study_without_executions_is_read(tmp_path):
    adapter = ToyAdapter()
    bank = fit_bank(ToyWeights(adapter.denoiser), toy_space(adapter.denoiser))
    with Study(tmp_path / "new") as new, Study(tmp_path / "old") as old:
        found = probe_sqnr(Lab(adapter, bank, study=new), SAMPLING)
        for key in new.probe_keys():  # as it was written before executions were kept
            old._rows.put("probe", key, parse_json(new._rows.text("probe", key)))
        with old.ledger() as ledger:
            assert probe_sqnr(Lab(adapter, bank, study=old), SAMPLING).parts == found.parts
    spent = add_up([ledger])
    assert not spent.is_complete
    assert spent.denoiser_calls == 4  # the trajectory alone


def test_trials_are_ranked_by_a_number():
    assert trial(1.0, {"a": "uaq4"}, noise=(0.1, 0.1)).score == pytest.approx(10.0)
    mixed = trial(1.0, {"a": "uaq4"}, noise=(0.0, np.inf))  # exact and diverged: the mean is not a number
    assert mixed.score == -np.inf
    assert to_json(mixed)
