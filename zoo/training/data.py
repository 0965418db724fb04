"""Images to learn from: CIFAR-10 from a parquet file (columns `jpeg` and `label`), digits, and drawn shapes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits


def read_images(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[N, 3, 32, 32]` uint8 and labels `[N]` int64."""
    table = parquet.read_table(path, columns=["jpeg", "label"])
    decoded = [np.asarray(Image.open(io.BytesIO(blob)).convert("RGB")) for blob in table["jpeg"].to_pylist()]
    images = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(table["label"].to_pylist(), dtype=torch.int64)


def read_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The 1,797 handwritten digits that scikit-learn ships, `[N, 3, 32, 32]` uint8, and what they are."""
    found = load_digits()
    grey = torch.from_numpy(found.images).float().unsqueeze(1) * (255 / 16)
    large = torch.nn.functional.interpolate(grey, (32, 32), mode="bicubic").clamp(0, 255)
    return large.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(found.target).long()


def draw_shapes(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`n` pictures of one shape on a plain ground, `[N, 3, 32, 32]` uint8; class: corners less 3, and 5 if hollow."""
    generator = np.random.default_rng(0)
    images, labels = [], []
    for _ in range(n):
        corners, is_hollow = int(generator.integers(3, 8)), bool(generator.integers(2))
        ground, ink = (tuple(generator.integers(0, 256, 3).tolist()) for _ in range(2))
        radius, turn = generator.uniform(6, 13), generator.uniform(0, 360)
        middle = generator.uniform(radius, 31 - radius, 2)
        image = Image.new("RGB", (32, 32), ground)
        shape = (*middle.tolist(), float(radius))
        fill = None if is_hollow else ink
        ImageDraw.Draw(image).regular_polygon(shape, corners, rotation=float(turn), fill=fill, outline=ink, width=2)
        images.append(np.asarray(image))
        labels.append(corners - 3 + 5 * is_hollow)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 pixels to float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1.0)


def random_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirrors a random half of `[B, C, H, W]` left to right."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)


def random_crop(images: torch.Tensor, generator: torch.Generator, *, pad: int = 4) -> torch.Tensor:
    """Shifts each image of `[B, C, H, W]` by up to `pad` pixels, mirrored at the border."""
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad), mode="reflect")
    shifts = torch.randint(0, 2 * pad + 1, (2, len(images)), generator=generator)
    size = images.shape[-1]
    crops = [padded[i, :, top : top + size, left : left + size] for i, (top, left) in enumerate(shifts.t().tolist())]
    return torch.stack(crops)
