"""What a job says that it will take, and what it decides from that; what methods take is told beside them."""

from __future__ import annotations

import pytest

from sedimo.allocation.budget import BudgetSettings
from sedimo.errors import InputError
from sedimo.jobs import quantize
from sedimo.jobs.check import price_of_check
from sedimo.jobs.quantize import QuantizeSettings
from sedimo.lab import lab as lab_module
from sedimo.lab.bench import SourceSettings
from sedimo.lab.lab import Lab
from sedimo.lab.measuring import CallTiming
from sedimo.lab.seeds import SamplingSettings
from sedimo.methods import auto, method_named
from sedimo.treatments.error_feedback import ERROR_FEEDBACK, FeedbackSettings

SAMPLING = SamplingSettings(n_seeds=2, n_steps=2, n_check_seeds=2)


def settings_of(source, method="auto", bits=4.5, *, compensate=None, **options):
    chosen = {} if compensate is None else {ERROR_FEEDBACK.name: FeedbackSettings(compensate)}
    return QuantizeSettings(
        SourceSettings(str(source)),
        BudgetSettings(bits=bits),
        method=method,
        sampling=SAMPLING,
        chosen=chosen,
        **options,
    )


def plan_of(*arguments, **options):
    return quantize.plan(settings_of(*arguments, **options))


@pytest.fixture
def timed(monkeypatch):
    """Denoiser calls take a second, fits nothing."""
    monkeypatch.setattr(Lab, "time_calls", lambda *_: CallTiming(1.0, 2))
    monkeypatch.setattr(Lab, "seconds_per_fit", 0.0)


def test_auto_looks_through_the_whole_run_and_an_order_is_followed(tiny_pipeline_folder):
    plans = [plan_of(tiny_pipeline_folder, method) for method in ("jacobian", "adjoint", "auto", "combined")]
    step, run, by_itself, combined = plans
    assert [plan["method"] for plan in plans] == ["jacobian", "adjoint", "adjoint", "combined"]
    assert all(plan["unchecked"] == "" for plan in plans)
    assert by_itself["denoiser_calls"] > run["denoiser_calls"] > 0  # several recipes are measured, too
    assert combined["seconds"] > step["seconds"] > 0
    assert combined["denoiser_calls"] > step["denoiser_calls"] > 0


def test_a_slow_machine_gets_the_error_and_says_so(tiny_pipeline_folder, monkeypatch):
    for module in (auto, lab_module, quantize):
        monkeypatch.setattr(module, "PATIENCE_SECONDS", 1e-9)
    plan = plan_of(tiny_pipeline_folder)
    assert plan["method"] == "error"
    assert "minutes, so weight error has to do" in plan["reason"]
    assert "sampling the result would take" in plan["unchecked"]
    assert plan["denoiser_calls"] == 0


def test_no_call_is_timed_where_operations_alone_say_that_it_is_slow(tiny_pipeline_folder, monkeypatch):
    monkeypatch.setattr(lab_module, "FASTEST_MACS_PER_SECOND", {"cpu": 1.0, "other": 1.0})
    monkeypatch.setattr(Lab, "time_calls", lambda *_: pytest.fail("timed"))
    for method in ("auto", "error"):
        plan = plan_of(tiny_pipeline_folder, method)
        assert plan["method"] == "error"
        assert "at least" in plan["unchecked"]


@pytest.mark.parametrize("method", ["error", "uniform:kmc4"])
def test_the_check_is_part_of_the_plan(tiny_pipeline_folder, timed, method):
    with_check, without = (plan_of(tiny_pipeline_folder, method, check=check) for check in (True, False))
    assert with_check["denoiser_calls"] > without["denoiser_calls"] == 0
    assert with_check["seconds"] > without["seconds"]
    assert (with_check["unchecked"], without["unchecked"]) == ("", "not asked for")


def test_an_ordered_method_that_cannot_run_is_refused(tiny_pipeline_folder):
    denoiser = tiny_pipeline_folder / "transformer"
    with pytest.raises(InputError, match="without its pipeline"):
        plan_of(denoiser, "jacobian")
    plan = plan_of(denoiser)
    assert plan["method"] == "error"
    assert "without its pipeline" in plan["unchecked"]


@pytest.mark.parametrize(("name", "n_random"), [("orthogonality", 0), ("gnn", 0), ("jacobian", 30)])
def test_random_recipes_are_planned_only_for_tables_that_predict_noise(tiny_pipeline_folder, timed, name, n_random):
    settings = settings_of(tiny_pipeline_folder, name)
    lab = Lab(settings.source, sampling=SAMPLING)
    method, _ = method_named(name)
    expected = method.price(lab, settings.task).n_calls + price_of_check(lab, n_random=n_random).n_calls
    assert quantize.plan(settings)["denoiser_calls"] == expected


def test_codes_by_feedback_are_planned_with_the_default_alone(tiny_pipeline_folder):
    plans = {
        name: plan_of(tiny_pipeline_folder, method, compensate=asked)
        for name, method, asked in (
            ("auto", "auto", None),
            ("off", "auto", False),
            ("published", "jacobian", None),
            ("asked", "jacobian", True),
        )
    }
    for more, fewer in (("auto", "off"), ("asked", "published")):
        assert plans[more]["denoiser_calls"] > plans[fewer]["denoiser_calls"]
        assert plans[more]["disk_bytes"] > plans[fewer]["disk_bytes"]


def test_a_denoiser_without_its_pipeline_is_not_compensated(tiny_pipeline_folder):
    alone = tiny_pipeline_folder / "transformer"
    assert plan_of(alone)["denoiser_calls"] == 0
    with pytest.raises(InputError, match="--compensate runs the pipeline to see inputs of layers, but the source is"):
        plan_of(alone, "error", compensate=True)
