"""Writes a complete folder around a packed denoiser: the other components linked or copied, the index, a model card."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sedimo.codec import parse_json
from sedimo.errors import InputError, StateError
from sedimo.pipelines.folder import new_folder, place_file
from sedimo.pipelines.weights import component_files
from sedimo.quant.tensor import QuantizedTensor
from sedimo.runtime.card import BASE_CARD_NAME, CARD_NAME, Origin, is_card, model_card
from sedimo.runtime.checkpoint import Checkpoint, change_layers, open_checkpoint
from sedimo.runtime.diffusers_plugin import MADE_BY
from sedimo.runtime.weights import MAX_SHARD_SIZE, save_denoiser

INDEX_NAME, RECIPE_NAME = "model_index.json", "sedimo_recipe.json"
_COMPONENT = re.compile(r"\w[\w.-]*")
_KEPT = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md")


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

    @property
    def header_bytes(self) -> int:
        """Bytes of the weight files that are no tensors."""
        return self.file_bytes - self.stored_bytes - self.plain_bytes


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
    _check_places(source, out, component)
    with new_folder(out, overwrite=options.overwrite) as folder:
        home = folder / component if component else folder
        save_denoiser(denoiser, home, max_shard_size=options.max_shard_size)
        _forget_path(home / "config.json")
        linked, copied = _place_rest(source, folder, component, options)
        checkpoint = open_checkpoint(home)
        _write_texts(folder, source, origin, checkpoint, linked=linked, copied=copied)
        written = _record(out, component, checkpoint, linked, copied)
        if finish is not None:
            finish(folder, written)
    return written


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

    Raises:
        InputError: `out` is in use or overlaps `source`, an unknown layer, or a weight of another shape.
        StateError: `source` is not packed, or is damaged.
    """
    _check_places(source, out, component)
    old = open_checkpoint(source / component if component else source)
    with new_folder(out, overwrite=options.overwrite) as folder:
        home = folder / component if component else folder
        home.mkdir(exist_ok=True)
        change_layers(old, home, weights, made_by=MADE_BY, max_shard_size=options.max_shard_size)
        linked, copied = _place_rest(source, folder, component, options)
        checkpoint = open_checkpoint(home)
        _write_texts(folder, source, origin, checkpoint, linked=linked, copied=copied)
    return _record(out, component, checkpoint, linked, copied)


def write_card(folder: Path, origin: Origin, checkpoint: Checkpoint, placed: str) -> None:
    """Puts the model card and the recipe into a folder; `placed` says how other components' files came there."""
    card = model_card(
        origin,
        checkpoint.layers,
        is_pipeline=(folder / INDEX_NAME).is_file(),
        denoiser_class=str(checkpoint.config.get("_class_name", "the denoiser's class")),
        placed=placed,
    )
    (folder / CARD_NAME).write_text(card, encoding="utf-8")
    if origin.recipe_json is not None:
        (folder / RECIPE_NAME).write_text(origin.recipe_json, encoding="utf-8")


def _check_places(source: Path, out: Path, component: str | None) -> None:
    home = source / component if component else source
    if not (home / "config.json").is_file():
        raise InputError(f"{home} is no denoiser's folder: it has no config.json")
    if component and not (source / INDEX_NAME).is_file():
        raise InputError(f"{source} is no pipeline's folder: it has no {INDEX_NAME}")
    here, there = source.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise InputError(f"the output folder {out} must lie outside the source folder {source}")


def _place_rest(
    source: Path, folder: Path, component: str | None, options: WriteOptions
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Puts everything but the denoiser into the new folder; names of what was linked and what was copied."""
    files = {name: source / name for name in _KEPT if (source / name).is_file()}
    if component is not None:
        files[INDEX_NAME] = source / INDEX_NAME
        for name in _read_index(source / INDEX_NAME):
            if name != component and _COMPONENT.fullmatch(name) and (source / name).is_dir():
                inner = component_files(source / name, options.variant)
                files |= {f"{name}/{path}": file for path, file in inner.items()}
    linkable = {name for name in files if options.link and name != INDEX_NAME}
    done = {name: place_file(path, folder / name, link=name in linkable) for name, path in files.items()}
    return tuple(n for n, is_link in done.items() if is_link), tuple(n for n, is_link in done.items() if not is_link)


def _read_index(path: Path) -> dict[str, object]:
    plain = parse_json(path.read_bytes(), place=str(path)) if path.is_file() else {}
    if not isinstance(plain, dict):
        raise StateError(f"{path} must be an object of component names, got {type(plain).__name__}")
    return plain


def _write_texts(
    folder: Path,
    source: Path,
    origin: Origin,
    checkpoint: Checkpoint,
    *,
    linked: tuple[str, ...],
    copied: tuple[str, ...],
) -> None:
    write_card(folder, origin, checkpoint, f"{len(linked)} linked to the source folder, {len(copied)} copied")
    base_card = source / (BASE_CARD_NAME if is_card(source / CARD_NAME) else CARD_NAME)
    if base_card.is_file():
        place_file(base_card, folder / BASE_CARD_NAME, link=False)


def _forget_path(config: Path) -> None:
    """Removes the path that the denoiser was loaded from, which diffusers writes into its configuration."""
    plain = parse_json(config.read_bytes(), place=str(config))
    plain.pop("_name_or_path", None)
    config.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _record(
    out: Path, component: str | None, checkpoint: Checkpoint, linked: tuple[str, ...], copied: tuple[str, ...]
) -> WrittenCheckpoint:
    home = out / component if component else out
    sizes = checkpoint.file_bytes, checkpoint.stored_bytes, checkpoint.plain_bytes
    return WrittenCheckpoint(out, home, *sizes, linked, copied)
