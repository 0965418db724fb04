"""Recipes as numbers: options for all predictors, and rows of node features for graph networks.

A recipe is which of its formats each decision takes. What the graph network sees are nodes, one for every decision,
their edges, and of each node method, bits, size, error. All of it depends on the node and its option alone, and all
recipes share the nodes. So features are a table with one row for each (node, option), and a recipe is a list of rows. A
layer with a decision for each stream of its input becomes as many nodes, each with the edges of the layer.

Source:
    Mills et al. 2024, Qua2SeDiMo (arXiv 2412.14628), node features of the released code; here for any set of formats
    and any graph, with relative weight errors, which compare between methods.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from sedimo.allocation.table import SensitivityTable
from sedimo.bank import Candidate
from sedimo.errors import InputError
from sedimo.graph.model import DenoiserGraph, Group, Node, Stream
from sedimo.quant.formats import FP16, Format
from sedimo.quant.parts import entry_text
from sedimo.space import Decision, Recipe, SearchSpace

Codes = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
Candidates = Mapping[tuple[str, Format], Candidate]
COMBINE = "combine"  # the method of a node without a weight


@dataclass(frozen=True)
class Choices:
    """The options of a space, numbered: option k of decision d is `space.decisions[d].formats[k]`.

    Arrays over options are `[D, K]` with K the largest number of options; what is beyond a decision's own is padding.
    """

    space: SearchSpace

    @cached_property
    def n_options(self) -> int:
        """K."""
        return max(len(d.formats) for d in self.space.decisions)

    @cached_property
    def exists(self) -> npt.NDArray[np.bool_]:
        """Whether there is such an option, `[D, K]`."""
        return self.array(lambda _decision, _format: 1.0) > 0

    @cached_property
    def places(self) -> Mapping[tuple[str, Format | None], tuple[int, int]]:
        """D and k of each option, by the names of decision and format."""
        return {(d.name, f): (i, k) for i, d in enumerate(self.space.decisions) for k, f in enumerate(d.formats)}

    def codes(self, recipes: Iterable[Recipe]) -> Codes:
        """The option of each decision under each recipe, `[T, D]`."""

        def option(recipe: Recipe, decision: Decision) -> int:
            place = self.places.get((decision.name, recipe.format_of(decision.layers[0], decision.stream)))
            if place is None:
                entry = entry_text(recipe.layers.get(decision.layers[0], FP16))
                raise InputError(f"{decision.name} cannot take {entry} in this space; the recipe is of another")
            return place[1]

        rows = [[option(recipe, decision) for decision in self.space.decisions] for recipe in recipes]
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(self.space.decisions))

    def choice(self, codes: Sequence[int] | Codes) -> dict[str, Format]:
        """The format of each decision under one row of codes `[D]`."""
        return {d.name: d.formats[int(k)] for d, k in zip(self.space.decisions, codes, strict=True)}

    def recipe(self, codes: Sequence[int] | Codes) -> Recipe:
        """The recipe of one row of codes `[D]`."""
        return self.space.recipe(self.choice(codes))

    def array(self, value: Callable[[Decision, Format], float], padding: float = 0.0) -> Values:
        """A number for every option, `[D, K]`."""
        found = np.full((len(self.space.decisions), self.n_options), padding)
        for i, decision in enumerate(self.space.decisions):
            found[i, : len(decision.formats)] = [value(decision, f) for f in decision.formats]
        return found

    def costs(self, table: SensitivityTable) -> Values:
        """The costs of a table, `[D, K]`; 0 where there is no option."""

        def cost(decision: Decision, number_format: Format) -> float:
            found = table.index.get((decision.name, number_format))
            if found is None:
                raise InputError(f"the {table.method} table has no cost for {decision.name} at {number_format}")
            return found.cost

        return self.array(cost)

    @cached_property
    def paper_bytes(self) -> Values:
        """Bytes of each option in the papers' accounting, `[D, K]` [bytes]."""
        return self.array(lambda d, f: d.paper_bytes(f))

    def paper_bits(self, codes: Codes) -> Values:
        """Average paper bits of recipes `[T, D]`, `[T]`."""
        return np.asarray(8 * picked(self.paper_bytes, codes).sum(axis=1) / self.space.params)


