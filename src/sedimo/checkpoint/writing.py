"""Writes a complete folder around a packed denoiser: the other components linked or copied, the index, a model card.

The card says what the checkpoint is, how to load it, which bits went where, and how it was made.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, metadata_load
from torch import nn
from yaml import YAMLError

from sedimo.checkpoint.diffusers_plugin import MADE_BY
from sedimo.checkpoint.layout import LayerEntry, Layers, packed_tensors, whole
from sedimo.checkpoint.reading import Checkpoint, change_layers, open_checkpoint, write_json
from sedimo.checkpoint.weights import MAX_SHARD_SIZE, save_denoiser
from sedimo.codec import parse_json
from sedimo.errors import InputError, StateError
from sedimo.pipelines.folder import new_folder, place_file
from sedimo.pipelines.weights import component_files
from sedimo.quant.formats import FULL_BITS
from sedimo.quant.tensor import QuantizedTensor

INDEX_NAME, RECIPE_NAME = "model_index.json", "sedimo_recipe.json"
CARD_NAME, BASE_CARD_NAME = "README.md", "README.base.md"
_TEMPLATE = "card.md.j2"
_TAGS = ("sedimo", "quantized")
_COMPONENT = re.compile(r"\w[\w.-]*")
_KEPT = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md")


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


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """How a folder is written.

    `link` makes hard links of the other components' files where possible: no space is used twice, but whoever later
    writes into such a file changes the source, too. `variant` names the weights of the other components to take
    (`fp16`), plain ones where a component has no such variant.
    """

    link: bool = False
    overwrite: bool = False
    variant: str | None = None
    max_shard_size: int | str = MAX_SHARD_SIZE


@dataclass(frozen=True, slots=True)
class WrittenCheckpoint:
    """A folder that was written, and its sizes [bytes].

    `file_bytes` are the denoiser's weight files: headers, then `stored_bytes` of packed layers and `plain_bytes` of
    all other tensors. `linked` and `copied` name the other components' files, relative to `folder`.
    """

    folder: Path
    denoiser_folder: Path
    file_bytes: int
    stored_bytes: int
    plain_bytes: int
    linked: tuple[str, ...]
    copied: tuple[str, ...]


_DEFAULT = WriteOptions()
Finish = Callable[[Path, WrittenCheckpoint], None]


def write_checkpoint(
    source: Path,
    out: Path,
    denoiser: nn.Module,
    origin: Origin,
    *,
    component: str | None = None,
    options: WriteOptions = _DEFAULT,
    finish: Finish | None = None,
) -> WrittenCheckpoint:
    """Writes the folder `out`: `source` with its denoiser replaced by a packed one.

    `source` is a pipeline's folder and `component` the denoiser's folder in it, or `source` is a denoiser's folder and
    `component` None. The other components keep their bytes; of several variants of their weights one is taken, under
    its plain name, so that `from_pretrained(out)` needs no variant. `finish` may add files to the folder before it
    takes the place of `out`; it gets the folder and the record.

    Raises:
        InputError: `out` is in use or overlaps `source`, there is no such component, or nothing is packed.
        StateError: as `save_denoiser`.
    """

    def fill(home: Path) -> None:
        save_denoiser(denoiser, home, max_shard_size=options.max_shard_size)
        config = parse_json((home / "config.json").read_bytes(), place=str(home / "config.json"))
        config.pop("_name_or_path", None)  # the path that the denoiser was loaded from
        write_json(home / "config.json", config)

    _check_places(source, out, component)
    return _write(source, out, component, fill, origin=origin, options=options, finish=finish)


def replace_layer_format(
    source: Path,
    out: Path,
    weights: Mapping[str, QuantizedTensor],
    origin: Origin,
    *,
    component: str | None = None,
    options: WriteOptions = _DEFAULT,
) -> WrittenCheckpoint:
    """Writes the packed folder `source` anew with other packed weights for some layers; all else keeps its bytes.

    Nothing is fitted again. A layer that shares its weight changes together with those that it shares it with.
    """

    def fill(home: Path) -> None:
        change_layers(old, home, weights, made_by=MADE_BY, max_shard_size=options.max_shard_size)

    _check_places(source, out, component)
    old = open_checkpoint(source / component if component else source)
    return _write(source, out, component, fill, origin=origin, options=options)


def _check_places(source: Path, out: Path, component: str | None) -> None:
    home = source / component if component else source
    if not (home / "config.json").is_file():
        raise InputError(f"{home} is no denoiser's folder: it has no config.json")
    if component and not (source / INDEX_NAME).is_file():
        raise InputError(f"{source} is no pipeline's folder: it has no {INDEX_NAME}")
    here, there = source.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise InputError(f"the output folder {out} must lie outside the source folder {source}")


def _write(
    source: Path,
    out: Path,
    component: str | None,
    fill: Callable[[Path], None],
    *,
    origin: Origin,
    options: WriteOptions,
    finish: Finish | None = None,
) -> WrittenCheckpoint:
    """The folder `out` around a denoiser's folder that `fill` fills, with everything else of the source."""
    with new_folder(out, overwrite=options.overwrite) as folder:
        home = folder / component if component else folder
        home.mkdir(exist_ok=True)
        fill(home)
        is_linked = {
            name: place_file(path, folder / name, link=options.link and name != INDEX_NAME)
            for name, path in _other_files(source, component, options.variant).items()
        }
        linked = tuple(name for name, is_link in is_linked.items() if is_link)
        copied = tuple(name for name, is_link in is_linked.items() if not is_link)
        checkpoint = open_checkpoint(home)
        write_card(folder, origin, checkpoint, f"{len(linked)} linked to the source folder, {len(copied)} copied")
        base_card = source / (BASE_CARD_NAME if is_card(source / CARD_NAME) else CARD_NAME)
        if base_card.is_file():
            place_file(base_card, folder / BASE_CARD_NAME, link=False)
        sizes = checkpoint.file_bytes, checkpoint.stored_bytes, checkpoint.plain_bytes
        written = WrittenCheckpoint(out, out / component if component else out, *sizes, linked, copied)
        if finish is not None:
            finish(folder, written)
    return written


