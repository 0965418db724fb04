"""The correction of denoisers whose error is known, against what was planted and against a plain regression."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler

from sedimo.errors import InputError, StateError
from sedimo.pipelines.correction import corrected
from sedimo.pipelines.loading import load_pipeline
from sedimo.pipelines.trajectory import output_tensor
from sedimo.treatments.noise_correction import _estimated, _sums, correction_of, estimate_correction
from tolerances import DIFFERENT, FLOAT32_FORMULA, FLOAT32_NETWORK, FLOAT64_FORMULA, FLOAT64_SUM, STANDARD_ERRORS

SEEDS, BIAS = (1, 2, 3, 5, 8), (0.2, -0.1, 0.05, 0.3)
SAMPLED_VARIANCE = 0.2  # of noise of 12 samples


@pytest.fixture
def pair(tiny_pipeline_folder):
    """The same pipeline twice."""
    return tuple(load_pipeline(str(tiny_pipeline_folder), device="cpu", dtype="fp32") for _ in range(2))


def plan_of(pipe, guidance=1.0, **changes):
    return replace(pipe.default_sampling(SEEDS, 3), guidance=guidance, **changes)


def slope_at(timestep):
    return -0.3 + timestep / 2000


@contextlib.contextmanager
def distorted(denoiser, seed=None):
    """The denoiser gives (1 + k_t) x + b; with a seed x and noise of deviation 0.1 instead."""
    generator = torch.Generator().manual_seed(seed or 0)

    def hook(_module, _args, kwargs, output):
        x = output_tensor(output)
        if seed is not None:
            return type(output)(x + 0.1 * torch.randn(x.shape, generator=generator))
        timestep = float(kwargs["timestep"].flatten()[0])
        return type(output)((1 + slope_at(timestep)) * x + torch.tensor(BIAS).reshape(1, 4, 1, 1))

    handle = denoiser.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("path", ["full", "own"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_planted_slope_and_bias_are_found_and_corrected_exactly(pair, guidance, path):
    full, small = pair
    plan = plan_of(full, guidance, batch_size=2)
    expected = full.sample(plan)
    with distorted(small.denoiser):
        fits = estimate_correction(full, small, plan, path=path)
        with corrected(small, correction_of(fits)):
            found = small.sample(plan)
        assert not torch.allclose(small.sample(plan), expected, atol=DIFFERENT)
    torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT32_NETWORK)
    assert len(fits) == 3
    for fit in fits:
        assert fit.slope.value == pytest.approx(slope_at(fit.timestep), abs=FLOAT32_FORMULA)
        assert [b.value for b in fit.bias] == pytest.approx(BIAS, abs=FLOAT32_FORMULA)
        assert fit.slope.standard_error < FLOAT32_FORMULA
        assert max(fit.variance) < 1e-8
        assert fit.explained == pytest.approx(1)


def test_noise_that_has_nothing_to_do_with_the_prediction_is_no_slope(pair):
    full, small = pair
    with distorted(small.denoiser, seed=4):
        fits = estimate_correction(full, small, replace(full.default_sampling(range(12), 3), guidance=1.0))
    for fit in fits:
        assert abs(fit.slope.value) < STANDARD_ERRORS * fit.slope.standard_error
        assert 0 < fit.slope.standard_error < 0.05
        assert all(abs(b.value) < STANDARD_ERRORS * b.standard_error for b in fit.bias)
        assert fit.variance == pytest.approx((0.01,) * 4, rel=SAMPLED_VARIANCE)
        assert fit.explained < 0.05


@pytest.mark.parametrize("make", [DDIMScheduler, EulerAncestralDiscreteScheduler])
def test_the_second_run_predicts_from_the_latents_of_the_first(pair, make):
    """Also where the scheduler adds noise."""
    for pipe in pair:
        pipe.pipeline.scheduler = make(prediction_type="v_prediction")
    seen = [[], []]
    for pipe, inputs in zip(pair, seen, strict=True):
        pipe.denoiser.register_forward_pre_hook(
            lambda _m, _a, kw, inputs=inputs: inputs.append((kw.get("hidden_states", _a and _a[0])).clone()),
            with_kwargs=True,
        )
    with distorted(pair[1].denoiser):
        estimate_correction(*pair, plan_of(pair[0]))
    assert len(seen[0]) == len(seen[1]) == 3
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_the_fit_is_the_regression_of_another_library_and_its_error_that_of_leaving_samples_out():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 3, 4, 4, generator=generator, dtype=torch.float64)
    y = 0.9 * x + 0.2 * torch.randn(6, 3, 4, 4, generator=generator, dtype=torch.float64) + 0.1

    def regression(rows):
        channels = np.eye(3).repeat(16, axis=0)
        design = np.concatenate([np.stack([np.moveaxis(x[r].numpy(), 0, 0).ravel(), *channels.T], 1) for r in rows])
        target = np.concatenate([y[r].numpy().ravel() for r in rows])
        return np.linalg.lstsq(design, target, rcond=None)[0], design, target

    coefficients, design, target = regression(range(6))
    found = _estimated(500.0, _sums(x, y, 6))
    assert found.slope.value == pytest.approx(coefficients[0] - 1, abs=FLOAT64_SUM)
    assert [b.value for b in found.bias] == pytest.approx(coefficients[1:], abs=FLOAT64_SUM)
    rest = (target - design @ coefficients).reshape(6, 3, 16)
    assert found.variance == pytest.approx((rest**2).mean(axis=(0, 2)), rel=FLOAT64_SUM)
    without = np.array([regression([r for r in range(6) if r != left])[0] for left in range(6)])
    errors = np.sqrt(5 / 6 * ((without - without.mean(0)) ** 2).sum(0))
    assert [e.standard_error for e in (found.slope, *found.bias)] == pytest.approx(errors, rel=FLOAT64_FORMULA)


def test_rows_of_guidance_belong_to_their_samples():
    x, y = torch.randn(2, 6, 2, 4, 4).unbind()
    together = _sums(x, y, 3)
    assert together == pytest.approx(_sums(x[:3], y[:3], 3) + _sums(x[3:], y[3:], 3))
    assert together[0, 0].tolist() == [32, 32]


def test_what_cannot_be_estimated_is_refused(pair):
    full, small = pair
    with pytest.raises(InputError, match="at least two samples"):
        estimate_correction(full, small, plan_of(full).first(1))
    with pytest.raises(InputError, match="full or own, got 'other'"):
        estimate_correction(full, small, plan_of(full), path="other")
    small.pipeline.scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="leading")
    with torch.no_grad(), pytest.raises(StateError, match="the same scheduler"):
        estimate_correction(full, small, plan_of(full))


def test_predictions_that_are_no_numbers_are_refused(pair):
    full, small = pair
    small.denoiser.register_forward_hook(lambda _m, _a, output: type(output)(output_tensor(output) * torch.nan))
    with pytest.raises(InputError, match="NaN"):
        estimate_correction(full, small, plan_of(full))
