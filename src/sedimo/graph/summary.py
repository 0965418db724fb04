"""A graph in the words of `sedimo inspect`: plain values only, with names that scripts rely on."""

from __future__ import annotations

from collections.abc import Mapping

from sedimo.graph.model import DenoiserGraph

_NO_FORMATS: Mapping[str, str] = {}


def inspect_summary(graph: DenoiserGraph, formats: Mapping[str, str] = _NO_FORMATS) -> dict[str, object]:
    """Counts, sizes and layers of a graph, ready for JSON.

    `params` is the number of Linear and Conv weights, shared ones once; `macs` are multiply-accumulates of one
    sample in one denoiser call; `n_decisions` counts layers with equal weights once, and each stream of a layer that
    reads several, which has its `streams` (numbers of input channels). With `formats` of quantized layers by name, each
    layer has its `format`.
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
        "groups": [
            {"name": g.name, "kind": g.kind, "layers": list(g.layers), "root": g.root, "hop": g.hop}
            for g in graph.groups
        ],
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
