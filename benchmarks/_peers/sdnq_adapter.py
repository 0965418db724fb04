"""SDNQ: weights quantized by its own entry point, in full or with its skip list, read back by its own dequantizer."""

from __future__ import annotations

import os
from dataclasses import dataclass

os.environ["SDNQ_USE_TORCH_COMPILE"] = "0"  # read on import; compiled kernels need seconds per shape and change nothing

import torch
from torch import nn

from _peers.weights import LAYER_TYPES, Quantized, QuantizedLayer

PACKAGE = "sdnq"


@dataclass(frozen=True, slots=True)
class Options:
    """Arguments of SDNQ that differ between the rows.

    `layers`: `all` (no skip list, no least size, convolutions too), `no-skips` (no skip list, but layers below
    SDNQ's least size stay) or `default`. `is_half`: scales in the checkpoint's float16 instead of SDNQ's own default.
    """

    dtype: str
    layers: str
    is_dynamic: bool = False
    is_half: bool = False

    @property
    def label(self) -> str:
        """Name of the row."""
        words = [f"{self.dtype}+dynamic" if self.is_dynamic else self.dtype, self.layers]
        return " ".join([*words, "fp16 scales"] if self.is_half else words)


ROWS = (
    *(Options(dtype, "all") for dtype in ("uint3", "int4", "uint4", "uint5")),
    *(Options(dtype, "all", is_dynamic=True) for dtype in ("int4", "uint4")),
    *(Options(dtype, "no-skips", is_half=True) for dtype in ("int3", "uint3", "int4", "uint4", "uint5")),
    *(Options(dtype, "no-skips", is_dynamic=True, is_half=True) for dtype in ("int3", "int4")),
    *(Options(dtype, "default") for dtype in ("uint3", "int4", "uint4", "uint5")),
    *(Options(dtype, "default", is_dynamic=True) for dtype in ("int4", "uint4")),
    *(Options(dtype, "default", is_half=True) for dtype in ("uint4", "uint5")),
)
# Not in the list, because they cost more bits or gave less on this denoiser: codebooks, Hadamard rotation, low-rank
# branches (rank 32 alone is 5 bits per weight at this width), groups of 32. Scales in float16 gave the same decibels.

_LAYERS = {
    "all": {"add_skip_keys": False, "quant_conv": True, "minimum_allowed_numel": 0, "minimum_allowed_channel_size": 0},
    "no-skips": {"add_skip_keys": False, "quant_conv": True},
    "default": {},
}


def quantize(denoiser: nn.Module, options: Options) -> Quantized:
    """Quantizes `denoiser`, which is consumed."""
    from sdnq.quantizer import sdnq_post_load_quant

    model = sdnq_post_load_quant(
        denoiser.to(torch.float16) if options.is_half else denoiser,
        weights_dtype=options.dtype,
        use_dynamic_quantization=options.is_dynamic,
        dequantize_fp32=not options.is_half,
        **_LAYERS[options.layers],
    )
    found = {n: _read(m) for n, m in model.named_modules() if hasattr(m, "sdnq_dequantizer")}
    return Quantized(found, model)


@torch.no_grad()
def _read(layer: nn.Module) -> QuantizedLayer:
    from sdnq.common import sdnq_keys
    from sdnq.utils import get_sdnq_params

    if not isinstance(layer, LAYER_TYPES):
        raise TypeError(f"SDNQ quantized a {type(layer).__name__}, which is not counted")
    tensors = {k: v for k, v in get_sdnq_params(layer).items() if isinstance(v, torch.Tensor)}
    if not set(tensors) <= set(sdnq_keys):
        raise TypeError(f"unknown tensors of SDNQ: {sorted(tensors)}")
    weight = layer.sdnq_dequantizer(**tensors, skip_compile=True)
    n_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    return QuantizedLayer(weight.detach().float().clone(), n_bytes, layer.sdnq_dequantizer.weights_dtype)
