"""What every tool's result is brought to: plain float32 weights, the bytes it stores for each, and a count of both.

A tool is compared by its weights alone: they are dequantized and put into the same denoiser, so that everything
else (operators, dtype, seeds, steps) is equal. How far that is from the tool's own forward pass is measured too.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

FP16_BYTES = 2
LAYER_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layers:
    """Shapes of the Linear and Conv weights by layer name, and which of them repeat an earlier layer's values."""

    shapes: Mapping[str, tuple[int, ...]]
    first_of: Mapping[str, str]

    @property
    def n_distinct_weights(self) -> int:
        """Number of weights, equal layers counted once."""
        return sum(math.prod(s) for n, s in self.shapes.items() if self.first_of[n] == n)

    def fp16_bytes(self, name: str) -> int:
        """Bytes of a layer that is left alone."""
        return math.prod(self.shapes[name]) * FP16_BYTES


def find_layers(denoiser: nn.Module) -> Layers:
    """All Linear and Conv layers of a full-precision denoiser."""
    shapes: dict[str, tuple[int, ...]] = {}
    first_of: dict[str, str] = {}
    seen: dict[tuple[tuple[int, ...], str], str] = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, LAYER_TYPES):
            weight = module.weight.detach()
            shapes[name] = tuple(weight.shape)
            first_of[name] = seen.setdefault((shapes[name], _digest(weight)), name)
    return Layers(shapes, first_of)


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()


@dataclass(frozen=True)
class QuantizedLayer:
    """A weight as a tool gives it back `[out, in, ...]` float32, the bytes it stores for it, and its format's name."""

    weight: torch.Tensor
    n_bytes: int
    format: str


@dataclass(frozen=True)
class Quantized:
    """A tool's result: the layers that it quantized, and its own denoiser for a check of the forward pass.

    `shares_ties` says whether the tool stores equal layers once.
    """

    layers: Mapping[str, QuantizedLayer]
    denoiser: nn.Module | None = None
    shares_ties: bool = False
    facts: Mapping[str, str] = field(default_factory=dict)

    def digest(self, name: str) -> str:
        """sha256 of a layer's quantized weight; empty for a layer that was left alone."""
        return _digest(self.layers[name].weight) if name in self.layers else ""


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of all Linear and Conv weights, as the tool stores them and with equal layers once, and both as bits.

    Bits are per distinct weight.
    """

    n_bytes: int
    n_bytes_once: int
    bits: float
    bits_once: float
    n_quantized: int
    n_layers: int
    formats: Mapping[str, int]


def size_of(quantized: Quantized, layers: Layers) -> Size:
    """Counts what a tool stores; a layer it left alone takes 16 bits per weight.

    Equal layers that a tool quantized differently cannot be stored once: each version counts then.
    """
    cost = {n: quantized.layers[n].n_bytes if n in quantized.layers else layers.fp16_bytes(n) for n in layers.shapes}
    versions = {(layers.first_of[n], quantized.digest(n)): b for n, b in cost.items()}
    once = sum(versions.values())
    total = once if quantized.shares_ties else sum(cost.values())
    formats = Counter(quantized.layers[n].format if n in quantized.layers else "fp16" for n in layers.shapes)
    per_weight = 8 / layers.n_distinct_weights
    return Size(
        total,
        once,
        total * per_weight,
        once * per_weight,
        len(quantized.layers),
        len(layers.shapes),
        dict(sorted(formats.items())),
    )


@contextmanager
def replaced_weights(denoiser: nn.Module, quantized: Quantized) -> Iterator[None]:
    """The denoiser with a tool's weights while the context lasts; restored bit-exactly."""
    kept: dict[str, torch.Tensor] = {}
    try:
        for name, layer in quantized.layers.items():
            weight = denoiser.get_submodule(name).weight
            if layer.weight.shape != weight.shape or not torch.isfinite(layer.weight).all():
                raise ValueError(f"layer {name}: {tuple(layer.weight.shape)} is no finite {tuple(weight.shape)}")
            kept[name] = weight.data
            weight.data = layer.weight.to(weight.dtype)
        yield
    finally:
        for name, value in kept.items():
            denoiser.get_submodule(name).weight.data = value
