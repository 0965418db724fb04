import hashlib
import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from sedimo.errors import InputError, StateError
from sedimo.pipelines.weights import FileWeights, ModuleWeights, stored_dtype

SHARD_SIZE = "100KB"


@pytest.fixture
def folder(tiny_pipeline_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_pipeline_folder / "transformer", tmp_path / "denoiser"))


@pytest.fixture
def sharded(tiny_dit, tmp_path) -> Path:
    tiny_dit.save_pretrained(tmp_path / "sharded", max_shard_size=SHARD_SIZE)
    return tmp_path / "sharded"


def weights_of(model) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {n.removesuffix(".weight"): p for n, p in named if n.endswith(".weight") and p.ndim >= 2}


def assert_same(source, expected):
    assert set(source.layer_names) == expected.keys()
    for name in source.layer_names:
        tensor = source.read(name)
        assert torch.equal(tensor, expected[name])
        assert tensor.dtype is expected[name].dtype
        assert not tensor.requires_grad


def test_file_and_module_give_the_same_weights(folder, tiny_dit):
    assert_same(FileWeights(folder), weights_of(tiny_dit))
    assert_same(ModuleWeights(tiny_dit), weights_of(tiny_dit))
    linear = [n for n, m in tiny_dit.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    assert set(linear) <= weights_of(tiny_dit).keys()


def test_shards_give_the_same_weights(sharded, tiny_dit):
    source = FileWeights(sharded)
    assert len(source.files) > 2
    assert_same(source, weights_of(tiny_dit))


def test_a_pipeline_folder_stands_for_its_denoiser(tiny_pipeline_folder):
    assert FileWeights(tiny_pipeline_folder).folder == tiny_pipeline_folder / "transformer"


@pytest.mark.parametrize("size", ["1GB", SHARD_SIZE])
def test_variants(tiny_dit, tmp_path, size):
    half = deepcopy(tiny_dit).half()
    half.save_pretrained(tmp_path / "v", variant="fp16", max_shard_size=size)
    for variant in (None, "fp16"):  # the only one there is needs no name
        assert_same(FileWeights(tmp_path / "v", variant), weights_of(half))
    tiny_dit.save_pretrained(tmp_path / "plain")  # into "v" it would delete the variant's shards
    shutil.copy(tmp_path / "plain" / "diffusion_pytorch_model.safetensors", tmp_path / "v")
    assert_same(FileWeights(tmp_path / "v"), weights_of(tiny_dit))
    assert_same(FileWeights(tmp_path / "v", "fp16"), weights_of(half))
    with pytest.raises(InputError, match=r"variants \(plain\), fp16, not bf16"):
        FileWeights(tmp_path / "v", "bf16")


def test_several_variants_and_nothing_plain_is_a_question(tiny_dit, tmp_path):
    for variant in ("fp16", "ema"):
        tiny_dit.save_pretrained(tmp_path, variant=variant)
    with pytest.raises(InputError, match="variants ema, fp16, not plain; choose"):
        FileWeights(tmp_path)


def test_tensors_own_their_memory(folder, tiny_dit):
    source = FileWeights(folder)
    tensors = {name: source.read(name) for name in source.layer_names}
    size = source.files[0].stat().st_size
    with source.files[0].open("r+b") as file:
        file.write(bytes(size))
    assert all(torch.equal(tensors[n], w) for n, w in weights_of(tiny_dit).items())


def test_tied_modules_are_listed_by_each_name(tiny_dit):
    model = deepcopy(tiny_dit)
    model.transformer_blocks[1].norm1.emb = model.transformer_blocks[0].norm1.emb
    assert set(ModuleWeights(model).layer_names) == weights_of(tiny_dit).keys()


@pytest.mark.parametrize("kind", ["file", "module"])
def test_digest_changes_with_any_weight_and_only_then(tiny_dit, tmp_path, kind):
    def digest(model):
        if kind == "module":
            return ModuleWeights(model).digest
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        model.save_pretrained(path)
        return FileWeights(path).digest

    model = deepcopy(tiny_dit)
    first = digest(model)
    assert digest(deepcopy(model)) == first
    assert len(first) == 64
    with torch.no_grad():
        model.proj_out_2.weight[0, 0] += 1e-3
    assert digest(model) != first


def test_digest_of_bfloat16_and_of_another_shape(tiny_dit):
    digests = {ModuleWeights(deepcopy(tiny_dit).to(d)).digest for d in (torch.float32, torch.float16, torch.bfloat16)}
    a, b = torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 2, bias=False)
    b.weight.data = a.weight.data.reshape(2, 3)
    digests |= {ModuleWeights(torch.nn.Sequential(m)).digest for m in (a, b)}
    assert len(digests) == 5


