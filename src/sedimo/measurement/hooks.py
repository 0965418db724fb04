"""Forward hooks on some layers for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

Hook = Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor | None]


@contextmanager
def hooked(denoiser: nn.Module, hooks: Mapping[str, Hook]) -> Iterator[None]:
    """Each hook is called with its layer, the layer's inputs and its output; all are gone on leaving."""
    handles = [denoiser.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
