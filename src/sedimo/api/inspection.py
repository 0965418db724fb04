"""Looking at sources, recipes and checkpoints without running anything."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sedimo.api import verbs
from sedimo.api.describing import owners_of, recipe_of
from sedimo.errors import InputError
from sedimo.graph.summary import inspect_summary
from sedimo.pipelines.loading import load_architecture, load_pipeline, locate
from sedimo.pipelines.weights import FileWeights, denoiser_folder, stored_dtype
from sedimo.quant.entries import entry_text
from sedimo.quant.formats import FP16
from sedimo.runtime.checkpoint import Checkpoint, is_packed, open_checkpoint
from sedimo.space import Recipe


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """A layer that two recipes treat differently."""

    layer: str
    first: str
    second: str


def inspect_source(source: str, variant: str | None = None) -> dict[str, object]:
    """What `sedimo inspect --json` prints: layers, operation types, blocks, groups, sizes, MACs.

    Of a packed checkpoint, each layer has its `format` too.

    Raises:
        InputError: the source cannot be used, or was quantized by another tool.
        StateError: a damaged checkpoint.
    """
    _, folder = locate(source, variant)
    inner = denoiser_folder(folder)
    if not is_packed(inner):
        dtype = stored_dtype(FileWeights(inner, variant).files)
        return dict(inspect_summary(verbs.trace(load_pipeline(inner, device="cpu", dtype=dtype, variant=variant))))
    checkpoint = open_checkpoint(inner, variant=variant)
    graph = replace(verbs.trace(load_architecture(inner)), ties=_ties(checkpoint))
    formats = {name: entry_text(entry) for name, entry in recipe_of(checkpoint).layers.items()}
    sizes = {"file_bytes": checkpoint.file_bytes, "stored_bytes": checkpoint.stored_bytes}
    return {**inspect_summary(graph, formats), **sizes}


def read_recipe(path: str) -> Recipe:
    """The recipe of a recipe file, or the one that a packed checkpoint describes.

    Raises:
        InputError: nothing there, or an entry that is no format.
        StateError: a damaged file.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return Recipe.from_json(place.read_bytes(), place=str(place))
    if not place.is_dir():
        raise InputError(f"there is no recipe file and no checkpoint at {place}")
    return recipe_of(open_checkpoint(denoiser_folder(place)))


def differences(first: Recipe, second: Recipe) -> tuple[LayerDifference, ...]:
    """Layers whose formats differ, in the order of the first recipe."""
    names = dict.fromkeys([*first.layers, *second.layers])
    if first.layers and second.layers and not first.layers.keys() & second.layers.keys():
        raise InputError("the two have no layer in common: they are of different denoisers")
    pairs = ((n, *(entry_text(recipe.layers.get(n, FP16)) for recipe in (first, second))) for n in names)
    return tuple(LayerDifference(*pair) for pair in pairs if pair[1] != pair[2])


def _ties(checkpoint: Checkpoint) -> tuple[tuple[str, ...], ...]:
    """The sets of layers that are stored once."""
    sets: dict[str, list[str]] = {}
    for name, owner in owners_of(checkpoint).items():
        sets.setdefault(owner, []).append(name)
    return tuple(tuple(members) for members in sets.values() if len(members) > 1)
