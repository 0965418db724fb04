"""A module that is no diffusers model; imported without diffusers, which takes seconds."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Recurrent(nn.Module):
    """One layer called three times, a shared weight, an unused layer, a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8)) for _ in range(2))
        self.again = nn.Linear(8, 8)
        self.unused = nn.Conv1d(3, 4, 2)
        self.head = nn.Linear(8, 8)
        self.head.weight = self.again.weight
        self.bare = nn.Parameter(torch.ones(8, 8))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            tokens = tokens + block(tokens)
        for _ in range(3):
            tokens = self.again(tokens) + tokens
        return F.linear(self.head(tokens), self.bare)
