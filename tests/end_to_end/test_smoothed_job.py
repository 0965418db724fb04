"""The main job with smoothing: one command, a checkpoint that loads in diffusers with the same outputs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel

from packed_weights import check_checkpoint
from sedimo.allocation.budget import BudgetSettings
from sedimo.checkpoint.inputs import smoothed_layers
from sedimo.checkpoint.reading import read_packed
from sedimo.checkpoint.validation import tensor_specs
from sedimo.errors import InputError
from sedimo.jobs import quantize as job
from sedimo.jobs.quantize import QuantizeSettings
from sedimo.jobs.settings import FormatSettings
from sedimo.lab.bench import SourceSettings
from sedimo.lab.exchange import probed
from sedimo.lab.seeds import SamplingSettings
from sedimo.lab.study import Study
from sedimo.pipelines.loading import load_pipeline
from sedimo.pipelines.weights import ModuleWeights
from sedimo.treatments.smoothing import SMOOTHING, Smoothing, SmoothingKnobs
from tolerances import FLOAT32_FORMULA, FLOAT32_NETWORK

SAMPLING = SamplingSettings(n_seeds=2, n_steps=2, n_check_seeds=2)


def settings_of(source, out, smooth=None):
    return QuantizeSettings(
        SourceSettings(str(source)),
        BudgetSettings(bits=6.0),
        out,
        "error",
        FormatSettings("uaq4,uaq8,fp16"),
        sampling=SAMPLING,
        check=False,
        chosen={} if smooth is None else {SMOOTHING.name: smooth},
    )


def smoothing_of(result):
    return result.treatments["smoothing"]["layers"]


@pytest.fixture(scope="module")
def made(tiny_pipeline_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("smoothed") / "out"
    result = job.run(settings_of(tiny_pipeline_folder, out, smooth=SmoothingKnobs(0.6, share=1)))
    return out, result


def call_of(denoiser):
    generator = torch.Generator().manual_seed(0)
    inputs = {"hidden_states": torch.randn(2, 4, 8, 8, generator=generator)}
    inputs |= {"timestep": torch.tensor([3, 500]), "class_labels": torch.tensor([1, 2])}
    with torch.no_grad():
        return denoiser(**inputs).sample


def plan_of(out):
    with Study(out.with_name("out.study"), create=False) as study:
        (name,) = [n for n in study.record_names() if n.startswith("smoothing:")]
        return study.record(Smoothing, name)


def test_the_checkpoint_computes_what_was_measured(made, tiny_pipeline_folder):
    out, result = made
    loaded = DiTPipeline.from_pretrained(out).transformer
    assert smoothed_layers(loaded) == smoothing_of(result)
    assert set(smoothing_of(result).values()) == {"divided", "folded"}
    measured = load_pipeline(str(tiny_pipeline_folder)).denoiser
    plan_of(out).enter(measured, is_stored=False)
    with probed(measured, read_packed(check_checkpoint(out / "transformer"))):
        assert torch.equal(call_of(loaded), call_of(measured))


def test_saving_what_was_loaded_gives_the_same_outputs(made, tmp_path):
    out, _ = made
    loaded = DiTTransformer2DModel.from_pretrained(out / "transformer")
    loaded.save_pretrained(tmp_path / "again")
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "again")
    assert smoothed_layers(again) == smoothed_layers(loaded)
    assert torch.equal(call_of(again), call_of(loaded))


def test_sharded_and_half_precision_loading(made, tmp_path):
    out, _ = made
    loaded = DiTTransformer2DModel.from_pretrained(out / "transformer")
    loaded.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "shards")
    assert torch.equal(call_of(again), call_of(loaded))
    half = DiTTransformer2DModel.from_pretrained(out / "transformer", torch_dtype=torch.bfloat16)
    layer = next(name for name, how in smoothed_layers(half).items() if how == "divided")
    divisor = half.get_submodule(layer).input_divisor
    assert divisor.dtype == torch.bfloat16
    assert torch.equal(divisor.float(), loaded.get_submodule(layer).input_divisor)


def test_dequantizing_leaves_an_ordinary_denoiser(made, tmp_path):
    out, _ = made
    loaded = DiTTransformer2DModel.from_pretrained(out / "transformer")
    packed = call_of(loaded)
    loaded.dequantize()
    assert not smoothed_layers(loaded)
    assert not any("input_divisor" in name for name in loaded.state_dict())
    torch.testing.assert_close(call_of(loaded), packed, rtol=FLOAT32_NETWORK, atol=FLOAT32_FORMULA)
    loaded.save_pretrained(tmp_path / "plain")
    plain = DiTTransformer2DModel.from_pretrained(tmp_path / "plain")
    assert torch.equal(call_of(plain), call_of(loaded))


def test_sizes_and_texts(made):
    out, result = made
    checkpoint = check_checkpoint(out / "transformer")
    divided = [name for name, how in checkpoint.configuration.smoothed.items() if how == "divided"]
    tensors = tensor_specs(checkpoint.headers)
    assert all(tensors[f"{name}.input_divisor"].dtype == torch.float16 for name in divided)  # powers of two
    n_divisor_bytes = sum(tensors[f"{name}.input_divisor"].n_bytes for name in divided)
    assert 0 < n_divisor_bytes <= checkpoint.plain_bytes
    header_bytes = sum(header.file_bytes for header in checkpoint.headers) - checkpoint.stored_bytes
    assert header_bytes - checkpoint.plain_bytes > 0
    assert result.written.file_bytes == sum(f.stat().st_size for f in (out / "transformer").glob("*.safetensors"))
    line = str(plan_of(out))
    assert line.startswith("SmoothQuant, alpha 0.6: inputs of")
    assert line in (out / "README.md").read_text()
    assert line in (out / "report.html").read_text()
    assert json.loads(json.dumps(result.as_json()))["smoothing"]["alpha"] == 0.6


def test_the_weights_are_the_smoothed_ones(made, tiny_pipeline_folder):
    out, _ = made
    source = load_pipeline(str(tiny_pipeline_folder)).denoiser
    plain = ModuleWeights(source).digest
    plan_of(out).enter(source, is_stored=False)
    assert ModuleWeights(source).digest != plain
    for name, weight in read_packed(check_checkpoint(out / "transformer")).items():
        exact = source.get_parameter(f"{name}.weight")
        assert (weight.dequantize() - exact).norm() < 0.2 * exact.norm()


def test_the_same_order_goes_on(made, tiny_pipeline_folder, tmp_path, monkeypatch):
    out, _ = made
    monkeypatch.setattr("sedimo.treatments.smoothing.measure_inputs", lambda *_: pytest.fail("measured again"))
    settings = settings_of(tiny_pipeline_folder, tmp_path / "again", smooth=SmoothingKnobs(0.6, share=1))
    result = job.run(replace(settings, store=out.with_name("out.study")))
    first = DiTTransformer2DModel.from_pretrained(out / "transformer")
    second = DiTTransformer2DModel.from_pretrained(result.written.denoiser_folder)
    assert torch.equal(call_of(first), call_of(second))


def test_a_plan_counts_the_smoothing(tiny_pipeline_folder, tmp_path):
    without = job.plan(settings_of(tiny_pipeline_folder, tmp_path / "out"))
    ranked = job.plan(settings_of(tiny_pipeline_folder, tmp_path / "out", smooth=SmoothingKnobs(0.5)))
    every = job.plan(settings_of(tiny_pipeline_folder, tmp_path / "out", smooth=SmoothingKnobs(0.5, share=1)))
    assert without["denoiser_calls"] < every["denoiser_calls"] < ranked["denoiser_calls"]


def test_a_denoiser_alone_cannot_be_smoothed(tiny_pipeline_folder, tmp_path):
    settings = settings_of(tiny_pipeline_folder / "transformer", tmp_path / "out", smooth=SmoothingKnobs(0.5))
    with pytest.raises(InputError, match="smoothing runs the pipeline"):
        job.run(settings)
