"""Compiled kernels of the attention between the nodes of graphs that share one topology.

Each goes through the graphs `graphs[0]` .. `graphs[1] - 1`, one target at a time, and keeps nothing of the size
[edges, channels]: a graph's rows stay in the processor's cache. Graphs write to places of their own, so that threads
never meet and the result does not depend on their number. Compiled when a layer first runs on the CPU.

`edges` are `starts` `[N + 1]` and `sources` `[E]`, the incoming edges of each target. `projected` `[G, N, 2, C]` holds
the rows l (as a source) and r (as a target) of each node. The score of an edge is attention . leaky(l + r + shift);
`weights` `[G, E]` are its softmax among the edges of a target.

Source:
    Brody et al. 2022, How attentive are graph attention networks? (arXiv 2105.14491), equation 7.
"""
# ruff: noqa: ANN001, ANN202 -- numba derives the types from the arrays
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import numpy as np
from numba import njit

# sums may be reordered, which lets them be vectorised; infinities and NaN keep their meaning
_kernel = njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})


@_kernel
def attend(graphs, edges, slope, vectors, projected, weights, out):
    """Fills `weights` and `out` `[G, N, C]`: the sums of l with these weights, plus offset.

    `vectors`: attention, shift, offset.
    """
    starts, sources = edges
    attention, shift, offset = vectors
    zero = slope * 0
    for graph in range(graphs[0], graphs[1]):
        for target in range(starts.shape[0] - 1):
            start, stop = starts[target], starts[target + 1]
            greatest, total = projected.dtype.type(-np.inf), zero
            for edge in range(start, stop):
                source, score = sources[edge], zero
                for c in range(attention.shape[0]):
                    both = projected[graph, source, 0, c] + projected[graph, target, 1, c] + shift[c]
                    score += attention[c] * (both if both > zero else slope * both)
                weights[graph, edge] = score
                greatest = max(greatest, score)
            for edge in range(start, stop):
                weights[graph, edge] = math.exp(weights[graph, edge] - greatest)
                total += weights[graph, edge]
            for c in range(attention.shape[0]):
                out[graph, target, c] = offset[c]
            for edge in range(start, stop):
                source = sources[edge]
                weight = weights[graph, edge] / total
                weights[graph, edge] = weight
                for c in range(attention.shape[0]):
                    out[graph, target, c] += weight * projected[graph, source, 0, c]


@_kernel
def attend_backward(graphs, edges, slope, vectors, rows, weights, changes):
    """Fills d_projected and, in d_vectors `[G, 3, C]`, each graph's gradients of attention, shift and offset.

    `vectors`: attention, shift; `rows`: projected, d_projected; `changes`: d_out `[G, N, C]`, d_vectors.
    """
    starts, sources = edges
    attention, shift = vectors
    projected, d_projected = rows
    d_out, d_vectors = changes
    zero = slope * 0
    d_weights = np.empty(starts.shape[0], dtype=projected.dtype)  # no target has more edges than there are nodes
    for graph in range(graphs[0], graphs[1]):
        d_projected[graph] = zero
        d_vectors[graph] = zero
        for target in range(starts.shape[0] - 1):
            start, stop = starts[target], starts[target + 1]
            mean = zero
            for edge in range(start, stop):
                source, d_weight = sources[edge], zero
                for c in range(attention.shape[0]):
                    d_weight += d_out[graph, target, c] * projected[graph, source, 0, c]
                d_weights[edge - start] = d_weight
                mean += weights[graph, edge] * d_weight
            for edge in range(start, stop):
                source, weight = sources[edge], weights[graph, edge]
                d_score = weight * (d_weights[edge - start] - mean)
                for c in range(attention.shape[0]):
                    both = projected[graph, source, 0, c] + projected[graph, target, 1, c] + shift[c]
                    factor = d_score if both > zero else d_score * slope
                    d_vectors[graph, 0, c] += factor * both
                    d_both = factor * attention[c]
                    d_projected[graph, target, 1, c] += d_both
                    d_projected[graph, source, 0, c] += d_both + weight * d_out[graph, target, c]
            for c in range(attention.shape[0]):
                d_vectors[graph, 1, c] += d_projected[graph, target, 1, c]
                d_vectors[graph, 2, c] += d_out[graph, target, c]
