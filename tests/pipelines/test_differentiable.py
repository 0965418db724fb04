"""Runs that can be differentiated: the samples of the pipeline, and gradients those of plain autograd.

Where gradients are wanted, torch takes other kernels for some products on some processors, so bits may differ.
"""

from __future__ import annotations

import weakref
from dataclasses import replace

import diffusers
import pytest
import torch

from sedimo.errors import InputError, UnsupportedError
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.differentiable import make_again, pull_through
from tolerances import FLOAT32_FORMULA, FLOAT32_SUM, FLOAT64_SUM
from toy_sampler import Control, PixelToyPipeline, SmallDenoiser, ToyPipeline, ToySampler, ToyScheduler
from whole_gradients import walked_gradient, whole_gradient

pytest_plugins = ["tiny_pipelines"]

PIPELINES = ("dit", "text_to_image", "flux", "latent_diffusion", "ddim", "ddpm", "consistency")
SLOPE_TOLERANCE = 5e-3  # of a central difference in float32, of a curved function; found: 5e-4 at most
SLOPE_STEP = 1e-3
N_STEPS = 3
TOY_PLAN = Sampling((11, 5, 7), N_STEPS)


class NoisyDDIM(diffusers.DDIMScheduler):
    """DDIM that draws noise at every step, which pipelines ask for by `eta`."""

    def step(self, model_output, timestep, sample, eta=0.8, generator=None, return_dict=True):
        return super().step(model_output, timestep, sample, eta, generator=generator, return_dict=return_dict)


SCHEDULERS = {
    "DDIM": (diffusers.DDIMScheduler, {}),
    "DDIM with eta": (NoisyDDIM, {}),
    "DDPM": (diffusers.DDPMScheduler, {}),
    "DPM-Solver++": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "UniPC": (diffusers.UniPCMultistepScheduler, {}),
    "Euler": (diffusers.EulerDiscreteScheduler, {}),
    "Euler with noise": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "Heun": (diffusers.HeunDiscreteScheduler, {}),
    "PNDM": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
}


def direction_for(latents, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(latents.shape, generator=generator).to(latents) / latents.std()


def assert_same_gradients(got, wanted, tolerance):
    assert got.keys() == wanted.keys()
    greatest = max(float(g.abs().max()) for g in wanted.values())
    assert greatest > 0
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=tolerance * greatest, msg=name)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_run_is_that_of_the_pipeline_and_so_are_its_gradients(name, request):
    adapter = request.getfixturevalue(name)
    plan = adapter.default_sampling((11, 5), N_STEPS)
    latents = adapter.sample(plan)
    run = adapter.differentiable(plan)
    torch.testing.assert_close(run.latents.detach(), latents, rtol=0, atol=FLOAT32_FORMULA)
    assert len(run.cuts) == N_STEPS
    assert [cut.call.step for cut in run.cuts] == list(range(N_STEPS))
    directions = [direction_for(latents, seed) for seed in (0, 1)]
    found = walked_gradient(adapter.denoiser, run, directions)
    for direction, got in zip(directions, found, strict=True):
        assert_same_gradients(got, whole_gradient(adapter, plan, direction), FLOAT32_FORMULA)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_all_that_a_sampler_does_is_differentiated(name, dit):
    kind, changes = SCHEDULERS[name]
    dit.pipeline.scheduler = kind.from_config(dit.pipeline.scheduler.config, **changes)
    plan = replace(dit.default_sampling((11, 5), 4), guidance=1.5)
    latents = dit.sample(plan)
    run = dit.differentiable(plan)
    torch.testing.assert_close(run.latents.detach(), latents, rtol=0, atol=FLOAT32_FORMULA)
    assert len(run.cuts) == len(dit.pipeline.scheduler.timesteps)
    direction = direction_for(latents)
    (got,) = walked_gradient(dit.denoiser, run, [direction])
    assert_same_gradients(got, whole_gradient(dit, plan, direction), FLOAT32_FORMULA)
    steepest = sum(float(g.double().square().sum()) for g in got.values()) ** 0.5
    changes = {name: gradient / steepest for name, gradient in got.items()}
    assert slope_along(dit, plan, direction, changes) == pytest.approx(steepest, rel=SLOPE_TOLERANCE)


