"""Which files of a component's folder hold its weights: plain or a variant, one file or shards with an index."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sedimo.codec import parse_json
from sedimo.errors import InputError, StateError

WEIGHTS_STEM = "diffusion_pytorch_model"  # models of diffusers; those of transformers are called `model`
WEIGHTS_STEMS = (WEIGHTS_STEM, "model")
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5")

DTYPES: dict[str, torch.dtype] = {  # by their names in safetensors files
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}

_SHARD = r"-\d{5}-of-\d{5}"
_VARIANT = rf"(?:\.(?P<variant>(?![\w-]*{_SHARD})[\w-]+))?"


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files of one set of weights, its index (tensor name to file name) if it is in shards, and its variant."""

    files: tuple[Path, ...]
    index: Path | None
    weight_map: Mapping[str, str] | None
    variant: str | None


@dataclass(frozen=True, slots=True)
class FileHeader:
    """Shape and dtype of a file's tensors, its metadata and size; a dtype may be one that `DTYPES` does not list."""

    path: Path
    tensors: Mapping[str, tuple[tuple[int, ...], str]]
    metadata: Mapping[str, str]
    file_bytes: int


def read_header(path: Path) -> FileHeader:
    """The header of a safetensors file; no tensor is read.

    Raises:
        StateError: the file is missing, no safetensors file, or its sizes contradict each other.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
            tensors = {key: (tuple(s.get_shape()), str(s.get_dtype())) for key, s in slices.items()}
            return FileHeader(path, tensors, file.metadata() or {}, path.stat().st_size)
    except (SafetensorError, OSError) as error:
        raise StateError(f"{path} is not a complete safetensors file: {error}. Copy or download it again") from error


def variants(folder: Path, stem: str) -> tuple[str | None, ...]:
    """The variants of weights in a folder, None for the plain ones, which come first."""
    single = re.compile(rf"{re.escape(stem)}{_VARIANT}\.safetensors")
    index = re.compile(rf"{re.escape(stem)}\.safetensors\.index{_VARIANT}\.json")
    matches = (single.fullmatch(p.name) or index.fullmatch(p.name) for p in folder.iterdir())
    return tuple(sorted({m["variant"] for m in matches if m}, key=lambda v: v or ""))


def find_weights(folder: Path, stem: str, variant: str | None) -> WeightFiles:
    """The weights of a component, of the variant asked for; else the plain ones; else the only variant there is.

    Raises:
        InputError: no safetensors, no such variant, or several variants and no plain weights.
        StateError: the index is damaged or names a file that is missing.
    """
    present = variants(folder, stem)
    if not present:
        raise InputError(_nothing_to_read(folder, stem))
    chosen = variant if variant is not None else present[0]
    if chosen not in present or (variant is None and chosen is not None and len(present) > 1):
        names = ", ".join(v or "(plain)" for v in present)
        raise InputError(f"{folder} has weights of the variants {names}, not {variant or 'plain'}; choose one of them")
    middle = f".{chosen}" if chosen else ""
    single = folder / f"{stem}{middle}.safetensors"
    if single.is_file():
        return WeightFiles((single,), None, None, chosen)
    index = folder / f"{stem}.safetensors.index{middle}.json"
    weight_map = _read_index(index)
    return WeightFiles(tuple(folder / n for n in sorted(set(weight_map.values()))), index, weight_map, chosen)


def component_files(folder: Path, variant: str | None) -> dict[str, Path]:
    """A component's files by their new names; of its weights one variant, safetensors where there are any."""
    every = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    stems = [stem for stem in WEIGHTS_STEMS if variants(folder, stem)]
    if not stems:
        return every
    found = {name: path for name, path in every.items() if not is_weight_file(path.name)}
    for stem in stems:
        weights = find_weights(folder, stem, variant if variant in variants(folder, stem) else None)
        if weights.index is None:
            found[f"{stem}.safetensors"] = weights.files[0]
        else:
            found |= {f"{stem}.safetensors.index.json": weights.index, **{file.name: file for file in weights.files}}
    return found


def is_weight_file(name: str) -> bool:
    """Whether a file of a component holds weights, in any form, or is an index of them."""
    suffix = Path(name).suffix
    return (
        suffix in (".safetensors", ".onnx", ".onnx_data", ".gguf", *PICKLE_SUFFIXES)
        or re.search(r"\.index(\.[A-Za-z0-9_-]+)?\.json$", name) is not None
    )


def _read_index(index: Path) -> dict[str, str]:
    plain = parse_json(index.read_bytes(), place=str(index))
    weight_map = plain.get("weight_map") if isinstance(plain, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise StateError(f"{index} must hold an object `weight_map` of tensor names to file names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise StateError(f"{index}: tensor {name!r} must be in a safetensors file beside the index, got {file!r}")
        if not (index.parent / file).is_file():
            raise StateError(f"{index} names the file {file}, which is missing; copy or download the folder again")
    return weight_map


def _nothing_to_read(folder: Path, stem: str) -> str:
    pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in PICKLE_SUFFIXES]
    if pickles:
        return (
            f"{folder} holds its weights only as {pickles[0]}, a format that can execute code when it is read. "
            "Sedimo reads safetensors only: load it where you trust it and save it again with "
            "save_pretrained(..., safe_serialization=True), or get a revision that has safetensors"
        )
    return f"{folder} holds no weights {stem}*.safetensors"
