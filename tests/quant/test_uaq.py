"""Uniform grids against the published search written plainly, and the promises of the stored types."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedimo.errors import InputError
from sedimo.quant.families import uaq
from sedimo.quant.families.uaq import UAQ
from sedimo.quant.formats import Format

LARGEST_ZERO_POINT = 3000  # shrinking by ten makes it 30,000; test_a_far_offset... has larger ones
EQUAL_SCORES = 1e-6  # two scores this close [relative] are a tie for float32 powers


def published_score(row, scale, zero_point, qmax):
    codes = torch.clamp(torch.round(row / scale) + zero_point, 0, qmax)
    return (row - (codes - zero_point) * scale).abs().double().pow(2.4).mean().item()


def published_grid(row, bits):
    """The search of the released code, one row at a time."""
    found = []
    for percent in range(0, 100, 10):
        high, low = row.max() * (1.0 - percent * 0.01), row.min() * (1.0 - percent * 0.01)
        scale = (high - low) / (2**bits - 1)
        zero_point = (-low / scale).round()
        found.append((published_score(row, scale, zero_point, 2**bits - 1), scale.item(), zero_point.item()))
    return min(found)  # scores first


def make_rows(n_rows, n_inputs, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n_rows, n_inputs, generator=generator)
    return (rows * torch.rand(n_rows, 1, generator=generator).add(0.01) + shift).half().float()


def fit_grid(rows, number_format):
    return SimpleNamespace(**uaq.fit_grid(rows, number_format))


def dequantized(rows, number_format):
    grid = fit_grid(rows, number_format)
    codes = UAQ.codes(rows, number_format, vars(grid))
    return grid, codes, UAQ.dequantize(number_format, {**vars(grid), "codes": codes})


@settings(max_examples=30)
@given(st.integers(2, 8), st.integers(2, 700), st.sampled_from([0.0, 3.0, -3.0]), st.integers(0, 2**32))
def test_rows_equal_the_published_search(bits, n_inputs, shift, seed):
    rows = make_rows(3, n_inputs, seed, shift)
    grid = fit_grid(rows, Format("uaq", bits))
    assert (grid.scale.dtype, grid.zero_point.dtype) == (torch.float32, torch.int16)
    for row, scale, zero_point in zip(rows, grid.scale, grid.zero_point, strict=True):
        if row.abs().max() > LARGEST_ZERO_POINT * (row.max() - row.min()) / (2**bits - 1):
            continue  # a constant or nearly constant row: the published zero point does not fit into int16
        score, its_scale, its_zero = published_grid(row, bits)
        if (scale.item(), zero_point.item()) != (its_scale, its_zero):
            ours = published_score(row, scale, zero_point.float(), 2**bits - 1)
            assert ours == pytest.approx(score, rel=EQUAL_SCORES)


@settings(max_examples=30)
@given(st.integers(2, 8), st.integers(2, 200), st.integers(2, 70), st.integers(0, 2**32))
def test_groups_search_with_the_scale_that_is_stored(bits, n_inputs, group_size, seed):
    rows = make_rows(2, n_inputs, seed, shift=0.2)
    number_format = Format("uaq", bits, group_size)
    grid, codes, weights = dequantized(rows, number_format)
    assert (grid.scale.dtype, grid.zero_point.dtype) == (torch.float16, torch.uint8)
    assert grid.scale.shape == grid.zero_point.shape == (2, number_format.n_groups(n_inputs))
    for index in range(grid.scale.shape[1]):
        part = slice(index * group_size, (index + 1) * group_size)
        for row, scale, zero_point in zip(rows[:, part], grid.scale[:, index], grid.zero_point[:, index], strict=True):
            low, high = row.min().clamp(max=0), row.max().clamp(min=0)
            scores = []
            for factor in uaq.SHRINK_FACTORS:
                stored = ((high * factor - low * factor) / number_format.qmax).half().float()
                scores.append(published_score(row, stored, (-low * factor / stored).round(), number_format.qmax))
            ours = published_score(row, scale.float(), zero_point.float(), number_format.qmax)
            assert ours <= min(scores) * (1 + EQUAL_SCORES) + 1e-30
    assert torch.equal(UAQ.codes(weights, number_format, vars(grid)), codes)


def test_a_short_last_group_is_fitted_like_a_row_of_its_own():
    rows = make_rows(4, 150, seed=1)
    number_format = Format("uaq", 4, 64)
    whole, last = fit_grid(rows, number_format), fit_grid(rows[:, 128:].contiguous(), number_format)
    assert torch.equal(whole.scale[:, 2:], last.scale)
    assert torch.equal(whole.zero_point[:, 2:], last.zero_point)


@given(st.integers(2, 8), st.integers(-300, 300), st.integers(-8, 3))
def test_values_on_a_grid_come_back_exactly(bits, zero_point, exponent):
    levels = torch.arange(1 << bits, dtype=torch.float32).flip(0).reshape(1, -1)
    rows = (levels - zero_point) * 2.0**exponent
    _, codes, weights = dequantized(rows, Format("uaq", bits))
    assert torch.equal(weights, rows)
    assert torch.equal(codes.float(), levels)
    if 0 <= zero_point < 1 << bits:
        grid, _, weights = dequantized(rows, Format("uaq", bits, 1 << bits))
        assert torch.equal(weights, rows)
        assert int(grid.zero_point) == zero_point


@given(st.integers(0, 2**32), st.integers(2, 8), st.sampled_from([None, 16]))
@settings(max_examples=30)
def test_error_is_half_a_step_inside_the_range_and_codes_are_stable(seed, bits, group_size):
    rows = make_rows(3, 50, seed)
    number_format = Format("uaq", bits, group_size)
    grid, codes, weights = dequantized(rows, number_format)
    scale, zero_point = (
        t.float().repeat_interleave(group_size or 50, dim=1)[:, :50] for t in (grid.scale, grid.zero_point)
    )
    is_inside = (rows >= -zero_point * scale) & (rows <= (number_format.qmax - zero_point) * scale)
    assert bool(((weights - rows).abs() <= scale * 0.50001).logical_or(~is_inside).all())
    assert torch.equal(UAQ.codes(weights, number_format, vars(grid)), codes)


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e-7, -1e-7, 6e4, 1e30, -1e-40])
def test_constant_rows_come_back_exactly(value):
    rows = torch.full((2, 30), value)
    assert torch.equal(dequantized(rows, Format("uaq", 3))[2], rows)


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 6e4, -6e4, 2.0**-20, -(2.0**-14)])
def test_constant_groups_of_a_float16_value_come_back_exactly(value):
    rows = torch.full((2, 30), value).half().float()
    assert torch.equal(dequantized(rows, Format("uaq", 3, 16))[2], rows)


def test_constant_groups_of_other_values_take_the_nearest_scale():
    rows = torch.full((1, 16), 0.1)
    plain = abs(float(torch.tensor(0.1).half()) - 0.1)
    assert abs(float(dequantized(rows, Format("uaq", 4, 16))[2][0, 0]) - 0.1) < plain


def test_rows_of_one_sign_have_a_zero_point_outside_the_codes():
    rows = make_rows(2, 100, seed=1).abs() * 0.1 + 5
    below = fit_grid(rows, Format("uaq", 4))
    above = fit_grid(-rows, Format("uaq", 4))
    assert bool((below.zero_point < 0).all())
    assert bool((above.zero_point > 15).all())
    grouped = fit_grid(-rows, Format("uaq", 4, 50))  # the range is widened to zero, its upper end
    assert bool((grouped.zero_point == 15).all())


def test_a_far_offset_widens_the_scale_until_the_zero_point_fits():
    rows = 4096 + torch.linspace(0, 0.01, 40).reshape(1, -1)
    grid, _, weights = dequantized(rows, Format("uaq", 8))
    assert abs(int(grid.zero_point)) <= 32767
    assert float((weights - rows).abs().max()) <= 4096.01 / 32766


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e12, 1e30])
def test_search_does_not_depend_on_the_unit_of_the_weights(magnitude):
    rows = make_rows(5, 200, seed=2)
    unit = 2.0 ** round(torch.tensor(magnitude).log2().item())
    plain, scaled = fit_grid(rows, Format("uaq", 3)), fit_grid(rows * unit, Format("uaq", 3))
    assert torch.equal(plain.scale * unit, scaled.scale)
    assert torch.equal(plain.zero_point, scaled.zero_point)


def test_tiny_groups_keep_a_positive_scale():
    grid, _, weights = dequantized(torch.tensor([[1e-12, -1e-12, 0.0, 0.0]]), Format("uaq", 4, 4))
    assert float(grid.scale) > 0
    assert bool(torch.isfinite(weights).all())


@pytest.mark.parametrize(("number_format", "value"), [("uaq4g4", 3e38), ("uaq2g4", 4e5), ("uaq4", 3e38)])
def test_a_range_too_wide_for_the_scale_is_refused(number_format, value):
    with pytest.raises(InputError, match=f"{number_format} cannot hold values"):
        fit_grid(torch.tensor([[value, -value, 0.0, 0.0]]), Format.parse(number_format))
