"""Two graph networks that predict the quality of a recipe and explain it by their nodes.

`PaperNetwork` is the published one: mean pooling, and norms of graph embeddings that are trained to rank recipes.
`NoiseNetwork` starts from a fitted noise model and adds what neighbours do to each other: a node's embedding corrects
the logarithm of its contribution to the noise, and contributions add.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from sedimo.sensitivity.choices import Values
from sedimo.sensitivity.gnn.attention import SharedGATv2, Topology
from sedimo.sensitivity.gnn.features import GraphFeatures
from sedimo.sensitivity.noise_model import DECIBEL, Link

MAX_CORRECTION = 2.0  # of a logarithm: a factor of seven


@dataclass(frozen=True)
class Output:
    """Predictions `[G]`, a score of each graph per hop `[G]` (higher = better), embeddings per hop `[G, N, C]`."""

    prediction: torch.Tensor
    hop_scores: tuple[torch.Tensor, ...]
    embeddings: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class NetworkInput:
    """The rows `[G, N]` of recipes, and how often each row of the table `[R]` occurs among them."""

    rows: torch.Tensor
    counts: torch.Tensor


def network_input(features: GraphFeatures, codes: np.ndarray) -> NetworkInput:
    """Recipes `[G, D]` as a network reads them."""
    rows = torch.from_numpy(features.rows(codes))
    return NetworkInput(rows, torch.bincount(rows.reshape(-1), minlength=features.n_rows).float())


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
    """Hop 0: the embedding of each row of the feature table, `[R, width]`, rectified; no neighbour is seen.

    Source: Mills et al. 2024, feature embedding of the released code (sizes 5 and 10; 64; `width`).
    """

    def __init__(self, features: GraphFeatures, width: int = 16) -> None:
        super().__init__()
        sizes = {"method": 5, "bits": 5, "operation": 10, "block": 10}
        self.codes = nn.ModuleDict({k: nn.Embedding(len(features.names[k]), n) for k, n in sizes.items()})
        self.size, self.error = nn.Linear(1, 5), nn.Linear(1, 5)
        n_in = sum(sizes.values()) + 10
        self.norms = nn.ModuleList([CountedBatchNorm(n) for n in (n_in, 64, width)])
        self.linears = nn.ModuleList([nn.Linear(n_in, 64), nn.Linear(64, width)])
        for name in sizes:
            self.register_buffer(f"_{name}", torch.from_numpy(getattr(features, name)), persistent=False)
        self.register_buffer("_size", torch.from_numpy(features.size)[:, None], persistent=False)
        self.register_buffer("_error", 100 * torch.from_numpy(features.error)[:, None], persistent=False)

    def forward(self, counts: torch.Tensor) -> torch.Tensor:
        """Embeddings `[R, width]`; `counts` `[R]` tell how often each row occurs in the batch."""
        codes = [embedding(self.get_buffer(f"_{name}")) for name, embedding in self.codes.items()]
        x = torch.cat([*codes, self.size(self.get_buffer("_size")), self.error(self.get_buffer("_error"))], dim=1)
        x = torch.relu(self.norms[0](x, counts))
        x = torch.relu(self.norms[1](self.linears[0](x), counts))
        return torch.relu(self.norms[2](self.linears[1](x), counts))


class Hops(nn.Module):
    """GATv2 layers, each with batch normalisation, rectifier and, from the second on, a residual."""

    def __init__(self, topology: Topology, sizes: Sequence[int]) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(sizes))
        self.attentions = nn.ModuleList([SharedGATv2(n_in, n_out, topology) for n_in, n_out in pairs])
        self.norms = nn.ModuleList([nn.BatchNorm1d(n_out) for _, n_out in pairs])

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Embeddings after 0, 1, ... hops, `[G, N, C]` each."""
        found = [h]
        for attention, norm in zip(self.attentions, self.norms, strict=True):
            h = one_hop(attention, norm, h)
            found.append(h)
        return tuple(found)


def one_hop(attention: nn.Module, norm: nn.Module, h: torch.Tensor) -> torch.Tensor:
    """Embeddings `[G, N, C]` one hop further."""
    x: torch.Tensor = attention(h)
    x = torch.relu(norm(x.flatten(0, 1))).view_as(x)
    return x + h if h.shape == x.shape else x


