"""The small CIFAR-10 classifier whose penultimate features stand behind FID and KID here.

Inception features are made for photographs of 299 pixels and need a download; this network is trained
on the very images that the embedded denoisers imitate. It refuses nothing but a wrong shape: it is a
measuring instrument, and its name (`cifar-resnet`) goes into every record that used it.
"""

from __future__ import annotations

import torch
from torch import nn

FEATURE_DIM = 256
EXTRACTOR_NAME = "cifar-resnet"


def _conv(in_channels: int, out_channels: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(channels, channels), _conv(channels, channels))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.body(hidden)


class Classifier(nn.Module):
    """Ten-class residual network for images `[B, 3, 32, 32]` in [-1, 1]."""

    def __init__(self, n_classes: int = 10) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            _conv(3, 32),  # B 32 32 32
            _conv(32, 64, stride=2),  # B 64 16 16
            _Residual(64),
            _conv(64, 128, stride=2),  # B 128 8 8
            _Residual(128),
            _conv(128, FEATURE_DIM, stride=2),  # B 256 4 4
        )
        self.head = nn.Linear(FEATURE_DIM, n_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Penultimate features `[B, 256]` of images `[B, 3, 32, 32]` in [-1, 1]."""
        if images.ndim != 4 or images.shape[1:] != (3, 32, 32):
            raise ValueError(f"images must have shape [B, 3, 32, 32], got {list(images.shape)}")
        return self.trunk(images).mean(dim=(2, 3))  # [B, 256]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class logits `[B, 10]`."""
        return self.head(self.features(images))
