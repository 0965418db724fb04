"""Where factors fold: proven by networks of one idea each, and by denoisers of many architectures."""

from __future__ import annotations

import pytest
import torch
from denoisers import TINY, build

from folding_examples import DIVIDED, FOLDED, REFUSED, C, Network, conv, example, linear
from sedimo.errors import InputError
from sedimo.graph.folding import find_folding
from sedimo.graph.layers import weight_layers


def folding_of(network, layers):
    return find_folding(network.double(), layers.split(), example_inputs={"sample": example()})


@pytest.mark.parametrize("name", FOLDED)
def test_what_can_be_folded_is(name):
    network, layers, takers = FOLDED[name]
    found = folding_of(network, layers)
    assert set(found.inputs) == set(layers.split())
    assert not found.divided
    assert {p.removesuffix(".weight") for p in found.parameters} == set(takers.split())


@pytest.mark.parametrize("name", DIVIDED)
def test_what_is_not_proven_is_not_folded(name):
    network, layers = DIVIDED[name]
    found = folding_of(network, layers)
    assert found.divided == set(layers.split())
    assert not found.parameters


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_smoothed_is_told(name):
    network, layers, word = REFUSED[name]
    found = folding_of(network, layers)
    assert not found.inputs
    assert word in found.refused[layers]


def test_readers_of_one_tensor_share_its_classes():
    network, layers, _ = FOLDED["layer norm"]
    found = folding_of(network, layers)
    q, k, v = (found.inputs[name].tolist() for name in "qkv")
    assert q == k == v
    assert len(set(q)) == C


def test_layers_that_share_a_weight_are_smoothed_together():
    network = Network(lambda n, x: n.a(x) + n.b(n.first(x)), first=linear(), a=linear(), b=linear())
    network.b.weight = network.a.weight
    found = folding_of(network, "b")
    assert set(found.inputs) == {"a", "b"} == found.divided  # the input of a is the denoiser's
    assert found.inputs["a"].tolist() == found.inputs["b"].tolist()


def test_a_layer_that_shares_its_weight_takes_no_factors():
    network = Network(lambda n, x: n.out(n.a(x)) + n.b(x), a=linear(), b=linear(), out=linear())
    network.b.weight = network.a.weight
    assert folding_of(network, "out").divided == {"out"}


def test_unknown_layers_are_refused():
    network = Network(lambda n, x: n.out(x), out=linear())
    with pytest.raises(InputError, match="no layer 'nothing'"):
        folding_of(network, "nothing")


def test_depthwise_rows_may_take_factors():
    def forward(net, x):
        return net.out(net.depthwise(x.transpose(1, 2).reshape(3, C, 2, 3)))

    found = folding_of(Network(forward, depthwise=conv(groups=C), out=conv()), "out")
    assert not found.divided
    assert set(found.parameters) == {"depthwise.weight"}


@pytest.mark.parametrize("name", ["UNet2D", "UNet with text", "Hunyuan", "FLUX"])
def test_folded_layers_of_architectures(name):
    denoiser = build(*TINY[name])
    found = find_folding(denoiser, weight_layers(denoiser))
    folded = {layer for layer in found.inputs if layer not in found.divided}
    ends = {
        "UNet2D": ("to_q", "to_k", "to_v", "to_out.0"),
        "UNet with text": ("proj_in", "attn1.to_q", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"),
        "Hunyuan": ("attn1.to_v", "attn2.to_out.0", "skip_linear", "proj_out"),
        "FLUX": ("attn.to_q", "attn.add_v_proj", "proj_mlp"),
    }[name]
    for end in ends:
        assert any(layer.endswith(end) for layer in folded), end
    assert not any(layer.endswith(("conv1", "conv2", "time_emb_proj", "linear_2")) for layer in folded)
    assert all(torch.as_tensor(rows.classes).max() >= 0 for rows in found.parameters.values())