def slope_along(adapter, plan, direction, changes):
    """Of <direction, final latents> when weights move, by a central difference of two runs of the pipeline."""
    weights, found = dict(adapter.denoiser.named_parameters()), []
    with torch.no_grad():
        for step in (SLOPE_STEP, -2 * SLOPE_STEP):
            for name, change in changes.items():
                weights[name].add_(change, alpha=step)
            found.append(float((adapter.sample(plan).double() * direction.double()).sum()))
        for name, change in changes.items():
            weights[name].add_(change, alpha=SLOPE_STEP)
    return (found[0] - found[1]) / (2 * SLOPE_STEP)


@pytest.mark.parametrize("name", ["dit", "text_to_image"])
def test_between_calls_there_are_only_tensors_of_the_size_of_latents(name, request):
    adapter = request.getfixturevalue(name)
    sizes, alive = {}, []
    for layer in adapter.denoiser.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            layer.register_forward_hook(lambda _module, _inputs, output: alive.append(weakref.ref(output)))
    for n_steps in (2, 6):
        saved = []
        plan = adapter.default_sampling((1, 2), n_steps)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=saved: (to.append(x.numel()), x)[1], lambda x: x):
            run = adapter.differentiable(plan)
        assert len(alive) > 20
        assert sum(ref() is not None for ref in alive) == 0
        guided = 2 * run.latents.numel()
        assert max(saved, default=0) <= guided
        sizes[n_steps] = sum(saved) / n_steps
        most, counts = [], []

        def count(cut, gradients, most=most, counts=counts):
            alive.clear()
            answers = pull_through(cut, gradients) if cut.places else again_without(cut, gradients)
            most.append(len(alive))
            counts.append(sum(ref() is not None for ref in alive))
            return answers

        run.walk_back([direction_for(run.latents.detach())], count)
        assert len(set(most)) == 1
        assert counts == [0] * n_steps  # what a call took is gone before the next one is made again
    assert sizes[6] <= 1.5 * sizes[2]  # as much for each step; the first one's latents are a constant


def again_without(cut, gradients):
    """The first call, whose inputs nothing is asked of."""
    make_again(cut, cut.call.inputs)
    return [[] for _ in gradients]


def test_what_all_calls_share_is_copied_once(text_to_image, flux):
    for adapter, names in (
        (text_to_image, ("encoder_hidden_states",)),
        (flux, ("encoder_hidden_states", "pooled_projections", "txt_ids", "img_ids")),
    ):
        first, *others = adapter.differentiable(adapter.default_sampling((1, 2), N_STEPS)).cuts
        for name in names:
            assert all(cut.call.inputs[name] is first.call.inputs[name] for cut in others), name
        states = next(iter(first.call.inputs.values()))
        assert all(next(iter(cut.call.inputs.values())) is not states for cut in others)


