"""Which method the default stands for on a machine, and what methods say that they take."""

from __future__ import annotations

import numpy as np
import pytest

import sedimo
from sedimo.allocation.budget import BudgetSettings
from sedimo.allocation.combine import Agreement
from sedimo.lab import lab as lab_module
from sedimo.lab.lab import Lab
from sedimo.lab.measuring import CallTiming
from sedimo.lab.seeds import SamplingSettings
from sedimo.methods import ablation, auto, sqnr
from sedimo.methods import method as pricing
from sedimo.methods.ablation import ABLATION
from sedimo.methods.adjoint import ADJOINT, AdjointSettings
from sedimo.methods.auto import AUTO
from sedimo.methods.combined import COMBINED
from sedimo.methods.jacobian import JACOBIAN
from sedimo.methods.method import NO_KNOBS, Task
from sedimo.methods.orthogonality import ORTHOGONALITY, ImportanceOptions
from sedimo.methods.sqnr import SQNR
from sedimo.metrics.signal import NoisePowers

BUDGET = BudgetSettings(bits=4.5)
TIMING = CallTiming(1.0, 2)


@pytest.fixture(scope="module")
def pipe(tiny_pipeline_folder):
    return sedimo.load(tiny_pipeline_folder)


def lab_on(pipe, formats="uaq3,uaq4,uaq6", study=None):
    sampling = SamplingSettings(n_seeds=2, n_steps=2, n_check_seeds=2)
    return Lab(pipe, formats=formats, sampling=sampling, study=study)


@pytest.fixture(scope="module")
def lab(pipe):
    return lab_on(pipe)


@pytest.fixture
def timed(monkeypatch):
    """Denoiser calls take a second, fits nothing."""
    monkeypatch.setattr(Lab, "time_calls", lambda *_: TIMING)
    monkeypatch.setattr(Lab, "seconds_per_fit", property(lambda _: 0.0))


def resolved(lab, **knobs):
    return AUTO.resolve(lab, Task(AdjointSettings(**knobs), BUDGET))


def test_auto_looks_through_the_whole_run_with_rivals(lab, timed):
    found = resolved(lab, minutes=2.0)
    assert (found.method, found.task.n_samples, found.task.budget) == (ADJOINT, 8, BUDGET)
    assert found.task.knobs == AdjointSettings(minutes=2.0, is_portfolio=True)
    assert found.price == AUTO.price(lab, Task(AdjointSettings(minutes=2.0), BUDGET))
    alone = ADJOINT.price(lab, Task(AdjointSettings(), BUDGET))
    assert found.price.n_calls > alone.n_calls > 0  # several recipes are measured, too
    assert found.price.seconds > alone.seconds + 120


def test_auto_looks_at_fewer_samples_then_at_single_steps_where_that_takes_long(lab, timed, monkeypatch):
    wide, few = (
        ADJOINT.price(lab, Task(AdjointSettings(is_portfolio=True), BUDGET, n_samples=n)).seconds for n in (8, 2)
    )
    monkeypatch.setattr(auto, "PATIENCE_SECONDS", wide)
    assert resolved(lab).task.n_samples == 8
    monkeypatch.setattr(auto, "PATIENCE_SECONDS", few)
    assert resolved(lab).task.n_samples == 2
    monkeypatch.setattr(auto, "PATIENCE_SECONDS", JACOBIAN.price(lab, Task(NO_KNOBS)).seconds)
    found = resolved(lab)
    assert (found.method, found.task.knobs) == (JACOBIAN, NO_KNOBS)
    assert "so single steps have to do" in found.reason


def test_auto_tells_why_a_sampler_is_not_looked_through(lab, timed, monkeypatch):
    monkeypatch.setattr(auto, "why_not_differentiated", lambda _: "this sampler has no derivative")
    found = resolved(lab)
    assert found.method is JACOBIAN
    assert found.reason == "this sampler has no derivative, so single steps have to do"


def test_a_slow_machine_gets_the_error_and_says_so(lab, timed, monkeypatch):
    monkeypatch.setattr(auto, "PATIENCE_SECONDS", 1e-9)
    found = resolved(lab)
    assert found.method.name == "error"
    assert found.reason.endswith("minutes, so weight error has to do")
    assert found.price.n_calls == 0


def test_no_call_is_timed_where_operations_alone_say_that_it_is_slow(lab, monkeypatch):
    monkeypatch.setattr(lab_module, "FASTEST_MACS_PER_SECOND", {"cpu": 1.0, "other": 1.0})
    monkeypatch.setattr(Lab, "time_calls", lambda *_: pytest.fail("timed"))
    found = resolved(lab)
    assert found.method.name == "error"
    assert "at least" in found.reason


def test_several_methods_take_as_long_as_each(lab, timed):
    both, step = (method.price(lab, Task(NO_KNOBS, BUDGET)) for method in (COMBINED, JACOBIAN))
    alone = ABLATION.price(lab, Task(NO_KNOBS, BUDGET))
    assert both.n_calls == step.n_calls + alone.n_calls
    assert both.seconds == pytest.approx(step.seconds + alone.seconds)


def test_weight_changes_that_do_not_fit_at_once_cost_more_passes(lab, timed, monkeypatch):
    tasks = {JACOBIAN: Task(NO_KNOBS), ADJOINT: Task(AdjointSettings()), SQNR: Task(NO_KNOBS)}
    once = {method.name: method.price(lab, task) for method, task in tasks.items()}
    for module in (pricing, sqnr):
        monkeypatch.setattr(module, "passes", lambda _: [[]] * 11)
    for method, task in tasks.items():
        before, after = once[method.name], method.price(lab, task)
        assert after.n_calls == before.n_calls / 2 * 12
        assert after.seconds - before.seconds >= after.n_calls - before.n_calls


def test_no_more_timesteps_are_planned_than_there_are_steps(lab, timed):
    price = ORTHOGONALITY.price(lab, Task(ImportanceOptions()))
    assert price.n_calls == 16 * 2 + 2 * (1 + 1)  # 32 samples instead of 2; two steps again, of one sample and of all


def test_what_a_prior_takes_is_told_without_weights(lab):
    prices = {m.name: m.price_of_prior(lab.space, TIMING) for m in (JACOBIAN, ADJOINT, ABLATION)}
    assert prices["adjoint"].seconds > prices["jacobian"].seconds > prices["jacobian"].n_calls == 4
    assert prices["ablation"].n_calls == 2 * (1 + 2 * len(lab.space.decisions))


@pytest.mark.parametrize(
    ("formats", "is_checked", "is_told"),
    [
        ("uaq3,uaq4,uaq5,uaq6,fp16", True, True),
        ("uaq3,uaq4,uaq5,uaq6,fp16", False, False),
        ("uaq4,fp16", True, False),
    ],
)
def test_scaling_is_checked_where_formats_were_not_probed(pipe, monkeypatch, formats, is_checked, is_told):
    asked = []

    def measured(_lab, _on, probes):
        asked.extend(probes)
        return {(d, f): NoisePowers(np.full(2, 1e-3 * f.bits**-4.0), np.ones(2)) for d, f in probes}

    monkeypatch.setattr(ablation, "measure_probes", measured)
    found = ABLATION.measure(lab_on(pipe, formats), Task(NO_KNOBS, BudgetSettings(bits=6.0), is_checked=is_checked))
    scaling = found.of(Agreement)
    assert (scaling is not None) == is_told
    assert scaling is None or scaling.n <= ablation.N_SCALING_CHECKS
    assert len(asked) == len(set(asked))
