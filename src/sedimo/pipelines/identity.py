"""What a pipeline is besides its denoiser, as a short text: part of the name of everything that is measured on it.

Networks are told apart by their settings and by the first values of each of their tensors. That is no proof of
equality, but whoever trains, merges or replaces a text encoder changes those, and reading ten gigabytes to name a
measurement would be too much.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from sedimo.codec import content_key
from sedimo.pipelines.objects import PipelineObject

_N_VALUES = 64
_N_DIGITS = 16


def pipeline_identity(pipeline: PipelineObject, denoiser_name: str) -> str:
    """Such as `DiTPipeline DDIMScheduler:5a3f... vae:09bc...`: the same for equal pipelines, wherever they lie."""
    scheduler = pipeline.scheduler
    settings = {str(name): repr(value) for name, value in dict(getattr(scheduler, "config", {})).items()}
    parts = [type(pipeline).__name__, f"{type(scheduler).__name__}:{content_key(settings)[:_N_DIGITS]}"]
    for name, component in sorted(pipeline.components.items()):
        if isinstance(component, nn.Module) and name != denoiser_name:
            parts.append(f"{name}:{_network_digest(component)}")
    return " ".join(parts)


def _network_digest(network: nn.Module) -> str:
    total = hashlib.sha256(type(network).__name__.encode())
    for name, tensor in sorted(network.state_dict().items()):
        first = tensor.flatten()[:_N_VALUES].cpu().contiguous()
        total.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        total.update(first.view(torch.uint8).numpy().data if first.numel() else b"")
    return total.hexdigest()[:_N_DIGITS]
