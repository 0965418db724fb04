"""Reads the headers of safetensors files and nothing behind them, so that a checkpoint is judged before it is loaded.

A safetensors file is 8 bytes (length of the header, little-endian), the header (JSON: tensor name -> dtype,
shape, offsets; and `__metadata__`, strings), and the tensors' bytes without holes. Each way in which a file can
be wrong has its own message.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sedimo.codec import parse_json
from sedimo.errors import StateError
from sedimo.quant.parts import TensorSpec

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors itself
DTYPES: dict[str, torch.dtype] = {
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
_REMEDY = "Copy or download it again."


@dataclass(frozen=True, slots=True)
class FileHeader:
    """Names, dtypes and shapes of the tensors of one file, its metadata, and its sizes [bytes]."""

    path: Path
    tensors: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]
    header_bytes: int
    file_bytes: int


def read_header(path: Path) -> FileHeader:
    """The header of a safetensors file.

    Raises:
        StateError: the file is missing, too short, no safetensors file, or its sizes contradict each other.
    """
    if not path.is_file():
        raise StateError(f"{path} is missing: the checkpoint is not complete. {_REMEDY}")
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if file_bytes < _LENGTH_BYTES or header_bytes > _MAX_HEADER_BYTES:
            raise StateError(f"{path} is not a safetensors file ({file_bytes} bytes). {_REMEDY}")
        if _LENGTH_BYTES + header_bytes > file_bytes:
            raise StateError(
                f"{path} is truncated or no safetensors file: its header needs {header_bytes} bytes, "
                f"the file has {file_bytes}. {_REMEDY}"
            )
        plain = parse_json(file.read(header_bytes), place=f"the header of {path}")
    if not isinstance(plain, dict):
        raise StateError(f"the header of {path} must be an object, got {type(plain).__name__}. {_REMEDY}")
    metadata = plain.pop("__metadata__", {})
    spans = {name: _read_tensor(entry, f"tensor {name!r} in the header of {path}") for name, entry in plain.items()}
    _check_spans(path, [span for _, *span in spans.values()], file_bytes - _LENGTH_BYTES - header_bytes)
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise StateError(f"the metadata of {path} must be strings. {_REMEDY}")
    return FileHeader(path, {n: spec for n, (spec, *_) in spans.items()}, metadata, header_bytes, file_bytes)


def read_headers(paths: Iterable[Path]) -> tuple[FileHeader, ...]:
    """The headers of all files of a checkpoint.

    Raises:
        StateError: as `read_header`, or a tensor lies in two files.
    """
    headers = tuple(read_header(path) for path in paths)
    homes: dict[str, Path] = {}
    for header in headers:
        for name in header.tensors:
            if name in homes:
                raise StateError(f"tensor {name!r} lies in both {homes[name].name} and {header.path.name}")
            homes[name] = header.path
    return headers


def _read_tensor(entry: object, place: str) -> tuple[TensorSpec, int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise StateError(f"{place} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise StateError(f"{place}: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise StateError(f"{place}: shape and data_offsets must be lists of sizes")
    n_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != n_bytes:
        raise StateError(f"{place} lies: {dtype} {shape} takes {n_bytes} bytes, its offsets are {offsets}")
    return TensorSpec(DTYPES[dtype], tuple(shape)), offsets[0], offsets[1]


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _check_spans(path: Path, spans: list[list[int]], n_bytes: int) -> None:
    position = 0
    for start, stop in sorted(spans):
        if start != position:
            raise StateError(f"{path} has a hole or an overlap at byte {position} of its data. {_REMEDY}")
        position = stop
    if position != n_bytes:
        word = "truncated" if position > n_bytes else "too long"
        raise StateError(f"{path} is {word}: its tensors take {position} bytes, the file has {n_bytes}. {_REMEDY}")
