"""CIFAR-10 from a parquet file with the columns `jpeg` and `label`."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
from PIL import Image


def read_images(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[N, 3, 32, 32]` uint8 and labels `[N]` int64."""
    table = parquet.read_table(path, columns=["jpeg", "label"])
    decoded = [np.asarray(Image.open(io.BytesIO(blob)).convert("RGB")) for blob in table["jpeg"].to_pylist()]
    images = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(table["label"].to_pylist(), dtype=torch.int64)


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
