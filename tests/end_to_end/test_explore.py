"""`sedimo explore` and `sedimo trials` on a tiny pipeline, as a person types them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from running import run, run_json
from sedimo.graph.model import DenoiserGraph
from sedimo.jobs import explore as exploring
from sedimo.lab import measuring
from sedimo.lab.exploration import Exploration
from sedimo.lab.study import Study
from sedimo.metrics.estimate import Estimate
from sedimo.reporting.words import with_error
from sedimo.space import SearchSpace
from tolerances import FLOAT32_SAMPLING

PRIOR_CALLS = 4  # first-order noise: two steps recorded, two gone through
QUICK = ["--seeds", "2", "--steps", "2", "--formats", "kmc3,uaq4,uaq6,fp16"]


@pytest.fixture(scope="module")
def explored(tiny_pipeline_folder, tmp_path_factory):
    """A study of six recipes, what the command printed, and the trials that it left (other tests add some)."""
    store = tmp_path_factory.mktemp("runs") / "alpha"
    found = run_json("explore", tiny_pipeline_folder, "--store", store, "--trials", 6, *QUICK)
    with Study(store, create=False) as study:
        return store, found, study.trials()


def test_explore_measures_and_keeps_what_later_stages_need(explored):
    store, found, trials = explored
    assert (found["trials"], found["measured"]) == (6, 6)
    assert found["trials_per_hour"] == pytest.approx(3600 * 6 / found["measuring_seconds"])
    assert found["measuring_seconds"] < found["seconds"]
    with Study(store, create=False) as study:
        space = study.record(SearchSpace, "space")
        assert study.record(DenoiserGraph, "graph").digest == space.graph_digest
        assert study.record(Exploration, "exploration") == Exploration(0, space, "stratified")
        source = study.record(exploring.ExploredSource, "source")
    assert source.formats == ("fp16", "kmc3", "uaq4", "uaq6")
    assert {t.setting.weights_digest for t in trials} == {source.weights_digest}
    assert {t.recipe.key for t in trials} == {Exploration(0, space, "stratified").recipe(i).key for i in range(6)}
    assert {t.setting.key for t in trials} == set(found["settings"].values())


def test_a_study_goes_on_with_more_trials_and_other_objectives_and_measures_nothing_twice(
    explored, tiny_pipeline_folder, monkeypatch
):
    measured, real = [], measuring.measure
    monkeypatch.setattr(measuring, "measure", lambda *a: measured.append(1) or real(*a))
    command = ("explore", tiny_pipeline_folder, "--store", explored[0], *QUICK)
    more = run_json(*command, "--trials", 8, "--objective", "final_latents,step")
    assert (more["trials"], more["measured"], len(measured)) == (16, 10, 10)
    again = run_json(*command, "--trials", 7, "--objective", "step")
    assert (again["trials"], again["measured"], again["trials_per_hour"], len(measured)) == (7, 0, None, 10)
    assert "7 trials, 0 of them measured now" in run(*command, "--trials", 7).stdout


def test_recipes_that_are_drawn_twice_cost_nothing(tiny_pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Exploration, "recipe", lambda self, index: self.space.uniform(self.space.decisions[0].formats[0])
    )
    command = ("explore", tiny_pipeline_folder, "--store", tmp_path / "run", "--trials", 5, *QUICK)
    assert run_json(*command, "--dry-run")["missing"] == 1
    found = run_json(*command)
    assert (found["trials"], found["measured"]) == (1, 1)


def test_a_dry_run_tells_what_is_missing_and_writes_nothing(explored, tiny_pipeline_folder, tmp_path):
    command = ("explore", tiny_pipeline_folder, "--store", tmp_path / "new", "--trials", 9, *QUICK, "--dry-run")
    fresh = run_json(*command)
    assert list(tmp_path.iterdir()) == []
    assert (fresh["trials"], fresh["missing"], fresh["denoiser_calls"]) == (9, 9, 2 * (9 + 1) + PRIOR_CALLS)
    assert fresh["hours"] == pytest.approx(fresh["seconds"] / 3600)
    assert min(fresh["seconds"], fresh["memory_bytes"], fresh["disk_bytes"]) > 0
    assert "9 are not measured yet" in run(*command).stdout
    store = explored[0]
    before = run("trials", store).stdout
    begun = run_json(*command, "--store", store, "--study-seed", 0)
    with Study(store, create=False) as study:
        settings = {t.setting.key: t for t in study.trials() if t.setting.objective == "final_latents"}
        n_known = len(study.trials(next(iter(settings.values())).setting))
    assert begun["missing"] == 9 - n_known
    done = run_json(*command, "--store", store, "--trials", 6)
    assert (done["missing"], done["denoiser_calls"], done["seconds"], done["disk_bytes"]) == (0, 0, 0, 0)
    several = run_json(*command, "--executor", "process", "--workers", 2)
    assert several["memory_bytes"] > 1.9 * fresh["memory_bytes"]
    assert run("trials", store).stdout == before


def test_the_plan_foresees_memory_and_disk(explored, tiny_pipeline_folder, tmp_path):
    store = explored[0]
    with Study(store, create=False) as study:
        n_trials = len(study.trials())
    plan = run_json(
        "explore", tiny_pipeline_folder, "--store", tmp_path / "x", "--trials", n_trials, *QUICK, "--dry-run"
    )
    used = sum(f.stat().st_size for f in store.rglob("*") if f.is_file() and not f.name.endswith(("-wal", "-shm")))
    assert used / 4 < plan["disk_bytes"] < 4 * used


def test_several_processes_measure_what_one_does(explored, tiny_pipeline_folder, tmp_path):
    command = ("explore", tiny_pipeline_folder, "--store", tmp_path / "run", "--trials", 4, *QUICK)
    assert run_json(*command, "--executor", "process", "--workers", 2)["measured"] == 4
    with Study(explored[0], create=False) as one, Study(tmp_path / "run", create=False) as several:
        trials = several.trials()
        assert len(trials) == 4
        for trial in trials:
            serial = one.trial(trial.key)
            assert np.allclose(serial.powers.noise, trial.powers.noise, rtol=FLOAT32_SAMPLING)
            assert np.allclose(serial.powers.signal, trial.powers.signal, rtol=FLOAT32_SAMPLING)


def test_fid_is_measured_and_listed(tiny_pipeline_folder, tmp_path, monkeypatch):
    from sedimo.lab import objective

    names = ("fid", "fid_difference", "kid", "kid_difference")  # the comparison itself takes seconds
    monkeypatch.setattr(objective, "_set_measures", lambda *_: {n: Estimate(7.5, 0.5, 6.5, 8.5, 20) for n in names})
    monkeypatch.setattr(exploring, "compare_distributions", lambda *_: None)
    command = ("explore", tiny_pipeline_folder, "--store", tmp_path / "run", "--trials", 1, "--objective", "fid")
    options = (*QUICK, "--seeds", 20)
    assert run_json(*command, *options, "--dry-run")["missing"] == 1
    assert run_json(*command, *options)["measured"] == 1
    assert "7.5 ± 1.0" in run("trials", tmp_path / "run").stdout
    assert run_json("trials", tmp_path / "run")["trials"][0]["fid"]["n"] == 20


def test_trials_are_shown_and_exported(explored, tmp_path):
    store = explored[0]
    rows = run_json("trials", store)["trials"]
    assert rows[0].keys() == {"key", "objective", "paper_bits", "sqnr_db", "fid"}
    bits = [row["paper_bits"] for row in rows if row["objective"] == "final_latents"]
    assert bits == sorted(bits)
    shown = run("trials", store).stdout
    assert rows[0]["key"][:12] in shown
    assert f"{rows[0]['key'][:12]}  {rows[0]['objective']}" in shown
    assert with_error(Estimate(**rows[0]["sqnr_db"])) in shown
    written = run_json("trials", store, "-o", tmp_path / "trials.json")
    assert written == {"out": str(tmp_path / "trials.json"), "trials": len(rows)}
    assert f"{len(rows)} trials are in " in run("trials", store, "-o", tmp_path / "trials.json").stdout
    exported = json.loads((tmp_path / "trials.json").read_text())["trials"]
    assert {t["key"]: t["measures"]["sqnr_db"] for t in exported} == {r["key"]: r["sqnr_db"] for r in rows}


def test_a_study_without_a_space_shows_its_trials_without_bits(explored, tmp_path):
    with Study(explored[0], create=False) as whole, Study(tmp_path / "bare") as bare:
        bare.put_trial(whole.trials()[0])
    assert run_json("trials", tmp_path / "bare")["trials"][0]["paper_bits"] is None
    assert "1 trials" in run("trials", tmp_path / "bare").stdout


def test_what_holds_no_trials_is_not_exported(tmp_path):
    Study(tmp_path / "empty").close()
    (tmp_path / "nothing").mkdir()
    out = ("-o", tmp_path / "out.json")
    assert "has no trials" in run("trials", tmp_path / "empty", *out, code=3).stderr
    assert "there is no study" in run("trials", tmp_path / "nothing", *out, code=3).stderr
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--study-seed", "5"], "study seed 0, not 5"),
        (["--sampler", "paper"], "sampler stratified, not paper"),
        (["--low-bits", "5"], "low bits unset, not 5.0"),
        (["--formats", "kmc3,uaq4,fp16"], "formats fp16,kmc3,uaq4,uaq6, not fp16,kmc3,uaq4"),
    ],
)
def test_a_study_that_was_begun_otherwise_says_in_what(explored, tiny_pipeline_folder, monkeypatch, options, complaint):
    monkeypatch.setattr("sedimo.lab.lab.fit_bank", lambda *_, **__: pytest.fail("fitted before looking"))
    command = ("explore", tiny_pipeline_folder, "--store", explored[0], "--trials", 2, *QUICK, *options)
    for dry in ((), ("--dry-run",)):
        stderr = run(*command, *dry, code=4).stderr
        assert complaint in stderr
        assert "--store" in stderr


def test_a_study_of_other_weights_is_refused(explored, tiny_pipeline_folder, tmp_path):
    shutil.copytree(tiny_pipeline_folder, tmp_path / "other")
    file = tmp_path / "other" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_out_2.weight"] *= 2
    save_file(tensors, file)
    command = ("explore", tmp_path / "other", "--store", explored[0], "--trials", 2, *QUICK)
    refused = run(*command, code=4).stderr
    assert "was begun with weights" in refused
    assert "--whole-layers" not in refused  # which is about streams alone


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--trials", "0"], "--trials must be at least 1, got 0"),
        (["--low-bits", "1"], "low end of the bits must be possible"),
        (["--high-bits", "17"], "high end of the bits must be possible"),
        (["--high-bits", "nan"], "high end of the bits must be possible"),
        (["--low-bits", "6", "--high-bits", "5.5"], "a range of bits must rise"),
        (["--sampler", "paper", "--low-bits", "5"], "leave the range of bits out"),
        (["--sampler", "dice"], "--sampler must be one of paper, stratified"),
        (["--objective", "fid"], "at least 20 samples, got 2"),
        (["--objective", "beauty"], "final_latents, path, step, fid, got beauty"),
        (["--objective", "path,path"], "measured once"),
        (["--objective", ""], "final_latents, path, step, fid"),
        (["--formats", "fp16"], "leave every layer as it is"),
        (["--formats", "kma4a9"], "activation bits must lie in 2..8"),
        (["--executor", "ray"], "--executor must be one of serial, process"),
        (["--workers", "2"], "--executor process"),
        (["--executor", "process", "--workers", "0"], "--workers must be at least 1, got 0"),
    ],
)
def test_senseless_orders_are_refused_and_nothing_is_written(tiny_pipeline_folder, tmp_path, options, complaint):
    command = ("explore", tiny_pipeline_folder, "--store", tmp_path / "run", "--trials", "3", *QUICK, *options)
    assert complaint in run(*command, code=3).stderr
    assert list(tmp_path.iterdir()) == []


def test_sources_that_cannot_be_sampled_are_refused(tiny_pipeline_folder, tmp_path, monkeypatch):
    bare = ("explore", tiny_pipeline_folder / "transformer", "--trials", "3", *QUICK, "--store", tmp_path / "run")
    assert "a denoiser without its pipeline" in run(*bare, code=3).stderr
    inside = ("explore", tiny_pipeline_folder, "--trials", "3", *QUICK, "--store", tiny_pipeline_folder / "run")
    assert "must not lie in the source" in run(*inside, code=3).stderr
    from sedimo.lab import lab

    monkeypatch.setattr(lab, "MEMORY_SHARE", 0.0)
    command = ("explore", tiny_pipeline_folder, "--trials", "3", *QUICK, "--store", tmp_path / "run")
    several = run(*command, "--executor", "process", "--workers", "2", code=3).stderr
    assert "3 copies of the pipeline need" in several
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a process")
def test_one_ctrl_c_saves_what_runs_and_the_same_command_goes_on(tiny_pipeline_folder, tmp_path):
    arguments = ["explore", str(tiny_pipeline_folder), "--store", str(tmp_path / "run"), *QUICK]
    code = "import sys; from sedimo.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-u", "-c", code, *arguments, "--trials", "300"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("measuring recipes"):
                break
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Run the same command again" in stderr
    with Study(tmp_path / "run", create=False) as study:
        n_saved = len(study.trials())
    assert run_json(*arguments, "--trials", n_saved + 1)["measured"] <= 1
