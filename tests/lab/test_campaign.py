"""Trials, studies and campaigns: names, resuming, interruption, estimates."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from killed_explorer import explore

from sedimo.bank import fit_bank
from sedimo.codec import from_json, to_json
from sedimo.errors import InputError, Interrupted, StateError
from sedimo.lab.exploration import Exploration, random_recipe, random_recipe_near
from sedimo.lab.measuring import (
    CallTiming,
    TrialWorker,
    graceful_interrupt,
    missing_trials,
    run_trials,
    setting_of,
    time_calls,
)
from sedimo.lab.study import Execution, Setting, Study, Trial
from sedimo.methods.method import Price, price_of_trials
from sedimo.metrics.signal import NoisePowers
from sedimo.pipelines.adapter import Sampling
from sedimo.quant.formats import FP16, Format
from sedimo.space import Recipe
from tolerances import FLOAT32_SAMPLING
from toy_pipeline import ToyAdapter, ToyWeights, toy_space

SAMPLING = Sampling(seeds=(1, 2, 3), n_steps=2, batch_size=2)
SETTING = Setting("w" * 64, "Toy", "final_latents", (1, 2), 4, ("cat",), 1.5, 256, "float32", "cpu")
UAQ3 = Format("uaq", 3)


def toy_worker():
    adapter = ToyAdapter()
    bank = fit_bank(ToyWeights(adapter.denoiser), toy_space(adapter.denoiser))
    return TrialWorker(adapter, bank, SAMPLING, objective="final_latents")


def trial_of(recipe, setting=SETTING):
    n = len(setting.seeds)
    powers = NoisePowers(np.full(n, 0.25), np.full(n, 2.0))
    return Trial(setting, recipe, powers, Execution(1.0, 4, 2, {"torch": "2"}))


@pytest.mark.parametrize(
    "change",
    [
        {"weights_digest": "v"},
        {"pipeline": "Other"},
        {"objective": "path"},
        {"seeds": (1, 3)},
        {"n_steps": 5},
        {"conditions": ()},
        {"guidance": None},
        {"resolution": None},
        {"dtype": "bfloat16"},
        {"device": "cuda"},
    ],
)
def test_everything_that_determines_the_number_is_in_the_name(change):
    recipe = Recipe({"a": UAQ3})
    assert dataclasses.replace(SETTING, **change).trial_key(recipe) != SETTING.trial_key(recipe)


def test_what_does_not_determine_the_number_is_not_in_the_name():
    recipe = Recipe({"a": UAQ3})
    slow = dataclasses.replace(trial_of(recipe), execution=Execution(9.0, 4, 8, {"torch": "3"}))
    assert slow.key == trial_of(recipe).key == trial_of(Recipe({"b": FP16, "a": UAQ3})).key
    assert slow.key != trial_of(Recipe({"a": Format("uaq", 4)})).key
    adapter = ToyAdapter()
    keys = {
        setting_of(adapter, dataclasses.replace(SAMPLING, batch_size=n), weights_digest="w").key for n in (1, 2, 64)
    }
    assert len(keys) == 1


def test_a_trial_survives_its_row_and_a_wrong_one_is_refused():
    trial = trial_of(Recipe({"a": UAQ3}))
    assert from_json(Trial, to_json(trial)) == trial
    with pytest.raises(StateError, match="as many powers"):
        from_json(Trial, to_json(trial).replace("[2.0,2.0]", "[2.0]").replace("[0.25,0.25]", "[0.25]"))
    with pytest.raises(StateError, match="version 7"):
        from_json(Trial, to_json(trial).replace('"version":1', '"version":7'))
    with pytest.raises(InputError, match="objective"):
        dataclasses.replace(SETTING, objective="beauty")


def test_a_study_keeps_trials_records_and_claims(tmp_path):
    trial = trial_of(Recipe({"a": UAQ3}))
    other = trial_of(Recipe({"a": UAQ3}), dataclasses.replace(SETTING, n_steps=9))
    with Study(tmp_path / "runs" / "alpha") as study:
        for one in (trial, other):
            study.put_trial(one)
        study.put_record("setting", SETTING)
        study.claim("exploration", {"seed": 1})
    with Study(tmp_path / "runs" / "alpha" / "study.sqlite", create=False) as study:
        assert study.trials() == tuple(sorted((trial, other), key=lambda t: t.key))
        assert study.trials(SETTING) == (trial,)
        assert study.trial(trial.key) == trial
        assert study.trial("0" * 64) is None
        assert study.record(Setting, "setting") == SETTING
        assert study.record_names() == ("exploration", "setting")
        study.claim("exploration", {"seed": 1})
        with pytest.raises(StateError, match="begun with another exploration"):
            study.claim("exploration", {"seed": 2})
        with pytest.raises(InputError, match="no record 'space'; it has: exploration, setting"):
            study.record(Setting, "space")
    with pytest.raises(InputError, match="no study"):
        Study(tmp_path / "nowhere", create=False)


def test_a_campaign_measures_what_is_missing_and_nothing_twice(tmp_path):
    worker = toy_worker()
    space = toy_space(worker._adapter.denoiser)
    recipes = [space.uniform(UAQ3), Recipe({}), space.uniform(UAQ3), Recipe({"twice": UAQ3})]
    with Study(tmp_path) as study:
        trials = run_trials(study, recipes[:2], setting=worker.setting, make_worker=lambda: worker)
        assert [t.recipe.key for t in trials] == [r.key for r in recipes[:2]]
        assert trials[0].powers.noise.min() > 0
        assert trials[1].powers.noise.max() == 0
        n_calls = worker._adapter.n_calls
        again = run_trials(study, recipes, setting=worker.setting, make_worker=lambda: worker)
        assert again[:3] == (trials[0], trials[1], trials[0])
        assert worker._adapter.n_calls == n_calls + 4  # one more trial of two steps in two batches
        assert again[3].execution.n_calls == 4
        assert len(study.trials()) == 3


class Stopping:
    """Sends SIGINT when the n-th trial is finished."""

    def __init__(self, n):
        self.left = n

    def start(self, total, label):
        pass

    def advance(self, n=1):
        self.left -= n
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)

    def done(self):
        pass


def test_one_interrupt_saves_what_is_finished_and_the_next_run_goes_on(tmp_path):
    worker = toy_worker()
    before = {n: p.detach().clone() for n, p in worker._adapter.denoiser.named_parameters()}
    recipes = [Recipe({"twice": Format("uaq", bits)}) for bits in (3, 4, 8)]
    handler = signal.getsignal(signal.SIGINT)
    with Study(tmp_path) as study:
        with pytest.raises(Interrupted, match="1 of 3 missing trials") as caught:
            run_trials(study, recipes, setting=worker.setting, make_worker=lambda: worker, progress=Stopping(1))
        assert isinstance(caught.value, KeyboardInterrupt)
        assert signal.getsignal(signal.SIGINT) is handler
        assert len(study.trials()) == 1
        assert all((before[n] == p).all() for n, p in worker._adapter.denoiser.named_parameters())
        assert len(run_trials(study, recipes, setting=worker.setting, make_worker=lambda: worker)) == 3


def test_an_interrupt_after_the_last_trial_is_no_interruption(tmp_path):
    worker = toy_worker()
    with Study(tmp_path) as study:
        found = run_trials(
            study, [Recipe({})], setting=worker.setting, make_worker=lambda: worker, progress=Stopping(1)
        )
    assert len(found) == 1


def test_the_second_interrupt_stops_at_once():
    with graceful_interrupt() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set
        with pytest.raises(KeyboardInterrupt) as caught:
            os.kill(os.getpid(), signal.SIGINT)
    assert not isinstance(caught.value, Interrupted)


def test_threads_other_than_the_main_one_do_not_touch_signals():
    found = []

    def work():
        with graceful_interrupt() as stop:
            found.append(stop.is_set)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


EXPLORER = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_campaign import toy_worker
from toy_pipeline import toy_space
from killed_explorer import explore
from sedimo.lab.exploration import Exploration
from sedimo.lab.study import Study

worker = toy_worker()
class Told:
    def start(self, total, label): pass
    def advance(self, n=1): print("trial", flush=True)
    def done(self): pass
with Study(Path(sys.argv[1])) as study:
    explore(study, Exploration(7, toy_space(worker._adapter.denoiser)), n_trials=4000, setting=worker.setting,
            make_worker=lambda: worker, progress=Told())
"""


