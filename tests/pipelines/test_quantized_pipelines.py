"""Quantized denoisers pass through loading, sampling and saving, and are refused as a source of weights."""

import pytest
import torch

from sedimo.checkpoint.weights import replace_weights
from sedimo.errors import InputError
from sedimo.pipelines.loading import load_pipeline
from sedimo.pipelines.weights import FileWeights, ModuleWeights, stored_dtype
from sedimo.quant.fitting import quantize_weight


@pytest.fixture(params=["fp32", "bf16"])
def adapter(request, tiny_pipeline_folder):
    adapter = load_pipeline(tiny_pipeline_folder, device="cpu", dtype=request.param)
    linears = {n: m for n, m in adapter.denoiser.named_modules() if isinstance(m, torch.nn.Linear)}
    weights = {n: quantize_weight(m.weight, "kmc4") for n, m in linears.items() if "attn" in n}
    replace_weights(adapter.denoiser, weights)
    return adapter


def test_a_saved_pipeline_samples_the_same_bit_for_bit(adapter, tmp_path):
    sampling = adapter.default_sampling((1, 2), 2)
    latents = adapter.sample(sampling)
    for place in ("once", "twice"):
        folder = adapter.save_pretrained(tmp_path / place)
        adapter = load_pipeline(folder, device="cpu", dtype=adapter.dtype)
        assert adapter.is_quantized
        assert torch.equal(adapter.sample(sampling), latents)


def test_a_saved_denoiser_loads_alone(adapter, tmp_path):
    folder = adapter.save_pretrained(tmp_path / "out") / "transformer"
    bare = load_pipeline(folder, device="cpu", dtype=adapter.dtype)
    assert bare.is_quantized
    assert bare.dtype is adapter.dtype
    assert stored_dtype([folder / "diffusion_pytorch_model.safetensors"]) is adapter.dtype


def test_they_are_no_source_of_weights(adapter, tmp_path):
    with pytest.raises(InputError, match="quantized already"):
        ModuleWeights(adapter.denoiser)
    with pytest.raises(InputError, match=r"quantized already \(by 'sedimo'\)"):
        FileWeights(adapter.save_pretrained(tmp_path / "out"))


def test_they_are_not_cast(adapter):
    with pytest.raises(InputError, match="cannot be cast"):
        load_pipeline(adapter.pipeline, dtype="fp16")
