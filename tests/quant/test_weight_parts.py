"""Stored tensors of a part: the table of dtypes and shapes, reconstruction, and refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from packed_weights import random_packed
from sedimo.errors import InputError
from sedimo.quant import fitting
from sedimo.quant.formats import Format, stored_bytes
from sedimo.quant.packing import pack
from sedimo.quant.parts import (
    TensorSpec,
    WeightPart,
    expected_tensors,
    reconstruct,
    weight_part,
)
from sedimo.quant.tensor import QuantizedTensor

FORMATS = ("uaq2", "uaq3", "uaq8", "uaq4g4", "uaq5g64", "kmc2", "kmc5", "kma3", "kma8")


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("shape", [(3, 7), (4, 2, 3), (2, 3, 3, 3), (1, 65)])
def test_stored_bytes_are_those_of_the_formats_module(text, shape):
    number_format = Format.parse(text)
    specs = expected_tensors(number_format, shape[0], int(np.prod(shape[1:])))
    assert sum(spec.n_bytes for spec in specs.values()) == stored_bytes(number_format, shape)
    assert random_packed(shape, text).stored_bytes == stored_bytes(number_format, shape)


def test_expected_tensors_as_the_specification_says():
    assert expected_tensors(Format.parse("uaq3"), 5, 10) == {
        "codes": TensorSpec(torch.uint8, (5, 4)),
        "scale": TensorSpec(torch.float32, (5, 1)),
        "zero_point": TensorSpec(torch.int16, (5, 1)),
    }
    assert expected_tensors(Format.parse("uaq4g4"), 5, 10) == {
        "codes": TensorSpec(torch.uint8, (5, 5)),
        "scale": TensorSpec(torch.float16, (5, 3)),
        "zero_point": TensorSpec(torch.uint8, (5, 3)),
    }
    assert expected_tensors(Format.parse("kmc2"), 5, 10, {"codebook": torch.float32}) == {
        "codes": TensorSpec(torch.uint8, (5, 3)),
        "codebook": TensorSpec(torch.float32, (5, 4)),
    }
    assert expected_tensors(Format.parse("kma2"), 5, 10)["codebook"] == TensorSpec(torch.float16, (1, 4))
    assert expected_tensors(Format.parse("fp16"), 5, 10, {"values": torch.bfloat16}) == {
        "values": TensorSpec(torch.bfloat16, (5, 10))
    }


def numbers(text, codes, **parameters):
    return reconstruct(Format.parse(text), {"codes": codes, **parameters}).tolist()


def test_reconstruction_by_hand():
    codes = torch.tensor([[0, 1, 3], [2, 2, 0]], dtype=torch.uint8)
    rows = {"scale": torch.tensor([[0.5], [2.0]]), "zero_point": torch.tensor([[1], [-1]], dtype=torch.int16)}
    assert numbers("uaq2", codes, **rows) == [[-0.5, 0.0, 1.0], [6.0, 6.0, 2.0]]
    grouped = {
        "scale": torch.tensor([[1.0, 4.0], [0.5, 0.25]], dtype=torch.float16),
        "zero_point": torch.tensor([[0, 1], [2, 3]], dtype=torch.uint8),
    }
    assert numbers("uaq2g2", codes, **grouped) == [[0.0, 1.0, 8.0], [0.0, 0.0, -0.75]]
    codebook = torch.tensor([[-2.0, -1.0, 0.0, 9.0], [1.0, 2.0, 3.0, 4.0]], dtype=torch.float16)
    assert numbers("kmc2", codes, codebook=codebook) == [[-2.0, -1.0, 9.0], [3.0, 3.0, 1.0]]
    assert numbers("kma2", codes, codebook=codebook[:1])[1] == [0.0, 0.0, -2.0]


@pytest.mark.parametrize("text", FORMATS)
def test_agrees_with_the_quantizers_own_numbers(text):
    weight = torch.randn(6, 21, generator=torch.Generator().manual_seed(3))
    fitted = fitting.fit(weight, Format.parse(text))
    part = weight_part(fitted)
    assert torch.equal(part.dequantize(weight.shape), fitted.dequantize())
    assert torch.equal(part.unpacked_codes(weight.shape), fitted.codes)


@given(st.integers(1, 4), st.integers(1, 40), st.sampled_from(FORMATS), st.integers(0, 9))
def test_any_shape_survives_packing(n_channels, n_inputs, text, seed):
    packed = random_packed((n_channels, n_inputs), text, seed=seed)
    part = packed.parts[0]
    rebuilt = reconstruct(part.format, {**part.tensors, "codes": packed.codes().reshape(n_channels, -1)})
    again = pack(part.unpacked_codes(packed.shape), part.format.bits)
    assert torch.equal(again, part.codes)
    assert torch.equal(rebuilt, packed.dequantize())


def test_a_group_larger_than_memory_costs_nothing():
    packed = random_packed((2, 5), "uaq4g999999999")
    assert packed.dequantize().shape == (2, 5)


@pytest.mark.parametrize(
    ("field", "tensor", "message"),
    [
        (
            "codes",
            torch.zeros(3, 5, dtype=torch.uint8),
            r"codes must be torch.uint8 \[3, 4\], got .* \[3, 5\]",
        ),
        ("codes", torch.zeros(3, 4, dtype=torch.int8), "codes must be torch.uint8"),
        ("codebook", torch.zeros(3, 8, dtype=torch.float16), r"codebook must be torch.float16 \[3, 16\]"),
        ("codebook", torch.zeros(3, 16, dtype=torch.float64), "codebook must be one of torch.float16, torch.float32"),
        ("scale", torch.zeros(3, 1), "scale must be absent"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(field, tensor, message):
    good = random_packed((3, 8), "kmc4").parts[0]
    with pytest.raises(InputError, match=message):
        replace(good, tensors={**good.tensors, field: tensor}).check((3, 8))


def test_missing_parameters_are_refused():
    codes = torch.zeros(1, 2, dtype=torch.uint8)
    with pytest.raises(InputError, match="uaq4 needs zero_point"):
        numbers("uaq4", codes, scale=torch.ones(1, 1))
    with pytest.raises(InputError, match="kma4 needs codebook"):
        numbers("kma4", codes)
    with pytest.raises(InputError, match="has no codes"):
        WeightPart(0, 2, Format.parse("fp16"), {"values": torch.zeros(1, 2)}).unpacked_codes((1, 2))


def test_parts_must_cover_the_inputs_once():
    part = random_packed((3, 8), "kmc4").parts[0]
    with pytest.raises(InputError, match="got only 8"):
        QuantizedTensor.from_parts([part], (3, 9), torch.float32)
    with pytest.raises(InputError, match=r"got 0\.\.8 at 8"):
        QuantizedTensor.from_parts([part, part], (3, 16), torch.float32)
    with pytest.raises(InputError, match="got only 0"):
        QuantizedTensor.from_parts([], (3, 8), torch.float32)
    with pytest.raises(InputError, match="at least one of each"):
        QuantizedTensor.from_parts([], (3, 0), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_part_left_alone_keeps_every_bit(dtype):
    weight = torch.randn(3, 4, 2).to(dtype)
    part = weight_part(weight, start=5)
    assert (part.start, part.stop, part.tensors["values"].dtype) == (5, 9, dtype)
    assert torch.equal(part.dequantize((3, 12, 2)), weight.float())
