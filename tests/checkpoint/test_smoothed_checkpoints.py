"""Divisors in a checkpoint: hostile ones are refused, by diffusers' loader and by ours; old files have none."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from packed_weights import OWNER, check_checkpoint, random_packed
from sedimo.checkpoint.inputs import (
    mark_smoothed,
    prepare_divisors,
    remove_divisor,
    set_divisor,
    smoothed_layers,
    unsmooth_inputs,
)
from sedimo.checkpoint.layout import DIVISOR, Configuration, read_configuration
from sedimo.checkpoint.validation import check_divisor_specs, make_seal
from sedimo.checkpoint.weights import replace_weights
from sedimo.checkpoint.writing import Origin, write_checkpoint
from sedimo.errors import InputError, StateError
from sedimo.quant.fitting import quantize_weight
from sedimo.quant.parts import TensorSpec
from tolerances import DIFFERENT

WEIGHTS = "diffusion_pytorch_model.safetensors"
PACKED, PLAIN, CONVOLUTION = "proj_out_1", "proj_out_2", "pos_embed.proj"
WAYS = {PACKED: "divided", PLAIN: "divided", CONVOLUTION: "divided", "transformer_blocks.0.attn1.to_q": "folded"}
TENSOR = f"{PACKED}.{DIVISOR}"


def call_of(denoiser):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return denoiser(latents, timestep=torch.tensor([3, 500]), class_labels=torch.tensor([1, 2])).sample


@pytest.fixture
def made(tiny_dit):
    """Divided layers, packed and not."""
    denoiser = copy.deepcopy(tiny_dit)
    for name, how in WAYS.items():
        if how == "divided":
            module = denoiser.get_submodule(name)
            generator = torch.Generator().manual_seed(len(name))
            set_divisor(
                module, torch.exp2(torch.randint(-3, 4, (module.weight.shape[1],), generator=generator).float())
            )
    mark_smoothed(denoiser, WAYS)
    packed = {name: quantize_weight(denoiser.get_parameter(f"{name}.weight"), "kmc4") for name in (PACKED, CONVOLUTION)}
    packed[OWNER] = random_packed(tuple(denoiser.get_submodule(OWNER).weight.shape), "kmc4")
    replace_weights(denoiser, packed)
    return denoiser


@pytest.fixture
def folder(made, tmp_path):
    made.save_pretrained(tmp_path / "smoothed")
    return tmp_path / "smoothed"


def edit_tensors(folder, change):
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    plain = json.loads((folder / "config.json").read_text())["quantization_config"]
    seal = make_seal(tensors, read_configuration(plain, place=""))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", **seal})


def edit_ways(folder, ways):
    plain = json.loads((folder / "config.json").read_text())
    plain["quantization_config"]["smoothed"] = ways
    (folder / "config.json").write_text(json.dumps(plain))


def seal_again(folder):
    edit_tensors(folder, lambda _tensors: None)


def assert_refused(folder, match):
    for reader in (DiTTransformer2DModel.from_pretrained, check_checkpoint):
        with pytest.raises(StateError, match=match):
            reader(folder)


def test_round_trip_is_bit_exact(made, folder):
    loaded = DiTTransformer2DModel.from_pretrained(folder)
    assert smoothed_layers(loaded) == WAYS
    assert torch.equal(call_of(loaded), call_of(made))
    assert load_file(folder / WEIGHTS)[TENSOR].dtype == torch.float16


def test_the_divisor_matters(made, folder):
    loaded = DiTTransformer2DModel.from_pretrained(folder)
    remove_divisor(loaded.get_submodule(PACKED))
    assert not torch.allclose(call_of(loaded), call_of(made), rtol=DIFFERENT)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_values_that_are_no_divisors_are_refused(folder, value):
    edit_tensors(folder, lambda tensors: tensors[TENSOR].__setitem__(2, value))
    assert_refused(folder, "must be finite and greater than zero")


@pytest.mark.parametrize("name", [PACKED, PLAIN])
@pytest.mark.parametrize("shape", [(1,), (31,), (32, 1), (64, 2), ()])
def test_wrong_shapes_are_refused(folder, name, shape):
    edit_tensors(folder, lambda tensors: tensors.update({f"{name}.{DIVISOR}": torch.ones(shape)}))
    assert_refused(folder, r"must be \[\d+\] of floating point")


def test_wrong_dtypes_are_refused(folder):
    edit_tensors(folder, lambda tensors: tensors.update({TENSOR: tensors[TENSOR].int()}))
    assert_refused(folder, "of floating point, got torch.int32")


def test_missing_and_extra_divisors_are_refused(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(TENSOR))
    assert_refused(folder, f"differ in {TENSOR}")
    edit_ways(folder, {name: "folded" if name == PACKED else how for name, how in WAYS.items()})
    seal_again(folder)
    assert check_checkpoint(folder)
    edit_ways(folder, {})
    seal_again(folder)
    assert_refused(folder, "differ in")


def test_a_divisor_for_no_layer_is_refused(folder):
    edit_ways(folder, {**WAYS, "nothing": "folded"})
    seal_again(folder)
    with pytest.raises(StateError, match="smooths the layer 'nothing'"):
        DiTTransformer2DModel.from_pretrained(folder)
    edit_ways(folder, {**WAYS, "nothing": "divided"})
    seal_again(folder)
    assert_refused(folder, "differ in nothing.input_divisor")


@pytest.mark.parametrize("how", ["divided", "folded"])
@pytest.mark.parametrize("module", [nn.LayerNorm(4), nn.Embedding(3, 4), nn.Conv2d(4, 4, 1, groups=2), nn.SiLU()])
def test_what_has_no_channels_to_divide_is_refused(module, how):
    with pytest.raises(StateError, match="'odd', which is no Linear or ungrouped Conv layer"):
        prepare_divisors(nn.ModuleDict({"odd": module}), {"odd": how})


@pytest.mark.parametrize("present", [{}, {"norm.weight": TensorSpec(torch.float32, (4,))}])
def test_a_divisor_without_a_weight_of_inputs_is_refused(present):
    found = present | {f"norm.{DIVISOR}": TensorSpec(torch.float32, (4,))}
    with pytest.raises(StateError, match="a layer without a weight"):
        check_divisor_specs(found, {"norm": "divided"}, {})


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_an_image_alone_is_divided_as_one_of_many(kind):
    layer = kind(3, 2, 1)
    images = torch.randn(2, 3, *[3] * (layer.weight.ndim - 2), generator=torch.Generator().manual_seed(0))
    set_divisor(layer, torch.tensor([1.0, 2.0, 4.0]))
    assert torch.equal(layer(images[0]), layer(images[:1])[0])


@pytest.mark.parametrize("ways", [[], "all", {PACKED: "scaled"}, {PACKED: 1}, None])
def test_other_words_are_refused(folder, ways):
    edit_ways(folder, ways)
    assert_refused(folder, "smoothed")


def test_files_without_the_field_are_read():
    plain = Configuration().plain
    assert "smoothed" not in plain
    assert read_configuration(plain, place="").smoothed == {}


def test_single_layers_are_not_packed_anew(folder, tmp_path):
    weight = random_packed((64, 32), "kmc3")
    with pytest.raises(InputError, match="was smoothed"):
        write_checkpoint(folder, tmp_path / "changed", {PACKED: weight}, Origin(""))


def test_shared_weights_are_divided_once_when_smoothing_ends():
    pair = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)})
    pair["b"].weight = pair["a"].weight
    before = pair["a"].weight.detach().clone()
    for layer in pair.values():
        set_divisor(layer, torch.tensor([1.0, 2.0, 4.0, 0.5]))
    mark_smoothed(pair, {"a": "divided", "b": "divided"})
    outputs = [layer(torch.ones(2, 4)) for layer in pair.values()]
    unsmooth_inputs(pair)
    assert pair["a"].weight is pair["b"].weight
    assert torch.equal(pair["a"].weight, before / torch.tensor([1.0, 2.0, 4.0, 0.5]))
    for layer, output in zip(pair.values(), outputs, strict=True):
        assert torch.equal(layer(torch.ones(2, 4)), output)
    assert not smoothed_layers(pair)


def test_a_layer_has_one_divisor():
    layer = nn.Linear(2, 2)
    set_divisor(layer, torch.ones(2))
    with pytest.raises(InputError, match="divides its input already"):
        set_divisor(layer, torch.ones(2))
