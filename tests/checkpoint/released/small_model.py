"""A model small enough that its checkpoints lie in the repository, with a layer of every kind."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

FORMATS = {
    "linear": "kmc4",
    "uniform": "uaq3",
    "split": [(5, "uaq4g4"), (2, "fp16"), (9, "kma2")],
    "conv1d": "uaq5",
    "conv2d": "kmc3",
    "conv3d": "uaq6g8",
}


class SmallModel(ModelMixin, ConfigMixin):
    """Layers side by side; it only has to be saved and loaded."""

    @register_to_config
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.linear, self.twin = nn.Linear(width, 4), nn.Linear(width, 4)
        self.uniform = nn.Linear(width, 3, bias=False)
        self.split = nn.Linear(width, 4)
        self.conv1d, self.conv2d, self.conv3d = nn.Conv1d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv3d(2, 3, 2)
        self.register_buffer("steps", torch.arange(3))
