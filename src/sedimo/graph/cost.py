"""Multiply-accumulates (MACs) from the shapes that a trace saw, of one sample in one denoiser call.

Norms, activations, biases and everything else without a matrix product count nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def layer_macs(weight_shape: Sequence[int], output_shape: Sequence[int]) -> int:
    """MACs of one call of a layer: each output element is a sum over one row of the weight.

    `weight_shape` is `[out, in / groups, ...]`, so that grouped convolutions are right without knowing the
    number of groups.

    Example:
        >>> layer_macs((8, 4), (1, 16, 8))
        512
    """
    return math.prod(output_shape) * math.prod(weight_shape[1:])


def attention_macs(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """MACs of the two products of attention, `[..., Nq, d]`, `[..., Nk, d]`, `[..., Nk, dv]`.

    Example:
        >>> attention_macs((1, 2, 16, 8), (1, 2, 4, 8), (1, 2, 4, 8))
        2048
    """
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def product_macs(left: Sequence[int], output: Sequence[int]) -> int:
    """MACs of a matrix product of `left` `[..., n, k]`.

    Example:
        >>> product_macs((1, 2, 16, 8), (1, 2, 16, 4))
        1024
    """
    return math.prod(output) * left[-1]


def per_sample(macs: int, output_shape: Sequence[int], batch: int) -> int:
    """MACs of one sample, from those of a call whose output has `batch` samples in its first dimension.

    An output whose first dimension is no multiple of `batch` was computed once for all samples and counts whole.
    """
    has_batch = bool(output_shape) and output_shape[0] % batch == 0
    return macs // batch if has_batch else macs
