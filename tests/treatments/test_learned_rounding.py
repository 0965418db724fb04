"""Learned rounding against the best of all roundings, found by trying every one."""

from __future__ import annotations

import itertools

import pytest
import torch

from sedimo.errors import InputError
from sedimo.quant.fitting import fit, quantize_weight
from sedimo.quant.formats import Format
from sedimo.quant.tensor import QuantizedTensor
from sedimo.treatments import learned_rounding as module
from sedimo.treatments.learned_rounding import GAMMA, ZETA, SoftWeight, beta_at, learn_rounding
from tolerances import FLOAT32_FORMULA, FLOAT64_FORMULA

NEAR_OPTIMUM = 1.02  # learned rounding leaves at most this many times the least possible error, on average over cases
STARTS_EXACT = 1e-5  # in scales: float32 rounding of V and back


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "LEARNING_RATE", 3e-2)


def layer_problem(seed, text, n_inputs=8, n_outputs=1):
    """A weight, its packed form, and inputs with a mean, so that errors of weights can cancel."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_outputs, n_inputs, generator=generator)
    inputs = torch.randn(256, n_inputs, generator=generator) + 1
    return weight, quantize_weight(weight, text), inputs


def error_of(quantized, weight, inputs):
    return float((inputs.double() @ (quantized - weight).double().T).square().sum())


def least_error(weight, packed, inputs):
    """Over all roundings up or down of a weight of one output channel."""
    (part,) = packed.parts
    group = part.format.group_size or weight.shape[1]
    scale = part.tensors["scale"].float().repeat_interleave(group, dim=1)[:, : weight.shape[1]]
    zero = part.tensors["zero_point"].float().repeat_interleave(group, dim=1)[:, : weight.shape[1]]
    below = (weight / scale).floor()
    errors = []
    for ups in itertools.product((0, 1), repeat=weight.shape[1]):
        codes = (below + torch.tensor([ups]) + zero).clamp(0, part.format.qmax)
        errors.append(error_of((codes - zero) * scale, weight, inputs))
    return min(errors)


def learned(weight, packed, inputs, n_steps=300):
    soft, nearest = SoftWeight(weight, packed), error_of(packed.dequantize(), weight, inputs)
    learn_rounding([soft], lambda: (inputs @ (soft.soft() - weight).T).square().sum() / nearest, n_steps)
    return soft.hard()


@pytest.mark.parametrize("text", ["uaq2", "uaq3", "uaq4", "uaq3g4"])
def test_learned_rounding_is_near_the_best_of_all_roundings(text):
    ratios = []
    for seed in range(4):
        weight, packed, inputs = layer_problem(seed, text)
        best, nearest = least_error(weight, packed, inputs), error_of(packed.dequantize(), weight, inputs)
        found = error_of(learned(weight, packed, inputs).dequantize(), weight, inputs)
        assert best * (1 - FLOAT64_FORMULA) <= found <= nearest * (1 + FLOAT64_FORMULA)
        ratios.append(found / best)
    assert sum(ratios) / len(ratios) <= NEAR_OPTIMUM


def test_the_soft_weight_starts_at_the_weight_where_the_grid_reaches():
    weight, packed, _ = layer_problem(1, "uaq4", 64, 3)
    (part,), soft = packed.parts, SoftWeight(weight, packed).soft().detach()
    scale = part.tensors["scale"]
    steps = weight / scale + part.tensors["zero_point"]
    inside = (steps >= 0) & (steps <= part.format.qmax)
    assert inside.float().mean() > 0.8
    assert ((soft - weight).abs()[inside] <= (STARTS_EXACT * scale).expand_as(weight)[inside]).all()
    assert torch.equal(SoftWeight(weight, packed).hard().codes(), packed.codes())


@pytest.mark.parametrize("text", ["uaq3", "uaq4g8"])
def test_only_codes_change_and_by_one_step_at_most(text):
    weight, packed, inputs = layer_problem(2, text, 20, 6)
    found = learned(weight, packed, inputs, 50)
    (before,), (after,) = packed.parts, found.parts
    assert torch.equal(before.tensors["scale"], after.tensors["scale"])
    assert torch.equal(before.tensors["zero_point"], after.tensors["zero_point"])
    assert (found.format, found.stored_bytes, found.paper_bytes) == (
        packed.format,
        packed.stored_bytes,
        packed.paper_bytes,
    )
    steps = found.codes().int() - packed.codes().int()
    assert steps.abs().max() == 1


def test_parts_without_a_grid_stay_and_parts_with_one_learn():
    generator = torch.Generator().manual_seed(3)
    weight, inputs = torch.randn(4, 12, generator=generator), torch.randn(64, 12, generator=generator) + 1
    pieces = [fit(weight[:, :4], Format.parse("kmc2")), weight[:, 4:6], fit(weight[:, 6:], Format.parse("uaq2"))]
    packed = QuantizedTensor.from_fitted(pieces, weight.dtype)
    found = learned(weight, packed, inputs)
    for before, after in zip(packed.parts[:2], found.parts[:2], strict=True):
        assert before.tensors.keys() == after.tensors.keys()
        assert all(torch.equal(before.tensors[k], after.tensors[k]) for k in before.tensors)
    assert not torch.equal(packed.parts[2].codes, found.parts[2].codes)
    assert error_of(found.dequantize(), weight, inputs) < error_of(packed.dequantize(), weight, inputs)


def test_the_penalty_is_that_of_the_paper():
    weight, packed, _ = layer_problem(4, "uaq3")
    soft = SoftWeight(weight, packed)
    h = (torch.sigmoid(soft.logits[0].detach().double()) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
    for beta in (20.0, 3.5, 2.0):
        expected = float((1 - (2 * h - 1).abs() ** beta).sum())
        assert float(soft.penalty(beta).detach()) == pytest.approx(expected, rel=FLOAT32_FORMULA)
    with torch.no_grad():
        soft.logits[0].copy_(torch.where(soft.logits[0] > 0, 10.0, -10.0))
    assert float(soft.penalty(2.0).detach()) == 0.0


def test_beta_falls_from_first_to_last_after_the_warm_up():
    betas = [beta_at(step, 11) for step in range(11)]
    assert betas[:3] == [None, None, None]
    assert betas[-1] == 2.0
    assert all(a > b for a, b in itertools.pairwise(betas[3:]))
    assert 18 < betas[3] <= 20


def test_another_shape_is_refused():
    weight, packed, _ = layer_problem(5, "uaq3")
    with pytest.raises(InputError, match="shape"):
        SoftWeight(weight[:, 1:], packed)
