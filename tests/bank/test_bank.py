"""The bank: errors and bytes of candidates, packed weights on demand, and a cache that is reused."""

from __future__ import annotations

import hashlib

import pytest
import torch

from sedimo.bank import FIT_VERSION, Bank, BankCache, fit_bank
from sedimo.errors import InputError, StateError
from sedimo.graph.model import DenoiserGraph, Node
from sedimo.quant.fitting import fit
from sedimo.quant.formats import FP16, Format
from sedimo.quant.parts import PartFormat
from sedimo.space import Recipe, search_space

KMC3, UAQ4, KMA4 = Format("kmc", 3), Format("uaq", 4), Format("kma", 4)
SHAPES = {"a": (24, 64), "b": (24, 64), "c": (32, 16, 3, 3)}


class Weights:
    """A weight source that counts reads; layers a and b hold equal values."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.tensors = {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}
        self.tensors["b"] = self.tensors["a"]
        self.reads = []

    @property
    def digest(self):
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in self.tensors.values())).hexdigest()

    def read(self, layer_name):
        self.reads.append(layer_name)
        return self.tensors[layer_name]


class Counted:
    def __init__(self):
        self.events = []

    def start(self, total, label):
        self.events.append(("start", total, label))

    def advance(self, n=1):
        self.events.append(("advance", n))

    def done(self):
        self.events.append(("done",))


def space_of(formats="kmc3,uaq4,kma4,fp16"):
    nodes = tuple(Node(n, "layer", n, "", 10, "Linear", s) for n, s in SHAPES.items())
    return search_space(DenoiserGraph("Toy", nodes, (), (), (("a", "b"),)), formats)


def test_errors_are_those_of_the_packed_weights():
    weights = Weights()
    bank = fit_bank(weights, space_of())
    assert {(c.decision, c.format) for c in bank.candidates} == {
        (d, f) for d in ("a", "c") for f in (KMC3, UAQ4, KMA4, FP16)
    }
    for candidate in bank.candidates:
        if candidate.format == FP16:
            assert (candidate.error, candidate.n) == (0.0, 0)
            continue
        weight = weights.tensors[candidate.decision]
        packed = bank.quantized(candidate.decision, candidate.format)
        error = (packed.dequantize() - weight).double().square().sum() / weight.double().square().sum()
        assert candidate.error == pytest.approx(float(error))
        assert candidate.n == 0
        assert (candidate.paper_bytes, candidate.stored_bytes) == (packed.paper_bytes, packed.stored_bytes)


def test_estimated_errors_carry_their_uncertainty_and_nothing_is_fitted():
    exact, estimated = (fit_bank(Weights(), space_of(), sample_channels=n) for n in (None, 8))
    for candidate in estimated.candidates:
        known = exact.index[candidate.decision, candidate.format].error
        if candidate.format.family in ("kma", "fp"):  # whole-tensor codebooks are fitted in full
            assert (candidate.n, candidate.error) == (0, pytest.approx(known))
        else:
            assert candidate.n == 8
            assert candidate.standard_error > 0
            assert abs(candidate.error - known) < 6 * candidate.standard_error + 0.02 * known
    all_channels = fit_bank(Weights(), space_of(), sample_channels=999)
    assert {c.n for c in all_channels.candidates} == {0}


def test_a_recipe_gives_the_weights_of_its_layers_and_tied_layers_share_one():
    bank = fit_bank(Weights(), space_of())
    found = bank.quantize(Recipe({"a": KMC3, "b": KMC3, "c": FP16}))
    assert set(found) == {"a", "b"}
    assert found["a"] is found["b"]
    assert torch.equal(found["a"].dequantize(), fit(bank.weights.read("a"), KMC3).dequantize())
    with pytest.raises(InputError, match="nowhere"):
        bank.quantize(Recipe({"nowhere": KMC3}))
    with pytest.raises(InputError, match="no such decision"):
        bank.quantized("b", KMC3)
    with pytest.raises(InputError, match="left alone"):
        bank.quantized("a", FP16)


def test_parts_of_a_layer_take_their_own_formats():
    weights = Weights()
    bank = fit_bank(weights, space_of())
    parts = (PartFormat(0, 4, KMC3), PartFormat(4, 12, FP16), PartFormat(12, 16, UAQ4))
    packed = bank.quantize(Recipe({"c": parts}))["c"]
    weight = weights.tensors["c"]
    assert torch.equal(packed.dequantize()[:, 4:12], weight[:, 4:12])
    assert torch.equal(packed.dequantize()[:, :4], fit(weight[:, :4], KMC3).dequantize())
    for wrong in ((PartFormat(0, 4, KMC3),), (PartFormat(0, 4, KMC3), PartFormat(5, 16, KMC3))):
        with pytest.raises(InputError, match="cover its 16 inputs"):
            bank.quantize(Recipe({"c": wrong}))


def test_a_weight_left_alone_takes_the_bytes_of_its_source():
    weights = Weights()
    weights.tensors["c"] = weights.tensors["c"].half().float()  # float32 that 16 bits hold exactly is stored so
    bank = fit_bank(weights, space_of(), sample_channels=2)
    assert [bank.index[n, FP16].stored_bytes for n in ("a", "c")] == [24 * 64 * 4, 32 * 16 * 9 * 2]
    recipe = bank.space.recipe({"c": UAQ4})
    sizes = bank.quantize(recipe)["c"].stored_bytes + 24 * 64 * 4
    assert bank.stored_bytes(recipe) == sizes == bank.space.stored_bytes(recipe) + 24 * 64 * 2


def test_a_cache_is_reused_and_gives_the_same_bits(tmp_path):
    progress = Counted()
    first = fit_bank(Weights(), space_of(), cache=tmp_path, progress=progress)
    assert progress.events == [("start", 2, "fitting formats"), ("advance", 1), ("advance", 1), ("done",)]
    weights = Weights()
    again = fit_bank(weights, space_of(), cache=tmp_path)
    assert weights.reads == []
    assert again.candidates == first.candidates
    for decision in ("a", "c"):
        for number_format in (KMC3, UAQ4, KMA4):
            pair = [b.quantized(decision, number_format) for b in (first, again)]
            assert torch.equal(pair[0].dequantize(), pair[1].dequantize())


def test_a_cache_extends_to_more_formats_and_not_to_other_weights(tmp_path):
    fit_bank(Weights(), space_of("kmc3"), cache=tmp_path)
    weights = Weights()
    wider = fit_bank(weights, space_of("kmc3,uaq4"), cache=tmp_path)
    assert weights.reads == ["a", "c"]
    assert wider.candidates == fit_bank(Weights(), space_of("kmc3,uaq4")).candidates
    assert set(BankCache(tmp_path / f"{weights.digest[:32]}-v{FIT_VERSION}").parameters("a")) == {KMC3, UAQ4}
    other = Weights(seed=1)
    fit_bank(other, space_of("kmc3"), cache=tmp_path)
    assert other.reads == ["a", "c"]


def test_a_damaged_cache_is_named(tmp_path):
    fit_bank(Weights(), space_of(), cache=tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StateError, match="is damaged"):
        fit_bank(Weights(), space_of(), cache=tmp_path).quantized("a", KMC3)


def test_unfit_weights_are_refused_by_name():
    for value in (float("nan"), float("inf")):
        weights = Weights()
        weights.tensors["c"][3, 3, 1, 1] = value
        for n in (None, 4):
            with pytest.raises(InputError, match="'c' holds"):
                fit_bank(weights, space_of(), sample_channels=n)
    weights = Weights()
    weights.tensors["c"] = weights.tensors["c"][:8]
    with pytest.raises(InputError, match="the space says"):
        fit_bank(weights, space_of())


def test_few_packed_weights_are_kept_when_memory_is_short(monkeypatch):
    bank = fit_bank(Weights(), space_of())
    monkeypatch.setattr("sedimo.bank._PACKED_BYTES_KEPT", 1)
    short = Bank(bank.weights, bank.space, bank.candidates)
    one = short.quantized("a", KMC3)
    assert short.quantized("a", KMC3) is one
    short.quantized("c", KMC3)
    assert short.quantized("a", KMC3) is not one
    assert bank.quantized("a", KMC3) is bank.quantized("a", KMC3)


def test_activation_bits_do_not_change_the_weight():
    bank = fit_bank(Weights(), space_of("kmc3,kmc3a8"))
    eight = Format.parse("kmc3a8")
    assert bank.index["a", eight].error == bank.index["a", KMC3].error
    assert bank.quantized("a", eight) is bank.quantized("a", KMC3)


def test_changes_are_those_of_the_packed_weights():
    weights = Weights()
    bank = fit_bank(weights, space_of())
    weights.reads.clear()
    found = dict(bank.changes("a"))
    assert weights.reads == ["a"]
    assert set(found) == {KMC3, UAQ4, KMA4}
    for number_format, change in found.items():
        assert torch.equal(change, bank.quantized("a", number_format).dequantize() - weights.tensors["a"])


def test_estimates_and_exact_errors_do_not_mix_in_a_cache(tmp_path):
    fit_bank(Weights(), space_of(), sample_channels=8, cache=tmp_path)
    exact = fit_bank(Weights(), space_of(), cache=tmp_path)
    assert {c.n for c in exact.candidates} == {0}
    fewer = fit_bank(Weights(), space_of(), sample_channels=5, cache=tmp_path)
    assert {c.n for c in fewer.candidates} == {0, 5}
