"""The recipe of a packed checkpoint, and the texts that are saved beside one."""

from __future__ import annotations

from pathlib import Path

import torch

from sedimo.checkpoint.layout import LayerEntry
from sedimo.checkpoint.reading import Checkpoint, is_packed, open_checkpoint
from sedimo.checkpoint.writing import CARD_NAME, Origin, card_of, write_card
from sedimo.errors import InputError
from sedimo.pipelines.diffusers import Finish
from sedimo.pipelines.weights import denoiser_folder
from sedimo.quant.formats import FP16
from sedimo.quant.parts import Entry, PartFormat
from sedimo.space import Recipe

MOST_NOISE = 1.0  # of a packed weight relative to its source: what rounding everything to zero would leave


def recipe_of(checkpoint: Checkpoint) -> Recipe:
    """The formats of all layers that are packed or whose inputs are rounded, those that share a weight included."""
    told = checkpoint.configuration
    weights = {name: _formats(told.layers[owner]) for name, owner in told.owners.items()}
    bits = {name: quantizer.bits for name, quantizer in told.inputs.layers.items()}
    return Recipe(dict.fromkeys(bits, FP16) | weights).with_activations(bits)


def refuse_other_source(layer: str, weight: torch.Tensor, packed: torch.Tensor) -> None:
    """Refuses a full-precision weight that a packed one cannot have been made from."""
    if weight.shape != packed.shape:
        raise InputError(
            f"layer {layer!r} has a weight of shape {tuple(packed.shape)} in the checkpoint and "
            f"{tuple(weight.shape)} in the source; give the source that the checkpoint was made from"
        )
    wide = weight.double()
    noise = float((packed.double() - wide).square().sum() / wide.square().sum().clamp_min(1e-300))
    if noise > MOST_NOISE:
        raise InputError(
            f"layer {layer!r} of the checkpoint differs from the source by {noise:.2g} of its power, more than any "
            f"quantization leaves ({MOST_NOISE}); give the source that the checkpoint was made from"
        )


def read_recipe(path: str) -> Recipe:
    """The recipe of a recipe file, or the one that a packed checkpoint describes."""
    place = Path(path).expanduser()
    if place.is_file():
        return Recipe.from_json(place.read_bytes(), place=str(place))
    if not place.is_dir():
        raise InputError(f"there is no recipe file and no checkpoint at {place}")
    return recipe_of(open_checkpoint(denoiser_folder(place)))


def card_writer(name: str, source: Path | None) -> Finish:
    """Adds model card and recipe to a folder that is being saved, if its denoiser is packed.

    The base model is `name`; if `source` is packed itself, what its card says; and unknown without a source.
    """
    base_model = "" if source is None else name
    if source is not None and is_packed(home := denoiser_folder(source)):
        names = (card_of(place / CARD_NAME).get("base_model") for place in (source, home))
        base_model = next((str(name) for name in names if name), "")

    def finish(folder: Path, placed: str) -> None:
        home = denoiser_folder(folder)
        checkpoint = open_checkpoint(home) if is_packed(home) else None
        if checkpoint is not None and checkpoint.configuration.layers:
            origin = Origin(base_model, recipe_json=recipe_of(checkpoint).to_json())
            write_card(folder, origin, checkpoint, placed)

    return finish


def _formats(entry: LayerEntry) -> Entry:
    if len(entry.parts) == 1:
        return entry.parts[0].format
    return tuple(PartFormat(p.start, p.stop, p.format) for p in entry.parts)
