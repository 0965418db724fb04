"""A packed denoiser's folder as files: judge it and read it, without a model.

Loading into a model is diffusers' work (checkpoint/diffusers_plugin.py); both use the same checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from sedimo.checkpoint.contents import assemble
from sedimo.checkpoint.layout import METHOD, Configuration, read_configuration
from sedimo.checkpoint.validation import check_tensors, checksums_of, judge_headers, tensor_specs
from sedimo.codec import parse_json
from sedimo.errors import InputError, StateError
from sedimo.pipelines.weights import WEIGHTS_STEM, FileHeader, find_weights, read_header
from sedimo.quant.tensor import QuantizedTensor


@dataclass(frozen=True)
class Checkpoint:
    """A packed denoiser's folder that has been judged by its headers: what is in it, and how large it is [bytes]."""

    folder: Path
    config: Mapping[str, object]
    configuration: Configuration
    headers: tuple[FileHeader, ...]
    checksums: Mapping[str, str]

    @property
    def file_bytes(self) -> int:
        """Size of all weight files: of each 8 + header, then `stored_bytes` and `plain_bytes`."""
        return sum(header.file_bytes for header in self.headers)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors of packed layers."""
        return sum(entry.stored_bytes for entry in self.configuration.layers.values())

    @property
    def plain_bytes(self) -> int:
        """Bytes of all other tensors."""
        return sum(spec.n_bytes for spec in tensor_specs(self.headers).values()) - self.stored_bytes


def is_packed(folder: Path) -> bool:
    """Whether a denoiser's folder says that Sedimo packed it."""
    path = folder / "config.json"
    plain = parse_json(path.read_bytes(), place=str(path)) if path.is_file() else {}
    told = plain.get("quantization_config") if isinstance(plain, dict) else None
    return isinstance(told, dict) and told.get("quant_method") == METHOD


def open_checkpoint(folder: Path, *, variant: str | None = None) -> Checkpoint:
    """Judges a packed denoiser's folder by its configuration and headers; no tensor is read."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} is no denoiser's folder: it has no config.json")
    config = parse_json(path.read_bytes(), place=str(path))
    if not isinstance(config, dict) or "quantization_config" not in config:
        raise StateError(f"{path} has no quantization_config: the denoiser is not packed")
    read = read_configuration(config["quantization_config"], place=f"{path}: quantization_config")
    files, _ = find_weights(folder, WEIGHTS_STEM, variant)
    headers = tuple(map(read_header, files))
    found, seal = judge_headers(headers, read)
    return Checkpoint(folder, config, read, headers, checksums_of(seal, found))


def read_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All stored tensors by name, windows on the files, their checksums compared; else a StateError."""
    found: dict[str, torch.Tensor] = {}
    for header in checkpoint.headers:
        with safe_open(header.path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in header.tensors}
    check_tensors(found, checkpoint.checksums)
    return found


def read_packed(checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32) -> dict[str, QuantizedTensor]:
    """The packed weight of every packed layer, labelled with `dtype`; layers that share one get the same object."""
    tensors, configuration = read_tensors(checkpoint), checkpoint.configuration
    found = {layer: assemble(layer, entry, tensors, dtype) for layer, entry in configuration.layers.items()}
    return found | {name: found[owner] for name, owner in configuration.owners.items()}
