"""The model card of a packed checkpoint: what it is, how to load it, which bits went where, how it was made."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sedimo.quant.formats import FULL_BITS
from sedimo.runtime.layout import LayerEntry, TiedEntry, packed_tensors


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a checkpoint comes from: texts for its card, and the recipe file that goes with it.

    `base_model` is a hub id or a name; `notes` are lines about quality, each with its n and error bar.
    """

    base_model: str
    method: str = ""
    command: str = ""
    recipe_json: str | None = None
    notes: Sequence[str] = ()


def model_card(
    origin: Origin,
    layers: Mapping[str, LayerEntry | TiedEntry],
    *,
    is_pipeline: bool,
    denoiser_class: str,
    placed: str,
) -> str:
    """README.md of a checkpoint; `placed` says whether other components were linked or copied."""
    loader = "DiffusionPipeline" if is_pipeline else denoiser_class
    lines = [
        *(
            "---",
            "library_name: diffusers",
            f"base_model: {json.dumps(origin.base_model)}",
            "base_model_relation: quantized",
        ),
        *("tags:", "- sedimo", "- quantized", "---", ""),
        *(f"# {origin.base_model}, quantized by Sedimo", ""),
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
        f"base model: {origin.base_model}",
        f"method: {origin.method}" if origin.method else "",
        f"command: `{origin.command}`" if origin.command else "",
        recipe,
        placed,
        "the file format is specified in Sedimo's docs/formats.md, version 1",
    ]
    return [line for line in lines if line]
