"""What the graph network sees of a node: method, bits, size, weight error, and where the node stands.

All of it depends on the node and its option alone, and all recipes share the nodes. So features are a table with one
row for each (node, option), and a recipe is a list of rows.

Source:
    Mills et al. 2024, Qua2SeDiMo (arXiv 2412.14628), node features of the released code; here for any set of formats
    and any graph, with relative weight errors, which compare between methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sedimo.bank import Candidate
from sedimo.errors import InputError
from sedimo.graph.model import DenoiserGraph
from sedimo.quant.formats import FP16, Format
from sedimo.sensitivity.choices import Choices, Codes
from sedimo.sensitivity.gnn.attention import Topology, make_topology
from sedimo.sensitivity.gnn.streams import node_names

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
COMBINE = "combine"  # the method of a node without a weight


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
