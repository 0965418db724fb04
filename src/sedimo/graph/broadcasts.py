"""Integer tensors that repeat along axes without holding the repeats: few elements stand for many."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

Integers = npt.NDArray[np.int64]


def compact(labels: torch.Tensor, keep: int | None = None) -> torch.Tensor:
    """One element of each axis along which the tensor only repeats; the axis `keep` stays whole."""
    for axis in range(labels.ndim):
        if axis != keep and labels.stride(axis) == 0 and labels.shape[axis] > 1:
            labels = labels.narrow(axis, 0, 1)
    return labels


def compact_together(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors of one shape without the axes along which both only repeat."""
    for axis in range(a.ndim):
        if a.stride(axis) == b.stride(axis) == 0 and a.shape[axis] > 1:
            a, b = a.narrow(axis, 0, 1), b.narrow(axis, 0, 1)
    return a, b


def unique_pairs(a: torch.Tensor, b: torch.Tensor) -> Integers:
    """The different pairs `[n, 2]` of elements at the same place of two tensors of one shape."""
    pairs: Integers = torch.unique(torch.stack([a.reshape(-1), b.reshape(-1)], dim=1), dim=0).numpy()
    return pairs


def concatenated(pieces: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """The pieces along an axis; axes along which all of them only repeat have length 1 in the result."""
    axis %= pieces[0].ndim
    for other in range(pieces[0].ndim):
        if other != axis and all(p.stride(other) == 0 for p in pieces):
            pieces = [p.narrow(other, 0, 1) for p in pieces]
    return torch.cat(list(pieces), dim=axis)


def expanded(labels: torch.Tensor | None, shape: Sequence[int]) -> torch.Tensor | None:
    """The tensor repeated to a shape; None if it does not broadcast to it."""
    if labels is None or labels.ndim > len(shape):
        return None
    padded = [1] * (len(shape) - labels.ndim) + list(labels.shape)
    fits = all(a in (1, b) for a, b in zip(padded, shape, strict=True))
    return labels.expand(tuple(shape)) if fits else None


def reshaped(labels: torch.Tensor, shape: Sequence[int], most: int) -> torch.Tensor | None:
    """The tensor in another shape; None if that would have to hold more than `most` elements."""
    try:
        return labels.view(tuple(shape))
    except RuntimeError:  # repeats would have to be written out
        return labels.reshape(tuple(shape)) if math.prod(shape) <= most else None
