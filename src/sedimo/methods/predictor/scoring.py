"""What a trained predictor says of single options and of the variants of a group.

A score is higher = better and has no unit: per hop the nodes' scores are standardised by the moments of the nodes that
they are used on, weighted by how well the hop ranked recipes it had not seen, and averaged over folds; the spread
over folds is its uncertainty. A hop that ranks worse than chance has weight 0 and is named.

A group's variants are fed to the network either in isolation (its own layers and what lies between them) or in
context: every other node stands as in a reference recipe. An embedding after m hops depends on what is at most m
edges upstream, so only that part of the graph is computed.

Source:
    Mills et al. 2024, Qua2SeDiMo (arXiv 2412.14628), scores of operations and blocks; moments over the roots only and
    scores in context are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats

from sedimo.allocation.variant_table import enumerate_variants
from sedimo.errors import InputError
from sedimo.graph.model import DenoiserGraph, Group
from sedimo.methods.predictor.choices import Codes, Values
from sedimo.methods.predictor.features import GraphFeatures, make_topology
from sedimo.methods.predictor.model import NoiseNetwork, PaperNetwork, SharedGATv2, network_input, one_hop
from sedimo.methods.predictor.study import Background
from sedimo.methods.predictor.training import FoldModel, Network, Predictor, TrainingSet

ScoresByName = dict[str, list[float]]
_MOMENT_RECIPES = 64  # of the training recipes give the moments
_HIGHEST = 5.0
_VARIANT_ROWS = 20_000  # nodes times variants computed at once


@dataclass(frozen=True)
class Scores:
    """Mean and spread over folds of scores: of all options `[D, K]`, or of the V variants of a group `[V]`."""

    mean: Values
    spread: Values


@dataclass(frozen=True)
class GroupScores:
    """All variants of a group: `choice` `[V, w]` are options of its `decisions`, with the scores of each."""

    group: str
    block: str
    hop: int
    decisions: tuple[int, ...]
    choice: npt.NDArray[np.int64]
    scores: Scores


@dataclass(frozen=True)
class GroupNoise:
    """All variants of a group: `choice` `[V, w]` are options of its `decisions`, `noise` `[F, V]` by each fold."""

    group: str
    decisions: tuple[int, ...]
    choice: npt.NDArray[np.int64]
    noise: Values


@dataclass(frozen=True)
class HopQuality:
    """How a hop of a fold ranks its test recipes, and the moments of its root nodes' scores."""

    srcc: float
    mean: float
    deviation: float


