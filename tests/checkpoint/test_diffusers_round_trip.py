"""Save and load through diffusers alone: the same bits in every form in which folders come."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, PipelineQuantizationConfig

from packed_weights import OWNER, TIED, denoise, dequantize_weights, random_packed
from sedimo.checkpoint.contents import packed_layers
from sedimo.checkpoint.diffusers_plugin import SedimoConfig
from sedimo.checkpoint.weights import replace_weights
from sedimo.errors import InputError, UnsupportedError
from sedimo.quant.fitting import quantize_weight


def stored(weight):
    return [tensor for part in weight.parts for tensor in part.tensors.values()]


def assert_same_weights(loaded, saved):
    mine, theirs = packed_layers(loaded), packed_layers(saved)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].formats == theirs[name].formats
        assert all(torch.equal(a, b) for a, b in zip(stored(mine[name]), stored(theirs[name]), strict=True)), name
        assert mine[name].layer_name in (name, OWNER)


def read(path):
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:size]), content[size:]


FORMS = {
    "one file": ({}, {}),
    "shards": ({"max_shard_size": 20_000}, {}),
    "shards that cut layers": ({"max_shard_size": 3_000}, {}),
    "variant": ({"variant": "fp16"}, {"variant": "fp16"}),
    "sharded variant": ({"variant": "fp16", "max_shard_size": 20_000}, {"variant": "fp16"}),
    "low memory": ({}, {"low_cpu_mem_usage": True}),
    "device map": ({}, {"device_map": "cpu"}),
    "no memory map": ({}, {"disable_mmap": True}),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("form", FORMS)  # without a memory map diffusers leaves a file open
def test_every_form_gives_the_same_bits(form, packed_dit, tmp_path):
    saving, loading = FORMS[form]
    packed_dit.save_pretrained(tmp_path, **saving)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or "shards" in form or "sharded" in form
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path, **loading)
    assert_same_weights(loaded, packed_dit)
    assert torch.equal(denoise(loaded), denoise(packed_dit))
    assert loaded.get_submodule(OWNER).weight is loaded.get_submodule(TIED).weight
    assert not loaded.is_quantized
    assert loaded.quantization_method == "sedimo"
    assert not any(p.requires_grad for p in packed_layers(loaded).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_pipeline_equals_the_pipeline_with_dequantized_weights(dtype, packed_pipeline_folder):
    pipe = DiffusionPipeline.from_pretrained(packed_pipeline_folder, torch_dtype=dtype)
    twin = DiffusionPipeline.from_pretrained(packed_pipeline_folder, torch_dtype=torch.float32)
    plain = {name: weight.dequantize().to(dtype) for name, weight in packed_layers(twin.transformer).items()}
    other = copy.deepcopy(pipe)
    dequantize_weights(other.transformer)
    for name, weight in plain.items():
        assert torch.equal(other.transformer.get_submodule(name).weight, weight), name
    images = []
    for each in (pipe, other):
        each.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(each([1, 2], num_inference_steps=2, generator=generator, output_type="np").images)
    assert (images[0] == images[1]).all()
    assert pipe.transformer.dtype == dtype


def test_saving_again_gives_the_same_bytes(packed_folder, tmp_path):
    DiTTransformer2DModel.from_pretrained(packed_folder).save_pretrained(tmp_path / "again")
    folders = (packed_folder, tmp_path / "again")
    (first, data), (second, other) = (read(folder / "diffusion_pytorch_model.safetensors") for folder in folders)
    assert data == other
    assert first == second  # safetensors writes the keys of the metadata in any order
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_the_loaded_model_may_be_cast_moved_and_dequantized(packed_folder):
    loaded = DiTTransformer2DModel.from_pretrained(packed_folder)
    expected = denoise(loaded)
    loaded.to(torch.bfloat16).to(torch.device("cpu"))
    assert denoise(loaded, torch.bfloat16).dtype == torch.bfloat16
    fresh = DiTTransformer2DModel.from_pretrained(packed_folder)
    fresh.dequantize()
    assert not packed_layers(fresh)
    assert torch.equal(denoise(fresh), expected)


def test_loaded_weights_do_not_hang_on_the_file(packed_folder):
    loaded = DiTTransformer2DModel.from_pretrained(packed_folder)
    expected = {name: weight.dequantize() for name, weight in packed_layers(loaded).items()}
    path = packed_folder / "diffusion_pytorch_model.safetensors"
    with path.open("r+b") as file:
        file.seek(-path.stat().st_size // 2, 2)
        file.write(b"\xff" * (path.stat().st_size // 2))
    assert all(torch.equal(weight.dequantize(), expected[name]) for name, weight in packed_layers(loaded).items())


def test_the_sizes_in_the_file_add_up(packed_folder, packed_dit):
    path = packed_folder / "diffusion_pytorch_model.safetensors"
    header = int.from_bytes(path.read_bytes()[:8], "little")
    weights = packed_layers(packed_dit)
    packed = sum(weight.stored_bytes for name, weight in weights.items() if name != TIED)
    state = packed_dit.state_dict()
    plain = sum(t.nbytes for name, t in state.items() if name.removesuffix(".weight") not in weights)
    assert path.stat().st_size == 8 + header + packed + plain


def test_ordinary_tensors_are_stored_in_16_bits_where_that_is_exact(packed_dit, tmp_path):
    names = ("proj_out_1.bias", "proj_out_2.bias")
    state = packed_dit.state_dict()
    state[names[0]].copy_(state[names[0]].half())
    state[names[1]].copy_(torch.linspace(1, 2**20, 16).bfloat16())
    packed_dit.save_pretrained(tmp_path)
    header, _ = read(tmp_path / "diffusion_pytorch_model.safetensors")
    assert [header[name]["dtype"] for name in names] == ["F16", "BF16"]
    assert header["pos_embed.proj.bias"]["dtype"] == "F32"
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in names)


def test_a_split_layer_with_a_part_left_alone(packed_dit, tmp_path):
    weight = random_packed((16, 32), [(10, "kmc3"), (2, "fp16"), (20, "uaq4g16")], wide=torch.float32)
    replace_weights(packed_dit, {"proj_out_2": weight})
    packed_dit.save_pretrained(tmp_path)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert_same_weights(loaded, packed_dit)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["layers"]["proj_out_2"]
    assert entry["parts"][1] == {"start": 10, "stop": 12, "format": "fp16", "values": "float32"}


def test_quantizing_while_loading(tiny_pipeline_folder, tmp_path):
    recipe = {"proj_out_1": "kmc4", "pos_embed.proj": "uaq3"}
    config = SedimoConfig(recipe=recipe)
    model = DiTTransformer2DModel.from_pretrained(tiny_pipeline_folder / "transformer", quantization_config=config)
    source = DiTTransformer2DModel.from_pretrained(tiny_pipeline_folder / "transformer")
    for name, text in recipe.items():
        expected = quantize_weight(source.get_submodule(name).weight, text)
        assert torch.equal(model.get_submodule(name).weight.dequantize(), expected.dequantize())
    model.save_pretrained(tmp_path)
    assert_same_weights(DiTTransformer2DModel.from_pretrained(tmp_path), model)
    pipeline_config = PipelineQuantizationConfig(quant_mapping={"transformer": SedimoConfig(recipe=recipe)})
    pipe = DiffusionPipeline.from_pretrained(tiny_pipeline_folder, quantization_config=pipeline_config)
    assert packed_layers(pipe.transformer).keys() == recipe.keys()
    with pytest.raises(InputError, match="nowhere"):
        DiTTransformer2DModel.from_pretrained(
            tiny_pipeline_folder / "transformer", quantization_config=SedimoConfig(recipe={"nowhere": "kmc4"})
        )


def test_the_configuration_shows_itself(packed_dit):
    config = packed_dit.config.quantization_config
    assert '"quant_method": "sedimo"' in repr(config)
    assert SedimoConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert config.quant_method.value == "sedimo"
    assert json.loads(json.dumps(config.to_dict(), sort_keys=True)) == config.to_dict()


def test_what_cannot_work_is_refused_before_reading(packed_folder, packed_dit, tmp_path):
    with pytest.raises(InputError, match="torch_dtype must be one of"):
        DiTTransformer2DModel.from_pretrained(packed_folder, torch_dtype=torch.float8_e4m3fn)
    with pytest.raises(UnsupportedError, match="offloaded to disk"):
        DiTTransformer2DModel.from_pretrained(packed_folder, device_map={"": "disk"}, offload_folder=str(tmp_path))
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        DiTTransformer2DModel.from_pretrained(packed_folder, low_cpu_mem_usage=False)
    with pytest.raises(UnsupportedError, match="as safetensors only"):
        packed_dit.save_pretrained(tmp_path / "pickle", safe_serialization=False)


def test_a_folder_may_be_copied(packed_pipeline_folder, tmp_path):
    shutil.copytree(packed_pipeline_folder, tmp_path / "copy")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "copy")
    assert packed_layers(pipe.transformer)
