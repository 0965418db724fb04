"""Denoisers by config, built on the meta device: published sizes and tiny ones of other architectures."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import diffusers
import torch
from torch import nn

from sedimo.graph.model import DenoiserGraph
from sedimo.graph.trace import trace_denoiser

_DIT_XL = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
}
_SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

PUBLISHED: Mapping[str, tuple[str, Mapping[str, object], int]] = {  # class, config, number of weight layers
    "DiT-XL/2": ("DiTTransformer2DModel", _DIT_XL, 255),
    "PixArt-XL": ("PixArtTransformer2DModel", {"num_layers": 28, "caption_channels": 4096, "sample_size": 64}, 287),
    "SD 1.5": ("UNet2DConditionModel", {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}, 282),
    "SDXL": ("UNet2DConditionModel", _SDXL, 794),
}

_UNET = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}
_CONDITIONED_UNET = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
}

TINY: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "Hunyuan": (
        "HunyuanDiT2DModel",
        {
            "num_layers": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "patch_size": 2,
            "hidden_size": 32,
            "sample_size": 16,
            "cross_attention_dim": 40,
            "cross_attention_dim_t5": 48,
            "pooled_projection_dim": 32,
        },
    ),
    "FLUX": (
        "FluxTransformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 20,
            "axes_dims_rope": [4, 4, 8],
            "guidance_embeds": True,
        },
    ),
    "SD3": (
        "SD3Transformer2DModel",
        {
            "sample_size": 32,
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_projection_dim": 32,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 64,
            "out_channels": 4,
        },
    ),
    "Sana": (
        "SanaTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 8,
            "caption_channels": 12,
            "sample_size": 32,
        },
    ),
    "Wan": (
        "WanTransformer3DModel",
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 256,
            "ffn_dim": 32,
            "num_layers": 2,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 32,
        },
    ),
    "UNet2D": ("UNet2DModel", _UNET),
    "UNet2D with classes": ("UNet2DModel", {**_UNET, "num_class_embeds": 10}),
    "UNet with text": ("UNet2DConditionModel", _CONDITIONED_UNET),
    "UNet with added conditions": (
        "UNet2DConditionModel",
        {
            **_CONDITIONED_UNET,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 20,
        },
    ),
    "UNet with guidance embedding": ("UNet2DConditionModel", {**_CONDITIONED_UNET, "time_cond_proj_dim": 12}),
    "PixArt with sizes": (
        "PixArtTransformer2DModel",
        {
            "num_layers": 2,
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "cross_attention_dim": 48,
            "caption_channels": 40,
            "sample_size": 128,
            "norm_num_groups": 8,
        },
    ),
}


def build(class_name: str, config: Mapping[str, object], device: str = "meta") -> nn.Module:
    """The denoiser, without weights on the meta device."""
    with torch.device(device):
        model: nn.Module = getattr(diffusers, class_name)(**config)
    return model.eval()


def published(name: str) -> nn.Module:
    """A denoiser of published size on the meta device."""
    class_name, config, _ = PUBLISHED[name]
    return build(class_name, config)


@cache
def traced(name: str) -> DenoiserGraph:
    """The graph of a published or tiny denoiser, traced once per test run."""
    return trace_denoiser(published(name) if name in PUBLISHED else build(*TINY[name]))
