"""Writes the folder of the current format version once, when a version is released; never again for an old one.

python tests/checkpoint/released/generate.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from small_model import FORMATS, SmallModel  # noqa: E402

from packed_weights import random_packed  # noqa: E402  # after the path is set
from sedimo.checkpoint.contents import packed_layers  # noqa: E402
from sedimo.checkpoint.layout import FORMAT_VERSION  # noqa: E402
from sedimo.checkpoint.weights import replace_weights  # noqa: E402


def main() -> None:
    """One folder for the version, and beside it the weights that a reader must find."""
    torch.manual_seed(0)
    model = SmallModel()
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in FORMATS}
    weights = {name: random_packed(shapes[name], text) for name, text in FORMATS.items()}
    replace_weights(model, {**weights, "twin": weights["linear"]})
    folder = HERE / f"v{FORMAT_VERSION}"
    model.save_pretrained(folder)
    expected = {name: weight.dequantize() for name, weight in packed_layers(model).items()}
    save_file(expected | {"bias": model.linear.bias.detach()}, folder / "expected_values.safetensors")


if __name__ == "__main__":
    main()
