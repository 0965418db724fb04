"""Looking at sources, recipes and checkpoints without running anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sedimo.api import verbs
from sedimo.errors import InputError
from sedimo.graph.model import DenoiserGraph
from sedimo.graph.summary import inspect_summary
from sedimo.pipelines.loading import load_pipeline, locate
from sedimo.pipelines.weights import FileWeights, denoiser_folder, stored_dtype
from sedimo.quant.formats import FP16, Format
from sedimo.runtime.checkpoint import open_checkpoint
from sedimo.runtime.layout import LayerEntry, TiedEntry
from sedimo.space import PartFormat, Recipe


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """A layer that two recipes treat differently."""

    layer: str
    first: str
    second: str


def inspect_source(source: str, variant: str | None = None) -> dict[str, object]:
    """What `sedimo inspect --json` prints: layers, operation types, blocks, groups, sizes, MACs.

    Raises:
        InputError: the source cannot be used or is quantized already.
    """
    return dict(inspect_summary(trace_source(source, variant)))


def trace_source(source: str, variant: str | None = None) -> DenoiserGraph:
    """The graph of a source's denoiser."""
    _, folder = locate(source, variant)
    inner = denoiser_folder(folder)
    dtype = stored_dtype(FileWeights(inner, variant).files)
    return verbs.trace(load_pipeline(str(inner), device="cpu", dtype=dtype, variant=variant))


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
    layers = open_checkpoint(denoiser_folder(place)).layers
    owners = {name: entry.same_as if isinstance(entry, TiedEntry) else name for name, entry in layers.items()}
    entries = {name: e for name, e in layers.items() if isinstance(e, LayerEntry)}
    return Recipe({name: _formats(entries[owner]) for name, owner in owners.items()})


def differences(first: Recipe, second: Recipe) -> tuple[LayerDifference, ...]:
    """Layers whose formats differ, in the order of the first recipe."""
    names = dict.fromkeys([*first.layers, *second.layers])
    pairs = ((n, _text(first.layers.get(n, FP16)), _text(second.layers.get(n, FP16))) for n in names)
    return tuple(LayerDifference(*pair) for pair in pairs if pair[1] != pair[2])


def _formats(entry: LayerEntry) -> Format | tuple[PartFormat, ...]:
    if len(entry.parts) == 1:
        return entry.parts[0].format
    return tuple(PartFormat(p.start, p.stop, p.format) for p in entry.parts)


def _text(entry: Format | tuple[PartFormat, ...]) -> str:
    if isinstance(entry, Format):
        return str(entry)
    return " | ".join(f"{p.start}..{p.stop} {p.format}" for p in entry)
