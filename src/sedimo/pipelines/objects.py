"""What is used of a diffusers pipeline object: diffusers itself tells a type checker nothing about it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch


class PipelineObject(Protocol):
    """The part of `diffusers.DiffusionPipeline` that Sedimo touches."""

    scheduler: object

    @property
    def components(self) -> dict[str, object]:
        """All components by name; None where a component is left out."""

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes."""

    def __call__(self, **arguments: object) -> tuple[torch.Tensor, ...]:
        """Runs it; the images or latents come first."""

    def set_progress_bar_config(self, **settings: object) -> None:
        """Replaces the settings of its progress bar."""

    def save_config(self, folder: Path) -> None:
        """Writes `model_index.json`."""

    def to(self, target: torch.device | torch.dtype) -> object:
        """Moves or casts every component."""
