"""The canonical text of a study's trials."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from sedimo.codec import from_plain
from sedimo.lab.study import Execution, Setting, Study, Trial, export_trials, measures_of
from sedimo.metrics.estimate import Estimate
from sedimo.metrics.signal import NoisePowers
from sedimo.quant.formats import Format
from sedimo.space import Recipe

SETTING = Setting("w" * 64, "Toy", "final_latents", (1, 2), 4, ("cat",), 1.5, 256, "float32", "cpu")
EXECUTION = Execution(1.0, 4, 2, {"torch": "2"})


def trial_of(bits, noise=(0.25, 0.5), setting=SETTING, **rest):
    powers = NoisePowers(np.array(noise), np.array([2.0, 2.0]))
    return Trial(setting, Recipe({"b": Format("uaq", bits), "a": Format("uaq", 8)}), powers, EXECUTION, **rest)


def exported(folder, trials):
    with Study(folder) as study:
        for trial in trials:
            study.put_trial(trial)
        return export_trials(study)


def test_the_text_depends_on_what_was_measured_alone(tmp_path):
    trials = [trial_of(bits) for bits in (2, 3, 4)]
    elsewhere = [replace(t, execution=Execution(9.0, 8, 64, {"torch": "3"})) for t in reversed(trials)]
    text = exported(tmp_path / "a", trials)
    assert text == exported(tmp_path / "b", elsewhere)
    assert text != exported(tmp_path / "c", [trial_of(2, (0.25, 0.51)), *trials[1:]])
    assert not {"seconds", "threads", "versions"} & set(text.split('"'))


def test_a_trial_tells_recipe_measures_and_powers(tmp_path):
    fid = Estimate(7.0, 0.5, 6.0, 8.0, 20)
    other = replace(SETTING, n_steps=9)
    found = json.loads(exported(tmp_path, [trial_of(3, measures={"fid": fid}), trial_of(3, (0.0, 0.0), other)]))
    assert from_plain(dict[str, Setting], found["settings"]) == {s.key: s for s in (SETTING, other)}
    assert [t["key"] for t in found["trials"]] == sorted(t["key"] for t in found["trials"])
    by_setting = {t["setting"]: t for t in found["trials"]}
    one, exact = by_setting[SETTING.key], by_setting[other.key]
    assert one["key"] == SETTING.trial_key(trial_of(3).recipe)
    assert one["recipe"] == {"a": "uaq8", "b": "uaq3"}
    assert one["powers"] == {"noise": [0.25, 0.5], "signal": [2.0, 2.0]}
    measures = one["measures"]
    assert measures["sqnr_db"]["value"] == pytest.approx(-10 * np.log10([1 / 8, 1 / 4]).mean())
    assert measures["sqnr_pooled_db"]["value"] == pytest.approx(-10 * np.log10(0.75 / 4))
    assert measures["fid"] == {"value": 7.0, "standard_error": 0.5, "low": 6.0, "high": 8.0, "n": 20}
    assert (measures["n_exact"], exact["measures"]["n_exact"]) == (0, 2)
    assert exact["measures"]["sqnr_db"]["value"] == {"float": "inf"}
    assert "fid" not in exact["measures"]


def test_every_trial_has_a_line_of_its_own(tmp_path):
    text = exported(tmp_path, [trial_of(bits) for bits in (2, 3, 4)])
    lines = text.splitlines()
    assert sum(line.startswith('{"key":') for line in lines) == 3
    assert json.loads(text)["sedimo_trials"] == 1


def test_an_empty_study_has_an_empty_export(tmp_path):
    assert json.loads(exported(tmp_path, []))["trials"] == []


def test_measures_are_named_once():
    assert list(measures_of(trial_of(3))) == ["sqnr_db", "sqnr_pooled_db"]
