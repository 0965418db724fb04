"""Smoothing changes no function: every way of folding against dividing."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from folding_examples import DIVIDED, FOLDED, close, example, plan_for, random_ranges, randomised, smoothed
from sedimo.checkpoint.inputs import smoothed_layers
from sedimo.codec import from_json, to_json
from sedimo.errors import InputError
from sedimo.graph.folding import find_folding
from sedimo.pipelines.weights import ModuleWeights
from sedimo.quant.activations import InputRange
from sedimo.treatments.smoothing import Smoothing, plan_smoothing


def inputs_seen(network, layers, sample):
    """The output, and what each layer multiplies with its weight."""
    seen = {name: [] for name in layers}
    handles = [
        network.get_submodule(name).register_forward_hook(lambda _m, args, _o, name=name: seen[name].append(args[0]))
        for name in layers
    ]
    with torch.no_grad():
        output = network(sample)[0]
    for handle in handles:
        handle.remove()
    return output, seen


@pytest.mark.parametrize("name", [*FOLDED, *DIVIDED])
def test_a_folded_layer_sees_what_a_divided_one_sees(name):
    network, layers, *_ = {**FOLDED, **DIVIDED}[name]
    network = randomised(copy.deepcopy(network))
    folding, plan = plan_for(network, layers.split(), example_inputs={"sample": example()})
    divided = replace(plan, layers={n: replace(v, into=()) for n, v in plan.layers.items()}, parameters={})
    assert any(any(layer.exponents) for layer in plan.layers.values())
    plain, plain_inputs = inputs_seen(network, plan.layers, example())
    with smoothed(network, divided):
        output, wanted = inputs_seen(network, plan.layers, example())
        assert close(output, plain)
    with smoothed(network, plan):
        folded, found = inputs_seen(network, plan.layers, example())
        assert close(folded, plain)
    for layer in plan.layers:
        factors = torch.exp2(torch.tensor(plan.layers[layer].exponents, dtype=torch.float64))
        axis = 1 if isinstance(network.get_submodule(layer), nn.Conv2d) else -1
        for one, other, before in zip(found[layer], wanted[layer], plain_inputs[layer], strict=True):
            assert close(one, other)
            assert close((one.movedim(axis, -1) * factors).movedim(-1, axis), before)
    assert set(folding.divided) == {n for n, how in plan.ways.items() if how == "divided"}


@pytest.mark.parametrize("name", FOLDED)
def test_undoing_is_bit_exact(name):
    network, layers, *_ = FOLDED[name]
    network = randomised(copy.deepcopy(network))
    _, plan = plan_for(network, layers.split(), example_inputs={"sample": example()})
    before = {n: (p, p.clone()) for n, p in network.named_parameters(remove_duplicate=False)}
    restore = plan.enter(network, is_stored=False)
    assert set(smoothed_layers(network)) == set(plan.layers)
    assert any(p is not before[n][0] for n, p in network.named_parameters(remove_duplicate=False))
    restore()
    for n, parameter in network.named_parameters(remove_duplicate=False):
        assert parameter is before[n][0]
        assert torch.equal(parameter, before[n][1])
    assert not smoothed_layers(network)
    assert not list(network.buffers())
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_an_exception_undoes_it():
    network, layers, *_ = FOLDED["geglu"]
    _, plan = plan_for(network, layers.split(), example_inputs={"sample": example()})
    before = network.proj.weight
    with pytest.raises(RuntimeError, match="stop"), smoothed(network, plan):
        raise RuntimeError("stop")
    assert network.proj.weight is before


def test_the_plan_is_joint_over_readers_and_a_record():
    network, layers, *_ = FOLDED["layer norm"]
    network = randomised(copy.deepcopy(network))
    _, plan = plan_for(network, layers.split(), example_inputs={"sample": example()})
    inputs = np.max([one.high for one in random_ranges(network, "qkv").values()], axis=0)
    weights = np.max([network.get_parameter(f"{n}.weight").detach().abs().amax(0).numpy() for n in "qkv"], axis=0)
    logs = np.log2(inputs**0.7 / weights**0.3)
    wanted = np.clip(np.round(logs - logs.mean()), -8, 8).astype(int).tolist()
    assert all(list(plan.layers[name].exponents) == wanted for name in "qkv")
    assert plan.layers["q"].into == ("norm.weight",)
    assert from_json(Smoothing, to_json(plan)) == plan
    assert str(plan) == (
        "SmoothQuant, alpha 0.7: inputs of 3 layers smoothed, 3 by the operation before them, 0 by a divisor"
    )


def test_dead_channels_stay():
    network = randomised(copy.deepcopy(FOLDED["linear"][0]))
    folding = find_folding(network, ["out"], example_inputs={"sample": example()})
    largest = [0.0 if i == 3 else high for i, high in enumerate(random_ranges(network, ["out"])["out"].high)]
    dead = InputRange(tuple(-value for value in largest), tuple(largest))
    plan = plan_smoothing(folding, {"out": dead}, ModuleWeights(network))
    assert plan.layers["out"].exponents[3] == 0
    assert any(plan.layers["out"].exponents)


def test_layers_that_share_a_weight_go_on_sharing_it():
    network, _ = copy.deepcopy(DIVIDED["input of the denoiser"])
    network.other = nn.Linear(8, 8)
    network.other.weight = network.out.weight
    network._forward = lambda n, x: n.out(x) + n.other(x.sin())
    network = randomised(network)
    plain = network(example())[0]
    _, plan = plan_for(network, ["other"], example_inputs={"sample": example()})
    with smoothed(network, plan):
        assert network.other.weight is network.out.weight
        assert close(network(example())[0], plain)


def test_float16_is_exact_and_widened_only_where_needed():
    network, layers, *_ = FOLDED["modulation"]
    network = randomised(copy.deepcopy(network)).half()
    folding = find_folding(network, layers.split(), example_inputs={"sample": example().half()})
    plan = plan_smoothing(folding, random_ranges(network, folding.inputs), ModuleWeights(network))
    plan.enter(network, is_stored=True)
    assert network.out.weight.dtype == network.modulation.weight.dtype == torch.float16
    assert network.modulation.bias.dtype == torch.float32  # takes constants


def test_smoothing_twice_and_strangers_are_refused():
    network, layers, *_ = copy.deepcopy(FOLDED["linear"])
    folding, plan = plan_for(network, layers.split(), example_inputs={"sample": example()})
    with pytest.raises(InputError, match="of another denoiser"):
        plan.enter(FOLDED["geglu"][0], is_stored=False)
    with smoothed(network, plan), pytest.raises(InputError, match="smoothed already"):
        plan.enter(network, is_stored=False)
    with pytest.raises(InputError, match="was not measured"):
        plan_smoothing(folding, {}, ModuleWeights(network))
    with pytest.raises(InputError, match="alpha must be at least 0"):
        plan_smoothing(folding, random_ranges(network, ["out"]), ModuleWeights(network), 2.0)


def test_the_divisor_comes_before_other_hooks():
    network = randomised(copy.deepcopy(DIVIDED["input of the denoiser"][0]))
    seen = []
    network.out.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    _, plan = plan_for(network, ["out"], example_inputs={"sample": example()})
    with smoothed(network, plan):
        network(example())
    assert torch.equal(seen[0], example() / torch.exp2(torch.tensor(plan.layers["out"].exponents).double()))
