"""Rounded activations against the framework's own fake quantization, and what must always hold."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sedimo.codec import from_json, to_json
from sedimo.errors import InputError
from sedimo.quant.activations import DYNAMIC, ActivationQuantizer, Activations, InputQuantizers, InputRange
from tolerances import FLOAT32_FORMULA

WIDTHS = st.integers(2, 8)
rows = st.lists(st.lists(st.floats(-100, 100, width=32), min_size=5, max_size=5), min_size=1, max_size=4).map(
    lambda values: torch.tensor(values)
)


def limits(quantizer):
    """Least and greatest code."""
    bits = quantizer.bits
    return (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if quantizer.symmetric else (0, 2**bits - 1)


def by_the_framework(row, quantizer, low, high):
    """One row by torch's fake quantization, with the scale and zero point that the definition gives."""
    qmin, qmax = limits(quantizer)
    if quantizer.symmetric:
        scale, zero = max(abs(low), abs(high)) / qmax, 0
    else:
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / qmax
        zero = round(-low / scale) if scale else 0
    return torch.fake_quantize_per_tensor_affine(row, scale or 1.0, zero, qmin, qmax)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_each_token_is_rounded_as_the_framework_rounds_it_with_the_tokens_own_range(bits, symmetric):
    quantizer = ActivationQuantizer(bits, symmetric)
    values = torch.randn(40, 64, generator=torch.Generator().manual_seed(bits)) + torch.linspace(-3, 3, 40)[:, None]
    for row, mine in zip(values, quantizer(values), strict=True):
        expected = by_the_framework(row, quantizer, float(row.min()), float(row.max()))
        assert mine.tolist() == pytest.approx(expected.tolist(), abs=FLOAT32_FORMULA)


@given(rows, WIDTHS, st.booleans())
def test_codes_are_whole_numbers_within_their_limits_and_zero_stays_zero(values, bits, symmetric):
    values[:, 0] = 0.0
    quantizer = ActivationQuantizer(bits, symmetric)
    codes, scale, zero_point = quantizer.codes(values)
    assert torch.equal(codes, codes.round())
    qmin, qmax = limits(quantizer)
    assert codes.min() >= qmin
    assert codes.max() <= qmax
    assert torch.equal(codes[:, 0], zero_point.flatten())
    assert (quantizer(values) - values).abs().max() <= scale.max() * 0.5001
    assert torch.equal(quantizer(values), (codes - zero_point) * scale)


def test_an_image_has_one_range_and_a_token_its_own():
    values = torch.tensor([[[[1.0, 2.0]], [[4.0, 255.0]]], [[[0.1, 0.2]], [[0.4, 25.5]]]])  # [2, 2, 1, 2]
    codes, scale, _ = ActivationQuantizer(8).codes(values, n_axes=3)
    assert scale.flatten().tolist() == pytest.approx([1.0, 0.1])
    assert codes[1].flatten().tolist() == [1, 2, 4, 255]
    assert torch.equal(ActivationQuantizer(8).codes(values[1], n_axes=3)[0], codes[1])  # an image alone
    assert ActivationQuantizer(8).codes(values)[1].shape == (2, 2, 1, 1)


def test_a_static_range_clips_and_each_group_of_timesteps_has_its_own():
    quantizer = ActivationQuantizer(8, range=InputRange((0.0, 0.0), (255.0, 2.55)))
    values = torch.tensor([[-3.0, 1.2, 300.0]])
    assert quantizer(values, group=0).tolist() == [[0.0, 1.0, 255.0]]
    assert quantizer(values, group=1)[0].tolist() == pytest.approx([0.0, 1.2, 2.55])
    two = InputQuantizers({"layer": quantizer}, (999.0, 10.0))
    assert [two.group(t) for t in (1000.0, 600.0, 500.0, 0.0)] == [0, 0, 1, 1]
    assert two.round("layer", values, n_axes=1, timestep=3.0).tolist() == quantizer(values, group=1).tolist()


def test_nothing_but_zeros_stays_and_half_precision_keeps_its_dtype():
    assert (ActivationQuantizer(4)(torch.zeros(2, 3)) == 0).all()
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        found = ActivationQuantizer(8)(values)
        assert found.dtype == dtype
        assert torch.equal(found, ActivationQuantizer(8)(values.float()).to(dtype))
    assert ActivationQuantizer(8)(torch.tensor([[1.0, math.nan]])).isnan().all()  # what is broken stays visible


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_grid_point_beyond_half_precision_is_its_greatest_number(bits):
    values = torch.tensor([[65504.0, -45856.0, 0.0]], dtype=torch.float16)
    found = ActivationQuantizer(bits)(values)
    exact = ActivationQuantizer(bits)(values.float())
    assert torch.equal(found.double(), exact.clamp(-65504, 65504).half().double())
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActivationQuantizer(9), r"activations take 2..8 bits, or 16, got 9"),
        (lambda: InputRange((), ()), "as many finite low as high"),
        (lambda: InputRange((0.0,), (math.nan,)), "as many finite low as high"),
        (lambda: InputRange((2.0,), (1.0,)), "low <= high"),
        (lambda: InputRange((-3e38,), (3e38,)), r"at most 2\^126 from zero"),
        (lambda: InputQuantizers({"a": ActivationQuantizer(8, range=InputRange((0.0,) * 2, (1.0,) * 2))}), "2 static"),
        (lambda: InputQuantizers({}, (math.inf,)), "must be finite"),
        (lambda: Activations(static={"a": {}}).quantizers({"a": 8}), "'a' at 8 bits: .*--act a8"),
    ],
)
def test_rules_that_mean_nothing_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_rules_have_a_name_of_their_own_and_survive_a_file():
    static = Activations(True, {"a": {"a8": InputRange((-1.0,), (2.0,))}})
    assert DYNAMIC.key == ""
    assert len({static.key, Activations(True).key, DYNAMIC.key}) == 3
    assert from_json(Activations, to_json(static)) == static
    found = static.quantizers({"a": 8, "b": 16})
    assert found.layers == {"a": ActivationQuantizer(8, True, InputRange((-1.0,), (2.0,)))}
    assert from_json(InputQuantizers, to_json(found)) == found
