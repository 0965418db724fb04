"""Codes of b bits to bytes and back: an exact inverse that wastes nothing beyond the last byte of a row.

The codes of a row are written one after the other, least significant bit first, into bytes that are filled
from their least significant bit. Each row starts at a byte of its own; the unused high bits of its last byte
are zero. Code i therefore occupies the bits i b .. i b + b - 1 of its row, where bit n of a row is bit
n mod 8 of its byte n div 8. For b = 3 and the codes A B C D E F G H, each written A2 A1 A0:

    bit      7  6  5  4  3  2  1  0
    byte 0  C1 C0 B2 B1 B0 A2 A1 A0
    byte 1  F0 E2 E1 E0 D2 D1 D0 C2
    byte 2  H2 H1 H0 G2 G1 G0 F2 F1

Eight codes always fill exactly b bytes, which is the unit both functions work in. Everything is plain torch
and stays on the device of its input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedimo.errors import InputError

_UNIT = 8  # codes per unit, and bits per byte


def row_bytes(bits: int, n_codes: int) -> int:
    """Bytes of one packed row: nothing is wasted beyond its last byte."""
    return (n_codes * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Bytes uint8 `[R, ceil(N * bits / 8)]` of codes uint8 `[R, N]`, every code below 2^bits, bits 1..8.

    Example:
        >>> pack(torch.tensor([[1, 2, 3, 0, 7]], dtype=torch.uint8), 3).tolist()
        [[209, 112]]
    """
    _check(codes, bits, "codes")
    n_rows, n_codes = codes.shape
    if codes.numel() and int(codes.max()) >> bits:
        raise InputError(f"codes of {bits} bits must be below {1 << bits}, got {int(codes.max())}")
    n_units = -(-n_codes // _UNIT)
    units = torch.nn.functional.pad(codes, (0, n_units * _UNIT - n_codes)).reshape(n_rows, n_units, _UNIT)
    packed = codes.new_zeros(n_rows, n_units, bits)
    for index in range(_UNIT):
        byte, shift = divmod(index * bits, 8)
        packed[:, :, byte] |= units[:, :, index] << shift  # uint8 drops what belongs to the next byte
        if shift + bits > 8:
            packed[:, :, byte + 1] |= units[:, :, index] >> (8 - shift)
    return packed.reshape(n_rows, n_units * bits)[:, : row_bytes(bits, n_codes)].contiguous()


def unpack(packed: Tensor, bits: int, n_codes: int) -> Tensor:
    """The codes uint8 `[R, n_codes]` that `pack` wrote.

    Example:
        >>> unpack(torch.tensor([[209, 112]], dtype=torch.uint8), 3, 5).tolist()
        [[1, 2, 3, 0, 7]]
    """
    _check(packed, bits, "packed codes")
    if packed.shape[1] != (n_bytes := row_bytes(bits, n_codes)):
        raise InputError(f"{n_codes} codes of {bits} bits take {n_bytes} bytes per row, got {packed.shape[1]}")
    n_rows, n_units = packed.shape[0], -(-n_codes // _UNIT)
    units = torch.nn.functional.pad(packed, (0, n_units * bits - packed.shape[1])).reshape(n_rows, n_units, bits)
    codes = packed.new_empty(n_rows, n_units, _UNIT)
    for index in range(_UNIT):
        byte, shift = divmod(index * bits, 8)
        code = units[:, :, byte] >> shift
        if shift + bits > 8:
            code = code | (units[:, :, byte + 1] << (8 - shift))
        codes[:, :, index] = code & ((1 << bits) - 1)
    return codes.reshape(n_rows, n_units * _UNIT)[:, :n_codes].contiguous()


def _check(tensor: Tensor, bits: int, what: str) -> None:
    if tensor.dtype != torch.uint8 or tensor.ndim != 2:
        raise InputError(f"{what} must be uint8 of two dimensions, got {tensor.dtype} of shape {tuple(tensor.shape)}")
    if not 1 <= bits <= 8:
        raise InputError(f"bits must lie in 1..8, got {bits}")
