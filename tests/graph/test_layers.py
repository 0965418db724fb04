"""Weight layers, ties, and the copy without weights."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sedimo.checkpoint.weights import replace_weights
from sedimo.errors import InputError
from sedimo.graph.layers import find_ties, meta_twin, other_weights, weight_layers, weight_names
from sedimo.graph.trace import trace_denoiser
from sedimo.quant.fitting import quantize_weight


class Zoo(nn.Module):
    """One of each kind of weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.transposed = nn.ConvTranspose2d(4, 6, 3)
        self.embedding = nn.Embedding(10, 4)
        self.norm = nn.LayerNorm(4)
        self.alias = self.linear
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.table = [torch.ones(5, 5), {"more": torch.zeros(2, 3)}]
        self.register_buffer("buffer", torch.ones(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.linear(tokens) + self.alias(tokens)


def test_layers_and_other_weights() -> None:
    zoo = Zoo()
    assert {n: (v.layer_type, v.shape) for n, v in weight_layers(zoo).items()} == {
        "linear": ("Linear", (6, 4)),
        "conv": ("Conv2d", (6, 2, 3, 3)),
    }
    assert {name.split(".")[0] for name in other_weights(zoo)} == {"transposed", "embedding", "normed"}


def test_a_twin_has_no_weights_at_all() -> None:
    zoo = Zoo()
    twin = meta_twin(zoo)
    assert all(t.is_meta for t in (*twin.parameters(), *twin.buffers(), twin.table[0], twin.table[1]["more"]))
    assert [p.shape for p in twin.parameters()] == [p.shape for p in zoo.parameters()]
    assert not twin.training
    assert not any(p.is_meta for p in zoo.parameters())


def test_a_twin_leaves_hooks_behind() -> None:
    zoo = Zoo()
    seen: list[torch.Tensor] = []
    zoo.linear.register_forward_hook(lambda *_: seen.append(_[2]))
    zoo.linear._hf_hook = SimpleNamespace(weights={"weight": torch.ones(6, 4)})  # as accelerate does
    zoo.linear._old_forward = zoo.linear.forward
    zoo.linear.forward = lambda _: pytest.fail("the offloading forward ran")  # type: ignore[method-assign]
    twin = meta_twin(zoo)
    assert not hasattr(twin.linear, "_hf_hook")
    graph = trace_denoiser(zoo, example_inputs={"tokens": torch.zeros(1, 4)})
    assert graph.layer_index["linear"].macs == 2 * 24
    assert seen == []
    assert hasattr(zoo.linear, "_hf_hook")


def test_a_compiled_module_is_traced_as_it_was_written() -> None:
    zoo = Zoo()
    zoo.linear.compile(backend=lambda *_: pytest.fail("compiled"))
    examples = {"tokens": torch.zeros(1, 4)}
    assert trace_denoiser(zoo, example_inputs=examples) == trace_denoiser(Zoo(), example_inputs=examples)


def test_a_module_under_two_names_is_one_layer() -> None:
    assert "alias" not in weight_layers(Zoo())
    assert weight_names(Zoo())["alias.weight"] == "linear"


@pytest.fixture
def alike() -> nn.ModuleList:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))
    layers[1].weight = layers[0].weight
    layers[2].weight.data.copy_(layers[0].weight)
    layers[3].weight.data.copy_(layers[0].weight)
    layers[3].weight.data[7, 3] += 1e-3  # an element that the quick comparison does not look at
    layers[5].weight.data.copy_(layers[4].weight)
    return layers


def test_ties_by_identity_and_by_value(alike: nn.ModuleList) -> None:
    assert find_ties(alike) == (("0", "1", "2"), ("4", "5"))


def test_ties_need_equal_types(alike: nn.ModuleList) -> None:
    alike[5].bfloat16()
    alike[4].weight.data.zero_()
    alike[5].weight.data.zero_()
    assert find_ties(alike) == (("0", "1", "2"),)


def test_ties_of_weights_that_cannot_be_read_are_those_of_identity(alike: nn.ModuleList) -> None:
    packed = copy.deepcopy(alike)
    weights = {str(i): quantize_weight(packed[i].weight.detach(), "uaq4") for i in (0, 2, 3, 4, 5)}
    replace_weights(packed, weights)  # layer 1 shares the parameter of layer 0 and follows it
    assert find_ties(packed) == (("0", "1"),)

    with torch.device("meta"):
        empty = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    empty[2].weight = empty[0].weight
    assert find_ties(empty) == (("0", "2"),)


def test_packed_weights_of_ours_trace(tiny_dit: nn.Module) -> None:
    packed = copy.deepcopy(tiny_dit)
    weights = {name: packed.get_submodule(name).weight.detach() for name in weight_layers(packed)}
    replace_weights(packed, {name: quantize_weight(weight, "uaq4") for name, weight in weights.items()})
    assert trace_denoiser(packed).edges == trace_denoiser(tiny_dit).edges


def test_a_tree_that_cannot_be_copied_is_refused() -> None:
    zoo = Zoo()
    zoo.generator = (n for n in range(3))  # type: ignore[assignment]
    with pytest.raises(InputError, match="Zoo cannot be copied"):
        meta_twin(zoo)
