"""The denoiser as a directed acyclic graph of weight layers and combine operations: records only.

How a graph is found is the business of `trace.py`; this module holds what was found, checks it, and knows
nothing of torch.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Literal

from sedimo.codec import content_key, to_plain
from sedimo.errors import InputError, StateError

NodeKind = Literal["layer", "add", "concat", "modulate", "attention"]
LayerType = Literal["Linear", "Conv1d", "Conv2d", "Conv3d"]


@dataclass(frozen=True, slots=True)
class Node:
    """One vertex: a weight layer (`kind == "layer"`) or an operation that combines two or more inputs.

    `name` is a layer's dotted module path, or a path-like unique name; `operation` the path without its indices
    (`transformer_blocks.attn1.to_q`); `block` the path of the repeated container around it (`transformer_blocks.3`), or
    "". `macs` are multiply-accumulates of one sample in one denoiser call [MACs]. What follows is for layers only:
    `shape` is `[out, in, ...]`; `streams` are the numbers of input channels, in order, of the streams that the input
    is a concatenation of, empty for one stream.
    """

    name: str
    kind: NodeKind
    operation: str
    block: str
    macs: int
    layer_type: LayerType | None = None
    shape: tuple[int, ...] = ()
    streams: tuple[int, ...] = ()

    def __plain__(self) -> dict[str, object]:
        """A layer of one stream is written as before there were streams: graphs without any keep their keys."""
        return {f.name: to_plain(getattr(self, f.name)) for f in fields(self) if f.name != "streams" or self.streams}

    @property
    def params(self) -> int:
        """Number of weights of a layer; 0 for a combine operation."""
        return math.prod(self.shape) if self.shape else 0


@dataclass(frozen=True, slots=True)
class Stream:
    """The input channels `start` to `stop` (exclusive) of the `n_inputs` that a layer has."""

    start: int
    stop: int
    n_inputs: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= self.n_inputs or self.width == self.n_inputs:
            raise InputError(f"a stream must be a part of the {self.n_inputs} inputs, got {self.start}..{self.stop}")

    @property
    def width(self) -> int:
        """Number of its input channels."""
        return self.stop - self.start

    def named(self, layer: str) -> str:
        """How it is called as an input of a layer: `up_blocks.0.resnets.0.conv1[0:96]`."""
        return f"{layer}[{self.start}:{self.stop}]"


@dataclass(frozen=True, slots=True)
class Group:
    """A connected set of layers whose variants are enumerated together ("block level" in Qua2SeDiMo).

    `kind` is `self_attention`, `cross_attention`, `feed_forward`, `residual`, `embedding` or `other`; `root` is its
    last node, `hop` the longest path from a member to the root.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    root: str
    hop: int


