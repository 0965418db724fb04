"""Which layers are varied together: attention, feed-forward, residual blocks, embeddings.

Found from the shape of the graph, without a table per architecture:

* attention: the layers that feed an attention node, those that read it, and whatever else its module holds;
* the rest of a block falls into its modules, each cut into connected parts;
* a layer that computes one vector per sample and steers a later layer of its block through an addition or
  modulation (`norm1.linear` of DiT, `norm_out.linear`) joins the group of that layer.

Every layer is in exactly one group, and every group is connected through its own layers and the combine
nodes between them.

Against the groups of Qua2SeDiMo (2024), which were listed by hand for five denoisers: those of DiT and PixArt
are the same (PixArt's cross attention after `split_groups`), except that the patch embedding of DiT stands
alone instead of with the attention of block 0, and that each of DiT's 28 timestep embedders is listed, tied.
In U-Nets, `proj_in` stands alone instead of with the self-attention that follows, and the time and added
embeddings of SDXL are two groups instead of one. The two products of attention are one node, so that a hop
through attention is one shorter, and gates of residuals are edges from the layer that computes them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from sedimo.errors import InputError
from sedimo.graph.model import DenoiserGraph, Group, Node

Edges = Sequence[tuple[int, int]]


def find_groups(nodes: Sequence[Node], edges: Edges) -> tuple[Group, ...]:
    """Groups of a graph in the order of their first layers; each connected, each layer in one."""
    finder = _Finder(nodes, edges)
    finder.take_attention()
    steering = finder.take_units()
    finder.attach_steering(steering)
    return tuple(finder.group(kind, members) for kind, members in sorted(finder.found, key=lambda f: min(f[1])))


def split_groups(graph: DenoiserGraph, *, n_options: int, max_variants: int) -> tuple[Group, ...]:
    """The graph's groups, those with more than `max_variants` combinations of `n_options` cut into smaller ones.

    Attention is cut into what makes its scores (QK) and the rest (V and output), as Qua2SeDiMo does; what is
    then still too large falls into consecutive connected parts.
    """
    if n_options < 1 or max_variants < n_options:
        raise InputError(
            f"max_variants must be at least the number of options per layer: {max_variants=}, {n_options=}"
        )
    finder = _Finder(graph.nodes, graph.edges)
    found: list[Group] = []
    for group in graph.groups:
        members = [finder.position[name] for name in group.layers]
        most = next((n - 1 for n in range(2, len(members) + 1) if n_options**n > max_variants), len(members))
        parts = [members]
        if most < len(members):
            halves = finder.halves_of_attention(members)
            chunks = (half[i : i + most] for half in halves for i in range(0, len(half), most))
            parts = [part for chunk in chunks for part in finder.connected_parts(chunk)]
        found += [group] if len(parts) == 1 else [finder.group(group.kind, part) for part in parts]
    return tuple(found)


class _Finder:
    """Adjacency of a graph and the groups found so far, as sets of positions."""

    def __init__(self, nodes: Sequence[Node], edges: Edges) -> None:
        self.nodes = nodes
        self.position = {node.name: i for i, node in enumerate(nodes)}
        self._is_layer = [node.kind == "layer" for node in nodes]
        self._is_vector = [node.kind == "layer" and node.macs == node.params for node in nodes]  # one for each sample
        self.found: list[tuple[str, list[int]]] = []
        self._taken: dict[int, int] = {}
        self._before: dict[int, list[int]] = {i: [] for i in range(len(nodes))}
        self._after: dict[int, list[int]] = {i: [] for i in range(len(nodes))}
        for source, target in edges:
            self._before[target].append(source)
            self._after[source].append(target)

    def _free(self) -> list[int]:
        return [i for i, is_layer in enumerate(self._is_layer) if is_layer and i not in self._taken]

    def _layers_next_to(self, i: int, neighbours: Mapping[int, Sequence[int]], block: str) -> Iterator[int]:
        """The nearest layers in one direction, through concatenations of the same block."""
        for j in neighbours[i]:
            if self._is_layer[j]:
                yield j
            elif self.nodes[j].kind == "concat" and self.nodes[j].block == block:
                yield from self._layers_next_to(j, neighbours, block)

    def take_attention(self) -> None:
        """One group per attention node."""
        attentions = [i for i, node in enumerate(self.nodes) if node.kind == "attention"]
        inputs = {i: set(self._layers_next_to(i, self._before, self.nodes[i].block)) for i in attentions}
        feeds_attention = set().union(*inputs.values())
        for i in attentions:
            block = self.nodes[i].block
            outputs = {j for j in self._layers_next_to(i, self._after, block) if self.nodes[j].block == block}
            members = inputs[i] | (outputs - feeds_attention) | self._inside(i, attentions)
            origins = [{s for layer in layers for s in self._before[layer]} for layers in self._score_layers(i)]
            is_self = len(origins) < 2 or origins[0] == origins[1]  # queries and keys come from the same streams
            kind = "self_attention" if is_self else "cross_attention"
            for part in self.connected_parts(sorted(members - self._taken.keys())):
                if not inputs[i].isdisjoint(part):
                    self._take(kind, part)

    def _inside(self, attention: int, attentions: Sequence[int]) -> set[int]:
        """All layers of the module that computes the attention, if that is smaller than its block."""
        owner, _, _ = self.nodes[attention].name.rpartition(".")
        inside = {i for i in (*attentions, *self._free()) if self.nodes[i].name.startswith(f"{owner}.")}
        is_apart = inside.isdisjoint(set(attentions) - {attention})
        return inside - {attention} if owner and owner != self.nodes[attention].block and is_apart else set()

    def _score_layers(self, attention: int) -> list[set[int]]:
        """The layers that make the queries, and those that make the keys."""
        block = self.nodes[attention].block
        return [
            {port} if self._is_layer[port] else set(self._layers_next_to(port, self._before, block))
            for port in self._before[attention][:2]
        ]

    def take_units(self) -> dict[int, list[int]]:
        """The rest of each block by module, cut into connected parts; the layers that steer others are left."""
        steering = {i: targets for i in self._free() if (targets := self._steered_layers(i))}
        units: dict[tuple[str, str], list[int]] = defaultdict(list)  # by block and outermost module inside it
        for i in self._free():
            if i not in steering:
                block = self.nodes[i].block
                first, *inside = self.nodes[i].name.removeprefix(f"{block}.").split(".")
                units[block, first if inside else ""].append(i)
        whole: dict[tuple[str, str | None], list[int]] = defaultdict(list)  # single layers of a block go together
        for (block, unit), members in units.items():
            whole[block, unit if len(members) > 1 or not block else None] += members
        for members in whole.values():
            for part in self.connected_parts(members):
                self._take(self._kind(part), part)
        return steering

    def attach_steering(self, steering: Mapping[int, Sequence[int]]) -> None:
        """Steering layers join the group of a layer that they steer, attention before others."""
        for i, targets in sorted(steering.items(), reverse=True):
            homes = [self._taken[t] for t in targets if t in self._taken]
            if homes:
                home = next((h for h in homes if "attention" in self.found[h][0]), homes[0])
                self.found[home][1].append(i)
                self._taken[i] = home
            else:
                self._take(self._kind([i]), [i])

    def _steered_layers(self, i: int) -> list[int]:
        """The layers of the block that read this vector through additions or modulations, in order.

        None where another vector is computed from it: that is an embedding, which steers nothing itself.
        """
        if not self._is_vector[i]:
            return []
        combined = self._combines_from({i}, self._after)
        targets = {k for j in (i, *combined) for k in self._after[j] if self._is_layer[k]}
        if any(self._is_vector[k] or k in self._after[i] for k in targets):
            return []
        return sorted(k for k in targets if self.nodes[k].block == self.nodes[i].block)

    def _kind(self, members: Sequence[int]) -> str:
        own = [i for i in sorted(members) if not self._is_vector[i]]
        before = {j for i in members for j in _reach([i], self._before.__getitem__) if j not in members}
        if not any(self._is_layer[j] for j in before) or (not own and not self.nodes[min(members)].block):
            return "embedding"
        if len(own) > 1:
            first, last = self.nodes[own[0]], self.nodes[own[-1]]
            if first.shape[1] == last.shape[0] and first.shape[0] > first.shape[1]:
                return "feed_forward"
        n_spatial = sum(math.prod(self.nodes[i].shape[2:]) > 1 for i in own)
        return "residual" if n_spatial > 1 else "other"

    def _take(self, kind: str, members: Sequence[int]) -> None:
        new = sorted(i for i in members if i not in self._taken)
        if new:
            self._taken.update(dict.fromkeys(new, len(self.found)))
            self.found.append((kind, new))

    def _neighbourhood(self, members: Iterable[int]) -> dict[int, set[int]]:
        """Members and the combine nodes between them (reached from one and reaching another), with neighbours."""
        members = set(members)
        down = self._combines_from(members, self._after)
        up = self._combines_from(members, self._before)
        inside = members | (down & up) | {j for j in down if len(members & set(self._before[j])) > 1}
        return {i: {j for j in (*self._before[i], *self._after[i]) if j in inside} for i in inside}

    def _combines_from(self, members: set[int], neighbours: Mapping[int, Sequence[int]]) -> set[int]:
        blocks = {self.nodes[i].block for i in members}

        def combines(i: int) -> list[int]:
            return [j for j in neighbours[i] if not self._is_layer[j] and self.nodes[j].block in blocks]

        return _reach((j for i in members for j in combines(i)), combines)

    def connected_parts(self, members: Sequence[int]) -> list[list[int]]:
        """Members that are connected to one another, apart from the others."""
        neighbours = self._neighbourhood(members)
        left, parts = set(members), []
        for start in members:
            if start in left:
                reached = _reach([start], neighbours.__getitem__)
                parts.append(sorted(reached & left))
                left -= reached
        return parts

    def group(self, kind: str, members: Sequence[int]) -> Group:
        """The record of a group: its root is the first node that all members reach, else its last layer."""
        members = sorted(members)
        inside = set(self._neighbourhood(members))
        distance = {root: self._distances(root, inside) for root in sorted(inside)}
        root = next((root for root, found in distance.items() if set(members) <= found.keys()), members[-1])
        hop = max(distance[root].get(i, 0) for i in members)
        names = tuple(self.nodes[i].name for i in members)
        return Group(names[0], kind, names, self.nodes[root].name, hop)

    def _distances(self, root: int, inside: set[int]) -> dict[int, int]:
        """The longest path to the root from every node inside that reaches it."""
        found = {root: 0}
        for i in sorted((j for j in inside if j < root), reverse=True):
            if steps := [found[j] + 1 for j in self._after[i] if j in found]:
                found[i] = max(steps)
        return found

    def halves_of_attention(self, members: Sequence[int]) -> list[list[int]]:
        """Score layers (with what steers them) and the rest of an attention; other groups stay whole."""
        attention = next((i for i in sorted(self._neighbourhood(members)) if self.nodes[i].kind == "attention"), None)
        if attention is None or len(self._before[attention]) < 3:
            return [list(members)]
        score = set().union(*self._score_layers(attention))
        score = {i for i in members if i in score or self._is_vector[i]}
        return [part for part in (sorted(score), [i for i in members if i not in score]) if part]


def _reach(starts: Iterable[int], neighbours: Callable[[int], Iterable[int]]) -> set[int]:
    """The starts and everything that is reached from them."""
    seen = set(starts)
    stack = [*seen]
    while stack:
        new = set(neighbours(stack.pop())) - seen
        seen |= new
        stack += new
    return seen
