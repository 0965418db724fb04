"""Draws docs/pictures/samples.png, the embedded model one class per column: `python scripts/pictures.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

import sedimo
from sedimo.api.evaluation import draw

N_CLASSES, N_ROWS, N_STEPS, SCALE = 10, 4, 30, 2
OUT = Path(__file__).parent.parent / "docs" / "pictures" / "samples.png"


def main() -> None:
    """Samples seeds 0 to 39 with the pipeline's own guidance; not chosen."""
    pipe = sedimo.load("zoo:cifar-dit")
    images = draw(pipe, pipe.default_sampling(range(N_CLASSES * N_ROWS), N_STEPS)).images
    pixels = (images.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)  # [B, H, W, 3]
    height, width = pixels.shape[1:3]
    grid = pixels.reshape(N_ROWS, N_CLASSES, height, width, 3).transpose(0, 2, 1, 3, 4)
    picture = Image.fromarray(grid.reshape(N_ROWS * height, N_CLASSES * width, 3))
    picture.resize((SCALE * picture.width, SCALE * picture.height), Image.Resampling.NEAREST).save(OUT, optimize=True)


if __name__ == "__main__":
    main()
