"""Two graph networks that predict the quality of a recipe and explain it by their nodes, and the layer of both.

`PaperNetwork` is the published one: mean pooling, and norms of graph embeddings that are trained to rank recipes.
`NoiseNetwork` starts from a fitted noise model and adds what neighbours do to each other: a node's embedding corrects
the logarithm of its contribution to the noise, and contributions add.

Every recipe of a study is the same graph with other features, so edges are sorted once, features are dense
`[G, N, C]`, and no batch of graphs is assembled: a network reads the rows `[G, N]` of recipes (`GraphFeatures.rows`).
The attention layer exists twice: in plain torch for any device and dtype, and with compiled kernels for float32 and
float64 on the CPU, which are tested against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sedimo.errors import InputError
from sedimo.methods.predictor.features import GraphFeatures, Topology
from sedimo.methods.predictor.noise_model import DECIBEL, NoiseModel

MAX_CORRECTION = 2.0  # of a logarithm: a factor of seven
WIDTH = 16  # of an embedding at hop 0, as published
_Array: TypeAlias = NDArray[np.float32] | NDArray[np.float64]
_NEGATIVE_SLOPE = 0.2
_COMPILED = (torch.float32, torch.float64)
_SHARES = 4  # ranges of graphs per thread: a thread that the machine holds up leaves its work to the others
_CHUNK = 32  # graphs whose gradients exist at once: fresh memory costs as much time as the arithmetic


class CountedBatchNorm(nn.Module):
    """Batch normalisation of table rows `[R, C]` that occur `counts` `[R]` times: as if all occurrences were there.

    Source: Ioffe and Szegedy 2015, Batch Normalization; equal to `nn.BatchNorm1d` of the repeated rows.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, n_features: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(n_features)), nn.Parameter(torch.zeros(n_features))
        self.register_buffer("running_mean", torch.zeros(n_features))
        self.register_buffer("running_var", torch.ones(n_features))
        self._eps, self._momentum = eps, momentum

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Normalised rows `[R, C]`."""
        mean, variance = self.running_mean, self.running_var
        if self.training:
            n = counts.sum()
            mean = counts @ x / n
            variance = counts @ (x - mean).square() / n
            with torch.no_grad():
                self.running_mean += self._momentum * (mean - self.running_mean)
                self.running_var += self._momentum * (variance * n / (n - 1) - self.running_var)
        return (x - mean) * torch.rsqrt(variance + self._eps) * self.weight + self.bias


class Embedding(nn.Module):
    """Hop 0: the embedding of each row of the feature table, rectified; no neighbour is seen.

    Source: Mills et al. 2024, feature embedding of the released code (sizes 5 and 10; 64; 16).
    """

    def __init__(self, features: GraphFeatures) -> None:
        super().__init__()
        sizes = {"method": 5, "bits": 5, "operation": 10, "block": 10}
        self.codes = nn.ModuleDict({k: nn.Embedding(len(features.names[k]), n) for k, n in sizes.items()})
        self.size, self.error = nn.Linear(1, 5), nn.Linear(1, 5)
        n_in = sum(sizes.values()) + 10
        self.norms = nn.ModuleList([CountedBatchNorm(n) for n in (n_in, 64, WIDTH)])
        self.linears = nn.ModuleList([nn.Linear(n_in, 64), nn.Linear(64, WIDTH)])
        for name in sizes:
            self.register_buffer(f"_{name}", torch.from_numpy(features.codes[name]), persistent=False)
        self.register_buffer("_size", torch.from_numpy(features.size)[:, None], persistent=False)
        self.register_buffer("_error", 100 * torch.from_numpy(features.error)[:, None], persistent=False)

    def table(self, rows: torch.Tensor) -> torch.Tensor:
        """Embeddings of all rows of the table `[R, 16]`, normalised in training by the rows `[G, N]` of a batch."""
        counts = torch.bincount(rows.reshape(-1), minlength=len(self.get_buffer("_size"))).float()
        codes = [embedding(self.get_buffer(f"_{name}")) for name, embedding in self.codes.items()]
        x = torch.cat([*codes, self.size(self.get_buffer("_size")), self.error(self.get_buffer("_error"))], dim=1)
        x = torch.relu(self.norms[0](x, counts))
        x = torch.relu(self.norms[1](self.linears[0](x), counts))
        return torch.relu(self.norms[2](self.linears[1](x), counts))

    def whole_table(self) -> torch.Tensor:
        """Embeddings of all rows `[R, 16]`, each counted once."""
        return self.table(torch.arange(len(self.get_buffer("_size"))))


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

    def __init__(self, n_in: int, n_out: int, topology: Topology) -> None:
        super().__init__()
        self.topology = topology
        self.projection = nn.Linear(n_in, 2 * n_out)
        self.attention = nn.Parameter(torch.empty(n_out))
        self.bias = nn.Parameter(torch.empty(n_out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new parameters: weights by Glorot's rule, b_l and b_r within 1 / sqrt(n_in); the last bias is 0."""
        n_in, n_out = self.projection.in_features, len(self.attention)
        with torch.no_grad():
            for half in (slice(None, n_out), slice(n_out, None)):
                nn.init.xavier_uniform_(self.projection.weight[half])
                self.projection.bias[half].uniform_(-(n_in**-0.5), n_in**-0.5)
            nn.init.xavier_uniform_(self.attention[None])
            self.bias.zero_()

    def forward(self, h: torch.Tensor, topology: Topology | None = None) -> torch.Tensor:
        """Features after the layer, on another topology than its own if one is given."""
        topology = topology or self.topology
        expected = (topology.n_nodes, self.projection.in_features)
        if h.ndim != 3 or h.shape[1:] != expected:
            raise InputError(f"features must have the shape [G, {expected[0]}, {expected[1]}], got {list(h.shape)}")
        weight, bias = self.projection.weight, self.projection.bias
        is_plain = all(
            t.device.type == "cpu" and t.dtype == h.dtype for t in (h, weight, bias, self.attention, self.bias)
        )
        if not is_plain or h.dtype not in _COMPILED or torch.is_autocast_enabled("cpu"):
            return self.reference(h, topology)
        left_bias, right_bias = bias.chunk(2)
        return _compiled_layer(h, weight, self.attention, left_bias + right_bias, left_bias + self.bias, topology)

    def reference(self, h: torch.Tensor, topology: Topology | None = None) -> torch.Tensor:
        """The layer in plain torch: slow, with intermediates `[G, E, C]`, on any device.

        Source: Brody et al. 2022, equation 7.
        """
        edges = topology or self.topology
        sources, targets = (torch.from_numpy(e.astype(np.int64)).to(h.device) for e in (edges.sources, edges.targets))
        left, right = self.projection(h).chunk(2, dim=-1)  # [G, N, C]
        messages = left[:, sources]  # [G, E, C]
        scores = F.leaky_relu(messages + right[:, targets], _NEGATIVE_SLOPE) @ self.attention  # [G, E]
        lowest = scores.new_full(left.shape[:2], -math.inf)
        greatest = lowest.scatter_reduce(1, targets.expand_as(scores), scores.detach(), "amax")  # [G, N]
        weights = (scores - greatest[:, targets]).exp()
        totals = torch.zeros_like(greatest).index_add(1, targets, weights)
        weighted = messages * (weights / totals[:, targets]).unsqueeze(-1)
        return torch.zeros_like(left).index_add(1, targets, weighted) + self.bias


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
        from sedimo.methods.predictor._attention_kernels import attend  # loaded here: numba takes a second

        n_graphs, n_nodes, n_in = h.shape
        n_channels = len(attention)
        h, attention = h.contiguous(), attention.contiguous()
        projected = (h.view(-1, n_in) @ weight.T).view(n_graphs, n_nodes, 2, n_channels)
        weights = h.new_empty(n_graphs, len(topology.sources))
        out = h.new_empty(n_graphs, n_nodes, n_channels)
        _over_graphs(attend, topology, _arrays(attention, shift, offset), *_arrays(projected, weights, out))
        ctx.save_for_backward(h, weight, attention, shift, projected, weights)
        ctx.topology = topology
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from sedimo.methods.predictor._attention_kernels import attend_backward

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