def picked(values: Values, codes: Codes) -> Values:
    """Of values over options `[D, K]` those that recipes `[T, D]` take, `[T, D]`."""
    return np.asarray(values[np.arange(values.shape[0])[None], codes])


@dataclass(frozen=True, slots=True, eq=False)
class Topology:
    """Edges with a self-loop at every node, sorted by target; `make_topology` makes it.

    The incoming edges of node t come from `sources[starts[t] : starts[t + 1]]`.
    """

    starts: npt.NDArray[np.int32]  # [N + 1]
    sources: npt.NDArray[np.int32]  # [E]

    @property
    def n_nodes(self) -> int:
        """N."""
        return len(self.starts) - 1

    @property
    def targets(self) -> npt.NDArray[np.int32]:
        """The target of each edge, in ascending order."""
        return np.repeat(np.arange(self.n_nodes, dtype=np.int32), np.diff(self.starts))


def make_topology(n_nodes: int, edges: Iterable[tuple[int, int]]) -> Topology:
    """The topology of a graph from its edges (source, target); every node gets one self-loop, given or not."""
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


@dataclass(frozen=True)
class GraphFeatures:
    """Rows of all nodes of a graph: row `first_row[n] + k` is option k of node n.

    `roots` holds for each hop the nodes that are the root of a group of so many hops; for hop 0 all layers, and all
    nodes where there is no such group.
    """

    graph: DenoiserGraph
    topology: Topology
    first_row: Codes  # [N]
    decision: Codes  # that a node's option is, -1 without a weight [N]
    codes: Mapping[str, Codes]  # method, bits, operation and block, as indices into the lists of names, [R] each
    names: Mapping[str, tuple[str, ...]]
    size: Floats  # 100 times full bytes per quantized bytes, 0 without a weight [R]
    error: Floats  # relative weight error, 0 without a weight [R]
    roots: tuple[npt.NDArray[np.bool_], ...]  # [N] each

    @cached_property
    def place(self) -> Mapping[str, int]:
        """The number of each node."""
        return {node.name: i for i, node in enumerate(self.graph.nodes)}

    @property
    def first_nodes(self) -> Codes:
        """The first node of each decision, `[D]`."""
        decisions, nodes = np.unique(self.decision, return_index=True)
        return nodes[decisions >= 0]

    def rows(self, codes: Codes) -> Codes:
        """The rows of recipes `[T, D]`, `[T, N]`."""
        options = np.where(self.decision >= 0, codes[:, np.maximum(self.decision, 0)], 0)
        return np.asarray(self.first_row[None] + options)

    def row_options(self, n_options: int) -> Codes:
        """The row of each option of each decision, `[D, K]`, of its first node; padding gives some other row."""
        rows: Codes = self.first_row[self.first_nodes][:, None] + np.arange(n_options)
        return np.minimum(rows, len(self.size) - 1)


