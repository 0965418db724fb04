"""Correction while sampling: exact outputs, noise of the right variance by Monte Carlo, and everything restored."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from sedimo.errors import InputError, UnsupportedError
from sedimo.pipelines.correction import StepCorrection, _response, corrected, nearest
from sedimo.pipelines.schedulers import StepCall, handled_steps, previous_sample
from tolerances import DIFFERENT, FLOAT32_FORMULA, FLOAT32_SUM, STANDARD_ERRORS

SAMPLED_KEPT = 0.03  # a share that follows from a deviation known from 1500 samples

pytest_plugins = ["tiny_pipelines"]

N, CHANNELS, SIDE = 1500, 2, 4


class Owner:
    """The part of a pipeline adapter that the correction touches."""

    def __init__(self, scheduler):
        self.pipeline = self
        self.scheduler = scheduler


def correction(slope=0.0, bias=(0.0, 0.0), variance=(0.0, 0.0), timestep=500.0):
    return (StepCorrection(timestep, slope, bias, variance),)


def noise(seed, *shape):
    return torch.randn(shape or (N, CHANNELS, SIDE, SIDE), generator=torch.Generator().manual_seed(seed))


def ready(scheduler, n_steps=10):
    scheduler.set_timesteps(n_steps)
    return scheduler


def step_of(scheduler, prediction, sample, index=4, **arguments):
    t = scheduler.timesteps[index]
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(sample, t)
    return scheduler.step(prediction, t, sample, **arguments).prev_sample


STOCHASTIC = {
    "ddim": (lambda: DDIMScheduler(clip_sample=False), {"eta": 1.0}),
    "ddim-v": (lambda: DDIMScheduler(clip_sample=False, prediction_type="v_prediction"), {"eta": 0.7}),
    "ddim-sample": (lambda: DDIMScheduler(clip_sample=False, prediction_type="sample"), {"eta": 1.0}),
    "ddpm": (lambda: DDPMScheduler(clip_sample=False), {}),
    "ancestral": (EulerAncestralDiscreteScheduler, {}),
    "dpm-sde": (lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), {}),
}


@pytest.fixture(params=STOCHASTIC)
def stochastic(request):
    make, arguments = STOCHASTIC[request.param]
    return make, arguments


def ddim_gain_and_scale(scheduler, index, eta):
    """From the formulas of DDIM (arXiv 2010.02502, equations 12 and 16), for a prediction of noise."""
    now, before = (int(t) for t in (scheduler.timesteps[index], scheduler.timesteps[index + 1]))
    a, b = (float(scheduler.alphas_cumprod[t]) for t in (now, before))
    scale = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
    return math.sqrt(1 - b - scale**2) - math.sqrt(b * (1 - a) / a), scale


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_what_a_step_of_ddim_does_is_found_as_its_formulas_tell(eta):
    scheduler = ready(DDIMScheduler(clip_sample=False))
    found = []

    def look(call: StepCall):
        found.append(_response(scheduler, call))
        return call.run()

    with handled_steps(scheduler, look):
        step_of(scheduler, noise(1, 4, 2, 8, 8), noise(2, 4, 2, 8, 8), eta=eta)
    gain, scale = ddim_gain_and_scale(scheduler, 4, eta)
    assert found[0][1] == pytest.approx(gain / scale, rel=FLOAT32_FORMULA)


def test_noisy_predictions_leave_latents_of_the_variance_that_the_scheduler_wants(stochastic):
    """Clean predictions, and noisy ones with the noise known: the same mean and variance of the next latents."""
    make, arguments = stochastic
    sample, clean = noise(1), 0.5 * noise(2)
    scheduler = ready(make())
    small = 1e-3 * noise(3)  # probes the gain before it is asked for
    same = [step_of(ready(make()), clean + h, sample, generator=torch.manual_seed(0), **arguments) for h in (0, small)]
    gain = float(((same[1] - same[0]) * small).sum() / small.square().sum())
    own = step_of(ready(make()), 0 * clean, 0 * sample, generator=torch.manual_seed(5), **arguments)
    deviations = [0.8 * float(own.std()) / abs(gain), 0.4 * float(own.std()) / abs(gain)]
    rest = noise(4) * torch.tensor(deviations).reshape(1, 2, 1, 1)
    fix = correction(variance=tuple(d**2 for d in deviations))
    with corrected(Owner(scheduler), fix) as log:
        got = step_of(scheduler, clean + rest, sample, generator=torch.manual_seed(7), **arguments)
    mean = step_of(ready(make()), clean, sample, generator=torch.manual_seed(9), **arguments)
    wanted = mean - step_of(ready(make()), 0 * clean, 0 * sample, generator=torch.manual_seed(9), **arguments)
    error = math.sqrt(2 / (N * SIDE**2))  # relative, of a variance
    for channel in range(CHANNELS):
        ratio = float((got - wanted)[:, channel].var() / own.var())
        assert ratio == pytest.approx(1, abs=STANDARD_ERRORS * error)
        of_mean = float(own.std()) / math.sqrt(N * SIDE**2)
        assert abs(float((got - wanted)[:, channel].mean())) < STANDARD_ERRORS * of_mean
    assert log.kept == [pytest.approx((0.6 + math.sqrt(1 - 0.16)) / 2, abs=SAMPLED_KEPT)]
    without = step_of(ready(make()), clean + rest, sample, generator=torch.manual_seed(7), **arguments)
    assert float((without - wanted)[:, 0].var() / own.var()) > 1.5


def test_more_noise_than_the_scheduler_adds_leaves_none_of_its_own():
    scheduler, sample, clean = ready(DDIMScheduler(clip_sample=False)), noise(1, 4, 2, 8, 8), noise(2, 4, 2, 8, 8)
    with corrected(Owner(scheduler), correction(variance=(1e6, 0.0))) as log:
        a, b = (step_of(scheduler, clean, sample, eta=1.0, generator=torch.manual_seed(s)) for s in (1, 2))
    torch.testing.assert_close(a[:, 0], b[:, 0], rtol=0, atol=FLOAT32_FORMULA)
    assert (a[:, 1] - b[:, 1]).std() > 0.1
    assert log.kept == [0.5, 0.5]


@pytest.mark.parametrize("given", ["one", "list", "none"])
def test_nothing_to_reduce_leaves_the_step_as_it_is_whoever_draws_its_noise(given):
    sample, clean = noise(1, 3, 2, 8, 8), noise(2, 3, 2, 8, 8)

    def take(scheduler):
        one = torch.manual_seed(3)  # seeds the global generator and returns it
        several = [torch.Generator().manual_seed(i) for i in range(3)]
        generator = {"one": one, "list": several, "none": None}[given]
        return step_of(scheduler, clean, sample, eta=1.0, generator=generator)

    scheduler = ready(DDIMScheduler(clip_sample=False))
    expected = take(scheduler)
    with corrected(Owner(scheduler), correction()):
        torch.testing.assert_close(take(scheduler), expected, rtol=0, atol=FLOAT32_SUM)


@pytest.mark.parametrize(
    "make",
    [lambda: DDIMScheduler(), EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler],
)
def test_a_deterministic_step_gets_the_corrected_prediction_and_nothing_else(make):
    sample, clean = noise(1, 3, 2, 8, 8), noise(2, 3, 2, 8, 8)
    wrong = 0.8 * clean + torch.tensor([0.3, -0.1]).reshape(1, 2, 1, 1)
    expected = step_of(ready(make()), clean, sample)
    scheduler = ready(make())
    with corrected(Owner(scheduler), correction(-0.2, (0.3, -0.1), (5.0, 5.0))) as log:
        found = step_of(scheduler, wrong, sample)
    torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT32_FORMULA)
    assert (log.n_steps, log.kept) == (1, [])
    assert f"{type(scheduler).__name__} added no noise" in str(log)


def test_packed_latents_have_their_channels_last():
    scheduler = ready(FlowMatchEulerDiscreteScheduler())
    sample, clean = noise(1, 3, 16, 5), noise(2, 3, 16, 5)
    bias = (0.1, 0.2, 0.3, 0.4, 0.5)
    expected = step_of(ready(FlowMatchEulerDiscreteScheduler()), clean, sample)
    with corrected(Owner(scheduler), correction(0.5, bias, (0.0,) * 5)):
        found = step_of(scheduler, 1.5 * clean + torch.tensor(bias), sample)
    torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT32_FORMULA)


def test_a_learned_variance_is_left_alone():
    scheduler = ready(DDPMScheduler(clip_sample=False, variance_type="learned_range"))
    output, sample = noise(1, 3, 4, 8, 8), noise(2, 3, 2, 8, 8)
    seen = []

    def look(call):
        seen.append(call.with_prediction(0 * call.prediction).arguments["model_output"])
        return call.run()

    with handled_steps(scheduler, look):
        step_of(scheduler, output, sample)
    assert torch.equal(seen[0][:, 2:], output[:, 2:])
    assert not seen[0][:, :2].any()
    with corrected(Owner(scheduler), correction()), pytest.raises(UnsupportedError, match="not one number times"):
        step_of(scheduler, output, sample)


def test_the_nearest_timestep_counts():
    steps = [StepCorrection(t, k, (0.0,), (0.0,)) for t, k in ((900.0, 0.1), (500.0, 0.2), (100.0, 0.3))]
    assert [nearest(steps, t).slope for t in (999, 701, 699, 100, 0)] == [0.1, 0.1, 0.2, 0.3, 0.3]


def test_everything_is_restored_also_after_an_error(dit):
    scheduler = dit.pipeline.scheduler
    plan = dit.default_sampling((1, 2), 3)
    before, expected = dict(vars(scheduler)), dit.sample(plan)
    fix = correction(0.3, (0.1,) * 4, (0.0,) * 4)
    with corrected(dit, fix) as log:
        assert not torch.allclose(dit.sample(plan), expected, atol=DIFFERENT)
    assert log.n_steps == 3
    with pytest.raises(RuntimeError, match="mine"), corrected(dit, fix):
        raise RuntimeError("mine")
    assert vars(scheduler).keys() == before.keys()
    assert torch.equal(dit.sample(plan), expected)


def test_corrections_nest_in_a_step_of_somebody_elses():
    scheduler = ready(DDIMScheduler(clip_sample=False))
    calls, original = [], scheduler.step

    def theirs(model_output, timestep, sample):
        calls.append(1)
        return original(model_output, timestep, sample)

    scheduler.step = theirs
    with pytest.raises(UnsupportedError, match="exchanged"), corrected(Owner(scheduler), correction()):
        pass
    with corrected(Owner(scheduler), correction(), with_variance=False):
        previous = previous_sample(scheduler.step(noise(1), scheduler.timesteps[0], noise(2)))
    assert scheduler.step is theirs
    assert (calls, previous.shape) == ([1], (N, CHANNELS, SIDE, SIDE))


def test_a_step_that_clips_is_refused_and_can_be_corrected_without_its_noise():
    scheduler, arguments = ready(DDPMScheduler(clip_sample=True)), (3 * noise(1), noise(2))
    with (
        corrected(Owner(scheduler), correction()),
        pytest.raises(UnsupportedError, match=r"clips.*with_variance=False"),
    ):
        step_of(scheduler, *arguments)
    with corrected(Owner(scheduler), correction(), with_variance=False) as log:
        step_of(scheduler, *arguments)
    assert "left alone as asked" in str(log)


def test_what_cannot_be_corrected_is_refused():
    class Strange:
        def step(self, model_output, sample):
            return None

    class Brownian(DDIMScheduler):
        noise_sampler = None

    with pytest.raises(UnsupportedError, match="Strange has no argument 'timestep'"), corrected(Owner(Strange()), ()):
        pass
    with pytest.raises(UnsupportedError, match="process of its own"), corrected(Owner(Brownian()), correction()):
        pass
    scheduler = ready(DDIMScheduler())
    with corrected(Owner(scheduler), correction()), pytest.raises(InputError, match=r"for 2 channels.*given 3"):
        step_of(scheduler, noise(1, 2, 3, 4, 4), noise(2, 2, 3, 4, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slope": -1.0}, "slope above -1"),
        ({"slope": math.nan}, "finite"),
        ({"variance": (-1.0, 0.0)}, "no negative variance"),
        ({"variance": (1.0,)}, "each channel"),
    ],
)
def test_impossible_corrections_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        correction(**changes)
    with pytest.raises(InputError, match="at least one timestep"), corrected(Owner(DDIMScheduler()), ()):
        pass