class Hops(nn.Module):
    """An embedding, and GATv2 layers to `width` channels, each normalised and rectified, residuals after the first."""

    def __init__(self, features: GraphFeatures, width: int, n_hops: int) -> None:
        super().__init__()
        sizes = list(pairwise([WIDTH] + [width] * n_hops))
        self.embedding = Embedding(features)
        self.attentions = nn.ModuleList([SharedGATv2(n_in, n_out, features.topology) for n_in, n_out in sizes])
        self.norms = nn.ModuleList([nn.BatchNorm1d(n_out) for _, n_out in sizes])

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Embeddings of the nodes of recipes `[G, N]` after 0, 1, ... hops, `[G, N, C]` each."""
        found = [self.embedding.table(rows)[rows]]
        for hop in range(len(self.norms)):
            found.append(self.further(hop, found[-1]))
        return tuple(found)

    def further(self, hop: int, h: torch.Tensor, topology: Topology | None = None) -> torch.Tensor:
        """Embeddings `[G, N, C]` after so many hops, one hop further; on a part of the graph by its topology."""
        x: torch.Tensor = self.attentions[hop](h, topology)
        x = torch.relu(self.norms[hop](x.flatten(0, 1))).view_as(x)
        return x + h if h.shape == x.shape else x


class PaperNetwork(nn.Module):
    """The published predictor: hops, selective mean pooling, a head on the last; norms of embeddings rank recipes.

    Source: Mills et al. 2024, Qua2SeDiMo (arXiv 2412.14628), and the released code's sizes.
    """

    def __init__(self, features: GraphFeatures, *, n_hops: int = 4) -> None:
        super().__init__()
        n = 64
        self.hops = Hops(features, n, n_hops)
        self.head = nn.Sequential(
            *(nn.Linear(n, n), nn.Linear(n, n), nn.ReLU()),
            *(nn.Linear(n, n), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 1)),
        )
        for hop in range(n_hops + 1):
            weights = torch.from_numpy(features.roots[hop]).float()
            self.register_buffer(f"_roots{hop}", weights / weights.sum(), persistent=False)

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Predictions `[G]`, and per hop a score of each graph `[G]` (higher = better), the norm of its embedding."""
        hops = enumerate(self.hops(rows))
        pooled = [torch.einsum("gnc,n->gc", h, self.get_buffer(f"_roots{hop}")) for hop, h in hops]
        return self.head(pooled[-1]).squeeze(1), [p.abs().sum(dim=1) for p in pooled]