def state_of(pipeline):
    networks = [c for c in pipeline.components.values() if isinstance(c, torch.nn.Module)]
    return [
        [
            ("forward" in vars(n), getattr(n.forward, "__func__", n.forward), [p.requires_grad for p in n.parameters()])
            for n in networks
        ],
        "step" in vars(pipeline.scheduler),
        dict(getattr(pipeline, "_progress_bar_config", {})),
    ]


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("where", ["nowhere", "denoiser", "scheduler"])
def test_the_pipeline_is_what_it_was_also_after_an_exception(name, where, request, monkeypatch):
    adapter = request.getfixturevalue(name)
    for number, parameter in enumerate(adapter.denoiser.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    plan = adapter.default_sampling((11, 5), 2)
    before, latents = state_of(adapter.pipeline), adapter.sample(plan)

    def fail(*_, **__):
        raise KeyError(where)

    if where == "nowhere":
        adapter.differentiable(plan)
    else:
        with monkeypatch.context() as patch:
            if where == "denoiser":
                patch.setattr(type(adapter.denoiser), "forward", fail)
            else:
                patch.setattr(type(adapter.pipeline.scheduler), "step", fail)
            with pytest.raises(KeyError, match=where):
                adapter.differentiable(plan)
    assert state_of(adapter.pipeline) == before
    assert torch.is_grad_enabled()
    assert torch.equal(adapter.sample(plan), latents)


def test_a_forward_that_was_replaced_before_is_put_back(dit):
    own = dit.denoiser.forward
    seen = []

    def replaced(*args, **kwargs):
        seen.append(1)
        return own(*args, **kwargs)

    dit.denoiser.forward = replaced
    dit.differentiable(dit.default_sampling((1, 2), 2))
    assert vars(dit.denoiser)["forward"] is replaced
    assert len(seen) == 2


def toy(pipeline=ToyPipeline, scheduler=None, **settings):
    torch.manual_seed(0)
    return ToySampler(pipeline(SmallDenoiser(), scheduler, **settings))


def toy_direction():
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("pipeline", [ToyPipeline, PixelToyPipeline])
@pytest.mark.parametrize("how", ["plain", "guided", "controlled"])
def test_gradients_are_exact_also_with_a_second_network_between_the_calls(pipeline, how):
    adapter = toy(pipeline, guided=how == "guided", control=Control() if how == "controlled" else None)
    latents, run = adapter.sample(TOY_PLAN), adapter.differentiable(TOY_PLAN)
    assert run.latents.dtype == torch.float64
    torch.testing.assert_close(run.latents.detach().float(), latents, rtol=0, atol=FLOAT32_SUM)
    networks = [cut.network for cut in run.cuts]
    assert networks.count(adapter.denoiser) == N_STEPS
    assert len(networks) == N_STEPS + (N_STEPS - 1 if how == "controlled" else 0)  # first it sees noise, a constant
    (got,) = walked_gradient(adapter.denoiser, run, [toy_direction()])
    assert_same_gradients(got, whole_gradient(adapter, TOY_PLAN, toy_direction()), FLOAT64_SUM)


class Forgetful(ToyScheduler):
    """The second step is of no consequence."""

    def step(self, model_output, timestep, sample):
        is_second = bool(timestep == self.timesteps[1])
        return super().step(model_output * 0.0 if is_second else model_output, timestep, sample)


class Blind(Forgetful):
    """The same without a trace of the call."""

    def step(self, model_output, timestep, sample):
        return super().step(model_output if timestep != self.timesteps[1] else sample.detach(), timestep, sample)


@pytest.mark.parametrize("scheduler", [Forgetful, Blind])
def test_a_call_without_influence_changes_nothing(scheduler):
    adapter = toy(scheduler=scheduler())
    (got,) = walked_gradient(adapter.denoiser, adapter.differentiable(TOY_PLAN), [toy_direction()])
    assert_same_gradients(got, whole_gradient(adapter, TOY_PLAN, toy_direction()), FLOAT64_SUM)


class OneHot(ToyScheduler):
    def step(self, model_output, timestep, sample):
        best = (sample - model_output).argmax(-1)
        return super().step(torch.nn.functional.one_hot(best, 4).to(sample), timestep, sample.detach())


class Detaching(ToyScheduler):
    def step(self, model_output, timestep, sample):
        return super().step(model_output.detach(), timestep, sample.detach())


class ByNumpy(ToyScheduler):
    def step(self, model_output, timestep, sample):
        return super().step(torch.from_numpy(model_output.numpy()), timestep, sample)


class TwicePipeline(PixelToyPipeline):
    """Makes steps that its scheduler has not announced."""

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=2, return_dict=True):
        x = torch.stack([torch.randn(2, 4, 4, generator=g, dtype=torch.float64) for g in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps.repeat_interleave(2):
            x = self.scheduler.step(self.unet(x, t)["sample"], t, x).prev_sample
        return (x,)


@pytest.mark.parametrize(
    ("pipeline", "scheduler", "message"),
    [
        (ToyPipeline, OneHot, "ToyPipeline with OneHot gives final latents that have no derivative by the denoiser"),
        (PixelToyPipeline, OneHot, "PixelToyPipeline with OneHot gives final latents that have no derivative"),
        (ToyPipeline, Detaching, "ToyPipeline with Detaching gives final latents that have no derivative"),
        (ToyPipeline, ByNumpy, "ToyPipeline with ByNumpy cannot be run with gradients: Can't call numpy"),
        (TwicePipeline, ToyScheduler, "TwicePipeline with ToyScheduler makes 6 steps at 3 timesteps"),
    ],
)
def test_a_sampler_without_derivative_is_refused(pipeline, scheduler, message):
    adapter = toy(pipeline, scheduler())
    adapter.sample(TOY_PLAN)  # can be done
    with pytest.raises(UnsupportedError, match=message):
        adapter.differentiable(TOY_PLAN)
    assert "forward" not in vars(adapter.denoiser)
    assert all(p.requires_grad for p in adapter.denoiser.parameters())


def test_plans_that_do_not_suit_are_refused_as_in_sampling(dit):
    with pytest.raises(InputError, match="class number or label"):
        dit.differentiable(replace(dit.default_sampling((1,), 2), conditions=()))
