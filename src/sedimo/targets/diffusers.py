"""A packed folder that diffusers loads: `import sedimo`, then `DiffusionPipeline.from_pretrained`."""

from __future__ import annotations

from pathlib import Path

import torch

from sedimo.checkpoint.reading import open_checkpoint, read_packed
from sedimo.checkpoint.weights import replace_weights
from sedimo.checkpoint.writing import Finish, WriteOptions, WrittenCheckpoint, write_checkpoint
from sedimo.methods.method import Words
from sedimo.quant.families import FAMILIES
from sedimo.targets.target import Packed, Target, Verified


def _write(packed: Packed, out: Path, options: WriteOptions, finish: Finish | None) -> WrittenCheckpoint:
    """The source's folder with its denoiser replaced by the packed one.

    Raises:
        InputError: `out` is in use, or nothing is packed.
    """
    lab = packed.lab
    denoiser = lab.stored
    replace_weights(denoiser, packed.weights, inputs=packed.bank.input_quantizers(packed.recipe))
    return write_checkpoint(
        lab.folder, out, denoiser, packed.origin, component=lab.bench.component, options=options, finish=finish
    )


def _verify(packed: Packed, written: WrittenCheckpoint) -> Verified:
    """The weights as the checkpoint's reader gives them, beside those that were decided.

    Raises:
        StateError: the folder is damaged.
    """
    component = packed.lab.bench.component
    found = read_packed(open_checkpoint(written.folder / component if component else written.folder))
    pairs = [(weight, packed.weights[layer]) for layer, weight in found.items()]
    return Verified(len(pairs), all(torch.equal(a.dequantize(), b.dequantize().cpu()) for a, b in pairs))


DIFFUSERS = Target(
    name="diffusers",
    words=Words("a packed folder that diffusers loads by itself once sedimo is imported"),
    families=tuple(family.name for family in FAMILIES),
    write=_write,
    verify=_verify,
)
