"""What every family of number formats promises, and what a new one gets for nothing."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from diffusers import DiTTransformer2DModel

from contracts.toys import FOREIGN, TOY
from packed_weights import denoise
from sedimo.allocation.solve import allocate
from sedimo.bank import fit_bank
from sedimo.checkpoint.contents import named_layers
from sedimo.checkpoint.layout import Configuration, entry_of, read_configuration
from sedimo.checkpoint.weights import replace_weights, save_denoiser
from sedimo.errors import InputError, UnfitFormatError
from sedimo.graph.model import DenoiserGraph, Node
from sedimo.methods.error import error_table
from sedimo.pipelines.weights import ModuleWeights
from sedimo.quant import families
from sedimo.quant.families import FAMILIES
from sedimo.quant.fitting import (
    error_estimates,
    feedback,
    fit,
    fit_parameters,
    quantize_weight,
    with_codes,
)
from sedimo.quant.formats import FULL_BITS, Format, paper_bytes, parse_formats, stored_bytes
from sedimo.quant.parts import expected_tensors, reconstruct, weight_part
from sedimo.quant.tensor import QuantizedTensor
from sedimo.reporting.words import family_words
from sedimo.space import search_space
from tolerances import FLOAT64_SUM

ALL = (*FAMILIES, TOY, FOREIGN)
SHAPES = ((5, 64), (6, 7), (4, 3, 3, 3))


@pytest.fixture(autouse=True)
def _with_toys(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", ALL)


def formats_of(family, n_inputs=64):
    """Every weight format, with group sizes where there are such; only those that take rows of `n_inputs`."""
    groups = (None, 2, 16, 999) if family.takes_groups else (None,)
    found = [Format(family.name, bits, size) for bits, size in itertools.product(family.widths, groups)]
    return [f for f in found if not family.refusal(f, (1, n_inputs))]


def make_weight(shape, dtype=torch.float32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


@pytest.mark.parametrize("family", ALL, ids=lambda f: f.name)
class TestFamilyContract:
    def test_its_text_names_exactly_one_format(self, family):
        for weight_format, activation_bits in itertools.product(formats_of(family), (4, 8, FULL_BITS)):
            wanted = Format(family.name, weight_format.bits, weight_format.group_size, activation_bits)
            assert Format.parse(str(wanted)) == wanted

    def test_other_widths_and_groups_are_refused(self, family):
        for bits in {1, *(b + 1 for b in family.widths)} - set(family.widths):
            with pytest.raises(InputError, match="bits must"):
                Format(family.name, bits)
        for size in (1,) if family.takes_groups else (1, 64):
            with pytest.raises(InputError, match="a group size is for"):
                Format(family.name, family.widths[0], size)

    def test_people_can_read_what_it_is(self, family):
        for number_format in formats_of(family):
            assert family_words(number_format)
        assert family.label == family.name or str(Format.parse(family.label)) == family.label

    def test_packing_keeps_every_bit(self, family):
        for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.float16, torch.bfloat16)):
            weight = make_weight(shape, dtype)
            for number_format in quantized(family, weight):
                fitted = fit(weight, number_format)
                packed = QuantizedTensor.from_fitted(fitted, torch.float32)
                assert fitted.dequantize().dtype == torch.float32
                assert torch.equal(packed.dequantize(), fitted.dequantize())
                assert torch.equal(packed.codes().reshape(fitted.codes.shape), fitted.codes)
                assert int(fitted.codes.max()) <= number_format.qmax

    def test_bytes_are_those_of_the_stored_tensors(self, family):
        for shape in SHAPES:
            weight = make_weight(shape)
            for number_format in quantized(family, weight):
                part = weight_part(fit(weight, number_format))
                part.check(shape)
                expected = expected_tensors(number_format, shape[0], weight[0].numel())
                assert list(part.tensors) == list(expected)
                assert part.stored_bytes == stored_bytes(number_format, shape)
                beside = sum(t.numel() for name, t in part.tensors.items() if name != "codes")
                assert paper_bytes(number_format, shape) == weight.numel() * number_format.bits // 8 + 2 * beside

    def test_numbers_on_the_grid_stay(self, family):
        for shape in SHAPES:
            weight = make_weight(shape)
            for number_format in quantized(family, weight):
                fitted = fit(weight, number_format)
                again = with_codes(fitted.dequantize(), fitted)
                assert torch.equal(again.dequantize(), fitted.dequantize())

    def test_formats_fitted_together_are_those_fitted_alone(self, family):
        weight = make_weight((6, 64), torch.float16)
        for number_format, fitted in fit_parameters(weight, quantized(family, weight)).items():
            both = with_codes(weight, fitted), fit(weight, number_format)
            error, own = ((f.dequantize() - weight.float()).square().sum() for f in both)
            assert float(error) == pytest.approx(float(own))

    def test_errors_are_those_of_the_stored_numbers(self, family):
        weight = make_weight((6, 64), torch.float16)
        formats = quantized(family, weight)
        estimates = error_estimates(weight, formats, n_channels=6, generator=torch.Generator())
        for number_format, fitted in fit_parameters(weight, formats).items():
            found = with_codes(weight, fitted).dequantize().double()
            error = float((found - weight.double()).square().sum() / weight.double().square().sum())
            assert fitted.relative_error == pytest.approx(error, rel=FLOAT64_SUM)
            assert estimates[number_format].value == pytest.approx(error, rel=FLOAT64_SUM)
            assert estimates[number_format].standard_error == 0

    def test_its_own_parameters_are_no_complaint_and_missing_ones_are(self, family):
        weight = make_weight((6, 64))
        for number_format in quantized(family, weight):
            fitted = fit(weight, number_format)
            tensors = {"codes": fitted.codes, **fitted.parameters}
            assert family.complaint(number_format, fitted.parameters) == ""
            for name in tensors:
                with pytest.raises(InputError, match=f"{number_format} needs {name}"):
                    reconstruct(number_format, {n: t for n, t in tensors.items() if n != name})

    def test_error_feedback_gives_codes_of_the_format(self, family):
        weight = make_weight((6, 64))
        moments = torch.eye(64) + 0.5
        for number_format, fitted in fit_parameters(weight, quantized(family, weight)).items():
            codes = with_codes(weight, fitted, [feedback(moments)]).codes
            assert codes.dtype == torch.uint8
            assert int(codes.max()) <= number_format.qmax

    def test_a_uniform_family_tells_its_grid(self, family):
        weight = make_weight((6, 64))
        for number_format in quantized(family, weight):
            fitted = fit(weight, number_format)
            if family.is_uniform:
                scale, zero_point = family.grid(number_format, fitted.parameters, 64)
                assert torch.equal((fitted.codes.float() - zero_point) * scale, fitted.dequantize())
            else:
                with pytest.raises(InputError, match="no uniform grid"):
                    family.grid(number_format, fitted.parameters, 64)

    def test_what_cannot_be_fitted_is_refused_by_name(self, family):
        weight = make_weight((6, 64))
        weight[2, 3] = float("nan")
        for number_format in formats_of(family):
            with pytest.raises(InputError, match=r"layer 'proj'.*(NaN or infinity|nothing to fit)"):
                fit(weight, number_format, layer_name="proj")

    def test_a_checkpoint_describes_it_in_full_unless_it_is_foreign(self, family):
        weight = make_weight((6, 64))
        for number_format in quantized(family, weight):
            packed = quantize_weight(weight, number_format)
            if family.is_foreign:
                with pytest.raises(InputError, match="format of another program"):
                    entry_of(packed)
                continue
            told = Configuration({"proj": entry_of(packed)}, {"proj": "proj"})
            assert read_configuration(told.plain, place="here") == told
            sizes = {name: spec.n_bytes for name, spec in told.tensors.items()}
            assert list(sizes) == [f"proj.weight.0.{name}" for name in packed.parts[0].tensors]
            assert sum(sizes.values()) == packed.stored_bytes


def quantized(family, weight):
    """Its formats that change this weight."""
    return [f for f in formats_of(family, weight[0].numel()) if f.is_quantized]


def space_of(denoiser, formats):
    shapes = {name: tuple(layer.weight.shape) for name, layer in named_layers(denoiser)}
    kinds = {2: "Linear", 4: "Conv2d"}
    nodes = tuple(Node(n, "layer", n, "", 10, kinds[len(shape)], shape) for n, shape in shapes.items())
    return search_space(DenoiserGraph("Toy", nodes, (), (), ()), formats)


def test_a_family_of_ten_lines_is_parsed_fitted_counted_decided_on_packed_and_loaded(tiny_dit, tmp_path):
    assert parse_formats("toy3,toy4a8") == (Format("toy", 3), Format("toy", 4, None, 8))
    weights, space = ModuleWeights(tiny_dit), space_of(tiny_dit, "toy3,toy6,fp16")
    bank = fit_bank(weights, space, cache=tmp_path / "bank")
    assert all(c.error > 0 for c in bank.candidates if c.format.is_quantized)
    choice = allocate(error_table(bank.space, bank.candidates), bits=5.0)
    assert {str(f) for f in choice.choice.values()} >= {"toy3", "toy6"}
    again = fit_bank(weights, space, cache=tmp_path / "bank")
    denoiser = copy.deepcopy(tiny_dit)
    replace_weights(denoiser, again.quantize(choice.recipe))
    save_denoiser(denoiser, tmp_path / "small")
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path / "small")
    assert torch.equal(denoise(loaded), denoise(denoiser))
    assert not torch.equal(denoise(loaded), denoise(tiny_dit))
    assert {str(f) for f in bank.quantize(choice.recipe)["proj_out_2"].formats} <= {"toy3", "toy6"}


def test_weights_that_a_family_refuses_are_left_to_other_formats():
    nodes = tuple(Node(f"l{n}", "layer", "l", "", 10, "Linear", (64, n)) for n in (64, 72))
    space = search_space(DenoiserGraph("Toy", nodes, (), (), ()), "t4_K,toy4")
    assert [[str(f) for f in d.formats] for d in space.decisions] == [["t4_K", "toy4"], ["toy4"]]
    assert space.notes == ("l72: t4_K was dropped, because rows of 72 weights are no blocks of 32",)
    with pytest.raises(UnfitFormatError, match="layer 'l72' cannot take t4_K: rows of 72 weights"):
        fit(make_weight((64, 72)), Format.parse("t4_K"), layer_name="l72")
