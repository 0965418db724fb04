"""Three objectives on a pipeline whose noise can be worked out by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import sedimo
from sedimo.codec import content_key, to_plain
from sedimo.errors import InputError, StateError
from sedimo.lab.exchange import probed
from sedimo.lab.objective import measure, measure_reference
from sedimo.lab.study import Setting
from sedimo.pipelines.adapter import DenoiserCall, Sampling
from sedimo.pipelines.trajectory import batches_of, rows_of
from tolerances import DIFFERENT, FLOAT32_NETWORK, FLOAT64_FORMULA
from toy_pipeline import ToyAdapter

OBJECTIVES = ("final_latents", "path", "step")
SAMPLING = Sampling(seeds=(5, 6, 7), n_steps=3, batch_size=2)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("guided", [False, True])
def test_an_unchanged_denoiser_makes_no_noise(objective, guided):
    adapter = ToyAdapter(guided=guided)
    powers = measure(adapter, measure_reference(objective, adapter, SAMPLING))[0]
    assert powers.n == 3
    assert powers.noise.tolist() == [0, 0, 0]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_noise_does_not_depend_on_batches(objective):
    adapter, found = ToyAdapter(guided=True), []
    for batch_size in (1, 3):
        reference = measure_reference(objective, adapter, Sampling((5, 6, 7), 3, batch_size=batch_size))
        with probed(adapter.denoiser, {"twice": adapter.denoiser.twice.weight.detach() * 0.8}):
            found.append(measure(adapter, reference)[0])
    assert np.allclose(found[0].ratio, found[1].ratio, rtol=FLOAT32_NETWORK)
    assert (found[0].ratio > 0).all()


@pytest.mark.parametrize("guided", [False, True])
def test_a_halved_output_layer_halves_each_step(guided):
    """A halved output is off by a quarter of its power at every step that is taught, whatever the sample."""
    adapter = ToyAdapter(guided=guided)
    torch.nn.init.zeros_(adapter.denoiser.out.bias)
    half = {"out": adapter.denoiser.out.weight.detach() / 2}
    reference = measure_reference("step", adapter, SAMPLING)
    assert reference.n_calls == 6
    with probed(adapter.denoiser, half):
        taught = measure(adapter, reference)[0]
        assert np.allclose(taught.ratio, 0.25)
        assert taught.signal.tolist() == [1, 1, 1]
        own = measure(adapter, measure_reference("path", adapter, SAMPLING))[0]
    assert own.noise.tolist() == [0, 0, 0]


def test_the_own_path_accumulates_what_single_steps_do_not():
    adapter = ToyAdapter()
    torch.nn.init.zeros_(adapter.denoiser.out.bias)
    with torch.no_grad():
        adapter.denoiser.out.weight *= 20
    references = {name: measure_reference(name, adapter, SAMPLING) for name in OBJECTIVES}
    with probed(adapter.denoiser, {"out": adapter.denoiser.out.weight.detach() / 2}):
        found = {name: measure(adapter, reference)[0] for name, reference in references.items()}
        latents = adapter.sample(SAMPLING)
    assert np.allclose(found["step"].ratio, 0.25)
    assert not np.allclose(found["path"].ratio, 0.25, rtol=DIFFERENT)
    exact = references["final_latents"].trajectory.latents
    noise = (latents.double() - exact.double()).flatten(1).square().sum(1)
    assert np.allclose(found["final_latents"].noise, noise.numpy(), rtol=FLOAT64_FORMULA)


def test_rows_belong_to_samples_batch_after_batch():
    adapter = ToyAdapter(guided=True)
    calls = measure_reference("step", adapter, SAMPLING).trajectory.calls
    assert [samples for _, samples in batches_of(SAMPLING, calls)] == [range(2)] * 3 + [range(2, 3)] * 3
    with pytest.raises(StateError, match="does not fit"):
        list(batches_of(Sampling((5, 6, 7), 3, batch_size=3), calls))


def test_inputs_are_cut_by_rows_and_copied():
    output, state = torch.zeros(4, 2), torch.arange(8.0).reshape(4, 2)
    inputs = {"a": state, "t": torch.tensor(3.0), "deep": {"b": [state, torch.ones(3)]}, "scale": 2.0, "none": None}
    cut = rows_of(DenoiserCall(0, 3.0, inputs, output), slice(1, 3))
    assert torch.equal(cut["a"], state[1:3])
    assert torch.equal(cut["deep"]["b"][0], state[1:3])
    assert cut["deep"]["b"][1].shape == (3,)
    assert (float(cut["t"]), cut["scale"], cut["none"]) == (3.0, 2.0, None)
    cut["a"].zero_()
    assert state[1, 0] == 2


def test_images_are_measured_as_a_set_beside_their_latents(tiny_pipeline_folder):
    pipe = sedimo.load(tiny_pipeline_folder)
    plan = pipe.default_sampling(range(24), 1)
    reference = measure_reference("fid", pipe, plan)
    assert reference.n_calls == 1
    powers, same = measure(pipe, reference)
    assert powers.noise.max() == 0
    assert same["fid_difference"].value == pytest.approx(0, abs=FLOAT64_FORMULA)
    weight = pipe.denoiser.proj_out_2.weight.detach()
    with probed(pipe.denoiser, {"proj_out_2": weight * 0.2}):
        powers, other = measure(pipe, reference)
    assert powers.noise.min() > 0
    assert other["fid"].value != same["fid"].value
    assert other["fid"].n == 24
    assert {"fid", "fid_difference", "kid", "kid_difference"} == set(other)
    with pytest.raises(InputError, match="at least 20 samples, got 3"):
        measure_reference("fid", pipe, pipe.default_sampling(range(3), 1))


def test_only_a_trial_that_looks_at_images_is_named_by_the_extractor():
    setting = Setting("w", "Toy", "final_latents", (1, 2), 4, (), None, None, "float32", "cpu")
    assert dataclasses.replace(setting, extractor="e").key != setting.key
    assert setting.key == content_key({k: v for k, v in to_plain(setting).items() if k != "extractor"})


def test_a_recipe_that_diverges_has_endless_fid_and_ends_no_campaign(tiny_pipeline_folder):
    pipe = sedimo.load(tiny_pipeline_folder)
    reference = measure_reference("fid", pipe, pipe.default_sampling(range(20), 1))
    weight = torch.full_like(pipe.denoiser.proj_out_2.weight, float("nan"))
    with probed(pipe.denoiser, {"proj_out_2": weight}):
        powers, found = measure(pipe, reference)
    assert found["fid"].value == np.inf
    assert np.isinf(powers.noise).all()
