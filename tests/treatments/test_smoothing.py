"""Smoothing whole pipelines: the float function is unchanged on every zoo model, and the layers are those asked for."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from sedimo_zoo import MODELS

import sedimo
from folding_examples import close
from packed_weights import check_checkpoint, dequantize_weights
from sedimo.bank import fit_bank
from sedimo.checkpoint.inputs import divide_input, smoothed_layers
from sedimo.checkpoint.layout import DIVISOR
from sedimo.errors import InputError, StateError
from sedimo.lab.bench import trace, weights_of
from sedimo.lab.lab import Lab
from sedimo.lab.seeds import SamplingSettings
from sedimo.lab.study import Study
from sedimo.methods.sqnr import noisiest_decisions, probe_sqnr
from sedimo.pipelines.diffusers import DiffusersPipeline
from sedimo.pipelines.loading import load_pipeline
from sedimo.pipelines.trajectory import record, replay
from sedimo.pipelines.weights import ModuleWeights
from sedimo.quant.formats import Format
from sedimo.space import search_space
from sedimo.treatments.smoothing import (
    SmoothingKnobs,
    SmoothingSettings,
    apply_smoothing,
    measure_inputs,
    plan_smoothing,
    plan_smoothings,
    smooth,
)
from tolerances import FLOAT32_FORMULA, FLOAT32_NETWORK


@pytest.fixture
def tiny(tiny_pipeline_folder):
    return load_pipeline(str(tiny_pipeline_folder))


def planned(pipe, settings, plan):
    """How a pipeline would be smoothed; it is not."""
    lab = Lab(pipe)
    folding, ranges = measure_inputs(lab, settings, plan)
    return plan_smoothing(folding, ranges, lab.weights, settings.alpha)


@pytest.mark.slow  # trained models; on tiny ones `smooth` itself refuses a function that changed
@pytest.mark.parametrize("name", MODELS)
def test_the_float_function_of_zoo_models_is_unchanged(name):
    pipe = load_pipeline(f"zoo:{name}")
    plan = pipe.default_sampling(range(2), 2)
    trajectory = record(pipe, plan)
    found = smooth(pipe, SmoothingSettings(share=1), sampling=plan)
    assert pipe.dtype == torch.float32
    assert set(found.ways.values()) == {"divided", "folded"}
    assert sum(any(layer.exponents) for layer in found.layers.values()) > len(found.layers) / 2
    with torch.no_grad():
        for call in trajectory.calls:
            assert close(replay(pipe.denoiser, call), call.output, FLOAT32_FORMULA)
    assert close(pipe.sample(plan), trajectory.latents, FLOAT32_NETWORK)  # rounding adds up over steps


def test_layers_are_chosen_by_local_noise(tiny):
    plan, graph = tiny.default_sampling(range(3), 2), trace(tiny)
    found = planned(tiny, SmoothingSettings(share=0.25), plan)
    space = search_space(graph, "uaq4,fp16")
    bank = fit_bank(weights_of(tiny), space)
    noise = probe_sqnr(Lab(tiny, bank), plan)
    names = sorted(space.decision_index, key=lambda d: -noise.over_time(d, Format.parse("uaq4")).mean)
    wanted = names[: round(0.25 * len(names))]
    assert set(found.layers) == {layer for d in wanted for layer in space.decision_index[d].layers}
    assert noisiest_decisions(space, noise, Format.parse("uaq4"), 1e-9) == tuple(names[:1])
    with pytest.raises(InputError, match="share of layers"):
        noisiest_decisions(space, noise, Format.parse("uaq4"), 0)


def test_a_list_of_layers(tiny):
    found = smooth(tiny, SmoothingSettings(layers=("proj_out_2",)), sampling=tiny.default_sampling(range(2), 1))
    assert found.ways == {"proj_out_2": "folded"} == smoothed_layers(tiny.denoiser)


def test_what_is_fitted_next_are_the_smoothed_weights(tiny):
    plain = weights_of(tiny).digest
    smooth(tiny, SmoothingSettings(share=1), sampling=tiny.default_sampling(range(2), 1))
    weights = weights_of(tiny)
    assert isinstance(weights, ModuleWeights)
    assert weights.digest != plain
    bank = fit_bank(weights_of(tiny), search_space(trace(tiny), "kmc8,fp16"))
    packed = bank.quantized("proj_out_2", Format.parse("kmc8")).dequantize()
    assert close(packed, tiny.denoiser.proj_out_2.weight, 0.05)


def test_smoothing_can_be_undone(tiny):
    plan = tiny.default_sampling(range(2), 2)
    before = tiny.sample(plan)
    found = planned(tiny, SmoothingSettings(share=1), plan)
    undo = apply_smoothing(tiny, found, plan)
    assert not torch.equal(tiny.sample(plan), before)
    undo()
    assert torch.equal(tiny.sample(plan), before)
    assert not tiny.is_quantized


def test_a_function_that_changed_is_refused_and_undone(tiny, monkeypatch):
    plan = tiny.default_sampling(range(2), 1)
    before = tiny.sample(plan)
    found = planned(tiny, SmoothingSettings(share=1), plan)
    monkeypatch.setattr("sedimo.checkpoint.inputs.divide_input", lambda _module, args: args)
    with pytest.raises(StateError, match="smoothing changed the output"):
        apply_smoothing(tiny, found, plan)
    assert not smoothed_layers(tiny.denoiser)
    assert torch.equal(tiny.sample(plan), before)


def test_a_denoiser_that_gives_nothing_but_zeros_can_be_smoothed(tiny):
    plan, order = tiny.default_sampling(range(2), 1), SmoothingSettings(layers=("proj_out_1",))
    found = planned(tiny, order, plan)
    for parameter in tiny.denoiser.proj_out_2.parameters():
        parameter.data.zero_()
    apply_smoothing(tiny, found, plan)
    assert list(smoothed_layers(tiny.denoiser)) == ["proj_out_1"]


def test_a_study_keeps_what_was_measured(tiny, tmp_path, monkeypatch):
    plan = tiny.default_sampling(range(2), 1)
    first = smooth(tiny, SmoothingSettings(share=0.2), store=tmp_path, sampling=plan)
    again = load_pipeline(str(tiny.folder))
    monkeypatch.setattr("sedimo.treatments.smoothing._measure_part", lambda *_: pytest.fail("measured again"))
    assert smooth(again, SmoothingSettings(share=0.2), store=tmp_path, sampling=plan) == first


def test_plans_differ_in_alpha_alone_and_are_kept(tiny, tmp_path, monkeypatch):
    """Ranges are measured once for all alphas, and what the study has is not measured again."""
    before = {n: (p, p.clone()) for n, p in tiny.denoiser.named_parameters()}
    wanted = [SmoothingSettings(alpha, layers=("proj_out_1", "proj_out_2")) for alpha in (0.5, 0.9)]
    with Study(tmp_path) as study:
        lab = Lab(tiny, study=study, sampling=SamplingSettings(2, n_steps=1))
        first = plan_smoothings(lab, wanted[:1])
        assert [name[:10] for name in study.record_names()] == ["smoothing:"]
        both = plan_smoothings(lab, [*wanted, *wanted])
        assert len(study.record_names()) == 2
        monkeypatch.setattr("sedimo.treatments.smoothing.measure_inputs", lambda *_: pytest.fail("measured again"))
        assert plan_smoothings(lab, wanted) == both[:2] == both[2:]
    assert both[0] == first[0]
    assert [plan.alpha for plan in both] == [0.5, 0.9, 0.5, 0.9]
    assert both[0].ranges == both[1].ranges
    assert both[0].layers != both[1].layers
    assert all(p is before[n][0] and torch.equal(p, before[n][1]) for n, p in tiny.denoiser.named_parameters())


def test_a_share_needs_an_alpha():
    assert SmoothingKnobs().settings is None
    assert SmoothingKnobs(0.7).settings == SmoothingSettings(0.7)
    assert SmoothingKnobs(0.5, 0.2).settings == SmoothingSettings(0.5, 0.2)
    with pytest.raises(InputError, match=r"give --smooth 0\.7, too"):
        SmoothingKnobs(share=0.2)
    with pytest.raises(InputError, match="smooth must be at least 0 and at most 1"):
        SmoothingKnobs(2.0)


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan")])
def test_senseless_shares_are_refused(share):
    with pytest.raises(InputError, match="share must be above 0 and at most 1"):
        SmoothingSettings(share=share)


def smoothed_everywhere(pipe):
    found = smooth(pipe, SmoothingSettings(share=1), sampling=pipe.default_sampling(range(2), 1))
    assert set(found.ways.values()) == {"divided", "folded"}
    return found.ways


def sample_of(pipeline):
    pipe = DiffusersPipeline(pipeline)
    return pipe.sample(pipe.default_sampling(range(2), 2))


@pytest.mark.parametrize("writer", ["diffusers", "sedimo"])
def test_divisors_are_saved_though_nothing_is_packed(tiny, tmp_path, writer):
    ways = smoothed_everywhere(tiny)
    (tiny if writer == "sedimo" else tiny.pipeline).save_pretrained(tmp_path / "out")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert smoothed_layers(loaded.transformer) == ways
    assert torch.equal(sample_of(loaded), sample_of(tiny.pipeline))
    checkpoint = check_checkpoint(tmp_path / "out" / "transformer")
    assert (checkpoint.configuration.layers, checkpoint.configuration.smoothed) == ({}, ways)


def test_what_is_folded_alone_is_an_ordinary_model(tiny, tmp_path):
    smooth(tiny, SmoothingSettings(layers=("proj_out_2",)), sampling=tiny.default_sampling(range(2), 1))
    tiny.pipeline.save_pretrained(tmp_path / "out")
    assert "quantization_config" not in (tmp_path / "out" / "transformer" / "config.json").read_text()
    assert torch.equal(sample_of(DiffusionPipeline.from_pretrained(tmp_path / "out")), sample_of(tiny.pipeline))


def test_a_saved_smoothed_pipeline_is_packed_as_in_memory(tiny, tmp_path):
    smoothed_everywhere(tiny)
    tiny.save_pretrained(tmp_path / "out")
    loaded = load_pipeline(str(tmp_path / "out"))
    for pipe in (tiny, loaded):
        sedimo.replace(pipe, {"proj_out_1": "kmc4", "proj_out_2": "uaq4"})
    assert torch.equal(sample_of(loaded.pipeline), sample_of(tiny.pipeline))
    with pytest.raises(InputError, match="already quantized"):
        sedimo.replace(loaded, {"proj_out_1": "kmc4"})


def test_copies_and_casts_keep_divisors(tiny):
    ways, plan = smoothed_everywhere(tiny), tiny.default_sampling(range(2), 1)
    (call,) = record(tiny, plan).calls
    copied = copy.deepcopy(tiny.denoiser).to("cpu")
    dequantize_weights(tiny.denoiser)
    assert smoothed_layers(copied) == ways
    assert torch.equal(replay(copied, call), call.output)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        cast = copy.deepcopy(copied).to(dtype)
        plain = copy.deepcopy(cast)
        dequantize_weights(plain)
        latents = call.inputs["hidden_states"].to(dtype)
        same = replace(call, inputs={**call.inputs, "hidden_states": latents})
        assert torch.equal(replay(cast, same), replay(plain, same))  # powers of two: no dtype rounds them
    divisor = copied.get_buffer(f"proj_out_1.{DIVISOR}")
    (moved,) = divide_input(copied.proj_out_1, (torch.ones(2, divisor.numel(), device="meta"),))
    assert moved.device.type == "meta"  # offloading moves a layer's tensors after its hooks have run


@pytest.mark.parametrize("undo", [dequantize_weights, lambda denoiser: denoiser.dequantize()])
def test_an_unsmoothed_pipeline_is_an_ordinary_one(tiny, tmp_path, undo):
    smoothed_everywhere(tiny)
    wanted = sample_of(tiny.pipeline)
    undo(tiny.denoiser)
    assert torch.equal(sample_of(tiny.pipeline), wanted)
    tiny.pipeline.save_pretrained(tmp_path / "out")
    assert "quantization_config" not in (tmp_path / "out" / "transformer" / "config.json").read_text()
    assert torch.equal(sample_of(DiffusionPipeline.from_pretrained(tmp_path / "out")), wanted)
