"""Draws samples of the embedded models into docs/pictures, one class per column: `python scripts/pictures.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

import sedimo
from sedimo.lab.images import draw

N_CLASSES, N_ROWS, N_STEPS, SCALE = 10, 4, 30, 2
OUT = Path(__file__).parent.parent / "docs" / "pictures"
PICTURES = {"zoo:cifar-dit": OUT / "samples.png", "zoo:cifar-ldm": OUT / "samples-ldm.png"}


def picture(source: str) -> Image.Image:
    """Samples of seeds 0 to 39 with the pipeline's default conditions and guidance; not chosen."""
    pipe = sedimo.load(source)
    images = draw(pipe, pipe.default_sampling(range(N_CLASSES * N_ROWS), N_STEPS)).images
    pixels = (images.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)  # [B, H, W, 3]
    height, width = pixels.shape[1:3]
    grid = pixels.reshape(N_ROWS, N_CLASSES, height, width, 3).transpose(0, 2, 1, 3, 4)
    small = Image.fromarray(grid.reshape(N_ROWS * height, N_CLASSES * width, 3))
    return small.resize((SCALE * small.width, SCALE * small.height), Image.Resampling.NEAREST)


def main() -> None:
    """Draws all of them."""
    for source, path in PICTURES.items():
        picture(source).save(path, optimize=True)


if __name__ == "__main__":
    main()
