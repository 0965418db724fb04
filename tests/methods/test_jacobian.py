"""First-order noise against an exact Jacobian, for every way a layer can be used."""

from __future__ import annotations

import copy
import os
import signal

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp

from sedimo.bank import fit_bank
from sedimo.errors import InputError, Interrupted, UnsupportedError
from sedimo.lab.exchange import passes
from sedimo.lab.lab import Lab
from sedimo.lab.study import Study
from sedimo.methods import jacobian
from sedimo.methods.jacobian import probe_jacobian
from sedimo.methods.taps import Changes, InputChangedError, Taps
from sedimo.pipelines.adapter import DenoiserCall, Sampling
from sedimo.pipelines.trajectory import batches_of, record
from tolerances import FLOAT32_NETWORK
from toy_pipeline import GUIDANCE, ToyAdapter, ToyDenoiser, ToyWeights, toy_space

SAMPLING = Sampling(seeds=(1, 2, 3), n_steps=2, batch_size=2)
LONGER = Sampling(seeds=(1, 2, 3), n_steps=4, batch_size=2)
SAMPLED = 0.4  # of means of 240 squared normals of unequal weight: 9 % were they equal
SAMPLED_MEAN = 0.25  # of means of 480 squared normals or more: they have 6 %
SAMPLED_NORM = 0.05  # of 5000 normals: they have 1 %


def linear_noise(denoiser, decision, packed, inputs):
    """J dW `[R, ...]` of one call, by forward-mode differentiation: the oracle."""
    weights = {f"{n}.weight": denoiser.get_submodule(n).weight.detach() for n in decision.layers}

    def run(replaced):
        return functional_call(denoiser, replaced, kwargs=dict(inputs), tie_weights=False)["sample"]

    return jvp(run, (weights,), ({k: packed - w for k, w in weights.items()},))[1].detach()


def made(guided=False, denoiser=None):
    adapter = ToyAdapter(denoiser, guided=guided)
    return adapter, fit_bank(ToyWeights(adapter.denoiser), toy_space(adapter.denoiser))


def squared_products(taps, output, direction):
    """By row; where rows mix, each gets the mean."""
    found, _ = taps.products([output], [direction], n_samples=len(output))
    return {name: (p.square() * len(p) / len(output)).expand(len(output), -1) for name, p in found.items()}


def test_squared_products_over_a_basis_are_the_exact_first_order_noise():
    adapter, bank = made(guided=True)
    denoiser, call = adapter.denoiser, record(adapter, SAMPLING).calls[1]
    changes = {
        d.name: Changes(d.layers, torch.stack([delta(bank, d, f).flatten(1) for f in d.formats if f.is_quantized]))
        for d in bank.space.decisions
    }
    n_rows = call.output.shape[0]
    sums = {name: torch.zeros(n_rows, c.deltas.shape[0], dtype=torch.float64) for name, c in changes.items()}
    with Taps(denoiser, changes) as taps:
        taps.begin(call.output.device)
        output = denoiser(**call.inputs)["sample"]
        assert taps.unused == ("unused",)
        for unit in torch.eye(output[0].numel()).reshape(-1, *output.shape[1:]):
            for name, squares in squared_products(taps, output, unit.expand_as(output)).items():
                sums[name] += squares
    for decision in bank.space.decisions:
        if decision.name in ("time", "unused"):
            continue  # rows cannot be told apart, or no noise
        for column, number_format in enumerate(f for f in decision.formats if f.is_quantized):
            packed = bank.quantized(decision.name, number_format).dequantize()
            exact = linear_noise(denoiser, decision, packed, call.inputs).flatten(1).square().sum(1).double()
            assert torch.allclose(sums[decision.name][:, column], exact, rtol=FLOAT32_NETWORK), decision.name


def delta(bank, decision, number_format):
    packed = bank.quantized(decision.name, number_format).dequantize()
    return packed - bank.weights.read(decision.layers[0])


def test_random_directions_give_the_first_order_noise_on_average():
    adapter, bank = made(guided=True)
    probe = probe_jacobian(Lab(adapter, bank), SAMPLING, n_directions=120, combine_rows=False)
    assert len(probe.numbers) == len(bank.space.decisions) == 7
    calls = list(batches_of(SAMPLING, record(adapter, SAMPLING).calls))
    for name in ("time", "first", "grouped"):
        packed = bank.quantized(name, bank.space.decision_index[name].formats[0]).dequantize()
        total = torch.zeros(3)
        for call, samples in calls:
            noise = linear_noise(adapter.denoiser, bank.space.decision_index[name], packed, call.inputs)
            rows = noise.flatten(1).square().sum(1) / call.output.flatten(1).square().sum(1)
            total[samples.start : samples.stop] += rows.detach().reshape(-1, len(samples)).mean(0) / SAMPLING.n_steps
        got = torch.tensor(probe.numbers[name][str(bank.space.decision_index[name].formats[0])])
        assert float(got.mean()) == pytest.approx(float(total.mean()), rel=SAMPLED_MEAN)
        if name == "time":  # shared by the batch: each sample is given the mean
            assert len(set(got[:2].tolist())) == 1
        else:
            assert torch.allclose(got, total, rtol=SAMPLED)


