"""Packed codes: bytes as literals, an exact inverse, nothing wasted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sedimo.errors import InputError
from sedimo.quant.formats import row_bytes
from sedimo.quant.packing import pack, unpack


def codes_of(*rows):
    return torch.tensor(rows, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (2, [3, 0, 1, 2, 1], [0b10_01_00_11, 0b01]),
        (3, [1, 2, 3, 0, 7, 5, 6, 4], [0b11_010_001, 0b1_111_000_0, 0b100_110_10]),
        (4, [1, 2, 15], [0x21, 0x0F]),
        (5, [31, 0, 1], [0b000_11111, 0b0_00001_00]),
        (6, [0b110001, 0b000111], [0b11_110001, 0b0001]),
        (7, [0b1010101, 0b1100110], [0b0_1010101, 0b110011]),
        (8, [0, 127, 255], [0, 127, 255]),
    ],
)
def test_bytes_are_those_of_the_documentation(bits, codes, packed):
    assert pack(codes_of(codes), bits).tolist() == [packed]
    assert unpack(codes_of(packed), bits, len(codes)).tolist() == [codes]


@given(st.integers(1, 8), st.integers(0, 4), st.integers(0, 70), st.integers(0, 2**32))
def test_unpack_inverts_pack(bits, n_rows, n_codes, seed):
    codes = torch.randint(
        0, 1 << bits, (n_rows, n_codes), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    packed = pack(codes, bits)
    assert packed.shape == (n_rows, row_bytes(bits, n_codes))
    assert torch.equal(unpack(packed, bits, n_codes), codes)


@given(st.integers(1, 8), st.integers(1, 20))
def test_rows_are_independent_and_their_spare_bits_zero(bits, n_codes):
    full = torch.full((1, n_codes), (1 << bits) - 1, dtype=torch.uint8)
    both = pack(torch.cat([full, torch.zeros_like(full)]), bits)
    assert int(both[1].sum()) == 0
    assert torch.equal(both[:1], pack(full, bits))
    assert sum(int(byte).bit_count() for byte in both[0]) == bits * n_codes


def test_any_layout_of_codes_is_read_by_its_values():
    codes = torch.randint(0, 8, (5, 7), dtype=torch.uint8)
    assert torch.equal(pack(codes.t().contiguous().t(), 3), pack(codes, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack(codes_of([4]), 2), "must be below 4, got 4"),
        (lambda: pack(codes_of([1]), 9), "bits must lie in 1..8, got 9"),
        (lambda: pack(torch.zeros(2, 2), 4), "must be uint8"),
        (lambda: pack(torch.zeros(4, dtype=torch.uint8), 4), "two dimensions"),
        (lambda: unpack(codes_of([1, 2]), 4, 5), "take 3 bytes per row, got 2"),
        (lambda: unpack(codes_of([1]), 0, 5), "bits must lie in 1..8"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
