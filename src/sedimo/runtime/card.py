"""The model card of a packed checkpoint: what it is, how to load it, which bits went where, how it was made."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, metadata_load
from yaml import YAMLError

from sedimo.quant.formats import FULL_BITS
from sedimo.runtime.layout import LayerEntry, Layers, TiedEntry, packed_tensors

CARD_NAME, BASE_CARD_NAME = "README.md", "README.base.md"
_TEMPLATE = "card.md.j2"
_TAGS = ("sedimo", "quantized")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a checkpoint comes from: texts for its card, and the recipe file that goes with it.

    `base_model` is a hub id or a name, empty where nobody knows; `smoothing` says how inputs were smoothed, empty if
    they were not.
    """

    base_model: str
    method: str = ""
    recipe_json: str | None = None
    smoothing: str = ""


def model_card(origin: Origin, layers: Layers, *, is_pipeline: bool, denoiser_class: str, placed: str) -> str:
    """README.md of a checkpoint; `placed` says how other components' files came there, empty if there are none."""
    relation = "quantized" if origin.base_model else None
    data = ModelCardData(
        library_name="diffusers", tags=list(_TAGS), base_model=origin.base_model or None, base_model_relation=relation
    )
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name(_TEMPLATE)),
        origin=origin,
        layers=layers,
        n_shared=sum(isinstance(entry, TiedEntry) for entry in layers.values()),
        operations=_operations(layers),
        full_bits=FULL_BITS,
        stored_bits=stored_bits,
        n_weights=_n_weights,
        formats=_formats,
        loader="DiffusionPipeline" if is_pipeline else denoiser_class,
        denoiser_class=denoiser_class,
        placed=placed,
    )
    return f"{card.content.rstrip()}\n"


def is_card(path: Path) -> bool:
    """Whether a file is a model card that Sedimo wrote."""
    tags = _metadata(path).get("tags")
    return isinstance(tags, list) and set(_TAGS) <= set(map(str, tags))


def base_model_of(path: Path) -> str:
    """The base model that a card of Sedimo names; empty if it names none, or the file is no such card."""
    return str(_metadata(path).get("base_model", "")) if is_card(path) else ""


def operation_of(layer: str) -> str:
    """A layer's path without its indices: the same operation in every block."""
    return re.sub(r"\.\d+(?=\.|$)", "", layer)


def stored_bits(layers: Layers) -> float:
    """Bits per weight of the tensors that replace the packed weights; shared ones count once."""
    n_weights = _n_weights(layers)
    return 8 * sum(spec.n_bytes for spec in packed_tensors(layers).values()) / n_weights if n_weights else 0.0


def _n_weights(layers: Layers) -> int:
    return sum(math.prod(entry.shape) for entry in layers.values() if isinstance(entry, LayerEntry))


def _formats(layers: Layers) -> str:
    whole = [entry for entry in layers.values() if isinstance(entry, LayerEntry)]
    return ", ".join(sorted({str(part.format) for entry in whole for part in entry.parts}))


def _operations(layers: Layers) -> dict[str, dict[str, LayerEntry]]:
    groups: dict[str, dict[str, LayerEntry]] = {}
    for name, entry in layers.items():
        if isinstance(entry, LayerEntry):
            groups.setdefault(operation_of(name), {})[name] = entry
    return groups


def _metadata(path: Path) -> Mapping[str, object]:
    """The YAML block at a card's head; empty where there is none that can be read."""
    try:
        return metadata_load(path) or {} if path.is_file() else {}
    except (ValueError, YAMLError):
        return {}
