"""A packed folder that diffusers loads: `import sedimo`, then `DiffusionPipeline.from_pretrained`."""

from __future__ import annotations

from pathlib import Path

from sedimo.checkpoint.weights import replace_weights
from sedimo.checkpoint.writing import Finish, WriteOptions, WrittenCheckpoint, write_checkpoint
from sedimo.methods.method import Words
from sedimo.quant.families import FAMILIES
from sedimo.targets.target import Packed, Target


def _write(packed: Packed, out: Path, options: WriteOptions, finish: Finish | None) -> WrittenCheckpoint:
    """The source's folder with its denoiser replaced by the packed one.

    Raises:
        InputError: `out` is in use, or nothing is packed.
    """
    lab, denoiser = packed.lab, packed.lab.stored
    replace_weights(denoiser, packed.weights, inputs=packed.bank.input_quantizers(packed.recipe))
    return write_checkpoint(
        lab.folder, out, denoiser, packed.origin, component=lab.bench.component, options=options, finish=finish
    )


DIFFUSERS = Target(
    name="diffusers",
    words=Words("a packed folder that diffusers loads by itself once sedimo is imported"),
    families=tuple(family.name for family in FAMILIES),
    write=_write,
)
