"""Give single layers of a packed CHECKPOINT other formats; nothing else is fitted or changed.

Example: sedimo change small proj_out_2=uaq8 --source zoo:cifar-dit -o better
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from sedimo.checkpoint.reading import Checkpoint, open_checkpoint, read_packed
from sedimo.checkpoint.writing import Origin, write_checkpoint
from sedimo.errors import InputError
from sedimo.jobs.describe import recipe_of, refuse_other_source
from sedimo.jobs.job import simple_job
from sedimo.pipelines.loading import locate
from sedimo.pipelines.weights import FileWeights, denoiser_folder
from sedimo.quant.fitting import fit
from sedimo.quant.formats import FP16, Format
from sedimo.quant.parts import entry_text
from sedimo.quant.tensor import QuantizedTensor
from sedimo.reporting.page import Page, Table, Text, columns, page_of, rows
from sedimo.reporting.words import packed_sizes
from sedimo.settings import Option
from sedimo.space import Recipe


def run(
    checkpoint: Annotated[Path, Option((), "A packed checkpoint.", metavar="CHECKPOINT")],
    changes: Annotated[tuple[str, ...], Option((), "What to change.", metavar="LAYER=FORMAT...")],
    source: Annotated[str, Option(("--source",), "What CHECKPOINT was made from.", metavar="SRC")],
    out: Annotated[Path, Option(("-o", "--out"), "Folder to write.")],
    variant: Annotated[str | None, Option(("--variant",), "Variant of SRC's weights, such as fp16.")] = None,
) -> dict[str, Any]:
    """Writes the checkpoint anew; all tensors of other layers keep their bytes. Formats before and after, and sizes.

    Only the named layers are read from the source and fitted. A layer that shares its weight changes together with
    those that it shares it with, a layer in parts as a whole.
    """
    wanted = _read(changes)
    place = checkpoint.expanduser()
    inner = denoiser_folder(place)
    old = open_checkpoint(inner)
    name, folder = locate(source, variant)
    fresh = _fitted(old, FileWeights(denoiser_folder(folder), variant), wanted)
    before, owners = recipe_of(old), old.configuration.owners
    changed = {layer: fresh[owner] for layer, owner in owners.items() if owner in fresh} | fresh
    after = Recipe({**before.layers, **{layer: weight.format for layer, weight in changed.items()}})
    after = after.with_activations(before.activation_bits)
    component = inner.name if inner != place else None
    origin = Origin(name, recipe_json=after.to_json())
    written = write_checkpoint(place, out, fresh, origin, component=component)
    was, is_now = ({n: entry_text(recipe.layers.get(n, FP16)) for n in changed} for recipe in (before, after))
    return {
        "changed": {name: {"before": was[name], "after": is_now[name]} for name in changed},
        "stored_bytes": written.stored_bytes,
        "file_bytes": written.file_bytes,
        "out": str(written.folder),
    }


def _read(changes: Iterable[str]) -> dict[str, Format]:
    """Formats by layer from texts such as `proj_out_2=uaq8`."""
    found: dict[str, Format] = {}
    for text in changes:
        layer, _, written = text.partition("=")
        if not (layer and written):
            raise InputError(f"a change is written LAYER=FORMAT, such as proj_out_2=uaq8; got {text!r}")
        number_format = Format.parse(written)
        if found.setdefault(layer, number_format) != number_format:
            raise InputError(f"layer {layer!r} is given two formats: {found[layer]} and {number_format}")
        if number_format != number_format.weight_format:
            raise InputError(
                f"layer {layer!r}: a change is of weights and keeps how activations are rounded, got {number_format}; "
                f"use {number_format.weight_format}, or quantize the source anew"
            )
    return found


def _fitted(checkpoint: Checkpoint, weights: FileWeights, wanted: Mapping[str, Format]) -> dict[str, QuantizedTensor]:
    """The packed weights by the layers that own them."""
    owners, packed = checkpoint.configuration.owners, read_packed(checkpoint)
    found: dict[str, QuantizedTensor] = {}
    for layer, number_format in wanted.items():
        owner = owners.get(layer, layer)
        whole = layer.partition("[")[0]
        if whole in owners and layer not in owners:
            raise InputError(
                f"{layer!r} is a part of layer {whole!r}, which is changed as a whole: give {whole}={number_format}, "
                "or quantize the source with a recipe of these parts"
            )
        if not number_format.is_quantized:
            raise InputError(
                f"layer {layer!r} cannot be left alone again in a packed checkpoint: quantize the source with a recipe "
                "that leaves it at fp16"
            )
        weight = weights.read(layer)
        if owner in packed:
            refuse_other_source(layer, weight, packed[owner].dequantize())
        fitted = fit(weight, number_format, layer_name=layer)
        tensor = QuantizedTensor.from_fitted(fitted, weight.dtype)
        if owner in found and found[owner].format != tensor.format:
            raise InputError(f"layer {layer!r} shares its weight with others and must get the same format as they")
        tensor.layer_name = owner
        found[owner] = tensor
    return found


def page(found: Mapping[str, Any]) -> Page:
    """What a changed checkpoint has instead of what."""
    lines = ((name, one["before"], one["after"]) for name, one in found["changed"].items())
    sizes = packed_sizes(found["stored_bytes"], found["file_bytes"])
    return page_of("", "", Table(columns("layer", "before", "after"), rows(lines)), Text(f"{sizes}: {found['out']}"))


JOB = simple_job(__doc__, run, page)
