"""How small a checkpoint really is, and what the rest of its file consists of.

python benchmarks/size.py [--source zoo:cifar-dit] [--bits 3.5] [--formats paper]
"""

from __future__ import annotations

import argparse
import math
import re
import tempfile
from collections import Counter
from pathlib import Path

import sedimo
from sedimo.checkpoint.reading import open_checkpoint
from sedimo.cli.console import ConsoleProgress
from sedimo.pipelines.loading import zoo_path
from sedimo.pipelines.weights import DTYPES, denoiser_folder

N_SHOWN = 6


def _operation(layer: str) -> str:
    """A path without its indices."""
    return re.sub(r"\.\d+(?=\.|$)", "", layer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", default="zoo:cifar-dit")
    parser.add_argument("--bits", type=float, default=3.5)
    parser.add_argument("--formats", default="paper")
    arguments = parser.parse_args()
    source = zoo_path(arguments.source.removeprefix("zoo:")) if ":" in arguments.source else Path(arguments.source)
    before = sum(f.stat().st_size for f in denoiser_folder(source).glob("*.safetensors"))
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        sedimo.quantize(
            arguments.source,
            out=out,
            bits=arguments.bits,
            method="jacobian",
            formats=arguments.formats,
            check=False,
            progress=ConsoleProgress(),
        )
        checkpoint = open_checkpoint(denoiser_folder(out))
    configuration = checkpoint.configuration
    halves = 2 * sum(entry.n_weights for entry in configuration.layers.values())
    print(f"packed layers {checkpoint.stored_bytes} of {halves} bytes at fp16: {checkpoint.stored_bytes / halves:.4f}")
    print(f"denoiser file {checkpoint.file_bytes} of {before} bytes: {checkpoint.file_bytes / before:.4f}; it holds")
    packed, rest = configuration.tensors, Counter[str]()
    for header in checkpoint.headers:
        rest.update({_operation(n): 0 for n in header.tensors})
        for name, (shape, dtype) in header.tensors.items():
            if name not in packed:
                rest[_operation(name)] += math.prod(shape) * DTYPES[dtype].itemsize
    header_bytes = checkpoint.file_bytes - checkpoint.stored_bytes - checkpoint.plain_bytes
    parts = [("packed layers", checkpoint.stored_bytes), *rest.most_common(N_SHOWN), ("header", header_bytes)]
    parts.append(("other", checkpoint.file_bytes - sum(size for _, size in parts)))
    for name, size in parts:
        print(f"  {size:10d}  {size / checkpoint.file_bytes:6.1%}  {name}")


if __name__ == "__main__":
    main()
