"""The model card of a packed checkpoint: what it is, how to load it, which bits went where, how it was made."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sedimo.codec import parse_json
from sedimo.quant.formats import FULL_BITS
from sedimo.runtime.layout import LayerEntry, TiedEntry, packed_tensors

CARD_NAME, BASE_CARD_NAME = "README.md", "README.base.md"
_OURS = re.compile(r"---\nlibrary_name: diffusers\n(?:base_model: (?P<base>\".*\")\n)?(?:.+\n)*?tags:\n- sedimo\n")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a checkpoint comes from: texts for its card, and the recipe file that goes with it.

    `base_model` is a hub id or a name, empty where nobody knows; `notes` are lines about quality, each with its n and
    error bar; `smoothing` says how inputs were smoothed, empty if they were not.
    """

    base_model: str
    method: str = ""
    command: str = ""
    recipe_json: str | None = None
    notes: Sequence[str] = ()
    smoothing: str = ""


def model_card(
    origin: Origin,
    layers: Mapping[str, LayerEntry | TiedEntry],
    *,
    is_pipeline: bool,
    denoiser_class: str,
    placed: str,
) -> str:
    """README.md of a checkpoint; `placed` says how other components' files came there, empty if there are none."""
    loader = "DiffusionPipeline" if is_pipeline else denoiser_class
    base = [f"base_model: {json.dumps(origin.base_model)}", "base_model_relation: quantized"]
    lines = [
        *("---", "library_name: diffusers", *(base if origin.base_model else []), "tags:", "- sedimo", "- quantized"),
        *("---", "", f"# {origin.base_model or denoiser_class}, quantized by Sedimo", ""),
        f"The weights of the denoiser ({denoiser_class}) are stored packed: {_summary(layers)}.",
        *("", "```python", "import sedimo  # teaches diffusers to read the packed weights"),
        *(f"from diffusers import {loader}", "", f'pipe = {loader}.from_pretrained("path/to/this/folder")', "```", ""),
        *("## Bits per operation", "", "| operation | layers | weights | formats | stored bits per weight |"),
        *("|---|---|---|---|---|", *_operation_rows(layers), ""),
        *("## How it was made", ""),
        *(f"- {line}" for line in _history(origin, placed)),
        *(["", "## Notes", "", *(f"- {note}" for note in origin.notes)] if origin.notes else []),
    ]
    return "\n".join(lines) + "\n"


def is_card(path: Path) -> bool:
    """Whether a file is a model card that Sedimo wrote."""
    return _own_header(path) is not None


def base_model_of(path: Path) -> str:
    """The base model that a card of Sedimo names; empty if it names none, or the file is no such card."""
    header = _own_header(path)
    return str(parse_json(header["base"], place=str(path))) if header is not None and header["base"] else ""


def operation_of(layer: str) -> str:
    """A layer's path without its indices: the same operation in every block."""
    return re.sub(r"\.\d+(?=\.|$)", "", layer)


def stored_bits(entries: Mapping[str, LayerEntry | TiedEntry]) -> float:
    """Bits per weight of the tensors that replace the packed weights; shared ones count once."""
    n_weights = sum(math.prod(e.shape) for e in entries.values() if isinstance(e, LayerEntry))
    return 8 * sum(spec.n_bytes for spec in packed_tensors(entries).values()) / n_weights if n_weights else 0.0


def _summary(layers: Mapping[str, LayerEntry | TiedEntry]) -> str:
    n_shared = sum(isinstance(entry, TiedEntry) for entry in layers.values())
    shared = f", {n_shared} of them sharing the weight of another" if n_shared else ""
    return f"{len(layers)} layers{shared}, {stored_bits(layers):.2f} bits per weight instead of {FULL_BITS}"


def _operation_rows(layers: Mapping[str, LayerEntry | TiedEntry]) -> list[str]:
    groups: dict[str, dict[str, LayerEntry | TiedEntry]] = {}
    for name, entry in layers.items():
        if isinstance(entry, LayerEntry):
            groups.setdefault(operation_of(name), {})[name] = entry
    return [_operation_row(operation, entries) for operation, entries in groups.items()]


def _operation_row(operation: str, entries: Mapping[str, LayerEntry | TiedEntry]) -> str:
    whole = [entry for entry in entries.values() if isinstance(entry, LayerEntry)]
    formats = sorted({str(part.format) for entry in whole for part in entry.parts})
    n_weights = sum(math.prod(entry.shape) for entry in whole)
    return f"| `{operation}` | {len(whole)} | {n_weights:,} | {', '.join(formats)} | {stored_bits(entries):.2f} |"


def _history(origin: Origin, placed: str) -> list[str]:
    recipe = "`sedimo_recipe.json` in this folder holds the recipe" if origin.recipe_json else ""
    lines = [
        f"base model: {origin.base_model}" if origin.base_model else "",
        f"method: {origin.method}" if origin.method else "",
        f"command: `{origin.command}`" if origin.command else "",
        f"before packing: {origin.smoothing}" if origin.smoothing else "",
        recipe,
        f"files of other components: {placed}" if placed else "",
        "the file format is specified in Sedimo's docs/formats.md, version 1",
    ]
    return [line for line in lines if line]


def _own_header(path: Path) -> re.Match[str] | None:
    return _OURS.match(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
