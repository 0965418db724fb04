"""Denoisers that round what their layers are given: attached, saved, loaded, taken off."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from diffusers import DiTTransformer2DModel

from packed_weights import denoise, dequantize_weights
from sedimo.checkpoint.inputs import round_inputs, rounded_inputs, unround_inputs
from sedimo.checkpoint.layout import Configuration
from sedimo.checkpoint.reading import open_checkpoint
from sedimo.checkpoint.validation import check_against_model
from sedimo.checkpoint.weights import replace_weights
from sedimo.errors import InputError, StateError
from sedimo.pipelines.trajectory import timestep_of
from sedimo.quant.activations import ActivationQuantizer, InputQuantizers, InputRange
from sedimo.quant.fitting import quantize_weight
from sedimo.quant.parts import TensorSpec

LAYER = "transformer_blocks.0.ff.net.2"
CONV = "pos_embed.proj"
STATIC = InputRange((-1.0, -0.5), (2.0, 1.5))
RULES = InputQuantizers(
    {LAYER: ActivationQuantizer(4, range=STATIC), CONV: ActivationQuantizer(6, symmetric=True)}, (999.0, 0.0)
)


@pytest.fixture
def dit(tiny_dit):
    return copy.deepcopy(tiny_dit)


def test_layers_compute_with_rounded_inputs_and_can_be_freed_again(dit):
    seen = {}
    plain = denoise(dit)
    dit.get_submodule(LAYER).register_forward_hook(lambda _m, args, _o: seen.update(rounded=args[0].clone()))
    round_inputs(dit, InputQuantizers({LAYER: ActivationQuantizer(4)}))
    rounded = denoise(dit)
    assert not torch.equal(rounded, plain)
    assert len(seen["rounded"][0, 0].unique()) <= 16
    round_inputs(dit, InputQuantizers({LAYER: ActivationQuantizer(8)}))  # replaces, does not add
    assert len(rounded_inputs(dit).layers) == 1
    assert (denoise(dit) - plain).norm() < (rounded - plain).norm()
    unround_inputs(dit)
    assert torch.equal(denoise(dit), plain)
    assert rounded_inputs(dit) == InputQuantizers()


def test_ranges_follow_the_timestep(dit):
    sample, label = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([1])
    seen = []
    dit.get_submodule(LAYER).register_forward_hook(lambda _m, args, _o: seen.append(float(args[0].max())))
    wide, narrow = InputRange((-1.0, -1e-3), (1.0, 1e-3)), InputQuantizers()
    round_inputs(dit, InputQuantizers({LAYER: ActivationQuantizer(8, range=wide)}, (900.0, 100.0)))
    with torch.no_grad():
        for timestep in (1000, 50):
            dit(sample, timestep=torch.tensor([timestep]), class_labels=label)
    assert seen[0] > 0.01
    assert seen[1] <= 1.1e-3
    round_inputs(dit, narrow)
    assert rounded_inputs(dit) == narrow


@pytest.mark.parametrize(
    ("inputs", "level"),
    [
        ({"timestep": torch.tensor([0, 0, 500])}, 500.0),  # known frames come first, free of noise
        ({"timestep": torch.tensor([[0.0, 0.25], [0.25, 0.25]])}, 0.25),
        ({"timestep": None, "sigma": torch.tensor(3.5)}, 3.5),
        ({"timestep": 7, "sigma": torch.tensor(3.5)}, 7.0),
        ({"timestep": None}, math.nan),
        ({}, math.nan),
    ],
)
def test_the_noise_level_of_a_call_is_the_greatest_that_it_is_told(inputs, level):
    assert timestep_of(inputs) == pytest.approx(level, nan_ok=True)


def test_a_checkpoint_says_how_and_loading_does_it(dit, tmp_path):
    packed = {LAYER: quantize_weight(dit.get_submodule(LAYER).weight, "uaq4")}
    replace_weights(dit, packed, inputs=RULES)
    expected = denoise(dit)
    dit.save_pretrained(tmp_path)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert rounded_inputs(loaded) == RULES
    assert torch.equal(denoise(loaded), expected)
    assert torch.equal(denoise(copy.deepcopy(loaded)), expected)
    assert open_checkpoint(tmp_path).configuration.inputs == RULES
    loaded.save_pretrained(tmp_path / "again")
    assert open_checkpoint(tmp_path / "again").configuration.inputs == RULES
    dequantize_weights(loaded)
    assert rounded_inputs(loaded) == InputQuantizers()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["layers"][LAYER].update(bits=3.5), "must be"),
        (lambda a: a["layers"][LAYER].update(bits=40), "2..8 bits"),
        (lambda a: a["layers"][LAYER]["range"].update(high=[2.0, -7.0]), "low <= high"),
        (lambda a: a["layers"][LAYER]["range"].update(high=[2.0, {"float": "inf"}]), "low <= high"),
        (lambda a: a["layers"][LAYER]["range"].update(high=[2.0, 1e300]), r"at most 2\^126"),
        (lambda a: a["layers"][LAYER]["range"].update(high=[2.0, 10**400]), "integer of 1329 bits"),
        (lambda a: a.update(timesteps=[1.0]), "2 static ranges for 1 timesteps"),
        (lambda a: a.update(more=1), "more"),
    ],
)
def test_a_configuration_that_lies_is_refused(dit, tmp_path, change, message):
    packed = {LAYER: quantize_weight(dit.get_submodule(LAYER).weight, "uaq4")}
    replace_weights(dit, packed, inputs=RULES)
    dit.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["quantization_config"]["activations"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StateError, match=message):
        DiTTransformer2DModel.from_pretrained(tmp_path)


def test_activations_of_another_checkpoint_are_refused(dit, tmp_path):
    packed = {LAYER: quantize_weight(dit.get_submodule(LAYER).weight, "uaq4")}
    for name, rules in (("first", RULES), ("second", InputQuantizers({LAYER: ActivationQuantizer(4)}))):
        replace_weights(dit, packed, inputs=rules)
        dit.save_pretrained(tmp_path / name)
    (tmp_path / "first" / "config.json").replace(tmp_path / "second" / "config.json")
    with pytest.raises(StateError, match="belongs to another checkpoint"):
        DiTTransformer2DModel.from_pretrained(tmp_path / "second")
    dequantize_weights(dit)
    found = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in dit.state_dict().items()}
    rules = Configuration(inputs=InputQuantizers({"nowhere": ActivationQuantizer(4)}))
    with pytest.raises(StateError, match="rounds the inputs of layers that the model does not have: 'nowhere'"):
        check_against_model(found, rules, dit)


def test_what_is_no_layer_is_refused_and_nothing_is_lost(dit):
    round_inputs(dit, InputQuantizers({LAYER: ActivationQuantizer(4)}))
    for name in ("nowhere", "", "transformer_blocks.0.norm1"):
        with pytest.raises(InputError, match="no Linear or Conv layer"):
            round_inputs(dit, InputQuantizers({name: ActivationQuantizer(8)}))
    assert list(rounded_inputs(dit).layers) == [LAYER]
