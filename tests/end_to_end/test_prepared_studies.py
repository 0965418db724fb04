"""Smoothed weights and static ranges in the commands that measure studies, as a person types them."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from running import run, run_json
from sedimo.jobs.explore import ExploredSource
from sedimo.lab.study import Study
from sedimo.methods.predictor.study import read_background
from tolerances import DIFFERENT, FLOAT32_SAMPLING

SMALL = ("--seeds", "2", "--steps", "2")
ACT = ("--formats", "uaq4,uaq6", "--act", "a8")
PREPARED = ("--smooth", "0.7", "--smooth-share", "1", "--act-ranges", "min-max", "--act-symmetric")
COMMANDS = {
    "compare": ("--bits", "6.5", "--methods", "uniform,jacobian", "--fresh", "2", *ACT),
    "explore": ("--trials", "3", *ACT),
    "blocks": ("--format", "uaq4a8", "--keep", "1"),
}
MEASURING = (
    "sedimo.lab.measuring.TrialWorker.measure",
    "sedimo.treatments.static_ranges.sample_until",
    "sedimo.treatments.smoothing.measure_inputs",
)


def numbers(command, found):
    """What a command measured: SQNR in dB of each row, or trial."""
    if command == "explore":
        with Study(found["study"], create=False) as study:
            chosen = {t.recipe.key: t.score for t in study.trials() if t.setting.key in found["settings"].values()}
        return [chosen[key] for key in sorted(chosen)]
    return [row["sqnr_db" if command == "compare" else "up_to"]["value"] for row in found["rows"]]


def digests(store):
    with Study(store, create=False) as study:
        return {trial.setting.weights_digest for trial in study.trials()}


@pytest.fixture(scope="module")
def prepared(tiny_pipeline_folder, tmp_path_factory):
    """Any command as it is, or smoothed with static ranges; done once, in one study where the two are keyed apart."""
    folder = tmp_path_factory.mktemp("prepared")

    @functools.cache
    def done(command, kind):
        store = folder / (f"{command}-{kind}" if command == "explore" else command)
        rules = PREPARED if kind == "prepared" else ()
        arguments = (command, tiny_pipeline_folder, "--store", store, *SMALL, *COMMANDS[command], *rules)
        return run_json(*arguments), arguments, store

    return done


@pytest.mark.parametrize("command", COMMANDS)
def test_numbers_are_those_of_smoothed_weights_and_static_ranges(prepared, command):
    plain, _, store = prepared(command, "plain")
    other, _, other_store = prepared(command, "prepared")
    assert not np.allclose(numbers(command, plain), numbers(command, other), atol=DIFFERENT)
    assert len(digests(store) | digests(other_store)) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_a_second_run_measures_nothing_and_says_the_same(prepared, command, monkeypatch):
    found, arguments, _ = prepared(command, "prepared")
    for name in MEASURING:
        monkeypatch.setattr(name, lambda *_args, **_named: pytest.fail("measured again"))
    again = run_json(*arguments)
    assert numbers(command, again) == numbers(command, found)
    if command == "compare":
        assert again == found


def test_a_comparison_says_by_which_rules_and_leaves_out_what_all_share(prepared):
    plain, found = prepared("compare", "plain")[0], prepared("compare", "prepared")[0]
    assert found["notes"][0].startswith("SmoothQuant, alpha 0.7")
    assert found["notes"][1] == "activations: symmetric, static ranges by min-max at all steps"
    for method, cost in found["costs"].items():
        assert cost["denoiser_calls"] == plain["costs"][method]["denoiser_calls"]


@pytest.mark.parametrize(
    ("rules", "complaint"),
    [
        ((), "begun with activations symmetric, static ranges by min-max at all steps, not unset; smoothing alpha 0.7"),
        ((), "smoothing alpha 0.7 on 1 of the layers, not unset. Give the same"),
        (PREPARED[:4], "begun with activations symmetric, static ranges by min-max at all steps, not unset. Give"),
        ((*PREPARED, "--smooth", "0.5"), "smoothing alpha 0.7 on 1 of the layers, not alpha 0.5"),
    ],
)
def test_a_study_is_not_gone_on_with_by_other_rules(prepared, tiny_pipeline_folder, rules, complaint):
    store = prepared("explore", "prepared")[2]
    arguments = ("explore", tiny_pipeline_folder, "--store", store, *SMALL, *COMMANDS["explore"], *rules)
    for dry in ((), ("--dry-run",)):
        assert complaint in " ".join(run(*arguments, *dry, code=4).stderr.split())


def test_a_dry_run_knows_what_was_measured_smoothed(prepared, tmp_path):
    _, arguments, store = prepared("explore", "prepared")
    assert run_json(*arguments, "--dry-run")["missing"] == 0
    elsewhere = [tmp_path / "new" if one == store else one for one in arguments]
    assert run_json(*elsewhere, "--dry-run")["missing"] == 3


def test_processes_measure_the_smoothed_weights_and_static_ranges(prepared, tmp_path):
    _, arguments, store = prepared("explore", "prepared")
    elsewhere = [tmp_path / "run" if one == store else one for one in arguments]
    run_json(*elsewhere, "--executor", "process", "--workers", "2")
    with Study(store, create=False) as one, Study(tmp_path / "run", create=False) as several:
        assert one.trial_keys() == several.trial_keys() != frozenset()
        for trial in several.trials():
            serial = one.trial(trial.key)
            assert np.allclose(serial.powers.noise, trial.powers.noise, rtol=FLOAT32_SAMPLING)


def test_the_study_tells_what_later_stages_learn_from(prepared):
    with Study(prepared("explore", "prepared")[2], create=False) as study:
        source = study.record(ExploredSource, "source")
        known = read_background(study)
        trials = study.trials()
    assert source.treatments["smoothing"] == "alpha 0.7 on 1 of the layers"
    assert "static ranges by min-max" in source.treatments["activations"]
    assert {trial.setting.weights_digest for trial in trials} == {source.digest} == {known.digest}
    assert source.digest != source.weights_digest


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--smooth-share", "0.5"), "give --smooth 0.7, too"),
        (("--act-steps", "1"), "are for static ranges"),
        (("--act-by-timestep",), "are for static ranges"),
        (("--smooth", "1.5"), "--smooth must be at least 0 and at most 1"),
        (("--act-ranges", "mse"), "no format has activation bits"),
        (("--act-symmetric",), "no format has activation bits"),
    ],
)
@pytest.mark.parametrize("command", ["compare", "explore", "blocks", "quantize"])
def test_options_that_do_not_go_together_are_refused(tiny_pipeline_folder, tmp_path, command, options, complaint):
    weights_alone = {
        "compare": ("--bits", "6.5", "--methods", "error", "--formats", "uaq4", "--store", tmp_path / "run"),
        "explore": ("--trials", "3", "--formats", "uaq4", "--store", tmp_path / "run"),
        "blocks": ("--format", "uaq4", "--store", tmp_path / "run"),
        "quantize": ("--bits", "6.5", "--method", "error", "--formats", "uaq4", "-o", tmp_path / "out"),
    }
    done = run(command, tiny_pipeline_folder, *SMALL, *weights_alone[command], *options, code=3)
    assert complaint in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_recipes_with_several_widths_of_activations_can_be_explored_and_learned_from(tiny_pipeline_folder, tmp_path):
    """Methods that see weights alone cannot tell such widths apart; an exploration does not ask them."""
    widths = ("--formats", "uaq4,uaq6", "--act", "a4,a8")
    found = run_json("explore", tiny_pipeline_folder, "--store", tmp_path / "run", "--trials", 3, *SMALL, *widths)
    assert found["measured"] == 3
    with Study(tmp_path / "run", create=False) as study:
        assert read_background(study).table.method == "jacobian"
        used = {f.activation_bits for trial in study.trials() for f in trial.recipe.formats}
    assert used == {4, 8}
