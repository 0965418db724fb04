"""Noise along the trajectory against the objectives, and at blocks against a second denoiser."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sedimo.bank import fit_bank
from sedimo.lab import trajectory
from sedimo.lab.bench import trace
from sedimo.lab.exchange import Prober, probed
from sedimo.lab.lab import Lab
from sedimo.lab.objective import measure, measure_reference
from sedimo.lab.study import Study
from sedimo.lab.trajectory import probe_trajectory, sqnr_by_call
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.loading import load_pipeline
from sedimo.pipelines.trajectory import record
from sedimo.pipelines.weights import FileWeights
from sedimo.quant.formats import FP16, Format
from sedimo.space import Recipe, search_space
from tolerances import FLOAT32_SAMPLING
from toy_pipeline import ToyAdapter, ToyWeights, toy_space

SAMPLING = Sampling(seeds=(1, 2, 3, 5, 8), n_steps=3, batch_size=5)
BLOCKS = ("conv_in", "time", "grouped", "twice", "unused", "out")
STORED_DIGITS = 2e-5  # of means of what is stored with six digits
STORED_SPREAD = 1e-3  # of the deviation of such values: their differences lose two digits


def made(guided=False, kept=()):
    adapter = ToyAdapter(guided=guided)
    bank = fit_bank(ToyWeights(adapter.denoiser), toy_space(adapter.denoiser))
    formats = {d.name: FP16 if d.name in kept else Format.parse("uaq4") for d in bank.space.decisions}
    return adapter, bank, bank.space.recipe(formats)


@pytest.mark.parametrize("guided", [False, True])
def test_the_lines_are_those_of_the_objectives(guided):
    adapter, bank, recipe = made(guided)
    probe = probe_trajectory(Lab(adapter, bank), recipe, SAMPLING, BLOCKS)
    for name, field in (("path", "path"), ("step", "step"), ("final_latents", "latents")):
        reference = measure_reference(name, adapter, SAMPLING)
        with probed(adapter.denoiser, bank.quantize(recipe)):
            expected = measure(adapter, reference)[0].ratio
        found = np.array(getattr(probe, field))
        assert found.shape == (3, 5)
        kept = found[-1] if name == "final_latents" else found.mean(axis=0)
        assert kept == pytest.approx(expected, rel=STORED_DIGITS)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_pipeline_that_is_watched_may_be_called_again(tiny_pipeline_folder, guidance):
    """Whoever watches the calls of a real pipeline sees the second ones as well."""
    pipe = load_pipeline(str(tiny_pipeline_folder), device="cpu", dtype="fp32")
    space = search_space(trace(pipe), "uaq4,fp16")
    bank = fit_bank(FileWeights(tiny_pipeline_folder / "transformer"), space)
    recipe = space.recipe({d.name: Format.parse("uaq4") for d in space.decisions if "attn1" in d.name})
    plan = replace(pipe.default_sampling((1, 2, 3), 3), guidance=guidance)
    probe = probe_trajectory(Lab(pipe, bank), recipe, plan, ("transformer_blocks.0", "transformer_blocks.1"))
    assert len(set(probe.timesteps)) == 3
    for name, field in (("path", "path"), ("step", "step"), ("final_latents", "latents")):
        reference = measure_reference(name, pipe, plan)
        with probed(pipe.denoiser, bank.quantize(recipe)):
            expected = measure(pipe, reference)[0].ratio
        ratios = np.array(getattr(probe, field))
        found = ratios[-1] if name == "final_latents" else ratios.mean(axis=0)
        assert found == pytest.approx(expected, rel=STORED_DIGITS)


def outputs_of(denoiser, name, call):
    kept = []
    handle = denoiser.get_submodule(name).register_forward_hook(lambda _m, _a, output: kept.append(output.double()))
    with torch.no_grad():
        denoiser(**call.inputs)
    handle.remove()
    return kept


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", ["conv_in", "grouped", "twice", "out"])
def test_blocks_are_compared_on_the_inputs_of_full_precision(name, guided):
    adapter, bank, recipe = made(guided)
    probe = probe_trajectory(Lab(adapter, bank), recipe, SAMPLING, BLOCKS)
    quantized = copy.deepcopy(adapter.denoiser)
    for layer, weight in bank.quantize(recipe).items():
        quantized.get_submodule(layer).weight = torch.nn.Parameter(weight.dequantize())
    n = len(SAMPLING.seeds)
    for step, call in enumerate(record(adapter, SAMPLING).calls):
        pairs = zip(outputs_of(adapter.denoiser, name, call), outputs_of(quantized, name, call), strict=True)
        noise, signal = (sum(parts) for parts in zip(*(((b - a) ** 2, a**2) for a, b in pairs), strict=True))
        ratio = noise.flatten(1).sum(1) / signal.flatten(1).sum(1)
        expected = [float(ratio[i::n].mean()) for i in range(n)]
        db = [-10 * math.log10(r) for r in expected]
        found = sqnr_by_call(probe.blocks[name])[step]
        assert probe.blocks[name][step] == pytest.approx(expected, rel=STORED_DIGITS)
        assert (found.value, found.n) == (pytest.approx(np.mean(db), rel=STORED_DIGITS), n)
        assert found.standard_error == pytest.approx(np.std(db, ddof=1) / math.sqrt(n), rel=STORED_SPREAD)


def test_what_is_shared_by_the_batch_counts_for_each_and_what_is_not_called_is_absent():
    adapter, bank, recipe = made()
    found = probe_trajectory(Lab(adapter, bank), recipe, SAMPLING, BLOCKS).blocks
    assert list(found) == [name for name in BLOCKS if name != "unused"]
    assert sqnr_by_call(found["time"])[0].standard_error == pytest.approx(0)


def test_before_the_first_quantized_layer_outputs_are_exact():
    adapter, bank, recipe = made(kept=("conv_in", "time"))
    probe = probe_trajectory(Lab(adapter, bank), recipe, SAMPLING, BLOCKS)
    assert all(one.value == math.inf for one in sqnr_by_call(probe.blocks["conv_in"]))
    lines = (probe.blocks["grouped"], probe.path, probe.latents)
    assert all(math.isfinite(one.value) for line in lines for one in sqnr_by_call(line))
    assert probe.step[0] == probe.path[0]  # the first inputs are the same


def test_rounded_activations_are_part_of_it():
    adapter, bank, recipe = made()
    rounded = Recipe({name: Format.parse("uaq4a4") for name in recipe.layers})
    plain, both = (probe_trajectory(Lab(adapter, bank), r, SAMPLING, BLOCKS) for r in (recipe, rounded))
    assert sqnr_by_call(both.path)[0].value < sqnr_by_call(plain.path)[0].value
    reference = measure_reference("path", adapter, SAMPLING)
    with Prober(adapter.denoiser, bank) as prober:
        prober.switch(rounded)
        expected = measure(adapter, reference)[0].ratio
    assert np.array(both.path).mean(axis=0) == pytest.approx(expected, rel=STORED_DIGITS)


def test_a_diverging_recipe_is_endlessly_noisy(monkeypatch):
    adapter, bank, recipe = made()
    spoilt = {name: torch.full_like(w.dequantize(), torch.nan) for name, w in bank.quantize(recipe).items()}
    monkeypatch.setattr(type(bank), "quantize", lambda *_: spoilt)
    probe = probe_trajectory(Lab(adapter, bank), recipe, SAMPLING, BLOCKS)
    assert {one.value for line in (probe.path, probe.latents, probe.blocks["out"]) for one in sqnr_by_call(line)} == {
        -math.inf
    }


@pytest.mark.parametrize("batch", [1, 2])
def test_how_many_samples_go_together_changes_nothing(monkeypatch, tmp_path, batch):
    adapter, bank, recipe = made(guided=True)
    whole = probe_trajectory(Lab(adapter, bank), recipe, SAMPLING, BLOCKS)
    monkeypatch.setattr(trajectory, "_BATCH", batch)
    with Study(tmp_path) as study:
        parts = probe_trajectory(Lab(adapter, bank, study=study), recipe, SAMPLING, BLOCKS)
        assert len(study.probe_keys()) == -(-5 // batch)
    assert parts.timesteps == whole.timesteps
    assert np.array(parts.latents) == pytest.approx(np.array(whole.latents), rel=FLOAT32_SAMPLING)


def test_a_study_keeps_what_was_measured(tmp_path):
    adapter, bank, recipe = made()
    with Study(tmp_path) as study:
        first = probe_trajectory(Lab(adapter, bank, study=study), recipe, SAMPLING, BLOCKS)
        n_calls = adapter.n_calls
        again = probe_trajectory(Lab(adapter, bank, study=study), recipe, SAMPLING, BLOCKS)
        assert (again, adapter.n_calls) == (first, n_calls)
        other = bank.space.recipe({d.name: Format.parse("uaq3") for d in bank.space.decisions})
        assert probe_trajectory(Lab(adapter, bank, study=study), other, SAMPLING, BLOCKS) != first


def test_the_denoiser_is_given_back_as_it_was(monkeypatch):
    adapter, bank, recipe = made()
    before = {n: (p, p.clone()) for n, p in adapter.denoiser.named_parameters()}
    probe_trajectory(Lab(adapter, bank), recipe, SAMPLING, BLOCKS)
    monkeypatch.setattr(trajectory, "_ratios", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        probe_trajectory(Lab(adapter, bank), recipe, SAMPLING, BLOCKS)
    assert all(p is before[n][0] and torch.equal(p, before[n][1]) for n, p in adapter.denoiser.named_parameters())
    assert not any(module._forward_hooks for module in adapter.denoiser.modules())
