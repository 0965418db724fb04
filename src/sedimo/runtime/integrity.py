"""The seal of a weights file: version, the configuration it belongs to, and a checksum per tensor.

The seal lies in the metadata of the safetensors file (docs/formats.md) and tells a damaged or exchanged file
from a good one. It guards against accidents, not against an attacker, who can write a new seal.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from sedimo.errors import StateError
from sedimo.runtime.header import FileHeader
from sedimo.runtime.layout import FORMAT_VERSION, Configuration, version_error

_VERSION, _LAYERS, _CHECKSUMS = "sedimo_format", "sedimo_layers", "sedimo_crc32"
_DIGITS = 8  # hexadecimal digits of a CRC-32


@dataclass(frozen=True, slots=True)
class Seal:
    """CRC-32 of every tensor of a checkpoint, in the order of their sorted names, eight hexadecimal digits each."""

    digits: str

    def checksums(self, names: Iterable[str]) -> dict[str, str]:
        """The checksums by tensor name.

        Raises:
            StateError: the checkpoint was written with another number of tensors.
        """
        ordered, n_sealed = sorted(names), len(self.digits) // _DIGITS
        if len(ordered) != n_sealed:
            word = "missing" if len(ordered) < n_sealed else "extra"
            raise StateError(
                f"tensors are {word}: the checkpoint was written with {n_sealed}, its files hold {len(ordered)}. "
                "Copy or download it again."
            )
        return {name: self.digits[i * _DIGITS : (i + 1) * _DIGITS] for i, name in enumerate(ordered)}


def make_seal(tensors: Mapping[str, torch.Tensor], configuration: Configuration) -> dict[str, str]:
    """The metadata that seals a checkpoint of these tensors (over all of its files)."""
    digits = "".join(checksum(tensors[name]) for name in sorted(tensors))
    return {_VERSION: str(FORMAT_VERSION), _LAYERS: configuration.key, _CHECKSUMS: digits}


def read_seal(headers: Iterable[FileHeader], configuration: Configuration) -> Seal:
    """The seal of a checkpoint's files, after checking that they belong together and to the configuration.

    Raises:
        StateError: a file was not written by Sedimo, by another version, or belongs to another checkpoint.
    """
    found = set()
    for header in headers:
        if _VERSION not in header.metadata:
            raise StateError(
                f"{header.path} is a foreign file: its metadata has no {_VERSION!r}, so Sedimo did not write it. "
                "Take the weights file that belongs to this config.json."
            )
        if header.metadata[_VERSION] != str(FORMAT_VERSION):
            raise version_error(header.metadata[_VERSION], str(header.path))
        if header.metadata.get(_LAYERS) != configuration.key:
            raise StateError(
                f"{header.path} belongs to another checkpoint: it was written for other layers than those of "
                "config.json. Take the two files from the same folder."
            )
        found.add(header.metadata.get(_CHECKSUMS, ""))
    if len(found) != 1:
        raise StateError("the shards of the checkpoint were not written together. Copy or download them again.")
    return Seal(found.pop())


def check_tensors(tensors: Mapping[str, torch.Tensor], checksums: Mapping[str, str]) -> None:
    """Compares tensors as read with the checksums written.

    Raises:
        StateError: a tensor has changed since it was written, naming it.
    """
    for name, tensor in tensors.items():
        if checksums.get(name) != checksum(tensor):
            raise StateError(
                f"tensor {name!r} is damaged: its checksum is {checksum(tensor)}, it was written with "
                f"{checksums.get(name)}. Copy or download the checkpoint again."
            )


def checksum(tensor: torch.Tensor) -> str:
    """CRC-32 of a tensor's bytes as they lie in the file, eight hexadecimal digits."""
    flat = tensor.detach().contiguous().reshape(-1).cpu()
    data: memoryview = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy arrays are buffers
    return f"{zlib.crc32(data):08x}"
