"""Local noise against outputs computed with exchanged weights."""

from __future__ import annotations

import math

import pytest
import torch

from sedimo.bank import fit_bank
from sedimo.lab import exchange
from sedimo.lab.lab import Lab
from sedimo.lab.study import Study
from sedimo.methods import taps
from sedimo.methods.sqnr import probe_sqnr, sqnr_table
from sedimo.pipelines import trajectory
from sedimo.pipelines.adapter import Sampling
from sedimo.pipelines.trajectory import batches_of, record
from sedimo.quant.formats import Format
from tolerances import FLOAT32_NETWORK, FLOAT32_SAMPLING
from toy_pipeline import ToyAdapter, ToyDenoiser, ToyWeights, toy_space

SAMPLING = Sampling(seeds=(1, 2, 3), n_steps=2, batch_size=2)


def made(guided=False):
    adapter = ToyAdapter(guided=guided)
    return adapter, fit_bank(ToyWeights(adapter.denoiser), toy_space(adapter.denoiser))


def outputs_of(denoiser, layer, call, weight=None):
    """All outputs of a layer in one call of the full-precision denoiser; with `weight`, on the same inputs."""
    kept, module = [], denoiser.get_submodule(layer)

    def keep(_module, args, output):
        if weight is None:
            kept.append(output)
        else:
            kept.append(
                module._conv_forward(args[0], weight, module.bias)
                if hasattr(module, "_conv_forward")
                else torch.nn.functional.linear(args[0], weight, module.bias)
            )

    handle = module.register_forward_hook(keep)
    with torch.no_grad():
        denoiser(**call.inputs)
    handle.remove()
    return kept


def expected_ratio(adapter, bank, name, number_format, step):
    """Relative noise per sample, sample by sample and row by row."""
    decision, packed = bank.space.decision_index[name], bank.quantized(name, number_format).dequantize()
    found = {}
    for call, samples in batches_of(SAMPLING, record(adapter, SAMPLING).calls):
        if call.step != step:
            continue
        plain = [o for layer in decision.layers for o in outputs_of(adapter.denoiser, layer, call)]
        other = [o for layer in decision.layers for o in outputs_of(adapter.denoiser, layer, call, packed)]
        for i, sample in enumerate(samples):
            noise = signal = 0.0
            for p, q in zip(plain, other, strict=True):
                rows = range(i, len(call.output), len(samples)) if len(p) == len(call.output) else range(len(p))
                noise += sum(float((q[r] - p[r]).double().square().sum()) for r in rows)
                signal += sum(float(p[r].double().square().sum()) for r in rows)
            found[sample] = noise / signal
    return torch.tensor([found[s] for s in range(3)], dtype=torch.float64)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", ["conv_in", "grouped", "time", "first", "twice", "out"])
def test_local_noise_is_that_of_the_layer_alone(name, guided):
    adapter, bank = made(guided)
    probe = probe_sqnr(Lab(adapter, bank), SAMPLING)
    for text in ("uaq3", "uaq8"):
        number_format = next(f for f in bank.space.decision_index[name].formats if str(f) == text)
        for step, part in enumerate(probe.parts):
            expected = expected_ratio(adapter, bank, name, number_format, step)
            found = part.noise[name][text]
            assert found.mean == pytest.approx(float(expected.mean()), rel=FLOAT32_SAMPLING)
            assert found.standard_error == pytest.approx(float(expected.std()) / math.sqrt(3), rel=FLOAT32_SAMPLING)


class MixedDenoiser(ToyDenoiser):
    """All in bfloat16 but the timestep embedder, as some pipelines keep it."""

    def __init__(self):
        super().__init__()
        self.bfloat16()
        self.time.float()
        self.time.register_forward_hook(lambda _module, _args, output: output.bfloat16())

    def forward(self, sample, timestep, label=None, return_dict=True):
        found = super().forward(sample.bfloat16(), timestep, label, return_dict)["sample"].float()
        return {"sample": found}


