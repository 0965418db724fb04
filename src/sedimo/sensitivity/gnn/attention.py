"""Attention between the nodes of graphs that share one topology (GATv2).

Every recipe of a study is the same graph with other features, so edges are sorted once, features are dense
`[G, N, C]`, and no batch of graphs is assembled. The layer exists twice: in plain torch for any device and dtype, and
with compiled kernels for float32 and float64 on the CPU, which are tested against it. Several heads, edge features
and graphs of different topology do not exist here.

Source:
    Brody et al. 2022, How attentive are graph attention networks? (arXiv 2105.14491), equation 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sedimo.errors import InputError

_Array: TypeAlias = NDArray[np.float32] | NDArray[np.float64]
_NEGATIVE_SLOPE = 0.2
_COMPILED = (torch.float32, torch.float64)
_SHARES = 4  # ranges of graphs per thread: a thread that the machine holds up leaves its work to the others
_CHUNK = 32  # graphs whose gradients exist at once: fresh memory costs as much time as the arithmetic


@dataclass(frozen=True, slots=True, eq=False)
class Topology:
    """Edges with a self-loop at every node, sorted by target; `make_topology` makes it.

    The incoming edges of node t come from `sources[starts[t] : starts[t + 1]]`.
    """

    starts: NDArray[np.int32]  # [N + 1]
    sources: NDArray[np.int32]  # [E]

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return len(self.starts) - 1

    @property
    def n_edges(self) -> int:
        """Number of edges, self-loops included."""
        return len(self.sources)

    @property
    def targets(self) -> NDArray[np.int32]:
        """The target of each edge, in ascending order."""
        return np.repeat(np.arange(self.n_nodes, dtype=np.int32), np.diff(self.starts))


def make_topology(n_nodes: int, edges: Sequence[tuple[int, int]]) -> Topology:
    """The topology of a graph from its edges (source, target).

    Every node gets one self-loop, whether it has one among `edges` or not.

    Raises:
        InputError: there is no node, an edge joins nodes that do not exist, or an edge appears twice.
    """
    if n_nodes < 1:
        raise InputError(f"a graph needs at least one node, got n_nodes={n_nodes}")
    seen: set[tuple[int, int]] = set()
    for edge in edges:
        if not all(0 <= node < n_nodes for node in edge):
            raise InputError(f"edge {edge} leaves the graph: nodes are numbered 0 to {n_nodes - 1}")
        if edge in seen:
            raise InputError(f"edge {edge} appears twice; list it once")
        seen.add(edge)
    pairs = sorted((target, source) for source, target in seen | {(node, node) for node in range(n_nodes)})
    targets, sources = np.array(pairs, dtype=np.int32).T.copy()
    starts = np.searchsorted(targets, np.arange(n_nodes + 1)).astype(np.int32)
    for array in (starts, sources):
        array.flags.writeable = False
    return Topology(starts, sources)


class SharedGATv2(nn.Module):
    """One graph attention layer with one head, `[G, N, n_in]` -> `[G, N, n_out]` for G graphs of one topology.

    With l = W_l h + b_l and r = W_r h + b_r, the output of node t is sum_s a_st l_s + bias over its incoming edges,
    where a_st is the softmax over s of attention . leaky_relu(l_s + r_t). Values, gradients and initial distributions
    are those of `GATv2Conv(n_in, n_out)` of PyTorch Geometric: its `lin_l` is the first half of `projection`, its
    `lin_r` the second half.

    The same input gives the same bits again as long as torch's number of threads stays the same. On the CPU there are
    first derivatives only.

    Source:
        Brody et al. 2022, How attentive are graph attention networks? (arXiv 2105.14491), equation 7.
    """

    sources: torch.Tensor  # [E]
    targets: torch.Tensor  # [E]

    def __init__(self, n_in: int, n_out: int, topology: Topology, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.topology = topology
        self.projection = nn.Linear(n_in, 2 * n_out)
        self.attention = nn.Parameter(torch.empty(n_out))
        self.bias = nn.Parameter(torch.empty(n_out))
        self.register_buffer("sources", torch.from_numpy(topology.sources.astype(np.int64)), persistent=False)
        self.register_buffer("targets", torch.from_numpy(topology.targets.astype(np.int64)), persistent=False)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws new parameters: weights by Glorot's rule, b_l and b_r within 1 / sqrt(n_in); the last bias is 0."""
        n_in, n_out = self.projection.in_features, len(self.attention)
        limit, limit_of_bias, limit_of_attention = math.sqrt(6 / (n_in + n_out)), n_in**-0.5, math.sqrt(6 / (1 + n_out))
        with torch.no_grad():
            for half in (slice(None, n_out), slice(n_out, None)):
                self.projection.weight[half].uniform_(-limit, limit, generator=generator)
                self.projection.bias[half].uniform_(-limit_of_bias, limit_of_bias, generator=generator)
            self.attention.uniform_(-limit_of_attention, limit_of_attention, generator=generator)
            self.bias.zero_()

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Features after the layer.

        Raises:
            InputError: `h` is not `[G, N, n_in]` for the N nodes of the topology.
        """
        expected = (self.topology.n_nodes, self.projection.in_features)
        if h.ndim != 3 or h.shape[1:] != expected:
            raise InputError(f"features must have the shape [G, {expected[0]}, {expected[1]}], got {list(h.shape)}")
        tensors = (h, self.projection.weight, self.projection.bias, self.attention, self.bias)
        if not _can_compile(tensors):
            return self.reference(h)
        left_bias, right_bias = self.projection.bias.chunk(2)
        return _compiled_layer(
            h, self.projection.weight, self.attention, left_bias + right_bias, left_bias + self.bias, self.topology
        )

    def reference(self, h: torch.Tensor) -> torch.Tensor:
        """The layer in plain torch: slow, with intermediates `[G, E, C]`, on any device.

        Source: Brody et al. 2022, equation 7.
        """
        left, right = self.projection(h).chunk(2, dim=-1)  # [G, N, C]
        messages = left[:, self.sources]  # [G, E, C]
        scores = F.leaky_relu(messages + right[:, self.targets], _NEGATIVE_SLOPE) @ self.attention  # [G, E]
        targets = self.targets.expand_as(scores)
        lowest = scores.new_full(left.shape[:2], -math.inf)
        greatest = lowest.scatter_reduce(1, targets, scores.detach(), "amax")  # [G, N]
        weights = (scores - greatest[:, self.targets]).exp()
        totals = torch.zeros_like(greatest).index_add(1, self.targets, weights)
        weighted = messages * (weights / totals[:, self.targets]).unsqueeze(-1)
        return torch.zeros_like(left).index_add(1, self.targets, weighted) + self.bias


def _can_compile(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the kernels know these tensors."""
    dtype = tensors[0].dtype
    is_plain = all(t.device.type == "cpu" and t.dtype == dtype for t in tensors)
    return is_plain and dtype in _COMPILED and not torch.is_autocast_enabled("cpu")


