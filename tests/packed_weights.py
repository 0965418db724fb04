"""Packed weights made from random stored values, for tests that need one and not a quantizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from sedimo.checkpoint.contents import make_ordinary, named_layers
from sedimo.checkpoint.diffusers_plugin import attach
from sedimo.checkpoint.reading import Checkpoint, open_checkpoint, read_packed
from sedimo.quant.formats import Format
from sedimo.quant.packing import pack
from sedimo.quant.parts import WeightPart, expected_tensors
from sedimo.quant.tensor import QuantizedTensor

OWNER = "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"
TIED = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1"
FORMATS = ("uaq3", "kmc4", "uaq4g16", "kma5", "uaq8", "kmc2")


def random_packed(
    shape: Sequence[int],
    formats: str | Sequence[tuple[int, str]] = "kmc4",
    *,
    dtype: torch.dtype = torch.float32,
    wide: torch.dtype | None = None,
    seed: int = 0,
) -> QuantizedTensor:
    """A packed weight; `formats` is one text, or pairs (number of input channels, text)."""
    generator = torch.Generator().manual_seed(seed)
    pieces = [(shape[1], formats)] if isinstance(formats, str) else formats
    parts: list[WeightPart] = []
    for n_channels, text in pieces:
        start = parts[-1].stop if parts else 0
        fmt, n_inputs = Format.parse(text), n_channels * math.prod(shape[2:])
        tensors = {
            name: _random(name, spec.shape, fmt, n_inputs, generator).to(spec.dtype)
            for name, spec in expected_tensors(fmt, shape[0], n_inputs, dtypes_of(fmt, wide)).items()
        }
        parts.append(WeightPart(start, start + n_channels, fmt, tensors))
    return QuantizedTensor.from_parts(parts, shape, dtype)


def dtypes_of(fmt: Format, wide: torch.dtype | None) -> dict[str, torch.dtype]:
    """`wide` for the tensors of a format whose dtype depends on the weight."""
    return {} if wide is None else dict.fromkeys(fmt.numerics.dtypes, wide)


def _random(name: str, shape: Sequence[int], fmt: Format, n_inputs: int, generator: torch.Generator) -> torch.Tensor:
    if name == "codes":
        codes = torch.randint(fmt.n_levels, (shape[0], n_inputs), generator=generator, dtype=torch.uint8)
        return pack(codes, fmt.bits)
    if name == "zero_point":
        return torch.randint(fmt.n_levels, shape, generator=generator)
    if name == "scale":
        return (0.2 + torch.rand(shape, generator=generator)) / (fmt.n_levels * 4)
    values = torch.randn(shape, generator=generator) * 0.1
    return values.sort(dim=-1).values if name == "codebook" else values


def random_weights(
    denoiser: nn.Module, formats: Sequence[str] = FORMATS, ties: Mapping[str, str] | None = None
) -> dict[str, QuantizedTensor]:
    """A packed weight for every layer of a denoiser, formats in turn; `ties` maps a layer to its owner."""
    found: dict[str, QuantizedTensor] = {}
    for i, (name, module) in enumerate(named_layers(denoiser)):
        weight = random_packed(tuple(module.weight.shape), formats[i % len(formats)], seed=i)
        found[name] = found[ties[name]] if ties and name in ties else weight
    return found


def denoise(denoiser: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The denoiser's output on fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    with torch.no_grad():
        return denoiser(latents, timestep=torch.tensor([3, 700]), class_labels=torch.tensor([1, 2])).sample


def check_checkpoint(folder: Path) -> Checkpoint:
    """A packed denoiser's folder that has been judged completely: its headers, and every byte of every tensor."""
    checkpoint = open_checkpoint(folder)
    read_packed(checkpoint)
    return checkpoint


def dequantize_weights(denoiser: nn.Module) -> None:
    """Makes an ordinary denoiser of it, in place, and tells it so; inputs are neither rounded nor divided any more."""
    make_ordinary(denoiser)
    attach(denoiser)