def test_with_guidance_noise_is_that_of_the_combined_prediction():
    adapter, bank = made(guided=True)
    probe = probe_jacobian(Lab(adapter, bank), LONGER, n_directions=60)
    assert probe.row_weights == pytest.approx((GUIDANCE, 1 - GUIDANCE), rel=FLOAT32_NETWORK)
    for name in ("time", "first", "twice"):
        decision = bank.space.decision_index[name]
        packed = bank.quantized(name, decision.formats[0]).dequantize()
        total = torch.zeros(3)
        for call, samples in batches_of(LONGER, record(adapter, LONGER).calls):
            noise = linear_noise(adapter.denoiser, decision, packed, call.inputs)
            pair = [GUIDANCE * t[: len(samples)] + (1 - GUIDANCE) * t[len(samples) :] for t in (noise, call.output)]
            powers = [t.detach().flatten(1).square().sum(1) for t in pair]
            total[samples.start : samples.stop] += powers[0] / powers[1] / LONGER.n_steps
        got = torch.tensor(probe.numbers[name][str(decision.formats[0])])
        assert float(got.mean()) == pytest.approx(float(total.mean()), rel=SAMPLED_MEAN)
        if name != "time":
            assert torch.allclose(got, total, rtol=SAMPLED)


def test_rows_that_stay_apart_are_averaged_by_sample(monkeypatch):
    adapter, bank = made(guided=True)

    def squares(_taps, _decisions, call, weights, _directions):
        values = torch.arange(len(call.output) // len(weights), dtype=torch.float64)[:, None].expand(-1, 3)
        return {"first": values}, ()

    monkeypatch.setattr(jacobian, "_mean_squares", squares)
    probe = probe_jacobian(Lab(adapter, bank), SAMPLING, combine_rows=False)
    assert probe.row_weights == (1.0,)
    assert probe.numbers["first"]["uaq3"] == (1.0, 2.0, 0.5)  # rows 0 and 2, 1 and 3 of the first batch; 0 and 1


def test_directions_are_relative_to_the_power_of_each_output():
    output = torch.randn(4, 2, 50, 50) * torch.tensor([1.0, 10.0, 0.1, 3.0]).reshape(4, 1, 1, 1)
    call = DenoiserCall(0, 1.0, {}, output)
    first, second = jacobian._directions(call, (1.0,), ["first", "second"])
    products = first.flatten(1).norm(dim=1) * output.flatten(1).norm(dim=1)
    assert torch.allclose(products, torch.tensor(5000.0).sqrt(), rtol=SAMPLED_NORM)
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])) < 0.1
    combined = 4 * output[:2] - 3 * output[2:]
    (spread,) = jacobian._directions(call, (4.0, -3.0), ["first"])
    assert torch.allclose(spread[:2] / 4, spread[2:] / -3)
    products = spread[:2].flatten(1).norm(dim=1) / 4 * combined.flatten(1).norm(dim=1)
    assert torch.allclose(products, torch.tensor(5000.0).sqrt(), rtol=SAMPLED_NORM)


@pytest.mark.parametrize("factor", [0.0, torch.nan, torch.inf])
def test_an_output_that_noise_has_no_measure_beside_is_refused(factor):
    adapter, bank = made()
    adapter.denoiser.register_forward_hook(lambda _module, _inputs, output: {"sample": factor * output["sample"]})
    with pytest.raises(InputError, match=r"the output at timestep .* positive and finite, .* error, or sqnr"):
        probe_jacobian(Lab(adapter, bank), SAMPLING)


def test_slices_keep_the_rows_of_a_sample_together(monkeypatch):
    adapter, bank = made(guided=True)
    whole = probe_jacobian(Lab(adapter, bank), LONGER)
    monkeypatch.setattr("sedimo.methods.taps.MAX_ROWS", 2)
    pieces = probe_jacobian(Lab(adapter, bank), LONGER)
    for decision in whole.numbers.keys() - {"time"}:
        assert pieces.numbers[decision]["uaq3"] == pytest.approx(whole.numbers[decision]["uaq3"], rel=FLOAT32_NETWORK)


def test_a_layer_that_is_never_called_makes_no_noise():
    adapter, bank = made()
    probe = probe_jacobian(Lab(adapter, bank), SAMPLING)
    assert probe.unused == ("unused",)
    assert set(probe.numbers["unused"]["uaq3"]) == {0.0}