@pytest.mark.parametrize("name", ["conv_in", "time", "first"])
def test_noise_of_mixed_dtypes_is_that_of_float64(name):
    torch.manual_seed(3)
    adapter = ToyAdapter(MixedDenoiser())
    bank = fit_bank(ToyWeights(adapter.denoiser), toy_space(adapter.denoiser))
    found = probe_sqnr(Lab(adapter, bank), SAMPLING).parts[0].noise[name]["uaq4"].mean
    decision, ratios = bank.space.decision_index[name], []
    for call, samples in batches_of(SAMPLING, record(adapter, SAMPLING).calls):
        noise, signal = torch.zeros(len(samples), dtype=torch.float64), torch.zeros(len(samples), dtype=torch.float64)
        for layer in decision.layers if call.step == 0 else ():
            module, kept = adapter.denoiser.get_submodule(layer), []
            handle = module.register_forward_hook(lambda _m, a, o, kept=kept: kept.append((a[0], o)))
            with torch.no_grad():
                adapter.denoiser(**call.inputs)
            handle.remove()
            quantized = bank.quantized(name, Format.parse("uaq4")).to(torch.float32).dequantize()
            delta = quantized.double() - module.weight.detach().double()
            for inputs, output in kept:
                x = inputs.double()
                change = module._conv_forward(x, delta, None) if x.ndim == 4 else torch.nn.functional.linear(x, delta)
                noise += change.flatten(1).square().sum(1)
                signal += output.double().flatten(1).square().sum(1)
        ratios += (noise / signal).tolist() if call.step == 0 else []
    assert found == pytest.approx(sum(ratios) / len(ratios), rel=FLOAT32_NETWORK)


def test_layers_that_are_never_called_cost_nothing_and_are_named():
    adapter, bank = made()
    table = sqnr_table(bank.space, bank.candidates, probe_sqnr(Lab(adapter, bank), SAMPLING))
    assert table.settings["unused_decisions"] == "unused"
    assert all(c.cost == 0 for c in table.by_decision["unused"])
    costs = {str(c.format): c.cost for c in table.by_decision["first"]}
    assert costs["uaq3"] > costs["uaq4"] > costs["uaq8"] > costs["fp16"] == 0


def test_little_memory_takes_more_passes_and_gives_the_same(monkeypatch):
    adapter, bank = made(guided=True)
    whole = probe_sqnr(Lab(adapter, bank), SAMPLING)
    monkeypatch.setattr(taps, "passes", lambda space, _: exchange.passes(space, 1))
    monkeypatch.setattr(trajectory, "MAX_ROWS", 2)
    parts = probe_sqnr(Lab(adapter, bank), SAMPLING)
    for one, other in zip(whole.parts, parts.parts, strict=True):
        assert one.noise.keys() == other.noise.keys()
        for name, formats in one.noise.items():
            for text, found in formats.items():
                assert other.noise[name][text].mean == pytest.approx(found.mean, rel=FLOAT32_NETWORK)


def test_a_study_keeps_what_was_measured(tmp_path):
    adapter, bank = made()
    with Study(tmp_path) as study:
        first = probe_sqnr(Lab(adapter, bank, study=study), SAMPLING)
        n_calls = adapter.n_calls
        assert probe_sqnr(Lab(adapter, bank, study=study), SAMPLING).parts == first.parts
        assert adapter.n_calls == n_calls + 4  # the trajectory only: two batches of two steps


def test_hooks_are_gone_and_weights_untouched():
    adapter, bank = made()
    before = {n: p.clone() for n, p in adapter.denoiser.named_parameters()}
    probe_sqnr(Lab(adapter, bank), SAMPLING)
    assert not any(module._forward_hooks for module in adapter.denoiser.modules())
    assert all(torch.equal(p, before[n]) for n, p in adapter.denoiser.named_parameters())
