"""What a job says that it will take, and what it decides from that."""

from __future__ import annotations

import dataclasses

import pytest

from sedimo.api import planning
from sedimo.api.measuring import measure_table
from sedimo.api.opening import open_source
from sedimo.api.order import BudgetOrder, Order, SamplingOrder
from sedimo.errors import InputError
from sedimo.measurement.study import Study
from sedimo.measurement.worker import CallTiming

SAMPLING = SamplingOrder(n_seeds=2, n_steps=2, n_check_seeds=2)


def opened(source, method="auto", bits=4.5, **options):
    return open_source(Order(str(source), None, BudgetOrder(bits=bits), method, sampling=SAMPLING, **options))


def test_auto_looks_through_the_whole_run_and_an_order_is_followed(tiny_pipeline_folder):
    plans = [planning.plan_job(opened(tiny_pipeline_folder, m)) for m in ("jacobian", "adjoint", "auto", "combined")]
    step, run, auto, combined = plans
    assert [plan.method for plan in plans] == ["jacobian", "adjoint", "adjoint", "combined"]
    assert all(plan.unchecked == "" for plan in plans)
    assert auto.n_calls > run.n_calls > 0  # several recipes are measured, too
    assert combined.seconds > step.seconds > 0
    assert combined.n_calls > step.n_calls > 0


def test_auto_looks_at_fewer_samples_then_at_single_steps_where_that_takes_long(tiny_pipeline_folder, monkeypatch):
    monkeypatch.setattr(planning, "time_calls", lambda *_: CallTiming(1.0, 20))
    monkeypatch.setattr(planning, "seconds_per_fit", lambda _: 0.0)
    source = opened(tiny_pipeline_folder)
    timing = CallTiming(1.0, 20)
    whole, fewer = (planning._adjoint_cost(source, timing, n).seconds for n in (8, 2))
    step = planning._search_cost(source, "jacobian", timing).seconds
    monkeypatch.setattr(planning, "PATIENCE_SECONDS", whole)
    assert planning.plan_job(source).n_samples == 8
    monkeypatch.setattr(planning, "PATIENCE_SECONDS", fewer)
    assert planning.plan_job(source).n_samples == 2
    monkeypatch.setattr(planning, "PATIENCE_SECONDS", step)
    plan = planning.plan_job(source)
    assert plan.method == "jacobian"
    assert "so single steps have to do" in plan.reason


def test_auto_tells_why_a_sampler_is_not_looked_through(tiny_pipeline_folder, monkeypatch):
    monkeypatch.setattr(planning, "why_not_differentiated", lambda *_: "this sampler has no derivative")
    plan = planning.plan_job(opened(tiny_pipeline_folder))
    assert plan.method == "jacobian"
    assert plan.reason == "this sampler has no derivative, so single steps have to do"


def test_a_slow_machine_gets_the_error_and_says_so(tiny_pipeline_folder, monkeypatch):
    monkeypatch.setattr(planning, "PATIENCE_SECONDS", 1e-9)
    plan = planning.plan_job(opened(tiny_pipeline_folder))
    assert plan.method == "error"
    assert "minutes, so weight error has to do" in plan.reason
    assert "sampling the result would take" in plan.unchecked
    assert plan.n_calls == 0


def test_no_call_is_timed_where_operations_alone_say_that_it_is_slow(tiny_pipeline_folder, monkeypatch):
    monkeypatch.setattr(planning, "FASTEST_MACS_PER_SECOND", {"cpu": 1.0, "other": 1.0})
    monkeypatch.setattr(planning, "time_calls", lambda *_: pytest.fail("timed"))
    for method in ("auto", "error"):
        plan = planning.plan_job(opened(tiny_pipeline_folder, method))
        assert plan.method == "error"
        assert "at least" in plan.unchecked


@pytest.mark.parametrize("method", ["error", "uniform:kmc4"])
def test_the_check_is_part_of_the_plan(tiny_pipeline_folder, method):
    with_check = planning.plan_job(opened(tiny_pipeline_folder, method))
    without = planning.plan_job(opened(tiny_pipeline_folder, method, check=False))
    assert with_check.n_calls > without.n_calls == 0
    assert with_check.seconds > without.seconds
    assert (with_check.unchecked, without.unchecked) == ("", "not asked for")