def test_a_killed_exploration_resumes_with_the_same_recipes(tmp_path):
    here = Path(__file__).parent
    command = [sys.executable, "-c", EXPLORER, str(tmp_path), str(here), str(here.parent)]  # `toy_pipeline` is above
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for _ in range(3):
        assert process.stdout.readline() == "trial\n"
    process.kill()
    process.wait()
    process.stdout.close()
    worker = toy_worker()
    space = toy_space(worker._adapter.denoiser)
    with Study(tmp_path) as study:
        n_saved = len(study.trials())
        assert n_saved >= 3
        trials = explore(
            study,
            Exploration(7, space),
            n_trials=n_saved + 2,
            setting=worker.setting,
            make_worker=lambda: worker,
        )
        assert len(study.trials()) == len({t.key for t in trials}) <= n_saved + 2
        assert [t.recipe.key for t in trials] == [random_recipe(space, 7, i).key for i in range(len(trials))]
        with pytest.raises(StateError, match="another exploration"):
            explore(study, Exploration(8, space), n_trials=1, setting=worker.setting, make_worker=lambda: worker)


@pytest.mark.slow  # starts two, as `test_killed_study.py` and `tests/end_to_end/test_explore.py` do too
def test_processes_measure_what_one_process_does(tmp_path):
    recipes = [Recipe({"twice": Format("uaq", bits)}) for bits in (3, 4, 8)]
    worker = toy_worker()
    with Study(tmp_path / "a") as one, Study(tmp_path / "b") as two:
        serial = run_trials(one, recipes, setting=worker.setting, make_worker=lambda: worker)
        parallel = run_trials(
            two,
            recipes,
            setting=worker.setting,
            make_worker=functools.partial(toy_worker),
            n_processes=2,
        )
    assert [t.key for t in serial] == [t.key for t in parallel]
    for a, b in zip(serial, parallel, strict=True):
        assert np.allclose(a.powers.ratio, b.powers.ratio, rtol=FLOAT32_SAMPLING)