def graph_features(graph: DenoiserGraph, choices: Choices, candidates: Candidates, *, n_hops: int = 4) -> GraphFeatures:
    """The features of all nodes of a graph (see `split_streams`) under all options of a space."""
    decision_of = {name: i for i, d in enumerate(choices.space.decisions) for name in node_names(d)}
    if set(decision_of) != set(graph.layer_index):
        raise InputError(f"the space of {choices.space.denoiser} is not of this graph of {graph.denoiser}")
    first_row: list[int] = []
    rows: list[tuple[str, str, str, str, float, float]] = []
    for node in graph.nodes:
        first_row.append(len(rows))
        if node.name not in decision_of:
            rows.append((COMBINE, COMBINE, node.operation, node.block, 0.0, 0.0))
            continue
        d = choices.space.decisions[decision_of[node.name]]
        for f in d.formats:
            method = f"{f.family} g{f.group_size}" if f.group_size else f.family
            size, error = 100 * d.paper_bytes(FP16) / d.paper_bytes(f), candidates[d.name, f].error
            rows.append((method, str(f.bits), node.operation, node.block, size, error))
    *columns, sizes, errors = zip(*rows, strict=True)
    words = dict(zip(("method", "bits", "operation", "block"), columns, strict=True))
    names = {kind: tuple(dict.fromkeys(("", *column) if kind == "block" else column)) for kind, column in words.items()}
    roots = [[node.kind == "layer" for node in graph.nodes]]
    for hop in range(1, n_hops + 1):
        of_groups = {group.root for group in graph.groups if group.hop == hop}
        roots.append([not of_groups or node.name in of_groups for node in graph.nodes])
    return GraphFeatures(
        graph=graph,
        topology=make_topology(len(graph.nodes), graph.edges),
        first_row=np.array(first_row),
        decision=np.array([decision_of.get(node.name, -1) for node in graph.nodes]),
        codes={kind: np.array([names[kind].index(word) for word in column]) for kind, column in words.items()},
        names=names,
        size=np.array(sizes, dtype=np.float32),
        error=np.array(errors, dtype=np.float32),
        roots=tuple(map(np.array, roots)),
    )


def disjoint_groups(space: SearchSpace, groups: Iterable[Group]) -> tuple[Group, ...]:
    """The groups, each without the layers whose decision an earlier one has: tied layers are varied once."""
    decision_of = {name: d.name for d in space.decisions for name in node_names(d)}
    taken: set[str] = set()
    found = []
    for group in groups:
        layers = tuple(layer for layer in group.layers if decision_of[layer] not in taken)
        taken |= {decision_of[layer] for layer in layers}
        if layers:
            found.append(replace(group, layers=layers))
    return tuple(found)


def node_names(decision: Decision) -> tuple[str, ...]:
    """The nodes of a decision in such a graph: its layers, or the stream of each of them."""
    stream = decision.stream
    return decision.layers if stream is None else tuple(stream.named(layer) for layer in decision.layers)


def split_streams(graph: DenoiserGraph, space: SearchSpace) -> DenoiserGraph:
    """The graph with a node for each stream that a space decides about; equal to the graph if there is none.

    Groups and ties speak of the new nodes. A group whose root was such a layer has its last stream as root.
    """
    streams: dict[str, list[Stream]] = {}
    for d in space.decisions:
        if d.stream is not None:
            for layer in d.layers:
                streams.setdefault(layer, []).append(d.stream)
    cut = [_nodes_of(node, streams.get(node.name, ())) for node in graph.nodes]
    names = {node.name: [one.name for one in made] for node, made in zip(graph.nodes, cut, strict=True)}
    first = [0, *itertools.accumulate(len(made) for made in cut)]
    ranges = [range(start, stop) for start, stop in itertools.pairwise(first)]
    groups = (
        replace(g, layers=tuple(one for name in g.layers for one in names[name]), root=names[g.root][-1])
        for g in graph.groups
    )
    return replace(
        graph,
        nodes=tuple(itertools.chain.from_iterable(cut)),
        edges=tuple((a, b) for x, y in graph.edges for b in ranges[y] for a in ranges[x]),
        groups=tuple(groups),
        # a tie, or one for each stream: layers of a tie have the same ones
        ties=tuple(tied for tie in graph.ties for tied in zip(*(names[layer] for layer in tie), strict=True)),
    )


def _nodes_of(node: Node, streams: Sequence[Stream]) -> list[Node]:
    parts = [
        replace(
            node,
            name=stream.named(node.name),
            operation=f"{node.operation}[{number}]",
            macs=node.macs * stream.width // stream.n_inputs,
            shape=(node.shape[0], stream.width, *node.shape[2:]),
            streams=(),
        )
        for number, stream in enumerate(streams)
    ]
    return parts or [node]
