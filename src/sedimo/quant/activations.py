"""Quantized activations: how the inputs of a layer are rounded before it computes.

A scale covers one token of a Linear layer, one image of a convolution, or, with static ranges, the whole tensor:

    asymmetric   code = clamp(round(x / scale) + zero_point, 0, 2^b - 1),   scale = (high - low) / (2^b - 1)
    symmetric    code = clamp(round(x / scale), -m, m),   m = 2^(b-1) - 1,  scale = max(|low|, |high|) / m

and x' = (code - zero_point) * scale. An asymmetric range is widened to hold zero, so that zero padding and absent
inputs stay exact and the zero point fits the codes. All arithmetic is float32 and rounds half to even; an integer
kernel that starts from these codes, scales and zero points computes the same sums.

Source:
    Mills et al. 2024, Qua2SeDiMo (arXiv 2412.14628), online quantization per token; symmetric min-max as in
    Efficient Quantization Strategies for Latent Diffusion Models (arXiv 2312.05431).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sedimo.codec import content_key
from sedimo.errors import InputError
from sedimo.quant.formats import FULL_BITS, MAX_BITS, MIN_BITS

_LARGEST = 2.0**126  # the width of a range fits float32


@dataclass(frozen=True, slots=True)
class InputRange:
    """Least and greatest values of a layer's inputs, seen beforehand: per channel, or per group of timesteps."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        pairs = list(zip(self.low, self.high, strict=False))
        bad = next((pair for pair in pairs if not -_LARGEST <= pair[0] <= pair[1] <= _LARGEST), None)
        if not pairs or len(self.low) != len(self.high) or bad:
            found = f"{bad[0]} and {bad[1]}" if bad else f"{len(self.low)} and {len(self.high)} of them"
            rule = "as many finite low as high values, low <= high, at most 2^126 from zero"
            raise InputError(f"ranges of inputs need {rule}, got {found}")


@dataclass(frozen=True, slots=True)
class ActivationQuantizer:
    """How the inputs of one layer are rounded: `bits`, symmetric or not, by a fixed range or by each token's own."""

    bits: int
    symmetric: bool = False
    range: InputRange | None = None

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise InputError(f"activations take {MIN_BITS}..{MAX_BITS} bits, or 16, got {self.bits}")

    def codes(self, inputs: Tensor, *, n_axes: int = 1, group: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scale and zero point, all float32, of tokens `[..., in]` of a Linear layer or images `[..., C, ...]`.

        `n_axes` last axes are one token (1) or image (2, 3 or 4), and share a range where ranges are their own; it is
        one less than the layer's weight has. `group` is the group of timesteps that a static range is taken from.
        """
        values = inputs.float()
        if self.range is None:
            axes = tuple(range(-n_axes, 0))
            low, high = values.amin(axes, keepdim=True), values.amax(axes, keepdim=True)
        else:
            position = min(group, len(self.range.low) - 1)
            low, high = values.new_tensor(self.range.low[position]), values.new_tensor(self.range.high[position])
        low, high = low.clamp(max=0), high.clamp(min=0)
        qmax = (1 << self.bits - self.symmetric) - 1
        scale = (torch.maximum(-low, high) if self.symmetric else high - low) / qmax
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # nothing but zeros; NaN stays what it is
        zero_point = torch.zeros_like(low) if self.symmetric else (-low / scale).round()
        codes = torch.div(values, scale).round_().add_(zero_point).clamp_(-qmax if self.symmetric else 0, qmax)
        return codes, scale, zero_point

    def __call__(self, inputs: Tensor, *, n_axes: int = 1, group: int = 0) -> Tensor:
        """A layer's inputs, rounded: same shape and dtype.

        The outermost point of the grid may lie half a step beyond the range; the dtype's greatest number stands for
        one that it does not reach.
        """
        codes, scale, zero_point = self.codes(inputs, n_axes=n_axes, group=group)
        largest = min(torch.finfo(inputs.dtype).max, torch.finfo(codes.dtype).max)
        return ((codes - zero_point) * scale).clamp_(-largest, largest).to(inputs.dtype)


@dataclass(frozen=True)
class InputQuantizers:
    """The quantizers of some layers' inputs by layer name; `timesteps` as in `Activations`."""

    layers: Mapping[str, ActivationQuantizer] = field(default_factory=dict)
    timesteps: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not all(math.isfinite(t) for t in self.timesteps):
            raise InputError(f"the timesteps of static ranges must be finite, got {self.timesteps}")
        for layer, quantizer in self.layers.items():
            n_ranges = len(quantizer.range.low) if quantizer.range else 1
            if n_ranges not in (1, len(self.timesteps)):
                raise InputError(f"layer {layer!r} has {n_ranges} static ranges for {len(self.timesteps)} timesteps")

    def group(self, timestep: float) -> int:
        """Which of the ranges a call at this noise level takes: those of the nearest timestep, 0 if all are alike."""
        return min(range(len(self.timesteps)), key=lambda i: abs(self.timesteps[i] - timestep), default=0)

    def round(self, layer: str, inputs: Tensor, *, n_axes: int, timestep: float) -> Tensor:
        """A layer's inputs at a noise level, rounded: same shape and dtype."""
        return self.layers[layer](inputs, n_axes=n_axes, group=self.group(timestep))


@dataclass(frozen=True)
class Activations:
    """How the activations of a denoiser are rounded; how many bits a layer's inputs take is told by its format.

    `static` are ranges by layer name and width (`a8`); empty: each token's or image's own (dynamic). `timesteps` are
    the noise levels that they were taken at when they differ by timestep: a call takes those of the nearest one.
    """

    symmetric: bool = False
    static: Mapping[str, Mapping[str, InputRange]] = field(default_factory=dict)
    timesteps: tuple[float, ...] = ()

    @property
    def key(self) -> str:
        """Content key; empty for the default, which needs no name."""
        return "" if self == DYNAMIC else content_key(self)

    def quantizers(self, bits: Mapping[str, int]) -> InputQuantizers:
        """The quantizers of the layers whose inputs take fewer than 16 bits."""
        found = {}
        for layer, width in bits.items():
            if width == FULL_BITS:
                continue
            own = self.static.get(layer, {}).get(f"a{width}")
            if self.static and own is None:
                raise InputError(
                    f"no static range is known for the inputs of layer {layer!r} at {width} bits: offer that width "
                    f"when ranges are calibrated (--act a{width}), or use dynamic ranges (leave out --act-ranges)"
                )
            found[layer] = ActivationQuantizer(width, self.symmetric, own)
        return InputQuantizers(found, self.timesteps)


DYNAMIC = Activations()
