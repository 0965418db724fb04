"""The attention layer: its topology, and both implementations against PyTorch Geometric's GATv2Conv."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from sedimo.errors import InputError
from sedimo.methods.predictor.features import make_topology
from sedimo.methods.predictor.model import SharedGATv2

# of the greatest value; sums of up to some thousand terms in another order differ by a few tens of epsilons
TOLERANCES = {torch.float32: 5e-6, torch.float64: 2e-14}
PATHS = ("compiled", "reference")

SIZES = [  # n_nodes, n_edges, n_graphs, n_in, n_out
    pytest.param(1, 0, 2, 3, 4, id="one-node"),
    pytest.param(5, 0, 1, 4, 2, id="no-edges"),
    pytest.param(7, 21, 3, 1, 5, id="all-edges"),
    pytest.param(12, 20, 70, 6, 3, id="many-graphs"),
    pytest.param(40, 60, 4, 33, 17, id="odd-widths"),
    pytest.param(60, 90, 3, 40, 64, id="wide"),
]


def random_edges(n_nodes, n_edges, seed):
    """Edges of an acyclic graph, in random order; node 0 has no predecessor."""
    pairs = np.stack(np.triu_indices(n_nodes, 1), axis=1)
    chosen = np.random.default_rng(seed).permutation(len(pairs))[:n_edges]
    return [(int(source), int(target)) for source, target in pairs[chosen]]


def make_layers(n_in, n_out, topology, dtype, seed=0):
    """Our layer and PyG's with the same parameters, the last bias not zero."""
    torch.manual_seed(seed)
    from torch_geometric.nn import GATv2Conv  # seconds, for this oracle alone

    theirs = GATv2Conv(n_in, n_out).to(dtype)
    torch.nn.init.normal_(theirs.bias)
    ours = SharedGATv2(n_in, n_out, topology).to(dtype)
    ours.load_state_dict(to_ours(theirs.state_dict()))
    return ours, theirs


def to_ours(named):
    """PyG's parameters, or their gradients, under our names."""
    return {
        "projection.weight": torch.cat([named["lin_l.weight"], named["lin_r.weight"]]),
        "projection.bias": torch.cat([named["lin_l.bias"], named["lin_r.bias"]]),
        "attention": named["att"].flatten(),
        "bias": named["bias"],
    }


def run_ours(layer, h, path):
    return layer(h) if path == "compiled" else layer.reference(h)


def run_theirs(layer, h, edges):
    """PyG's layer on copies of the graph, batched as its DataLoader does."""
    index = torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).T
    batched = torch.cat([index + graph * h.shape[1] for graph in range(len(h))], dim=1)
    return layer(h.reshape(-1, h.shape[-1]), batched).view(*h.shape[:2], -1)


def gradients(layer, h, out, seed=1):
    """Gradients of a random linear function of `out` by parameters and input."""
    layer.zero_grad()
    factors = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (of_input,) = torch.autograd.grad((out * factors.to(out)).sum(), h, retain_graph=True)
    (out * factors.to(out)).sum().backward()
    return {name: parameter.grad for name, parameter in layer.named_parameters()}, of_input


def assert_close(found, expected):
    tolerance = TOLERANCES[expected.dtype]
    greatest = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * greatest)


# topology


def test_edges_are_sorted_by_target_and_every_node_gets_one_loop():
    topology = make_topology(4, [(2, 3), (1, 1), (0, 3), (0, 1)])
    assert topology.starts.tolist() == [0, 1, 3, 4, 7]
    assert topology.sources.tolist() == [0, 0, 1, 2, 0, 2, 3]
    assert topology.targets.tolist() == [0, 1, 1, 2, 3, 3, 3]
    assert (topology.n_nodes, len(topology.sources)) == (4, 7)


@pytest.mark.parametrize(
    ("n_nodes", "edges", "reason"),
    [
        (0, [], "at least one node"),
        (3, [(0, 3)], r"\(0, 3\) leaves the graph"),
        (3, [(-1, 2)], r"\(-1, 2\) leaves the graph"),
        (3, [(0, 1), (1, 2), (0, 1)], r"\(0, 1\) appears twice"),
    ],
)
def test_impossible_topologies_are_refused(n_nodes, edges, reason):
    with pytest.raises(InputError, match=reason):
        make_topology(n_nodes, edges)


def test_a_topology_cannot_be_changed():
    topology = make_topology(3, [(0, 1)])
    with pytest.raises(ValueError, match="read-only"):
        topology.sources[0] = 2


