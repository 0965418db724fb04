"""Which seeds each part of a job samples: none that decides or judges was searched on."""

from __future__ import annotations

import dataclasses

import pytest

import sedimo
from sedimo.api.order import FINAL_FACTOR, SamplingOrder
from sedimo.pipelines.adapter import Sampling


@pytest.fixture(scope="module")
def pipe(tiny_pipeline_folder):
    return sedimo.load(tiny_pipeline_folder)


@pytest.mark.parametrize("order", [SamplingOrder(), SamplingOrder(n_seeds=3, first_seed=7, n_check_seeds=5)])
def test_plans_share_no_seed(pipe, order):
    searched, checked, decided = (set(plan(pipe).seeds) for plan in (order.searching, order.checking, order.deciding))
    assert len(searched) == order.n_seeds
    assert len(decided) == FINAL_FACTOR * order.n_seeds
    assert not searched & checked
    assert not decided & (searched | checked)


@pytest.mark.parametrize(("n_seeds", "wanted"), [(8, 32), (40, 32), (8, 0)])
def test_what_takes_many_samples_adds_seeds_past_all_others(pipe, n_seeds, wanted):
    order = SamplingOrder(n_seeds=n_seeds)
    plan = order.sampling_many(pipe, wanted)
    assert len(plan.seeds) == max(n_seeds, wanted)
    assert set(order.searching(pipe).seeds) <= set(plan.seeds)
    assert not set(plan.seeds) & {*order.checking(pipe).seeds, *order.deciding(pipe).seeds}


@pytest.mark.parametrize("order", [SamplingOrder(), SamplingOrder(n_seeds=2, first_seed=7, n_check_seeds=64)])
def test_moments_of_inputs_are_of_samples_that_nothing_else_looks_at(pipe, order):
    """And checking on more seeds does not change them, and with them the codes."""
    own = set(order.compensating(pipe).seeds)
    assert len(own) == 4 * order.n_seeds
    plans = (order.searching, order.checking, order.deciding, lambda p: order.sampling_many(p, 1024))
    assert not own & {seed for plan in plans for seed in plan(pipe).seeds}
    assert set(dataclasses.replace(order, n_check_seeds=5).compensating(pipe).seeds) == own


def test_the_first_samples_of_a_plan_are_the_same_samples():
    plan = Sampling((5, 6, 7), 4, ("a", "b"), guidance=2.0)
    assert plan.first(2) == Sampling((5, 6), 4, ("a", "b"), guidance=2.0)
    assert plan.first(9) == plan
    assert [plan.first(2).condition(i) for i in range(2)] == [plan.condition(i) for i in range(2)]