def test_an_ordered_method_that_cannot_run_is_refused(tiny_pipeline_folder):
    denoiser = tiny_pipeline_folder / "transformer"
    with pytest.raises(InputError, match="without its pipeline"):
        planning.plan_job(opened(denoiser, "jacobian"))
    plan = planning.plan_job(opened(denoiser))
    assert plan.method == "error"
    assert "without its pipeline" in plan.unchecked


def test_weight_changes_that_do_not_fit_at_once_cost_more_passes(tiny_pipeline_folder, monkeypatch):
    order = opened(tiny_pipeline_folder, "jacobian", check=False)
    once = planning.plan_job(order)
    monkeypatch.setattr(planning, "count_passes", lambda _: 10)
    assert planning.plan_job(order).n_calls == once.n_calls / 2 * 11


def test_passes_take_seconds_of_local_noise_too(tiny_pipeline_folder, monkeypatch):
    monkeypatch.setattr(planning, "time_calls", lambda *_: CallTiming(100.0, 2))
    order = opened(tiny_pipeline_folder, "sqnr", check=False)
    once = planning.plan_job(order)
    monkeypatch.setattr(planning, "count_passes", lambda _: 11)
    often = planning.plan_job(order)
    assert often.n_calls == once.n_calls / 2 * 12
    assert often.seconds - once.seconds == pytest.approx(100 * (often.n_calls - once.n_calls), rel=0.01)


def test_no_more_timesteps_are_planned_than_there_are_steps(tiny_pipeline_folder):
    order = opened(tiny_pipeline_folder, "orthogonality", check=False)
    plan = planning._orthogonality_cost(order, CallTiming(1.0, 2))
    assert plan.n_calls == 16 * 2 + 2 * (1 + 1)  # 32 samples instead of 2; two steps again, of one sample and of all


@pytest.mark.parametrize("method", ["orthogonality", "gnn"])
def test_random_recipes_are_planned_only_for_tables_that_predict_noise(tiny_pipeline_folder, monkeypatch, method):
    monkeypatch.setattr(planning, "time_calls", lambda *_: CallTiming(1.0, 2))

    def calls_of_check(name):
        with_check, without = (
            planning._check_cost(opened(tiny_pipeline_folder, name), CallTiming(1.0, 2), n_random=n) for n in (30, 0)
        )
        plan = planning.plan_job(opened(tiny_pipeline_folder, name))
        bare = planning._search_cost(opened(tiny_pipeline_folder, name), name, CallTiming(1.0, 2))
        return plan.n_calls - bare.n_calls, with_check.n_calls, without.n_calls

    planned, _, expected = calls_of_check(method)
    assert planned == expected
    planned, expected, _ = calls_of_check("jacobian")
    assert planned == expected


def test_scaling_is_checked_where_formats_were_not_probed(tiny_pipeline_folder, tmp_path):
    many = opened(tiny_pipeline_folder, "ablation", 6.0, formats="uaq3,uaq4,uaq5,uaq6,fp16")
    with Study(tmp_path / "many") as study:
        measured = measure_table(many, "ablation", study)
        assert measured.scaling is not None
        assert measured.scaling.n <= planning.N_SCALING_CHECKS
        unchecked = dataclasses.replace(many, order=dataclasses.replace(many.order, check=False))
        assert measure_table(unchecked, "ablation", study).scaling is None
    few = opened(tiny_pipeline_folder, "ablation", 6.0, formats="uaq4,fp16")
    with Study(tmp_path / "few") as study:
        assert measure_table(few, "ablation", study).scaling is None


def test_codes_by_feedback_are_planned_with_the_default_alone(tiny_pipeline_folder):
    plans = {
        name: planning.plan_job(opened(tiny_pipeline_folder, method, compensate=asked))
        for name, method, asked in (
            ("auto", "auto", None),
            ("off", "auto", False),
            ("published", "jacobian", None),
            ("asked", "jacobian", True),
        )
    }
    told = {name: plan.is_compensated for name, plan in plans.items()}
    assert told == {"auto": True, "off": False, "published": False, "asked": True}
    for more, fewer in (("auto", "off"), ("asked", "published")):
        assert plans[more].n_calls > plans[fewer].n_calls
        assert plans[more].disk_bytes > plans[fewer].disk_bytes


def test_a_denoiser_without_its_pipeline_is_not_compensated(tiny_pipeline_folder):
    alone = tiny_pipeline_folder / "transformer"
    assert not planning.plan_job(opened(alone)).is_compensated
    with pytest.raises(InputError, match="--compensate runs the pipeline to see inputs of layers, but the source is"):
        planning.plan_job(opened(alone, "error", compensate=True))
