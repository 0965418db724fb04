"""Where a bank keeps fitted parameters and candidates: in memory, or in a folder that survives a kill.

The folder belongs to one set of weights: `bank.sqlite` holds candidates, one safetensors file per decision the
scales and codebooks of its formats. A file is written whole under another name and then renamed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sedimo.codec import from_json, to_json
from sedimo.errors import StateError
from sedimo.quant.formats import Format
from sedimo.quant.parts import Fitted
from sedimo.store import Rows

_SUMS = "sums"  # squared error and squared norm, float64 [2]
_SHAPE = "shape"
Record = TypeVar("Record")


class BankCache:
    """Parameters by (decision, format) and candidates by key; `folder` None keeps them in memory."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: dict[str, dict[Format, Fitted]] = {}
        self._rows = Rows(folder / "bank.sqlite") if folder else None
        self._candidates: dict[str, object] = {}

    def candidate(self, kind: type[Record], key: str) -> Record | None:
        """The saved candidate of a key, or None."""
        if self._rows is None:
            found = self._candidates.get(key)
            return found if isinstance(found, kind) else None
        text = self._rows.get("candidate", key)
        return None if text is None else from_json(kind, text, place=f"candidate {key[:12]} of the bank")

    def put_candidates(self, candidates: Mapping[str, object]) -> None:
        """Saves candidates by key."""
        if self._rows is None:
            self._candidates |= candidates
        else:
            self._rows.put_many("candidate", [(key, to_json(c)) for key, c in candidates.items()])

    def parameters(self, decision: str) -> dict[Format, Fitted]:
        """The fitted parameters of a decision by format.

        Raises:
            StateError: the saved file is damaged.
        """
        if self._folder is None:
            return self._memory.get(decision, {})
        path = _path(self._folder, decision)
        return _read(path) if path.exists() else {}

    def put_parameters(self, decision: str, fitted: Mapping[Format, Fitted]) -> None:
        """Keeps fitted parameters."""
        known = {**self.parameters(decision), **fitted}
        if self._folder is None:
            self._memory[decision] = known
        else:
            _write(_path(self._folder, decision), known)


def _path(folder: Path, decision: str) -> Path:
    return folder / f"{hashlib.sha256(decision.encode()).hexdigest()[:32]}.safetensors"


def _write(path: Path, known: Mapping[Format, Fitted]) -> None:
    own = {f"{f}.{name}": t for f, fitted in known.items() for name, t in _tensors(fitted).items()}
    tensors = {name: t.clone(memory_format=torch.contiguous_format) for name, t in own.items()}  # formats may share one
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _tensors(fitted: Fitted) -> dict[str, torch.Tensor]:
    sums = torch.tensor([fitted.squared_error, fitted.squared_norm], dtype=torch.float64)
    return {**fitted.parameters, _SUMS: sums, _SHAPE: torch.tensor(fitted.shape)}


def _read(path: Path) -> dict[Format, Fitted]:
    found: dict[Format, dict[str, torch.Tensor]] = {}
    try:
        for name, tensor in load_file(path).items():
            text, _, field = name.rpartition(".")
            found.setdefault(Format.parse(text), {})[field] = tensor
        return {f: _fitted(f, tensors) for f, tensors in found.items()}
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise StateError(f"{path} in the bank's cache is damaged: {error!r}. Delete it to fit it again") from error


def _fitted(number_format: Format, tensors: Mapping[str, torch.Tensor]) -> Fitted:
    squared_error, squared_norm = tensors[_SUMS].tolist()
    shape = tuple(int(size) for size in tensors[_SHAPE])
    parameters = {name: t for name, t in tensors.items() if name not in (_SUMS, _SHAPE)}
    return Fitted(number_format, shape, parameters, None, squared_error, squared_norm)
