"""Trying other weights leaves nothing behind."""

from __future__ import annotations

import copy

import pytest
import torch

from sedimo.bank import fit_bank
from sedimo.checkpoint.inputs import round_inputs, rounded_inputs
from sedimo.errors import InputError
from sedimo.lab import exchange as probe
from sedimo.lab.exchange import Prober, probed
from sedimo.quant.formats import FP16, Format
from sedimo.quant.tensor import QuantizedTensor
from sedimo.space import Recipe
from toy_pipeline import ToyDenoiser, ToyWeights, toy_space

UAQ3, UAQ8 = Format("uaq", 3), Format("uaq", 8)


class BoomError(Exception):
    pass


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    return ToyDenoiser().eval()


class Asked:
    """A bank that remembers of which layers it was asked for weights."""

    def __init__(self, bank):
        self.bank, self.asked, self.input_quantizers = bank, [], bank.input_quantizers

    def quantize(self, recipe):
        self.asked.append(set(recipe.layers))
        return self.bank.quantize(recipe)


@pytest.fixture
def supply(denoiser):
    return Asked(fit_bank(ToyWeights(denoiser), toy_space(denoiser)))


def snapshot(denoiser):
    return {n: (id(p), p.detach().clone(), p.requires_grad) for n, p in denoiser.named_parameters()}


def assert_untouched(denoiser, before):
    after = snapshot(denoiser)
    assert after.keys() == before.keys()
    for name, (identity, values, wants) in before.items():
        assert (identity, wants) == (after[name][0], after[name][2])
        assert torch.equal(values.view(torch.int32), after[name][1].view(torch.int32))


def test_weights_are_exchanged_inside_and_restored_to_the_bit(denoiser):
    before = snapshot(denoiser)
    new = torch.full_like(denoiser.first.weight, float("nan"))
    with probed(denoiser, {"first": new, "second": new}) as inside:
        assert inside is denoiser
        assert denoiser.first.weight is denoiser.second.weight
        assert denoiser.first.weight.isnan().all()
        assert not denoiser.first.weight.requires_grad
    assert_untouched(denoiser, before)


@pytest.mark.parametrize("error", [BoomError, KeyboardInterrupt])
def test_weights_are_restored_after_an_exception(denoiser, error):
    before = snapshot(denoiser)
    with pytest.raises(error), probed(denoiser, {"out": torch.zeros(2, 8, 1, 1)}):
        raise error
    assert_untouched(denoiser, before)


@pytest.mark.parametrize("name", ["nowhere", "", "twice.weight", "conv_in.bias"])
def test_a_foreign_layer_or_shape_is_refused_and_nothing_changed(denoiser, name):
    before = snapshot(denoiser)
    first = torch.zeros(8, 8)
    with pytest.raises(InputError, match="has no layer"), probed(denoiser, {"first": first, name: first}):
        pass
    with pytest.raises(InputError, match=r"shape \(2, 8, 1, 1\)"), probed(denoiser, {"first": first, "out": first}):
        pass
    assert_untouched(denoiser, before)


def test_a_switch_touches_only_what_differs(denoiser, supply):
    before = snapshot(denoiser)
    with Prober(denoiser, supply) as prober:
        assert prober.switch(Recipe({"first": UAQ3, "second": UAQ3, "twice": UAQ8, "out": FP16})) == 3
        twice = denoiser.twice.weight
        assert denoiser.first.weight is denoiser.second.weight
        assert prober.switch(Recipe({"first": UAQ8, "second": UAQ8, "twice": UAQ8})) == 2
        assert denoiser.twice.weight is twice
        assert torch.equal(denoiser.first.weight, supply.bank.quantized("first", UAQ8).dequantize())
        assert prober.switch(Recipe({"twice": UAQ8, "conv_in": UAQ3})) == 3
        assert id(denoiser.first.weight) == before["first.weight"][0]
        assert prober.switch(Recipe({"twice": UAQ8, "conv_in": UAQ3})) == 0
        assert prober.switch(Recipe({})) == 2
        assert_untouched(denoiser, before)
        prober.switch(Recipe({"twice": UAQ3}))
    assert supply.asked == [{"first", "second", "twice"}, {"first", "second"}, {"conv_in"}, {"twice"}]
    assert_untouched(denoiser, before)


def test_a_failing_switch_restores_everything(denoiser, supply):
    before = snapshot(denoiser)
    with Prober(denoiser, supply) as prober:
        prober.switch(Recipe({"twice": UAQ8}))
        with pytest.raises(InputError):
            prober.switch(Recipe({"first": UAQ8, "nowhere": UAQ8}))
        assert_untouched(denoiser, before)
        assert prober.switch(Recipe({"twice": UAQ8})) == 1  # it does not believe that twice is still exchanged
        assert torch.equal(denoiser.twice.weight, supply.bank.quantized("twice", UAQ8).dequantize())


def test_one_module_under_two_names_is_restored_once(denoiser):
    denoiser.alias = denoiser.twice
    before = snapshot(denoiser)
    with probed(denoiser, {"twice": torch.zeros(8, 8), "alias": torch.ones(8, 8)}):
        pass
    assert_untouched(denoiser, before)


def test_a_packed_weight_is_dequantized_in_the_dtype_of_the_layer(denoiser, supply):
    packed = supply.bank.quantized("twice", UAQ3)
    half = copy.deepcopy(denoiser).half()
    with probed(half, {"twice": packed}):
        assert half.twice.weight.dtype == torch.float16
        assert not isinstance(half.twice.weight, QuantizedTensor)
        assert torch.equal(half.twice.weight, packed.to(torch.float16).dequantize())


def test_hooks_stay_while_activations_do(denoiser, supply, monkeypatch):
    given = []

    def count(module, inputs):
        given.append(inputs)
        round_inputs(module, inputs)

    monkeypatch.setattr(probe, "round_inputs", count)
    plain, rounded = Recipe({"first": UAQ3}), Recipe({"first": Format.parse("uaq3a4")})
    with Prober(denoiser, supply) as prober:
        for recipe in (plain, Recipe({"first": UAQ8}), plain):
            prober.switch(recipe)
        assert len(given) == 1  # takes off what may have been there
        for recipe, n_given in ((rounded, 2), (rounded, 2), (plain, 3), (rounded, 4)):
            prober.switch(recipe)
            assert len(given) == n_given
            assert rounded_inputs(denoiser).layers.keys() == ({"first"} if recipe is rounded else set())
        prober.restore()
        assert not rounded_inputs(denoiser).layers
        prober.switch(rounded)
        assert rounded_inputs(denoiser).layers.keys() == {"first"}
    assert not rounded_inputs(denoiser).layers