class _CompiledLayer(torch.autograd.Function):
    """A layer by compiled kernels, with the biases gathered where they act.

    `shift` = b_l + b_r acts in the scores; since the weights of a target sum to 1, `offset` = b_l + bias acts on the
    output. `ctx` holds what the backward pass needs.
    """

    @staticmethod
    def forward(
        ctx: Any,  # torch leaves it untyped
        h: torch.Tensor,
        weight: torch.Tensor,
        attention: torch.Tensor,
        shift: torch.Tensor,
        offset: torch.Tensor,
        topology: Topology,
    ) -> torch.Tensor:
        from sedimo.sensitivity.gnn._attention_kernels import attend  # loaded here: importing compiles

        n_graphs, n_nodes, n_in = h.shape
        n_channels = len(attention)
        h, attention = h.contiguous(), attention.contiguous()
        projected = (h.view(-1, n_in) @ weight.T).view(n_graphs, n_nodes, 2, n_channels)
        weights = h.new_empty(n_graphs, topology.n_edges)
        out = h.new_empty(n_graphs, n_nodes, n_channels)
        _over_graphs(attend, topology, _arrays(attention, shift, offset), *_arrays(projected, weights, out))
        ctx.save_for_backward(h, weight, attention, shift, projected, weights)
        ctx.topology = topology
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from sedimo.sensitivity.gnn._attention_kernels import attend_backward  # loaded here: importing compiles

        h, weight, attention, shift, projected, weights = ctx.saved_tensors
        d_out = d_out.contiguous()
        d_h = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight)
        d_vectors = h.new_empty(len(h), 3, len(attention))
        scratch = torch.empty_like(projected[:_CHUNK])
        for part in (slice(first, first + _CHUNK) for first in range(0, len(h), _CHUNK)):
            d_projected = scratch[: len(h[part])]
            rows, changes = _arrays(projected[part], d_projected), _arrays(d_out[part], d_vectors[part])
            (weights_of_part,) = _arrays(weights[part])
            _over_graphs(attend_backward, ctx.topology, _arrays(attention, shift), rows, weights_of_part, changes)
            flat = d_projected.view(-1, len(weight))
            d_weight.addmm_(flat.T, h[part].view(-1, h.shape[-1]))
            if d_h is not None:
                torch.mm(flat, weight, out=d_h[part].view(-1, h.shape[-1]))
        return d_h, d_weight, *d_vectors.sum(0), None


_compiled_layer: Callable[..., torch.Tensor] = _CompiledLayer.apply  # torch leaves it untyped


def _arrays(*tensors: torch.Tensor) -> tuple[_Array, ...]:
    """The same memory as arrays."""
    return tuple(tensor.detach().numpy() for tensor in tensors)


def _over_graphs(
    kernel: Callable[..., None],
    topology: Topology,
    vectors: tuple[_Array, ...],
    *arrays: _Array | tuple[_Array, ...],
) -> None:
    """Calls a kernel for consecutive ranges of graphs, on as many threads as torch may use."""
    n_graphs = len(arrays[0][0]) if isinstance(arrays[0], tuple) else len(arrays[0])
    edges, slope = (topology.starts, topology.sources), vectors[0].dtype.type(_NEGATIVE_SLOPE)
    n_threads = min(torch.get_num_threads(), n_graphs)
    if n_threads <= 1:
        kernel((0, n_graphs), edges, slope, vectors, *arrays)
        return
    n_ranges = min(_SHARES * n_threads, n_graphs)
    limits = [n_graphs * i // n_ranges for i in range(n_ranges + 1)]
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in pool.map(lambda graphs: kernel(graphs, edges, slope, vectors, *arrays), pairwise(limits)):
            pass
