"""optimum-quanto: weights quantized in the checkpoint's float16, with scales of that type, and dequantized by it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from _peers.weights import LAYER_TYPES, Quantized, QuantizedLayer

PACKAGE = "optimum-quanto"


@dataclass(frozen=True, slots=True)
class Options:
    """The weights' type."""

    dtype: str

    @property
    def label(self) -> str:
        """Name of the row."""
        return f"{self.dtype} all"


ROWS = tuple(Options(dtype) for dtype in ("qint2", "qint4", "qint8"))


@torch.no_grad()
def quantize(denoiser: nn.Module, options: Options) -> Quantized:
    """Quantizes `denoiser`, which is consumed."""
    from optimum.quanto import QTensor, freeze
    from optimum.quanto import quantize as quanto_quantize

    model = denoiser.to(torch.float16)
    quanto_quantize(model, weights=options.dtype)
    freeze(model)
    names = [n for n, m in model.named_modules() if isinstance(m, LAYER_TYPES) and isinstance(m.weight, QTensor)]
    weights = {n: model.get_submodule(n).weight for n in names}
    found = {n: QuantizedLayer(_plain(w), _stored_bytes(w), options.dtype) for n, w in weights.items()}
    return Quantized(found, model)


def _plain(weight: torch.Tensor) -> torch.Tensor:
    return weight.dequantize().detach().float().clone()


def _stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the plain tensors inside a nest of tensor subclasses."""
    if type(tensor) in (torch.Tensor, nn.Parameter):
        return tensor.numel() * tensor.element_size()
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]  # of subclasses
    return sum(_stored_bytes(getattr(tensor, n)) for n in names)