def test_a_weight_used_behind_the_layers_back_is_refused():
    class Hidden(ToyDenoiser):
        def forward(self, sample, timestep, label=None):
            output = super().forward(sample, timestep, label)["sample"]
            return {"sample": output * (1 + self.unused.weight.mean())}

    adapter, bank = made(denoiser=Hidden())
    with pytest.raises(UnsupportedError, match="'unused' is used without calling"):
        probe_jacobian(Lab(adapter, bank), SAMPLING)
    assert all(p.requires_grad for p in adapter.denoiser.parameters())
    assert not any(m._forward_hooks for m in adapter.denoiser.modules())


def test_inputs_that_are_overwritten_do_not_spoil_the_result():
    class InPlace(ToyDenoiser):
        overwrite = False

        def forward(self, sample, timestep, label=None):
            x = self.conv_in(sample)
            y = self.out(nn.functional.silu(x))
            if self.overwrite:
                with torch.no_grad():
                    sample.mul_(0.0)
            return {"sample": y}

    torch.manual_seed(0)
    plain = InPlace()
    overwriting = copy.deepcopy(plain)
    overwriting.overwrite = True
    probes = []
    for denoiser in (plain, overwriting):
        adapter, bank = made(denoiser=denoiser)
        probes.append(_first_noise(adapter, bank))
    assert probes[0] == probes[1]


def _first_noise(adapter, bank):
    """Of one fresh call, whose inputs are cloned before each run: the toy overwrites them."""
    x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    delta = torch.randn(1, 8, 18, generator=torch.Generator().manual_seed(1))
    found = []
    for copied in (False, True):
        with Taps(adapter.denoiser, {"conv_in": Changes(("conv_in",), delta)}, copy_inputs=copied) as taps:
            taps.begin(x.device)
            output = adapter.denoiser(sample=x.clone(), timestep=torch.tensor(1.0))["sample"]
            if adapter.denoiser.overwrite and not copied:
                with pytest.raises(InputChangedError, match="conv_in"):
                    squared_products(taps, output, torch.ones_like(output))
            else:
                found.append(squared_products(taps, output, torch.ones_like(output))["conv_in"].tolist())
    return found[-1]


def test_the_result_depends_on_neither_memory_nor_batches(tmp_path, monkeypatch):
    adapter, bank = made(guided=True)
    whole = probe_jacobian(Lab(adapter, bank), SAMPLING)
    assert len(passes(bank.space)) == 1
    assert len(passes(bank.space, 4000)) > 3
    with monkeypatch.context() as small:
        small.setattr("sedimo.methods.taps.MEMORY_BYTES", 4000)
        small.setattr("sedimo.methods.taps.MAX_ROWS", 1)
        pieces = probe_jacobian(Lab(adapter, bank), SAMPLING)
    for decision, formats in whole.numbers.items():
        for text, values in formats.items():
            if decision == "time":
                continue  # its pooled form mixes the samples of a slice, not of a batch
            assert pieces.numbers[decision][text] == pytest.approx(values, rel=FLOAT32_NETWORK)


def test_what_was_measured_is_not_measured_again(tmp_path):
    adapter, bank = made()
    calls = []
    with Study(tmp_path) as study:
        first = probe_jacobian(Lab(adapter, bank, study=study), SAMPLING)
        handle = adapter.denoiser.register_forward_hook(lambda *_: calls.append(1))
        again = probe_jacobian(Lab(adapter, bank, study=study), SAMPLING)
        handle.remove()
    assert again.numbers == first.numbers
    assert len(calls) == 4  # the trajectory alone: two batches of two steps


def test_an_interrupted_probe_goes_on(tmp_path):
    adapter, bank = made()

    class Interrupting:
        def start(self, total, label):
            self.left = 2

        def advance(self, n=1):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)

        def done(self):
            pass

    with Study(tmp_path) as study:
        with pytest.raises(Interrupted, match="same command again"):
            probe_jacobian(Lab(adapter, bank, study=study, progress=Interrupting()), SAMPLING)
        assert len(study.probe_keys()) == 2
        assert (
            probe_jacobian(Lab(adapter, bank, study=study), SAMPLING).numbers
            == probe_jacobian(Lab(adapter, bank), SAMPLING).numbers
        )


def test_more_directions_are_other_measurements(tmp_path):
    adapter, bank = made()
    with Study(tmp_path) as study:
        probe_jacobian(Lab(adapter, bank, study=study), SAMPLING)
        n_parts = len(study.probe_keys())
        probe_jacobian(Lab(adapter, bank, study=study), SAMPLING, n_directions=1)
        assert len(study.probe_keys()) == 2 * n_parts
