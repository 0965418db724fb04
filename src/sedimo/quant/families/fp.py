"""The number that is left alone: `fp16` stands for a weight in 16 bits, whichever float its source has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from sedimo.errors import InputError
from sedimo.quant.families.family import Family, Parameters, Stored, Words

if TYPE_CHECKING:
    from sedimo.quant.formats import Format


class FullPrecision(Family):
    """Weights as they are: `values` `[C, N]` and no codes. More than 16 bits are kept where they matter."""

    name = "fp"
    words = Words("left at 16 bits", example="`fp16` the untouched 16-bit number", mark="")
    widths = (16,)
    dtypes = {"values": (torch.float16, torch.bfloat16, torch.float32)}  # noqa: RUF012 -- a constant, as in Family

    def tensors(self, number_format: Format, n_channels: int, n_inputs: int) -> Stored:
        return {"values": (torch.float16, (n_channels, n_inputs))}

    def fit(self, rows: Tensor, formats: Sequence[Format], weight: Tensor) -> NoReturn:
        raise InputError(f"{formats[0]} leaves a weight alone; there is nothing to fit")

    def codes(self, rows: Tensor, number_format: Format, parameters: Parameters) -> NoReturn:
        raise InputError(f"{number_format} leaves a weight alone and has no codes")

    def dequantize(self, number_format: Format, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["values"].float()


FP = FullPrecision()
