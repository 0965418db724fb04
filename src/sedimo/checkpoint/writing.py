"""Writes a complete folder around a packed denoiser: the other components linked or copied, the index, a model card.

The denoiser comes from memory, or from another packed folder in which single layers change.

The card says what the checkpoint is, how to load it, which bits went where, and how it was made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData, metadata_load, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import nn
from yaml import YAMLError

from sedimo.checkpoint.diffusers_plugin import MADE_BY
from sedimo.checkpoint.layout import KINDS, Configuration, LayerEntry, entry_of, stored_tensors
from sedimo.checkpoint.reading import Checkpoint, open_checkpoint, read_tensors
from sedimo.checkpoint.validation import make_seal
from sedimo.checkpoint.weights import MAX_SHARD_SIZE, save_denoiser
from sedimo.codec import parse_json
from sedimo.errors import InputError, StateError
from sedimo.pipelines.folder import new_folder, place_file
from sedimo.pipelines.weights import WEIGHTS_STEM, component_files
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
    """Where a checkpoint comes from: texts for its card, empty where there is nothing to say, and its recipe file."""

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

    The sizes are those of a `Checkpoint`; `linked` and `copied` name the other components' files, relative to `folder`.
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
    packed: nn.Module | Mapping[str, QuantizedTensor],
    origin: Origin,
    *,
    component: str | None = None,
    options: WriteOptions = _DEFAULT,
    finish: Finish | None = None,
) -> WrittenCheckpoint:
    """Writes the folder `out`: `source` with a packed denoiser, or, if its own is packed, with other weights in that.

    `source` is a pipeline's folder and `component` the denoiser's folder in it, or `source` is a denoiser's folder and
    `component` None. The other components keep their bytes; of several variants of their weights one is taken, under
    its plain name, so that `from_pretrained(out)` needs no variant. `finish` may add files to the folder before it
    takes the place of `out`; it gets the folder and the record. Where single layers change, every other tensor keeps
    its bytes, and a layer that shares its weight changes together with those that it shares it with.

    Raises:
        InputError: `out` is in use or overlaps `source`, there is no such component, or nothing is packed.
        StateError: as `save_denoiser`.
    """
    _check_places(source, out, component)
    with new_folder(out, overwrite=options.overwrite) as folder:
        home = folder / component if component else folder
        home.mkdir(exist_ok=True)
        if isinstance(packed, nn.Module):
            save_denoiser(packed, home, max_shard_size=options.max_shard_size)
            config = parse_json((home / "config.json").read_bytes(), place=str(home / "config.json"))
            config.pop("_name_or_path", None)  # the path that the denoiser was loaded from
            _write_json(home / "config.json", config)
        else:
            old = open_checkpoint(source / component if component else source)
            _change_layers(old, home, packed, options.max_shard_size)
        is_linked = {
            name: place_file(path, folder / name, link=options.link and name != INDEX_NAME)
            for name, path in _other_files(source, component, options.variant).items()
        }
        linked = tuple(name for name, is_link in is_linked.items() if is_link)
        copied = tuple(name for name, is_link in is_linked.items() if not is_link)
        checkpoint = open_checkpoint(home)
        write_card(folder, origin, checkpoint, f"{len(linked)} linked to the source folder, {len(copied)} copied")
        base_card = source / (BASE_CARD_NAME if card_of(source / CARD_NAME) else CARD_NAME)
        if base_card.is_file():
            place_file(base_card, folder / BASE_CARD_NAME, link=False)
        sizes = checkpoint.file_bytes, checkpoint.stored_bytes, checkpoint.plain_bytes
        written = WrittenCheckpoint(out, out / component if component else out, *sizes, linked, copied)
        if finish is not None:
            finish(folder, written)
    return written


def _check_places(source: Path, out: Path, component: str | None) -> None:
    home = source / component if component else source
    if not (home / "config.json").is_file():
        raise InputError(f"{home} is no denoiser's folder: it has no config.json")
    if component and not (source / INDEX_NAME).is_file():
        raise InputError(f"{source} is no pipeline's folder: it has no {INDEX_NAME}")
    here, there = source.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise InputError(f"the output folder {out} must lie outside the source folder {source}")


def _change_layers(
    checkpoint: Checkpoint, home: Path, weights: Mapping[str, QuantizedTensor], max_shard_size: int | str
) -> None:
    if checkpoint.configuration.smoothed:
        raise InputError(
            f"{checkpoint.folder} was smoothed: its weights are no longer those of its source, so single layers cannot "
            "be packed anew. Quantize the source again with --smooth and another recipe"
        )
    tensors, layers = read_tensors(checkpoint), dict(checkpoint.configuration.layers)
    owners, fresh = dict(checkpoint.configuration.owners), dict[str, QuantizedTensor]()
    for name, weight in weights.items():
        owner = owners.setdefault(name, name)
        if fresh.setdefault(owner, weight) is not weight:
            raise InputError(f"layers {owner!r} and {name!r} share one weight and must get one packed weight")
    for owner, weight in fresh.items():
        shape = _drop_layer(owner, layers, tensors)
        if shape != tuple(weight.shape):
            raise InputError(f"layer {owner!r} has a weight of shape {shape}, the new one has {tuple(weight.shape)}")
        layers[owner] = entry_of(weight)
        tensors |= stored_tensors(owner, weight)
    configuration = Configuration(layers, owners, checkpoint.configuration.inputs, made_by=MADE_BY)
    _write_json(home / "config.json", {**checkpoint.config, "quantization_config": configuration.plain})
    split = split_torch_state_dict_into_shards(  # as diffusers does
        tensors, max_shard_size=max_shard_size, filename_pattern=f"{WEIGHTS_STEM}{{suffix}}.safetensors"
    )
    seal = make_seal(tensors, configuration)
    for file, names in split.filename_to_tensors.items():
        shard = {name: tensors[name].contiguous() for name in names}
        save_file(shard, home / file, metadata={"format": "pt", **seal})
    if split.is_sharded:
        index = {"metadata": {**split.metadata, **seal}, "weight_map": split.tensor_to_filename}
        _write_json(home / f"{WEIGHTS_STEM}.safetensors.index.json", index)


def _drop_layer(owner: str, layers: Mapping[str, LayerEntry], tensors: dict[str, torch.Tensor]) -> tuple[int, ...]:
    """Removes a layer's tensors and returns the shape of its weight."""
    if owner in layers:
        for name in layers[owner].tensors(owner):
            del tensors[name]
        return layers[owner].shape
    weight = tensors.pop(f"{owner}.weight", None)
    if weight is None or weight.ndim not in KINDS:
        raise InputError(f"the checkpoint has no layer {owner!r} with a weight that can be packed")
    return tuple(weight.shape)


