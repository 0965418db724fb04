"""Fitting a weight: what is stored, for any dtype and layout; estimates of errors; bad input."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedimo.errors import InputError
from sedimo.quant.families.family import CostEstimate
from sedimo.quant.families.kmeans import fit_codebooks
from sedimo.quant.fitting import (
    error_estimates,
    fit,
    fit_parameters,
    with_codes,
)
from sedimo.quant.formats import FP16, PAPER_FORMATS, WIDE_FORMATS, Format, parse_formats, stored_bytes
from sedimo.quant.packing import pack
from tolerances import FLOAT32_SUM, FLOAT64_SUM, STANDARD_ERRORS

QUANTIZED = tuple(f for f in WIDE_FORMATS if f.is_quantized)
STORED = 1e-4  # relative: what rounding the codebook to float16 may cost, promised


def make_weight(*shape, seed=0, dtype=torch.float32):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    return weight.to(dtype)


def fitted_together(weight, formats):
    return {f: with_codes(weight, fitted) for f, fitted in fit_parameters(weight, formats).items()}


def relative_error(weight, fitted):
    difference = fitted.dequantize().double() - weight.double()
    return float(difference.square().sum() / weight.double().square().sum())


@pytest.mark.parametrize("number_format", [*QUANTIZED, Format.parse("kmc8"), Format.parse("kma8")], ids=str)
def test_fields_are_those_of_the_family(number_format):
    weight = make_weight(6, 300)
    fitted = fit(weight, number_format)
    assert (fitted.format, fitted.shape) == (number_format, (6, 300))
    assert (fitted.codes.dtype, fitted.codes.shape) == (torch.uint8, (6, 300))
    assert int(fitted.codes.max()) <= number_format.qmax
    if number_format.family == "uaq":
        assert list(fitted.parameters) == ["scale", "zero_point"]
        assert {t.shape for t in fitted.parameters.values()} == {(6, number_format.n_groups(300))}
        types = [torch.float16, torch.uint8] if number_format.group_size else [torch.float32, torch.int16]
        assert [t.dtype for t in fitted.parameters.values()] == types
    else:
        assert list(fitted.parameters) == ["codebook"]
        codebook = fitted.parameters["codebook"]
        assert codebook.dtype == torch.float16
        assert codebook.shape == (6 if number_format.family == "kmc" else 1, number_format.n_levels)
        assert bool((codebook.diff(dim=1) >= 0).all())


@pytest.mark.parametrize("number_format", QUANTIZED, ids=str)
def test_bytes_of_the_tensors_are_the_stored_bytes_of_the_format(number_format):
    fitted = fit(make_weight(6, 300), number_format)
    tensors = [pack(fitted.codes, number_format.bits), *fitted.parameters.values()]
    n_bytes = sum(t.numel() * t.element_size() for t in tensors)
    assert n_bytes == fitted.stored_bytes == stored_bytes(number_format, (6, 300))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(8, 30), (8, 6, 5), (8, 5, 3, 2), (8, 5, 3, 2, 1)])
def test_any_shape_dtype_and_layout_gives_the_same_rows(dtype, shape):
    weight = make_weight(*shape, dtype=dtype)
    rows = fitted_together(weight.reshape(8, 30).float(), PAPER_FORMATS)
    order = list(reversed(range(len(shape))))
    strided = weight.permute(order).contiguous().permute(order).requires_grad_()
    assert len(shape) == 1 or not strided.is_contiguous()
    for number_format, fitted in fitted_together(strided, PAPER_FORMATS).items():
        assert fitted.shape == shape
        assert fitted.dequantize().dtype == torch.float32
        torch.testing.assert_close(
            fitted.dequantize().reshape(8, 30), rows[number_format].dequantize(), rtol=FLOAT32_SUM, atol=0
        )


@settings(max_examples=15)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 90))
def test_formats_fitted_together_equal_formats_fitted_alone(seed, n_rows, n_inputs):
    weight = make_weight(n_rows, n_inputs, seed=seed, dtype=torch.float16)
    together = fitted_together(weight, QUANTIZED)
    assert tuple(together) == QUANTIZED
    for number_format in QUANTIZED:
        alone = fit(weight, number_format)
        assert relative_error(weight, alone) == pytest.approx(relative_error(weight, together[number_format]))


@pytest.mark.parametrize("number_format", QUANTIZED, ids=str)
def test_parameters_know_their_error_and_codes_are_made_again(number_format):
    weight = make_weight(7, 130, dtype=torch.bfloat16)
    parameters = fit_parameters(weight, [number_format])[number_format]
    fitted, again = fit(weight, number_format), with_codes(weight, parameters)
    assert torch.equal(again.codes, fitted.codes)
    assert torch.equal(again.dequantize(), fitted.dequantize())
    assert parameters.relative_error == pytest.approx(relative_error(weight, fitted), rel=FLOAT64_SUM)


@pytest.mark.parametrize("number_format", QUANTIZED, ids=str)
def test_quantizing_twice_changes_nothing(number_format):
    fitted = fit(make_weight(7, 130), number_format)
    assert torch.equal(with_codes(fitted.dequantize(), fitted).codes, fitted.codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_the_stored_codebook_is_nearly_the_optimum(bits):
    weight = make_weight(20, 400)
    ((_, errors),) = fit_codebooks(weight.numpy(), [1 << bits])
    stored = fit_parameters(weight, [Format("kmc", bits)])[Format("kmc", bits)]
    optimum = float(errors.sum())
    assert optimum <= stored.squared_error * (1 + FLOAT64_SUM)
    assert stored.squared_error <= optimum * (1 + STORED)


@pytest.mark.parametrize("number_format", parse_formats("uaq3,uaq4g8,kmc3,kma3"), ids=str)
@pytest.mark.parametrize("value", [0.0, 0.3125, -0.3125])
def test_a_constant_weight_is_reproduced_exactly(number_format, value):
    weight = torch.full((3, 20), value)
    assert torch.equal(fit(weight, number_format).dequantize(), weight)
    parameters = fit_parameters(weight, [number_format])[number_format]
    assert (parameters.squared_error, parameters.relative_error) == (0.0, 0.0)


def test_codes_follow_a_codebook_that_had_to_be_float32():
    weight = make_weight(4, 60) * 1e-6
    fitted = fit(weight, Format.parse("kmc4"))
    assert fitted.parameters["codebook"].dtype == torch.float32
    plain = fit(weight * 2.0**20, Format.parse("kmc4"))
    assert relative_error(weight, fitted) == pytest.approx(relative_error(weight * 2.0**20, plain), rel=2 * STORED)


@pytest.mark.parametrize(
    "call", [fit, lambda w, f, **k: error_estimates(w, [f], n_channels=8, generator=torch.Generator(), **k)]
)
@pytest.mark.parametrize("number_format", parse_formats("uaq3,kmc3,kma3"), ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_nan_and_infinity_name_the_layer(call, number_format, value, dtype):
    weight = make_weight(4, 10, dtype=dtype)
    weight[2, 3] = value
    with pytest.raises(InputError, match=r"layer 'blocks\.3\.to_q' holds NaN or infinity"):
        call(weight, number_format, layer_name="blocks.3.to_q")


@pytest.mark.parametrize(
    ("weight", "number_format", "message"),
    [
        (torch.zeros(3, 4, dtype=torch.int32), "kmc3", r"floating tensor \[out, in, \.\.\.\]"),
        (torch.zeros(3), "kmc3", r"of shape \(3,\)"),
        (torch.zeros(3, 0), "kmc3", "non-empty"),
        (torch.zeros(3, 4), "fp16", "nothing to fit"),
        (torch.full((3, 4), 1e300, dtype=torch.float64), "kmc3", "as float32"),
        (torch.tensor([[-3e38, 3e38]]), "uaq3", "layer 'proj': uaq3 cannot hold values"),
    ],
)
def test_bad_input_is_refused(weight, number_format, message):
    with pytest.raises(InputError, match=message):
        fit(weight, Format.parse(number_format), layer_name="proj")


def test_parameters_of_another_shape_are_refused():
    fitted = fit(make_weight(3, 4), Format.parse("uaq3"))
    with pytest.raises(InputError, match=r"shape \(3, 5\), its parameters were fitted for \(3, 4\)"):
        with_codes(make_weight(3, 5), fitted)


def test_what_was_not_asked_for_is_refused():
    weight, number_format = make_weight(3, 4), Format.parse("uaq3")
    with pytest.raises(InputError, match="have no codes yet"):
        fit_parameters(weight, [number_format])[number_format].dequantize()


def test_estimates_from_all_channels_are_exact():
    weight = make_weight(9, 70, dtype=torch.float16)
    estimates = error_estimates(weight, WIDE_FORMATS, n_channels=100, generator=torch.Generator())
    assert tuple(estimates) == WIDE_FORMATS
    assert estimates[FP16] == CostEstimate(0.0)
    for number_format, parameters in fit_parameters(weight, QUANTIZED).items():
        estimate = estimates[number_format]
        assert (estimate.standard_error, estimate.n) == (0.0, 0)
        assert estimate.value == pytest.approx(parameters.relative_error, rel=FLOAT64_SUM)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_estimates_from_some_channels_are_unbiased_and_know_their_error(dtype):
    """Channels of different size: two standard errors cover the truth nearly as often as Student's t says."""
    sizes = torch.linspace(0.5, 1.5, 60).reshape(-1, 1)
    weight = (make_weight(60, 64) * sizes).to(dtype)
    formats = parse_formats("uaq3,kmc3")
    truth = {f: p.relative_error for f, p in fit_parameters(weight, formats).items()}
    draws = [
        error_estimates(weight, formats, n_channels=30, generator=torch.Generator().manual_seed(seed))
        for seed in range(200)
    ]
    for number_format in formats:
        found = [draw[number_format] for draw in draws]
        scores = torch.tensor([(e.value - truth[number_format]) / e.standard_error for e in found])
        assert abs(float(scores.mean())) < 0.5  # the bias of a ratio and a skewed spread, not the method
        assert float((scores.abs() < 2).float().mean()) > 0.85
        assert {e.n for e in found} == {30}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_error_of_a_per_tensor_codebook_is_exact(dtype):
    weight = make_weight(30, 64, dtype=dtype)
    kma = Format.parse("kma3")
    estimate = error_estimates(weight, [kma], n_channels=4, generator=torch.Generator())[kma]
    assert estimate.value == pytest.approx(fit_parameters(weight, [kma])[kma].relative_error, rel=FLOAT64_SUM)
    assert (estimate.standard_error, estimate.n) == (0.0, 0)


