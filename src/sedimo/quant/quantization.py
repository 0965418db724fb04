"""From a weight and a format to a packed weight, in one call."""

from __future__ import annotations

import torch

from sedimo.errors import InputError
from sedimo.quant.fitting import fit
from sedimo.quant.formats import Format
from sedimo.quant.tensor import QuantizedTensor


def quantize_weight(weight: torch.Tensor, number_format: Format | str, *, layer_name: str = "") -> QuantizedTensor:
    """A weight `[out, in, ...]` of any floating dtype, packed in one format; on the weight's device.

    Example:
        >>> packed = quantize_weight(torch.eye(8), "kmc2")
        >>> packed.stored_bytes, torch.equal(packed.dequantize(), torch.eye(8))
        (80, True)

    Raises:
        InputError: not a format, `fp16`, or a weight that cannot be quantized (NaN, infinity, integers).
    """
    wanted = Format.parse(number_format) if isinstance(number_format, str) else number_format
    if not wanted.is_quantized:
        raise InputError(f"format {wanted} leaves a weight alone: there is nothing to pack")
    packed = QuantizedTensor.from_fitted(fit(weight, wanted, layer_name=layer_name), weight.dtype)
    packed.layer_name = layer_name
    moved: QuantizedTensor = packed.to(weight.device)  # type: ignore[assignment]  # torch types it as its base
    return moved