def hop_qualities(predictor: Predictor, graph: DenoiserGraph, codes: Codes) -> tuple[tuple[HopQuality, ...], ...]:
    """Per fold and hop; moments are those of what is scored: at hop 0 layers, beyond it groups of that hop.

    They are taken over (some of) the recipes `[T, D]`. A hop that no group has gets the moments of all layers.
    """
    some = codes[:: max(1, len(codes) // _MOMENT_RECIPES)]
    last = len(predictor.folds[0].hop_srcc) - 1
    layers = predictor.features.decision >= 0
    parts: dict[int, list[_Part]] = {hop: [] for hop in range(last + 1)}
    for group in graph.groups:
        hop = min(group.hop, last)
        if hop > 0:
            parts[hop].append(_part(predictor.features, graph, group, hop))
    found = []
    for fold in predictor.folds:
        embeddings = _whole(fold.network, predictor.features, some)
        row = []
        for hop, scores in enumerate(_node_scores(fold.network, predictor.features, embeddings, some)):
            each = [_root_scores(fold, predictor.features, part, some, hop) for part in parts[hop]]
            used = np.concatenate(each) if each else scores[:, layers]
            used = used[np.isfinite(used)]
            row.append(HopQuality(float(fold.hop_srcc[hop]), float(used.mean()), max(float(used.std()), 1e-12)))
        found.append(tuple(row))
    return tuple(found)


def option_scores(predictor: Predictor, qualities: Sequence[Sequence[HopQuality]]) -> Scores:
    """Scores of each option of each decision by hop 0, `[D, K]`; not a number where there is no option.

    Hop 0 sees no neighbour, so that isolation and context are the same.
    """
    choices, features = predictor.choices, predictor.features
    rows = features.row_options(choices.n_decisions, choices.n_options)
    each = []
    for fold, quality in zip(predictor.folds, qualities, strict=True):
        raw = _row_scores(fold.network, features)[rows]
        each.append(_weighted(raw, quality[0]))
    return _over_folds(np.where(choices.exists[None], np.stack(each), np.nan))


def group_scores(
    predictor: Predictor,
    graph: DenoiserGraph,
    group: Group,
    qualities: Sequence[Sequence[HopQuality]],
    *,
    reference: Codes | None = None,
) -> GroupScores:
    """Scores of all variants of a group at its root, by the hop of the group (at most the network's last).

    With `reference`, one row of codes `[D]`, the rest of the graph stands as there; without, the group is alone.

    Raises:
        InputError: more variants than can be enumerated.
    """
    members, choice, codes = _variants(predictor, graph, group, reference)
    hop = min(group.hop, len(qualities[0]) - 1)
    part = _part(predictor.features, graph, group, hop, is_alone=reference is None)
    each = []
    for fold, quality in zip(predictor.folds, qualities, strict=True):
        each.append(_weighted(_root_scores(fold, predictor.features, part, codes, hop), quality[hop]))
    block = graph.layer_index[group.layers[0]].block
    return GroupScores(group.name, block, hop, members, choice, _over_folds(np.stack(each)))


def group_contributions(predictor: Predictor, graph: DenoiserGraph, group: Group, reference: Codes) -> GroupNoise:
    """What all variants of a group add to the noise by the last hop, the rest of the graph as in `reference` `[D]`.

    Raises:
        InputError: a predictor of the preset `paper`, more variants than can be enumerated.
    """
    if not all(isinstance(fold.network, NoiseNetwork) for fold in predictor.folds):
        raise InputError("the preset 'paper' has scores, not noise: use its variant table")
    members, choice, codes = _variants(predictor, graph, group, reference)
    hop = predictor.options.n_hops
    part = _part(predictor.features, graph, group, hop)
    each = [np.exp(-_root_scores(fold, predictor.features, part, codes, hop)) for fold in predictor.folds]
    return GroupNoise(group.name, members, choice, np.stack(each))


def disjoint_groups(predictor: Predictor, graph: DenoiserGraph, groups: Iterable[Group]) -> tuple[Group, ...]:
    """The groups, each without the layers whose decision an earlier one has: tied layers are varied once."""
    taken: set[int] = set()
    found = []
    for group in groups:
        decisions = dict(zip(group.layers, _decisions_of_layers(predictor, graph, group), strict=True))
        layers = tuple(layer for layer, decision in decisions.items() if decision not in taken)
        taken |= set(decisions.values())
        if layers:
            found.append(group if layers == group.layers else replace(group, layers=layers))
    return tuple(found)


def most_common(codes: Codes, quality: Values, *, share: float = 0.25) -> Codes:
    """The option that each decision takes most often among the best `share` of recipes `[T, D]`, `[D]`."""
    best = np.argsort(-quality)[: max(1, round(share * len(quality)))]
    return np.array([np.bincount(column).argmax() for column in codes[best].T], dtype=np.int64)


def distributions(
    predictor: Predictor, background: Background, data: TrainingSet
) -> tuple[ScoresByName, ScoresByName, tuple[str, ...]]:
    """Scores of options by operation, scores of group variants by block, and notes about hops without worth."""
    graph = background.graph
    qualities = hop_qualities(predictor, graph, data.codes)
    options = option_scores(predictor, qualities).mean
    operations: ScoresByName = {}
    for row, decision in zip(options, background.space.decisions, strict=True):
        operations.setdefault(decision.operation, []).extend(row[np.isfinite(row)].tolist())
    blocks: ScoresByName = {}
    reference, agreed = most_common(data.codes, data.quality), list[float]()
    for group in disjoint_groups(predictor, graph, background.groups):
        found = group_scores(predictor, graph, group, qualities, reference=reference)
        alone = group_scores(predictor, graph, group, qualities)
        agreed.append(_rank_correlation(found.scores.mean, alone.scores.mean))
        blocks.setdefault(found.block or "outside blocks", []).extend(found.scores.mean.tolist())
    useless = [
        f"hop {hop} of fold {fold} ranked its test recipes no better than chance ({q.srcc:+.2f}) and has no weight"
        for fold, row in enumerate(qualities)
        for hop, q in enumerate(row)
        if q.srcc <= 0
    ]
    least = min(agreed, default=1.0)
    compared = f"scores of group variants in isolation and in context agree: least rank correlation {least:.3f}"
    return operations, blocks, (compared, *useless)


def _rank_correlation(first: Values, second: Values) -> float:
    return 1.0 if np.ptp(first) == 0 or np.ptp(second) == 0 else float(stats.spearmanr(first, second).statistic)


@dataclass(frozen=True)
class _Part:
    """A part of the graph: `nodes` in order, edges between them by place, the places of the root and of the layers."""

    nodes: npt.NDArray[np.int64]
    edges: tuple[tuple[int, int], ...]
    root: int
    layers: tuple[int, ...]


def _part(features: GraphFeatures, graph: DenoiserGraph, group: Group, hop: int, *, is_alone: bool = False) -> _Part:
    place = {node.name: i for i, node in enumerate(graph.nodes)}
    root, members = place[group.root], [place[name] for name in group.layers]
    upstream = edge = {root, *members}
    for _ in range(hop):
        edge = {a for a, b in graph.edges if b in edge}
        upstream = upstream | edge
    if is_alone:
        upstream = {n for n in upstream if n in members or features.decision[n] < 0} | {root}
    nodes = sorted(upstream)
    local = {n: i for i, n in enumerate(nodes)}
    edges = tuple((local[a], local[b]) for a, b in graph.edges if a in local and b in local)
    return _Part(np.array(nodes), edges, local[root], tuple(local[n] for n in members))


def _decisions_of_layers(predictor: Predictor, graph: DenoiserGraph, group: Group) -> tuple[int, ...]:
    place = {node.name: i for i, node in enumerate(graph.nodes)}
    return tuple(int(predictor.features.decision[place[layer]]) for layer in group.layers)


def _variants(
    predictor: Predictor, graph: DenoiserGraph, group: Group, reference: Codes | None
) -> tuple[tuple[int, ...], Codes, Codes]:
    """A group's decisions, their options in every variant `[V, w]`, and the whole recipes `[V, D]`."""
    members = tuple(dict.fromkeys(_decisions_of_layers(predictor, graph, group)))
    choice = enumerate_variants([predictor.choices.space.decisions[d] for d in members]).astype(np.int64)
    base = np.zeros(predictor.choices.n_decisions, dtype=np.int64) if reference is None else reference
    codes = np.repeat(base[None], len(choice), axis=0)
    codes[:, list(members)] = choice
    return members, choice, codes


def _over_folds(each: Values) -> Scores:
    return Scores(each.mean(axis=0), each.std(axis=0, ddof=1))


def _weighted(raw: Values, quality: HopQuality) -> Values:
    """Standardised and weighted; what costs nothing at all (fp16) stands five deviations above the mean."""
    standard: Values = np.minimum((raw - quality.mean) / quality.deviation, _HIGHEST)
    return standard * max(quality.srcc, 0.0)


@torch.no_grad()
def _table(network: Network, features: GraphFeatures) -> torch.Tensor:
    """Hop 0 of every row, `[R, C]`."""
    network.eval()
    found: torch.Tensor = network.embedding(torch.ones(features.n_rows))
    return found


@torch.no_grad()
def _whole(network: Network, features: GraphFeatures, codes: Codes) -> tuple[torch.Tensor, ...]:
    network.eval()
    found: tuple[torch.Tensor, ...] = network(network_input(features, codes)).embeddings
    return found


@torch.no_grad()
def _node_scores(
    network: Network, features: GraphFeatures, embeddings: Sequence[torch.Tensor], codes: Codes
) -> tuple[Values, ...]:
    """Score of each node per hop, `[G, N]`."""
    rows = torch.from_numpy(features.rows(codes))
    return tuple(_scores_of(network, h, rows, hop) for hop, h in enumerate(embeddings))


@torch.no_grad()
def _scores_of(network: Network, h: torch.Tensor, rows: torch.Tensor, hop: int) -> Values:
    """Scores of nodes `[G, n]` from their embeddings `[G, n, C]` and rows."""
    if isinstance(network, PaperNetwork):
        norms: Values = h.abs().sum(dim=2).double().numpy()
        return norms
    found: Values = (-network.log_contributions(rows, h, hop)).double().numpy()
    return found


def _row_scores(network: Network, features: GraphFeatures) -> Values:
    rows = torch.arange(features.n_rows)[None]
    found: Values = _scores_of(network, _table(network, features)[rows], rows, 0)[0]
    return found


@torch.no_grad()
def _root_scores(fold: FoldModel, features: GraphFeatures, part: _Part, codes: Codes, hop: int) -> Values:
    """Score of every variant `[V]`: the norm of the root's embedding, or what the group's layers add to the noise."""
    network = fold.network
    table = _table(network, features)
    layers = _on(network, part, hop)
    size = max(1, _VARIANT_ROWS // len(part.nodes))
    found = []
    for first in range(0, len(codes), size):
        rows = torch.from_numpy(features.rows(codes[first : first + size])[:, part.nodes])
        h = table[rows]
        for attention, norm in layers:
            h = one_hop(attention, norm, h)
        found.append(_part_scores(network, h, rows, part, hop))
    return np.concatenate(found)


def _part_scores(network: Network, h: torch.Tensor, rows: torch.Tensor, part: _Part, hop: int) -> Values:
    scores = _scores_of(network, h, rows, hop)
    if isinstance(network, PaperNetwork):
        return np.asarray(scores[:, part.root])
    with np.errstate(divide="ignore"):  # all layers at fp16 add nothing
        found: Values = -np.log(np.exp(-scores[:, list(part.layers)]).sum(axis=1))
    return found


def _on(network: Network, part: _Part, hop: int) -> list[tuple[SharedGATv2, torch.nn.Module]]:
    """The network's first layers, on a part of the graph."""
    topology = make_topology(len(part.nodes), part.edges)
    found = []
    for attention, norm in list(zip(network.hops.attentions, network.hops.norms, strict=True))[:hop]:
        state = attention.state_dict()
        layer = SharedGATv2(state["projection.weight"].shape[1], len(state["attention"]), topology)
        layer.load_state_dict(state)
        found.append((layer, norm))
    return found
