"""Other schedulers on a pipeline: whose settings they take, what cannot take them, and that its own comes back."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from sedimo.errors import InputError
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.pipelines.loading import load_pipeline
from sedimo.pipelines.schedulers import SCHEDULERS, exchanged, handled_steps, scheduler_named


@pytest.fixture
def pipeline(tiny_pipeline_folder):
    return DiTPipeline.from_pretrained(tiny_pipeline_folder)


def test_the_pipeline_samples_with_another_scheduler_and_has_its_own_again(pipeline):
    pipe = DiffusersPipeline(pipeline)
    plan, own = pipe.default_sampling(range(2), 4), pipe.pipeline.scheduler
    before, identity = pipe.sample(plan), pipe.identity
    made = scheduler_named(pipe.pipeline, "dpm-solver++", 4)
    assert isinstance(made, DPMSolverMultistepScheduler)
    assert made.config.prediction_type == "v_prediction"
    assert made.config.timestep_spacing == "trailing"
    with exchanged(pipe.pipeline, "scheduler", made):
        other = pipe.sample(plan)
        assert pipe.identity != identity
    assert torch.isfinite(other).all()
    assert not torch.equal(other, before)
    assert pipe.pipeline.scheduler is own
    assert torch.equal(pipe.sample(plan), before)


def test_the_own_scheduler_comes_back_after_an_error(pipeline):
    own = pipeline.scheduler
    with pytest.raises(ZeroDivisionError), exchanged(pipeline, "scheduler", scheduler_named(pipeline, "unipc", 2)):
        raise ZeroDivisionError
    assert pipeline.scheduler is own


def test_a_pipeline_that_scales_its_noise_takes_all_and_draws_alike():
    pipe = load_pipeline("zoo:cifar-ldm")
    plan = pipe.default_sampling(range(1), 12)
    reference = pipe.sample(plan)
    for name in SCHEDULERS:
        with exchanged(pipe.pipeline, "scheduler", scheduler_named(pipe.pipeline, name, plan.n_steps)):
            latents = pipe.sample(plan)
        distance = (latents - reference).norm() / reference.norm()
        assert distance < 0.5, f"{name}: {distance}"  # solvers of one equation from one noise end near each other


def test_a_step_that_does_not_take_what_it_is_given_is_refused(pipeline):
    scheduler = scheduler_named(pipeline, "unipc", 2)
    with handled_steps(scheduler, lambda call: call.run()):
        with pytest.raises(InputError, match=r"UniPCMultistepScheduler cannot be called .* argument 'generator'"):
            scheduler.step(torch.zeros(1, 4, 8, 8), scheduler.timesteps[0], torch.zeros(1, 4, 8, 8), generator=None)
        with pytest.raises(InputError, match="missing a required argument: 'sample'"):
            scheduler.step(torch.zeros(1, 4, 8, 8), scheduler.timesteps[0])


def test_what_cannot_be_taken_is_refused_with_the_reason(pipeline):
    with pytest.raises(InputError, match="schedulers are ddim, dpm-solver"):
        scheduler_named(pipeline, "heun", 2)
    with pytest.raises(InputError, match=r"euler starts from noise of 157\.4 times unit size"):
        scheduler_named(pipeline, "euler", 2)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(InputError, match="ddim cannot take the settings of FlowMatchEulerDiscreteScheduler"):
        scheduler_named(pipeline, "ddim", 2)