def test_digest_of_a_file_is_that_of_its_bytes(folder):
    content = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    assert FileWeights(folder).digest == hashlib.sha256(hashlib.sha256(content).digest()).hexdigest()


def test_stored_dtype_ignores_what_is_no_parameter(folder, tmp_path):
    assert stored_dtype(FileWeights(folder).files) is torch.float32
    tensors = {"a.weight": torch.ones(9).bfloat16(), "b.bias": torch.ones(3), "c.weight.scale": torch.ones(99)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert stored_dtype([tmp_path / "x.safetensors"]) is torch.bfloat16
    save_file({"c": torch.ones(1, dtype=torch.uint8)}, tmp_path / "x.safetensors")
    assert stored_dtype([tmp_path / "x.safetensors"]) is torch.float32


def test_the_oldest_attention_names_become_those_of_the_module(tmp_path):
    names = ("query", "key", "value", "proj_attn")
    tensors = {f"mid.attentions.0.{n}.weight": torch.full((2, 2), float(i)) for i, n in enumerate(names)}
    tensors["other.query.weight"] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    source = FileWeights(tmp_path)
    new = [f"mid.attentions.0.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0")]
    assert set(source.layer_names) == {*new, "other.query"}
    assert [source.read(n)[0, 0].item() for n in new] == [0, 1, 2, 3]


def test_unknown_layers_are_refused(folder, tiny_dit):
    for source in (FileWeights(folder), ModuleWeights(tiny_dit)):
        with pytest.raises(InputError, match="layer 'nothing'"):
            source.read("nothing")


def test_missing_folders_and_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        FileWeights(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no weights"):
        FileWeights(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match="no folder transformer or unet"):
        FileWeights(tmp_path)


def test_pickles_are_refused_with_a_remedy(tmp_path):
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"no matter")
    with pytest.raises(InputError, match=r"\.bin.*execute code.*safe_serialization=True"):
        FileWeights(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_damaged_files_are_refused(folder, damage):
    path = folder / "diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:-1], "foreign": b"hello world, this is no header", "empty": b""}[damage])
    with pytest.raises(StateError, match=r"diffusion_pytorch_model\.safetensors is not a complete safetensors file"):
        FileWeights(folder)


def test_a_file_damaged_after_its_header_was_read_is_noticed(folder):
    source = FileWeights(folder)
    source.files[0].write_bytes(b"gone")
    with pytest.raises(StateError, match="cannot be read any more"):
        source.read(source.layer_names[0])


def edit_index(folder, change):
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_an_index_that_lies_is_refused(sharded):
    def move(weight_map):
        key = next(iter(weight_map))
        weight_map[key] = next(f for f in weight_map.values() if f != weight_map[key])

    edit_index(sharded, move)
    with pytest.raises(StateError, match="disagree about 1 tensors"):
        FileWeights(sharded)


def test_an_index_that_forgets_is_refused(sharded):
    edit_index(sharded, lambda weight_map: weight_map.pop(next(iter(weight_map))))
    with pytest.raises(StateError, match="should be in None"):
        FileWeights(sharded)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", 3, "missing.safetensors"])
def test_an_index_that_points_elsewhere_is_refused(sharded, file):
    edit_index(sharded, lambda weight_map: weight_map.update({next(iter(weight_map)): file}))
    with pytest.raises(StateError, match=r"beside the index|is missing"):
        FileWeights(sharded)


def test_an_index_without_a_map_is_refused(sharded):
    (sharded / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(StateError, match="weight_map"):
        FileWeights(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    first, second = FileWeights(sharded).files[:2]
    key, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {key: tensor}, second)
    with pytest.raises(StateError, match="both in"):
        FileWeights(sharded)


def test_a_quantized_checkpoint_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "sedimo"}}))
    with pytest.raises(InputError, match=r"quantized already.*'sedimo'"):
        FileWeights(folder)


def test_quantized_and_absent_modules_are_refused(tiny_dit):
    class Packed(torch.nn.Parameter):
        pass

    model = deepcopy(tiny_dit)
    model.proj_out_2.weight = Packed(model.proj_out_2.weight.data)
    with pytest.raises(InputError, match="'proj_out_2' is a Packed, quantized already"):
        ModuleWeights(model)
    with torch.device("meta"):
        empty = DiTTransformer2DModel.from_config(tiny_dit.config)
    with pytest.raises(InputError, match="meta device"):
        ModuleWeights(empty)


def test_adapters_are_refused(tiny_dit):
    model = deepcopy(tiny_dit)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), model)
    with pytest.raises(InputError, match=r"attached to layer '.*to_q'.*unload_lora_weights"):
        ModuleWeights(model)