class PaperNetwork(nn.Module):
    """The published predictor: hops, selective mean pooling, a head on the last; norms of embeddings rank recipes.

    Source: Mills et al. 2024, Qua2SeDiMo (arXiv 2412.14628), and the released code's sizes.
    """

    def __init__(self, features: GraphFeatures, *, width: int = 16, hidden: int = 64, n_hops: int = 4) -> None:
        super().__init__()
        self.embedding = Embedding(features, width)
        self.hops = Hops(features.topology, [width] + [hidden] * n_hops)
        self.head = nn.Sequential(
            *(nn.Linear(hidden, hidden), nn.Linear(hidden, hidden), nn.ReLU()),
            *(nn.Linear(hidden, hidden), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)),
        )
        for hop in range(n_hops + 1):
            weights = torch.from_numpy(features.roots[hop]).float()
            self.register_buffer(f"_roots{hop}", weights / weights.sum(), persistent=False)

    def forward(self, batch: NetworkInput) -> Output:
        """Predictions, norms of graph embeddings, node embeddings."""
        embeddings = self.hops(self.embedding(batch.counts)[batch.rows])
        pooled = [torch.einsum("gnc,n->gc", h, self.get_buffer(f"_roots{m}")) for m, h in enumerate(embeddings)]
        prediction = self.head(pooled[-1]).squeeze(1)
        return Output(prediction, tuple(p.abs().sum(dim=1) for p in pooled), embeddings)


class NoiseNetwork(nn.Module):
    """Contributions of nodes add in power: y = link(sum over decisions of c exp(correction by its embedding)).

    `log_costs` `[D, K]` and `link` come from a noise model. Each hop has a readout of its own; the prediction is the
    last one's. At the start all corrections are 0, and the network is the noise model.
    """

    def __init__(
        self,
        features: GraphFeatures,
        log_costs: Values,
        link: Link,
        *,
        width: int = 16,
        hidden: int = 32,
        n_hops: int = 2,
    ) -> None:
        super().__init__()
        n_decisions, n_options = log_costs.shape
        rows = features.row_options(n_decisions, n_options)
        table = np.full(features.n_rows, -np.inf)
        finite = np.isfinite(log_costs)
        table[rows[finite]] = log_costs[finite] - np.log(link.unit)
        first = {int(d): n for n, d in reversed(list(enumerate(features.decision))) if d >= 0}
        self.embedding = Embedding(features, width)
        self.hops = Hops(features.topology, [width] + [hidden] * n_hops)
        self.corrections = nn.ModuleList([nn.Linear(n, 1) for n in [width] + [hidden] * n_hops])
        for parameter in self.corrections.parameters():
            nn.init.zeros_(parameter)
        self.offset, self.slope = nn.Parameter(torch.tensor(link.offset)), nn.Parameter(torch.tensor(link.slope))
        self._floor, self._power = link.floor / link.unit, link.power
        self.register_buffer("_log_costs", torch.from_numpy(table).float(), persistent=False)
        self.register_buffer("_nodes", torch.tensor([first[d] for d in range(n_decisions)]), persistent=False)

    def forward(self, batch: NetworkInput) -> Output:
        """Predictions of the last hop, those of every hop as scores, node embeddings."""
        embeddings = self.hops(self.embedding(batch.counts)[batch.rows])
        totals = [self.contributions(batch.rows, h, hop).sum(dim=1) for hop, h in enumerate(embeddings)]
        scores = tuple(self._linked(total) for total in totals)
        return Output(scores[-1], scores, embeddings)

    def contributions(self, rows: torch.Tensor, embedding: torch.Tensor, hop: int) -> torch.Tensor:
        """What each decision adds to the noise by the readout of a hop, `[G, D]`, in the link's unit."""
        nodes = self.get_buffer("_nodes")
        return torch.exp(self.log_contributions(rows[:, nodes], embedding[:, nodes], hop))

    def log_contributions(self, rows: torch.Tensor, embedding: torch.Tensor, hop: int) -> torch.Tensor:
        """Logarithm of what nodes with these rows `[G, n]` and embeddings `[G, n, C]` add; -inf without a weight."""
        corrections = self.corrections[hop](embedding).squeeze(2)
        corrections = MAX_CORRECTION * torch.tanh(corrections / MAX_CORRECTION)
        found: torch.Tensor = self.get_buffer("_log_costs")[rows] + corrections
        return found

    def _linked(self, total: torch.Tensor) -> torch.Tensor:
        log = torch.log(total + self._floor)
        curve = log if abs(self._power) < 1e-12 else torch.expm1(self._power * log) / self._power
        return self.offset - self.slope * DECIBEL * curve
