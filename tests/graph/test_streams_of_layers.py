"""Streams of a concatenation: where they are found, that channels are where the graph says, and what ends them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from denoisers import TINY, build, traced
from torch import nn
from torch.overrides import TorchFunctionMode

from sedimo.codec import from_plain, to_plain
from sedimo.errors import StateError
from sedimo.graph.example_inputs import find_inputs
from sedimo.graph.model import DenoiserGraph, Node
from sedimo.graph.trace import trace_denoiser


class Concatenations(TorchFunctionMode):
    """Operands of every `torch.cat` along channels."""

    def __init__(self):
        super().__init__()
        self.operands = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.cat and args[0][0].ndim == 4:
            self.operands.append([t.clone() for t in args[0]])
        return func(*args, **(kwargs or {}))


def test_channels_of_a_layers_input_are_those_of_the_streams():
    """With everything between the concatenation and the layer as identity, its input is the streams side by side."""
    denoiser = build(*TINY["UNet2D"]).to_empty(device="cpu")
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    graph = trace_denoiser(denoiser)
    found = {node.name: node.streams for node in graph.layers if node.streams}
    assert found
    assert all(name.startswith("up_blocks") for name in found)
    assert {name.rpartition(".")[2] for name in found} == {"conv1", "conv_shortcut"}
    for resnet in (m for m in denoiser.modules() if hasattr(m, "conv_shortcut")):
        resnet.norm1, resnet.nonlinearity = nn.Identity(), nn.Identity()
    read = {}
    for name in found:
        denoiser.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: read.update({name: args[0]})
        )
    inputs = {
        n: torch.randn(v.shape) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for n, v in find_inputs(build(*TINY["UNet2D"]), {}).items()
    }
    inputs["timestep"] = 3
    with torch.no_grad(), Concatenations() as seen:
        denoiser(**inputs)
    assert len(seen.operands) == len(found) / 2  # each is read by conv1 and by conv_shortcut
    for name, sizes in found.items():
        pieces = read[name].split(sizes, dim=1)
        assert any(
            len(operands) == len(pieces) and all(map(torch.equal, operands, pieces)) for operands in seen.operands
        ), name


class Joined(nn.Module):
    """Two convolutions whose outputs are joined; `between` and `reader` follow."""

    def __init__(self, between, reader, axis=1):
        super().__init__()
        self.a, self.b, self.reader = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 10, 1), reader
        self.between, self.axis = between, axis

    def forward(self, sample):
        return self.reader(self.between(torch.cat([self.a(sample), self.b(sample)], dim=self.axis)))


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.GroupNorm(4, 16), nn.Dropout(0.5)

    def forward(self, x):
        return nn.functional.interpolate(self.drop(nn.functional.silu(self.norm(x))) / 2, scale_factor=2.0)


def streams_of(denoiser):
    inputs = {"sample": torch.empty(2, 4, 8, 8)}
    return trace_denoiser(denoiser, example_inputs=inputs).layer_index["reader"].streams


def test_operations_that_leave_channels_where_they_are_keep_streams():
    assert streams_of(Joined(Norm(), nn.Conv2d(16, 5, 3))) == (6, 10)


@pytest.mark.parametrize(
    ("between", "reader", "axis"),
    [
        (lambda x: x.flip(1), nn.Conv2d(16, 5, 3), 1),
        (lambda x: x[:, torch.arange(15, -1, -1)], nn.Conv2d(16, 5, 3), 1),
        (lambda x: nn.functional.pixel_shuffle(x, 2), nn.Conv2d(4, 5, 3), 1),
        (lambda x: x.reshape(2, 2, 8, 8, 8).transpose(1, 2).reshape(2, 16, 8, 8), nn.Conv2d(16, 5, 3), 1),
        (lambda x: x, nn.Conv2d(16, 4, 3, groups=2), 1),
        (lambda x: x, nn.Linear(8, 3), 1),
        (lambda x: x + x.flip(1), nn.Conv2d(16, 5, 3), 1),
    ],
)
def test_whatever_may_move_channels_ends_streams(between, reader, axis):
    assert streams_of(Joined(between, reader, axis)) == ()


def test_a_concatenation_of_inputs_has_no_streams():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.reader = nn.Conv2d(8, 3, 1)

        def forward(self, sample):
            return self.reader(torch.cat([sample, sample * 2], dim=1))

    assert streams_of(Plain()) == ()


def test_a_layer_that_is_called_with_other_streams_has_none():
    class Twice(Joined):
        def forward(self, sample):
            a, b = self.a(sample), self.b(sample)
            return self.reader(torch.cat([a, b], 1)) + self.reader(torch.cat([b, a], 1))

    assert streams_of(Twice(None, nn.Conv2d(16, 5, 3))) == ()


def test_a_concatenation_of_a_concatenation_has_all_its_streams():
    class Nested(Joined):
        def forward(self, sample):
            a, b = self.a(sample), self.b(sample)
            return self.reader(torch.cat([torch.cat([a, b], 1).relu(), self.a(a[:, :4])], 1))

    assert streams_of(Nested(None, nn.Conv2d(22, 5, 3))) == (6, 10, 6)


def test_skips_of_a_transformer_are_streams_of_its_linear_layers():
    found = [node for node in traced("Hunyuan").layers if node.name.endswith("skip_linear")]
    assert found
    assert all(node.streams == (node.shape[1] // 2,) * 2 for node in found)


def test_graphs_without_streams_keep_their_text_and_all_graphs_their_digest():
    assert not any(node.streams for node in traced("DiT-XL/2").layers)
    assert all("streams" not in to_plain(node) for node in traced("DiT-XL/2").layers)
    graph = traced("UNet2D")
    assert any(node.streams for node in graph.layers)
    assert from_plain(DenoiserGraph, to_plain(graph)) == graph
    assert replace(graph, nodes=tuple(replace(node, streams=()) for node in graph.nodes)).digest == graph.digest


@pytest.mark.parametrize("streams", [(16,), (8, 4), (16, 0)])
def test_streams_that_are_not_the_layers_input_are_refused(streams):
    node = Node("a", "layer", "a", "", 1, "Linear", (4, 16), streams)
    with pytest.raises(StateError, match="streams of 'a' must be two or more"):
        DenoiserGraph("Toy", (node,), (), ())
