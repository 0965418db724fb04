"""A packed denoiser's folder as files: judge it, read it, change single layers in it, without a model.

Loading into a model is diffusers' work (checkpoint/diffusers_plugin.py); both use the same checks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file

from sedimo.checkpoint.contents import assemble
from sedimo.checkpoint.judge import check_tensors, checksums_of, judge_headers, make_seal, tensor_specs
from sedimo.checkpoint.layout import (
    KINDS,
    METHOD,
    Configuration,
    LayerEntry,
    Layers,
    entry_of,
    owners_of,
    packed_tensors,
    read_configuration,
    whole,
)
from sedimo.codec import parse_json
from sedimo.errors import InputError, StateError
from sedimo.pipelines.weights import WEIGHTS_STEM, FileHeader, find_weights, read_header
from sedimo.quant.tensor import QuantizedTensor


@dataclass(frozen=True)
class Checkpoint:
    """A packed denoiser's folder that has been judged by its headers: what is in it, and how large it is [bytes].

    `file_bytes` = sum over files of 8 + header; plus `stored_bytes` (tensors of packed layers) plus `plain_bytes`.
    """

    folder: Path
    config: Mapping[str, object]
    configuration: Configuration
    headers: tuple[FileHeader, ...]
    checksums: Mapping[str, str]

    @property
    def layers(self) -> Layers:
        """The packed layers by name."""
        return self.configuration.layers

    @property
    def file_bytes(self) -> int:
        """Size of all weight files."""
        return sum(header.file_bytes for header in self.headers)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors of packed layers."""
        return sum(spec.n_bytes for spec in packed_tensors(self.layers).values())

    @property
    def plain_bytes(self) -> int:
        """Bytes of all other tensors."""
        return sum(spec.n_bytes for spec in tensor_specs(self.headers).values()) - self.stored_bytes


def is_packed(folder: Path) -> bool:
    """Whether a denoiser's folder says that Sedimo packed it."""
    path = folder / "config.json"
    plain = parse_json(path.read_bytes(), place=str(path)) if path.is_file() else {}
    method = plain.get("quantization_config") if isinstance(plain, dict) else None
    return isinstance(method, dict) and method.get("quant_method") == METHOD


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


def _read_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All stored tensors by name, windows on the files, their checksums compared; else a StateError."""
    found: dict[str, torch.Tensor] = {}
    for header in checkpoint.headers:
        with safe_open(header.path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in header.tensors}
    check_tensors(found, checkpoint.checksums)
    return found


def read_packed(checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32) -> dict[str, QuantizedTensor]:
    """The packed weight of every packed layer, labelled with `dtype`; layers that share one get the same object."""
    tensors, layers = _read_tensors(checkpoint), checkpoint.layers
    found = {layer: assemble(layer, entry, tensors, dtype) for layer, entry in whole(layers).items()}
    return found | {name: found[owner] for name, owner in owners_of(layers).items()}


def change_layers(
    checkpoint: Checkpoint,
    out: Path,
    weights: Mapping[str, QuantizedTensor],
    *,
    made_by: str,
    max_shard_size: int | str = "10GB",
) -> None:
    """Writes a denoiser's folder with other packed weights for some layers; every other tensor keeps its bytes.

    A layer that shares its weight changes together with those that it shares it with. `out` is an existing folder
    other than the checkpoint's.
    """
    if checkpoint.configuration.smoothed:
        raise InputError(
            f"{checkpoint.folder} was smoothed: its weights are no longer those of its source, so single layers cannot "
            "be packed anew. Quantize the source again with --smooth and another recipe"
        )
    tensors, layers, owners = _read_tensors(checkpoint), dict(checkpoint.layers), owners_of(checkpoint.layers)
    fresh: dict[str, QuantizedTensor] = {}
    for name, weight in weights.items():
        owner = owners.get(name, name)
        if fresh.setdefault(owner, weight) is not weight:
            raise InputError(f"layers {owner!r} and {name!r} share one weight and must get one packed weight")
    for owner, weight in fresh.items():
        shape = _drop_layer(owner, layers, tensors)
        if shape != tuple(weight.shape):
            raise InputError(f"layer {owner!r} has a weight of shape {shape}, the new one has {tuple(weight.shape)}")
        entry = layers[owner] = entry_of(weight)
        tensors |= {n: weight.parts[i].tensors[field] for n, (i, field) in entry.tensors(owner).items()}
    configuration = Configuration(layers, checkpoint.configuration.inputs, {}, made_by)
    write_json(out / "config.json", {**checkpoint.config, "quantization_config": configuration.plain})
    _write_tensors(out, tensors, make_seal(tensors, configuration), max_shard_size)


def write_json(path: Path, plain: Mapping[str, object]) -> None:
    """A file as diffusers writes its own."""
    path.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _drop_layer(owner: str, layers: Layers, tensors: dict[str, torch.Tensor]) -> tuple[int, ...]:
    """Removes a layer's tensors and returns the shape of its weight."""
    entry = layers.get(owner)
    if isinstance(entry, LayerEntry):
        for name in entry.tensors(owner):
            del tensors[name]
        return entry.shape
    weight = tensors.pop(f"{owner}.weight", None)
    if weight is None or weight.ndim not in KINDS:
        raise InputError(f"the checkpoint has no layer {owner!r} with a weight that can be packed")
    return tuple(weight.shape)


def _write_tensors(
    folder: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], max_shard_size: int | str
) -> None:
    """Files as diffusers writes them: one, or shards with an index."""
    split = split_torch_state_dict_into_shards(
        dict(tensors), max_shard_size=max_shard_size, filename_pattern=f"{WEIGHTS_STEM}{{suffix}}.safetensors"
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: tensors[name].contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt", **metadata})
    if split.is_sharded:
        index = {"metadata": {**split.metadata, **metadata}, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{WEIGHTS_STEM}.safetensors.index.json", index)
