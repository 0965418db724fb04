"""The reading of programs, one operation at a time, on modules of a few layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sedimo.graph.model import DenoiserGraph
from sedimo.graph.trace import trace_denoiser

WIDTH = 8


class Three(nn.Module):
    """Three layers on one input; `join` makes one output of theirs, which a fourth reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.join(self.a(tokens), self.b(tokens), self.c(tokens)))

    def join(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def graph_of(join, tokens: torch.Tensor | None = None) -> DenoiserGraph:
    kind = type("Joined", (Three,), {"join": staticmethod(join)})
    return trace_denoiser(kind(), example_inputs={"tokens": torch.zeros(1, 6, WIDTH) if tokens is None else tokens})


def sources(graph: DenoiserGraph, name: str) -> list[str]:
    position = [node.name for node in graph.nodes].index(name)
    return [graph.nodes[s].name for s, t in graph.edges if t == position]


def combines(graph: DenoiserGraph) -> dict[str, list[str]]:
    return {node.name: sources(graph, node.name) for node in graph.nodes if node.kind != "layer"}


def half(x: torch.Tensor) -> torch.Tensor:
    return x.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("join", "wanted"),
    [
        (lambda a, b, c: a + b - c, {"add_0": ["a", "b"], "add_1": ["add_0", "c"]}),
        (lambda a, b, c: torch.cat([a, b, c], 1), {"concat_0": ["a", "b", "c"]}),
        (lambda a, b, c: torch.stack([a, c], 1), {"concat_0": ["a", "c"]}),
        (lambda a, b, c: a * (1 + half(b)) + half(c), {"modulate_0": ["a", "b", "c"]}),
        (lambda a, b, c: (1 + half(b)) * a.relu() + half(b), {"modulate_0": ["a", "b"]}),
        (lambda a, b, c: a * (1 + half(b)), {"modulate_0": ["a", "b"]}),
        (lambda a, b, c: a * (1 + half(b)) + c, {"modulate_0": ["a", "b"], "add_0": ["modulate_0", "c"]}),
        (lambda a, b, c: F.scaled_dot_product_attention(a, b, c), {"attention_0": ["a", "b", "c"]}),
        (lambda a, b, c: (a @ b.mT).softmax(-1) @ c, {"attention_0": ["a", "b", "c"]}),
        (lambda a, b, c: torch.einsum("ij,jk->ik", (a @ b.mT)[0], c[0]), {"attention_0": ["a", "b", "c"]}),
        (lambda a, b, c: torch.bmm(c, torch.bmm(a.mT, b)), {"attention_0": ["a", "b", "c"]}),
        (lambda a, b, c: a * F.gelu(b), {}),
        (lambda a, b, c: a + F.gelu(a), {}),
        (lambda a, b, c: torch.cat([-a[..., 4:], a[..., :4]], -1) + a, {}),
        (lambda a, b, c: a + torch.zeros_like(b), {}),
        (lambda a, b, c: a.type_as(b).view_as(c) + 1, {}),
    ],
)  # fmt: skip
def test_combinations(join, wanted: dict[str, list[str]]) -> None:
    assert combines(graph_of(join)) == wanted


def test_contracted_operations_pass_on_all_their_sources() -> None:
    assert sources(graph_of(lambda a, b, c: a * F.gelu(b)), "out") == ["a", "b"]
    assert sources(graph_of(lambda a, b, c: a.type_as(b)), "out") == ["a"]


def write_into_view(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    a = a.clone()
    a[:, 1:] = b[:, 1:]
    return a


def add_in_place(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    a += b
    return a


def test_operations_in_place_are_seen_by_later_readers() -> None:
    assert set(sources(graph_of(write_into_view), "out")) == {"a", "b"}
    graph = graph_of(add_in_place)
    assert combines(graph) == {"add_0": ["a", "b"]}
    assert sources(graph, "out") == ["add_0"]


def test_a_region_without_gradients_is_read_like_the_rest() -> None:
    def join(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            inner = a + b
        return inner + c

    graph = graph_of(join)
    assert combines(graph) == {"add_0": ["a", "b"], "add_1": ["add_0", "c"]}


def test_macs_of_products() -> None:
    by_name = {n.name: n.macs for n in graph_of(lambda a, b, c: (a @ b.mT).softmax(-1) @ c).nodes}
    assert by_name["attention_0"] == 2 * 6 * 6 * WIDTH
    by_name = {n.name: n.macs for n in graph_of(lambda a, b, c: torch.einsum("bik,bjk->bij", a, b)[..., :1] * c).nodes}
    assert by_name["attention_0"] == 6 * 6 * WIDTH


class Loop(nn.Module):
    """The first layer reads its own result in its second call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.other = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.layer(self.other(self.layer(tokens)))


def test_a_layer_called_in_a_loop_closes_no_cycle() -> None:
    graph = trace_denoiser(Loop(), example_inputs={"tokens": torch.zeros(1, 6, WIDTH)})
    assert [(graph.nodes[s].name, graph.nodes[t].name) for s, t in graph.edges] == [("layer", "other")]
    assert graph.layer_index["layer"].macs == 2 * 6 * WIDTH * WIDTH


class Functional(nn.Module):
    """Weights of layers used without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, groups=4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        image = (tokens @ self.linear.weight.t()).mT.reshape(1, WIDTH, 4, 4)
        return F.conv2d(image, self.conv.weight, groups=4)


def test_a_weight_used_without_its_module_is_its_layer() -> None:
    graph = trace_denoiser(Functional(), example_inputs={"tokens": torch.zeros(1, 16, WIDTH)})
    assert sources(graph, "conv") == ["linear"]
    assert graph.layer_index["linear"].macs == 16 * WIDTH * WIDTH
    assert graph.layer_index["conv"].macs == 2 * 2 * WIDTH * (WIDTH // 4) * 9


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv1d(4, 6, 3, padding=1), (1, 4, 10), 10 * 6 * 4 * 3),
        (nn.Conv2d(4, 6, 3, stride=2), (1, 4, 9, 9), 16 * 6 * 4 * 9),
        (nn.Conv3d(4, 6, (1, 2, 2), stride=(1, 2, 2)), (1, 4, 3, 4, 4), 3 * 4 * 6 * 4 * 4),
        (nn.Linear(4, 6), (3, 5, 4), 5 * 6 * 4),
    ],
)
def test_macs_of_layers(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    graph = trace_denoiser(nn.Sequential(layer), example_inputs={"input": torch.zeros(shape)})
    assert graph.macs == macs
