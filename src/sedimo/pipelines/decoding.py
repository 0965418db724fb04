"""Final latents to images, the way the pipelines do it behind their own calls."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sedimo.errors import InputError
from sedimo.pipelines.adapter import PipelineObject

DECODE_BATCH = 32


@torch.no_grad()
def decode_latents(pipeline: PipelineObject, latents: torch.Tensor) -> torch.Tensor:
    """Images `[n, 3, H, W]` float32 in [0, 1] on the CPU; pixel-space pipelines only rescale.

    Raises:
        InputError: the latents do not belong to this pipeline, or its decoder is not known.
    """
    decoder = _decoder(pipeline)
    if decoder is None:
        return _to_unit(latents)
    latents = _unpacked(pipeline, latents)
    n_channels = _config(decoder).get("latent_channels")
    if latents.ndim != 4 or (n_channels is not None and latents.shape[1] != n_channels):
        raise InputError(f"latents must have shape [n, {n_channels}, H, W], got {list(latents.shape)}")
    with _upcast_if_forced(decoder):
        chunks = [_decode_chunk(decoder, chunk) for chunk in torch.split(latents, DECODE_BATCH)]
    return torch.cat(chunks)


def _decoder(pipeline: PipelineObject) -> nn.Module | None:
    for name in ("vae", "vqvae"):
        if getattr(pipeline, name, None) is not None:
            return getattr(pipeline, name)  # type: ignore[no-any-return]  # diffusers has no types
    if getattr(pipeline, "movq", None) is not None:
        raise InputError(
            f"{type(pipeline).__name__} decodes by a MOVQ, which is not supported; compare latents instead"
        )
    return None


def _unpacked(pipeline: PipelineObject, latents: torch.Tensor) -> torch.Tensor:
    """FLUX-like pipelines hand out tokens `[n, T, 4 C]` of 2 x 2 latent pixels; images are square here."""
    unpack = getattr(pipeline, "_unpack_latents", None)
    if latents.ndim != 3 or unpack is None:
        return latents
    factor: int = getattr(pipeline, "vae_scale_factor", 8)
    if list(inspect.signature(unpack).parameters) != ["latents", "height", "width", "vae_scale_factor"]:
        raise InputError(f"{type(pipeline).__name__} packs its latents in an unknown way; compare latents instead")
    pixels = 2 * factor * math.isqrt(latents.shape[1])
    return unpack(latents, pixels, pixels, factor)  # type: ignore[no-any-return]


def _decode_chunk(decoder: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    weight = next(decoder.parameters())
    scaled = _unscaled(_config(decoder), latents.float()).to(weight.device, weight.dtype)
    return _to_unit(decoder.decode(scaled).sample)  # type: ignore[operator]


def _unscaled(config: Mapping[str, Any], latents: torch.Tensor) -> torch.Tensor:
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    latents = latents / (config.get("scaling_factor") or 1.0)
    if mean is not None and deviation is not None:
        latents = latents * _per_channel(deviation) + _per_channel(mean)
    return latents + (config.get("shift_factor") or 0.0)


def _config(decoder: nn.Module) -> Mapping[str, Any]:
    return decoder.config  # type: ignore[return-value]  # a frozen dictionary of diffusers


def _per_channel(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


def _to_unit(images: torch.Tensor) -> torch.Tensor:
    return (images.float() / 2 + 0.5).clamp(0, 1).cpu()


@contextmanager
def _upcast_if_forced(decoder: nn.Module) -> Iterator[None]:
    """SDXL's autoencoder overflows in float16 and says so (`force_upcast`); float16 -> float32 -> float16 is exact."""
    is_forced = next(decoder.parameters()).dtype is torch.float16 and decoder.config.get("force_upcast", False)  # type: ignore[union-attr, operator]
    if not is_forced:
        yield
        return
    decoder.to(torch.float32)
    try:
        yield
    finally:
        decoder.to(torch.float16)