def _other_files(source: Path, component: str | None, variant: str | None) -> dict[str, Path]:
    """Everything of a source but its denoiser and its card, by name in the new folder."""
    files = {name: source / name for name in _KEPT if (source / name).is_file()}
    if component is None:
        return files
    index = source / INDEX_NAME
    names = parse_json(index.read_bytes(), place=str(index))
    if not isinstance(names, dict):
        raise StateError(f"{index} must be an object of component names, got {type(names).__name__}")
    files[INDEX_NAME] = index
    for name in names:
        if name != component and _COMPONENT.fullmatch(name) and (source / name).is_dir():
            inner = component_files(source / name, variant)
            files |= {f"{name}/{path}": file for path, file in inner.items()}
    return files


def write_card(folder: Path, origin: Origin, checkpoint: Checkpoint, placed: str) -> None:
    """Puts the model card and the recipe into a folder; `placed` says how other components' files came there."""
    layers, denoiser_class = checkpoint.layers, str(checkpoint.config.get("_class_name", "the denoiser's class"))
    operations: dict[str, dict[str, LayerEntry]] = {}
    for name, entry in whole(layers).items():
        operations.setdefault(operation_of(name), {})[name] = entry
    data = ModelCardData(
        library_name="diffusers",
        tags=list(_TAGS),
        base_model=origin.base_model or None,
        base_model_relation="quantized" if origin.base_model else None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name(_TEMPLATE)),
        origin=origin,
        layers=layers,
        n_shared=len(layers) - len(whole(layers)),
        operations=operations,
        full_bits=FULL_BITS,
        stored_bits=_stored_bits,
        n_weights=_n_weights,
        formats=lambda some: ", ".join(sorted({str(part.format) for e in whole(some).values() for part in e.parts})),
        loader="DiffusionPipeline" if (folder / INDEX_NAME).is_file() else denoiser_class,
        denoiser_class=denoiser_class,
        placed=placed,
    )
    (folder / CARD_NAME).write_text(f"{card.content.rstrip()}\n", encoding="utf-8")
    if origin.recipe_json is not None:
        (folder / RECIPE_NAME).write_text(origin.recipe_json, encoding="utf-8")


def is_card(path: Path) -> bool:
    """Whether a file is a model card that Sedimo wrote."""
    tags = _metadata(path).get("tags")
    return isinstance(tags, list) and set(_TAGS) <= set(map(str, tags))


def base_model_of(path: Path) -> str:
    """The base model that a card of Sedimo names; empty if it names none, or the file is no such card."""
    return str(_metadata(path).get("base_model", "")) if is_card(path) else ""


def _metadata(path: Path) -> Mapping[str, object]:
    """The YAML block at a card's head; empty where there is none that can be read."""
    try:
        return metadata_load(path) or {} if path.is_file() else {}
    except (ValueError, YAMLError):
        return {}


def operation_of(layer: str) -> str:
    """A layer's path without its indices: the same operation in every block."""
    return re.sub(r"\.\d+(?=\.|$)", "", layer)


def _stored_bits(layers: Layers) -> float:
    """Bits per weight of the tensors that replace the packed weights; shared ones count once."""
    n_weights = _n_weights(layers)
    return 8 * sum(spec.n_bytes for spec in packed_tensors(layers).values()) / n_weights if n_weights else 0.0


def _n_weights(layers: Layers) -> int:
    return sum(math.prod(entry.shape) for entry in whole(layers).values())