def _write_json(path: Path, plain: Mapping[str, object]) -> None:
    """A file as diffusers writes its own."""
    path.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
    layers, owners = checkpoint.configuration.layers, checkpoint.configuration.owners
    denoiser_class = str(checkpoint.config.get("_class_name", "the denoiser's class"))
    operations: dict[str, list[LayerEntry]] = {}
    for name, entry in layers.items():
        operations.setdefault(re.sub(r"\.\d+(?=\.|$)", "", name), []).append(entry)  # the same in every block
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
        layers=list(layers.values()),
        n_layers=len(owners),
        n_shared=len(owners) - len(layers),
        operations=operations,
        full_bits=FULL_BITS,
        formats=lambda entries: ", ".join(sorted({str(part.format) for entry in entries for part in entry.parts})),
        loader="DiffusionPipeline" if (folder / INDEX_NAME).is_file() else denoiser_class,
        denoiser_class=denoiser_class,
        placed=placed,
    )
    (folder / CARD_NAME).write_text(f"{card.content.rstrip()}\n", encoding="utf-8")
    if origin.recipe_json is not None:
        (folder / RECIPE_NAME).write_text(origin.recipe_json, encoding="utf-8")


def card_of(path: Path) -> Mapping[str, object]:
    """What the head of a model card that Sedimo wrote says; empty where there is no such card."""
    try:
        found = metadata_load(path) or {} if path.is_file() else {}
    except (ValueError, YAMLError):
        return {}
    tags = found.get("tags")
    return found if isinstance(tags, list) and set(_TAGS) <= set(map(str, tags)) else {}
