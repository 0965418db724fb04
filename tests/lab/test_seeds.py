"""Which seeds each part of a job samples: none that decides or judges was searched on."""

from __future__ import annotations

import dataclasses

import pytest

import sedimo
from sedimo.lab.seeds import FINAL_FACTOR, SamplingSettings, Seeds
from sedimo.pipelines.adapter import Sampling


@pytest.fixture(scope="module")
def pipe(tiny_pipeline_folder):
    return sedimo.load(tiny_pipeline_folder)


def seeds_of(pipe, settings):
    return Seeds(settings, pipe.default_sampling)


@pytest.mark.parametrize("settings", [SamplingSettings(), SamplingSettings(n_seeds=3, first_seed=7, n_check_seeds=5)])
def test_plans_share_no_seed(pipe, settings):
    seeds = seeds_of(pipe, settings)
    searched, checked, decided = (set(plan.seeds) for plan in (seeds.search, seeds.check, seeds.final))
    assert len(searched) == settings.n_seeds
    assert len(decided) == FINAL_FACTOR * settings.n_seeds
    assert not searched & checked
    assert not decided & (searched | checked)


@pytest.mark.parametrize(("n_seeds", "wanted"), [(8, 32), (40, 32), (8, 0)])
def test_what_takes_many_samples_adds_seeds_past_all_others(pipe, n_seeds, wanted):
    seeds = seeds_of(pipe, SamplingSettings(n_seeds=n_seeds))
    plan = seeds.more(wanted)
    assert len(plan.seeds) == max(n_seeds, wanted)
    assert set(seeds.search.seeds) <= set(plan.seeds)
    assert not set(plan.seeds) & {*seeds.check.seeds, *seeds.final.seeds}


@pytest.mark.parametrize("settings", [SamplingSettings(), SamplingSettings(n_seeds=2, first_seed=7, n_check_seeds=64)])
def test_moments_of_inputs_are_of_samples_that_nothing_else_looks_at(pipe, settings):
    """And checking on more seeds does not change them, and with them the codes."""
    seeds = seeds_of(pipe, settings)
    own = set(seeds.moments.seeds)
    assert len(own) == 4 * settings.n_seeds
    assert not own & {
        seed for plan in (seeds.search, seeds.check, seeds.final, seeds.more(1024)) for seed in plan.seeds
    }
    assert set(seeds_of(pipe, dataclasses.replace(settings, n_check_seeds=5)).moments.seeds) == own


def test_the_first_samples_of_a_plan_are_the_same_samples():
    plan = Sampling((5, 6, 7), 4, ("a", "b"), guidance=2.0)
    assert plan.first(2) == Sampling((5, 6), 4, ("a", "b"), guidance=2.0)
    assert plan.first(9) == plan
    assert [plan.first(2).condition(i) for i in range(2)] == [plan.condition(i) for i in range(2)]