class NoiseNetwork(nn.Module):
    """Contributions of nodes add in power: y = link(sum over decisions of c exp(correction by its embedding)).

    Each hop has a readout of its own; the prediction is the last one's. At the start all corrections are 0, and the
    network is the noise model that it was made from.
    """

    def __init__(self, features: GraphFeatures, noise: NoiseModel, *, n_hops: int = 2) -> None:
        super().__init__()
        table, finite = np.full(len(features.size), -np.inf), np.isfinite(noise.log_costs)
        rows = features.row_options(noise.log_costs.shape[1])
        table[rows[finite]] = noise.log_costs[finite] - np.log(noise.unit)
        width = 32
        self.noise, self.hops = noise, Hops(features, width, n_hops)
        self.corrections = nn.ModuleList([nn.Linear(n, 1) for n in [WIDTH] + [width] * n_hops])
        for parameter in self.corrections.parameters():
            nn.init.zeros_(parameter)
        self.offset, self.slope = nn.Parameter(torch.tensor(noise.offset)), nn.Parameter(torch.tensor(noise.slope))
        self.register_buffer("_log_costs", torch.from_numpy(table).float(), persistent=False)
        self.register_buffer("_nodes", torch.from_numpy(features.first_nodes), persistent=False)

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Predictions `[G]` of the last hop, and those of every hop as scores `[G]`."""
        floor, power, scores = self.noise.floor / self.noise.unit, self.noise.power, []
        for hop, h in enumerate(self.hops(rows)):
            log = torch.log(self.contributions(rows, h, hop).sum(dim=1) + floor)
            curve = log if abs(power) < 1e-12 else torch.expm1(power * log) / power
            scores.append(self.offset - self.slope * DECIBEL * curve)
        return scores[-1], scores

    def contributions(self, rows: torch.Tensor, embedding: torch.Tensor, hop: int) -> torch.Tensor:
        """What each decision adds to the noise by the readout of a hop, `[G, D]`, in the noise model's unit."""
        nodes = self.get_buffer("_nodes")
        return torch.exp(self.log_contributions(rows[:, nodes], embedding[:, nodes], hop))

    def log_contributions(self, rows: torch.Tensor, embedding: torch.Tensor, hop: int) -> torch.Tensor:
        """Logarithm of what nodes with these rows `[G, n]` and embeddings `[G, n, C]` add; -inf without a weight."""
        corrections = self.corrections[hop](embedding).squeeze(2)
        corrections = MAX_CORRECTION * torch.tanh(corrections / MAX_CORRECTION)
        found: torch.Tensor = self.get_buffer("_log_costs")[rows] + corrections
        return found
