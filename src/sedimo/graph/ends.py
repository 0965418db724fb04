"""The first and the last layers of a denoiser, which papers treat apart, by what the graph shows and not by names.

A layer is last if no other layer comes after it. It is first if none comes before it and it is computed at as many
positions as the last ones: it reads the latents, where the first layers of timestep, class and text read something
with fewer positions. (Positions are multiply-accumulates per weight: pixels, patches or tokens.)
"""

from __future__ import annotations

from sedimo.graph.model import DenoiserGraph, Node


def first_layers(graph: DenoiserGraph) -> tuple[str, ...]:
    """Names of the layers that read the latents; where none is computed as often as the last, those of most positions.

    Example:
        `conv_in` of a U-Net, `pos_embed.proj` of a DiT.
    """
    fed: set[int] = set()
    for source, target in sorted(graph.edges, key=lambda edge: edge[1]):
        if source in fed or _is_used(graph.nodes[source]):
            fed.add(target)
    opening = [node for i, node in enumerate(graph.nodes) if _is_used(node) and i not in fed]
    wanted = {_positions(graph.layer_index[name]) for name in last_layers(graph)}
    if not any(_positions(node) in wanted for node in opening):
        wanted = {max((_positions(node) for node in opening), default=0)}
    return tuple(node.name for node in opening if _positions(node) in wanted)


def last_layers(graph: DenoiserGraph) -> tuple[str, ...]:
    """Names of the layers that the output is made of directly.

    Example:
        `conv_out` of a U-Net, `proj_out_2` of a DiT.
    """
    feeding: set[int] = set()
    for source, target in sorted(graph.edges, key=lambda edge: -edge[0]):
        if target in feeding or _is_used(graph.nodes[target]):
            feeding.add(source)
    return tuple(node.name for i, node in enumerate(graph.nodes) if _is_used(node) and i not in feeding)


def _is_used(node: Node) -> bool:
    return node.kind == "layer" and node.macs > 0


def _positions(node: Node) -> int:
    return node.macs // node.params