# against PyTorch Geometric


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("n_nodes", "n_edges", "n_graphs", "n_in", "n_out"), SIZES)
def test_values_and_gradients_are_those_of_pyg(n_nodes, n_edges, n_graphs, n_in, n_out, dtype, path):
    edges = random_edges(n_nodes, n_edges, seed=n_nodes)
    ours, theirs = make_layers(n_in, n_out, make_topology(n_nodes, edges), dtype)
    h = torch.randn(n_graphs, n_nodes, n_in, dtype=dtype, requires_grad=True)
    out, expected = run_ours(ours, h, path), run_theirs(theirs, h, edges)
    assert_close(out, expected)
    found, found_of_input = gradients(ours, h, out)
    known, known_of_input = gradients(theirs, h, expected)
    assert_close(found_of_input, known_of_input)
    for name, gradient in to_ours(known).items():
        assert_close(found[name], gradient)


def test_great_scores_do_not_overflow():
    edges = random_edges(9, 20, seed=2)
    ours, theirs = make_layers(4, 8, make_topology(9, edges), torch.float32)
    h = 1000 * torch.randn(2, 9, 4)
    expected = run_theirs(theirs, h, edges)
    assert expected.isfinite().all()
    for path in PATHS:
        assert_close(run_ours(ours, h, path), expected)


def test_new_parameters_are_drawn_as_pyg_draws_them():
    ours, theirs = make_layers(7, 5, make_topology(2, [(0, 1)]), torch.float32)
    torch.manual_seed(5)
    theirs.reset_parameters()
    torch.manual_seed(5)
    ours.reset_parameters()
    for name, parameter in to_ours(theirs.state_dict()).items():
        assert torch.equal(ours.state_dict()[name], parameter), name


# the compiled layer by itself


def test_its_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    layer = SharedGATv2(2, 3, make_topology(4, [(0, 1), (0, 2), (1, 3), (2, 3)])).double()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    h = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)

    def call(h, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (h,))

    assert torch.autograd.gradcheck(call, (h, *parameters))


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_the_same_input_gives_the_same_bits(n_threads):
    layer = SharedGATv2(16, 16, make_topology(30, random_edges(30, 60, seed=1)))
    h = torch.randn(40, 30, 16, requires_grad=True)
    torch.set_num_threads(n_threads)
    runs = []
    for _ in range(3):
        out = layer(h)
        runs.append([out, *torch.autograd.grad(out.square().sum(), [h, *layer.parameters()])])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    assert_close(runs[0][0], layer.reference(h))


@pytest.mark.parametrize(
    ("dtype", "is_compiled"), [(torch.float32, True), (torch.float64, True), (torch.bfloat16, False)], ids=str
)
def test_the_kernels_serve_the_dtypes_that_they_know(dtype, is_compiled):
    layer = SharedGATv2(4, 4, make_topology(3, [(0, 1)])).to(dtype)
    h = torch.randn(2, 3, 4, dtype=dtype)
    assert ("CompiledLayer" in layer(h).grad_fn.name()) == is_compiled
    with torch.autocast("cpu"):
        assert "CompiledLayer" not in layer(h).grad_fn.name()


def test_rows_in_any_order_of_memory_give_the_same():
    layer = SharedGATv2(4, 6, make_topology(5, random_edges(5, 6, seed=3)))
    h = torch.randn(5, 4, 3).permute(2, 0, 1)
    assert torch.equal(layer(h), layer(h.contiguous()))
    out = layer(h)
    factors = torch.randn(6, 5, 3).permute(2, 1, 0)
    found = torch.autograd.grad(out, layer.attention, factors, retain_graph=True)[0]
    assert torch.equal(found, torch.autograd.grad(out, layer.attention, factors.contiguous())[0])


def test_no_graphs_give_no_rows_and_zero_gradients():
    layer = SharedGATv2(4, 6, make_topology(5, []))
    out = layer(torch.empty(0, 5, 4))
    out.sum().backward()
    assert out.shape == (0, 5, 6)
    assert not any(parameter.grad.any() for parameter in layer.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reaches_the_successors_and_nobody_else(value):
    layer = SharedGATv2(4, 6, make_topology(5, [(0, 1), (1, 3), (2, 3), (3, 4)]))
    h = torch.randn(2, 5, 4)
    h[1, 1, 2] = value
    is_finite = layer(h).isfinite().all(dim=-1)
    assert is_finite.tolist() == [[True] * 5, [True, False, True, False, True]]


def test_a_copy_of_the_layer_does_the_same():
    layer = SharedGATv2(4, 6, make_topology(5, random_edges(5, 6, seed=3)))
    h = torch.randn(2, 5, 4)
    assert torch.equal(copy.deepcopy(layer)(h), layer(h))


@pytest.mark.parametrize("shape", [(5, 4), (2, 6, 4), (2, 5, 3), (1, 2, 5, 4)])
def test_features_of_another_shape_are_refused(shape):
    layer = SharedGATv2(4, 6, make_topology(5, []))
    with pytest.raises(InputError, match=r"must have the shape \[G, 5, 4\]"):
        layer(torch.zeros(shape))
