"""Other formats for single layers of a packed checkpoint; nothing else is fitted or written differently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sedimo.api.describing import owners_of, recipe_of, refuse_other_source
from sedimo.codec import to_plain
from sedimo.errors import InputError
from sedimo.pipelines.loading import locate
from sedimo.pipelines.weights import FileWeights, denoiser_folder
from sedimo.quant.entries import entry_text
from sedimo.quant.fitting import fit
from sedimo.quant.formats import FP16, Format
from sedimo.quant.tensor import QuantizedTensor
from sedimo.runtime.card import Origin
from sedimo.runtime.checkpoint import Checkpoint, open_checkpoint, read_packed
from sedimo.runtime.writing import WrittenCheckpoint, replace_layer_format
from sedimo.space import Recipe


@dataclass(frozen=True)
class Change:
    """A checkpoint that was written anew: by layer the formats before and after, and its sizes [bytes]."""

    before: Mapping[str, str]
    after: Mapping[str, str]
    written: WrittenCheckpoint

    def as_json(self) -> dict[str, object]:
        """Plain values by name."""
        changed = {name: {"before": self.before[name], "after": f} for name, f in self.after.items()}
        sizes = {"stored_bytes": self.written.stored_bytes, "file_bytes": self.written.file_bytes}
        plain: dict[str, object] = to_plain({"changed": changed, **sizes, "out": str(self.written.folder)})
        return plain


def change_formats(
    checkpoint: Path | str,
    formats: Mapping[str, str | Format],
    *,
    source: str,
    out: Path | str,
    variant: str | None = None,
) -> Change:
    """Writes a packed checkpoint anew with other formats for some layers; all other tensors keep their bytes.

    `source` is what the checkpoint was made from: a diffusers folder, a hub id or `zoo:NAME`, and `variant` which of
    its weights. Only the named layers
    are read from it and fitted. A layer that shares its weight changes together with those that it shares it with, a
    layer in parts as a whole.

    Raises:
        InputError: no packed checkpoint, an unknown layer, fp16, activation bits, a source that does not fit, or an
            `out` in use.
        StateError: a damaged checkpoint.
    """
    place = Path(checkpoint).expanduser()
    inner = denoiser_folder(place)
    old = open_checkpoint(inner)
    name, folder = locate(source, variant)
    weights = FileWeights(denoiser_folder(folder), variant)
    wanted = {layer: f if isinstance(f, Format) else Format.parse(f) for layer, f in formats.items()}
    _refuse_activations(wanted)
    fresh = _fitted(old, weights, wanted)
    before = recipe_of(old)
    owners = owners_of(old)
    changed = {layer: fresh[owner] for layer, owner in owners.items() if owner in fresh} | fresh
    after = Recipe({**before.layers, **{layer: weight.format for layer, weight in changed.items()}})
    after = after.with_activations(before.activation_bits)
    written = replace_layer_format(
        place,
        Path(out),
        fresh,
        Origin(name, recipe_json=after.to_json()),
        component=inner.name if inner != place else None,
    )
    was, is_now = ({n: entry_text(recipe.layers.get(n, FP16)) for n in changed} for recipe in (before, after))
    return Change(was, is_now, written)


def _refuse_activations(formats: Mapping[str, Format]) -> None:
    for layer, number_format in formats.items():
        if number_format != number_format.weight_format:
            raise InputError(
                f"layer {layer!r}: a change is of weights and keeps how activations are rounded, got {number_format}; "
                f"use {number_format.weight_format}, or quantize the source anew"
            )


def _fitted(checkpoint: Checkpoint, weights: FileWeights, wanted: Mapping[str, Format]) -> dict[str, QuantizedTensor]:
    """The packed weights by the layers that own them."""
    owners, packed = owners_of(checkpoint), read_packed(checkpoint)
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
