"""What the graph network sees: nodes, one for every decision, their edges, and of each node method, bits, size, error.

All of it depends on the node and its option alone, and all recipes share the nodes. So features are a table with one
row for each (node, option), and a recipe is a list of rows. A layer with a decision for each stream of its input
becomes as many nodes, each with the edges of the layer.

Source:
    Mills et al. 2024, Qua2SeDiMo (arXiv 2412.14628), node features of the released code; here for any set of formats
    and any graph, with relative weight errors, which compare between methods.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from sedimo.bank import Candidate
from sedimo.errors import InputError
from sedimo.graph.model import DenoiserGraph, Node, Stream
from sedimo.methods.predictor.choices import Choices, Codes
from sedimo.quant.formats import FP16, Format
from sedimo.space import Decision, SearchSpace

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
COMBINE = "combine"  # the method of a node without a weight


@dataclass(frozen=True, slots=True, eq=False)
class Topology:
    """Edges with a self-loop at every node, sorted by target; `make_topology` makes it.

    The incoming edges of node t come from `sources[starts[t] : starts[t + 1]]`.
    """

    starts: npt.NDArray[np.int32]  # [N + 1]
    sources: npt.NDArray[np.int32]  # [E]

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return len(self.starts) - 1

    @property
    def n_edges(self) -> int:
        """Number of edges, self-loops included."""
        return len(self.sources)

    @property
    def targets(self) -> npt.NDArray[np.int32]:
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


@dataclass(frozen=True)
class GraphFeatures:
    """Rows of all nodes: row `first_row[n] + k` is option k of node n, in the order of the graph's nodes.

    `method`, `bits`, `operation` and `block` `[R]` are indices into the lists of names; `size` is 100 times full
    bytes per quantized bytes, `error` the relative weight error, both `[R]` and 0 for a node without a weight.
    `decision` `[N]` is the decision that a node's option is, -1 without a weight. `roots` holds for each hop the
    nodes `[N]` that are the root of a group of so many hops; for hop 0 all layers, and all nodes where there is no
    such group.
    """

    topology: Topology
    first_row: Indices
    decision: Indices
    method: Indices
    bits: Indices
    operation: Indices
    block: Indices
    size: Floats
    error: Floats
    roots: tuple[npt.NDArray[np.bool_], ...]
    names: Mapping[str, tuple[str, ...]]

    @property
    def n_nodes(self) -> int:
        """N."""
        return len(self.first_row)

    @property
    def n_rows(self) -> int:
        """R."""
        return len(self.method)

    def rows(self, codes: Codes) -> Indices:
        """The rows of recipes `[T, D]`, `[T, N]`."""
        options = np.where(self.decision >= 0, codes[:, np.maximum(self.decision, 0)], 0)
        found: Indices = self.first_row[None] + options
        return found

    def row_options(self, n_decisions: int, n_options: int) -> Indices:
        """The row of each option of each decision, `[D, K]`, of its first node; padding gives row 0."""
        found = np.zeros((n_decisions, n_options), dtype=np.int64)
        for node in reversed(range(self.n_nodes)):
            if self.decision[node] >= 0:
                end = self.first_row[node + 1] if node + 1 < self.n_nodes else self.n_rows
                options = np.arange(end - self.first_row[node])
                found[self.decision[node], options] = self.first_row[node] + options
        return found


def graph_features(
    graph: DenoiserGraph, choices: Choices, candidates: Mapping[tuple[str, Format], Candidate], *, n_hops: int = 4
) -> GraphFeatures:
    """The features of all nodes of a graph (see `split_streams`) under all options of a space.

    Raises:
        InputError: the space is of another graph.
    """
    decision_of = {name: i for i, d in enumerate(choices.space.decisions) for name in node_names(d)}
    if set(decision_of) != set(graph.layer_index):
        raise InputError(f"the space of {choices.space.denoiser} is not of this graph of {graph.denoiser}")
    options = [_options(choices, decision_of.get(node.name)) for node in graph.nodes]
    n_rows = np.array([len(row) for row in options])
    flat = [number_format for row in options for number_format in row]
    rows = [(decision_of.get(node.name), f) for node, row in zip(graph.nodes, options, strict=True) for f in row]
    errors = [_error(choices, candidates, decision, f) for decision, f in rows]
    sizes = [_size(choices, decision, f) for decision, f in rows]
    method, methods = _numbered([_method(f) for f in flat])
    bits, widths = _numbered([COMBINE if f is None else str(f.bits) for f in flat])
    operation, operations = _numbered([node.operation for node in graph.nodes])
    block, blocks = _numbered(["", *(node.block for node in graph.nodes)])
    return GraphFeatures(
        topology=make_topology(len(graph.nodes), graph.edges),
        first_row=np.cumsum([0, *n_rows[:-1]]),
        decision=np.array([decision_of.get(node.name, -1) for node in graph.nodes]),
        method=method,
        bits=bits,
        operation=np.repeat(operation, n_rows),
        block=np.repeat(block[1:], n_rows),
        size=np.array(sizes, dtype=np.float32),
        error=np.array(errors, dtype=np.float32),
        roots=tuple(_roots(graph, hop) for hop in range(n_hops + 1)),
        names={"method": methods, "bits": widths, "operation": operations, "block": blocks},
    )


def _options(choices: Choices, decision: int | None) -> tuple[Format | None, ...]:
    return (None,) if decision is None else choices.space.decisions[decision].formats


def _method(number_format: Format | None) -> str:
    if number_format is None:
        return COMBINE
    return f"{number_format.family} g{number_format.group_size}" if number_format.group_size else number_format.family


def _size(choices: Choices, decision: int | None, number_format: Format | None) -> float:
    if decision is None or number_format is None:
        return 0.0
    found = choices.space.decisions[decision]
    return 100 * found.paper_bytes(FP16) / found.paper_bytes(number_format)


def _error(
    choices: Choices,
    candidates: Mapping[tuple[str, Format], Candidate],
    decision: int | None,
    number_format: Format | None,
) -> float:
    if decision is None or number_format is None:
        return 0.0
    return candidates[choices.space.decisions[decision].name, number_format].error


def _numbered(names: Sequence[str]) -> tuple[Indices, tuple[str, ...]]:
    known = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([known[name] for name in names], dtype=np.int64), tuple(known)


def _roots(graph: DenoiserGraph, hop: int) -> npt.NDArray[np.bool_]:
    if hop == 0:
        return np.array([node.kind == "layer" for node in graph.nodes])
    roots = {group.root for group in graph.groups if group.hop == hop}
    return np.array([not roots or node.name in roots for node in graph.nodes])


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
        ties=tuple(tied for tie in graph.ties for tied in _ties_of(tie, names)),
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


def _ties_of(tie: Sequence[str], names: Mapping[str, Sequence[str]]) -> list[tuple[str, ...]]:
    """The tie, or one for each stream: layers of a tie have the same ones."""
    return list(zip(*(names[layer] for layer in tie), strict=True))
