"""The memory that a model really takes, packed weights counted packed."""

from __future__ import annotations

from torch import nn

from sedimo.quant.tensor import QuantizedTensor


def memory_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers as they lie in memory, shared tensors once.

    Example:
        >>> memory_bytes(nn.Linear(4, 2, bias=False))
        32
    """
    found: dict[object, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        parts = tensor.parts if isinstance(tensor, QuantizedTensor) else ()
        for t in [t for p in parts for t in p.tensors.values()] or [tensor]:
            size = t.numel() * t.element_size()
            found[(t.device, t.data_ptr(), size) if t.data_ptr() else id(t)] = size
    return sum(found.values())
