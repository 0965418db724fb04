"""A packed folder that diffusers loads: `import sedimo`, then `DiffusionPipeline.from_pretrained`."""

from __future__ import annotations

from pathlib import Path

import torch

from sedimo.checkpoint.layout import stored_tensors
from sedimo.checkpoint.reading import open_checkpoint, read_tensors
from sedimo.checkpoint.weights import replace_weights
from sedimo.checkpoint.writing import Finish, WriteOptions, WrittenCheckpoint, write_checkpoint
from sedimo.errors import StateError
from sedimo.methods.method import Words
from sedimo.quant.families import FAMILIES
from sedimo.targets.target import Packed, Target


def _write(packed: Packed, out: Path, options: WriteOptions, finish: Finish) -> WrittenCheckpoint:
    """The source's folder with its denoiser replaced by the packed one.

    Raises:
        InputError: `out` is in use, or nothing is packed.
    """
    lab, denoiser = packed.lab, packed.lab.stored
    replace_weights(denoiser, packed.weights, inputs=packed.bank.input_quantizers(packed.recipe))
    return write_checkpoint(
        lab.folder, out, denoiser, packed.origin, component=lab.bench.component, options=options, finish=finish
    )


def _verify(packed: Packed, folder: Path) -> None:
    """Compares the stored tensors, their checksums first, with those of the weights that were decided."""
    component = packed.lab.bench.component
    checkpoint = open_checkpoint(folder / component if component else folder)
    found, owners = read_tensors(checkpoint), checkpoint.configuration.owners
    for layer, weight in packed.weights.items():
        wanted = stored_tensors(owners.get(layer, layer), weight)
        if not all(name in found and torch.equal(found[name], one.cpu()) for name, one in wanted.items()):
            raise StateError(f"layer {layer!r} was not written as it was decided; nothing was kept. Write it again")


DIFFUSERS = Target(
    name="diffusers",
    words=Words("a packed folder that diffusers loads by itself once sedimo is imported"),
    families=tuple(family.name for family in FAMILIES),
    write=_write,
    verify=_verify,
)