@dataclass(frozen=True)
class DenoiserGraph:
    """All vertices of a network (a class name) in topological order, edges as pairs of their positions, and groups.

    `ties` lists the sets of layers that share one weight or hold equal values; each is one decision.
    """

    denoiser: str
    nodes: tuple[Node, ...]
    edges: tuple[tuple[int, int], ...]
    groups: tuple[Group, ...]
    ties: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts, place = Counter(node.name for node in self.nodes), f"graph of {self.denoiser}"
        if twice := sorted(name for name, n in counts.items() if n > 1):
            raise StateError(f"{place}: node names must be unique, found twice: {twice[:5]}")
        for source, target in self.edges:
            if not 0 <= source < target < len(self.nodes):
                raise StateError(f"{place}: edges must go forward between existing nodes, got {(source, target)}")
        for node in self.nodes:
            if node.streams and (len(node.streams) < 2 or min(node.streams) < 1 or sum(node.streams) != node.shape[1]):
                raise StateError(
                    f"{place}: the streams of {node.name!r} must be two or more and make up the input "
                    f"channels of its weight of shape {node.shape}, got {node.streams}"
                )
        for name, members in [*((g.name, g.layers) for g in self.groups), *((t[0], t) for t in self.ties if t)]:
            unknown = set(members) - self.layer_index.keys()
            if unknown or not members:
                raise StateError(f"{place}: group or tie {name!r} names unknown layers {unknown}")

    @cached_property
    def layer_index(self) -> Mapping[str, Node]:
        """Layer nodes by name, in topological order."""
        return {node.name: node for node in self.nodes if node.kind == "layer"}

    @property
    def layers(self) -> tuple[Node, ...]:
        """The weight layers in topological order."""
        return tuple(self.layer_index.values())

    def streams_of(self, layers: Sequence[str]) -> tuple[Stream, ...]:
        """The streams that all of some layers read, in order; none if they read different ones."""
        first, *others = (self.layer_index[name].streams for name in layers)
        if any(other != first for other in others):
            return ()
        edges = [0, *itertools.accumulate(first)]
        return tuple(Stream(start, stop, edges[-1]) for start, stop in itertools.pairwise(edges))

    @property
    def params(self) -> int:
        """Number of Linear and Conv weights, tied ones counted once."""
        repeated = {name for tie in self.ties for name in tie[1:]}
        return sum(node.params for node in self.layers if node.name not in repeated)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample in one denoiser call [MACs]."""
        return sum(node.macs for node in self.nodes)

    @property
    def attention_macs(self) -> int:
        """Those of them in the products of attention, which belong to no layer [MACs]."""
        return sum(node.macs for node in self.nodes if node.kind != "layer")

    @cached_property
    def digest(self) -> str:
        """Content key of the graph; streams do not count, for they follow from the same program."""
        return content_key(replace(self, nodes=tuple(replace(node, streams=()) for node in self.nodes)))


def first_layers(graph: DenoiserGraph) -> tuple[str, ...]:
    """Names of the layers that read the latents, by what the graph shows and not by names.

    A layer is first if none comes before it and it is computed at as many positions as the last ones: it reads the
    latents, where the first layers of timestep, class and text read something with fewer positions. (Positions are
    multiply-accumulates per weight: pixels, patches or tokens.) Where none is, those of most positions. Such as
    `conv_in` of a U-Net, `pos_embed.proj` of a DiT.
    """
    positions = {node.name: node.macs // node.params for node in graph.layers if node.macs}
    opening = _without(graph, sorted((target, source) for source, target in graph.edges))
    wanted = {positions[name] for name in last_layers(graph)}
    if wanted.isdisjoint(positions[name] for name in opening):
        wanted = {max((positions[name] for name in opening), default=0)}
    return tuple(name for name in opening if positions[name] in wanted)


def last_layers(graph: DenoiserGraph) -> tuple[str, ...]:
    """Names of the layers that no other comes after, such as `conv_out` of a U-Net, `proj_out_2` of a DiT."""
    return _without(graph, sorted(graph.edges, reverse=True))


def _without(graph: DenoiserGraph, links: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """The used layers that no used layer is linked to, by links (node, neighbour), neighbours' own ones before."""
    is_used, linked = [node.kind == "layer" and node.macs > 0 for node in graph.nodes], set[int]()
    for node, neighbour in links:
        if neighbour in linked or is_used[neighbour]:
            linked.add(node)
    return tuple(node.name for i, node in enumerate(graph.nodes) if is_used[i] and i not in linked)


def inspect_summary(graph: DenoiserGraph, formats: Mapping[str, str] | None = None) -> dict[str, object]:
    """Counts, sizes and layers of a graph in the words of `sedimo inspect`, ready for JSON; scripts rely on the names.

    `n_decisions` counts layers with equal weights once, and each stream of a layer that reads several. With `formats`
    of quantized layers by name, each layer has its `format`.
    """
    tied = {name: tie for tie in graph.ties for name in tie}
    owners = [layers for node in graph.layers if (layers := tied.get(node.name, (node.name,)))[0] == node.name]
    return {
        "denoiser": graph.denoiser,
        "n_layers": len(graph.layers),
        "n_decisions": sum(max(1, len(graph.streams_of(layers))) for layers in owners),
        "n_nodes": len(graph.nodes),
        "n_edges": len(graph.edges),
        "n_groups": len(graph.groups),
        "params": graph.params,
        "macs": graph.macs,
        "digest": graph.digest,
        "notes": list(graph.notes),
        "groups": to_plain(graph.groups),
        "layers": [
            {
                "name": node.name,
                "type": node.layer_type,
                "operation": node.operation,
                "block": node.block,
                "shape": list(node.shape),
                "params": node.params,
                "macs": node.macs,
                **({"streams": list(node.streams)} if node.streams else {}),
                **({"format": formats.get(node.name, "fp16")} if formats else {}),
            }
            for node in graph.layers
        ],
    }