def test_estimates_repeat_with_the_generator():
    weight = make_weight(30, 20)
    first, second, other = (
        error_estimates(weight, PAPER_FORMATS, n_channels=5, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert first == second
    assert first != other


def test_a_per_tensor_codebook_of_many_float32_values_is_estimated_from_a_sample():
    weight = make_weight(1100, 1000)
    truth = fit_parameters(weight, [Format.parse("kma4")])[Format.parse("kma4")]
    found = error_estimates(weight, [Format.parse("kma4")], n_channels=500, generator=torch.Generator().manual_seed(0))
    estimate = found[Format.parse("kma4")]
    assert estimate.value == pytest.approx(truth.relative_error, abs=STANDARD_ERRORS * estimate.standard_error)


def test_estimates_of_a_weight_of_zeros_are_zero():
    found = error_estimates(torch.zeros(9, 4), PAPER_FORMATS, n_channels=3, generator=torch.Generator())
    assert {(e.value, e.standard_error) for e in found.values()} == {(0.0, 0.0)}


def test_an_error_bar_needs_two_channels():
    with pytest.raises(InputError, match="at least 2 output channels, got n_channels=1"):
        error_estimates(make_weight(4, 4), PAPER_FORMATS, n_channels=1, generator=torch.Generator())
    lone = error_estimates(make_weight(1, 40), PAPER_FORMATS, n_channels=1, generator=torch.Generator())
    assert {(e.standard_error, e.n) for e in lone.values()} == {(0.0, 0)}


def test_importing_compiles_nothing():
    code = "import sys, sedimo.quant.fitting; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
