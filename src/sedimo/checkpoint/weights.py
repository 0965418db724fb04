"""The verbs on a denoiser in memory: pack weights, save it packed.

A diffusers model is told what is packed in it, so that its own `save_pretrained`, `dequantize` and `to` are right.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import nn

from sedimo.checkpoint.contents import packed_layers, set_weights
from sedimo.checkpoint.diffusers_plugin import attach
from sedimo.checkpoint.inputs import round_inputs
from sedimo.errors import InputError
from sedimo.pipelines.weights import refuse_adapters
from sedimo.quant.activations import InputQuantizers
from sedimo.quant.tensor import QuantizedTensor

MAX_SHARD_SIZE = "10GB"  # the default of diffusers


class _Savable(Protocol):
    def save_pretrained(self, save_directory: Path, *, max_shard_size: int | str, variant: str | None) -> None: ...


def replace_weights(
    denoiser: nn.Module, weights: Mapping[str, QuantizedTensor], *, inputs: InputQuantizers | None = None
) -> None:
    """Puts packed weights in place of the weights of the named layers, in place; the others stay as they are.

    With `inputs`, what those layers are given is rounded from now on, and no other layer's inputs are. The denoiser may
    hold packed weights already. One tensor given for several layers is stored once.

    Raises:
        InputError: an adapter is attached, a name that is no Linear or Conv layer, a wrong shape, or two different
            weights for one shared parameter.

    Example:
        >>> replace_weights(pipe.transformer, {"proj_out_2": quantize_weight(weight, "kmc4")})
    """
    refuse_adapters(denoiser)
    set_weights(denoiser, weights)
    if inputs is not None:
        round_inputs(denoiser, inputs)
    attach(denoiser)


def save_denoiser(
    denoiser: nn.Module, folder: Path, *, max_shard_size: int | str = MAX_SHARD_SIZE, variant: str | None = None
) -> None:
    """Saves a diffusers denoiser with its packed weights, to be loaded by its class's `from_pretrained`."""
    if not packed_layers(denoiser):
        raise InputError("no weight of the denoiser is packed: call replace_weights(denoiser, ...) before saving it")
    if not hasattr(denoiser, "save_pretrained"):
        raise InputError(f"a {type(denoiser).__name__} has no save_pretrained; only diffusers models can be saved")
    refuse_adapters(denoiser)
    savable: _Savable = denoiser  # type: ignore[assignment]  # checked two lines above
    savable.save_pretrained(folder, max_shard_size=max_shard_size, variant=variant)
