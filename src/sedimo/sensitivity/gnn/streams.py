"""A graph with a node for every decision: what predictors that embed nodes read.

A layer with a decision for each stream of its input becomes as many nodes, each with the edges of the layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sedimo.graph.model import DenoiserGraph, Node, Stream
from sedimo.space import Decision, SearchSpace


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