def test_a_worker_of_another_setting_is_refused(tmp_path):
    with Study(tmp_path) as study, pytest.raises(StateError, match="another setting"):
        run_trials(study, [Recipe({})], setting=SETTING, make_worker=toy_worker)
    with Study(tmp_path) as study:
        assert study.trials() == ()


def test_a_plan_counts_what_is_missing(tmp_path):
    worker = toy_worker()
    recipes = [Recipe({"twice": Format("uaq", bits)}) for bits in (3, 4, 8)]
    timing = CallTiming(seconds_per_call=0.5, n_calls=4)

    def price(study):
        return price_of_trials(missing_trials(recipes, study, worker.setting), 3, timing, 100)

    with Study(tmp_path) as study:
        plan = price(study)
        assert (plan.n_calls, plan.seconds, plan.memory_bytes) == (16, 8.0, 200)
        run_trials(study, recipes[:2], setting=worker.setting, make_worker=lambda: worker)
        saved = sum(len(to_json(t)) for t in study.trials())
        later = price(study)
        assert later.n_calls == 8
        assert saved / 4 < 2 * later.disk_bytes < 4 * saved
        run_trials(study, recipes, setting=worker.setting, make_worker=lambda: worker)
        assert price(study) == Price()
    assert price(None) == plan


def test_a_timed_call_is_a_call():
    adapter = ToyAdapter()
    adapter.before_call = lambda: time.sleep(0.02)
    timing = time_calls(adapter, Sampling(seeds=(1, 2, 3), n_steps=10, batch_size=2))
    assert timing.n_calls == 20
    assert 0.02 < timing.seconds_per_call < 5  # a loaded machine is no failure


def test_recipes_are_a_function_of_seed_and_index():
    space = toy_space(ToyAdapter().denoiser)
    first = [random_recipe(space, 1, i) for i in range(20)]
    assert first == [random_recipe(space, 1, i) for i in range(20)]
    assert len({r.key for r in first} | {random_recipe(space, 2, i).key for i in range(20)}) > 35
    assert {k: str(v) for k, v in random_recipe(space, 0, 3).layers.items()} == GOLDEN_RECIPE


GOLDEN_RECIPE = {  # recipes of released studies never change
    "conv_in": "fp16",
    "grouped": "uaq4",
    "time": "uaq8",
    "first": "uaq4",
    "second": "uaq4",
    "twice": "uaq3",
    "unused": "uaq4",
    "out": "uaq4",
}


def test_bits_spread_over_recipes_and_methods_are_uniform():
    adapter = ToyAdapter()
    space = toy_space(adapter.denoiser, "uaq3,uaq5,uaq5g4,uaq8")
    shares, methods = [], []
    for i in range(400):
        formats = [str(f) for f in space.choice(random_recipe(space, 5, i)).values()]
        shares.append(sum(f == "uaq3" for f in formats) / len(formats))
        methods += [f for f in formats if f.startswith("uaq5")]
    assert np.std(shares) > 0.25  # one p per recipe, not a coin per layer
    assert 0.4 < methods.count("uaq5") / len(methods) < 0.6


def test_random_recipes_of_a_given_size():
    space = toy_space(ToyAdapter().denoiser, "uaq3,uaq4,uaq6,uaq8")
    low, high = (space.paper_bits(space.uniform(Format("uaq", bits))) for bits in (3, 8))
    goal = (low + high) / 2
    found = [random_recipe_near(space, goal, 0, i, tolerance=0.1) for i in range(20)]
    assert all(abs(space.paper_bits(r) - goal) <= 0.1 for r in found)
    assert len({r.key for r in found}) > 15
    with pytest.raises(InputError, match="no random recipe"):
        random_recipe_near(space, 2.0, 0, 0)


def test_a_stop_request_is_announced(caplog):
    with caplog.at_level(logging.WARNING), graceful_interrupt() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match="go on so"):
            stop.check("go on so")
    assert "Ctrl-C again" in caplog.text
